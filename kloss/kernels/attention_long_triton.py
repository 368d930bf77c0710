"""Attention of sequences that no short class of `attention_triton` has, in Triton: forward and backward, in blocks of rows.

    S = q kᵀ / √D        P = softmax(S)        out = drop(P) v                   for each sequence and head
    dP = mask c (dout vᵀ)        dS = P (dP - Σ_j P dP)        dq = dS k / √D        dk = dSᵀ q / √D        dv = drop(P)ᵀ dout

Forward and dq walk the keys of a block of queries, dk and dv the queries of a block of keys. Sizes: T rows, H width, D width of
a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .buckets import CLASSES
from .dropout_device import keep_block
from .tuned import FUSION, arch_of, bucket, power_of_two


@triton.jit
def load_rows(ptr, o_t, m_t, o_h, o_d, m_d, stride_t):
    """Block [rows, BD] of a matrix; masked elements are 0. o_d: its columns, behind o_h, a number or [rows]."""
    p = ptr + (o_t.to(tl.int64) * stride_t + o_h)[:, None] + o_d[None, :]
    return tl.load(p, mask=m_t[:, None] & m_d[None, :], other=0.0)


@triton.jit
def store_rows(ptr, o_t, m_t, o_h, o_d, m_d, stride_t, b):
    p = ptr + (o_t.to(tl.int64) * stride_t + o_h)[:, None] + o_d[None, :]
    tl.store(p, b.to(ptr.dtype.element_ty), mask=m_t[:, None] & m_d[None, :])


@triton.jit
def product(b_a, b_b, TRANS_A: tl.constexpr, TRANS_B: tl.constexpr, HEADS: tl.constexpr):
    """b_a b_b in fp32, head by head: the blocks of HEADS heads stand one below the other."""
    if HEADS == 1:
        b_a = tl.trans(b_a) if TRANS_A else b_a
        b_b = tl.trans(b_b) if TRANS_B else b_b
        return tl.dot(b_a, b_b, input_precision="ieee")
    else:
        b_a = tl.reshape(b_a, (HEADS, b_a.shape[0] // HEADS, b_a.shape[1]))
        b_b = tl.reshape(b_b, (HEADS, b_b.shape[0] // HEADS, b_b.shape[1]))
        b_a = tl.permute(b_a, (0, 2, 1)) if TRANS_A else b_a
        b_b = tl.permute(b_b, (0, 2, 1)) if TRANS_B else b_b
        b_y = tl.dot(b_a, b_b, input_precision="ieee")
        return tl.reshape(b_y, (HEADS * b_y.shape[1], b_y.shape[2]))


@triton.jit
def scores(b_q, b_k, m_k, factor, HEADS: tl.constexpr = 1):
    """q kᵀ factor, -inf for keys that m_k, [1, keys] or [queries, keys], has not. Returns fp32 [queries, keys]."""
    return tl.where(m_k, product(b_q, b_k, False, True, HEADS) * factor, float("-inf"))


@triton.jit
def kept(keys_ptr, threshold_ptr, o_q, m_q, i_h, first_key, BL: tl.constexpr):
    """Which probabilities of a block are kept, int1 [queries, BL]; the sequence's rows share one threshold.

    i_h, first_key: numbers or [queries, 1].
    """
    keys = tl.load(keys_ptr + o_q, mask=m_q, other=0).to(tl.uint64, bitcast=True)
    threshold = tl.max(tl.load(threshold_ptr + o_q, mask=m_q, other=-32768).to(tl.int32)) + 32768
    return keep_block(keys, threshold.to(tl.uint32), (i_h << 16) + first_key, BL)


@triton.jit
def block_of(tiles_ptr, heads, D, BD: tl.constexpr):
    """A program's head, its sequence's first row and end, its block's first row, and the head's columns with their mask."""
    i_h, p_tile = tl.program_id(0) % heads, tiles_ptr + tl.program_id(0) // heads * 3
    o_d = tl.arange(0, BD)
    return i_h, tl.load(p_tile), tl.load(p_tile + 1), tl.load(p_tile + 2), i_h * D + o_d, o_d < D


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
    i_h, start, end, first, o_h, m_d = block_of(tiles_ptr, heads, D, BD)
    if start >= end:
        return
    o_q = first + tl.arange(0, BL)
    m_q = o_q < end
    b_q = load_rows(qkv_ptr, o_q, m_q, 0, o_h, m_d, stride_qkv)  # [BL, BD]
    top = tl.full((BL,), float("-inf"), tl.float32)
    total = tl.zeros((BL,), tl.float32)
    acc = tl.zeros((BL, BD), tl.float32)
    for k in range(start, end, BL):
        o_k = k + tl.arange(0, BL)
        m_k = o_k < end
        b_k = load_rows(qkv_ptr + H, o_k, m_k, 0, o_h, m_d, stride_qkv)
        b_v = load_rows(qkv_ptr + 2 * H, o_k, m_k, 0, o_h, m_d, stride_qkv)
        b_s = scores(b_q, b_k, m_k[None, :], factor)
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
    store_rows(out_ptr, o_q, m_q, 0, o_h, m_d, stride_out, acc)
    tl.store(lse_ptr + i_h.to(tl.int64) * T + o_q, top + tl.log(total), mask=m_q)


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
    i_h, start, end, first, o_h, m_d = block_of(tiles_ptr, heads, D, BD)
    if start >= end:
        return
    o_q = first + tl.arange(0, BL)
    m_q = o_q < end
    b_q = load_rows(qkv_ptr, o_q, m_q, 0, o_h, m_d, stride_qkv)  # [BL, BD]
    b_do = load_rows(dout_ptr, o_q, m_q, 0, o_h, m_d, stride_dout)
    b_o = load_rows(out_ptr, o_q, m_q, 0, o_h, m_d, stride_out)
    delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + i_h.to(tl.int64) * T + o_q, mask=m_q, other=0.0)
    acc = tl.zeros((BL, BD), tl.float32)
    for k in range(start, end, BL):
        o_k = k + tl.arange(0, BL)
        m_k = o_k < end
        b_k = load_rows(qkv_ptr + H, o_k, m_k, 0, o_h, m_d, stride_qkv)
        b_v = load_rows(qkv_ptr + 2 * H, o_k, m_k, 0, o_h, m_d, stride_qkv)
        b_p = tl.exp(scores(b_q, b_k, m_k[None, :], factor) - lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        if keys_ptr is not None:
            scale = tl.load(scale_ptr + o_q, mask=m_q, other=0.0)[:, None]
            b_dp = tl.where(kept(keys_ptr, threshold_ptr, o_q, m_q, i_h, k - start, BL), b_dp * scale, 0.0)
        b_ds = (b_p * (b_dp - delta[:, None]) * factor).to(b_k.dtype)
        acc = tl.dot(b_ds, b_k, acc, input_precision="ieee")
    store_rows(dqkv_ptr, o_q, m_q, 0, o_h, m_d, stride_dqkv, acc)


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
    i_h, start, end, first, o_h, m_d = block_of(tiles_ptr, heads, D, BD)
    if start >= end:
        return
    o_k = first + tl.arange(0, BL)
    m_k = o_k < end
    b_k = load_rows(qkv_ptr + H, o_k, m_k, 0, o_h, m_d, stride_qkv)  # [BL, BD]
    b_v = load_rows(qkv_ptr + 2 * H, o_k, m_k, 0, o_h, m_d, stride_qkv)
    b_dk, b_dv = tl.zeros((BL, BD), tl.float32), tl.zeros((BL, BD), tl.float32)
    for q in range(start, end, BL):
        o_q = q + tl.arange(0, BL)
        m_q = o_q < end
        b_q = load_rows(qkv_ptr, o_q, m_q, 0, o_h, m_d, stride_qkv)
        b_do = load_rows(dout_ptr, o_q, m_q, 0, o_h, m_d, stride_dout)
        b_o = load_rows(out_ptr, o_q, m_q, 0, o_h, m_d, stride_out)
        delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
        lse = tl.load(lse_ptr + i_h.to(tl.int64) * T + o_q, mask=m_q, other=0.0)
        b_p = tl.exp(scores(b_q, b_k, m_k[None, :], factor) - lse[:, None])
        b_dp = tl.dot(b_do, tl.trans(b_v), input_precision="ieee")
        b_kept = b_p
        if keys_ptr is not None:
            mask = kept(keys_ptr, threshold_ptr, o_q, m_q, i_h, first - start, BL)
            scale = tl.load(scale_ptr + o_q, mask=m_q, other=0.0)[:, None]
            b_kept, b_dp = tl.where(mask, b_p * scale, 0.0), tl.where(mask, b_dp * scale, 0.0)
        b_dv = tl.dot(tl.trans(b_kept.to(b_do.dtype)), b_do, b_dv, input_precision="ieee")
        b_ds = (b_p * (b_dp - delta[:, None]) * factor).to(b_q.dtype)
        b_dk = tl.dot(tl.trans(b_ds), b_q, b_dk, input_precision="ieee")
    store_rows(dqkv_ptr + H, o_k, m_k, 0, o_h, m_d, stride_dqkv, b_dk)
    store_rows(dqkv_ptr + 2 * H, o_k, m_k, 0, o_h, m_d, stride_dqkv, b_dv)


def forward(qkv: Tensor, out: Tensor, heads: int, tiles: Tensor, draws: dict[str, Tensor | None]) -> Tensor:
    """Fills the rows of out [T, H] that tiles have, and returns lse fp32 [heads, T]. draws: the arguments of `kept`."""
    T, H = out.shape
    D, height = H // heads, CLASSES[bucket(qkv.dtype)][-1]
    lse = qkv.new_zeros(heads, T if tiles.shape[0] else 0, dtype=torch.float32)
    if tiles.shape[0]:
        attend_long_kernel[(tiles.shape[0] * heads,)](
            qkv_ptr=qkv, out_ptr=out, lse_ptr=lse, tiles_ptr=tiles, **draws, T=T, H=H, D=D, heads=heads, factor=D**-0.5,
            stride_qkv=qkv.stride(0), stride_out=out.stride(0), BL=height, BD=power_of_two(D), **launch_of(qkv),
        )  # fmt: skip
    return lse


def backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, dqkv: Tensor, heads: int, tiles: Tensor, draws: dict[str, Tensor | None]
) -> None:
    """Fills the rows of dqkv [T, 3H] that tiles have."""
    T, H = out.shape
    D, height = H // heads, CLASSES[bucket(qkv.dtype)][-1]
    for kernel in (attend_dq_kernel, attend_dkv_kernel) if tiles.shape[0] else ():
        kernel[(tiles.shape[0] * heads,)](
            qkv_ptr=qkv, out_ptr=out, lse_ptr=lse, dout_ptr=dout, dqkv_ptr=dqkv, tiles_ptr=tiles, **draws, T=T, H=H, D=D,
            heads=heads, factor=D**-0.5, stride_qkv=qkv.stride(0), stride_out=out.stride(0), stride_dout=dout.stride(0),
            stride_dqkv=dqkv.stride(0), BL=height, BD=power_of_two(D), **launch_of(qkv, kernel is attend_dkv_kernel),
        )  # fmt: skip


def launch_of(qkv: Tensor, dkv: bool = False) -> dict[str, int | bool]:
    """Warps and stages, by resource reports: a warp has 16 rows of a tensor core's product."""
    if bucket(qkv.dtype) == "single":
        return {"num_warps": 8, "num_stages": 1, **FUSION}
    if dkv:
        config = {"num_warps": 4, "num_stages": 3} if arch_of(qkv.device) == 80 else {"num_warps": 8, "num_stages": 1}
        return config | FUSION
    return {"num_warps": CLASSES["half"][-1] // 16, "num_stages": 1, **FUSION}
