"""Scores of many (learner, language) pairs in one go: packed passes, then span counts."""

from collections.abc import Sequence

import numpy as np
import torch

from ..kernels import span_counts
from .corpus import Corpus
from .packing import pack
from .spans import label_layout


@torch.no_grad()
def evaluate(
    model, bank, corpus: Corpus, pairs: Sequence[tuple[int, str]], *, partition: str = "test", pass_tokens: int = 8192
) -> np.ndarray:
    """Span counts of each pair (row of the bank, locale) on a partition; without a bank rows are ignored.

    Returns int64 [len(pairs), 3]: true positives, predicted and gold spans, to be summed before F1 is taken.
    """
    device = next(model.parameters()).device
    tags, types = (torch.tensor(values, device=device) for values in label_layout(corpus.labels))
    counts = torch.zeros(len(pairs), 3, dtype=torch.long, device=device)
    for chunk in _passes(corpus, pairs, partition, pass_tokens):
        parts = [(corpus.sentences(pairs[job][1], partition), index, pairs[job][0] if bank else 0) for job, index in chunk]
        batch = pack(parts, bank.adapters if bank else 1, device)
        logits = model(batch.input_ids, batch.cu_seqlens, batch.segments, bank)
        group = torch.repeat_interleave(
            torch.tensor([job for job, _ in chunk], device=device),
            torch.tensor([len(i) for _, i in chunk], device=device),
        )
        counts += span_counts(logits.argmax(-1), batch.labels, batch.cu_seqlens, group, len(pairs), tags=tags, types=types)
    return counts.cpu().numpy()


def _passes(corpus: Corpus, pairs: Sequence[tuple[int, str]], partition: str, pass_tokens: int):
    """Cuts the pairs' sentences, in the pairs' order, into passes of about pass_tokens: lists of (pair, sentence indices)."""
    chunk, room = [], pass_tokens
    for job, (_, locale) in enumerate(pairs):
        offsets = corpus.sentences(locale, partition).offsets
        first, last = 0, len(offsets) - 1
        while first < last:
            end = int(np.searchsorted(offsets, offsets[first] + room, side="right")) - 1
            end = min(last, max(end, first + (not chunk)))
            if end > first:
                chunk.append((job, np.arange(first, end)))
                room -= int(offsets[end] - offsets[first])
            if end < last:
                yield chunk
                chunk, room = [], pass_tokens
            first = end
    if chunk:
        yield chunk
