"""Dropout, residual and LayerNorm in one pass over the rows, in Triton: forward and backward.

    z = drop(x) + residual        n = (z - mean) / √(variance + eps)        y = n weight + bias
    dn = weight dy        dz = (dn - mean(dn) - n mean(n dn)) / √(variance + eps)        dx = mask c dz        dresidual = dz

All in fp32, rounded once where y, dx and dresidual are stored. The weight's and bias's gradients are sums of one part for each
program, in order. Sizes: T rows, H width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout import RowDropout
from .dropout_device import keep_block
from .tuned import FUSION, power_of_two

BLOCK = 2048  # elements of a program's block, by resource reports


@triton.jit
def mean_of(b, H):
    """The mean of each row of H values, fp32 [BT]. A GPU's plain quotient is off by up to two units in the last place, so what it
    leaves is divided, too. `tl.div_rn` would call a function, around which registers spill."""
    total, part = tl.sum(b, 1), 1.0 / H
    mean = total * part
    return mean + (total - mean * H) * part


@triton.jit
def rstd_of(centred, H, eps):
    """1 / √(variance + eps) of each row, fp32 [BT]."""
    variance = mean_of(centred * centred, H)
    return tl.div_rn(tl.zeros_like(variance) + 1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def dropped(b_x, keys_ptr, threshold_ptr, scale_ptr, o_t, m_t, BH: tl.constexpr):
    """drop(b_x) for a block [BT, BH]."""
    keys = tl.load(keys_ptr + o_t, mask=m_t, other=0).to(tl.uint64, bitcast=True)
    threshold = (tl.load(threshold_ptr + o_t, mask=m_t, other=0).to(tl.int32) + 32768).to(tl.uint32)
    scale = tl.load(scale_ptr + o_t, mask=m_t, other=0.0)
    return tl.where(keep_block(keys, threshold[:, None], 0, BH), b_x * scale[:, None], 0.0)


@triton.jit
def add_norm_kernel(
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H]
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    y_ptr,  # [T, H]
    mean_ptr,  # [T] fp32
    rstd_ptr,  # [T] fp32
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    T, H, eps, stride_x, stride_residual,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """y, mean and 1 / √(variance + eps) of BT rows."""
    o_t, o_h = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BH)
    m_t, m_h = o_t < T, o_h < H
    m_x, o_row = m_t[:, None] & m_h[None, :], o_t.to(tl.int64)[:, None]
    b_z = tl.load(x_ptr + o_row * stride_x + o_h[None, :], mask=m_x, other=0.0).to(tl.float32)  # [BT, BH]
    if keys_ptr is not None:
        b_z = dropped(b_z, keys_ptr, threshold_ptr, scale_ptr, o_t, m_t, BH)
    b_z += tl.load(residual_ptr + o_row * stride_residual + o_h[None, :], mask=m_x, other=0.0).to(tl.float32)
    mean = mean_of(b_z, H)
    centred = tl.where(m_h[None, :], b_z - mean[:, None], 0.0)
    rstd = rstd_of(centred, H, eps)
    weight = tl.load(weight_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_y = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(y_ptr + o_row * H + o_h[None, :], b_y.to(y_ptr.dtype.element_ty), mask=m_x)
    tl.store(mean_ptr + o_t, mean, mask=m_t)
    tl.store(rstd_ptr + o_t, rstd, mask=m_t)


@triton.jit
def add_norm_backward_kernel(
    dy_ptr,  # [T, H]
    more_dy_ptr,  # [T, H] or None, the gradient of another use of y, to be added
    x_ptr,  # [T, H]
    residual_ptr,  # [T, H]
    weight_ptr,  # [H]
    mean_ptr,  # [T] fp32
    rstd_ptr,  # [T] fp32
    dx_ptr,  # [T, H]
    dresidual_ptr,  # [T, H] or None: without dropout before the norm it is dx
    dweight_ptr,  # [programs, H] fp32 or None
    dbias_ptr,  # [programs, H] fp32
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    T, H, rows, stride_dy, stride_more_dy, stride_x, stride_residual,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """dx and dresidual of `rows` rows, BT at a time, and their part of dweight and dbias."""
    pid, o_h = tl.program_id(0), tl.arange(0, BH)
    m_h = o_h < H
    weight = tl.load(weight_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    b_dw, b_db = tl.zeros((BH,), tl.float32), tl.zeros((BH,), tl.float32)
    for t in range(pid * rows, tl.minimum(pid * rows + rows, T), BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < T
        m_x, o_row = m_t[:, None] & m_h[None, :], o_t.to(tl.int64)[:, None]
        b_z = tl.load(x_ptr + o_row * stride_x + o_h[None, :], mask=m_x, other=0.0).to(tl.float32)  # [BT, BH]
        b_dy = tl.load(dy_ptr + o_row * stride_dy + o_h[None, :], mask=m_x, other=0.0).to(tl.float32)
        if more_dy_ptr is not None:
            b_dy += tl.load(more_dy_ptr + o_row * stride_more_dy + o_h[None, :], mask=m_x, other=0.0).to(tl.float32)
        if keys_ptr is not None:
            b_z = dropped(b_z, keys_ptr, threshold_ptr, scale_ptr, o_t, m_t, BH)
        b_z += tl.load(residual_ptr + o_row * stride_residual + o_h[None, :], mask=m_x, other=0.0).to(tl.float32)
        mean, rstd = tl.load(mean_ptr + o_t, mask=m_t, other=0.0), tl.load(rstd_ptr + o_t, mask=m_t, other=0.0)
        b_n = tl.where(m_x, (b_z - mean[:, None]) * rstd[:, None], 0.0)
        b_dn = b_dy * weight
        b_dz = (b_dn - mean_of(b_dn, H)[:, None] - b_n * mean_of(b_dn * b_n, H)[:, None]) * rstd[:, None]
        if dweight_ptr is not None:
            b_dw += tl.sum(b_dy * b_n, 0)
            b_db += tl.sum(b_dy, 0)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + o_row * H + o_h[None, :], b_dz.to(dresidual_ptr.dtype.element_ty), mask=m_x)
        if keys_ptr is not None:
            b_dz = dropped(b_dz, keys_ptr, threshold_ptr, scale_ptr, o_t, m_t, BH)
        tl.store(dx_ptr + o_row * H + o_h[None, :], b_dz.to(dx_ptr.dtype.element_ty), mask=m_x)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + pid.to(tl.int64) * H + o_h, b_dw, mask=m_h)
        tl.store(dbias_ptr + pid.to(tl.int64) * H + o_h, b_db, mask=m_h)


@triton.jit
def dropout_kernel(
    x_ptr,  # [T, H]
    y_ptr,  # [T, H]
    keys_ptr,  # [T]
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    T, H, stride_x,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """y = drop(x) for BT rows."""
    o_t, o_h = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BH)
    m_t = o_t < T
    m_x, o_row = m_t[:, None] & (o_h < H)[None, :], o_t.to(tl.int64)[:, None]
    b_x = tl.load(x_ptr + o_row * stride_x + o_h[None, :], mask=m_x, other=0.0).to(tl.float32)  # [BT, BH]
    b_x = dropped(b_x, keys_ptr, threshold_ptr, scale_ptr, o_t, m_t, BH)
    tl.store(y_ptr + o_row * H + o_h[None, :], b_x.to(y_ptr.dtype.element_ty), mask=m_x)


def forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: RowDropout | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, H] in x's dtype, mean and 1 / √(variance + eps) fp32 [T]."""
    T, H = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = (torch.empty(T, dtype=torch.float32, device=x.device) for _ in range(2))
    keys, threshold, scale = (None, None, None) if dropout is None else dropout
    BT, BH = tile(H)
    if T:
        add_norm_kernel[(triton.cdiv(T, BT),)](
            x_ptr=x, residual_ptr=residual, weight_ptr=weight, bias_ptr=bias, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd,
            keys_ptr=keys, threshold_ptr=threshold, scale_ptr=scale, T=T, H=H, eps=eps, stride_x=x.stride(0),
            stride_residual=residual.stride(0), BT=BT, BH=BH, **FUSION,
        )  # fmt: skip
    return y, mean, rstd


