"""Every op in plain torch: the specification, the oracle of the tests, and the CPU path where csrc has no kernel.

Sizes: T packed rows, S sequences, G adapters, K inputs, N outputs, R rank of the bank, H width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.amp import custom_bwd, custom_fwd
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.optim.adamw import adamw

from .buckets import Buckets, make_buckets
from .dropout import Dropout, apply_dropout, keep_mask, row_dropout, thresholds
from .segments import Segments, make_segments

__all__ = [
    "adapter_adamw_", "adapter_linear", "add_norm", "gelu", "lora_linear", "make_segments", "multi_lora_linear",
    "packed_attention", "span_counts", "token_loss",
]  # fmt: skip


def widened(tensor: Tensor | None) -> Tensor | None:
    """On a CPU the tensor in at least fp32, but for bf16 with AVX-512: without it products in bf16 have 1/7 to 1/100 of fp32's
    rate."""
    if tensor is None or tensor.device.type != "cpu":
        return tensor
    if tensor.dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def lower(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The base layer's tensors, in autocast's dtype where autocast is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def without_autocast(function: type[Function], *arguments) -> Tensor:
    """function.apply with autocast off, in its forward and in its backward: it has chosen its dtypes itself."""
    if not torch.is_autocast_enabled("cpu"):
        return function.apply(*arguments)
    with torch.autocast("cpu", enabled=False):
        return function.apply(*arguments)


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor at a 64-byte address: BLAS may sum in another order elsewhere, and a row's bits must not follow its place."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


def _by_slice(x: Tensor, slices: int) -> Tensor:
    """Columns [n, slices*C] as [slices, n, C], a view."""
    return x.unflatten(1, (slices, -1)).transpose(0, 1)


def _products(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b for [slices, n, k] and [slices, k, m], side by side: [n, slices*m]."""
    out = torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scale)
    return out.transpose(0, 1).flatten(1)


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None, segments: Segments, exact: bool) -> Tensor:
    """x Wᵀ + b [T, N]. exact: each adapter's rows on their own, for BLAS chooses how it sums by the whole product's shape."""
    if not exact:
        return F.linear(x, weight, bias)
    runs = segments.host_runs()
    taken = runs[-1][2] if runs else 0
    behind = torch.arange(segments.order.numel(), x.shape[0], device=x.device)
    y = x.new_empty(x.shape[0], weight.shape[0])
    for rows in (*(segments.rows(start, end) for _, start, end in runs), torch.cat([segments.order[taken:], behind])):
        y[rows] = F.linear(_aligned(x[rows]), weight, bias)
    return y


