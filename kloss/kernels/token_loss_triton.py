"""Mean cross-entropy of each adapter's labelled rows, in Triton: that of rows in blocks, and a program that adds an adapter's up.

    loss_g = Σ_t (log Σ_c exp l_tc - l_t,label) / count_g        dl_tc = (softmax(l_t)_c - [c = label]) dloss_g / count_g

Sizes: T rows, C labels, G adapters.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import checks
from .tuned import FUSION, power_of_two

BLOCK = 2048  # logits of a program's block
ROWS = 512  # that are added up together
IGNORED = tl.constexpr(checks.IGNORED)


@triton.jit
def token_loss_rows_kernel(
    logits_ptr,  # [T, C]
    labels_ptr,  # [T], IGNORED where there is none
    order_ptr,  # [rows]
    ends_ptr,  # [G+1]
    of_row_ptr,  # [T] fp32, in order
    lse_ptr,  # [T] fp32, log Σ exp of the adapters' rows
    G, C, stride_logits,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The loss of BT rows, 0 without a label, and lse. Both are NaN for a label that is none of C."""
    o_i = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_i < tl.load(ends_ptr + G - 1)
    o_t = tl.load(order_ptr + o_i, mask=m_t, other=0)
    label = tl.load(labels_ptr + o_t, mask=m_t, other=IGNORED)
    top, total, own = tl.full((BT,), float("-inf"), tl.float32), tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.float32)
    shift = total
    for c in range(0, C, BC):
        o_c = c + tl.arange(0, BC)
        p_l = logits_ptr + o_t[:, None] * stride_logits + o_c[None, :]
        b_l = tl.load(p_l, mask=m_t[:, None] & (o_c < C)[None, :], other=float("-inf")).to(tl.float32)  # [BT, BC]
        before, top = top, tl.maximum(top, tl.max(b_l, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(b_l - shift[:, None]), 1)
        own += tl.sum(tl.where(o_c[None, :] == label[:, None], b_l, 0.0), 1)
    lse = shift + tl.log(tl.where(m_t, total, 1.0))
    counted = label != IGNORED
    lse = tl.where(counted & ((label < 0) | (label >= C)), float("nan"), lse)
    tl.store(of_row_ptr + o_i, tl.where(counted, lse - own, 0.0), mask=m_t)
    tl.store(lse_ptr + o_t, lse, mask=m_t)


@triton.jit
def token_loss_kernel(
    of_row_ptr,  # [T] fp32, in order
    labels_ptr,  # [T], IGNORED where there is none
    order_ptr,  # [rows]
    ends_ptr,  # [G+1]
    loss_ptr,  # [G] fp32
    count_ptr,  # [G]
    BT: tl.constexpr,
):
    """loss and count of one adapter."""
    g = tl.program_id(0)
    first, last = tl.load(ends_ptr + g - 1, mask=g > 0, other=0), tl.load(ends_ptr + g)
    total, count = tl.zeros((BT,), tl.float32), tl.zeros((BT,), tl.int32)
    for i in range(first, last, BT):
        o_i = i + tl.arange(0, BT)
        m_t = o_i < last
        o_t = tl.load(order_ptr + o_i, mask=m_t, other=0)
        total += tl.load(of_row_ptr + o_i, mask=m_t, other=0.0)
        count += (tl.load(labels_ptr + o_t, mask=m_t, other=IGNORED) != IGNORED).to(tl.int32)
    labelled = tl.sum(count)
    tl.store(loss_ptr + g, tl.sum(total) / tl.maximum(labelled, 1).to(tl.float32))
    tl.store(count_ptr + g, labelled.to(tl.int64))


@triton.jit
def token_loss_backward_kernel(
    logits_ptr,  # [T, C]
    labels_ptr,  # [T]
    row_adapter_ptr,  # [rows], -1 for none
    lse_ptr,  # [T] fp32
    dloss_ptr,  # [G] fp32
    count_ptr,  # [G]
    dlogits_ptr,  # [T, C]
    T, C, rows, stride_logits,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dlogits of BT rows; 0 for rows without an adapter or a label."""
    o_t = tl.program_id(0) * BT + tl.arange(0, BT)
    m_t = o_t < T
    g = tl.load(row_adapter_ptr + o_t, mask=o_t < rows, other=-1)
    label = tl.load(labels_ptr + o_t, mask=m_t, other=IGNORED)
    counted = (g >= 0) & (label != IGNORED)
    lse = tl.load(lse_ptr + o_t, mask=counted, other=0.0)
    count = tl.load(count_ptr + g, mask=counted, other=1).to(tl.float32)
    each = tl.load(dloss_ptr + g, mask=counted, other=0.0) / count
    for c in range(0, C, BC):
        o_c = c + tl.arange(0, BC)
        m_c = o_c < C
        m_l = counted[:, None] & m_c[None, :]
        b_l = tl.load(logits_ptr + o_t.to(tl.int64)[:, None] * stride_logits + o_c[None, :], mask=m_l, other=0.0).to(tl.float32)
        b_d = (tl.exp(b_l - lse[:, None]) - (o_c[None, :] == label[:, None]).to(tl.float32)) * each[:, None]
        p_d = dlogits_ptr + o_t.to(tl.int64)[:, None] * C + o_c[None, :]
        tl.store(p_d, tl.where(m_l, b_d, 0.0).to(dlogits_ptr.dtype.element_ty), mask=m_t[:, None] & m_c[None, :])


def forward(logits: Tensor, labels: Tensor, order: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """loss fp32 [G], count int64 [G], lse fp32 [T], 0 for rows without an adapter. order, ends: of the segments."""
    (T, C), G = logits.shape, ends.numel() - 1
    loss, count = logits.new_empty(G, dtype=torch.float32), labels.new_empty(G, dtype=torch.int64)
    lse = logits.new_zeros(T, dtype=torch.float32)
    if G:
        (BT, BC), rows, of_row = tile(C), order.numel(), torch.empty_like(lse)
        if rows:
            token_loss_rows_kernel[(triton.cdiv(rows, BT),)](
                logits_ptr=logits, labels_ptr=labels, order_ptr=order, ends_ptr=ends, of_row_ptr=of_row, lse_ptr=lse,
                G=G, C=C, stride_logits=logits.stride(0), BT=BT, BC=BC, **FUSION,
            )  # fmt: skip
        token_loss_kernel[(G,)](
            of_row_ptr=of_row, labels_ptr=labels, order_ptr=order, ends_ptr=ends, loss_ptr=loss, count_ptr=count,
            BT=ROWS, **FUSION,
        )  # fmt: skip
    return loss, count, lse


def backward(dloss: Tensor, logits: Tensor, labels: Tensor, row_adapter: Tensor, count: Tensor, lse: Tensor) -> Tensor:
    """dlogits [T, C] in the logits' dtype. row_adapter: of the segments."""
    T, C = logits.shape
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if T:
        BT, BC = tile(C)
        token_loss_backward_kernel[(triton.cdiv(T, BT),)](
            logits_ptr=logits, labels_ptr=labels, row_adapter_ptr=row_adapter, lse_ptr=lse, dloss_ptr=dloss, count_ptr=count,
            dlogits_ptr=dlogits, T=T, C=C, rows=row_adapter.numel(), stride_logits=logits.stride(0), BT=BT, BC=BC, **FUSION,
        )  # fmt: skip
    return dlogits


def tile(C: int) -> tuple[int, int]:
    """Rows of a program's block and its width, which is the whole row unless there are very many labels."""
    BC = min(power_of_two(C), BLOCK)
    return BLOCK // BC, BC
