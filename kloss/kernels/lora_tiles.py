"""The Triton kernels of the multi-adapter linear and their launchers: expand, reduce, and the sum of partial reductions. The
fourth, shrink, is in `lora_shrink.py`.

Equations: `lora_triton.py`. Order and tiles: `segments.py`. Sizes: T rows, K contraction, C columns of a block of outputs, R rank
of the bank, SR slices * R, G adapters. Outputs have `blocks` blocks of columns: one per slice if slices have their own, else 1.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuned
from .dropout_device import keep_block, threshold_of
from .segments import LONG_TILE, SHORT_TILE, Work, slot_capacity

# Small tensors are often slices of others: a binary for each alignment of theirs would be compiled in mid-run.
SMALL = ("tiles_ptr", "chunks_ptr", "slots_ptr", "ranks_ptr", "scaling_ptr", "p_ptr", "seed_ptr", "row_key_ptr")


@triton.jit
def own_rank(ranks_ptr, g, R):
    """The adapter's rank within [0, R], for a wrong one must not reach another adapter's memory; 0 for g < 0. And that rank
    rounded up to 16 within R: loads with a mask of so many ranks keep 16 bytes at once. int32, twice."""
    rank = tl.load(ranks_ptr + g, mask=g >= 0, other=0)
    rank = tl.minimum(tl.maximum(rank, 0), R).to(tl.int32)
    return rank, tl.minimum((rank + 15) // 16 * 16, R)


@triton.jit
def rows_of(order_ptr, o_i, m_t):
    """order[o_i], int64; None is 0, 1, 2, ..., which is not loaded: a loop over rows then waits for one load, not for two."""
    return o_i.to(tl.int64) if order_ptr is None else tl.load(order_ptr + o_i, mask=m_t, other=0)


@triton.jit
def add_product(acc, a, b):
    """acc + a b. In fp32 a block's products are summed apart: one running sum over a long contraction loses two bits more.

    Without `max_num_imprecise_acc`, which fp32 does not heed, the compiler would move acc back into the sum.
    """
    if a.dtype == tl.float32:
        acc += tl.dot(a, b, input_precision="ieee", max_num_imprecise_acc=1)
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize_on_alignment=SMALL)
def expand_kernel(
    s_ptr,  # [T, slices*R], rows in order
    f_ptr,  # [G, ...], element (column c, slice i, rank r) at c*stride_fc + i*stride_fs + r*stride_fr
    x_ptr,  # [T, K]
    w_ptr,  # [K, blocks*C]
    bias_ptr,  # [blocks*C] or None
    y_ptr,  # [T, blocks*C]
    order_ptr,  # [T]
    tiles_ptr,  # [tiles, 3]
    ranks_ptr,  # [G] or None
    scaling_ptr,  # [G] or None
    p_ptr,  # [G]
    keys_ptr,  # [T], rows in order
    K, C, R, blocks, slices,
    stride_xt, stride_xk, stride_wk, stride_wc, stride_yt, stride_fg, stride_fc, stride_fs, stride_fr,
    FUSED: tl.constexpr, DROPOUT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[t, n] = scaling_g mask Σ_r S[i, r] f[g, n, r] + bias[n] + (x[t] w[:, n] if FUSED), t = order[i].

    blocks > 1: block i_s of C columns takes slice i_s of S only. blocks == 1: the sum runs over all slices.
    """
    blocks_c = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    i_c, i_s, i_t = pid % blocks_c, pid // blocks_c % blocks, pid // (blocks_c * blocks)
    g = tl.load(tiles_ptr + i_t * 3).to(tl.int64)
    first, last = tl.load(tiles_ptr + i_t * 3 + 1), tl.load(tiles_ptr + i_t * 3 + 2)
    if first >= last:
        return
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    o_n = (i_s * C + o_c).to(tl.int64)
    o_i = first + tl.arange(0, BT)
    m_t = o_i < last
    o_t = rows_of(order_ptr, o_i, m_t)
    if ranks_ptr is None:
        rank, padded = R, R
    else:
        rank, padded = own_rank(ranks_ptr, g, R)
    steps = tl.cdiv(rank, BR)
    per_block = slices // blocks
    acc = tl.zeros((BT, BC), tl.float32)
    f_ptr += g * stride_fg
    for j in range(0, tl.where(g >= 0, per_block * steps, 0)):
        i_f, o_r = i_s * per_block + j // steps, j % steps * BR + tl.arange(0, BR)
        m_r = o_r < padded
        p_s = s_ptr + o_i.to(tl.int64)[:, None] * (slices * R) + (i_f * R + o_r)[None, :]
        b_s = tl.load(p_s, mask=m_t[:, None] & m_r[None, :], other=0.0)  # [BT, BR]
        p_f = f_ptr + o_n[None, :] * stride_fc + i_f.to(tl.int64) * stride_fs + o_r.to(tl.int64)[:, None] * stride_fr
        b_f = tl.load(p_f, mask=m_r[:, None] & m_c[None, :], other=0.0)  # [BR, BC]
        if ranks_ptr is not None:  # S has zeros there
            b_f = tl.where((o_r < rank)[:, None], b_f, 0.0)
        acc = add_product(acc, b_s, b_f.to(b_s.dtype))
    if DROPOUT:
        threshold, scale = threshold_of(tl.load(p_ptr + g, mask=g >= 0, other=0.0))
        keys = tl.load(keys_ptr + o_i, mask=m_t, other=0).to(tl.uint64, bitcast=True)
        acc = tl.where(keep_block(keys, threshold, i_c * BC, BC), acc * scale, 0.0)
    if scaling_ptr is not None:
        acc *= tl.load(scaling_ptr + g, mask=g >= 0, other=0.0)
    if FUSED:
        o_k = tl.arange(0, BK)
        p_x = x_ptr + o_t[:, None] * stride_xt + o_k.to(tl.int64)[None, :] * stride_xk
        p_w = w_ptr + o_k.to(tl.int64)[:, None] * stride_wk + o_n[None, :] * stride_wc
        for k in range(0, K, BK):
            b_x = tl.load(p_x, mask=m_t[:, None] & (o_k < K - k)[None, :], other=0.0)  # [BT, BK]
            b_w = tl.load(p_w, mask=(o_k < K - k)[:, None] & m_c[None, :], other=0.0)  # [BK, BC]
            acc = add_product(acc, b_x, b_w)
            p_x += BK * stride_xk
            p_w += BK * stride_wk
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + o_n, mask=m_c, other=0.0).to(tl.float32)[None, :]
    p_y = y_ptr + o_t[:, None] * stride_yt + o_n[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), mask=m_t[:, None] & m_c[None, :])


