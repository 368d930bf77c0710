"""The Triton backend of `multi_lora.py`: which kernels a forward and a backward pass launch.

    S  = drop(x) A_gᵀ                  shrink   [T, slices*R], fp32          g = adapter of the row
    y  = x Wᵀ + b + s_g S B_gᵀ          expand   [T, N]
    dS = s_g dy B_g                    shrink   [T, slices*R], fp32
    dx = dy W + mask ⊙ (dS A_g)        expand   [T, K]
    dA_g = dSᵀ drop(x)                 reduce   [slices*R, K]               dB_g = s_g dyᵀ S   [N, R]

Row t of x and y is row i of S and dS, where order[i] = t: in `order` an adapter's rows are neighbours. A tile holds rows of one
adapter only, and its height is fixed for each kernel. A reduction walks the adapter's own rows from the first, in fixed steps. So
an adapter's values have the same bits whatever else is in the batch. There are no atomics. S and dS are kept in fp32 and rounded
to x's dtype where they enter a product, as torch rounds them in that dtype. Dropout's scale 1/(1-p) is the same for all rows of a
tile and is applied to fp32 sums.

`expand` computes the base product too (fused: first the LoRA term, masked or scaled in the accumulator, then the base product's
loop on top), or adds to the vendor's product in place. `tuned.fuse` chooses; exact=True forces the fused form, whose base product
has fixed tiles as well.
"""

import torch
from torch import Tensor

from . import tuned
from .lora_tiles import Factor, expand, reduce, shrink
from .lora_torch import Backward, Forward
from .segments import Work


def saved(x: Tensor, SR: int, lists: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Empty tensors that forward fills for backward: S fp32 [T, SR], and with dropout its keys int64 [T], rows in order."""
    rows = lists[0].shape[0]
    return x.new_empty(rows, SR, dtype=torch.float32), x.new_empty(rows if len(lists) > 5 else 0, dtype=torch.int64)


def forward(call: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """y, S and the keys. lists: order, the fields of `Work`, and with dropout p, seed and row_key."""
    x, weight, bias, lora_a, lora_b, scaling, ranks, lists, site, slices, exact = call
    order, work, dropout = lists[0], Work(*lists[1:5]), lists[5:]
    (G, SR, K), R, rows = lora_a.shape, lora_b.shape[2], order.numel()
    s, keys = saved(x, SR, lists)
    a = Factor(lora_a, lora_a.stride(0), 0, lora_a.stride(1), lora_a.stride(2))
    draws = (*dropout, keys) if dropout else ()
    shrink(x, a, s, order, work.tiles_64, ranks, None, *draws, site=site, K=K, C=SR, R=R, blocks=1)
    fused = exact or tuned.fuse(rows, G, K)
    y = _base(x, weight.t(), bias, rows if fused else 0)
    b = Factor(lora_b, lora_b.stride(0), 0, lora_b.stride(1), lora_b.stride(2))
    expand(s, b, x, weight.t(), bias, y, order, work, ranks, scaling, R=R, blocks=slices, slices=slices, fused=fused)
    return y, s, keys


def backward(call: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB, empty where not needed."""
    dy, x, weight, lora_a, lora_b, scaling, s, keys, ranks, lists, slices, exact, need_x, need_a, need_b = call
    order, work, dropout = lists[0], Work(*lists[1:5]), lists[5:]
    (G, N, R), (rows, SR), K = lora_b.shape, s.shape, x.shape[1]
    C = N // slices
    p_and_keys = (dropout[0], keys) if dropout else (None, None)
    dx, d_a, d_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if need_x or need_a:
        ds = torch.empty_like(s)
        b = Factor(lora_b, lora_b.stride(0), C * lora_b.stride(1), lora_b.stride(2), lora_b.stride(1))
        shrink(dy, b, ds, order, work.tiles_64, ranks, scaling, K=C, C=R, R=R, blocks=slices)
    if need_x:
        fused = exact or tuned.fuse(rows, G, N)
        dx = _base(dy, weight, None, rows if fused else 0)
        a = Factor(lora_a, lora_a.stride(0), R * lora_a.stride(1), lora_a.stride(2), lora_a.stride(1))
        expand(ds, a, dy, weight, None, dx, order, work, ranks, None, *p_and_keys, R=R, blocks=1, slices=slices, fused=fused)
    if need_a:
        d_a = reduce(x, ds, lora_a, order, work, ranks, None, *p_and_keys, C=K, SR=SR, R=R, blocks=1, strides=(1, K))
    if need_b:
        d_b = reduce(dy, s, lora_b, order, work, ranks, scaling, C=C, SR=R, R=R, blocks=slices, strides=(R, 1))
    return dx, d_a, d_b


def _base(x: Tensor, w: Tensor, bias: Tensor | None, first: int) -> Tensor:
    """An empty y with y = x w + bias from row `first` on, by the vendor's product."""
    y = x.new_empty(x.shape[0], w.shape[1])
    if first < x.shape[0]:
        rows, out = x[first:], y[first:]
        torch.mm(rows, w, out=out) if bias is None else torch.addmm(bias, rows, w, out=out)
    return y
