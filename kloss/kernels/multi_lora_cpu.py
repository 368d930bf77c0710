"""The multi-adapter linear on a CPU: the vendor's base product, and the LoRA terms of all adapters by csrc's kernels.

`reference.multi_lora_linear` takes an adapter at a time, several small products each; here a call serves them all, on every
thread, without masks or intermediate matrices. An adapter's bits depend on its own rows alone.
"""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import reference
from .dropout import Dropout, row_dropout, thresholds
from .segments import Segments

LANES = 32  # K and the outputs of a slice must be multiples of it
VARIANT = 0  # 0: the widest instructions that this processor has, 1: the next; for tests


@cache
def built() -> bool:
    """Whether this kloss was built with its C++ kernels; loads them. Raises OSError where they are there and do not load."""
    found = sorted(Path(__file__).parents[1].glob("_C.*.so"))
    if found:
        torch.ops.load_library(found[0])
    return bool(found)


def fits(x: Tensor, weight: Tensor, slices: int) -> bool:
    """Whether the kernels take this layer: widths in LANES, and a type that this processor has them for."""
    if not built() or x.shape[1] % LANES or weight.shape[0] // slices % LANES:
        return False
    return torch.ops.kloss.cpu_lora_variants(reference.widened(x[:0])) > VARIANT


def _rows(tensor: Tensor) -> Tensor:
    """The tensor [G, m, n], copied if its matrices are not contiguous: a bank's views are not copied."""
    _, m, n = tensor.shape
    return tensor if tensor.stride()[1:] == (n, 1) else tensor.contiguous()


class _MultiLora(Function):
    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling, segments, slices, ranks, dropout, exact):
        dtype, x, weight = x.dtype, reference.widened(x).contiguous(), reference.widened(weight)
        a, b = (_rows(reference.widened(tensor)) for tensor in (lora_a, lora_b))
        y = reference.base_product(x, weight, reference.widened(bias), segments, exact).contiguous()
        keys = least = None
        if dropout is not None:
            rows = row_dropout(dropout.first(segments.order.numel()), segments.row_adapter)
            keys, least = rows.keys, rows.least.contiguous()
            scaling = scaling / (1 - thresholds(dropout.p).float() / 65536)
        s = x.new_empty(segments.order.numel(), slices * b.shape[2])
        how = scaling.contiguous(), segments.order, segments.ends, ranks, keys, least
        torch.ops.kloss.cpu_lora_(x, a, b, *how, slices, VARIANT, y, s)
        ctx.save_for_backward(x, weight, a, b, s, *how)
        ctx.segments, ctx.slices, ctx.exact, ctx.dtypes = segments, slices, exact, (dtype, lora_a.dtype, lora_b.dtype)
        return y.to(dtype)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx, dy):
        x, weight, a, b, s, *how = ctx.saved_tensors
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dtype, a_dtype, b_dtype = ctx.dtypes
        dy = reference.widened(dy).contiguous()
        dx = reference.base_product(dy, weight.t(), None, ctx.segments, ctx.exact).contiguous() if need_x else None
        da, db = (x.new_empty(of.shape) if need else None for of, need in ((a, need_a), (b, need_b)))
        if need_x or need_a or need_b:
            torch.ops.kloss.cpu_lora_backward_(x, a, b, *how, ctx.slices, VARIANT, dy, s, torch.empty_like(s), dx, da, db)
        return (
            dx.to(dtype) if need_x else None,
            (dy.t() @ x).to(dtype) if need_w else None,
            dy.sum(0).to(dtype) if need_bias else None,
            da.to(a_dtype) if need_a else None,
            db.to(b_dtype) if need_b else None,
            *(None,) * 6,
        )


def multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: Tensor, segments: Segments,
    *, slices: int = 1, ranks: Tensor | None = None, dropout: Dropout | None = None, exact: bool = False,
) -> Tensor:  # fmt: skip
    """`reference.multi_lora_linear` for a layer that `fits`; S and dS are rounded to x's dtype, sums are fp32."""
    reference.check_lora_shapes(x, weight, bias, lora_a, lora_b, scaling, segments, slices)
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    how = scaling, segments, slices, ranks, dropout, exact
    return reference.without_autocast(_MultiLora, x, weight, bias, lora_a, lora_b, *how)
