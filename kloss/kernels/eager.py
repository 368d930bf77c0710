"""The ops besides the multi-adapter linear: their checks, and plain torch, tuned, where no kernel serves them.

They have the names and signatures of `reference.py`, their specification. An adapter's results do not depend on the others.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import attention_cpu, heads_cpu, rows_cpu, shared_ops, triton_ops
from .buckets import AttentionTiles, Buckets, Offsets, attention_tiles, make_buckets
from .checks import (
    FLOATS,
    IGNORED,
    INTS,
    check,
    check_dim,
    check_ids,
    check_label_values,
    check_labels,
    check_offsets,
    readable,
    require,
)
from .dropout import Dropout, check_dropout, check_row_keys, keep_mask, row_dropout
from .dropout import apply_dropout as plain_dropout
from .segments import Segments

HAS_AVX512 = torch.backends.cpu.get_cpu_capability().startswith("AVX512")  # a constant, since torch.compile cannot ask


def widened(tensor: Tensor) -> Tensor:
    """On a CPU the tensor in at least fp32, except bf16 with AVX-512.

    Without it products in bf16 have 1/7 to 1/100 of fp32's rate.
    """
    if tensor.dtype == torch.float32 or tensor.device.type != "cpu":
        return tensor
    if tensor.dtype == torch.bfloat16 and HAS_AVX512:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _autocasts(x: Tensor) -> bool:
    """Whether autocast is on for x's device; meta has none."""
    return x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)


