"""The four kernels of `multi_lora.py` and their launchers: shrink, expand, reduce, and the sum of what reduce
split.

Equations, and what order and tiles are: `multi_lora.py`, `segments.py`. Sizes: T rows, K contraction, C
columns of a group of outputs, R rank of the bank, G adapters. A group is a slice where each slice has its own
block of columns.
"""

import torch
import triton
import triton.language as tl

from . import tuned
from .dropout_device import keep_block, stream_keys, threshold_of
from .segments import LONG_TILE, SHORT_TILE, slot_capacity


@triton.jit(do_not_specialize=["site"])
def shrink_kernel(
    x_ptr,  # [T, groups*K]
    w_ptr,  # [G, ...], element (column c, k) of group i_s at i_s*stride_ws + c*stride_wc + k*stride_wk
    s_ptr,  # [T, groups*C] fp32, rows in order
    order_ptr,  # [T]
    tiles_ptr,  # [tiles, 3]
    ranks_ptr,  # [G] or None
    factor_ptr,  # [G] or None
    p_ptr, seed_ptr,  # [G]
    row_key_ptr, keys_ptr,  # [T], keys in order
    site, K, C, R, groups,
    stride_xt, stride_xk, stride_wg, stride_ws, stride_wc, stride_wk,
    DROPOUT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """S[i, i_s*C + c] = factor_g Σ_k x[order[i], i_s*K + k] w[g, i_s, c, k]; columns with c % R beyond the
    rank are left out.
    """
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    i_c, i_s, i_t = pid % blocks, pid // blocks % groups, pid // (blocks * groups)
    g = tl.load(tiles_ptr + i_t * 3).to(tl.int64)
    first, last = tl.load(tiles_ptr + i_t * 3 + 1), tl.load(tiles_ptr + i_t * 3 + 2)
    if (g < 0) | (first >= last):
        return
    o_c = i_c * BC + tl.arange(0, BC)
    rank = R if ranks_ptr is None else tl.load(ranks_ptr + g).to(tl.int32)
    m_c = (o_c < C) & (o_c % R < rank)
    o_i = first + tl.arange(0, BT)
    m_t = o_i < last
    o_t = tl.load(order_ptr + o_i, mask=m_t, other=0)
    factor = 1.0 if factor_ptr is None else tl.load(factor_ptr + g)
    if DROPOUT:
        threshold, factor = threshold_of(tl.load(p_ptr + g))
        row_key = tl.load(row_key_ptr + o_t, mask=m_t, other=0)
        keys = stream_keys(tl.load(seed_ptr + g), row_key, site)
        if (i_c == 0) & (i_s == 0):
            tl.store(keys_ptr + o_i, keys.to(tl.int64, bitcast=True), mask=m_t)
    if tl.max(m_c.to(tl.int32)) == 0:
        return
    acc = tl.zeros((BT, BC), tl.float32)
    w_ptr += g * stride_wg + i_s.to(tl.int64) * stride_ws
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < K
        p_x = x_ptr + o_t[:, None] * stride_xt + (i_s * K + o_k).to(tl.int64)[None, :] * stride_xk
        b_x = tl.load(p_x, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
        if DROPOUT:
            b_x = tl.where(keep_block(keys, threshold, k, BK), b_x, 0.0)
        p_w = w_ptr + o_k.to(tl.int64)[:, None] * stride_wk + o_c.to(tl.int64)[None, :] * stride_wc
        b_w = tl.load(p_w, mask=m_k[:, None] & m_c[None, :], other=0.0)  # [BK, BC]
        acc = tl.dot(b_x, b_w.to(b_x.dtype), acc, input_precision="ieee")
    p_s = s_ptr + o_i.to(tl.int64)[:, None] * (groups * C) + (i_s * C + o_c)[None, :]
    tl.store(p_s, acc * factor, mask=m_t[:, None] & m_c[None, :])


@triton.jit
def expand_kernel(
    s_ptr,  # [T, slices*R] fp32, rows in order
    q_ptr,  # [G, ...], element (column c, slice i, rank r) at c*stride_qc + i*stride_qs + r*stride_qr
    x_ptr,  # [T, K]
    w_ptr,  # [K, groups*C]
    bias_ptr,  # [groups*C] or None
    y_ptr,  # [T, groups*C]
    order_ptr,  # [T]
    tiles_ptr,  # [tiles, 3]
    ranks_ptr,  # [G] or None
    factor_ptr,  # [G] or None
    p_ptr,  # [G]
    keys_ptr,  # [T], in order
    K, C, R, groups, slices,
    stride_xt, stride_xk, stride_wk, stride_wc, stride_yt, stride_qg, stride_qc, stride_qs, stride_qr,
    FUSED: tl.constexpr, DROPOUT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """y[t, n] = factor_g mask Σ_r S[i, r] q[g, n, r] + (x[t] w[:, n] + bias[n] if FUSED, else y[t, n]), t =
    order[i].

    groups > 1: block i_s of C columns takes rank slice i_s only. groups == 1: the sum runs over all slices.
    """
    blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    i_c, i_s, i_t = pid % blocks, pid // blocks % groups, pid // (blocks * groups)
    g = tl.load(tiles_ptr + i_t * 3).to(tl.int64)
    first, last = tl.load(tiles_ptr + i_t * 3 + 1), tl.load(tiles_ptr + i_t * 3 + 2)
    if (first >= last) | ((g < 0) & (not FUSED)):
        return
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    o_n = (i_s * C + o_c).to(tl.int64)
    o_i = first + tl.arange(0, BT)
    m_t = o_i < last
    o_t = tl.load(order_ptr + o_i, mask=m_t, other=0)
    rank = R if ranks_ptr is None else tl.load(ranks_ptr + g, mask=g >= 0, other=0).to(tl.int32)
    steps = tl.cdiv(rank, BR)
    per_group = slices // groups
    acc = tl.zeros((BT, BC), tl.float32)
    q_ptr += g * stride_qg
    for j in range(0, tl.where(g >= 0, per_group * steps, 0)):
        i_q, o_r = i_s * per_group + j // steps, j % steps * BR + tl.arange(0, BR)
        m_r = o_r < rank
        p_s = s_ptr + o_i.to(tl.int64)[:, None] * (slices * R) + (i_q * R + o_r)[None, :]
        b_s = tl.load(p_s, mask=m_t[:, None] & m_r[None, :], other=0.0)  # [BT, BR]
        p_q = q_ptr + o_n[None, :] * stride_qc + i_q.to(tl.int64) * stride_qs + o_r.to(tl.int64)[:, None] * stride_qr
        b_q = tl.load(p_q, mask=m_r[:, None] & m_c[None, :], other=0.0)  # [BR, BC]
        b_q = b_q.to(x_ptr.dtype.element_ty)
        acc = tl.dot(b_s.to(b_q.dtype), b_q, acc, input_precision="ieee")
    if DROPOUT:
        threshold, scale = threshold_of(tl.load(p_ptr + g, mask=g >= 0, other=0.0))
        keys = tl.load(keys_ptr + o_i, mask=m_t, other=0).to(tl.uint64, bitcast=True)
        acc = tl.where(keep_block(keys, threshold, i_c * BC, BC), acc * scale, 0.0)
    if factor_ptr is not None:
        acc *= tl.load(factor_ptr + g, mask=g >= 0, other=0.0)
    if FUSED:
        o_k = tl.arange(0, BK)
        p_x = x_ptr + o_t[:, None] * stride_xt + o_k.to(tl.int64)[None, :] * stride_xk
        p_w = w_ptr + o_k.to(tl.int64)[:, None] * stride_wk + o_n[None, :] * stride_wc
        for k in range(0, K, BK):
            b_x = tl.load(p_x, mask=m_t[:, None] & (o_k < K - k)[None, :], other=0.0)  # [BT, BK]
            b_w = tl.load(p_w, mask=(o_k < K - k)[:, None] & m_c[None, :], other=0.0)  # [BK, BC]
            acc = tl.dot(b_x, b_w, acc, input_precision="ieee")
            p_x += BK * stride_xk
            p_w += BK * stride_wk
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + o_n, mask=m_c, other=0.0).to(tl.float32)[None, :]
    p_y = y_ptr + o_t[:, None] * stride_yt + o_n[None, :]
    m_y = m_t[:, None] & m_c[None, :]
    if not FUSED:
        acc += tl.load(p_y, mask=m_y, other=0.0).to(tl.float32)
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit
def reduce_kernel(
    x_ptr,  # [T, groups*C]
    s_ptr,  # [T, groups*A] fp32, rows in order
    out_ptr,  # [G, ...], element (column n of groups*C, a) at n*stride_oc + a*stride_oa
    part_ptr,  # [slots, ...] fp32, laid out like out
    order_ptr,  # [T]
    chunks_ptr,  # [chunks, 4]
    ranks_ptr,  # [G] or None
    factor_ptr,  # [G] or None
    p_ptr,  # [G]
    keys_ptr,  # [T], in order
    C, A, R, groups,
    stride_xt, stride_xk, stride_og, stride_oc, stride_oa,
    DROPOUT: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """out[g, i_s*C + c, a] = factor_g Σ_i drop(x[order[i], i_s*C + c]) S[i, i_s*A + a] over the adapter's
    rows, in order.
    """
    blocks_c, blocks_a = tl.cdiv(C, BC), tl.cdiv(A, BA)
    pid = tl.program_id(0)
    i_c, i_s = pid % blocks_c, pid // blocks_c % groups
    i_a, i_t = pid // (blocks_c * groups) % blocks_a, pid // (blocks_c * groups * blocks_a)
    g = tl.load(chunks_ptr + i_t * 4).to(tl.int64)
    first, last = tl.load(chunks_ptr + i_t * 4 + 1), tl.load(chunks_ptr + i_t * 4 + 2)
    slot = tl.load(chunks_ptr + i_t * 4 + 3).to(tl.int64)
    if g < 0:
        return
    o_c, o_a = i_c * BC + tl.arange(0, BC), i_a * BA + tl.arange(0, BA)
    rank = R if ranks_ptr is None else tl.load(ranks_ptr + g).to(tl.int32)
    m_c, m_a = o_c < C, (o_a < A) & (o_a % R < rank)
    last = tl.where(tl.max(m_a.to(tl.int32)) == 0, first, last)
    factor = 1.0 if factor_ptr is None else tl.load(factor_ptr + g)
    if DROPOUT:
        threshold, factor = threshold_of(tl.load(p_ptr + g))
    acc = tl.zeros((BC, BA), tl.float32)
    for i in range(first, last, BT):
        o_i = i + tl.arange(0, BT)
        m_t = o_i < last
        o_t = tl.load(order_ptr + o_i, mask=m_t, other=0)
        p_x = x_ptr + o_t[:, None] * stride_xt + (i_s * C + o_c).to(tl.int64)[None, :] * stride_xk
        b_x = tl.load(p_x, mask=m_t[:, None] & m_c[None, :], other=0.0)  # [BT, BC]
        if DROPOUT:
            keys = tl.load(keys_ptr + o_i, mask=m_t, other=0).to(tl.uint64, bitcast=True)
            b_x = tl.where(keep_block(keys, threshold, i_c * BC, BC), b_x, 0.0)
        p_s = s_ptr + o_i.to(tl.int64)[:, None] * (groups * A) + (i_s * A + o_a)[None, :]
        b_s = tl.load(p_s, mask=m_t[:, None] & m_a[None, :], other=0.0)  # [BT, BA]
        acc = tl.dot(tl.trans(b_x), b_s.to(b_x.dtype), acc, input_precision="ieee")
    acc = tl.where((first < last) & m_a[None, :], acc * factor, 0.0)
    o_o = (i_s * C + o_c).to(tl.int64)[:, None] * stride_oc + o_a.to(tl.int64)[None, :] * stride_oa
    m_o = m_c[:, None] & (o_a < A)[None, :]
    if slot < 0:
        tl.store(out_ptr + g * stride_og + o_o, acc.to(out_ptr.dtype.element_ty), mask=m_o)
    else:
        tl.store(part_ptr + slot * stride_og + o_o, acc, mask=m_o)


@triton.jit
def sum_kernel(
    part_ptr,  # [slots, P] fp32
    out_ptr,  # [G, P]
    slots_ptr,  # [G+1]
    P,
    BLOCK: tl.constexpr,
):
    """out[g] = Σ part[slot] over the adapter's slots, in order; adapters without slots have their sum in out
    already.
    """
    blocks = tl.cdiv(P, BLOCK)
    i_p, g = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    first, last = tl.load(slots_ptr + g), tl.load(slots_ptr + g + 1)
    if first >= last:
        return
    o_p = i_p * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    p_part = part_ptr + first.to(tl.int64) * P + o_p
    for _ in range(first, last):
        acc += tl.load(p_part, mask=o_p < P, other=0.0)
        p_part += P
    tl.store(out_ptr + g.to(tl.int64) * P + o_p, acc.to(out_ptr.dtype.element_ty), mask=o_p < P)


def shrink(x, w, s, order, tiles, ranks, factor, dropout, *, K, C, R, groups, strides_w):
    """Launch `shrink_kernel`. dropout: (p, seed, row_key, keys, site) or None. strides_w: of g, slice,
    column, k.
    """
    config = tuned.launch("shrink", tuned.arch_of(x.device), x.dtype, C)
    p, seed, row_key, keys, site = dropout or (None, None, None, None, 0)
    grid = (tiles.shape[0] * triton.cdiv(C, config.BC) * groups,)
    if not grid[0]:
        return
    shrink_kernel[grid](
        x_ptr=x, w_ptr=w, s_ptr=s, order_ptr=order, tiles_ptr=tiles, ranks_ptr=ranks, factor_ptr=factor,
        p_ptr=p, seed_ptr=seed, row_key_ptr=row_key, keys_ptr=keys, site=site, K=K, C=C, R=R, groups=groups,
        stride_xt=x.stride(0), stride_xk=x.stride(1),
        stride_wg=strides_w[0], stride_ws=strides_w[1], stride_wc=strides_w[2], stride_wk=strides_w[3],
        DROPOUT=dropout is not None, BT=SHORT_TILE, BC=config.BC, BK=config.BK,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def expand(
    s, q, x, w, bias, y, order, short, long, ranks, factor, p, keys, *, R, groups, slices, strides_q, fused
):  # fmt: skip
    """Launch `expand_kernel`. w: [K, groups*C] by its strides. strides_q: of g, column, slice, r. p: None
    without dropout.
    """
    config = tuned.launch("fused" if fused else "expand", tuned.arch_of(x.device), x.dtype)
    K, C = w.shape[0], w.shape[1] // groups
    tiles = long if fused else short
    grid = (tiles.shape[0] * triton.cdiv(C, config.BC) * groups,)
    if not grid[0]:
        return
    expand_kernel[grid](
        s_ptr=s, q_ptr=q, x_ptr=x, w_ptr=w, bias_ptr=bias, y_ptr=y, order_ptr=order, tiles_ptr=tiles,
        ranks_ptr=ranks, factor_ptr=factor, p_ptr=p, keys_ptr=keys, K=K, C=C, R=R, groups=groups, slices=slices,
        stride_xt=x.stride(0), stride_xk=x.stride(1), stride_wk=w.stride(0), stride_wc=w.stride(1),
        stride_yt=y.stride(0),
        stride_qg=strides_q[0], stride_qc=strides_q[1], stride_qs=strides_q[2], stride_qr=strides_q[3],
        FUSED=fused, DROPOUT=p is not None, BT=LONG_TILE if fused else SHORT_TILE, BC=config.BC, BK=config.BK,
        BR=min(config.BR, tuned.power_of_two(R)), num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def reduce(x, s, like, order, chunks, slots, ranks, factor, p, keys, *, C, A, R, groups, strides_out):
    """Launch `reduce_kernel`, and `sum_kernel` where an adapter may have several chunks. Returns the gradient
    of `like`.
    """
    config = tuned.launch("reduce", tuned.arch_of(x.device), x.dtype, C)
    out = like.new_empty(like.shape)
    per_adapter, BA = out[:1].numel(), min(config.BR, tuned.power_of_two(A))
    grid = (chunks.shape[0] * triton.cdiv(C, config.BC) * groups * triton.cdiv(A, BA),)
    if not grid[0]:
        return out
    part = torch.empty(slot_capacity(order.numel()), per_adapter, dtype=torch.float32, device=x.device)
    reduce_kernel[grid](
        x_ptr=x, s_ptr=s, out_ptr=out, part_ptr=part, order_ptr=order, chunks_ptr=chunks, ranks_ptr=ranks,
        factor_ptr=factor, p_ptr=p, keys_ptr=keys, C=C, A=A, R=R, groups=groups,
        stride_xt=x.stride(0), stride_xk=x.stride(1),
        stride_og=per_adapter, stride_oc=strides_out[0], stride_oa=strides_out[1],
        DROPOUT=p is not None, BT=config.BK, BC=config.BC, BA=BA,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if part.shape[0]:
        block = 1024
        sum_kernel[(like.shape[0] * triton.cdiv(per_adapter, block),)](
            part_ptr=part, out_ptr=out, slots_ptr=slots, P=per_adapter, BLOCK=block
        )
    return out


def base(x, w, bias, y):
    """y = x w + bias by the vendor's product, into y."""
    if x.shape[0]:
        torch.mm(x, w, out=y) if bias is None else torch.addmm(bias, x, w, out=y)
