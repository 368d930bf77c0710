"""Score many (learner, language) pairs at once: packed passes, then span counts."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from ..config import Config
from ..kernels import span_counts
from ..models import Rows, XLMRForTokenClassification
from .corpus import Corpus
from .packing import Part, pack, send
from .spans import label_layout


@torch.no_grad()
def evaluate(
    model: XLMRForTokenClassification,
    bank: Rows | None,
    corpus: Corpus,
    pairs: Sequence[tuple[int, str]],
    *,
    partition: str = "test",
    pass_tokens: int = Config.pass_tokens,
) -> np.ndarray:
    """Count the spans of each pair (row of the bank, locale) on a partition; without a bank the rows are ignored.

    pass_tokens: tokens of one packed pass, about.
    Returns int64 [len(pairs), 3]: true positives, predicted and gold spans.
    """
    device = model.classifier.weight.device
    tags, types = send([np.array(values) for values in label_layout(corpus.labels)], device)
    counts = torch.zeros(len(pairs), 3, dtype=torch.long, device=device)
    for chunk in _passes(corpus, pairs, partition, pass_tokens):
        parts = [Part(corpus.sentences(pairs[i][1], partition), index, pairs[i][0] if bank else 0) for i, index in chunk]
        batch = pack(parts, bank.adapters if bank else 1, device)
        logits = model(batch.input_ids, batch.cu_seqlens, batch.segments, bank)
        (pair,) = send([np.repeat([i for i, _ in chunk], [len(index) for _, index in chunk])], device)
        counts += span_counts(logits.argmax(-1), batch.labels, batch.cu_seqlens, pair, len(pairs), tags=tags, types=types)
    return counts.cpu().numpy()


def _passes(
    corpus: Corpus, pairs: Sequence[tuple[int, str]], partition: str, pass_tokens: int
) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Cut the pairs' sentences, in order, into passes of about `pass_tokens` tokens: lists of (pair, indices of sentences)."""
    chunk: list[tuple[int, np.ndarray]] = []
    room = pass_tokens
    for i, (_, locale) in enumerate(pairs):
        offsets = corpus.sentences(locale, partition).offsets
        first, last = 0, len(offsets) - 1
        while first < last:
            end = int(np.searchsorted(offsets, offsets[first] + room, side="right")) - 1
            end = min(last, max(end, first + (not chunk)))
            if end > first:
                chunk.append((i, np.arange(first, end)))
                room -= int(offsets[end] - offsets[first])
            if end < last:
                yield chunk
                chunk, room = [], pass_tokens
            first = end
    if chunk:
        yield chunk