def lower(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The base layer's tensors, in autocast's dtype if autocast is on."""
    if not _autocasts(x):
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


def _check_covered(name: str, tensor: Tensor, segments: Segments) -> None:
    """Raise ValueError for a tensor with fewer rows than the segments."""
    if tensor.shape[0] < segments.order.numel():
        raise ValueError(f"{name} has {tensor.shape[0]} rows, the segments cover {segments.order.numel()}")


def _partners(x: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that may meet x: its own, under autocast all."""
    return FLOATS if _autocasts(x) else (x.dtype,)


def adapter_linear(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments) -> Tensor:
    """A whole linear layer per adapter: y[t] = W_g x[t] + b_g; 0 for rows without an adapter.

    x: [T, K].
    weight: [G, N, K].
    bias: [G, N].
    Returns [T, N], differentiable in x, weight, bias.
    Raises ValueError for tensors that do not fit each other.
    """
    check_dim("x", x, "T, K")
    check_dim("weight", weight, "G, N, K")
    G, (N, K) = segments.num_adapters, weight.shape[1:]
    check("x", x, (x.shape[0], K), FLOATS, segments.order.device)
    check("weight", weight, (G, N, K), _partners(x), x.device)
    check("bias", bias, (G, N), _partners(x), x.device)
    _check_covered("x", x, segments)
    if triton_ops.serves(x):
        return triton_ops.adapter_linear(x, weight, bias, segments)
    if rows_cpu.serves(x, weight, bias):
        return heads_cpu.adapter_linear(x, weight, bias, segments)
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


def attention_lists(cu_seqlens: Tensor, qkv: Tensor) -> Buckets | AttentionTiles | Offsets:
    """The `lists` of `packed_attention`, the same for all layers. qkv: any tensor with its rows, dtype and device."""
    if attention_cpu.dtype_for(qkv) is not None:
        check_offsets(cu_seqlens, qkv.shape[0])
        return Offsets(cu_seqlens)
    return attention_tiles(cu_seqlens, qkv.shape[0], qkv.dtype) if triton_ops.serves(qkv) else make_buckets(cu_seqlens)


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    *,
    dropout: Dropout | None = None,
    lists: Buckets | AttentionTiles | Offsets | None = None,
) -> Tensor:
    """Softmax attention within each packed sequence: softmax(q kᵀ / √D) v, D = H / num_heads.

    qkv: [T, 3H], q, k and v side by side.
    cu_seqlens: int [S+1].
    dropout: of the probabilities; the feature of head h and key position j is h << 16 | j.
    lists: `attention_lists(cu_seqlens, qkv)`, if already computed.
    Returns [T, H], 0 for rows behind cu_seqlens[-1].
    Raises ValueError for tensors that do not fit each other, and for lists of other offsets.
    """
    check_dim("qkv", qkv, "T, 3H")
    if num_heads < 1 or qkv.shape[1] % (3 * num_heads):
        raise ValueError(f"qkv has {qkv.shape[1]} columns, not three times a multiple of {num_heads} heads")
    rows, width = qkv.shape[0], qkv.shape[1] // 3
    check("qkv", qkv, (rows, 3 * width), FLOATS, cu_seqlens.device)
    if lists is None:
        check_offsets(cu_seqlens, rows)  # before memory is allocated for them
        lists = attention_lists(cu_seqlens, qkv)
    if lists.cu_seqlens is not cu_seqlens:
        check("lists.cu_seqlens", lists.cu_seqlens, tuple(cu_seqlens.shape), INTS, cu_seqlens.device)
        require((lists.cu_seqlens == cu_seqlens).all(), "the lists must be those of cu_seqlens")
    if isinstance(lists, AttentionTiles):
        if dropout is not None:
            check_dropout(dropout, rows, qkv.device)
        return triton_ops.attention(qkv, num_heads, lists, dropout)
    total = int(cu_seqlens[-1])
    if total > rows:
        raise ValueError(f"cu_seqlens ends at {total}, more than the {rows} rows there are")
    if dropout is not None:
        check_dropout(dropout, total, qkv.device)
    if isinstance(lists, Offsets):
        if attention_cpu.fits(qkv, num_heads):
            return attention_cpu.attention(qkv, cu_seqlens, num_heads, dropout)
        lists = make_buckets(cu_seqlens)
    blocks, index, live, slot_of_row, _ = lists
    if not blocks:
        return qkv.new_zeros(rows, width)
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
    """LayerNorm(drop(x) + residual) over the last dimension. x, residual: [T, H]. weight, bias: [H]. Returns [T, H].

    Raises ValueError for tensors that do not fit each other.
    """
    _check_add_norm(x, residual, weight, bias, dropout)
    if triton_ops.serves(x) and x.dtype == residual.dtype:
        return triton_ops.add_norm(x, residual, weight, bias, eps, dropout)
    # Without dropout torch's backward is as fast.
    if rows_cpu.serves(x, residual, weight, bias) and (dropout is not None or not torch.is_grad_enabled()):
        return rows_cpu.add_norm(x, residual, weight, bias, eps, dropout)
    return F.layer_norm(plain_dropout(x, dropout) + residual, (x.shape[-1],), weight, bias, eps)


def add_norm_twice(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """The value of `add_norm` twice, for two uses. On a GPU its backward adds their gradients; a pass of its own is saved."""
    if triton_ops.serves(x) and x.dtype == residual.dtype and not torch.compiler.is_compiling():
        _check_add_norm(x, residual, weight, bias, dropout)
        return triton_ops.add_norm_twice(x, residual, weight, bias, eps, dropout)
    y = add_norm(x, residual, weight, bias, eps, dropout=dropout)
    return y, y


def _check_add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, dropout: Dropout | None) -> None:
    check_dim("x", x, "T, H")
    check("x", x, tuple(x.shape), FLOATS, None)
    dtypes = _partners(x)
    check("residual", residual, tuple(x.shape), dtypes, x.device)
    for name, tensor in (("weight", weight), ("bias", bias)):
        check(name, tensor, (x.shape[1],), dtypes, x.device)
    if dropout is not None:
        check_row_keys(dropout, x)


