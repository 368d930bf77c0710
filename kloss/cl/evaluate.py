"""Score many (learner, language) pairs at once: packed passes, then span counts. Score probes likewise."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..kernels import span_counts
from ..models import AdapterBank, Rows, XLMRForTokenClassification
from .corpus import Corpus
from .graphs import Graphs
from .learner import Learner
from .packing import PackedBatch, Part, pack, send
from .probes import Counts, Probe
from .spans import label_layout, slot_names
from .states import States

MOST_ROWS = 64  # of a bank of probes


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
    by_slot: bool = False,
) -> np.ndarray:
    """Count the spans of each pair (row of the bank, locale) on a partition; without a bank the rows are ignored.

    pass_tokens: tokens of one packed pass, about.
    graphs: those of this model, bank and corpus; None: none are captured.
    by_slot: count each slot type on its own.
    Returns int64 [len(pairs), 3]: true positives, predicted and gold spans; by slot [len(pairs), slot types, 3].
    """
    weight = model.classifier.weight
    graphs = Graphs(weight.device, enabled=False) if graphs is None else graphs
    tags, types = (send(torch.tensor(values), weight.device) for values in label_layout(corpus.labels))
    slots = len(slot_names(corpus.labels))
    counts = torch.zeros(len(pairs), *((slots, 3) if by_slot else (3,)), dtype=torch.long, device=weight.device)

    def count(batch: PackedBatch) -> Tensor:
        logits = model(batch.input_ids, batch.cu_seqlens, bank=bank, lists=batch.lists(weight.dtype))
        rows = logits.argmax(-1), batch.labels, batch.cu_seqlens, batch.number, batch.capacity[1]
        return _counts_by_slot(*rows, tags, types, slots) if by_slot else span_counts(*rows, tags=tags, types=types)

    for chunk in _passes(corpus, pairs, partition, pass_tokens):
        parts = [Part(corpus.sentences(pairs[i][1], partition), index, pairs[i][0] if bank else 0) for i, index in chunk]
        first, last = chunk[0][0], chunk[-1][0] + 1
        within = np.repeat([i - first for i, _ in chunk], [len(index) for _, index in chunk])
        batch = pack(parts, bank.adapters if bank else 1, number=within, padded=graphs.enabled)
        counts[first:last] += graphs("count", count, batch)[: last - first]
    return counts.cpu().numpy()


def _counts_by_slot(
    pred: Tensor, gold: Tensor, cu_seqlens: Tensor, group: Tensor, groups: int, tags: Tensor, types: Tensor, slots: int
) -> Tensor:
    """`span_counts` of each slot type, int64 [groups, slots, 3]: on a copy of the rows in which every other label is O.

    Rows behind the last sequence have a gold label below 0.
    """
    numbers, outside = torch.arange(slots, device=pred.device)[:, None], len(tags)  # one more label
    labels = torch.arange(outside, device=pred.device).where(types == numbers, outside)  # [slots, labels]
    copies = labels[:, pred], labels[:, gold.clamp(min=0)].where(gold >= 0, gold)  # [slots, T]
    starts = cu_seqlens[:-1] + numbers * len(pred)
    ends = torch.cat([starts.flatten(), starts.new_full((1,), slots * len(pred))])
    layout = {"tags": torch.cat([tags, tags.new_zeros(1)]), "types": torch.cat([types, types.new_full((1,), -1)])}
    of = (group * slots + numbers).flatten()
    return span_counts(copies[0].flatten(), copies[1].flatten(), ends, of, groups * slots, **layout).view(groups, slots, 3)


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


def score_probes(
    probes: Sequence[Probe],
    learners: Sequence[Learner],
    model: XLMRForTokenClassification,
    corpus: Corpus,
    states: States,
    failed: Sequence[str | None],
    config: Config,
    done: list[Counts],
    after_some: Callable[[list[Counts]], None],
) -> list[Counts]:
    """Score the probes behind those that are `done`; `after_some(done)` is called as results come in.

    learners, failed: of the whole study; probes of learners that diverged are None.
    """
    model.freeze_backbone()
    while len(done) < len(probes):
        chunk, rows = _some(probes[len(done) :], learners, failed)
        scored = [probe for probe in chunk if probe.row in rows]
        counts: dict[int, Counts] = {}
        if scored:
            bank = _bank_of(list(rows), learners, model, states, config)
            pairs = [(rows[probe.row], probe.locale) for probe in scored]
            found = evaluate(model, bank, corpus, pairs, partition=config.eval_split, pass_tokens=config.pass_tokens)
            counts = {id(probe): row for probe, row in zip(scored, found.tolist(), strict=True)}
        done = [*done, *(counts.get(id(probe)) for probe in chunk)]
        after_some(done)
    return done


def _some(
    probes: Sequence[Probe], learners: Sequence[Learner], failed: Sequence[str | None]
) -> tuple[list[Probe], dict[tuple, int]]:
    """The first probes, of learners of one rank, and their rows, numbered, at most MOST_ROWS."""
    rows: dict[tuple, int] = {}
    chunk: list[Probe] = []
    rank = learners[probes[0].states[0].learner].rank
    for probe in probes:
        if len(rows) == MOST_ROWS and probe.row not in rows or learners[probe.states[0].learner].rank != rank:
            break
        chunk.append(probe)
        if not any(failed[state.learner] for state in probe.states):
            rows.setdefault(probe.row, len(rows))
    return chunk, rows


def _bank_of(
    rows: Sequence[tuple], learners: Sequence[Learner], model: XLMRForTokenClassification, states: States, config: Config
) -> AdapterBank:
    """The rows of probes as a bank of their learners' own rank, whatever the largest was where each state was kept."""
    weight, firsts = model.classifier.weight, [learners[of[0].learner] for of, _, _ in rows]
    rank, alphas = firsts[0].rank or 1, [learner.alpha for learner in firsts]
    bank = AdapterBank(model, len(rows), rank, alpha=alphas, dtype=weight.dtype, device=weight.device, exact=config.exact)
    kept = {}
    for state in {state for of, _, _ in rows for state in of}:
        row = states.load(state)
        kept[state] = bank.placed(0, row.param, row.rank).cpu()  # probes are made where there is room for all
    for g, (of, part, make) in enumerate(rows):
        bank.param[g] = make([kept[state] for state in of], bank.slots, part)
    bank.refresh()
    return bank