class _MultiLoraLinear(Function):
    """y = x Wᵀ + b + s_g (drop(x) A_gᵀ) B_gᵀ, one adapter's rows at a time; the gradients are written out below."""

    @staticmethod
    @custom_fwd(device_type="cpu")
    def forward(ctx, x, weight, bias, lora_a, lora_b, scaling, segments, slices, ranks, dropout, exact):
        wide, full = widened(x), lora_b.shape[-1]
        y = base_product(wide, widened(weight), widened(bias), segments, exact)
        dropped, keep = wide, None
        if dropout is not None:
            features = torch.arange(x.shape[1] + x.shape[1] % 2, dtype=torch.int32)
            keep = keep_mask(dropout.first(segments.order.numel()), features, segments.row_adapter)[0][:, : x.shape[1]]
            dropped = torch.where(keep, wide[: len(keep)], wide.new_zeros(()))
            # By how much the kept are enlarged is one number for an adapter: it goes into its scaling and not through x.
            scaling = scaling / (1 - thresholds(dropout.p).float() / 65536)
        ctx.runs = [
            (g, segments.rows(start, end), full if ranks is None else int(ranks[g]), scale)
            for (g, start, end), scale in zip(segments.runs, scaling[[g for g, _, _ in segments.runs]].tolist(), strict=True)
        ]
        shrunk = []
        for g, rows, rank, scale in ctx.runs:
            s = torch.mm(_aligned(dropped[rows]), _live_rows(_aligned(widened(lora_a[g])), slices, rank).t())  # [n, slices*rank]
            b = _live_columns(_aligned(widened(lora_b[g])), slices, rank)
            y[rows] += _products(_by_slice(s, slices), b.transpose(1, 2), scale)
            shrunk.append(s)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, lora_a, lora_b, dropped, keep, *shrunk)
        ctx.segments, ctx.slices, ctx.has_bias, ctx.exact = segments, slices, bias is not None, exact
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    @custom_bwd(device_type="cpu")
    def backward(ctx, dy):
        x, weight, lora_a, lora_b, dropped, keep, *shrunk = ctx.saved_tensors
        need_x, need_w, need_b, need_lora_a, need_lora_b = ctx.needs_input_grad[:5]
        slices, dtype, dy = ctx.slices, dy.dtype, widened(dy)
        dx = base_product(dy, widened(weight).t(), None, ctx.segments, ctx.exact) if need_x else None
        d_a = torch.zeros_like(lora_a, memory_format=torch.contiguous_format) if need_lora_a else None
        d_b = torch.zeros_like(lora_b, memory_format=torch.contiguous_format) if need_lora_b else None
        for (g, rows, rank, scale), s in zip(ctx.runs, shrunk, strict=True):
            parts = _by_slice(_aligned(dy[rows]), slices)
            ds = _products(parts, _live_columns(_aligned(widened(lora_b[g])), slices, rank), scale)  # [n, slices*rank]
            if need_lora_b:
                d_b_g = torch.baddbmm(s.new_zeros(1, 1, 1), parts.transpose(1, 2), _by_slice(s, slices), beta=0, alpha=scale)
                d_b[g, :, :rank] = d_b_g.flatten(0, 1)
            if need_lora_a:
                d_a_g = torch.mm(ds.t(), _aligned(dropped[rows]))
                d_a[g].unflatten(0, (slices, -1))[:, :rank] = d_a_g.unflatten(0, (slices, -1))
            if need_x:
                dx_g = torch.mm(ds, _live_rows(_aligned(widened(lora_a[g])), slices, rank))
                dx[rows] += dx_g if keep is None else torch.where(keep[rows], dx_g, dx_g.new_zeros(()))
        dx = dx.to(dtype) if need_x else None
        dw = (dy.t() @ widened(x)).to(weight.dtype) if need_w else None
        db = dy.sum(0).to(weight.dtype) if need_b and ctx.has_bias else None
        return dx, dw, db, d_a, d_b, *(None,) * 6


def _live_rows(a: Tensor, slices: int, rank: int) -> Tensor:
    """Rows of A [slices*R, K] below the adapter's own rank, slice by slice: [slices*rank, K]."""
    full = a.shape[0] // slices
    return a if rank == full else a.view(slices, full, -1)[:, :rank].reshape(slices * rank, -1)


def _live_columns(b: Tensor, slices: int, rank: int) -> Tensor:
    """Columns of B [N, R] below the adapter's own rank, by slice: [slices, N/slices, rank]."""
    return b.unflatten(0, (slices, -1))[..., :rank]


def multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: Tensor, segments: Segments,
    *, slices: int = 1, ranks: Tensor | None = None, dropout: Dropout | None = None, exact: bool = False,
) -> Tensor:  # fmt: skip
    """Linear layer with the LoRA update of each row's own adapter: y[t] = W x[t] + b + s_g B_g (A_g drop(x[t])).

    x: [T, K]. weight: [N, K]. bias: [N] or None. lora_a: [G, slices*R, K]. lora_b: [G, N, R]. scaling: fp32 [G].
    slices: the N rows are that many equal blocks, block i uses rows i*R..(i+1)*R of A (fused q, k, v).
    ranks: int [G] or None, adapters that use only the first ranks[g] of R; their tails are skipped and get zero gradients.
    dropout: of x on the LoRA path only. Rows behind segments.cu_seqlens[-1] get the base model's value.
    exact: the base product too is the same to the bit whoever shares the batch.
    Returns [T, N], differentiable in x, weight, bias, lora_a, lora_b. Raises ValueError for shapes that do not fit.
    Source: Hu et al. 2021, arXiv 2106.09685, equation 3, for many adapters at once.
    """
    check_lora_shapes(x, weight, bias, lora_a, lora_b, scaling, segments, slices)
    x, weight, bias = lower(x, weight, bias)
    lora_a, lora_b = lora_a.to(x.dtype), lora_b.to(x.dtype)
    how = scaling, segments, slices, ranks, dropout, exact
    return without_autocast(_MultiLoraLinear, x, weight, bias, lora_a, lora_b, *how)


