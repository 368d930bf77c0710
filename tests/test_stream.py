"""Streams visit every sentence once an epoch, and go on from their counters alone; packing keeps every token."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyCorpus

from kloss.cl.corpus import Sentences
from kloss.cl.learner import Experience, Learner
from kloss.cl.packing import pack
from kloss.cl.stream import Stream

CORPUS = ToyCorpus(sentences=7)


def drain(stream):
    batches = []
    while not stream.finished:
        where = stream.counters()
        pool, index, ended = stream.next()
        batches.append((where, pool, index, ended))
    return batches


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 5))
def test_each_epoch_visits_each_sentence_once(batch_size, epochs, seed):
    stream = Stream(CORPUS, [["aa"], ["bb", "cc"]], epochs=epochs, batch_size=batch_size, seed=seed)
    batches = drain(stream)
    assert len(batches) == Stream(CORPUS, [["aa"], ["bb", "cc"]], epochs=epochs, batch_size=batch_size, seed=seed).steps()
    for experience, size in ((0, 7), (1, 14)):
        for epoch in range(epochs):
            seen = np.concatenate([index for where, _, index, _ in batches if where[:2] == [experience, epoch]])
            assert sorted(seen) == list(range(size))
    assert [ended for *_, ended in batches].count(True) == 2 and batches[-1][3]
    assert sum(pool.offsets[i + 1] - pool.offsets[i] for _, pool, index, _ in batches for i in index) == stream.tokens()


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 11))
def test_counters_are_all_there_is(start):
    options = {"epochs": 2, "batch_size": 3, "seed": 4}
    batches = drain(Stream(CORPUS, [["aa"], ["bb"]], **options))
    resumed = Stream(CORPUS, [["aa"], ["bb"]], **options)
    resumed.seek(batches[start][0])
    for (_, _, one, _), (_, _, other, _) in zip(batches[start:], drain(resumed), strict=True):
        assert np.array_equal(one, other)


LOCALES = st.lists(st.sampled_from(CORPUS.locales), min_size=1, max_size=3, unique=True)
EXPERIENCE = LOCALES.flatmap(
    lambda locales: st.builds(
        Experience,
        locales=st.just(tuple(locales)),
        weights=st.one_of(st.just(()), st.tuples(*[st.floats(0.01, 1)] * len(locales))),
        limit=st.one_of(st.none(), st.integers(1, 9)),
        epochs=st.one_of(st.none(), st.integers(1, 3)),
        rate=st.floats(0, 2),
    )
)


@settings(deadline=None, max_examples=40, derandomize=True, database=None)
@given(st.lists(EXPERIENCE, min_size=1, max_size=3), st.integers(1, 6), st.integers(1, 4))
def test_experiences_have_sentences_epochs_and_rates_of_their_own(experiences, batch_size, every):
    def make():
        return Stream(CORPUS, experiences, epochs=2, batch_size=batch_size, seed=3)

    stream, seen, due = make(), [[] for _ in experiences], {}
    for step in range(1, make().steps() + 1):
        i, rate, where = stream.experience, stream.rate, stream.counters()
        assert rate == experiences[i].rate and make().comes_by(where) and stream.step == step - 1
        resumed = make()
        resumed.seek(where)
        pool, index, ended = stream.next()
        assert np.array_equal(resumed.next().indices, index)
        seen[i] += index.tolist()
        if stream.due(every):
            assert not ended
            due[step] = i
    assert stream.finished and stream.rate == 1 and stream.comes_by(stream.counters()) and stream.marks(every) == due
    for i, (experience, indices) in enumerate(zip(experiences, seen, strict=True)):
        whole, sizes = 7, []
        for weight in experience.weights or [1] * len(experience.locales):
            sizes.append(int(np.ceil(weight * min(whole, experience.limit or whole))))
        assert sorted(indices) == sorted(list(range(sum(sizes))) * (experience.epochs or 2)) and make().sentences(i) == sum(sizes)
    assert make().visits() == sum(map(len, seen)) and stream.marks(0) == {}
    assert not make().comes_by([len(experiences), 0, 1]) and not make().comes_by([0, 9, 0]) and not make().comes_by([0, 0, 99])


def test_fewer_sentences_are_at_even_distances_and_the_same_each_epoch():
    stream = Stream(CORPUS, [Experience(("aa", "bb"), (1.0, 0.4), limit=6)], epochs=3, batch_size=9, seed=0)
    aa, bb = (CORPUS.sentences(locale, "train") for locale in ("aa", "bb"))
    wanted = Sentences.concatenate([aa.take(np.array([0, 1, 2, 3, 4, 5]) * 7 // 6), bb.take(np.array([0, 2, 4]))])
    tokens = 0
    for _, pool, index, _ in drain(stream):
        assert np.array_equal(pool.input_ids, wanted.input_ids) and sorted(index) == list(range(9))
        tokens += len(pool.input_ids)
    assert stream.tokens() == tokens


def test_plain_locales_are_an_experience():
    assert Experience.of(["aa", "bb"]) == Experience(("aa", "bb")) and Experience.of(Experience(("aa",))) == Experience(("aa",))
    fields = dict(rank=2, alpha=2.0, lr=1e-3, seed=0, epochs=1, batch_size=4)
    plain, record = (Learner(some, **fields) for some in ((("aa",), ["bb"]), (Experience(("aa",)), Experience(("bb",)))))
    assert plain == record and hash(plain) == hash(record) and plain.name.startswith("2x1 from aa, r=2")
    assert plain != Learner((("aa",), Experience(("bb",), rate=0.5)), **fields)


@pytest.mark.parametrize(
    "wrong",
    [
        {"locales": ()},
        {"weights": (0.0,)},
        {"weights": (1.1,)},
        {"weights": (1.0, 1.0)},
        {"limit": 0},
        {"limit": -1},
        {"epochs": 0},
    ]
    + [{"rate": -1.0}, {"rate": float("nan")}, {"rate": float("inf")}, {"weights": (float("nan"),)}],
)
def test_an_experience_that_cannot_be(wrong):
    with pytest.raises(ValueError):
        Experience(**({"locales": ("aa",)} | wrong))


def test_every_seed_experience_and_epoch_has_an_order_of_its_own():
    streams = [Stream(CORPUS, [["aa"], ["bb"]], epochs=2, batch_size=7, seed=seed) for seed in (0, 1)]
    orders = [tuple(index) for stream in streams for _, _, index, _ in drain(stream)]
    assert len(orders) == len(set(orders)) == 8


def test_what_is_replayed_is_drawn_apart_from_the_batch():
    """At the first batch of an epoch both were the same row numbers: in MASSIVE translations of the same utterances."""
    stream = Stream(ToyCorpus(("aa", "bb"), sentences=300), [["aa"], ["bb"]], epochs=3, batch_size=32, seed=3)
    while stream.experience == 0:
        stream.next()
    common = []
    while not stream.finished:
        replayed = stream.replayed(1.0).indices
        common.append(len(np.intersect1d(replayed, stream.next().indices)))
    assert len(common) == 30 and max(common) < 12, "3.4 of 32 on average"


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.sampled_from(CORPUS.locales), st.lists(st.integers(0, 6), max_size=5), st.integers(-1, 3)), min_size=1)
)
def test_pack_keeps_every_token(parts):
    batch = pack([(CORPUS.sentences(locale, "train"), np.array(index, int), g) for locale, index, g in parts], 4)
    wanted, labels, adapters = [], [], []
    for locale, index, g in parts:
        sentences = CORPUS.sentences(locale, "train")
        for i in index:
            wanted.append(sentences.input_ids[sentences.offsets[i] : sentences.offsets[i + 1]])
            labels.append(sentences.labels[sentences.offsets[i] : sentences.offsets[i + 1]])
            adapters.append(g)
    assert batch.input_ids.tolist() == [int(x) for part in wanted for x in part]
    assert batch.labels.tolist() == [int(x) for part in labels for x in part]
    assert batch.adapter.tolist() == adapters
    assert torch.diff(batch.cu_seqlens).tolist() == [len(part) for part in wanted]
    assert batch.number.tolist() == [i for _, index, _ in parts for i in range(len(index))]
    assert batch.in_order == batch.lists(torch.float32).segments.sorted


def test_pooled_keeps_sentences_in_order():
    parts = [CORPUS.sentences(locale, "train") for locale in ("aa", "cc")]
    both = Sentences.concatenate(parts)
    assert np.array_equal(both.input_ids, np.concatenate([part.input_ids for part in parts]))
    assert np.array_equal(np.diff(both.offsets), np.concatenate([np.diff(part.offsets) for part in parts]))
