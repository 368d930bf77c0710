"""Attention within packed sequences, in Triton: forward and backward.

    S = q kᵀ / √D        P = softmax(S)        out = drop(P) v                   for each sequence and head
    dP = mask c (dout vᵀ)        dS = P (dP - Σ_j P dP)        dq = dS k / √D        dk = dSᵀ q / √D        dv = drop(P)ᵀ dout

A sequence's class follows from its own length: at most 16, 32 or 64 rows, or longer. A program of the short classes owns one
sequence and head: its dq, dk and dv. Longer sequences are cut into blocks of 64 rows: forward and dq walk the keys of a block of
queries, dk and dv the queries of a block of keys. There are no atomics, and no program reads a row of another sequence. So a
sequence's values have the same bits in any batch. Sizes: T rows, H width, D width of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .buckets import CLASSES, AttentionTiles
from .dropout import RowDropout
from .dropout_device import keep_block
from .tuned import FUSION, arch_of, bucket, power_of_two


@triton.jit
def load_rows(ptr, o_t, m_t, o_d, m_d, stride_t):
    """Block [rows, BD] of a matrix; masked elements are 0."""
    p = ptr + o_t.to(tl.int64)[:, None] * stride_t + o_d[None, :]
    return tl.load(p, mask=m_t[:, None] & m_d[None, :], other=0.0)


@triton.jit
def store_rows(ptr, o_t, m_t, o_d, m_d, stride_t, b):
    p = ptr + o_t.to(tl.int64)[:, None] * stride_t + o_d[None, :]
    tl.store(p, b.to(ptr.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit
def scores(b_q, b_k, m_k, factor):
    """q kᵀ factor, -inf for keys that are not there. Returns fp32 [queries, keys]."""
    return tl.where(m_k[None, :], tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * factor, float("-inf"))


@triton.jit
def kept(keys_ptr, threshold_ptr, o_q, m_q, i_h, first_key, BL: tl.constexpr):
    """Which probabilities of a block of queries and keys are kept, int1 [BL, BL]; the sequence's rows share one threshold."""
    keys = tl.load(keys_ptr + o_q, mask=m_q, other=0).to(tl.uint64, bitcast=True)
    threshold = tl.max(tl.load(threshold_ptr + o_q, mask=m_q, other=-32768).to(tl.int32)) + 32768
    return keep_block(keys, threshold.to(tl.uint32), (i_h << 16) + first_key, BL)


