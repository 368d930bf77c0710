"""The ops on rows by csrc's kernels on a CPU: dropout, residual and LayerNorm; dropout. One call each, with gradients.

All is computed in fp32 and rounded once, where a result is stored. A row's bits depend on that row alone. Backward computes
what it can anew: of a norm its inputs and two numbers for each row are kept.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .cpu_library import built
from .dropout import Dropout, RowDropout, row_tensors

VARIANT = 0  # 0: the widest instructions that this processor has, 1: the next; for tests
ABSENT = (None, None, None)


def _fake_add_norm(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


def _fake_add_norm_backward(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    need_x, need_residual, need_weight, _ = rest[-4:]
    matrices = (x.new_empty(x.shape if need else 0) for need in (need_x, need_residual))
    return *matrices, *(x.new_empty(x.shape[1] if need_weight else 0) for _ in range(2))


def _fake_adapter_linear(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


def _fake_adapter_linear_backward(dy: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    shapes = zip((x.shape, weight.shape, weight.shape[:2]), rest[-4:-1], strict=True)
    return tuple(x.new_empty(shape if need else 0) for shape, need in shapes)


def _fake_token_loss(logits: Tensor, labels: Tensor, order: Tensor, ends: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    G, statistics = ends.shape[0] - 1, logits.new_empty(logits.shape[0], 2, dtype=torch.float32)
    return statistics.new_empty(G), labels.new_empty(G), statistics


FAKES: dict[str, Callable[..., Any]] = {
    "add_norm": _fake_add_norm,
    "add_norm_backward": _fake_add_norm_backward,
    "dropout": lambda x, *_: torch.empty_like(x),
    "adapter_linear": _fake_adapter_linear,
    "adapter_linear_backward": _fake_adapter_linear_backward,
    "token_loss": _fake_token_loss,
    "token_loss_backward": lambda _, logits, *rest: torch.empty_like(logits),
}


@cache
def _loaded() -> bool:
    """Whether csrc is built; registers the shapes of its operators' results."""
    if built():
        for name, fake in FAKES.items():
            torch.library.register_fake(f"kloss::cpu_{name}", fake)
    return built()


@cache
def _variants(dtype: torch.dtype) -> int:
    """How many instruction sets of this processor have kernels for a dtype."""
    return torch.ops.kloss.cpu_row_variants(torch.empty(0, dtype=dtype))


def serves(x: Tensor, *others: Tensor) -> bool:
    """Whether the kernels compute what x is an input of: on a CPU fp32, and bf16 with AVX-512's bf16. others: of x's dtype."""
    if x.device.type != "cpu" or not _loaded():
        return False
    return _variants(x.dtype) > VARIANT and all(other.dtype == x.dtype for other in others)


def _lists(dropout: Dropout | None) -> Sequence[Tensor | None]:
    return ABSENT if dropout is None else row_tensors(dropout)


class _AddNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *dropout: Tensor | None
    ) -> Tensor:
        x, residual, weight = x.contiguous(), residual.contiguous(), weight.contiguous()
        y, mean, rstd = torch.ops.kloss.cpu_add_norm(x, residual, weight, bias.contiguous(), eps, *dropout, VARIANT)
        ctx.save_for_backward(x, residual, weight, mean, rstd, *dropout)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        need_x, need_residual, need_weight, need_bias = ctx.needs_input_grad[:4]
        saved = ctx.saved_tensors
        one = saved[5] is None  # without dropout dx is dresidual
        needs = need_x or (one and need_residual), need_residual and not one, need_weight or need_bias
        dx, dresidual, dweight, dbias = torch.ops.kloss.cpu_add_norm_backward(dy.contiguous(), *saved, *needs, VARIANT)
        gradients = dx, dx if one else dresidual, dweight, dbias
        needed = (gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False))
        return *needed, None, None, None, None


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: Dropout | None) -> Tensor:
    """`add_norm`."""
    return _AddNorm.apply(x, residual, weight, bias, eps, *_lists(dropout))


class _Dropout(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, keys: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(keys, threshold, scale)
        return torch.ops.kloss.cpu_dropout(x.contiguous(), keys, threshold, scale, VARIANT)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _Dropout.apply(dy, *ctx.saved_tensors), None, None, None


def dropout(x: Tensor, rows: RowDropout) -> Tensor:
    """`apply_dropout`."""
    return _Dropout.apply(x, *(tensor.contiguous() for tensor in rows))