def apply_dropout(x: Tensor, dropout: Dropout | None, adapter: Tensor | None = None) -> Tensor:
    """drop(x) for x [T, K], as `dropout.apply_dropout` describes it."""
    backend = triton_ops if triton_ops.serves(x) else rows_cpu
    if dropout is None or not backend.serves(x):
        return plain_dropout(x, dropout, adapter)
    check_row_keys(dropout, x)
    return backend.dropout(x, row_dropout(dropout, adapter))


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), the exact form (erf) that XLM-R uses. Any shape. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    return F.gelu(x)


def token_loss(logits: Tensor, labels: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each adapter's labelled rows.

    logits: [T, C].
    labels: int64 [T], -100 for rows without a label.
    Returns loss [G] in fp32, of fp64 logits in fp64, 0 for an adapter without labelled rows, and the number of labelled rows
    int64 [G]. The sum of the losses gives every adapter the gradient of its own mean.
    Raises ValueError for tensors that do not fit each other, on a CPU also for labels out of range. On a GPU such a label makes
    its adapter's loss and gradients NaN.
    """
    check_dim("logits", logits, "T, C")
    check("logits", logits, tuple(logits.shape), FLOATS, segments.order.device)
    check("labels", labels, (logits.shape[0],), (torch.int64,), logits.device)
    _check_covered("logits", logits, segments)
    G, total = segments.num_adapters, segments.row_adapter.numel()
    if triton_ops.serves(logits):
        return triton_ops.token_loss(logits, labels, segments)
    check_ids("labels", labels[:total], 0, logits.shape[1], ignored=IGNORED)
    if rows_cpu.serves(logits):
        return heads_cpu.token_loss(logits, labels, segments)
    bins = torch.where(segments.row_adapter < 0, G, segments.row_adapter).long()
    labels = labels[:total]
    row_loss = F.cross_entropy(
        logits[:total].to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none", ignore_index=IGNORED
    )
    count = bins.new_zeros(G + 1).index_add(0, bins, (labels >= 0).long())
    loss = row_loss.new_zeros(G + 1).index_add(0, bins, row_loss) / count.clamp(min=1)
    return loss[:G], count[:G]


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
    cu_seqlens: int [S+1].
    group: int [S], in 0..num_groups-1.
    tags: int [C], 0 for O, 1 for B, 2 for I. types: int [C], the slot of each label. None: O, then B and I of each slot in turn.
    Returns int64 [num_groups, 3]. Spans are conlleval's, as in seqeval's default mode: a span starts at B, at an I behind O or
    behind another slot, and at the start of a sequence. It never crosses sequences.
    Raises ValueError for tensors that do not fit each other, on a CPU also for labels or groups out of range. On a GPU an
    assertion stops the device.
    """
    check_labels(pred, gold, cu_seqlens, group, tags, types)
    if num_groups < 0:
        raise ValueError(f"num_groups must be at least 0, got {num_groups}")
    arguments, op = (pred, gold, cu_seqlens, group, num_groups), shared_ops.runs_on(gold.device)
    if op and readable(gold) and cu_seqlens.dtype == torch.int32:
        try:
            return shared_ops.span_counts(*arguments, tags=tags, types=types, strict=True)
        except RuntimeError:  # it looked at every value, and what follows says which one is wrong
            check_label_values(*arguments, tags)
            raise
    check_label_values(*arguments, tags)
    if op:
        return shared_ops.span_counts(*arguments, tags=tags, types=types)
    index = torch.arange(cu_seqlens.numel() - 1, device=cu_seqlens.device)
    sequence = torch.repeat_interleave(index, (cu_seqlens[1:] - cu_seqlens[:-1]).long())
    total = sequence.numel()
    pred, gold = pred[:total].long(), gold[:total].long()
    counted = gold != IGNORED
    pred, gold, sequence = pred[counted], gold[counted], sequence[counted]
    new_sequence = torch.ones_like(sequence, dtype=torch.bool)
    new_sequence[1:] = sequence[1:] != sequence[:-1]

    def spans(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if tags is None or types is None:
            tag, slot = torch.where(labels == 0, 0, 2 - labels % 2), (labels - 1) // 2
        else:
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
