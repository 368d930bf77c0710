"""One linear of the model with the batch of a step: its data, the calls that are timed, and the check before any of them is."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kloss.kernels import Dropout, Segments, make_segments, reference
from kloss.kernels.multi_lora import multi_lora_linear

from . import cases

DROPOUT = 0.1


class Problem(NamedTuple):
    """Arguments of `multi_lora_linear` and the gradient of its output, on one device; every adapter has as many rows."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    segments: Segments
    dropout: Dropout
    dy: Tensor
    slices: int

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.x, self.dy, self.weight, self.lora_a, self.lora_b))


def make_problem(
    linear: cases.Linear, batch: cases.Batch, rank: int, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Problem:  # fmt: skip
    """Random data of a linear and a batch, rows sorted by adapter as the packer leaves them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=device, generator=generator) * scale).to(dtype)

    _, k, n, slices = linear
    groups, t = batch.adapters, batch.total
    cu_seqlens = torch.arange(groups + 1, dtype=torch.int32, device=device) * batch.rows
    segments = make_segments(cu_seqlens, torch.arange(groups, dtype=torch.int32, device=device), groups, rows=t)
    ones = torch.ones(groups, device=device)
    dropout = Dropout(ones * DROPOUT, torch.arange(groups, device=device), torch.arange(t, device=device), 3)
    return Problem(
        normal(t, k), normal(n, k, scale=k**-0.5), normal(n), normal(groups, slices * rank, k, scale=k**-0.5),
        normal(groups, n, rank, scale=rank**-0.5), ones, segments, dropout, normal(t, n), slices,
    )  # fmt: skip


def together(one: Problem, *, exact: bool = False) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of the multi-adapter linear: y and the gradients of x, A and B."""
    x, lora_a, lora_b = leaves = [t.detach().requires_grad_() for t in (one.x, one.lora_a, one.lora_b)]

    def call():
        rest = one.scaling, one.segments
        y = multi_lora_linear(x, one.weight, one.bias, lora_a, lora_b, *rest, slices=one.slices, dropout=one.dropout, exact=exact)
        return y, *torch.autograd.grad(y, leaves, one.dy)

    return call


def forward_only(one: Problem) -> Callable[[], Tensor]:
    """Inference: y, without gradients and without dropout."""

    @torch.no_grad()
    def call():
        adapters = one.lora_a, one.lora_b, one.scaling, one.segments
        return multi_lora_linear(one.x, one.weight, one.bias, *adapters, slices=one.slices)

    return call


def base_alone(one: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    """The floor: the frozen base product and its dx, by the vendor."""
    return lambda: (torch.addmm(one.bias, one.x, one.weight.t()), one.dy @ one.weight)


def base_forward(one: Problem) -> Callable[[], Tensor]:
    """The floor of inference: the base product alone, by the vendor."""
    return lambda: torch.addmm(one.bias, one.x, one.weight.t())


def check(linear: cases.Linear, batch: cases.Batch, rank: int, *, device: str, dtype: torch.dtype) -> None:
    """Every timed form of the op at this layer, with a few adapters of the batch's: y and all gradients off from fp64, by the
    norm of each adapter's part, at most twice as far as plain torch is.

    Raises AssertionError before anything of that shape is timed.
    """
    few = cases.Batch(min(4, batch.adapters), min(batch.rows, 1100))
    one = make_problem(linear, few, rank, device=device, dtype=dtype)
    part = make_segments(one.segments.cu_seqlens.cpu(), one.segments.adapter.cpu(), few.adapters)
    masks = Dropout(*(t.cpu() if isinstance(t, Tensor) else t for t in one.dropout))

    def plain(dtype: torch.dtype, dropout: Dropout | None) -> tuple[Tensor, ...]:  # without dropout y alone, as in inference
        x, weight, bias, lora_a, lora_b, dy = (
            t.detach().cpu().to(dtype) for t in (one.x, one.weight, one.bias, one.lora_a, one.lora_b, one.dy)
        )
        leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]
        scaling = one.scaling.cpu()
        y = reference.multi_lora_linear(x, weight, bias, lora_a, lora_b, scaling, part, slices=one.slices, dropout=dropout)
        return (y.detach(),) if dropout is None else (y.detach(), *torch.autograd.grad(y, leaves, dy))

    def compare(form: str, got: tuple[Tensor, ...], torchs: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
        for name, *values in zip(("y", "dx", "dA", "dB"), got, torchs, wanted, strict=False):
            ours, theirs, right = (value.detach().cpu().double().reshape(few.adapters, -1) for value in values)
            size = right.norm(dim=1)
            error, allowed = ((value - right).norm(dim=1) for value in (ours, theirs))
            allowed = 2 * allowed + torch.finfo(dtype).eps * size
            g = int((error / allowed).argmax())  # the first NaN, where there is one
            assert error[g] <= allowed[g], (
                f"{name} at {linear.name}, r={rank}, {form}: adapter {g} is off by {error[g] / size[g]:.1e}, "
                f"allowed {allowed[g] / size[g]:.1e}"
            )

    torchs, wanted = plain(dtype, masks), plain(torch.float64, masks)
    for form, exact in (("chosen", False), ("exact", True)):
        compare(form, together(one, exact=exact)(), torchs, wanted)
    compare("forward only", (forward_only(one)(),), plain(dtype, None), plain(torch.float64, None))
