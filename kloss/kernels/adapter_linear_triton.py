"""A whole linear layer per adapter, in Triton: the tagging heads. No loop over adapters, no atomics.

    y[t] = W_g x[t] + b_g        dx[t] = W_gᵀ dy[t]        dW_g = Σ dy[t] x[t]ᵀ        db_g = Σ dy[t]        g = adapter of row t

Tiles, order and reductions are those of the multi-adapter linear. Sizes: T rows, K inputs, N outputs, G adapters.
"""

import triton
import triton.language as tl
from torch import Tensor

from . import tuned
from .lora_tiles import add_product, reduce
from .segments import SHORT_TILE, Work


@triton.jit
def adapter_linear_kernel(
    x_ptr,  # [T, K]
    w_ptr,  # [G, ...], element (n, k) at n*stride_wn + k*stride_wk
    bias_ptr,  # [G, N] or None
    y_ptr,  # [T, N]
    order_ptr,  # [T]
    tiles_ptr,  # [tiles, 3]
    K, N, stride_xt, stride_wg, stride_wn, stride_wk,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """y of one tile of rows and BN outputs; 0 for rows without an adapter."""
    blocks_n = tl.cdiv(N, BN)
    i_n, i_t = tl.program_id(0) % blocks_n, tl.program_id(0) // blocks_n
    g = tl.load(tiles_ptr + i_t * 3).to(tl.int64)
    first, last = tl.load(tiles_ptr + i_t * 3 + 1), tl.load(tiles_ptr + i_t * 3 + 2)
    if first >= last:
        return
    o_n, o_i = i_n * BN + tl.arange(0, BN), first + tl.arange(0, BT)
    m_n, m_t = o_n < N, o_i < last
    o_t = tl.load(order_ptr + o_i, mask=m_t, other=0)
    acc = tl.zeros((BT, BN), tl.float32)
    for k in range(0, tl.where(g >= 0, K, 0), BK):
        o_k = k + tl.arange(0, BK)
        m_k = o_k < K
        p_x = x_ptr + o_t[:, None] * stride_xt + o_k[None, :]
        b_x = tl.load(p_x, mask=m_t[:, None] & m_k[None, :], other=0.0)  # [BT, BK]
        p_w = w_ptr + g * stride_wg + o_k.to(tl.int64)[:, None] * stride_wk + o_n.to(tl.int64)[None, :] * stride_wn
        b_w = tl.load(p_w, mask=m_k[:, None] & m_n[None, :], other=0.0)  # [BK, BN]
        acc = add_product(acc, b_x, b_w.to(b_x.dtype))
    if bias_ptr is not None:
        o_b = tl.where(g >= 0, o_n, N)
        acc += tl.load(bias_ptr + g * N + o_b, mask=o_b < N, other=0.0).to(tl.float32)[None, :]
    p_y = y_ptr + o_t[:, None] * N + o_n[None, :]
    tl.store(p_y, acc.to(y_ptr.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


@triton.jit
def bias_gradient_kernel(
    dy_ptr,  # [rows, N] fp32, rows in order
    db_ptr,  # [G, N]
    ends_ptr,  # [G+1]
    N,
    BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """db[g, n] = Σ dy over the adapter's rows, in order."""
    blocks_n = tl.cdiv(N, BN)
    g, o_n = tl.program_id(0) // blocks_n, tl.program_id(0) % blocks_n * BN + tl.arange(0, BN)
    first, last = tl.load(ends_ptr + g - 1, mask=g > 0, other=0), tl.load(ends_ptr + g)
    acc = tl.zeros((BT, BN), tl.float32)
    for i in range(first, last, BT):
        o_i = i + tl.arange(0, BT)
        p_d = dy_ptr + o_i.to(tl.int64)[:, None] * N + o_n[None, :]
        acc += tl.load(p_d, mask=(o_i < last)[:, None] & (o_n < N)[None, :], other=0.0)
    p_b = db_ptr + g.to(tl.int64) * N + o_n
    tl.store(p_b, tl.sum(acc, 0).to(db_ptr.dtype.element_ty), mask=o_n < N)


def _product(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, work: Work, stride_n: int, stride_k: int, N: int
) -> Tensor:
    """y [T, N]. Rows behind the last offset are 0."""
    y = x.new_empty(x.shape[0], N)
    y[order.numel() :] = 0
    config = tuned.launch("shrink", tuned.arch_of(x.device), x.dtype, N)
    grid = (work.tiles_64.shape[0] * triton.cdiv(N, config.BC),)
    if grid[0]:
        adapter_linear_kernel[grid](
            x_ptr=x, w_ptr=weight, bias_ptr=bias, y_ptr=y, order_ptr=order, tiles_ptr=work.tiles_64, K=x.shape[1], N=N,
            stride_xt=x.stride(0), stride_wg=weight.stride(0), stride_wn=stride_n, stride_wk=stride_k, BT=SHORT_TILE,
            BN=config.BC, BK=config.BK, **config.options,
        )  # fmt: skip
    return y


def forward(x: Tensor, weight: Tensor, bias: Tensor, order: Tensor, work: Work) -> Tensor:
    """y [T, N] in x's dtype. order, work: of the segments."""
    return _product(x, weight, bias, order, work, weight.stride(1), weight.stride(2), weight.shape[1])


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, order: Tensor, ends: Tensor, work: Work, need_x: bool, need_w: bool, need_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [T, K], dW [G, N, K], db [G, N], empty where not needed. dy: contiguous."""
    (G, N, K), dx = weight.shape, x.new_empty(0)
    dw, db = weight.new_empty(weight.shape if need_w else 0), weight.new_empty(G if need_b else 0, N)
    if need_x:
        dx = _product(dy, weight, None, order, work, weight.stride(2), weight.stride(1), K)
    in_order = dy[order].float() if need_w or need_b else dy
    if need_w:
        reduce(x, in_order, dw, order, work, None, None, C=K, SR=N, R=N, blocks=1, strides=(1, K))
    BN = 64
    grid = (db.shape[0] * triton.cdiv(N, BN),)
    if grid[0]:
        bias_gradient_kernel[grid](dy_ptr=in_order, db_ptr=db, ends_ptr=ends, N=N, BT=32, BN=BN, **tuned.FUSION)
    return dx, dw, db