def check_lora_shapes(x, weight, bias, lora_a, lora_b, scaling, segments, slices) -> None:
    """Raises ValueError naming the first shape that does not fit the others."""
    (rows, k), (n, groups) = x.shape, (weight.shape[0], segments.num_adapters)
    full = lora_b.shape[-1]
    for name, tensor, wanted in (
        ("weight", weight, (n, k)),
        ("lora_a", lora_a, (groups, slices * full, k)),
        ("lora_b", lora_b, (groups, n, full)),
        ("scaling", scaling, (groups,)),
        *([("bias", bias, (n,))] if bias is not None else []),
    ):
        if tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {wanted}")
    if n % slices:
        raise ValueError(f"{n} outputs do not divide into {slices} slices")
    if rows < segments.row_adapter.numel():
        raise ValueError(f"x has {rows} rows, the segments cover {segments.row_adapter.numel()}")


def lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_a: Tensor, lora_b: Tensor, scaling: Tensor | float,
    *, dropout: Dropout | None = None, exact: bool = False,
) -> Tensor:  # fmt: skip
    """`multi_lora_linear` with one adapter for all rows: lora_a [R, K], lora_b [N, R], scaling a number or fp32 [1]."""
    cu_seqlens = torch.tensor([0, x.shape[0]], dtype=torch.int32)
    segments = make_segments(cu_seqlens, torch.zeros(1, dtype=torch.int32), 1)
    scaling = torch.as_tensor(scaling, dtype=torch.float32).reshape(1)
    return multi_lora_linear(x, weight, bias, lora_a[None], lora_b[None], scaling, segments, dropout=dropout, exact=exact)


class _AdapterLinear(Function):
    """y = W_g x + b_g, one adapter's rows at a time, so that no neighbour is in its sums."""

    @staticmethod
    def forward(ctx, x, weight, bias, segments):
        wide, wide_weight, wide_bias = widened(x), widened(weight), widened(bias)
        y = wide.new_zeros(x.shape[0], weight.shape[1])
        ctx.runs = segments.host_runs()  # which a GPU has to be asked for: once, for backward too
        for g, start, end in ctx.runs:
            rows = segments.rows(start, end)
            y[rows] = torch.addmm(wide_bias[g], _aligned(wide[rows]), _aligned(wide_weight[g]).t())
        ctx.save_for_backward(x, weight)
        ctx.segments, ctx.bias_dtype = segments, bias.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        wide, wide_weight, dy = widened(x), widened(weight), widened(dy)
        dx = torch.zeros_like(wide) if need_x else None
        dw = torch.zeros_like(weight, memory_format=torch.contiguous_format) if need_w else None
        db = weight.new_zeros(weight.shape[:2], dtype=ctx.bias_dtype) if need_b else None
        for g, start, end in ctx.runs:
            rows = ctx.segments.rows(start, end)
            dy_g = _aligned(dy[rows])
            if need_x:
                dx[rows] = torch.mm(dy_g, _aligned(wide_weight[g]))
            if need_w:
                dw[g] = torch.mm(dy_g.t(), _aligned(wide[rows]))
            if need_b:
                db[g] = dy_g.sum(0)
        return dx.to(x.dtype) if need_x else None, dw, db, None


def adapter_linear(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments) -> Tensor:
    """A whole linear layer per adapter: y[t] = W_g x[t] + b_g; 0 for rows without an adapter.

    x: [T, K]. weight: [G, N, K]. bias: [G, N]. Returns [T, N], differentiable in x, weight, bias.
    """
    return _AdapterLinear.apply(x, weight, bias, segments)


class _Gather(Function):
    """x[index], where every row of x has one slot in `back`, so that the gradient is a gather too and not a scatter.

    index: [n] into x, `live` [n] marks the slots that a row owns; copies that only fill space carry no gradient.
    """

    @staticmethod
    def forward(ctx, x, index, back, live):
        ctx.save_for_backward(back, live)
        return x[index]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        back, live = ctx.saved_tensors
        dx = dy[back]
        return (dx if live is None else torch.where(live[:, None], dx, dx.new_zeros(()))), None, None, None


