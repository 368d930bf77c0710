"""The tagging heads and the token loss by csrc's kernels on a CPU: one call for all adapters, with gradients.

Sums are fp32, in an order that an adapter's own rows fix, and rounded once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import rows_cpu
from .segments import Segments


class _AdapterLinear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, order: Tensor, ends: Tensor) -> Tensor:
        N, K = weight.shape[1:]
        x = x.contiguous()
        weight = weight if weight.stride()[1:] == (K, 1) else weight.contiguous()  # a bank's view is not copied
        bias = bias if bias.stride(1) == 1 else bias.contiguous()
        ctx.save_for_backward(x, weight, order, ends)
        return torch.ops.kloss.cpu_adapter_linear(x, weight, bias, order, ends, rows_cpu.VARIANT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[:3]
        gradients = torch.ops.kloss.cpu_adapter_linear_backward(dy.contiguous(), *ctx.saved_tensors, *needs, rows_cpu.VARIANT)
        return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), None, None


def adapter_linear(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments) -> Tensor:
    """`adapter_linear`."""
    return _AdapterLinear.apply(x, weight, bias, segments.order, segments.ends)


class _TokenLoss(Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, order: Tensor, ends: Tensor, row_adapter: Tensor
    ) -> tuple[Tensor, Tensor]:
        logits, labels = logits.contiguous(), labels.contiguous()
        loss, count, statistics = torch.ops.kloss.cpu_token_loss(logits, labels, order, ends, row_adapter, rows_cpu.VARIANT)
        ctx.save_for_backward(logits, labels, row_adapter, count, statistics)
        ctx.mark_non_differentiable(count)
        ctx.set_materialize_grads(False)
        return loss, count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dloss is None:
            return (None,) * 5
        dlogits = torch.ops.kloss.cpu_token_loss_backward(dloss.contiguous(), *ctx.saved_tensors, rows_cpu.VARIANT)
        return dlogits, None, None, None, None


def token_loss(logits: Tensor, labels: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """`token_loss`."""
    return _TokenLoss.apply(logits, labels, segments.order, segments.ends, segments.row_adapter)