@triton.jit(do_not_specialize_on_alignment=SMALL)
def reduce_kernel(
    x_ptr,  # [T, blocks*C]
    s_ptr,  # [T, blocks*SR], rows in order
    out_ptr,  # [G, ...], element (column n of blocks*C, r) at n*stride_oc + r*stride_or
    part_ptr,  # [slots, ...] fp32, laid out like out
    order_ptr,  # [T] or None
    chunks_ptr,  # [chunks, 4]
    slots_ptr,  # [G+1]
    ranks_ptr,  # [G] or None
    scaling_ptr,  # [G] or None
    p_ptr,  # [G]
    keys_ptr,  # [T], rows in order
    C, SR, R, blocks,
    stride_xt, stride_xk, stride_og, stride_pg, stride_oc, stride_or,
    SPAN: tl.constexpr, DROPOUT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """out[g, i_s*C + c, r] = scaling_g Σ_i drop(x[order[i], i_s*C + c]) S[i, i_s*SR + r] over the adapter's rows, in order.

    A program adds SPAN chunks, the first of which is its own; an adapter with more has several sums in part.
    """
    blocks_c, blocks_r = tl.cdiv(C, BC), tl.cdiv(SR, BR)
    pid = tl.program_id(0)
    i_c, i_s = pid % blocks_c, pid // blocks_c % blocks
    i_r, i_t = pid // (blocks_c * blocks) % blocks_r, pid // (blocks_c * blocks * blocks_r)
    g = tl.load(chunks_ptr + i_t * 4).to(tl.int64)
    if g < 0:
        return
    slot, first_slot = tl.load(chunks_ptr + i_t * 4 + 3), tl.load(slots_ptr + g)
    chunks = tl.load(slots_ptr + g + 1) - first_slot  # 0 where there is one
    i_chunk = tl.where(slot < 0, 0, slot - first_slot)
    if i_chunk % SPAN != 0:
        return
    i_last = i_t + tl.maximum(tl.minimum(chunks - i_chunk, SPAN) - 1, 0)
    first, last = tl.load(chunks_ptr + i_t * 4 + 1), tl.load(chunks_ptr + i_last * 4 + 2)
    o_c, o_r = i_c * BC + tl.arange(0, BC), i_r * BR + tl.arange(0, BR)
    m_c, m_r = o_c < C, o_r < SR
    live = m_r
    if ranks_ptr is not None:
        rank, padded = own_rank(ranks_ptr, g, R)
        live, m_r = m_r & (o_r % R < rank), m_r & (o_r % R < padded)
        last = tl.where(tl.max(live.to(tl.int32)) == 0, first, last)
    scaling = 1.0 if scaling_ptr is None else tl.load(scaling_ptr + g)
    if DROPOUT:
        threshold, scaling = threshold_of(tl.load(p_ptr + g))
    acc = tl.zeros((BC, BR), tl.float32)
    for i in range(first, last, BT):
        o_i = i + tl.arange(0, BT)
        m_t = o_i < last
        o_t = rows_of(order_ptr, o_i, m_t)
        p_x = x_ptr + o_t[:, None] * stride_xt + (i_s * C + o_c).to(tl.int64)[None, :] * stride_xk
        b_x = tl.load(p_x, mask=m_t[:, None] & m_c[None, :], other=0.0)  # [BT, BC]
        if DROPOUT:
            keys = tl.load(keys_ptr + o_i, mask=m_t, other=0).to(tl.uint64, bitcast=True)
            b_x = tl.where(keep_block(keys, threshold, i_c * BC, BC), b_x, 0.0)
        p_s = s_ptr + o_i.to(tl.int64)[:, None] * (blocks * SR) + (i_s * SR + o_r)[None, :]
        b_s = tl.load(p_s, mask=m_t[:, None] & m_r[None, :], other=0.0)  # [BT, BR]
        acc = tl.dot(tl.trans(b_x), b_s.to(b_x.dtype), acc, input_precision="ieee")
    acc = tl.where((first < last) & live[None, :], acc * scaling, 0.0)
    o_o = (i_s * C + o_c).to(tl.int64)[:, None] * stride_oc + o_r.to(tl.int64)[None, :] * stride_or
    m_o = m_c[:, None] & (o_r < SR)[None, :]
    if chunks <= SPAN:
        tl.store(out_ptr + g * stride_og + o_o, acc.to(out_ptr.dtype.element_ty), mask=m_o)
    else:
        tl.store(part_ptr + slot.to(tl.int64) * stride_pg + o_o, acc, mask=m_o)


@triton.jit(do_not_specialize_on_alignment=SMALL)
def sum_kernel(
    part_ptr,  # [slots, P] fp32
    out_ptr,  # [G, P], stride_og from a row to the next
    slots_ptr,  # [G+1]
    G, P, stride_og, step,
    SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[g] = Σ part[slot] over every SPAN-th of the adapter's slots, in order; with no more than SPAN it is complete already.

    A program has one block of every `step`-th adapter. It ends at once where nobody has slots, which only the device knows.
    """
    if tl.load(slots_ptr + G) == 0:
        return
    o_p = tl.program_id(0) // step * BLOCK + tl.arange(0, BLOCK)
    for g in range(tl.program_id(0) % step, G, step):
        first, last = tl.load(slots_ptr + g), tl.load(slots_ptr + g + 1)
        if last - first > SPAN:
            acc = tl.zeros((BLOCK,), tl.float32)
            p_part = part_ptr + first.to(tl.int64) * P + o_p
            for _ in range(first, last, SPAN):
                acc += tl.load(p_part, mask=o_p < P, other=0.0)
                p_part += SPAN * P
            tl.store(out_ptr + tl.full((), g, tl.int64) * stride_og + o_p, acc.to(out_ptr.dtype.element_ty), mask=o_p < P)


SUM_BLOCK, SUM_STEP = 1024, 8  # elements and adapters of a program of `sum_kernel`


class Factor(NamedTuple):
    """A LoRA factor [G, ...] as a kernel addresses it: elements from one adapter, slice, column and summand to the next."""

    tensor: Tensor
    adapter: int
    slice: int
    column: int
    summand: int


def expand(
    s: Tensor, factor: Factor, x: Tensor, w: Tensor, bias: Tensor | None, y: Tensor, order: Tensor, work: Work,
    ranks: Tensor | None, scaling: Tensor | None, p: Tensor | None = None, keys: Tensor | None = None,
    *, R: int, blocks: int, slices: int, fused: bool,
) -> None:  # fmt: skip
    """Launch `expand_kernel`, which writes the rows of y in order. w: [K, blocks*C], of any strides."""
    K, C = w.shape[0], w.shape[1] // blocks
    op, widths = ("fused", (K, C)) if fused else ("expand", (C,))
    config = tuned.launch(op, tuned.arch_of(x.device), x.dtype, C, R, widths)
    tiles = work.tiles_128 if fused else work.tiles_64
    grid = (tiles.shape[0] * triton.cdiv(C, config.BC) * blocks,)
    if not grid[0]:
        return
    expand_kernel[grid](
        s_ptr=s, f_ptr=factor.tensor, x_ptr=x, w_ptr=w, bias_ptr=bias, y_ptr=y, order_ptr=order, tiles_ptr=tiles,
        ranks_ptr=ranks, scaling_ptr=scaling, p_ptr=p, keys_ptr=keys, K=K, C=C, R=R, blocks=blocks, slices=slices,
        stride_xt=x.stride(0), stride_xk=x.stride(1), stride_wk=w.stride(0), stride_wc=w.stride(1), stride_yt=y.stride(0),
        stride_fg=factor.adapter, stride_fc=factor.column, stride_fs=factor.slice, stride_fr=factor.summand,
        FUSED=fused, DROPOUT=p is not None, BT=LONG_TILE if fused else SHORT_TILE, BC=config.BC, BK=config.BK,
        BR=config.BR, **config.options,
    )  # fmt: skip


def reduce(
    x: Tensor, s: Tensor, out: Tensor, order: Tensor | None, work: Work, ranks: Tensor | None, scaling: Tensor | None,
    p: Tensor | None = None, keys: Tensor | None = None, *, C: int, SR: int, R: int, blocks: int, strides: tuple[int, int],
) -> None:  # fmt: skip
    """Launch `reduce_kernel`, which writes out, and `sum_kernel` where an adapter may have several chunks.

    out: the gradient of a factor [G, ...], each adapter's matrix contiguous.
    order: None where rows are in order.
    strides: elements of the gradient from one column and one rank to the next.
    """
    config = tuned.launch("reduce", tuned.arch_of(x.device), x.dtype, C, SR, (C,), gathered=order is not None)
    per_adapter, span = out[:1].numel(), tuned.span(R)
    grid = (work.chunks.shape[0] * triton.cdiv(C, config.BC) * blocks * triton.cdiv(SR, config.BR),)
    if not grid[0]:
        return
    slots = slot_capacity(s.shape[0], span) if work.chunks.shape[0] > out.shape[0] else 0  # none if all have one chunk
    part = torch.empty(slots, per_adapter, dtype=torch.float32, device=x.device)
    reduce_kernel[grid](
        x_ptr=x, s_ptr=s, out_ptr=out, part_ptr=part, order_ptr=order, chunks_ptr=work.chunks,
        slots_ptr=work.slots, ranks_ptr=ranks, scaling_ptr=scaling, p_ptr=p, keys_ptr=keys, C=C, SR=SR, R=R, blocks=blocks,
        stride_xt=x.stride(0), stride_xk=x.stride(1), stride_og=out.stride(0), stride_pg=per_adapter,
        stride_oc=strides[0], stride_or=strides[1],
        SPAN=span, DROPOUT=p is not None, BT=config.BK, BC=config.BC, BR=config.BR, **config.options,
    )  # fmt: skip
    if part.shape[0]:
        step = min(out.shape[0], SUM_STEP)
        sum_kernel[(step * triton.cdiv(per_adapter, SUM_BLOCK),)](
            part_ptr=part, out_ptr=out, slots_ptr=work.slots, G=out.shape[0], P=per_adapter, stride_og=out.stride(0),
            step=step, SPAN=span, BLOCK=SUM_BLOCK, **tuned.FUSION,
        )  # fmt: skip
