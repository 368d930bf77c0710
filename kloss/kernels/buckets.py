"""How attention walks packed sequences: padded buckets in plain torch, tiles in Triton,
offsets in C++. Computed once a batch for all layers."""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_offsets
from .segments import cut
from .tuned import bucket

# Rows of the short classes' tiles; longer sequences are cut into blocks of the last. Exact products in fp32 fill the registers.
CLASSES = {"half": (16, 32, 64), "single": (16, 32)}


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


class Offsets(NamedTuple):
    """The offsets themselves, int [S+1], where C++ walks the sequences."""

    cu_seqlens: Tensor


class AttentionTiles(NamedTuple):
    """What the programs of a launch do, int32 [tiles, 3] for each class: the sequence's first row and its end, and the tile's
    first row. Unused tiles have first row and end 0. The lengths follow from the numbers of rows and sequences.

    short: one list for each of CLASSES.
    longer: blocks of the sequences that no short class has.
    cu_seqlens: int32 [S+1], of the sequences, contiguous.
    """

    short: tuple[Tensor, ...]
    longer: Tensor
    cu_seqlens: Tensor


def attention_tiles(cu_seqlens: Tensor, rows: int, dtype: torch.dtype) -> AttentionTiles:
    """The tiles of packed sequences. Nothing is read back from the device.

    cu_seqlens: int [S+1].
    rows: T.
    dtype: of q, k and v.
    Raises ValueError as `make_buckets` does.
    """
    check_offsets(cu_seqlens, rows)
    cu_seqlens = cu_seqlens.to(torch.int32).contiguous()
    starts, ends, classes = cu_seqlens[:-1].long(), cu_seqlens[1:].long(), CLASSES[bucket(dtype)]
    lengths, lists, below = ends - starts, [], 0
    for size in (*classes, rows):
        height = max(1, min(size, classes[-1]))
        pieces = torch.where((lengths > below) & (lengths <= size), (lengths + height - 1) // height, 0)
        # n > below rows are cut into one piece, or into cdiv(n, height) <= 2n / height where height = below.
        capacity = min(lengths.numel(), rows // (below + 1)) if size in classes else 2 * rows // height if rows > below else 0
        tiles = cut(starts, ends, pieces, height, capacity)
        if lengths.numel():
            sequence = tiles[:, 0].clamp(min=0).long()
            tiles = torch.stack([starts[sequence], ends[sequence], tiles[:, 1]], 1).where(tiles[:, :1] >= 0, 0).to(torch.int32)
        lists.append(tiles)
        below = size
    return AttentionTiles(tuple(lists[:-1]), lists[-1], cu_seqlens)
