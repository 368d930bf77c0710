"""The csrc backend of `multi_lora.py` for eager layers: one autograd function, with no operator around it.

An operator costs a layer that has few rows more than its products do. Results are those of `multi_lora_linear`, to the bit.
"""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from . import multi_lora_cpu
from .dropout import Dropout, kept_scaling, row_dropout
from .multi_lora_cpu import LANES
from .segments import Segments

PLAIN = Tensor, Parameter


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


def serves(x: Tensor, weight: Any, lora_a: Any, lora_b: Any) -> bool:
    """Whether `linear` may compute a layer: plain contiguous tensors of fp32, and nobody watches operators."""
    return (
        type(x) in PLAIN
        and x.dtype is torch.float32
        and x.is_contiguous()
        and type(weight) in PLAIN
        and type(lora_a) in PLAIN
        and type(lora_b) in PLAIN
        and weight.dtype is lora_a.dtype is lora_b.dtype is torch.float32
        and lora_a.is_contiguous()
        and lora_b.is_contiguous()
        and x.dim() > 1
        and x.shape[-1] == lora_a.shape[2]
        and lora_a.shape[2] % LANES == 0 == lora_b.shape[1] % LANES
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    lists: Lists,
    *,
    slices: int = 1,
    transposed: bool = False,
) -> Tensor:
    """`multi_lora_linear` of x [..., K], where `serves` says so. Returns [..., N], differentiable once.

    lists: of the batch, or of the site where adapters drop.
    transposed: whether the weight is [K, N].
    """
    return _Linear.apply(x, weight, bias, lora_a, lora_b, lists, slices, transposed)


@cache
def _op(name: str) -> Any:
    """An operator of csrc, found once: to look it up takes as long as to call it."""
    return getattr(torch.ops.kloss, name).default


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, weight, bias, lora_a, lora_b, lists, slices, transposed = args
        rows, w = x.view(-1, x.shape[-1]), weight if transposed else weight.t()
        y = x.new_empty(*x.shape[:-1], w.shape[1])  # no view, as F.linear's may be, so that it can be written to
        out = y.view(-1, w.shape[1])
        if bias is None:
            torch.mm(rows, w, out=out)
        else:
            torch.addmm(bias, rows, w, out=out)
        s = x.new_empty(lists.order.shape[0], lora_a.shape[1])
        _op("cpu_lora_")(x, lora_a, lora_b, *lists, slices, multi_lora_cpu.VARIANT, y, s)
        ctx.save_for_backward(x, weight, lora_a, lora_b, s)
        ctx.lists, ctx.slices, ctx.transposed = lists, slices, transposed
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return _differentiable_once(ctx, dy)
        return _gradients(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, lora_a, lora_b, s = ctx.saved_tensors
    need_x, need_w, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
    dy = dy.contiguous()
    rows = dy.view(-1, dy.shape[-1])
    dx = torch.mm(rows, weight.t() if ctx.transposed else weight).view(x.shape) if need_x else None
    d_a = torch.empty_like(lora_a) if need_a else None
    d_b = torch.empty_like(lora_b) if need_b else None
    _op("cpu_lora_backward_")(
        x, lora_a, lora_b, *ctx.lists, ctx.slices, multi_lora_cpu.VARIANT, dy, s, torch.empty_like(s), dx, d_a, d_b
    )
    dw = torch.mm(rows.t(), x.view(-1, x.shape[-1])) if need_w else None
    dw = dw.t() if dw is not None and ctx.transposed else dw
    return dx, dw, rows.sum(0) if need_bias else None, d_a, d_b, None, None, None


_differentiable_once = once_differentiable(_gradients)
