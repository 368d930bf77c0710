"""The csrc backend of `multi_lora.py`: the vendor's base product, and the LoRA terms of all adapters by csrc's kernels.

One call serves all adapters on every thread, without masks or intermediate matrices. An adapter's bits depend on its own rows
alone. S and dS are rounded to x's dtype, sums are fp32.
"""

import torch
from torch import Tensor

from .checks import FLOATS
from .cpu_library import built
from .eager import widened
from .lora_torch import Backward, Forward, base_product

LANES = 32  # K and the outputs of a slice must be multiples of it
VARIANT = 0  # 0: the widest instructions that this processor has, 1: the next; for tests


# How many instruction sets of this processor have kernels for a dtype, after widening; `torch.compile` can read it, not look.
_variants: dict[torch.dtype, int] = {}


def look() -> None:
    """Find out which dtypes have kernels, before `torch.compile` asks."""
    for dtype in FLOATS:
        if dtype not in _variants:
            _variants[dtype] = torch.ops.kloss.cpu_lora_variants(widened(torch.empty(0, dtype=dtype))) if built() else 0


def fits(x: Tensor, weight: Tensor, slices: int) -> bool:
    """Whether the kernels can compute this layer: widths in LANES, and a dtype that this processor has them for."""
    if x.shape[1] % LANES or weight.shape[0] // slices % LANES:
        return False
    if not (torch.compiler.is_compiling() and _variants):
        if not built():
            return False
        look()
    return _variants[x.dtype] > VARIANT


def saved(x: Tensor, SR: int, lists: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Empty tensors that forward fills for backward: S [T, SR], and nothing for dropout, whose keys are in `lists`."""
    return x.new_empty(lists[0].shape[0], SR), x.new_empty(0, dtype=torch.int64)


def forward(call: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """y, S and nothing.

    scaling: with dropout's 1/(1-p).
    lists: order, ends, and with dropout each row's key and threshold.
    """
    assert built()
    x, weight, bias, lora_a, lora_b, scaling, ranks, lists, _, slices, exact, _ = call
    x = x.contiguous()
    y = base_product(x, weight, bias, lists[0], lists[1], exact).contiguous()
    s, nothing = saved(x, lora_a.shape[1], lists)
    torch.ops.kloss.cpu_lora_(*_common(x, lora_a, lora_b, scaling, ranks, lists), slices, VARIANT, y, s)
    return y, s, nothing


def backward(call: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB, empty where not needed."""
    dy, x, weight, lora_a, lora_b, scaling, s, _, ranks, lists, slices, exact, need_x, need_a, need_b, *_ = call
    dy = dy.contiguous()
    dx = base_product(dy, weight.t(), None, lists[0], lists[1], exact).contiguous() if need_x else x.new_empty(0)
    d_a, d_b = call.outputs()
    common = _common(x.contiguous(), lora_a, lora_b, scaling, ranks, lists)
    outputs = (gradient if need else None for gradient, need in ((dx, need_x), (d_a, need_a), (d_b, need_b)))
    torch.ops.kloss.cpu_lora_backward_(*common, slices, VARIANT, dy, s, torch.empty_like(s), *outputs)
    return dx, *call.returned(d_a, d_b)


def _common(
    x: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: Tensor, ranks: Tensor | None, lists: list[Tensor]
) -> tuple[Tensor | None, ...]:
    """What both operators of csrc take first; a bank's views of A and B are not copied."""
    a, b = (f if f.stride()[1:] == (f.shape[2], 1) else f.contiguous() for f in (lora_a, lora_b))
    order, ends, *dropout = lists
    return x, a, b, scaling.contiguous(), order, ends, ranks, *(dropout or (None, None))
