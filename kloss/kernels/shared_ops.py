"""The ops whose bodies in `csrc/shared` run on a CPU and on a GPU: AdamW of the bank, span counts, work lists.

The operators `kloss::adamw_`, `kloss::span_counts_` and `kloss::work_lists_` write into their outputs and check every argument.
The functions here allocate the outputs. They never wait for a GPU.
"""

import ctypes
import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from .buckets import CLASSES
from .cpu_library import built
from .segments import CHUNK, LONG_TILE, SHORT_TILE, Segments, Work, tile_capacity

VARIANT = 0  # of AdamW's instruction sets on a CPU: 0 has the widest; for tests
SHORT_CLASSES = CLASSES["half"]  # of attention; a batch has the first one, two or three


class Lists(NamedTuple):
    """What the kernels of a step walk.

    segments: with `work`; `runs` and `sorted` are None, as on a GPU.
    row_key: int64 [T] of `row_keys`, 0 for rows without an adapter's step; None without steps.
    position: int32 [T], each row's within its sequence; those behind the last sequence count from its end.
    short, longer: of `AttentionTiles`, int32 [tiles, 3]; () and None without classes.
    """

    segments: Segments
    row_key: Tensor | None
    position: Tensor
    short: tuple[Tensor, ...]
    longer: Tensor | None


def runs_on(device: torch.device) -> bool:
    """Whether the ops are built for a device; loads them. A CPU without a compiler and a GPU without nvcc lack them."""
    if device.type == "cuda":
        from .cuda_library import load  # only here: it needs a GPU's driver

        return built() and load()
    return device.type == "cpu" and built()


def huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, once Linux is asked to hold it in huge pages: `adamw_` over a bank that no cache holds takes a third less time.

    It works for memory that nobody has written to: call it on what `torch.empty` gives. It is advice, which a system may ignore.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    if tensor.device.type == "cpu" and advice is not None:
        start, page = tensor.data_ptr(), mmap.PAGESIZE
        first, last = -(-start // page) * page, (start + tensor.nbytes) // page * page
        if first < last:
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)
    return tensor


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Tensor,
    max_norm: Tensor,
    active: Tensor,
    work: Tensor | None = None,
    tail: int | None = None,
    tail_lr: Tensor | None = None,
) -> Tensor:
    """One AdamW step for each active row whose gradient norm is finite, as `adapter_adamw_`; all tensors on param's device.

    param, exp_avg, exp_avg_sq: fp32 [G, P]; rows may lie apart, each must be contiguous.
    grad: [G, P] in fp32, bf16 or fp16.
    step: int64 [G], steps so far; counted up for rows that move.
    lr, weight_decay, max_norm: fp32 [G]. active: bool [G].
    work: [G, P] in grad's dtype, or any of the three where that is fp32, or None; gets the new weights of rows that move. Not
        param itself.
    tail, tail_lr: the first column of those with another rate, and that, fp32 [G]; both None: there are none.
    Returns the norms before clipping, fp32 [G], 0 for inactive rows.
    Raises RuntimeError for what does not fit.
    """
    norms = torch.empty(param.shape[0], dtype=torch.float32, device=param.device)
    tail, tail_lr = (param.shape[1], lr) if tail is None or tail_lr is None else (tail, tail_lr)
    numbers = lr, tail, tail_lr, weight_decay, max_norm, active
    torch.ops.kloss.adamw_(param, grad, exp_avg, exp_avg_sq, step, *numbers, *betas, eps, work, VARIANT, norms)
    return norms


def span_counts(
    pred: Tensor,
    gold: Tensor,
    cu_seqlens: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    tags: Tensor | None = None,
    types: Tensor | None = None,
    strict: bool = False,
) -> Tensor:
    """Counts for micro span F1 of every group, int64 [num_groups, 3]; arguments as in `eager.span_counts`, of any int dtype.

    strict: on a CPU, refuse tags outside 0..2, and labels of gold below 0 that are not -100; else no such row counts.
    Raises RuntimeError for labels, groups or offsets out of range; on a GPU the device stops.
    """
    counts = torch.zeros(num_groups, 3, dtype=torch.int64, device=pred.device)
    longs = (None if t is None else t.long().contiguous() for t in (pred, gold, group, tags, types))
    pred_, gold_, group_, tags_, types_ = longs
    torch.ops.kloss.span_counts_(pred_, gold_, cu_seqlens.int().contiguous(), group_, tags_, types_, counts, strict)
    return counts


def work_lists(
    cu_seqlens: Tensor,
    adapter: Tensor,
    num_adapters: int,
    rows: int,
    *,
    step: Tensor | None = None,
    sequence: Tensor | None = None,
    classes: int = 0,
    longest: int | None = None,
    most: int | None = None,
    backwards: bool = False,
) -> Lists:
    """All that a batch's kernels walk, in one call.

    cu_seqlens: int32 [S+1]. adapter: int32 [S], -1 for the base model only.
    rows: T, at least cu_seqlens[-1].
    step: int64 [G], each adapter's, below 2^31; with `sequence`, int64 [S], each one's number within its learner's batch, below
        2^16. Or both None.
    classes: how many of SHORT_CLASSES attention has; 0: no tiles for attention.
    longest: rows of the longest sequence or more; classes that none reaches get no tiles. None: unknown.
    most: rows of the adapter with most of them, or more; with at most CHUNK there is one chunk for each. None: unknown.
    backwards: whether a CPU runs the threads of a phase from last to first; the result is the same. For tests.
    Raises RuntimeError for offsets, adapters, steps or sequences out of range; on a GPU the device stops.
    """
    G, S, device = num_adapters, adapter.numel(), cu_seqlens.device

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    def longs(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=device)

    more = rows // CHUNK if most is None or most > CHUNK else 0
    work = Work(
        ints(tile_capacity(rows, G, SHORT_TILE), 3), ints(tile_capacity(rows, G, LONG_TILE), 3), ints(G + more, 4), ints(G + 1)
    )
    row_adapter, order, ends, position = ints(rows), longs(rows), longs(G + 1), ints(rows)
    row_key = None if step is None else longs(rows)
    heights = SHORT_CLASSES[:classes]
    longest = rows if longest is None else min(longest, rows)
    short = tuple(ints(min(S, rows // (below + 1)) if longest > below else 0, 3) for below in (0, *heights)[:classes])
    longer = ints(2 * rows // heights[-1] if longest > heights[-1] else 0, 3) if heights else None
    absent = (None,) * (len(SHORT_CLASSES) - classes)
    torch.ops.kloss.work_lists_(
        cu_seqlens,
        adapter,
        step,
        sequence,
        backwards,
        row_adapter,
        order,
        ends,
        *work,
        *short,
        *absent,
        longer,
        row_key,
        position,
    )
    segments = Segments(cu_seqlens, adapter, G, row_adapter, order, None, None, ends, work)
    return Lists(segments, row_key, position, short, longer)
