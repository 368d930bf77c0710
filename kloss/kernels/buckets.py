"""Padded buckets of sequences of similar length, for attention in plain torch. Computed once per batch for all layers."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_offsets


class Buckets(NamedTuple):
    """Padded slots, bucket after bucket. A bucket holds n sequences of at most L rows, L = 8, 16, 32, ...

    blocks: for each bucket index int64 [n, L], the row in each slot, and live bool [n, L], False for padding. Padding repeats the
        sequence's own last row, so no other sequence can leak.
    row_of_slot, live: those of all buckets, flat.
    slot_of_row: int64 [rows of all sequences], each row's own slot.
    cu_seqlens: int [S+1], of the sequences.
    """

    blocks: tuple[tuple[Tensor, Tensor], ...]
    row_of_slot: Tensor
    live: Tensor
    slot_of_row: Tensor
    cu_seqlens: Tensor


def make_buckets(cu_seqlens: Tensor) -> Buckets:
    """The buckets of packed sequences. On a GPU this reads back the sequences of each bucket.

    cu_seqlens: int [S+1].
    Raises ValueError on a CPU for offsets that do not start at 0 or that decrease. On a GPU an assertion stops the device.
    """
    check_offsets(cu_seqlens, None)
    device = cu_seqlens.device
    starts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    rows, longest = (int(cu_seqlens[-1]), int(lengths.max())) if lengths.numel() else (0, 0)
    blocks, slot_of_row, used = [], torch.empty(rows, dtype=torch.long, device=device), 0
    below, length = 0, 8
    while below < longest:
        members = ((lengths > below) & (lengths <= length)).nonzero()[:, 0]
        if members.numel():
            position = torch.arange(length, device=device)
            live = position < lengths[members, None]
            index = starts[members, None] + torch.minimum(position, lengths[members, None] - 1)
            slots = used + torch.arange(index.numel(), device=device).view_as(index)
            slot_of_row[index[live]] = slots[live]
            blocks.append((index, live))
            used += index.numel()
        below, length = length, 2 * length
    empty = torch.empty(0, dtype=torch.long, device=device)
    index, live = (torch.cat([x.reshape(-1) for x in column]) for column in zip(*blocks, (empty, empty.bool()), strict=True))
    return Buckets(tuple(blocks), index, live, slot_of_row, cu_seqlens)
