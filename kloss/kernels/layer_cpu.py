"""An encoder layer with adapters on its four linears as one autograd function, over csrc on a CPU.

It calls what the ops one by one call, in the same order, and has their bits. For a lone learner the checks, dispatch and autograd
of a layer's eight ops take the host as long as the arithmetic; here they are done once a layer.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import attention_cpu, multi_lora, multi_lora_cpu, rows_cpu, triton_ops
from .dropout import StepDropout, kept_scaling
from .lora_torch import base_product
from .segments import Segments

SLICES = (3, 1, 1, 1)  # of the linears qkv, out, up, down
SITES = 7  # of dropout: qkv, attention, out, after attention, up, down, after feed-forward
LORA_SITES, NORM_SITES = (0, 2, 4, 5), (3, 6)


class LayerWeights(NamedTuple):
    """A frozen layer: weight and bias of qkv, out, up and down, of the norms behind out and down; heads; the norms' eps."""

    linears: tuple[tuple[Tensor, Tensor], ...]
    norms: tuple[tuple[Tensor, Tensor], ...]
    heads: int
    eps: float


class LayerAdapters(NamedTuple):
    """lora_a and lora_b of each linear in turn; scaling, ranks and exact as in `multi_lora_linear`.

    into: where backward writes the factors' gradients; None: autograd gets them.
    """

    factors: tuple[Tensor, ...]
    scaling: Tensor
    ranks: Tensor | None
    exact: bool
    into: tuple[Tensor, ...] | None


def serves(
    x: Tensor, layer: LayerWeights, adapters: LayerAdapters, cu_seqlens: Tensor, segments: Segments, dropout: StepDropout | None
) -> bool:
    """Whether this is such a layer: frozen, on a CPU, of widths and a dtype that csrc has, and all fits the rows of x [T, H].

    What does not fit goes to the ops one by one, which serve it or say why they cannot.
    """
    factors, scaling, ranks, _, into = adapters
    rows, G, R = x.shape[0], segments.num_adapters, factors[1].shape[2]
    weights = [tensor for pair in (*layer.linears, *layer.norms) for tensor in pair]
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    if triton_ops.serves(x) or not rows_cpu.serves(x, *weights, *factors):
        return False
    if any(weight.requires_grad for weight in weights) or attention_cpu.dtype_for(x) != x.dtype:
        return False
    if x.shape[1] % (layer.heads * attention_cpu.LANES):
        return False
    for i, (weight, _) in enumerate(layer.linears):
        a, b, (N, K) = factors[2 * i], factors[2 * i + 1], weight.shape
        if multi_lora._fastest(weight, weight, SLICES[i]) != "csrc" or a.shape != (G, SLICES[i] * R, K) or b.shape != (G, N, R):
            return False
        if a.stride()[1:] != (K, 1) or b.stride()[1:] != (R, 1):
            return False
    for one, factor in zip(into or (), factors, strict=False):
        if (one.shape, one.dtype, one.stride()[1:]) != (factor.shape, factor.dtype, factor.stride()[1:]):
            return False
    numbers = [scaling, *(() if ranks is None else (ranks,))]
    if dropout is not None:
        numbers += {id(p): p for p in dropout.p.values() if p is not None}.values()
        if dropout.row_key.numel() != rows:
            return False
    fits = segments.order.numel() == rows and cu_seqlens is segments.cu_seqlens
    return fits and all(number.shape == (G,) for number in numbers)


def _sites(dropout: StepDropout | None, kind: str, sites: tuple[int, ...]) -> list[list[Tensor | None]]:
    """What a kernel reads of some sites: key, threshold and scale of the rows; None each without dropout."""
    at = [None if dropout is None else dropout.at(kind, site) for site in sites]
    return [[None] * 3 if site is None or site.rows is None else list(site.rows) for site in at]


def encoder_layer(
    x: Tensor,
    layer: LayerWeights,
    adapters: LayerAdapters,
    cu_seqlens: Tensor,
    segments: Segments,
    dropout: StepDropout | None,
    index: int,
) -> Tensor:
    """The layer's output [T, H] for x [T, H]; differentiable once in x and the factors. index: the layer's number."""
    first = SITES * index
    lora = _sites(dropout, "lora", tuple(first + site for site in LORA_SITES))
    hidden = _sites(dropout, "hidden", tuple(first + site for site in NORM_SITES))
    (attention,) = _sites(dropout, "attention", (first + 1,))
    scaling = adapters.scaling.contiguous()
    if dropout is not None and dropout.p["lora"] is not None:
        scaling = kept_scaling(scaling, dropout.p["lora"])
    ranks = None if adapters.ranks is None else adapters.ranks.long().contiguous()
    order = segments.order, segments.ends
    rest = order, lora, attention, hidden, adapters.into, torch.is_grad_enabled()
    call = _Call(layer, scaling, ranks, adapters.exact, cu_seqlens, *rest)
    return _Layer.apply(x.contiguous(), call, *adapters.factors)