def backward(
    dy: Tensor,
    more_dy: Tensor | None,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout: RowDropout | None,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dresidual, empty without dropout, for it is dx then, and dweight and dbias in fp32, not written where not needed.

    more_dy: what is to be added to dy, if anything.
    """
    T, H = x.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dresidual = x.new_empty(0) if dropout is None else torch.empty_like(dx)
    BT, BH = tile(H)
    # Each program writes one part of dweight, so there is a fixed number of rows for each.
    rows = 16 * BT if need_weight else BT
    programs = triton.cdiv(T, rows)
    dweight, dbias = (x.new_empty(programs if need_weight else 0, H, dtype=torch.float32) for _ in range(2))
    keys, threshold, scale = (None, None, None) if dropout is None else dropout
    if T:
        add_norm_backward_kernel[(programs,)](
            dy_ptr=dy, more_dy_ptr=more_dy, x_ptr=x, residual_ptr=residual, weight_ptr=weight, mean_ptr=mean, rstd_ptr=rstd,
            dx_ptr=dx, dresidual_ptr=None if dropout is None else dresidual, dweight_ptr=dweight if need_weight else None,
            dbias_ptr=dbias, keys_ptr=keys, threshold_ptr=threshold, scale_ptr=scale, T=T, H=H, rows=rows,
            stride_dy=dy.stride(0), stride_more_dy=0 if more_dy is None else more_dy.stride(0), stride_x=x.stride(0),
            stride_residual=residual.stride(0), BT=BT, BH=BH, **FUSION,
        )  # fmt: skip
    if not need_weight:  # a sum of no parts would be a launch
        return dx, dresidual, dweight.new_empty(H), dbias.new_empty(H)
    return dx, dresidual, dweight.sum(0), dbias.sum(0)


def dropout(x: Tensor, dropout: RowDropout) -> Tensor:
    """drop(x) [T, H]. Its own gradient: the gradient of drop(x) is drop(dy)."""
    T, H = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    keys, threshold, scale = dropout
    BT, BH = tile(H)
    if T:
        dropout_kernel[(triton.cdiv(T, BT),)](
            x_ptr=x,
            y_ptr=y,
            keys_ptr=keys,
            threshold_ptr=threshold,
            scale_ptr=scale,
            T=T,
            H=H,
            stride_x=x.stride(0),
            BT=BT,
            BH=BH,
            **FUSION,
        )
    return y


def tile(H: int) -> tuple[int, int]:
    """Rows of a program's block and its width, which is the whole row."""
    BH = power_of_two(H)
    return max(1, BLOCK // BH), BH
