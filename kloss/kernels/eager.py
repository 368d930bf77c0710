"""The ops that have no kernel yet, in plain torch, tuned. The multi-adapter linear is in `multi_lora.py`.

They have the names and signatures of `reference.py`, their specification. An adapter's results do not depend on the others.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.optim.adamw import adamw

from .buckets import Buckets, make_buckets
from .dropout import Dropout, apply_dropout, keep_mask
from .segments import Segments


def widened(tensor: Tensor) -> Tensor:
    """On a CPU the tensor in at least fp32, except bf16 with AVX-512.

    Without it products in bf16 have 1/7 to 1/100 of fp32's rate.
    """
    if tensor.dtype == torch.float32 or tensor.device.type != "cpu":
        return tensor
    if tensor.dtype == torch.bfloat16 and torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def lower(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The base layer's tensors, in autocast's dtype if autocast is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(x.device.type)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor at a 64-byte address. Elsewhere BLAS may sum in another order, and bits must not depend on an address."""
    return tensor if tensor.data_ptr() % 64 == 0 else tensor.clone()


class _AdapterLinear(Function):
    """y = W_g x + b_g, one adapter's rows at a time, so that no other adapter is in its sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, segments: Segments) -> Tensor:
        wide, wide_weight, wide_bias = widened(x), widened(weight), widened(bias)
        y = wide.new_zeros(x.shape[0], weight.shape[1])
        ctx.runs = segments.host_runs()  # once, for backward too: on a GPU the host waits
        for g, start, end in ctx.runs:
            rows = segments.rows(start, end)
            y[rows] = torch.addmm(wide_bias[g], aligned(wide[rows]), aligned(wide_weight[g]).t())
        ctx.save_for_backward(x, weight)
        ctx.segments, ctx.bias_dtype = segments, bias.dtype
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        wide, wide_weight, dy = widened(x), widened(weight), widened(dy)
        dx = wide.new_zeros(wide.shape if need_x else 0)
        dw = weight.new_zeros(weight.shape if need_w else 0)
        db = weight.new_zeros(weight.shape[:2] if need_b else 0, dtype=ctx.bias_dtype)
        for g, start, end in ctx.runs:
            rows = ctx.segments.rows(start, end)
            dy_g = aligned(dy[rows])
            if need_x:
                dx[rows] = torch.mm(dy_g, aligned(wide_weight[g]))
            if need_w:
                dw[g] = torch.mm(dy_g.t(), aligned(wide[rows]))
            if need_b:
                db[g] = dy_g.sum(0)
        return dx.to(x.dtype) if need_x else None, dw if need_w else None, db if need_b else None, None


def adapter_linear(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments) -> Tensor:
    """A whole linear layer per adapter: y[t] = W_g x[t] + b_g; 0 for rows without an adapter.

    x: [T, K].
    weight: [G, N, K].
    bias: [G, N].
    Returns [T, N], differentiable in x, weight, bias.
    """
    return _AdapterLinear.apply(x, weight, bias, segments)


class _Gather(Function):
    """x[index] whose gradient is a gather too, not a scatter.

    index: [n], rows of x.
    back: [rows of x], the entry of `index` that is each row's own. Its other entries are padding and carry no gradient.
    live: bool [rows of x] or None; rows that are not live get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, live: Tensor | None) -> Tensor:
        ctx.save_for_backward(back, live)
        return x[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        back, live = ctx.saved_tensors
        dx = dy[back]
        return dx if live is None else torch.where(live[:, None], dx, dx.new_zeros(())), None, None, None


class _ContiguousGradient(Function):
    """The tensor itself; its gradient arrives contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy.contiguous()


def packed_attention(
    qkv: Tensor, cu_seqlens: Tensor, num_heads: int, *, dropout: Dropout | None = None, buckets: Buckets | None = None
) -> Tensor:
    """Softmax attention within each packed sequence: softmax(q kᵀ / √D) v, D = H / num_heads.

    qkv: [T, 3H], q, k and v side by side.
    cu_seqlens: int32 [S+1].
    dropout: of the probabilities; the feature of head h and key position j is h << 16 | j.
    buckets: `make_buckets(cu_seqlens)`, if already computed. Sequences of similar length share one padded product.
    Returns [T, H], 0 for rows behind cu_seqlens[-1].
    """
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    blocks, index, live, slot_of_row = make_buckets(cu_seqlens) if buckets is None else buckets
    if not blocks:
        return qkv.new_zeros(rows, width)
    total = slot_of_row.numel()
    gathered = _Gather.apply(qkv[:total], index, slot_of_row, None)
    outputs = []
    # Split, not sliced: the gradient of a slice is a matrix of zeros of the whole size.
    for padded, (slots, mask) in zip(gathered.split([slots.numel() for slots, _ in blocks]), blocks, strict=True):
        padded = padded.view(*slots.shape, 3, num_heads, -1)
        # Contiguous both ways: BLAS chooses its order of summation by strides, and bits must not depend on a bucket's size.
        q, k, v = padded.permute(2, 0, 3, 1, 4).contiguous()  # each [n, heads, length, D]
        attended = _ContiguousGradient.apply(_attend(widened(q), widened(k), widened(v), mask, slots, dropout).to(qkv.dtype))
        outputs.append(attended.transpose(1, 2).reshape(-1, width))
    out = _Gather.apply(torch.cat(outputs), slot_of_row, index, live)
    return out if total == rows else torch.cat([out, out.new_zeros(rows - total, width)])


def _attend(q: Tensor, k: Tensor, v: Tensor, live: Tensor, index: Tensor, dropout: Dropout | None) -> Tensor:
    """One bucket of `packed_attention`: q, k, v [n, heads, L, D]. live: bool [n, L]. index: [n, L], rows of the slots."""
    if dropout is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=live[:, None, None, :])
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~live[:, None, None, :], -torch.inf)
    probabilities = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    (n, length), heads = index.shape, q.shape[1]
    head, key = (torch.arange(size, dtype=torch.int32, device=q.device) for size in (heads, length))
    mask, scale = keep_mask(dropout.take(index.reshape(-1)), head[:, None] << 16 | key)
    mask = mask.view(n, length, heads, length).transpose(1, 2)
    kept = torch.where(mask, probabilities * scale.view(n, 1, length, 1), probabilities.new_zeros(()))
    return kept.to(v.dtype) @ v


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, dropout: Dropout | None = None) -> Tensor:
    """LayerNorm(drop(x) + residual) over the last dimension. x, residual: [T, H]. weight, bias: [H]. Returns [T, H]."""
    return F.layer_norm(apply_dropout(x, dropout) + residual, (x.shape[-1],), weight, bias, eps)


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), the exact form (erf) that XLM-R uses. Any shape. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    return F.gelu(x)


def token_loss(logits: Tensor, labels: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each adapter's labelled rows.

    logits: [T, C].
    labels: int64 [T], -100 for rows without a label.
    Returns loss fp32 [G], 0 for an adapter without labelled rows, and the number of labelled rows int64 [G]. The sum of the
    losses gives every adapter the gradient of its own mean.
    """
    G, total = segments.num_adapters, segments.row_adapter.numel()
    bins = torch.where(segments.row_adapter < 0, G, segments.row_adapter).long()
    labels = labels[:total]
    row_loss = F.cross_entropy(logits[:total].float(), labels, reduction="none", ignore_index=-100)
    count = bins.new_zeros(G + 1).index_add(0, bins, (labels >= 0).long())
    loss = row_loss.new_zeros(G + 1).index_add(0, bins, row_loss) / count.clamp(min=1)
    return loss[:G], count[:G]


@torch.no_grad()
def adapter_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Tensor,
    max_norm: Tensor,
    active: Tensor,
) -> Tensor:
    """One AdamW step for each active row of the bank, in place, with that row's own rate, step, decay and clipping.

    param, exp_avg, exp_avg_sq: fp32 [G, P].
    grad: [G, P].
    step: int64 [G], steps taken so far.
    lr, weight_decay: fp32 [G].
    max_norm: fp32 [G], gradients of a larger norm are clipped to it; inf: never.
    active: bool [G].
    Returns the gradient norms fp32 [G] before clipping, 0 for inactive rows. A row that is inactive, or whose norm is not finite,
    is left untouched to the bit.
    Source: Loshchilov and Hutter 2017, arXiv 1711.05101; clipping as torch.nn.utils.clip_grad_norm_.
    """
    rows, (beta_1, beta_2) = active.nonzero()[:, 0].tolist(), betas
    norms = torch.zeros(param.shape[0], device=param.device)
    for g in rows:
        norms[g] = torch.linalg.vector_norm(grad[g], dtype=torch.float32)
    host_norms = norms.tolist()  # read back together: on a GPU one wait
    for g in rows:
        if not math.isfinite(host_norms[g]):
            continue
        shrink = max(1.0, (host_norms[g] + 1e-6) / float(max_norm[g]))  # the fused step divides by it, in place
        row = grad[g].to(torch.float32, copy=shrink > 1)
        # Filled on the device: for a copy from the host, the host would wait.
        steps, divisor, found_inf = (torch.full((), x, device=param.device) for x in (float(step[g]), shrink, 0.0))
        adamw(
            [param[g]], [row], [exp_avg[g]], [exp_avg_sq[g]], [], [steps], fused=True, amsgrad=False, maximize=False,
            beta1=beta_1, beta2=beta_2, lr=float(lr[g]), weight_decay=float(weight_decay[g]), eps=eps,
            grad_scale=divisor, found_inf=found_inf,
        )  # fmt: skip
        step[g] += 1
    return norms


def span_counts(
    pred: Tensor,
    gold: Tensor,
    cu_seqlens: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    tags: Tensor | None = None,
    types: Tensor | None = None,
) -> Tensor:
    """Counts for micro span F1 of every group: true positives, predicted spans, gold spans.

    pred, gold: int [T], label ids; rows whose gold is -100 do not count.
    cu_seqlens: int32 [S+1].
    group: int [S].
    tags: int [C], 0 for O, 1 for B, 2 for I. types: int [C], the slot of each label. None: O, then B and I of each slot in turn.
    Returns int64 [num_groups, 3]. Spans are conlleval's, as in seqeval's default mode: a span starts at B, at an I behind O or
    behind another slot, and at the start of a sequence. It never crosses sequences.
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