class _ContiguousGradient(Function):
    """The tensor itself; its gradient arrives contiguous."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        return dy.contiguous()


def packed_attention(
    qkv: Tensor, cu_seqlens: Tensor, num_heads: int, *, dropout: Dropout | None = None, buckets: Buckets | None = None
) -> Tensor:
    """Softmax attention within each packed sequence: softmax(q kᵀ / √D) v, D = H / num_heads.

    qkv: [T, 3H], q, k and v side by side. cu_seqlens: int32 [S+1]. dropout: of the probabilities; the feature of head h and
    key position j is h << 16 | j. buckets: `make_buckets(cu_seqlens)`, where a caller has it already. Returns [T, H]. Rows
    behind cu_seqlens[-1] get 0.
    Sequences of similar length share one padded product, so the loop has a few rounds whatever S is.
    """
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    parts, index, live, slot_of_row = make_buckets(cu_seqlens) if buckets is None else buckets
    if not parts:
        return qkv.new_zeros(rows, width)
    total = slot_of_row.numel()
    gathered = _Gather.apply(qkv[:total], index, slot_of_row, None)
    blocks = []
    # Split and not sliced: the gradients of slices are as many matrices of zeros, added up.
    for block, (part, mask) in zip(gathered.split([part.numel() for part, _ in parts]), parts, strict=True):
        block = block.view(*part.shape, 3, num_heads, -1)
        # Contiguous both ways, as a bucket of more than one sequence would be made anyway: BLAS sums by the strides it sees.
        q, k, v = block.permute(2, 0, 3, 1, 4).contiguous()  # each [n, heads, length, D]
        attended = _ContiguousGradient.apply(_attend(widened(q), widened(k), widened(v), mask, part, dropout).to(qkv.dtype))
        blocks.append(attended.transpose(1, 2).reshape(-1, width))
    out = _Gather.apply(torch.cat(blocks), slot_of_row, index, live)
    return out if total == rows else torch.cat([out, out.new_zeros(rows - total, width)])


def _attend(q: Tensor, k: Tensor, v: Tensor, live: Tensor, index: Tensor, dropout: Dropout | None) -> Tensor:
    """One bucket of `packed_attention`: q, k, v [n, heads, L, D], live bool [n, L], index [n, L] rows of the slots."""
    if dropout is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=live[:, None, None, :])
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~live[:, None, None, :], -torch.inf)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    (n, length), heads = index.shape, q.shape[1]
    head, key = (torch.arange(size, dtype=torch.int32, device=q.device) for size in (heads, length))
    features = head[:, None] << 16 | key
    keep, scale = keep_mask(row_dropout(dropout).take(index.reshape(-1)), features)
    keep = keep.view(n, length, heads, length).transpose(1, 2)
    kept = torch.where(keep, probabilities * scale.view(n, 1, length, 1), probabilities.new_zeros(()))
    return kept.to(v.dtype) @ v


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, dropout: Dropout | None = None) -> Tensor:
    """LayerNorm(drop(x) + residual) over the last dimension. x, residual: [T, H]. weight, bias: [H]. Returns [T, H]."""
    return F.layer_norm(apply_dropout(x, dropout) + residual, (x.shape[-1],), weight, bias, eps)


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), the exact form (erf) that XLM-R uses. Any shape. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    return F.gelu(x)


def token_loss(logits: Tensor, labels: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each adapter's labelled rows.

    logits: [T, C]. labels: int64 [T], -100 where a row has none. Returns loss fp32 [G], 0 for an adapter without labelled
    rows, and the number of labelled rows int64 [G]. The sum of the losses gives every adapter the gradient of its own mean.
    """
    groups, total = segments.num_adapters, segments.row_adapter.numel()
    bins = torch.where(segments.row_adapter < 0, groups, segments.row_adapter).long()
    labels = labels[:total]
    row_loss = F.cross_entropy(logits[:total].float(), labels, reduction="none", ignore_index=-100)
    count = bins.new_zeros(groups + 1).index_add(0, bins, (labels >= 0).long())
    loss = row_loss.new_zeros(groups + 1).index_add(0, bins, row_loss) / count.clamp(min=1)
    return loss[:groups], count[:groups]


