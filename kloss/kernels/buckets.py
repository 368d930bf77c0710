"""Sequences of similar length side by side, for attention in plain torch: worked out once per batch and used by every layer."""

from typing import NamedTuple

import torch
from torch import Tensor


class Buckets(NamedTuple):
    """Slots that attention fills with rows, bucket after bucket. A bucket holds n sequences of at most L rows, L = 8, 16, 32, ...

    parts: for each bucket, index int64 [n, L], the row in each slot, and live bool [n, L], whether the slot is that row's own; a
    slot without a row repeats the last row of its own sequence, so that nothing of another sequence ever comes near.
    index, live: those of all buckets, flat. slot_of_row: int64 [rows of all sequences], the slot that each row owns.
    """

    parts: tuple[tuple[Tensor, Tensor], ...]
    index: Tensor
    live: Tensor
    slot_of_row: Tensor


def make_buckets(cu_seqlens: Tensor) -> Buckets:
    """The buckets of packed sequences. cu_seqlens: int32 [S+1]. On a GPU this reads back the sequences of each bucket."""
    device = cu_seqlens.device
    starts, lengths = cu_seqlens[:-1].long(), (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    rows, longest = (int(cu_seqlens[-1]), int(lengths.max())) if lengths.numel() else (0, 0)
    parts, slot_of_row, used = [], torch.empty(rows, dtype=torch.long, device=device), 0
    below, length = 0, 8
    while below < longest:
        chosen = ((lengths > below) & (lengths <= length)).nonzero()[:, 0]
        if chosen.numel():
            position = torch.arange(length, device=device)
            live = position < lengths[chosen, None]
            index = starts[chosen, None] + torch.minimum(position, lengths[chosen, None] - 1)
            slots = used + torch.arange(index.numel(), device=device).view_as(index)
            slot_of_row[index[live]] = slots[live]
            parts.append((index, live))
            used += index.numel()
        below, length = length, 2 * length
    empty = torch.empty(0, dtype=torch.long, device=device)
    index, live = (torch.cat([part.reshape(-1) for part in kind]) for kind in zip(*parts, (empty, empty.bool()), strict=True))
    return Buckets(tuple(parts), index, live, slot_of_row)
