"""Which packed rows belong to which adapter, worked out once per batch and used by every layer.

Kernels do not walk the batch but its rows in `order`, where each adapter's rows are neighbours. A tile is a
stretch of `order` that starts at a multiple of its height from the adapter's own first row, so what a kernel
computes for an adapter depends on that adapter's rows alone. Sizes of all work lists follow from numbers that
the host knows (rows, adapters), so nothing is read back from the device and a captured CUDA graph can replay
with other contents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SHORT_TILE, LONG_TILE = 64, 128  # rows of a tile, per kernel fixed: an adapter's bits must not depend on the batch
CHUNK = 1024  # rows that one program of a reduction over an adapter's rows adds up


class Work(NamedTuple):
    """What the programs of a launch do. Entries that are not needed have first == last.

    short, long: int32 [tiles, 3], (adapter or -1, first, last) into order, at most SHORT_TILE and LONG_TILE
    rows each. chunks: int32 [G + T // CHUNK, 4], (adapter or -1, first, last, slot): every adapter has at
    least one, even without rows; those of an adapter with several get consecutive slots of a workspace, a
    single one has slot -1. slots: int32 [G+1], adapter g has slots slots[g]:slots[g+1], none if it has one
    chunk.
    """

    short: Tensor
    long: Tensor
    chunks: Tensor
    slots: Tensor


class Segments(NamedTuple):
    """Rows of a packed batch, grouped by adapter.

    cu_seqlens: int32 [S+1]. adapter: int32 [S], -1 for base-only sequences. num_adapters: G. row_adapter:
    int32 [T], the adapter of every row. order: int64 [T], rows sorted by adapter, each adapter's in their own
    order, base-only rows last. runs: (adapter, start, end) into order, adapters that have rows only,
    ascending. sorted: order is 0, 1, 2, ..., so that a run is a slice. Both are None on a GPU, where they
    would need a synchronisation. ends: int64 [G+1], adapter g ends at ends[g] in order, ends[G] = T. work:
    the kernels' lists; None on a CPU, see `with_work`.
    """

    cu_seqlens: Tensor
    adapter: Tensor
    num_adapters: int
    row_adapter: Tensor
    order: Tensor
    runs: tuple[tuple[int, int, int], ...] | None
    sorted: bool | None
    ends: Tensor
    work: Work | None = None

    def rows(self, start: int, end: int) -> slice | Tensor:
        """Index of the rows of one run: a slice where the batch is sorted."""
        return slice(start, end) if self.sorted else self.order[start:end]

    def host_runs(self) -> tuple[tuple[int, int, int], ...]:
        """`runs`, read back from the device where they are not on the host."""
        if self.runs is not None:
            return self.runs
        bounds = [0, *self.ends.tolist()]
        return tuple((g, *bounds[g : g + 2]) for g in range(self.num_adapters) if bounds[g] < bounds[g + 1])


def make_segments(cu_seqlens: Tensor, adapter: Tensor, num_adapters: int, *, rows: int | None = None) -> Segments:
    """Group the rows of packed sequences by adapter.

    cu_seqlens: int32 [S+1], sequence s is rows cu_seqlens[s]:cu_seqlens[s+1]; empty ones are allowed.
    adapter: int32 [S], in any order, -1 for the base model only. num_adapters: G. rows: T, how many rows the
    packed tensors have; those behind cu_seqlens[-1] get the base model's value. Without it T is
    cu_seqlens[-1], which on a GPU has to wait for the device; with it nothing is read back. Raises ValueError
    on a CPU where offsets or adapters are out of range; on a GPU the same faults, too many rows among them,
    stop the device with an assertion.
    """
    if adapter.numel() != cu_seqlens.numel() - 1:
        raise ValueError(f"adapter has {adapter.numel()} entries for {cu_seqlens.numel() - 1} sequences in cu_seqlens")
    rows = int(cu_seqlens[-1]) if rows is None else rows
    on_cpu = cu_seqlens.device.type == "cpu"
    (_check_now if on_cpu else _check_on_device)(cu_seqlens, adapter, num_adapters, rows)
    row_adapter = _spread(torch.cat([adapter, adapter.new_full((1,), -1)]), cu_seqlens, rows)
    key = torch.where(row_adapter < 0, num_adapters, row_adapter)
    in_order = bool((key[1:] >= key[:-1]).all()) if on_cpu else None
    ranked, order = (key, torch.arange(rows)) if in_order else torch.sort(key, stable=True)
    last = torch.arange(num_adapters + 1, dtype=key.dtype, device=key.device)
    ends = torch.searchsorted(ranked, last, right=True)
    segments = Segments(cu_seqlens, adapter, num_adapters, row_adapter, order, None, in_order, ends)
    return segments._replace(runs=segments.host_runs()) if on_cpu else with_work(segments)


def with_work(segments: Segments) -> Segments:
    """The segments with the kernels' work lists; unchanged where they are there already."""
    if segments.work is not None:
        return segments
    rows, ends = segments.order.numel(), segments.ends
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    count = ends - starts
    capacity = [tile_capacity(rows, segments.num_adapters, size) for size in (SHORT_TILE, LONG_TILE)]
    short, long = (
        _cut(starts, ends, (count + size - 1) // size, size, most, base=True)
        for size, most in zip((SHORT_TILE, LONG_TILE), capacity, strict=True)
    )
    starts, ends, count = starts[:-1], ends[:-1], count[:-1]
    parts = ((count + CHUNK - 1) // CHUNK).clamp(min=1)
    in_slots = torch.where(parts > 1, parts, 0)
    slots = torch.cat([parts.new_zeros(1), in_slots.cumsum(0)])
    chunks = _cut(starts, ends, parts, CHUNK, segments.num_adapters + rows // CHUNK, base=False)
    g, first = chunks[:, 0].clamp(min=0).long(), chunks[:, 1]
    if segments.num_adapters:
        slot = torch.where((chunks[:, 0] >= 0) & (in_slots[g] > 0), slots[g] + (first - starts[g]) // CHUNK, -1)
    else:
        slot = first
    chunks = torch.cat([chunks, slot.to(torch.int32)[:, None]], 1)
    return segments._replace(work=Work(short, long, chunks, slots.to(torch.int32)))


def tile_capacity(rows: int, num_adapters: int, size: int) -> int:
    """How many tiles of `size` rows any batch of `rows` rows needs at most; rows without an adapter count as
    one more.
    """
    return min(rows, (rows + (num_adapters + 1) * (size - 1)) // size)


def slot_capacity(rows: int) -> int:
    """How many workspace slots the chunks of any batch of `rows` rows need at most: cdiv(n, CHUNK) <= 2n /
    CHUNK for n > CHUNK.
    """
    return 2 * rows // CHUNK if rows > CHUNK else 0


def _cut(starts: Tensor, ends: Tensor, parts: Tensor, size: int, capacity: int, *, base: bool) -> Tensor:
    """Cut each group's rows starts:ends into parts of `size` rows, laid into int32 [capacity, 3]; base: the
    last group is -1.
    """
    groups = parts.numel()
    index = torch.arange(capacity, device=parts.device)
    until = parts.cumsum(0)
    group = torch.searchsorted(until, index, right=True)
    if not groups:
        return torch.tensor([-1, 0, 0], dtype=torch.int32, device=parts.device).repeat(capacity, 1)
    g = group.clamp(max=groups - 1)
    first = starts[g] + (index - (until - parts)[g]) * size
    last = torch.minimum(first + size, ends[g])
    used = group < groups
    name = torch.where(used & (g < groups - base), g, -1)
    zero = first.new_zeros(())
    return torch.stack([name, torch.where(used, first, zero), torch.where(used, last, zero)], 1).to(torch.int32)


def _spread(values: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """The value of each row's sequence; values[S] for rows behind the last offset. values: [S+1]. Returns
    [rows].
    """
    row = torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return values[torch.searchsorted(cu_seqlens[1:], row, right=True)]


def _check_now(cu_seqlens: Tensor, adapter: Tensor, num_adapters: int, rows: int) -> None:
    if cu_seqlens[0] != 0 or (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise ValueError("cu_seqlens must start at 0 and not decrease")
    if int(cu_seqlens[-1]) > rows:
        raise ValueError(f"cu_seqlens ends at {int(cu_seqlens[-1])}, more than the {rows} rows there are")
    low, high = (int(adapter.min()), int(adapter.max())) if adapter.numel() else (-1, -1)
    if low < -1 or high >= num_adapters:
        raise ValueError(f"adapter ids must lie in [-1, {num_adapters}), got {low}..{high}")


def _check_on_device(cu_seqlens: Tensor, adapter: Tensor, num_adapters: int, rows: int) -> None:
    fits = (cu_seqlens[0] == 0) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all() & (cu_seqlens[-1] <= rows)
    known = ((adapter >= -1) & (adapter < num_adapters)).all()
    torch._assert_async(fits, f"cu_seqlens must start at 0, not decrease, and end within the {rows} rows there are")
    torch._assert_async(known, f"adapter ids must lie in [-1, {num_adapters})")
