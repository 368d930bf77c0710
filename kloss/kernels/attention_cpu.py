"""Attention of packed sequences over csrc: one call forward and one backward for the whole batch, without padding.

Probabilities and their gradients are rounded to the dtype before their products, sums are fp32. Backward computes the
probabilities anew, so nothing but qkv is kept for it. A sequence's bits depend neither on the others nor on the threads.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .cpu_library import built
from .dropout import Dropout, row_tensors

LANES = 16  # a head's width is a multiple of it
ABSENT = (None, None, None)  # keys, threshold and scale without dropout
VARIANT = 0  # 0: the widest instructions that this processor has, 1: the next; for tests


def _fake(qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)


def _fake_backward(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


@cache
def _loaded() -> bool:
    """Whether csrc is built; registers the shapes of its operators' results."""
    if built():
        torch.library.register_fake("kloss::cpu_attention", _fake)
        torch.library.register_fake("kloss::cpu_attention_backward", _fake_backward)
    return built()


@cache
def _variants(dtype: torch.dtype) -> int:
    """How many instruction sets of this processor have kernels for a dtype."""
    return torch.ops.kloss.cpu_lora_variants(torch.empty(0, dtype=dtype)) if _loaded() else 0


def dtype_for(x: Tensor) -> torch.dtype | None:
    """What the kernels compute x's attention in: its dtype, or fp32 for a narrower one that they lack; None: they do not."""
    if x.device.type != "cpu" or x.dtype == torch.float64:
        return None
    return next((dtype for dtype in (x.dtype, torch.float32) if _variants(dtype) > VARIANT), None)


def fits(qkv: Tensor, heads: int) -> bool:
    """Whether the kernels can compute attention of qkv [T, 3H]."""
    return dtype_for(qkv) is not None and qkv.shape[1] % (3 * heads * LANES) == 0


def _with_rows(x: Tensor) -> Tensor:
    """The tensor with contiguous rows that do not overlap and, for bf16, begin where a pair of elements does."""
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] and x.stride(0) % 2 == 0 else x.contiguous()


class _Attention(Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cu_seqlens: Tensor, heads: int, *keys: Tensor | None) -> Tensor:
        ctx.save_for_backward(qkv, cu_seqlens, *keys)
        ctx.heads, ctx.variant = heads, VARIANT
        return torch.ops.kloss.cpu_attention(qkv, cu_seqlens, heads, *keys, VARIANT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cu_seqlens, *keys = ctx.saved_tensors
        dqkv = torch.ops.kloss.cpu_attention_backward(_with_rows(dout), qkv, cu_seqlens, ctx.heads, *keys, ctx.variant)
        return dqkv, *(None,) * (2 + len(keys))


def attention(qkv: Tensor, cu_seqlens: Tensor, heads: int, dropout: Dropout | None) -> Tensor:
    """`packed_attention`; the arguments are checked."""
    keys = ABSENT if dropout is None else row_tensors(dropout)
    wide = _with_rows(qkv.to(dtype_for(qkv)))
    return _Attention.apply(wide, cu_seqlens.int().contiguous(), heads, *keys).to(qkv.dtype)