class _Call(NamedTuple):
    """All of a call that has no gradient.

    order: `order` and `ends` of the segments.
    lora, attention, hidden: `_sites` of the linears, of attention, of the norms.
    into: of `LayerAdapters`.
    grad: whether backward may follow.
    """

    layer: LayerWeights
    scaling: Tensor
    ranks: Tensor | None
    exact: bool
    cu_seqlens: Tensor
    order: tuple[Tensor, Tensor]
    lora: list[list[Tensor | None]]
    attention: list[Tensor | None]
    hidden: list[list[Tensor | None]]
    into: tuple[Tensor, ...] | None
    grad: bool

    def _terms(self, i: int) -> tuple[Any, ...]:
        """What both operators of the LoRA terms take behind x, A and B."""
        return self.scaling, *self.order, self.ranks, *self.lora[i][:2], SLICES[i], multi_lora_cpu.VARIANT

    def linear(self, i: int, x: Tensor, factors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Output and S of a linear."""
        (weight, bias), a, b = self.layer.linears[i], factors[2 * i], factors[2 * i + 1]
        y, s = base_product(x, weight, bias, *self.order, self.exact), x.new_empty(x.shape[0], a.shape[1])
        torch.ops.kloss.cpu_lora_(x, a, b, *self._terms(i), y, s)
        return y, s

    def linear_backward(
        self, i: int, dy: Tensor, x: Tensor, s: Tensor, factors: tuple[Tensor, ...], needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of a linear: dx, dA, dB, None where not needed. needs: of x and of all factors."""
        weight, a, b = self.layer.linears[i][0], factors[2 * i], factors[2 * i + 1]
        dx = base_product(dy, weight.t(), None, *self.order, self.exact) if needs[0] else None
        into = (None, None) if self.into is None else self.into[2 * i : 2 * i + 2]
        d_a, d_b = (
            None if not need else x.new_empty(factor.shape) if given is None else given
            for need, factor, given in zip(needs[1 + 2 * i : 3 + 2 * i], (a, b), into, strict=True)
        )
        if not (dx is d_a is d_b is None):
            torch.ops.kloss.cpu_lora_backward_(x, a, b, *self._terms(i), dy, s, torch.empty_like(s), dx, d_a, d_b)
        return (dx, d_a, d_b) if self.into is None else (dx, None, None)

    def norm(self, i: int, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        """LayerNorm(drop(x) + residual): y, mean, rstd, and what backward needs of x."""
        (weight, bias), keys = self.layer.norms[i], self.hidden[i]
        if keys[0] is None and self.grad:  # as `add_norm` chooses: without dropout torch's backward is as fast
            x = x + residual
            return *torch.native_layer_norm(x, x.shape[1:], weight, bias, self.layer.eps), x
        return *torch.ops.kloss.cpu_add_norm(x, residual, weight, bias, self.layer.eps, *keys, rows_cpu.VARIANT), x

    def norm_backward(self, i: int, dy: Tensor, x: Tensor, residual: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and residual."""
        (weight, bias), keys = self.layer.norms[i], self.hidden[i]
        if keys[0] is None:
            needs = [True, False, False]
            dx = torch.ops.aten.native_layer_norm_backward(dy, x, x.shape[1:], mean, rstd, weight, bias, needs)[0]
            return dx, dx
        saved = x, residual, weight, mean, rstd, *keys
        return torch.ops.kloss.cpu_add_norm_backward(dy.contiguous(), *saved, True, True, False, rows_cpu.VARIANT)[:2]


class _Layer(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *factors: Tensor) -> Tensor:
        layer, variant = call.layer, attention_cpu.VARIANT
        qkv, s_0 = call.linear(0, x, factors)
        attended = torch.ops.kloss.cpu_attention(qkv, call.cu_seqlens, layer.heads, *call.attention, variant)
        out, s_1 = call.linear(1, attended, factors)
        y, *statistics, out = call.norm(0, out, x)
        up, s_2 = call.linear(2, y, factors)
        activated = F.gelu(up)
        down, s_3 = call.linear(3, activated, factors)
        z, *more, down = call.norm(1, down, y)
        ctx.save_for_backward(x, qkv, s_0, attended, out, s_1, *statistics, y, up, s_2, activated, down, s_3, *more, *factors)
        ctx.call = call
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor | None, ...]:
        call, layer = ctx.call, ctx.call.layer
        x, qkv, s_0, attended, out, s_1, *statistics, y, up, s_2, activated, down, s_3, mean, rstd = ctx.saved_tensors[:-8]
        factors, needs = ctx.saved_tensors[-8:], (True, *ctx.needs_input_grad[2:])
        d_down, dy = call.norm_backward(1, dz, down, y, mean, rstd)
        d_activated, *factors_3 = call.linear_backward(3, d_down, activated, s_3, factors, needs)
        d_up = torch.ops.aten.gelu_backward(d_activated, up)
        dy_2, *factors_2 = call.linear_backward(2, d_up, y, s_2, factors, needs)
        d_out, dx = call.norm_backward(0, dy + dy_2, out, x, *statistics)
        d_attended, *factors_1 = call.linear_backward(1, d_out, attended, s_1, factors, needs)
        keys = layer.heads, *call.attention, attention_cpu.VARIANT
        d_qkv = torch.ops.kloss.cpu_attention_backward(d_attended, qkv, call.cu_seqlens, *keys)
        need_x = ctx.needs_input_grad[0]
        dx_2, *factors_0 = call.linear_backward(0, d_qkv, x, s_0, factors, (need_x, *needs[1:]))
        return dx + dx_2 if need_x else None, None, *factors_0, *factors_1, *factors_2, *factors_3
