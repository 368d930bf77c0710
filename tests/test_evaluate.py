"""Scores of many pairs in packed passes are the scores of each pair alone."""

import numpy as np
import pytest
import torch
from pretend import GPU, pretended_gpu
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from test_graphs import LAYERS
from toy import LABELS, ToyCorpus, toy_model

from kloss.cl import evaluate as module
from kloss.cl.evaluate import evaluate
from kloss.cl.graphs import Graphs
from kloss.kernels import make_segments
from kloss.models import AdapterBank


def labels_of(model, bank, corpus, row, locale):
    """Gold and predicted labels by name, sentence by sentence, of one row of a bank of 3."""
    sentences = corpus.sentences(locale, "test")
    gold, pred = [], []
    for start, end in zip(sentences.offsets[:-1], sentences.offsets[1:], strict=True):
        ids = torch.from_numpy(sentences.input_ids[start:end]).long()
        cu_seqlens = torch.tensor([0, len(ids)], dtype=torch.int32)
        segments = make_segments(cu_seqlens, torch.tensor([row], dtype=torch.int32), 3)
        best = model(ids, cu_seqlens, segments, bank).argmax(-1)
        kept = sentences.labels[start:end] >= 0
        gold.append([LABELS[i] for i in sentences.labels[start:end][kept]])
        pred.append([LABELS[i] for i in best.numpy()[kept]])
    return gold, pred


@pytest.mark.parametrize("pass_tokens", [1, 30, 10_000])
def test_pairs_equal_seqeval_one_by_one(pass_tokens):
    corpus, model = ToyCorpus(), toy_model()
    bank = AdapterBank(model, adapters=3, rank=4)
    torch.manual_seed(0)
    bank.param.normal_(0, 0.3)
    pairs = [(2, "aa"), (0, "bb"), (0, "aa"), (1, "cc")]
    counts = evaluate(model, bank, corpus, pairs, pass_tokens=pass_tokens)
    assert len({tuple(row) for row in counts.tolist()}) > 2
    for (row, locale), count in zip(pairs, counts, strict=True):
        gold, pred = labels_of(model, bank, corpus, row, locale)
        f1 = 2 * count[0] / max(count[1] + count[2], 1)
        assert f1 == pytest.approx(f1_score(gold, pred), abs=1e-12)


@pytest.mark.parametrize("most", [1, 5, 9, 30, 10_000])
def test_a_pass_holds_no_more_tokens_than_allowed(monkeypatch, most):
    corpus, sizes = ToyCorpus(), []

    def pack(parts, *rest, **more):
        batch = module_pack(parts, *rest, **more)
        sizes.append((batch.input_ids.numel(), len(batch.cu_seqlens) - 1))
        return batch

    module_pack = module.pack
    monkeypatch.setattr(module, "pack", pack)
    evaluate(toy_model(), None, corpus, [(0, "aa"), (0, "bb")], pass_tokens=most)
    assert sum(tokens for tokens, _ in sizes) == sum(len(corpus.sentences(name, "test").input_ids) for name in ("aa", "bb"))
    assert all(tokens <= most or sentences == 1 for tokens, sentences in sizes)
    assert all(one + two > most for (one, _), (two, _) in zip(sizes, sizes[1:], strict=False)), "neighbours that would fit in one"


def test_without_a_bank_the_model_is_scored():
    corpus, model = ToyCorpus(), toy_model()
    counts = evaluate(model, None, corpus, [(0, "aa"), (0, "bb")])
    assert counts.shape == (2, 3) and (counts[:, 2] > 0).all()
    assert np.array_equal(counts[1:], evaluate(model, None, corpus, [(0, "bb")]))


def test_nothing_to_score():
    assert evaluate(toy_model(), None, ToyCorpus(), []).shape == (0, 3)


@pytest.mark.parametrize("pass_tokens", [1, 30, 10_000])
def test_slots_are_counted_one_by_one(pass_tokens):
    """What seqeval counts of a type alone; the types sum up to the whole."""
    corpus, model = ToyCorpus(), toy_model()
    bank = AdapterBank(model, adapters=3, rank=4)
    torch.manual_seed(0)
    bank.param.normal_(0, 0.3)
    pairs = [(2, "aa"), (0, "bb"), (0, "aa"), (1, "cc")]
    by_slot = evaluate(model, bank, corpus, pairs, pass_tokens=pass_tokens, by_slot=True)
    assert by_slot.shape == (4, 2, 3) and len({tuple(row) for row in by_slot.reshape(-1, 3).tolist()}) > 5
    assert np.array_equal(by_slot.sum(1), evaluate(model, bank, corpus, pairs, pass_tokens=pass_tokens))
    for (row, locale), counts in zip(pairs, by_slot, strict=True):
        gold, pred = labels_of(model, bank, corpus, row, locale)
        for slot, count in zip(("date", "time"), counts, strict=True):
            spans = [{span for span in get_entities(side) if span[0] == slot} for side in (pred, gold)]
            assert count.tolist() == [len(spans[0] & spans[1]), *map(len, spans)]


def test_on_a_gpu_slots_are_counted_in_a_graph(monkeypatch):
    """Padded batches, whose rows and sentences behind the last one count for nothing."""
    corpus, model = ToyCorpus(), toy_model(**LAYERS)
    pairs = [(0, locale) for locale in ("aa", "bb", "aa", "cc", "bb")]
    wanted = evaluate(model, None, corpus, pairs, pass_tokens=40, by_slot=True)
    with pretended_gpu(monkeypatch) as gpu:
        graphs = Graphs(torch.device(GPU))
        got = evaluate(model.to(GPU), None, corpus, pairs, pass_tokens=40, by_slot=True, graphs=graphs)
    assert gpu.captures and np.array_equal(got, wanted) and got.any()


def test_without_slot_types_there_are_none():
    """Labels that are all O."""
    corpus = ToyCorpus()
    corpus.labels = ("O",)
    counts = evaluate(toy_model(), None, corpus, [], by_slot=True)
    assert counts.shape == (0, 0, 3)
