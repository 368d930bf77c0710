"""Which packed rows belong to which adapter, worked out once per batch and used by every layer."""

from typing import NamedTuple

import torch
from torch import Tensor


class Segments(NamedTuple):
    """Rows of a packed batch, grouped by adapter.

    cu_seqlens: int32 [S+1]. adapter: int32 [S], -1 for base-only sequences. num_adapters: G.
    row_adapter: int32 [T], the adapter of every row. order: int64 [T], rows sorted by adapter, each adapter's in their own
    order, base-only rows last. runs: (adapter, start, end) into order, adapters that have rows only, ascending.
    sorted: order is 0, 1, 2, ..., so that a run is a slice.
    """

    cu_seqlens: Tensor
    adapter: Tensor
    num_adapters: int
    row_adapter: Tensor
    order: Tensor
    runs: tuple[tuple[int, int, int], ...]
    sorted: bool

    def rows(self, start: int, end: int) -> slice | Tensor:
        """Index of the rows of one run: a slice where the batch is sorted."""
        return slice(start, end) if self.sorted else self.order[start:end]


def make_segments(cu_seqlens: Tensor, adapter: Tensor, num_adapters: int) -> Segments:
    """Group the rows of packed sequences by adapter.

    cu_seqlens: int32 [S+1], sequence s is rows cu_seqlens[s]:cu_seqlens[s+1]; empty ones are allowed. adapter: int32 [S], in
    any order, -1 for the base model only. num_adapters: G. Raises ValueError where offsets or adapters are out of range.
    """
    if adapter.numel() != cu_seqlens.numel() - 1:
        raise ValueError(f"adapter has {adapter.numel()} entries for {cu_seqlens.numel() - 1} sequences in cu_seqlens")
    lengths = cu_seqlens[1:] - cu_seqlens[:-1]
    if cu_seqlens[0] != 0 or (lengths < 0).any():
        raise ValueError("cu_seqlens must start at 0 and not decrease")
    if adapter.numel() and not (-1 <= int(adapter.min()) and int(adapter.max()) < num_adapters):
        raise ValueError(f"adapter ids must lie in [-1, {num_adapters}), got {int(adapter.min())}..{int(adapter.max())}")
    row_adapter = torch.repeat_interleave(adapter, lengths.long())
    key = torch.where(row_adapter < 0, num_adapters, row_adapter)
    counts = torch.bincount(key, minlength=num_adapters + 1)
    ends = counts.cumsum(0).tolist()
    runs = tuple((g, end - n, end) for g, (n, end) in enumerate(zip(counts.tolist()[:-1], ends, strict=False)) if n)
    in_order = bool((key[1:] >= key[:-1]).all())
    order = torch.arange(key.numel()) if in_order else torch.argsort(key, stable=True)
    return Segments(cu_seqlens, adapter, num_adapters, row_adapter, order, runs, in_order)
