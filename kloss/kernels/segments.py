"""Which packed rows belong to which adapter, computed once per batch and used by every layer.

Kernels walk the rows in `order`, where each adapter's rows are neighbours. A tile is a stretch of `order` that starts at a
multiple of its height from the adapter's own first row. So what a kernel computes for an adapter depends on that adapter's rows
alone. The sizes of all work lists follow from numbers that the host knows (rows, adapters). So nothing is read back from the
device, and a captured CUDA graph can replay with other contents.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import INTS, check, check_ids, check_offsets

SHORT_TILE, LONG_TILE = 64, 128  # rows of a tile, fixed for each kernel: an adapter's bits must not depend on the batch
CHUNK = 1024  # rows of a chunk; one program of a reduction adds up `tuned.span` of them


class Work(NamedTuple):
    """What the programs of a launch do. Unused entries have first == last.

    tiles_64: int32 [tiles, 3], (adapter or -1, first, last) into order, at most SHORT_TILE rows each.
    tiles_128: the same with at most LONG_TILE rows.
    chunks: int32 [G + T // CHUNK, 4], (adapter or -1, first, last, slot). Every adapter has at least one, even without rows. An
        adapter with several has consecutive entries, and slots of a workspace; a single chunk has slot -1.
    slots: int32 [G+1], adapter g has slots slots[g]:slots[g+1], none if it has one chunk.
    """

    tiles_64: Tensor
    tiles_128: Tensor
    chunks: Tensor
    slots: Tensor


class Segments(NamedTuple):
    """Rows of a packed batch, grouped by adapter.

    cu_seqlens: int32 [S+1].
    adapter: int32 [S], -1 for base-only sequences.
    num_adapters: G.
    row_adapter: int32 [T], the adapter of every row.
    order: int64 [T], rows sorted by adapter, each adapter's in their own order, base-only rows last.
    runs: (adapter, start, end) into order of each adapter that has rows, ascending. None on a GPU: reading it back would wait.
    sorted: whether order is 0, 1, 2, ..., so that a run is a slice. None on a GPU unless who packed the batch knows it.
    ends: int64 [G+1], adapter g ends at ends[g] in order, ends[G] = T.
    work: the Triton kernels' lists. None on a CPU, see `with_work`.
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
        """Index of the rows of a run: a slice where the batch is sorted."""
        return slice(start, end) if self.sorted else self.order[start:end]

    def host_runs(self) -> tuple[tuple[int, int, int], ...]:
        """`runs`, read back from the device where they are not on the host."""
        return host_runs(self.ends) if self.runs is None else self.runs


def make_segments(cu_seqlens: Tensor, adapter: Tensor, num_adapters: int, *, rows: int | None = None) -> Segments:
    """Group the rows of packed sequences by adapter.

    cu_seqlens: int [S+1], sequence s is rows cu_seqlens[s]:cu_seqlens[s+1]; empty ones are allowed.
    adapter: int [S], in any order, -1 for the base model only.
    num_adapters: G.
    rows: T, rows of the packed tensors; those behind cu_seqlens[-1] get the base model's value. None: T is cu_seqlens[-1], for
        which the host waits on a GPU; with a number nothing is read back.
    Raises ValueError for tensors that do not fit each other, on a CPU also for offsets or adapters out of range. On a GPU an
        assertion stops the device.
    """
    if num_adapters < 0 or (rows is not None and rows < 0):
        raise ValueError(f"num_adapters and rows must be at least 0, got {num_adapters} and {rows}")
    check_offsets(cu_seqlens, rows)
    check("adapter", adapter, (cu_seqlens.numel() - 1,), INTS, cu_seqlens.device)
    check_ids("adapter ids", adapter, -1, num_adapters)
    cu_seqlens, adapter = cu_seqlens.to(torch.int32).contiguous(), adapter.to(torch.int32).contiguous()
    rows = int(cu_seqlens[-1]) if rows is None else rows
    on_cpu = cu_seqlens.device.type == "cpu"
    row_adapter = _spread(torch.cat([adapter, adapter.new_full((1,), -1)]), cu_seqlens, rows)
    key = torch.where(row_adapter < 0, num_adapters, row_adapter)
    in_order = bool((key[1:] >= key[:-1]).all()) if on_cpu else None
    ranked, order = (key, torch.arange(rows)) if in_order else torch.sort(key, stable=True)
    last = torch.arange(num_adapters + 1, dtype=key.dtype, device=key.device)
    ends = torch.searchsorted(ranked, last, right=True)
    segments = Segments(cu_seqlens, adapter, num_adapters, row_adapter, order, None, in_order, ends)
    return segments._replace(runs=host_runs(ends)) if on_cpu else with_work(segments)


def with_work(segments: Segments) -> Segments:
    """The segments with the kernels' work lists, built if they are missing."""
    if segments.work is not None:
        return segments
    rows, ends = segments.order.numel(), segments.ends
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    count = ends - starts
    tiles_64, tiles_128 = (
        cut(starts, ends, (count + size - 1) // size, size, tile_capacity(rows, segments.num_adapters, size), base=True)
        for size in (SHORT_TILE, LONG_TILE)
    )
    starts, ends, count = starts[:-1], ends[:-1], count[:-1]
    pieces = ((count + CHUNK - 1) // CHUNK).clamp(min=1)
    in_slots = torch.where(pieces > 1, pieces, 0)
    slots = torch.cat([pieces.new_zeros(1), in_slots.cumsum(0)])
    chunks = cut(starts, ends, pieces, CHUNK, segments.num_adapters + rows // CHUNK)
    g, first = chunks[:, 0].clamp(min=0).long(), chunks[:, 1]
    if segments.num_adapters:
        slot = torch.where((chunks[:, 0] >= 0) & (in_slots[g] > 0), slots[g] + (first - starts[g]) // CHUNK, -1)
    else:
        slot = first
    chunks = torch.cat([chunks, slot.to(torch.int32)[:, None]], 1)
    return segments._replace(work=Work(tiles_64, tiles_128, chunks, slots.to(torch.int32)))


def host_runs(ends: Tensor) -> tuple[tuple[int, int, int], ...]:
    """(adapter, start, end) of each adapter that has rows; the host waits for a GPU. ends: [G+1], of `Segments`."""
    bounds = [0, *ends.tolist()]
    return tuple((g, *bounds[g : g + 2]) for g in range(ends.numel() - 1) if bounds[g] < bounds[g + 1])


def rows_of(runs: tuple[tuple[int, int, int], ...], order: Tensor) -> list[slice | Tensor]:
    """Index of the rows of each run: slices where `order` is sorted."""
    in_order = bool((order[1:] > order[:-1]).all())
    return [slice(start, end) if in_order else order[start:end] for _, start, end in runs]


def tile_capacity(rows: int, num_adapters: int, size: int) -> int:
    """The most tiles of `size` rows that a batch of `rows` rows can need; rows without an adapter count as one adapter more."""
    return min(rows, (rows + (num_adapters + 1) * (size - 1)) // size)


def slot_capacity(rows: int, span: int = 1) -> int:
    """The most workspace slots that a batch of `rows` rows can need: cdiv(n, CHUNK) <= 2n / CHUNK for n > CHUNK.

    span: chunks that one program adds up; adapters with no more need no workspace.
    """
    return 2 * rows // CHUNK if rows > span * CHUNK else 0


def cut(starts: Tensor, ends: Tensor, pieces: Tensor, size: int, capacity: int, *, base: bool = False) -> Tensor:
    """Cut each run starts:ends into `pieces` of `size` rows: int32 [capacity, 3], (run, first, last), the run -1 where unused.

    base: the last run counts as -1 too.
    """
    runs = pieces.numel()
    index = torch.arange(capacity, device=pieces.device)
    until = pieces.cumsum(0)
    run = torch.searchsorted(until, index, right=True)
    if not runs:
        return torch.tensor([-1, 0, 0], dtype=torch.int32, device=pieces.device).repeat(capacity, 1)
    g = run.clamp(max=runs - 1)
    first = starts[g] + (index - (until - pieces)[g]) * size
    last = torch.minimum(first + size, ends[g])
    used = run < runs
    adapter = torch.where(used & (g < runs - base), g, -1)
    zero = first.new_zeros(())
    return torch.stack([adapter, torch.where(used, first, zero), torch.where(used, last, zero)], 1).to(torch.int32)


def _spread(values: Tensor, cu_seqlens: Tensor, rows: int) -> Tensor:
    """The value [rows] of each row's sequence. values: [S+1], the last for rows behind the last offset."""
    row = torch.arange(rows, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return values[torch.searchsorted(cu_seqlens[1:], row, right=True)]
