"""The feed-forward part of a layer: two multi-adapter linears with GELU between them, on a GPU as one autograd function.

There the kernel that computes S of `down` computes gelu(u), too, of what it reads of u, and the one that computes dS of `up` the
gradient at u: GELU has no launch and no reading of its own. In 16 bits it is the fit of `gelu_device.normal`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .dropout import Dropout
from .eager import gelu
from .lora_torch import Backward, Forward
from .multi_lora import (
    check_linear,
    handed_over,
    hopper_serves,
    kernel_lists,
    module_of,
    multi_lora_linear,
    without_autocast,
    written_directly,
)
from .segments import Segments
from .triton_ops import serves

LEAST = 132 * 64  # rows: with fewer the programs that compute S are too few to compute GELU besides
NOWHERE = None, None  # `into` where autograd gets both gradients


class LoraLinear(NamedTuple):
    """One of the two: arguments of `multi_lora_linear`, by name."""

    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    dropout: Dropout | None = None
    into: tuple[Tensor, Tensor] | None = None


class Shared(NamedTuple):
    """What both have: arguments of `multi_lora_linear`, by name."""

    scaling: Tensor
    segments: Segments
    ranks: Tensor | None
    exact: bool


def multi_lora_feed_forward(
    x: Tensor,
    up: LoraLinear,
    down: LoraLinear,
    scaling: Tensor,
    segments: Segments,
    *,
    ranks: Tensor | None = None,
    exact: bool = False,
) -> Tensor:
    """down(gelu(up(x))), both as `multi_lora_linear` has them.

    x: [T, H].
    Returns [T, rows of down.weight] in x's dtype.
    Raises ValueError for tensors that do not fit each other.
    """
    if _as_one(x, exact, up, down):
        ranks = None if ranks is None else ranks.long().contiguous()
        shared = Shared(scaling.contiguous(), segments, ranks, exact)
        return _FeedForward.apply(x, up.lora_a, up.lora_b, down.lora_a, down.lora_b, up, down, shared)

    def linear(x: Tensor, layer: LoraLinear) -> Tensor:
        weights, (dropout, into) = layer[:4], layer[4:]
        return multi_lora_linear(x, *weights, scaling, segments, ranks=ranks, dropout=dropout, exact=exact, into=into)

    return linear(gelu(linear(x, up)), down)


def _as_one(x: Tensor, exact: bool, *layers: LoraLinear) -> bool:
    """Whether the kernels compute the two as one: eagerly, with frozen weights, and many rows.

    exact: as one whatever the number of rows, on which GELU's last bits would depend.
    """
    many = exact or len(x) >= LEAST
    if not serves(x) or not many or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    frozen = (tensor is None or not tensor.requires_grad for layer in layers for tensor in layer[:2])
    return not torch.is_grad_enabled() or all(frozen)


class _FeedForward(Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up_a: Tensor, up_b: Tensor, down_a: Tensor, down_b: Tensor, up: LoraLinear, down: LoraLinear,
        shared: Shared,
    ) -> Tensor:  # fmt: skip
        with torch._C._AutoDispatchBelowAutograd():
            arguments, of_up = _arguments(x, up, shared)
            u, *saved_up = torch.ops.kloss.multi_lora(*arguments, None, None, of_up)
            arguments, of_down = _arguments(u, down, shared)
            y, *saved_down, activated = torch.ops.kloss.multi_lora_of_gelu(*arguments, of_down)
        ctx.save_for_backward(x, u, activated, up_a, up_b, down_a, down_b, *saved_up, *saved_down)
        ctx.layers, ctx.shared, ctx.backends = (up, down), shared, (of_up, of_down)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, u, activated, *saved = ctx.saved_tensors
        factors, saved, need = saved[:4], saved[4:], ctx.needs_input_grad
        (up, down), shared, (of_up, of_down) = ctx.layers, ctx.shared, ctx.backends
        up, down = up._replace(lora_a=factors[0], lora_b=factors[1]), down._replace(lora_a=factors[2], lora_b=factors[3])
        arguments, places = _backward_arguments(dy, activated, down, shared, saved[2:], (True, *need[3:5]))
        du, *of_factors = torch.ops.kloss.multi_lora_backward(*arguments, of_down)
        gradients = handed_over(of_factors, down.into or NOWHERE, places, need[3:5])
        arguments, places = _backward_arguments(du, x, up, shared, saved[:2], need[:3])
        dx, *of_factors = torch.ops.kloss.multi_lora_backward_of_gelu(*arguments, u, of_up)
        of_factors = handed_over(of_factors, up.into or NOWHERE, places, need[1:3])
        return dx if need[0] else None, *of_factors, *gradients, None, None, None


def _arguments(x: Tensor, layer: LoraLinear, shared: Shared) -> tuple[tuple, str]:
    """Those of the operators up to `exact`, checked, and the backend."""
    weight, bias, lora_a, lora_b, dropout, into = layer
    scaling, segments, ranks, exact = shared
    check_linear(x, weight, bias, lora_a, lora_b, scaling, segments, 1, ranks, dropout, into)
    hopper = not exact and hopper_serves(x, weight, lora_a, lora_b, segments, ranks, False)
    lists, site = kernel_lists(segments, dropout), 0 if dropout is None else dropout.site
    return (x, weight, bias, lora_a, lora_b, scaling, ranks, lists, site, 1, exact), "hopper" if hopper else "triton"


def _backward_arguments(
    dy: Tensor, x: Tensor, layer: LoraLinear, shared: Shared, saved: Sequence[Tensor], need: Sequence[bool]
) -> tuple[tuple, list[Tensor | None]]:
    """Those of the operators up to `into_b`, and where the factors' gradients are written directly."""
    weight, _, lora_a, lora_b, dropout, into = layer
    direct = [written_directly(*pair) for pair in zip(into or NOWHERE, (lora_a, lora_b), strict=True)]
    lists = kernel_lists(shared.segments, dropout)
    tensors = dy, x, weight, lora_a, lora_b, shared.scaling, *saved, shared.ranks, lists
    return (*tensors, 1, shared.exact, *need, *direct), direct


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    call = Forward(x, *rest[:-1])._replace(activated=(activated := torch.empty_like(x)))
    return *without_autocast(x.device.type, module_of(rest[-1]).forward, call), activated


def _backward(dy: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return without_autocast(dy.device.type, module_of(rest[-1]).backward, Backward(dy, *rest[:-1]))


# As `multi_lora`, of gelu(x), which is the last of its results; and its gradients, with `dy` at gelu(before).
_library = torch.library.Library("kloss", "FRAGMENT")
_library.define(
    "multi_lora_of_gelu(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor? ranks, "
    "Tensor[] lists, int site, int slices, bool exact, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)
_library.define(
    "multi_lora_backward_of_gelu(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor s, "
    "Tensor keys, Tensor? ranks, Tensor[] lists, int slices, bool exact, bool need_x, bool need_a, bool need_b, "
    "Tensor(a!)? into_a, Tensor(b!)? into_b, Tensor before, str backend) -> (Tensor, Tensor, Tensor)"
)
for _device in ("CUDA", "CPU"):
    _library.impl("multi_lora_of_gelu", _forward, _device)
    _library.impl("multi_lora_backward_of_gelu", _backward, _device)
