"""The Triton kernel that computes S and dS of the multi-adapter linear, and GELU where it is asked for, and its launcher.

Equations: `lora_triton.py`. Sizes and what else the kernels share: `lora_tiles.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuned
from .dropout_device import keep_block, stream_keys, threshold_of
from .gelu_device import normal, once
from .lora_tiles import SMALL, Factor, add_product, own_rank, rows_of
from .segments import SHORT_TILE


@triton.jit(do_not_specialize=["site"], do_not_specialize_on_alignment=SMALL)
def shrink_kernel(
    x_ptr,  # [T, blocks*K]
    f_ptr,  # [G, ...], element (column c, k) of block i_s at i_s*stride_fs + c*stride_fc + k*stride_fk
    s_ptr,  # [T, blocks*C], rows in order
    order_ptr,  # [T] or None
    tiles_ptr,  # [tiles, 3]
    ranks_ptr,  # [G] or None
    scaling_ptr,  # [G] or None
    p_ptr,  # [G]
    seed_ptr,  # [G]
    row_key_ptr,  # [T]
    keys_ptr,  # [T], written, rows in order
    of_x_ptr,  # [T, K] or None, written
    before_ptr,  # [T, K] or None
    site, K, C, R, blocks,
    stride_xt, stride_xk, stride_fg, stride_fs, stride_fc, stride_fk,
    ASM: tl.constexpr, DROPOUT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """S[i, i_s*C + c] = scaling_g Σ_k x[order[i], i_s*K + k] f[g, i_s, c, k]; columns with c % R >= rank are 0 up to the
    next multiple of 16 and not written behind it.

    of_x: takes x's place, and is written for all rows: gelu(x), or with `before` the gradient there that x is at its gelu.
    """
    blocks_c = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    i_c, i_s, i_t = pid % blocks_c, pid // blocks_c % blocks, pid // (blocks_c * blocks)
    g = tl.load(tiles_ptr + i_t * 3).to(tl.int64)
    first, last = tl.load(tiles_ptr + i_t * 3 + 1), tl.load(tiles_ptr + i_t * 3 + 2)
    idle = first >= last
    if of_x_ptr is None:
        idle |= g < 0
    if idle:
        return
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < tl.where(g >= 0, C, 0)
    if ranks_ptr is not None:
        rank, padded = own_rank(ranks_ptr, g, R)
        m_c &= o_c % R < padded
    o_i = first + tl.arange(0, BT)
    m_t = o_i < last
    o_t = rows_of(order_ptr, o_i, m_t)
    scaling = 1.0 if scaling_ptr is None else tl.load(scaling_ptr + g, mask=g >= 0, other=0.0)
    if DROPOUT:
        threshold, scale = threshold_of(tl.load(p_ptr + g, mask=g >= 0, other=0.0))
        scaling *= scale
        row_key = tl.load(row_key_ptr + o_t, mask=m_t, other=0)
        keys = stream_keys(tl.load(seed_ptr + g, mask=g >= 0, other=0), row_key, site)
        if (i_c == 0) & (i_s == 0):
            tl.store(keys_ptr + o_i, keys.to(tl.int64, bitcast=True), mask=m_t)
    if of_x_ptr is None and tl.max(m_c.to(tl.int32)) == 0:
        return
    acc = tl.zeros((BT, BC), tl.float32)
    f_ptr += g * stride_fg + i_s.to(tl.int64) * stride_fs
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < K
        p_x = x_ptr + o_t[:, None] * stride_xt + (i_s * K + o_k).to(tl.int64)[None, :] * stride_xk
        b_x = tl.load(p_x, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
        if of_x_ptr is not None:
            o_x, m_x = o_t[:, None] * K + o_k[None, :], m_t[:, None] & m_k[None, :]
            if before_ptr is None:
                of_x = b_x * normal(b_x, ASM)[0]
            else:
                b_u = tl.load(before_ptr + o_x, mask=m_x, other=0.0)
                below, density = normal(b_u, ASM)
                of_x = b_x * (below + b_u * density)
            b_x = once(of_x.to(b_x.dtype), ASM)
            tl.store(of_x_ptr + o_x, b_x, mask=m_x)
        if DROPOUT:
            b_x = tl.where(keep_block(keys, threshold, k, BK), b_x, 0.0)
        p_f = f_ptr + o_k.to(tl.int64)[:, None] * stride_fk + o_c.to(tl.int64)[None, :] * stride_fc
        b_f = tl.load(p_f, mask=m_k[:, None] & m_c[None, :], other=0.0)  # [BK, BC]
        acc = add_product(acc, b_x, b_f.to(b_x.dtype))
    acc *= scaling
    if ranks_ptr is not None:
        acc = tl.where((o_c % R < rank)[None, :], acc, 0.0)
    p_s = s_ptr + o_i.to(tl.int64)[:, None] * (blocks * C) + (i_s * C + o_c)[None, :]
    tl.store(p_s, acc.to(s_ptr.dtype.element_ty), mask=m_t[:, None] & m_c[None, :])


def shrink(
    x: Tensor, factor: Factor, s: Tensor, order: Tensor | None, tiles: Tensor, ranks: Tensor | None, scaling: Tensor | None,
    p: Tensor | None = None, seed: Tensor | None = None, row_key: Tensor | None = None, keys: Tensor | None = None,
    *, site: int = 0, K: int, C: int, R: int, blocks: int, of_x: Tensor | None = None, before: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch `shrink_kernel`, which writes s, and keys where p is given. order: None where rows are in order.

    of_x, before: contiguous [T, K], with one block, as in the kernel.
    """
    arch = tuned.arch_of(x.device)
    config = tuned.launch("shrink", arch, x.dtype, C, C, (K,))
    if of_x is not None:
        alone = config.BC < C  # x is read by several programs, each of which would write
        first = 0 if alone else len(s)  # rows behind those of the segments have no tile
        if first < len(x):
            if before is None:
                torch.ops.aten.gelu.out(x[first:], out=of_x[first:])
            else:
                torch.ops.aten.gelu_backward.grad_input(x[first:], before[first:], grad_input=of_x[first:])
        x, of_x, before = (of_x, None, None) if alone else (x, of_x, before)
    grid = (tiles.shape[0] * triton.cdiv(C, config.BC) * blocks,)
    if not grid[0]:
        return
    shrink_kernel[grid](
        x_ptr=x, f_ptr=factor.tensor, s_ptr=s, order_ptr=order, tiles_ptr=tiles, ranks_ptr=ranks, scaling_ptr=scaling,
        p_ptr=p, seed_ptr=seed, row_key_ptr=row_key, keys_ptr=keys, of_x_ptr=of_x, before_ptr=before,
        site=site, K=K, C=C, R=R, blocks=blocks, stride_xt=x.stride(0), stride_xk=x.stride(1),
        stride_fg=factor.adapter, stride_fs=factor.slice, stride_fc=factor.column, stride_fk=factor.summand,
        ASM=80 <= arch < 100, DROPOUT=p is not None, BT=SHORT_TILE, BC=config.BC, BK=config.BK, **config.options,
    )  # fmt: skip
