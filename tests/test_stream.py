"""Streams visit every sentence once an epoch, and go on from their counters alone; packing keeps every token."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy import ToyCorpus

from kloss.cl.corpus import Sentences
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


def test_every_seed_experience_and_epoch_has_an_order_of_its_own():
    streams = [Stream(CORPUS, [["aa"], ["bb"]], epochs=2, batch_size=7, seed=seed) for seed in (0, 1)]
    orders = [tuple(index) for stream in streams for _, _, index, _ in drain(stream)]
    assert len(orders) == len(set(orders)) == 8


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
