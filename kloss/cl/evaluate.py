"""Score many (learner, language) pairs at once: packed passes, then span counts."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..kernels import span_counts
from ..models import Rows, XLMRForTokenClassification
from .corpus import Corpus
from .graphs import Graphs
from .packing import PackedBatch, Part, pack, send
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
    graphs: Graphs | None = None,
) -> np.ndarray:
    """Count the spans of each pair (row of the bank, locale) on a partition; without a bank the rows are ignored.

    pass_tokens: tokens of one packed pass, about.
    graphs: those of this model, bank and corpus; None: none are captured.
    Returns int64 [len(pairs), 3]: true positives, predicted and gold spans.
    """
    weight = model.classifier.weight
    graphs = Graphs(weight.device, enabled=False) if graphs is None else graphs
    tags, types = (send(torch.tensor(values), weight.device) for values in label_layout(corpus.labels))
    counts = torch.zeros(len(pairs), 3, dtype=torch.long, device=weight.device)

    def count(batch: PackedBatch) -> Tensor:
        logits = model(batch.input_ids, batch.cu_seqlens, bank=bank, lists=batch.lists(weight.dtype))
        groups = batch.capacity[1]
        return span_counts(logits.argmax(-1), batch.labels, batch.cu_seqlens, batch.number, groups, tags=tags, types=types)

    for chunk in _passes(corpus, pairs, partition, pass_tokens):
        parts = [Part(corpus.sentences(pairs[i][1], partition), index, pairs[i][0] if bank else 0) for i, index in chunk]
        first, last = chunk[0][0], chunk[-1][0] + 1
        within = np.repeat([i - first for i, _ in chunk], [len(index) for _, index in chunk])
        batch = pack(parts, bank.adapters if bank else 1, number=within, padded=graphs.enabled)
        counts[first:last] += graphs("count", count, batch)[: last - first]
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
