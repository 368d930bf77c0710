"""The specification: every op as short as its equation, under autograd, in any dtype, on a CPU.

Sizes: T packed rows, S sequences, G adapters, K inputs, N outputs, R rank of the bank, H width. The arguments are described at
the ops of the same names in `multi_lora.py`, `eager.py` and `adamw.py`. Whatever runs is held to the functions here.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .buckets import AttentionTiles, Buckets, Offsets
from .dropout import Dropout, apply_dropout, keep_mask
from .segments import Segments

__all__ = [
    "adapter_adamw_",
    "adapter_linear",
    "add_norm",
    "add_norm_twice",
    "apply_dropout",
    "embed",
    "gelu",
    "lora_linear",
    "multi_lora_linear",
    "packed_attention",
    "span_counts",
    "token_loss",
]


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    segments: Segments,
    *,
    slices: int = 1,
    ranks: Tensor | None = None,
    dropout: Dropout | None = None,
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y[t] = W x[t] + b + s_g B_g (A_g drop(x[t])), g = adapter of row t. exact and backend do not change the formula.

    Source: Hu et al. 2021, arXiv 2106.09685, equation 3, for many adapters at once.
    """
    covered = segments.order.numel()
    dropped = x if dropout is None else apply_dropout(x[:covered], dropout.first(covered), segments.row_adapter)
    terms, index = [x.new_zeros(0, weight.shape[0])], [segments.order[:0]]
    for g, start, end in segments.host_runs():
        rows, rank = segments.order[start:end], lora_b.shape[2] if ranks is None else int(ranks[g])
        a = lora_a[g].to(x.dtype).unflatten(0, (slices, -1))[:, :rank]  # [slices, rank, K]
        b = lora_b[g].to(x.dtype).unflatten(0, (slices, -1))[..., :rank]  # [slices, N/slices, rank]
        blocks = [dropped[rows] @ a[i].T @ b[i].T for i in range(slices)]
        terms.append(float(scaling[g]) * torch.cat(blocks, 1))
        index.append(rows)
    return F.linear(x, weight, bias).index_add(0, torch.cat(index), torch.cat(terms))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor | float,
    *,
    dropout: Dropout | None = None,
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y[t] = W x[t] + b + s B (A drop(x[t])): one adapter for all rows."""
    return F.linear(x, weight, bias) + float(scaling) * apply_dropout(x, dropout) @ lora_a.T @ lora_b.T


def adapter_linear(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments) -> Tensor:
    """y[t] = W_g x[t] + b_g, g = adapter of row t; 0 for rows without an adapter."""
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for g, start, end in segments.host_runs():
        rows = segments.order[start:end]
        y = y.index_add(0, rows, F.linear(x[rows], weight[g], bias[g]))
    return y


def packed_attention(
    qkv: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    *,
    dropout: Dropout | None = None,
    lists: Buckets | AttentionTiles | Offsets | None = None,
) -> Tensor:
    """softmax(q kᵀ / √D) v within each sequence, for every head; the probability of head h and key j is feature h << 16 | j.

    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1.
    """
    offsets, (T, width) = cu_seqlens.tolist(), qkv.shape
    out = []
    for start, end in zip(offsets[:-1], offsets[1:], strict=True):
        q, k, v = qkv[start:end].unflatten(1, (3, num_heads, -1)).permute(1, 2, 0, 3)  # each [heads, n, D]
        p = torch.softmax(q @ k.mT / math.sqrt(q.shape[-1]), -1)
        if dropout is not None:
            n = end - start
            features = torch.arange(num_heads)[:, None] << 16 | torch.arange(n + n % 2)
            kept, scale = keep_mask(dropout.take(slice(start, end)), features.int())  # [n, heads, n], [n]
            p = torch.where(kept[..., :n].transpose(0, 1), p * scale[:, None], 0).to(p.dtype)
        out.append((p @ v).transpose(0, 1).flatten(1))
    return torch.cat([*out, qkv.new_zeros(T - offsets[-1], width // 3)])


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, dropout: Dropout | None = None) -> Tensor:
    """LayerNorm(drop(x) + residual): (z - mean) / √(variance + eps) · weight + bias. Source: Ba et al. 2016, arXiv 1607.06450."""
    z = apply_dropout(x, dropout) + residual
    centred = z - z.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def add_norm_twice(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *, dropout: Dropout | None = None
) -> tuple[Tensor, Tensor]:
    """The value of `add_norm` twice, for two uses."""
    y = add_norm(x, residual, weight, bias, eps, dropout=dropout)
    return y, y


def embed(
    input_ids: Tensor, position: Tensor, words: Tensor, positions: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor,
    eps: float, *, first_position: int = 0, dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """drop(LayerNorm(words[id] + positions[first_position + position] + token_type)), the last position for those behind it."""
    rows = (position.long() + first_position).clamp(max=len(positions) - 1)
    return apply_dropout(add_norm(words[input_ids.long()] + token_type, positions[rows], weight, bias, eps), dropout)


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), Φ of the normal distribution. Source: Hendrycks and Gimpel 2016, arXiv 1606.08415."""
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def token_loss(logits: Tensor, labels: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Mean of -log softmax(logits)[label] over each adapter's labelled rows, in at least fp32, and how many; 0 for none."""
    losses, counts = [], []
    for g in range(segments.num_adapters):
        rows = (segments.row_adapter == g).nonzero()[:, 0]
        rows = rows[labels[rows] >= 0]
        picked = logits[rows].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1).gather(1, labels[rows, None])
        losses.append(-picked.sum() / max(1, len(rows)))
        counts.append(len(rows))
    return torch.stack(losses), torch.tensor(counts)


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
    work: Tensor | None = None,
    tail: int | None = None,
    tail_lr: Tensor | None = None,
) -> Tensor:
    """AdamW for each active row whose gradient norm is finite: clip, decay, update both moments, step.

    work: gets a copy of the weights of rows that move.
    tail, tail_lr: columns from `tail` on have this rate.
    Source: Loshchilov and Hutter 2017, arXiv 1711.05101, algorithm 2; clipping as torch.nn.utils.clip_grad_norm_.
    """
    norms = torch.where(active, grad.to(param.dtype).square().sum(1).sqrt(), 0)
    for g in (active & norms.isfinite()).nonzero()[:, 0].tolist():
        clipped = grad[g].to(param.dtype) * (max_norm[g] / (norms[g] + 1e-6)).clamp(max=1)
        step[g] += 1
        exp_avg[g] = betas[0] * exp_avg[g] + (1 - betas[0]) * clipped
        exp_avg_sq[g] = betas[1] * exp_avg_sq[g] + (1 - betas[1]) * clipped.square()
        mean, variance = exp_avg[g] / (1 - betas[0] ** int(step[g])), exp_avg_sq[g] / (1 - betas[1] ** int(step[g]))
        rates = torch.full_like(param[g], float(lr[g]))
        if tail is not None and tail_lr is not None:
            rates[tail:] = tail_lr[g]
        param[g] -= rates * (weight_decay[g] * param[g] + mean / (variance.sqrt() + eps))
        if work is not None:
            work[g] = param[g]
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
    """True positives, predicted spans and gold spans of each group, by conlleval's definition of a span.

    A span starts at B, at I behind O, at I behind another slot and at the start of a sequence; it lasts to the next that is not I
    of the same slot. Source: Tjong Kim Sang and Buchholz 2000, the CoNLL-2000 shared task.
    """
    counts, offsets = torch.zeros(num_groups, 3, dtype=torch.int64), cu_seqlens.tolist()

    def spans(labels: list[int]) -> set[tuple[int, int, int]]:
        """(slot, start, end) of each span."""
        done, slot, start = set(), None, 0
        for i, label in enumerate([*labels, 0]):
            if tags is None or types is None:
                tag, kind = (2 - label % 2, (label - 1) // 2) if label else (0, 0)
            else:
                tag, kind = (int(tags[label]), int(types[label])) if i < len(labels) else (0, 0)
            if slot is not None and (tag != 2 or kind != slot):
                done.add((slot, start, i))
                slot = None
            if tag and slot is None:
                slot, start = kind, i
        return done

    for g, first, last in zip(group.tolist(), offsets[:-1], offsets[1:], strict=True):
        rows = [t for t in range(first, last) if gold[t] >= 0]
        predicted, golden = (spans([int(labels[t]) for t in rows]) for labels in (pred, gold))
        counts[g] += torch.tensor([len(predicted & golden), len(predicted), len(golden)])
    return counts
