"""Embeddings, LayerNorm and dropout in one pass over the rows, in Triton: forward and backward.

    e = word[id] + position[i] + type        n = (e - mean(e)) / √(variance(e) + eps)        y = drop(n weight + bias)
    dn = weight drop(dy)        de = (dn - mean(dn) - n mean(n dn)) / √(variance + eps)

i is the token's position in its sequence, counted from `first` and at most the table's last row. All in fp32, rounded once where
y and de are stored. Backward gathers the rows anew. Sizes: T rows, H width, V words, P positions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_norm_triton import dropped, mean_of, rstd_of, tile
from .dropout import RowDropout
from .tuned import FUSION

# The only check of ids that a GPU makes, as torch's own lookup does: the host would wait for them.
CHECKED = {"debug": True, "sanitize_overflow": False}


@triton.jit
def embedded(ids_ptr, position_ptr, words_ptr, positions_ptr, type_ptr, first, V, P, o_t, o_h, m_t, m_h, H):
    """e of a block [BT, BH]."""
    word = tl.load(ids_ptr + o_t, mask=m_t, other=0).to(tl.int64)
    position = tl.load(position_ptr + o_t, mask=m_t, other=0).to(tl.int64)
    tl.device_assert((word >= 0) & (word < V) & (position >= 0), "a token id or a position is out of range", mask=m_t)
    m_x, o_position = m_t[:, None] & m_h[None, :], tl.minimum(position + first, P - 1)
    b_e = tl.load(words_ptr + word[:, None] * H + o_h[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_e += tl.load(positions_ptr + o_position[:, None] * H + o_h[None, :], mask=m_x, other=0.0).to(tl.float32)
    return b_e + tl.load(type_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]


@triton.jit
def embed_kernel(
    ids_ptr,  # [T]
    position_ptr,  # [T]
    words_ptr,  # [V, H]
    positions_ptr,  # [P, H]
    type_ptr,  # [H]
    weight_ptr,  # [H]
    bias_ptr,  # [H]
    y_ptr,  # [T, H]
    mean_ptr,  # [T] fp32
    rstd_ptr,  # [T] fp32
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    first, T, V, P, H, eps,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """y, mean and 1 / √(variance + eps) of BT rows."""
    o_t, o_h = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BH)
    m_t, m_h = o_t < T, o_h < H
    b_e = embedded(ids_ptr, position_ptr, words_ptr, positions_ptr, type_ptr, first, V, P, o_t, o_h, m_t, m_h, H)
    mean = mean_of(b_e, H)
    centred = tl.where(m_h[None, :], b_e - mean[:, None], 0.0)
    rstd = rstd_of(centred, H, eps)
    weight = tl.load(weight_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)
    b_y = centred * rstd[:, None] * weight[None, :] + bias[None, :]  # [BT, BH]
    if keys_ptr is not None:
        b_y = dropped(b_y, keys_ptr, threshold_ptr, scale_ptr, o_t, m_t, BH)
    p_y = y_ptr + o_t.to(tl.int64)[:, None] * H + o_h[None, :]
    tl.store(p_y, b_y.to(y_ptr.dtype.element_ty), mask=m_t[:, None] & m_h[None, :])
    tl.store(mean_ptr + o_t, mean, mask=m_t)
    tl.store(rstd_ptr + o_t, rstd, mask=m_t)


@triton.jit
def embed_backward_kernel(
    dy_ptr,  # [T, H]
    ids_ptr,  # [T]
    position_ptr,  # [T]
    words_ptr,  # [V, H]
    positions_ptr,  # [P, H]
    type_ptr,  # [H]
    weight_ptr,  # [H]
    mean_ptr,  # [T] fp32
    rstd_ptr,  # [T] fp32
    de_ptr,  # [T, H]
    dweight_ptr,  # [programs, H] fp32
    dbias_ptr,  # [programs, H] fp32
    keys_ptr,  # [T] or None
    threshold_ptr,  # [T]
    scale_ptr,  # [T]
    first, T, V, P, H, rows, stride_dy,
    BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """de of `rows` rows, BT at a time, and their part of dweight and dbias."""
    pid, o_h = tl.program_id(0), tl.arange(0, BH)
    m_h = o_h < H
    weight = tl.load(weight_ptr + o_h, mask=m_h, other=0.0).to(tl.float32)[None, :]
    b_dw, b_db = tl.zeros((BH,), tl.float32), tl.zeros((BH,), tl.float32)
    for t in range(pid * rows, tl.minimum(pid * rows + rows, T), BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < T
        m_x, o_row = m_t[:, None] & m_h[None, :], o_t.to(tl.int64)[:, None]
        b_dy = tl.load(dy_ptr + o_row * stride_dy + o_h[None, :], mask=m_x, other=0.0).to(tl.float32)  # [BT, BH]
        if keys_ptr is not None:
            b_dy = dropped(b_dy, keys_ptr, threshold_ptr, scale_ptr, o_t, m_t, BH)
        b_e = embedded(ids_ptr, position_ptr, words_ptr, positions_ptr, type_ptr, first, V, P, o_t, o_h, m_t, m_h, H)
        mean, rstd = tl.load(mean_ptr + o_t, mask=m_t, other=0.0), tl.load(rstd_ptr + o_t, mask=m_t, other=0.0)
        b_n = tl.where(m_x, (b_e - mean[:, None]) * rstd[:, None], 0.0)
        b_dw += tl.sum(b_dy * b_n, 0)
        b_db += tl.sum(b_dy, 0)
        b_dn = b_dy * weight
        b_de = (b_dn - mean_of(b_dn, H)[:, None] - b_n * mean_of(b_dn * b_n, H)[:, None]) * rstd[:, None]
        tl.store(de_ptr + o_row * H + o_h[None, :], b_de.to(de_ptr.dtype.element_ty), mask=m_x)
    tl.store(dweight_ptr + pid.to(tl.int64) * H + o_h, b_dw, mask=m_h)
    tl.store(dbias_ptr + pid.to(tl.int64) * H + o_h, b_db, mask=m_h)


def forward(
    input_ids: Tensor,
    position: Tensor,
    words: Tensor,
    positions: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    first: int,
    dropout: RowDropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [T, H] in the tables' dtype, mean and 1 / √(variance + eps) fp32 [T]. All are contiguous."""
    T, (V, H), P = input_ids.shape[0], words.shape, positions.shape[0]
    y = words.new_empty(T, H)
    mean, rstd = (torch.empty(T, dtype=torch.float32, device=words.device) for _ in range(2))
    keys, threshold, scale = (None, None, None) if dropout is None else dropout
    BT, BH = tile(H)
    if T:
        embed_kernel[(triton.cdiv(T, BT),)](
            ids_ptr=input_ids, position_ptr=position, words_ptr=words, positions_ptr=positions, type_ptr=token_type,
            weight_ptr=weight, bias_ptr=bias, y_ptr=y, mean_ptr=mean, rstd_ptr=rstd, keys_ptr=keys, threshold_ptr=threshold,
            scale_ptr=scale, first=first, T=T, V=V, P=P, H=H, eps=eps, BT=BT, BH=BH, **CHECKED, **FUSION,
        )  # fmt: skip
    return y, mean, rstd


