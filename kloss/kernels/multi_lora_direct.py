"""The csrc backend of `multi_lora.py` for eager layers: one autograd function, with no operator around it.

An operator costs a layer that has few rows more than its products do. Results are those of `multi_lora_linear`, to the bit.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import multi_lora_cpu
from .dropout import Dropout, kept_scaling, row_dropout
from .multi_lora_cpu import LANES
from .segments import Segments


class Lists(NamedTuple):
    """What the kernels read besides the layer and its input, as `multi_lora_cpu.forward` has it."""

    scaling_kept: Tensor
    order: Tensor
    ends: Tensor
    ranks: Tensor | None
    keys: Tensor | None = None
    threshold: Tensor | None = None

    def dropping(self, dropout: Dropout, segments: Segments) -> "Lists":
        """The lists of one site of dropout."""
        keys, threshold, _ = row_dropout(dropout, segments.row_adapter)
        return self._replace(keys=keys, threshold=threshold)


def make_lists(segments: Segments, scaling: Tensor, ranks: Tensor | None, dropout: Dropout | None) -> Lists | None:
    """The lists of a batch on a CPU, None elsewhere. Arguments as in `multi_lora_linear`; a site has to add its keys."""
    if not segments.order.is_cpu or not multi_lora_cpu.built():
        return None
    return Lists(scaling if dropout is None else kept_scaling(scaling, dropout.p), segments.order, segments.ends, ranks)


def serves(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor) -> bool:
    """Whether `linear` may compute a layer: plain contiguous fp32, the base layer frozen, and nobody watches operators."""
    return (
        type(x) is Tensor
        and type(lora_a) is type(lora_b) is nn.Parameter
        and x.dtype == weight.dtype == lora_a.dtype == lora_b.dtype == torch.float32
        and x.dim() > 1
        and x.is_contiguous()
        and lora_a.is_contiguous()
        and lora_b.is_contiguous()
        and x.shape[-1] == weight.shape[1]
        and weight.shape[0] % LANES == 0 == weight.shape[1] % LANES
        and not weight.requires_grad
        and (bias is None or (bias.dtype == torch.float32 and not bias.requires_grad))
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, lists: Lists) -> Tensor:
    """`multi_lora_linear` of x [..., K], where `serves` says so. Returns [..., N], differentiable once in x, lora_a and lora_b.

    lists: of the batch, or of the site where adapters drop.
    """
    return _Linear.apply(x, weight, bias, lora_a, lora_b, lists)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, lora_a, lora_b, lists = args
        y = F.linear(x, weight, bias)
        s = x.new_empty(lists.order.shape[0], lora_a.shape[1])
        _forward(x, lora_a, lora_b, *lists, 1, multi_lora_cpu.VARIANT, y, s)
        ctx.save_for_backward(x, weight, lora_a, lora_b, s)
        ctx.lists = lists
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return _differentiable_once(ctx, dy)
        return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, s = ctx.saved_tensors
    need_x, _, _, need_a, need_b, _ = ctx.needs_input_grad
    dy = dy.contiguous()
    dx = torch.mm(dy.view(-1, dy.shape[-1]), weight).view(x.shape) if need_x else None
    d_a = torch.empty_like(lora_a) if need_a else None
    d_b = torch.empty_like(lora_b) if need_b else None
    _backward(x, lora_a, lora_b, *ctx.lists, 1, multi_lora_cpu.VARIANT, dy, s, torch.empty_like(s), dx, d_a, d_b)
    return dx, None, None, d_a, d_b, None


_differentiable_once = once_differentiable(_gradients)


def _forward(*args: Any) -> None:
    torch.ops.kloss.cpu_lora_.default(*args)


def _backward(*args: Any) -> None:
    torch.ops.kloss.cpu_lora_backward_.default(*args)