@triton.jit
def attend_kernel(
    qkv_ptr,  # [T, 3H]
    out_ptr,  # [T, H]
    tiles_ptr,  # [tiles, 3]
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    H, D, heads, factor, stride_qkv, stride_out,
    BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out of one head of a sequence of at most BL rows."""
    i_h, i_n = tl.program_id(0) % heads, tl.program_id(0) // heads
    start, end = tl.load(tiles_ptr + i_n * 3), tl.load(tiles_ptr + i_n * 3 + 1)
    if start >= end:
        return
    o_d = tl.arange(0, BD)
    m_d, o_h = o_d < D, i_h * D + o_d
    o_t = start + tl.arange(0, BL)
    m_t = o_t < end
    b_q = load_rows(qkv_ptr, o_t, m_t, o_h, m_d, stride_qkv)  # [BL, BD]
    b_k = load_rows(qkv_ptr + H, o_t, m_t, o_h, m_d, stride_qkv)
    b_v = load_rows(qkv_ptr + 2 * H, o_t, m_t, o_h, m_d, stride_qkv)
    b_s = scores(b_q, b_k, m_t, factor)
    b_p = tl.exp(b_s - tl.max(b_s, 1)[:, None])
    total = tl.sum(b_p, 1)
    if keys_ptr is not None:
        b_p = tl.where(kept(keys_ptr, threshold_ptr, o_t, m_t, i_h, 0, BL), b_p, 0.0)
    acc = tl.dot(b_p.to(b_v.dtype), b_v, input_precision="ieee") / total[:, None]
    if keys_ptr is not None:
        acc *= tl.load(scale_ptr + o_t, mask=m_t, other=0.0)[:, None]
    store_rows(out_ptr, o_t, m_t, o_h, m_d, stride_out, acc)


@triton.jit
def attend_long_kernel(
    qkv_ptr,  # [T, 3H]
    out_ptr,  # [T, H]
    lse_ptr,  # [heads, T] fp32, log Σ exp S
    tiles_ptr,  # [tiles, 3]
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    T, H, D, heads, factor, stride_qkv, stride_out,
    BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out and lse of one head of a block of a long sequence's queries, over its keys in order."""
    i_h, i_n = tl.program_id(0) % heads, tl.program_id(0) // heads
    start, end, first = tl.load(tiles_ptr + i_n * 3), tl.load(tiles_ptr + i_n * 3 + 1), tl.load(tiles_ptr + i_n * 3 + 2)
    if start >= end:
        return
    o_d = tl.arange(0, BD)
    m_d, o_h = o_d < D, i_h * D + o_d
    o_q = first + tl.arange(0, BL)
    m_q = o_q < end
    b_q = load_rows(qkv_ptr, o_q, m_q, o_h, m_d, stride_qkv)  # [BL, BD]
    top = tl.full((BL,), float("-inf"), tl.float32)
    total = tl.zeros((BL,), tl.float32)
    acc = tl.zeros((BL, BD), tl.float32)
    for k in range(start, end, BL):
        o_k = k + tl.arange(0, BL)
        m_k = o_k < end
        b_k = load_rows(qkv_ptr + H, o_k, m_k, o_h, m_d, stride_qkv)
        b_v = load_rows(qkv_ptr + 2 * H, o_k, m_k, o_h, m_d, stride_qkv)
        b_s = scores(b_q, b_k, m_k, factor)
        new_top = tl.maximum(top, tl.max(b_s, 1))
        b_p = tl.exp(b_s - new_top[:, None])
        rescale = tl.exp(top - new_top)
        total = total * rescale + tl.sum(b_p, 1)
        if keys_ptr is not None:
            b_p = tl.where(kept(keys_ptr, threshold_ptr, o_q, m_q, i_h, k - start, BL), b_p, 0.0)
        acc = tl.dot(b_p.to(b_v.dtype), b_v, acc * rescale[:, None], input_precision="ieee")
        top = new_top
    acc = acc / total[:, None]
    if keys_ptr is not None:
        acc *= tl.load(scale_ptr + o_q, mask=m_q, other=0.0)[:, None]
    store_rows(out_ptr, o_q, m_q, o_h, m_d, stride_out, acc)
    tl.store(lse_ptr + i_h.to(tl.int64) * T + o_q, top + tl.log(total), mask=m_q)


@triton.jit
def attend_backward_kernel(
    qkv_ptr,  # [T, 3H]
    dout_ptr,  # [T, H]
    dqkv_ptr,  # [T, 3H]
    tiles_ptr,  # [tiles, 3]
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    H, D, heads, factor, stride_qkv, stride_dout, stride_dqkv,
    BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of one head of a sequence of at most BL rows."""
    i_h, i_n = tl.program_id(0) % heads, tl.program_id(0) // heads
    start, end = tl.load(tiles_ptr + i_n * 3), tl.load(tiles_ptr + i_n * 3 + 1)
    if start >= end:
        return
    o_d = tl.arange(0, BD)
    m_d, o_h = o_d < D, i_h * D + o_d
    o_t = start + tl.arange(0, BL)
    m_t = o_t < end
    b_q = load_rows(qkv_ptr, o_t, m_t, o_h, m_d, stride_qkv)  # [BL, BD]
    b_k = load_rows(qkv_ptr + H, o_t, m_t, o_h, m_d, stride_qkv)
    b_v = load_rows(qkv_ptr + 2 * H, o_t, m_t, o_h, m_d, stride_qkv)
    b_do = load_rows(dout_ptr, o_t, m_t, o_h, m_d, stride_dout)
    b_s = scores(b_q, b_k, m_t, factor)
    b_p = tl.exp(b_s - tl.max(b_s, 1)[:, None])
    b_p = b_p / tl.sum(b_p, 1)[:, None]
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
    b_kept = b_p
    if keys_ptr is not None:
        mask = kept(keys_ptr, threshold_ptr, o_t, m_t, i_h, 0, BL)
        scale = tl.load(scale_ptr + o_t, mask=m_t, other=0.0)[:, None]
        b_kept, b_dp = tl.where(mask, b_p * scale, 0.0), tl.where(mask, b_dp * scale, 0.0)
    b_ds = (b_p * (b_dp - tl.sum(b_p * b_dp, 1)[:, None]) * factor).to(b_q.dtype)
    store_rows(dqkv_ptr, o_t, m_t, o_h, m_d, stride_dqkv, tl.dot(b_ds, b_k, input_precision="ieee"))
    store_rows(dqkv_ptr + H, o_t, m_t, o_h, m_d, stride_dqkv, tl.dot(tl.trans(b_ds), b_q, input_precision="ieee"))
    b_dv = tl.dot(tl.trans(b_kept.to(b_do.dtype)), b_do, input_precision="ieee")
    store_rows(dqkv_ptr + 2 * H, o_t, m_t, o_h, m_d, stride_dqkv, b_dv)


@triton.jit
def attend_dq_kernel(
    qkv_ptr,  # [T, 3H]
    out_ptr,  # [T, H]
    lse_ptr,  # [heads, T] fp32
    dout_ptr,  # [T, H]
    dqkv_ptr,  # [T, 3H]
    tiles_ptr,  # [tiles, 3]
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    T, H, D, heads, factor, stride_qkv, stride_out, stride_dout, stride_dqkv,
    BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq of one head of a block of a long sequence's queries, over its keys in order."""
    i_h, i_n = tl.program_id(0) % heads, tl.program_id(0) // heads
    start, end, first = tl.load(tiles_ptr + i_n * 3), tl.load(tiles_ptr + i_n * 3 + 1), tl.load(tiles_ptr + i_n * 3 + 2)
    if start >= end:
        return
    o_d = tl.arange(0, BD)
    m_d, o_h = o_d < D, i_h * D + o_d
    o_q = first + tl.arange(0, BL)
    m_q = o_q < end
    b_q = load_rows(qkv_ptr, o_q, m_q, o_h, m_d, stride_qkv)  # [BL, BD]
    b_do = load_rows(dout_ptr, o_q, m_q, o_h, m_d, stride_dout)
    b_o = load_rows(out_ptr, o_q, m_q, o_h, m_d, stride_out)
    delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + i_h.to(tl.int64) * T + o_q, mask=m_q, other=0.0)
    acc = tl.zeros((BL, BD), tl.float32)
    for k in range(start, end, BL):
        o_k = k + tl.arange(0, BL)
        m_k = o_k < end
        b_k = load_rows(qkv_ptr + H, o_k, m_k, o_h, m_d, stride_qkv)
        b_v = load_rows(qkv_ptr + 2 * H, o_k, m_k, o_h, m_d, stride_qkv)
        b_p = tl.exp(scores(b_q, b_k, m_k, factor) - lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        if keys_ptr is not None:
            scale = tl.load(scale_ptr + o_q, mask=m_q, other=0.0)[:, None]
            b_dp = tl.where(kept(keys_ptr, threshold_ptr, o_q, m_q, i_h, k - start, BL), b_dp * scale, 0.0)
        b_ds = (b_p * (b_dp - delta[:, None]) * factor).to(b_k.dtype)
        acc = tl.dot(b_ds, b_k, acc, input_precision="ieee")
    store_rows(dqkv_ptr, o_q, m_q, o_h, m_d, stride_dqkv, acc)


@triton.jit
def attend_dkv_kernel(
    qkv_ptr,  # [T, 3H]
    out_ptr,  # [T, H]
    lse_ptr,  # [heads, T] fp32
    dout_ptr,  # [T, H]
    dqkv_ptr,  # [T, 3H]
    tiles_ptr,  # [tiles, 3]
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    T, H, D, heads, factor, stride_qkv, stride_out, stride_dout, stride_dqkv,
    BL: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dk and dv of one head of a block of a long sequence's keys, over its queries in order."""
    i_h, i_n = tl.program_id(0) % heads, tl.program_id(0) // heads
    start, end, first = tl.load(tiles_ptr + i_n * 3), tl.load(tiles_ptr + i_n * 3 + 1), tl.load(tiles_ptr + i_n * 3 + 2)
    if start >= end:
        return
    o_d = tl.arange(0, BD)
    m_d, o_h = o_d < D, i_h * D + o_d
    o_k = first + tl.arange(0, BL)
    m_k = o_k < end
    b_k = load_rows(qkv_ptr + H, o_k, m_k, o_h, m_d, stride_qkv)  # [BL, BD]
    b_v = load_rows(qkv_ptr + 2 * H, o_k, m_k, o_h, m_d, stride_qkv)
    b_dk, b_dv = tl.zeros((BL, BD), tl.float32), tl.zeros((BL, BD), tl.float32)
    for q in range(start, end, BL):
        o_q = q + tl.arange(0, BL)
        m_q = o_q < end
        b_q = load_rows(qkv_ptr, o_q, m_q, o_h, m_d, stride_qkv)
        b_do = load_rows(dout_ptr, o_q, m_q, o_h, m_d, stride_dout)
        b_o = load_rows(out_ptr, o_q, m_q, o_h, m_d, stride_out)
        delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
        lse = tl.load(lse_ptr + i_h.to(tl.int64) * T + o_q, mask=m_q, other=0.0)
        b_p = tl.exp(scores(b_q, b_k, m_k, factor) - lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_kept = b_p
        if keys_ptr is not None:
            mask = kept(keys_ptr, threshold_ptr, o_q, m_q, i_h, first - start, BL)
            scale = tl.load(scale_ptr + o_q, mask=m_q, other=0.0)[:, None]
            b_kept, b_dp = tl.where(mask, b_p * scale, 0.0), tl.where(mask, b_dp * scale, 0.0)
        b_dv = tl.dot(tl.trans(b_kept.to(b_do.dtype)), b_do, b_dv, input_precision="ieee")
        b_ds = (b_p * (b_dp - delta[:, None]) * factor).to(b_q.dtype)
        b_dk = tl.dot(tl.trans(b_ds), b_q, b_dk, input_precision="ieee")
    store_rows(dqkv_ptr + H, o_k, m_k, o_h, m_d, stride_dqkv, b_dk)
    store_rows(dqkv_ptr + 2 * H, o_k, m_k, o_h, m_d, stride_dqkv, b_dv)


@triton.jit
def zero_behind_kernel(x_ptr, end_ptr, T, W, stride_x, BLOCK: tl.constexpr):
    """Rows end..T-1 of x [T, W] become 0."""
    blocks = tl.cdiv(W, BLOCK)
    i_t, o_w = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    step = tl.num_programs(0) // blocks
    first = tl.load(end_ptr) + i_t
    p_x = x_ptr + first.to(tl.int64) * stride_x + o_w
    for _ in range(first, T, step):
        tl.store(p_x, tl.zeros((BLOCK,), x_ptr.dtype.element_ty), mask=o_w < W)
        p_x += step.to(tl.int64) * stride_x


def forward(qkv: Tensor, heads: int, tiles: AttentionTiles, dropout: RowDropout | None) -> tuple[Tensor, Tensor]:
    """out [T, H], and lse fp32 [heads, T], 0 for the short classes, whose backward needs none."""
    T, H = qkv.shape[0], qkv.shape[1] // 3
    D = H // heads
    out = qkv.new_empty(T, H)
    lse = qkv.new_zeros(heads, T if tiles.longer.shape[0] else 0, dtype=torch.float32)
    keys, threshold, scale = (None, None, None) if dropout is None else dropout
    classes = CLASSES[bucket(qkv.dtype)]
    draws = dict(keys_ptr=keys, threshold_ptr=threshold, scale_ptr=scale)
    sizes = dict(H=H, D=D, heads=heads, factor=D**-0.5, stride_qkv=qkv.stride(0), stride_out=out.stride(0), BD=power_of_two(D))
    for rows, entries in zip(classes, tiles.short, strict=True):
        if entries.shape[0]:
            attend_kernel[(entries.shape[0] * heads,)](
                qkv_ptr=qkv, out_ptr=out, tiles_ptr=entries, **draws, **sizes, BL=rows, **launch_of(qkv, rows)
            )
    if tiles.longer.shape[0]:
        attend_long_kernel[(tiles.longer.shape[0] * heads,)](
            qkv_ptr=qkv, out_ptr=out, lse_ptr=lse, tiles_ptr=tiles.longer, **draws, T=T, **sizes, BL=classes[-1],
            **launch_of(qkv, classes[-1]),
        )  # fmt: skip
    zero_behind(out, tiles.cu_seqlens)
    return out, lse


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, tiles: AttentionTiles, dropout: RowDropout | None
) -> Tensor:
    """dqkv [T, 3H]."""
    T, H = out.shape
    D = H // heads
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    keys, threshold, scale = (None, None, None) if dropout is None else dropout
    draws = dict(keys_ptr=keys, threshold_ptr=threshold, scale_ptr=scale)
    sizes = dict(H=H, D=D, heads=heads, factor=D**-0.5, stride_qkv=qkv.stride(0))
    strides = dict(stride_dout=dout.stride(0), stride_dqkv=dqkv.stride(0), BD=power_of_two(D))
    classes = CLASSES[bucket(qkv.dtype)]
    for rows, entries in zip(classes, tiles.short, strict=True):
        if entries.shape[0]:
            attend_backward_kernel[(entries.shape[0] * heads,)](
                qkv_ptr=qkv, dout_ptr=dout, dqkv_ptr=dqkv, tiles_ptr=entries, **draws, **sizes, **strides, BL=rows,
                **launch_of(qkv, rows),
            )  # fmt: skip
    if tiles.longer.shape[0]:
        for kernel in (attend_dq_kernel, attend_dkv_kernel):
            kernel[(tiles.longer.shape[0] * heads,)](
                qkv_ptr=qkv, out_ptr=out, lse_ptr=lse, dout_ptr=dout, dqkv_ptr=dqkv, tiles_ptr=tiles.longer, **draws, T=T,
                **sizes, stride_out=out.stride(0), **strides, BL=classes[-1],
                **launch_of(qkv, classes[-1], kernel is attend_dkv_kernel),
            )  # fmt: skip
    zero_behind(dqkv, tiles.cu_seqlens)
    return dqkv


def zero_behind(x: Tensor, cu_seqlens: Tensor) -> None:
    """Rows behind the last offset become 0, in place. Which those are only the device knows."""
    T, W = x.shape
    if T and W:
        block = 1024
        grid = (min(T, 64) * triton.cdiv(W, block),)
        zero_behind_kernel[grid](x_ptr=x, end_ptr=cu_seqlens[-1:], T=T, W=W, stride_x=x.stride(0), BLOCK=block, **FUSION)


def launch_of(qkv: Tensor, rows: int, dkv: bool = False) -> dict[str, int | bool]:
    """Warps and stages for tiles of `rows` rows, by resource reports: a warp has 16 rows of a tensor core's product."""
    if bucket(qkv.dtype) == "single":
        return {"num_warps": rows // 4, "num_stages": 1, **FUSION}
    if dkv:
        config = {"num_warps": 4, "num_stages": 3} if arch_of(qkv.device) == 80 else {"num_warps": 8, "num_stages": 1}
        return config | FUSION
    return {"num_warps": rows // 16, "num_stages": 1, **FUSION}
