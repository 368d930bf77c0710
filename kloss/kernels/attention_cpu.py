"""Attention of packed sequences over csrc: one call forward and one backward for the whole batch, without padding.

Probabilities and their gradients are rounded to the dtype before their products, sums are fp32. Backward computes the
probabilities anew, so nothing but qkv is kept for it. A sequence's bits depend neither on the others nor on the threads.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .cpu_library import built
from .dropout import Dropout, row_dropout

LANES = 16  # a head's width is a multiple of it
VARIANT = 0  # 0: the widest instructions that this processor has, 1: the next; for tests


@cache
def _variants(dtype: torch.dtype) -> int:
    """How many instruction sets of this processor have kernels for a dtype."""
    return torch.ops.kloss.cpu_lora_variants(torch.empty(0, dtype=dtype)) if built() else 0


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


def attention(qkv: Tensor, cu_seqlens: Tensor, heads: int, dropout: Dropout | None) -> Tensor:
    """`packed_attention`; the arguments are checked."""
    keys = (None, None, None) if dropout is None else tuple(tensor.contiguous() for tensor in row_dropout(dropout))
    wide = _with_rows(qkv.to(dtype_for(qkv)))
    return _operator()(wide, cu_seqlens.int().contiguous(), heads, *keys, VARIANT).to(qkv.dtype)


@cache
def _operator() -> Any:
    """The operator forward. C++ defines it; its shapes and its gradient are registered here, once it is loaded."""
    kloss = torch.ops.kloss

    def save(ctx: Any, inputs: tuple, output: Tensor) -> None:
        qkv, cu_seqlens, ctx.heads, *keys, ctx.variant = inputs
        ctx.save_for_backward(qkv, cu_seqlens, *keys)

    def gradient(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        qkv, cu_seqlens, *keys = ctx.saved_tensors
        dqkv = kloss.cpu_attention_backward(_with_rows(dout), qkv, cu_seqlens, ctx.heads, *keys, ctx.variant)
        return dqkv, None, None, None, None, None, None

    def shape(qkv: Tensor, *rest: Any) -> Tensor:
        return qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3)

    torch.library.register_fake("kloss::cpu_attention", shape)
    torch.library.register_fake("kloss::cpu_attention_backward", lambda dout, qkv, *rest: qkv.new_empty(qkv.shape))
    torch.library.register_autograd("kloss::cpu_attention", gradient, setup_context=save)
    return kloss.cpu_attention
