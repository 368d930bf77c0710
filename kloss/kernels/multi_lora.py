"""Linear layer with the LoRA update of each row's own adapter, in Triton.

    S  = drop(x) A_gᵀ                  shrink   [T, slices*R], fp32          g = adapter of the row
    y  = x Wᵀ + b + s_g S B_gᵀ          expand   [T, N]
    dS = s_g dy B_g                    shrink   [T, slices*R], fp32
    dx = dy W + mask ⊙ (dS A_g)        expand   [T, K]
    dA_g = dSᵀ drop(x)                 reduce   [slices*R, K]               dB_g = s_g dyᵀ S   [N, R]

Row t of x, y is row i of S and dS, where order[i] = t: there an adapter's rows are neighbours. A tile holds
rows of one adapter only, its height is fixed per kernel, and a reduction walks the adapter's own rows from
the first in fixed steps; so an adapter's values have the same bits whatever else is in the batch. No atomics.
S and dS are kept in fp32 and rounded to x's dtype where they enter a product, as torch rounds them in that
dtype. Dropout's scale 1/(1-p) is the same for all rows of a tile and is applied to fp32 sums.

`expand` computes the base product too (fused: the LoRA term first, masked or scaled in the accumulator, then
the base product's loop on top) or adds to the vendor's product in place; `tuned.fuse` chooses, `exact=True`
forces the fused form, whose base product has fixed tiles as well.
"""

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import reference, tuned
from .dropout import Dropout
from .lora_tiles import base, expand, reduce, shrink
from .segments import Segments, with_work

_LISTS = "Tensor order, Tensor short, Tensor long, Tensor chunks, Tensor slots, Tensor? ranks"
_SCHEMA = (
    f"Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scaling, {_LISTS}, Tensor? p, "
    "Tensor? seed, Tensor? row_key, int site, int slices, bool exact"
)
_BACKWARD_SCHEMA = (
    "Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor s, Tensor keys, "
    f"{_LISTS}, Tensor? p, int slices, bool exact, bool need_x, bool need_a, bool need_b"
)


def _forward(x, weight, bias, lora_a, lora_b, scaling, order, short, long, chunks, slots, ranks, p, seed, row_key, site,
             slices, exact):  # fmt: skip
    R, rows = lora_b.shape[2], order.numel()
    s = torch.empty(rows, slices * R, dtype=torch.float32, device=x.device)
    keys = torch.empty(0 if p is None else rows, dtype=torch.int64, device=x.device)
    shrink(
        x, lora_a, s, order, short, ranks, None, None if p is None else (p, seed, row_key, keys, site),
        K=x.shape[1], C=slices * R, R=R, groups=1, strides_w=(lora_a.stride(0), 0, lora_a.stride(1), lora_a.stride(2)),
    )  # fmt: skip
    fused = exact or tuned.fuse(rows, lora_a.shape[0], x.shape[1])
    y, behind = x.new_empty(x.shape[0], weight.shape[0]), rows if fused else 0
    base(x[behind:], weight.t(), bias, y[behind:])
    expand(
        s, lora_b, x, weight.t(), bias, y, order, short, long, ranks, scaling, None, None, R=R, groups=slices,
        slices=slices, strides_q=(lora_b.stride(0), lora_b.stride(1), 0, lora_b.stride(2)), fused=fused,
    )  # fmt: skip
    return y, s, keys


def _backward(dy, x, weight, lora_a, lora_b, scaling, s, keys, order, short, long, chunks, slots, ranks, p, slices,
              exact, need_x, need_a, need_b):  # fmt: skip
    (n, R), rows = lora_b.shape[1:], order.numel()
    columns, width = n // slices, x.shape[1]
    dx, d_a, d_b = x.new_empty(0), lora_a.new_empty(0), lora_b.new_empty(0)
    if need_x or need_a:
        ds = torch.empty_like(s)
        shrink(
            dy, lora_b, ds, order, short, ranks, scaling, None, K=columns, C=R, R=R, groups=slices,
            strides_w=(lora_b.stride(0), columns * lora_b.stride(1), lora_b.stride(2), lora_b.stride(1)),
        )  # fmt: skip
    if need_x:
        fused = exact or tuned.fuse(rows, lora_a.shape[0], n)
        dx, behind = x.new_empty(x.shape), rows if fused else 0
        base(dy[behind:], weight, None, dx[behind:])
        expand(
            ds, lora_a, dy, weight, None, dx, order, short, long, ranks, None, p, keys, R=R, groups=1, slices=slices,
            strides_q=(lora_a.stride(0), lora_a.stride(2), R * lora_a.stride(1), lora_a.stride(1)), fused=fused,
        )  # fmt: skip
    if need_a:
        d_a = reduce(x, ds, lora_a, order, chunks, slots, ranks, None, p, keys,
                      C=width, A=slices * R, R=R, groups=1, strides_out=(1, width))  # fmt: skip
    if need_b:
        d_b = reduce(dy, s, lora_b, order, chunks, slots, ranks, scaling, None, None,
                      C=columns, A=R, R=R, groups=slices, strides_out=(R, 1))  # fmt: skip
    return dx, d_a, d_b


