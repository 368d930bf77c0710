"""Span counts on a CPU, 64 rows at a time, beside the shared body, the reference and seqeval."""

import itertools
import os
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kloss.cl.spans import label_layout
from kloss.kernels import multi_lora_cpu, reference, shared_ops

pytestmark = pytest.mark.skipif(not multi_lora_cpu.built(), reason="csrc is not built")
BOUNDED = settings(max_examples=150, deadline=None, derandomize=True, database=None)
NAMES = ("O", *(f"{tag}-{slot}" for slot in range(3) for tag in "BI"))
SIDES = (0, 1, 2, 31, 32, 33, 62, 63, 64, 65, 66, 127, 128, 129, 200)


def shared_body(pred, gold, borders, group, num_groups, *, tags=None, types=None):
    """The counts by the body of csrc/shared."""
    counts = torch.zeros(num_groups, 3, dtype=torch.int64)
    torch.ops.kloss.span_counts_(pred, gold, borders, group, tags, types, counts, False, True)
    return counts


def long_spans(rng, rows, ends, labels=7):
    """Labels that go on as I of a slot; `ends` is how often they do not. Many are not BIO."""
    anew, labels = rng.random(rows) < ends, rng.integers(0, labels, rows)
    side, last = np.zeros(rows, np.int64), 0
    for t in range(rows):
        last = side[t] = labels[t] if anew[t] else last + last % 2
    return side