def backward(
    dy: Tensor,
    input_ids: Tensor,
    position: Tensor,
    words: Tensor,
    positions: Tensor,
    token_type: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    first: int,
    dropout: RowDropout | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """de [T, H] in the tables' dtype; dweight and dbias in fp32."""
    T, (V, H), P = input_ids.shape[0], words.shape, positions.shape[0]
    BT, BH = tile(H)
    rows = 16 * BT  # fixed: each program writes one part of dweight
    programs = triton.cdiv(T, rows)
    de, (dweight, dbias) = words.new_empty(T, H), (words.new_empty(programs, H, dtype=torch.float32) for _ in range(2))
    keys, threshold, scale = (None, None, None) if dropout is None else dropout
    if T:
        embed_backward_kernel[(programs,)](
            dy_ptr=dy, ids_ptr=input_ids, position_ptr=position, words_ptr=words, positions_ptr=positions,
            type_ptr=token_type, weight_ptr=weight, mean_ptr=mean, rstd_ptr=rstd, de_ptr=de, dweight_ptr=dweight,
            dbias_ptr=dbias, keys_ptr=keys, threshold_ptr=threshold, scale_ptr=scale, first=first, T=T, V=V, P=P, H=H,
            rows=rows, stride_dy=dy.stride(0), BT=BT, BH=BH, **CHECKED, **FUSION,
        )  # fmt: skip
    return de, dweight.sum(0), dbias.sum(0)