@torch.no_grad()
def adapter_adamw_(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor,
    *, betas: tuple[float, float], eps: float, weight_decay: Tensor, max_norm: Tensor, active: Tensor,
) -> Tensor:  # fmt: skip
    """One AdamW step for each active row of the bank, in place, with that row's own rate, step, decay and clipping.

    param, exp_avg, exp_avg_sq: fp32 [G, P]. grad: [G, P]. step: int64 [G], steps taken so far. lr, weight_decay, max_norm:
    fp32 [G]; max_norm is the row's gradient-norm clip (inf: none). active: bool [G]. Returns the gradient norms fp32 [G]
    before clipping (0 for inactive rows). A row that is inactive, or whose norm is not finite, is left untouched to the bit.
    Source: Loshchilov and Hutter 2017, arXiv 1711.05101; clipping as torch.nn.utils.clip_grad_norm_.
    """
    rows, (beta_1, beta_2) = active.nonzero()[:, 0].tolist(), betas
    norms = torch.zeros(param.shape[0], device=param.device)
    for g in rows:
        norms[g] = torch.linalg.vector_norm(grad[g], dtype=torch.float32)
    found = norms.tolist()  # read back at once: on a GPU one wait, not one for each row
    for g in rows:
        if not math.isfinite(found[g]):
            continue
        shrink = max(1.0, (found[g] + 1e-6) / float(max_norm[g]))  # the kernel divides by it, in the memory that it is given
        row = grad[g].to(torch.float32, copy=shrink > 1)
        # Filled there, not copied: on a GPU a copy from the host would wait.
        taken, divisor, sound = (torch.full((), x, device=param.device) for x in (float(step[g]), shrink, 0.0))
        adamw(
            [param[g]], [row], [exp_avg[g]], [exp_avg_sq[g]], [], [taken], fused=True, amsgrad=False, beta1=beta_1, beta2=beta_2,
            lr=float(lr[g]), weight_decay=float(weight_decay[g]), eps=eps, maximize=False, grad_scale=divisor, found_inf=sound,
        )  # fmt: skip
        step[g] += 1
    return norms


def span_counts(
    pred: Tensor, gold: Tensor, cu_seqlens: Tensor, group: Tensor, num_groups: int,
    *, tags: Tensor | None = None, types: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Counts for micro span F1 of every group: true positives, predicted spans, gold spans.

    pred, gold: int [T], label ids; rows whose gold is -100 do not count. cu_seqlens: int32 [S+1]. group: int [S].
    tags: int [C], 0 for O, 1 for B, 2 for I, and types: int [C], the slot of each label; None: O, then B and I of each slot
    in turn. Returns int64 [num_groups, 3]. Spans are conlleval's, which seqeval's default mode follows: a span starts at B,
    at an I behind O or behind another slot, and at the start of a sequence; it never crosses sequences.
    """
    index = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    sequence = torch.repeat_interleave(index, (cu_seqlens[1:] - cu_seqlens[:-1]).long())
    total = sequence.numel()
    counted = gold[:total] >= 0
    pred, gold, sequence = pred[:total][counted].long(), gold[:total][counted].long(), sequence[counted]
    if tags is None or types is None:
        top = int(torch.cat([pred, gold]).max()) + 1 if pred.numel() else 1
        label = torch.arange(top, device=pred.device)
        tags, types = torch.where(label == 0, 0, 2 - label % 2), (label - 1) // 2
    new_sequence = torch.ones_like(sequence, dtype=torch.bool)
    new_sequence[1:] = sequence[1:] != sequence[:-1]

    def spans(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tag, slot = tags[labels], types[labels]
        inside = tag > 0
        fresh = new_sequence.clone()
        fresh[1:] |= ~inside[:-1] | (slot[1:] != slot[:-1])
        starts = inside & (fresh | (tag == 1))
        ends = inside.clone()
        ends[:-1] &= ~inside[1:] | starts[1:] | new_sequence[1:]
        return starts.nonzero()[:, 0], ends.nonzero()[:, 0], slot

    (p_start, p_end, p_slot), (g_start, g_end, g_slot) = spans(pred), spans(gold)
    gold_end = torch.full_like(gold, -1)
    gold_end[g_start] = g_end
    hit = (gold_end[p_start] == p_end) & (p_slot[p_start] == g_slot[p_start])

    def count(positions: Tensor) -> Tensor:
        return torch.bincount(group.long()[sequence[positions]], minlength=num_groups)

    return torch.stack([count(p_start[hit]), count(p_start), count(g_start)], 1)