def batch(rng, lengths, ends=0.1, differs=0.05, ignored=0.2, groups=3, run=2):
    """Arguments of `span_counts`. differs: how often pred is no copy of gold. run: how many sequences in turn share a group."""
    rows = sum(lengths) + 3  # three behind the last border
    gold = long_spans(rng, rows, ends)
    pred = np.where(rng.random(rows) < differs, rng.integers(0, 7, rows), gold)
    gold[rng.random(rows) < ignored] = -100
    group = rng.integers(0, groups, len(lengths) // run + 1).repeat(run)[: len(lengths)]
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.tensor(pred), torch.tensor(gold), borders, torch.tensor(group), groups


def named():
    return dict(zip(("tags", "types"), map(torch.tensor, label_layout(NAMES)), strict=True))


def all_agree(arguments, **keywords):
    counts = shared_ops.span_counts(*arguments, **keywords)
    assert torch.equal(counts, shared_body(*arguments, **keywords))
    assert torch.equal(counts, reference.span_counts(*arguments, **keywords))
    return counts


@BOUNDED
@given(
    st.integers(0, 2**20), st.lists(st.sampled_from(SIDES), max_size=9), st.sampled_from([0.02, 0.1, 0.6]),
    st.sampled_from([0, 0.02, 0.2]), st.sampled_from([0, 0.3, 0.9, 1]), st.integers(1, 3), st.booleans(),
)  # fmt: skip
@example(0, [64, 64], 0.02, 0, 0, 1, True)
@example(0, [], 0.02, 0, 0, 1, True)
def test_any_lengths_around_words(seed, lengths, ends, differs, ignored, run, pairs):
    arguments = batch(np.random.default_rng(seed), lengths, ends, differs, ignored, run=run)
    all_agree(arguments, **({} if pairs else named()))


@pytest.mark.parametrize("ignored", [0, 0.6])
def test_seqevals_own_spans_of_each_sequence(ignored):
    from seqeval.metrics.sequence_labeling import get_entities

    rng = np.random.default_rng(7)
    lengths = [*SIDES, *rng.permutation(SIDES * 6).tolist(), *rng.integers(0, 20, 200).tolist()]
    pred, gold, borders, _, _ = batch(rng, lengths, ends=0.3, ignored=ignored)
    counts = all_agree((pred, gold, borders, torch.arange(len(lengths)), len(lengths)), **named())
    for (first, last), row in zip(itertools.pairwise(borders.tolist()), counts.tolist(), strict=True):
        kept = [t for t in range(first, last) if gold[t] != -100]
        told, true = (set(get_entities([NAMES[side[t]] for t in kept])) for side in (pred, gold))
        assert row == [len(told & true), len(told), len(true)]


@pytest.mark.parametrize("place", [*range(60, 70), *range(124, 132)])
def test_a_span_that_ends_at_any_place_of_a_word(place):
    """One span from row 1 to `place`, where pred ends earlier or later, or a sequence begins."""
    gold = torch.cat([torch.tensor([0, 1]), torch.full((200,), 2)])
    gold[place:] = 0
    borders, both = torch.tensor([0, 202], dtype=torch.int32), torch.tensor([0, 1])
    assert all_agree((gold, gold, borders, both[:1], 1)).tolist() == [[1, 1, 1]]
    for end in (place - 1, place + 1):
        pred = gold.clone()
        pred[place - 1 : place + 1] = torch.tensor([0, 0] if end < place else [2, 2])
        assert all_agree((pred, gold, borders, both[:1], 1)).tolist() == [[0, 1, 1]]
        cut = torch.tensor([0, place, 202], dtype=torch.int32)
        hits = [[0, 1, 1], [0, 0, 0]] if end < place else [[1, 1, 1], [0, 1, 0]]
        assert all_agree((pred, gold, cut, both, 2)).tolist() == hits
        assert all_agree((pred, gold, cut, both.flip(0), 2)).tolist() == hits[::-1]


def test_labels_that_have_no_byte_are_counted_by_the_shared_body():
    """More than 256 labels, slots beyond 126 or below 0, and labels of any size without names."""
    rng = np.random.default_rng(3)
    pred, gold, borders, group, groups = batch(rng, [70, 5, 64, 9] * 4)
    numbers = torch.arange(7)
    for labels in (300, 256, 255, 254, 253, 252, 112, 17):
        tags, types = torch.zeros(labels, dtype=torch.int64), torch.full((labels,), -1)
        names = numbers + labels - 7  # the last ones
        tags[names], types[names] = torch.tensor([0, 1, 2, 1, 2, 1, 2]), torch.tensor([-1, 0, 0, 1, 1, 2, 2])
        moved = torch.where(gold < 0, gold, names[gold.clamp(min=0)])
        for slots in (0, 124, 125, 1000, -5):
            arguments = names[pred], moved, borders, group, groups
            assert torch.equal(
                all_agree(arguments, tags=tags, types=types + slots), all_agree((pred, gold, borders, group, groups), **named())
            )
    for more in (246, 248, 250, 252, 1000, 2**20):
        far = torch.where(pred > 0, pred + more, 0), torch.where(gold > 0, gold + more, gold), borders, group, groups
        assert torch.equal(all_agree(far), all_agree((pred, gold, borders, group, groups)))


def test_what_is_no_label_is_refused_wherever_it_stands():
    for size in (1, 7, 8, 9, 64, 200):
        for place in {0, size // 2, size - 1}:
            for wrong in (7, 15, 16, 255, 256, 2**31, 2**32, 2**32 + 1, 2**62, -1, -(2**62)):
                pred, gold = torch.ones(2, size, dtype=torch.int64)
                borders, group = torch.tensor([0, size], dtype=torch.int32), torch.tensor([0])
                pred[place] = wrong
                with pytest.raises(RuntimeError, match="a label that is not in tags"):
                    shared_ops.span_counts(pred, gold, borders, group, 1, **named())
                if wrong > 0:
                    with pytest.raises(RuntimeError, match="a label that is not in tags"):
                        shared_ops.span_counts(gold, pred, borders, group, 1, **named())
                gold[place] = -1 if wrong < 0 else -(2**40)  # the row does not count
                all_agree((pred.clamp(0, 6), gold, borders, group, 1), **named())
                counts = shared_ops.span_counts(pred, gold, borders, group, 1, **named())
                assert counts.tolist() == [[size - 1] * 3]


def test_nothing_is_added_for_a_sequence_with_an_unknown_label():
    pred, borders = torch.tensor([1, 9, 1, 2]), torch.tensor([0, 2, 4], dtype=torch.int32)
    counts = torch.tensor([[5, 5, 5], [7, 7, 7]])
    with pytest.raises(RuntimeError, match="a label that is not in tags"):
        torch.ops.kloss.span_counts_(pred, pred, borders, torch.tensor([0, 1]), *named().values(), counts)
    assert counts.tolist() == [[5, 5, 5], [8, 8, 8]]
    torch.ops.kloss.span_counts_(pred[2:], pred[2:], borders[:2], torch.tensor([0]), *named().values(), counts)
    assert counts.tolist() == [[6, 6, 6], [8, 8, 8]]


@pytest.mark.parametrize("slots", [(0, 128, 256), (126, 127, 128), (127, 255, 383)])
def test_slots_whose_bytes_would_be_the_same_stay_apart(slots):
    tags, types = label_layout(NAMES)
    far = dict(tags=torch.tensor(tags), types=torch.tensor([-1, *(slots[n] for n in types[1:])]))
    pred, gold, borders, group, groups = batch(np.random.default_rng(5), [9] * 20, differs=0.5)
    for seen in (range(7), (0, 1, 3, 5), (0, 3)):  # all labels; without I; one slot
        left = torch.tensor([label if label in seen else 0 for label in range(7)])
        arguments = left[pred], torch.where(gold < 0, gold, left[gold.clamp(min=0)]), borders, group, groups
        assert torch.equal(all_agree(arguments, **far), all_agree(arguments, **named()))


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "DEFAULT", reason="a processor without AVX2")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="sanitizers slow the fast body more than the other")
def test_the_fast_body_counts():
    """It takes a quarter of the time of the shared body here."""
    arguments = batch(np.random.default_rng(0), [12] * 10_400, groups=52)
    best = dict.fromkeys((shared_ops.span_counts, shared_body), float("inf"))
    for _ in range(15):
        for count in best:
            start = time.perf_counter()
            count(*arguments)
            best[count] = min(best[count], time.perf_counter() - start)
    assert best[shared_ops.span_counts] < best[shared_body] / 2