def _fake_forward(x, weight, bias, lora_a, lora_b, scaling, order, short, long, chunks, slots, ranks, p, seed, row_key,
                  site, slices, exact):  # fmt: skip
    rows = order.shape[0]
    s = x.new_empty(rows, slices * lora_b.shape[2], dtype=torch.float32)
    return x.new_empty(x.shape[0], weight.shape[0]), s, x.new_empty(0 if p is None else rows, dtype=torch.int64)


def _fake_backward(dy, x, weight, lora_a, lora_b, scaling, s, keys, order, short, long, chunks, slots, ranks, p, slices,
                   exact, need_x, need_a, need_b):  # fmt: skip
    wanted = (x, need_x), (lora_a, need_a), (lora_b, need_b)
    return tuple(tensor.new_empty(tensor.shape if need else 0) for tensor, need in wanted)


class _MultiLora(Function):
    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            y, s, keys = torch.ops.kloss.multi_lora(*args)
        x, weight, bias, lora_a, lora_b, scaling, *lists, p, _, _, _, slices, exact = args
        ctx.save_for_backward(x, weight, lora_a, lora_b, scaling, s, keys, *lists, p)
        ctx.slices, ctx.exact, ctx.has_bias = slices, exact, bias is not None
        ctx.mark_non_differentiable(s, keys)
        ctx.set_materialize_grads(False)
        return y, s, keys

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, _ds, _dkeys):
        if dy is None:
            return (None,) * 18
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dx = d_a = d_b = None
        if need_x or need_a or need_b:
            dx, d_a, d_b = torch.ops.kloss.multi_lora_backward(
                dy, *ctx.saved_tensors, ctx.slices, ctx.exact, need_x, need_a, need_b
            )
        dw = dy.t() @ ctx.saved_tensors[0] if need_w else None
        db = dy.sum(0) if need_bias and ctx.has_bias else None
        grads = dx if need_x else None, dw, db, d_a if need_a else None, d_b if need_b else None
        return *grads, *(None,) * 13


_library = torch.library.Library("kloss", "FRAGMENT")
_library.define(f"multi_lora({_SCHEMA}) -> (Tensor, Tensor, Tensor)")
_library.define(f"multi_lora_backward({_BACKWARD_SCHEMA}) -> (Tensor, Tensor, Tensor)")
for _device in ("CUDA", "CPU"):
    _library.impl("multi_lora", _forward, _device)
    _library.impl("multi_lora_backward", _backward, _device)
_library.impl("multi_lora", _MultiLora.apply, "Autograd")
torch.library.register_fake("kloss::multi_lora", _fake_forward, lib=_library)
torch.library.register_fake("kloss::multi_lora_backward", _fake_backward, lib=_library)


def multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: Tensor, segments: Segments,
    *, slices: int = 1, ranks: Tensor | None = None, dropout: Dropout | None = None, exact: bool = False,
) -> Tensor:  # fmt: skip
    """Linear layer with the LoRA update of each row's own adapter: y[t] = W x[t] + b + s_g B_g (A_g
    drop(x[t])).

    x: [T, K] fp32, fp16 or bf16. weight: [N, K] and bias: [N] or None in x's dtype. lora_a: [G, slices*R, K]
    and lora_b: [G, N, R] in any of these dtypes, rounded to x's where they are used. scaling: fp32 [G].
    slices: the N rows are that many equal blocks, block i uses rows i*R..(i+1)*R of A (fused q, k, v). ranks:
    int [G] or None, adapters that use only the first ranks[g] of R; their tails are skipped and get zero
    gradients. dropout: of x on the LoRA path only. Rows behind segments.cu_seqlens[-1] get the base model's
    value. exact: the base product has fixed tiles too, so a row's bits do not depend on the batch. Returns
    [T, N], differentiable in x, weight, bias, lora_a, lora_b. Raises ValueError for shapes or dtypes that do
    not fit. Source: Hu et al. 2021, arXiv 2106.09685, equation 3, for many adapters at once.
    """
    reference.check_lora_shapes(x, weight, bias, lora_a, lora_b, scaling, segments, slices)
    x, weight, bias = reference.lower(x, weight, bias)
    if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        given = f"x {x.dtype}, weight {weight.dtype}, bias {bias if bias is None else bias.dtype}"
        raise ValueError(f"expected one dtype for the base layer, got {given}")
    p, seed, row_key, site = dropout[:4] if dropout else (None, None, None, 0)
    if row_key is not None and row_key.numel() < segments.order.numel():
        raise ValueError(f"row_key has {row_key.numel()} entries, the segments cover {segments.order.numel()} rows")
    work = with_work(segments).work
    return torch.ops.kloss.multi_lora(
        x, weight, bias, lora_a, lora_b, scaling, segments.order, work.short, work.long, work.chunks, work.slots,
        ranks, p, seed, row_key, site, slices, exact,
    )[0]  # fmt: skip
