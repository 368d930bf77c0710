"""Span F1 against seqeval: fuzzed, from a file of predictions, and the example seqeval publishes."""

import itertools
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from kloss.cl.metrics import span_f1
from kloss.cl.spans import f1_from_counts, label_layout
from kloss.errors import UserError
from kloss.kernels import reference, span_counts

IGNORED = -100
PAIRS = ("O", "B-a", "I-a", "B-b", "I-b", "B-c", "I-c")  # the layout taken when no names are given
SORTED = ("O", "B-a", "B-b", "B-date-time", "I-b", "I-c", "I-a")  # c has no B, date-time no I


@pytest.fixture
def seqeval_f1():
    return pytest.importorskip("seqeval.metrics", reason="seqeval is not installed").f1_score


def seqeval_counts(pred, gold):
    """TP, predicted and gold spans of lists of label names, from seqeval's own span finder."""
    get_entities = pytest.importorskip("seqeval.metrics.sequence_labeling").get_entities
    pred, gold = set(get_entities(pred)), set(get_entities(gold))
    return [len(pred & gold), len(pred), len(gold)]


def random_predictions(labels, sequences, groups, seed):
    """Packed predictions and gold, uniform over `labels` (most BIO malformed), with ignored rows."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 12, sequences)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
    gold = rng.choice(len(labels), cu_seqlens[-1], p=[0.4] + [0.6 / (len(labels) - 1)] * (len(labels) - 1))
    pred = np.where(rng.random(len(gold)) < 0.25, rng.integers(0, len(labels), len(gold)), gold)
    gold[rng.random(len(gold)) < 0.2] = IGNORED
    return pred, gold, cu_seqlens, rng.integers(0, groups, sequences)


def unpacked(pred, gold, cu_seqlens, labels):
    """Two lists of lists of label names, without the ignored rows, as seqeval wants them."""
    keep = [np.flatnonzero(gold[a:b] != IGNORED) + a for a, b in itertools.pairwise(cu_seqlens)]
    return tuple([[labels[i] for i in side[rows]] for rows in keep] for side in (pred, gold))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("labels", [PAIRS, SORTED], ids=["pairs", "sorted"])
def test_equals_seqeval_on_random_labels_all_groups_at_once(labels, seqeval_f1):
    pred, gold, cu_seqlens, group = random_predictions(labels, 5000, groups=53, seed=len(set(labels)))
    group[group == 7] = 8  # a group without a sequence
    names = None if labels is PAIRS else labels
    result = span_f1(pred, gold, cu_seqlens, group, num_groups=53, labels=names)
    p, g = unpacked(pred, gold, cu_seqlens, labels)
    for n in range(53):
        mine = np.flatnonzero(group == n)
        expected = seqeval_f1([g[s] for s in mine], [p[s] for s in mine]) if len(mine) else np.nan
        np.testing.assert_allclose(result[n], expected, rtol=0, atol=1e-12)
    assert np.isnan(result[7]) and 0.3 < np.nanmin(result) < np.nanmax(result) < 0.9
    assert span_f1(pred, gold, cu_seqlens, labels=names) == pytest.approx(seqeval_f1(g, p), abs=1e-12)
    np.testing.assert_array_equal(span_f1(p, g, group=group, num_groups=53), result)


@pytest.mark.parametrize("counts", [span_counts, reference.span_counts], ids=["op", "reference"])
@pytest.mark.parametrize("labels", [PAIRS, SORTED], ids=["pairs", "sorted"])
def test_counts_equal_seqeval_sequence_by_sequence(labels, counts):
    """Every sequence its own group: where a sum over many would hide two errors, this does not."""
    pred, gold, cu_seqlens, _ = random_predictions(labels, 1000, groups=1, seed=3)
    padding = np.full(9, 1)  # rows behind the last border belong to no sequence
    tags, types = (None, None) if labels is PAIRS else map(torch.tensor, label_layout(labels))
    pred_padded, gold_padded = (torch.tensor(np.append(side, padding)) for side in (pred, gold))
    borders = torch.tensor(cu_seqlens, dtype=torch.int32)
    result = counts(pred_padded, gold_padded, borders, torch.arange(1000), 1000, tags=tags, types=types)
    assert result.dtype == torch.int64
    expected = [seqeval_counts(*both) for both in zip(*unpacked(pred, gold, cu_seqlens, labels), strict=True)]
    assert result.tolist() == expected


MALFORMED = [  # gold, predicted, counts that conlleval gives
    ("O I-a I-a", "O B-a I-a", [1, 1, 1]),  # I behind O opens a span
    ("B-a I-b", "B-a O", [1, 1, 2]),  # I of another type opens a span
    ("I-a B-a", "I-a I-a", [0, 1, 2]),  # B always opens one
    ("B-a I-a I-a", "B-a I-a O", [0, 1, 1]),  # same start, other end
    ("B-a I-a", "B-b I-b", [0, 1, 1]),  # same place, other type
    ("O O", "O O", [0, 0, 0]),
]


@pytest.mark.parametrize(("gold", "pred", "counts"), MALFORMED)
def test_malformed_labels(gold, pred, counts):
    gold, pred = gold.split(), pred.split()
    assert seqeval_counts(pred, gold) == counts
    assert span_f1([pred], [gold]) == f1_from_counts(counts)


def test_no_span_crosses_a_border():
    assert span_f1([["B-a"], ["I-a"]], [["B-a"], ["B-a"]]) == 1.0
    assert span_f1([["B-a", "I-a"]], [["B-a", "B-a"]]) == 0.0


def test_ignored_rows_are_as_if_they_were_not_there():
    """A span goes on over the subwords of a word, which carry no label."""
    gold, pred = [1, IGNORED, IGNORED, 2, IGNORED, 0], [1, 3, 0, 2, 1, 0]
    assert span_f1(pred, gold) == 1.0


def read_predictions(path):
    """locale -> (predicted, gold), lists of lists of label names."""
    result = {}
    for block in path.read_text(encoding="utf-8").split("\n\n")[1:]:
        head, *rows = block.strip().splitlines()
        pred, gold = result.setdefault(head.removeprefix("# locale = "), ([], []))
        _, g, p = zip(*(row.split("\t") for row in rows), strict=True)
        pred.append(list(p))
        gold.append(list(g))
    return result


def test_a_file_of_predictions(seqeval_f1):
    languages = read_predictions(Path(__file__).parent / "golden" / "spans.tsv")
    assert len(languages) == 5
    pred = [s for p, _ in languages.values() for s in p]
    gold = [s for _, g in languages.values() for s in g]
    group = [n for n, (p, _) in enumerate(languages.values()) for _ in p]
    expected = [seqeval_f1(g, p) for p, g in languages.values()]
    np.testing.assert_allclose(span_f1(pred, gold, group=group), expected, rtol=0, atol=1e-12)
    assert span_f1(pred, gold) == pytest.approx(seqeval_f1(gold, pred), abs=1e-12)
    assert len(set(expected)) == 5 and all(0 < f1 < 1 for f1 in expected)


def test_the_example_seqeval_publishes():
    gold = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    pred = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
    assert span_f1(pred, gold) == 0.5


def test_lengths_that_differ_are_refused():
    with pytest.raises(UserError, match="same lengths"):
        span_f1([["O"]], [["O", "O"]])
    with pytest.raises(UserError, match=r"not \[2\] and \[3\]"):
        span_f1([0, 0], [0, 0, 0])
    with pytest.raises(UserError, match=r"group must be \[2\]"):
        span_f1([0, 0], [0, 0], [0, 1, 2], group=[0])


def test_no_sequence_at_all():
    assert span_f1([], []) == 0.0


IDS = [[1, 2, 0], [3, 4, 4, 0], [0]]  # of PAIRS
GUESS = [[1, 2, 0], [3, 4, 0, 0], [5]]  # one of three spans right, one too short, one too many


def padded(rows):
    """int [S, L], behind each row -100."""
    return np.array([row + [IGNORED] * (4 - len(row)) for row in rows])


def named(rows):
    return [[PAIRS[label] for label in row] for row in rows]


FORMS = {
    "lists of ids": (GUESS, IDS),
    "tuples": (tuple(map(tuple, GUESS)), tuple(map(tuple, IDS))),
    "lists of numpy's numbers": [[list(np.array(row)) for row in side] for side in (GUESS, IDS)],
    "lists of arrays": [[np.array(row, np.int32) for row in side] for side in (GUESS, IDS)],
    "an array of arrays": [np.array([np.array(row) for row in side], dtype=object) for side in (GUESS, IDS)],
    "lists of tensors": [list(map(torch.tensor, side)) for side in (GUESS, IDS)],
    "a padded array": (padded(GUESS), padded(IDS)),
    "a padded tensor": (torch.tensor(padded(GUESS)), torch.tensor(padded(IDS))),
    "padded lists": (padded(GUESS).tolist(), padded(IDS).tolist()),
    "lists of names": (named(GUESS), named(IDS)),
    "lists of arrays of names": [list(map(np.array, named(side))) for side in (GUESS, IDS)],
    "names and ids": (named(GUESS), IDS),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_that_a_trainer_or_seqeval_hands_over(form):
    pred, gold = FORMS[form]
    assert span_f1(pred, gold, labels=PAIRS) == pytest.approx(2 * 1 / (3 + 2))
    np.testing.assert_allclose(span_f1(pred, gold, group=[0, 2, 2], labels=PAIRS), [1, np.nan, 0])


MANY = ("O", *(f"{tag}-s{i}" for i in range(60) for tag in "BI"))  # 121, as many as MASSIVE's
TENSOR = torch.tensor([[1, 2], [0, 0]])


@pytest.mark.parametrize(
    ("pred", "gold", "more", "message"),
    [
        ([-100, 1], [21, 1], dict(labels=MANY), r"^pred\[0\] is -100, allowed are 0 to 120, and -100 in gold"),
        ([[1, 2], [0, -100]], [[1, 2], [0, 0]], dict(labels=MANY), r"^pred\[1\]\[1\] is -100"),
        ([1, 2, 121], [1, 2, 0], dict(labels=MANY), r"^pred\[2\] is 121, allowed are 0 to 120"),
        ([1, 2, 0], [1, 2, 121], dict(labels=MANY), r"^gold\[2\] is 121"),
        ([1, 2, 0], [1, 2, -1], {}, r"^gold\[2\] is -1, allowed are 0 or more"),
        ([1, 2, -100], [1, 2, 0], {}, r"^pred\[2\] is -100"),
        ([1, 2, 0], [1, 2, "O"], {}, r"^gold\[2\] is 'O'; all entries must be"),
        ([1, 2, 0.5], [1, 2, 0], {}, r"^pred\[2\] is 0.5"),
        ([1, 2, True], [1, 2, 0], {}, r"^pred\[2\] is True"),
        ([1, 2, 2**70], [1, 2, 0], {}, r"^pred\[2\] is 118"),
        ([[1], [2], [None]], [[1], [2], [0]], {}, r"^pred\[2\]\[0\] is None"),
        ([[1], 2], [[1], [2]], {}, r"^pred\[1\] is 2, other entries are sequences"),
        ([["O"], ["O", 3]], [["O"], ["O", "O"]], {}, r"^pred\[1\]\[1\] is 3"),
        ([["O"], ["O", "x"]], [["O"], ["O", "O"]], {}, "'x' is not a BIO label"),
        ([["O"], ["O", "B-z"]], [["O"], ["O", "O"]], dict(labels=PAIRS), r"^pred\[1\]\[1\] is 'B-z', none of the 7 labels"),
        (["O", "B-a"], ["O", "B-a"], {}, "one list of names per sequence"),
        ([["O"]], [[0]], {}, "both hold ids or both hold names"),
        ([[0]], [[0]], dict(cu_seqlens=[0, 1]), "cu_seqlens is for packed rows"),
        (TENSOR.float(), TENSOR, {}, r"^pred\[0\]\[0\] is 1.0"),
        (TENSOR.bfloat16(), TENSOR, {}, r"^pred\[0\]\[0\] is 1.0"),
        (TENSOR[None], TENSOR[None], {}, r"^pred\[0\]\[0\] is \[1, 2\]"),
        (3, 3, {}, "not 3"),
        (None, None, {}, "not None"),
        ("O", "O", {}, "not 'O'"),
        ([0, 0], [0, 0], dict(cu_seqlens=[0, 3]), "within the 2 rows there are, got 3"),
        ([0, 0], [0, 0], dict(cu_seqlens=[0, 2, 1]), "not decrease"),
        ([0, 0], [0, 0], dict(cu_seqlens=[0.0, 2.0]), r"^cu_seqlens\[0\] is 0.0"),
        ([0, 0], [0, 0], dict(group=[2], num_groups=2), r"group must lie in \[0, 2\), got 2..2"),
        ([0, 0], [0, 0], dict(group=[0], num_groups=0), r"group must lie in \[0, 0\)"),
        ([0, 0], [0, 0], dict(group=[-1]), "group must lie in"),
        ([0, 0], [0, 0], dict(group=["de"]), "^group holds label names"),
    ],
)
def test_entries_of_another_kind_or_outside_the_labels_are_named(pred, gold, more, message):
    with pytest.raises(UserError, match=message):
        span_f1(pred, gold, **more)


def test_predictions_where_gold_is_ignored_or_behind_the_last_border_do_not_matter():
    assert span_f1([1, -100, 999, 5], [1, -100, -100, 999], [0, 3], labels=PAIRS) == 1.0


def test_no_groups():
    assert span_f1([], [], [0], group=[], num_groups=0).shape == (0,)
    assert span_f1([], [], [0], group=[], num_groups=2).tolist() == pytest.approx([np.nan] * 2, nan_ok=True)


def test_arrays_that_torch_does_not_take_as_they_are():
    """Read-only, backwards, of the other byte order, between other bytes; none is written to, and torch does not warn."""
    pred, gold = (np.array([label for row in side for label in row]) for side in (GUESS, IDS))
    fixed, packed = pred.copy(), np.zeros(len(pred), [("pad", "i1"), ("label", "i8")])
    fixed.setflags(write=False)
    packed["label"] = pred
    swapped, backwards = pred.astype(pred.dtype.newbyteorder()), pred[::-1].copy()[::-1]
    borders = [0, *itertools.accumulate(map(len, IDS))]
    wanted = span_f1(pred.tolist(), gold, borders)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for side in (fixed, packed["label"], swapped, backwards, pred.astype(np.uint8)):
            assert span_f1(side, gold, borders) == wanted and side.tolist() == pred.tolist()


def test_borders_beyond_32_bits_are_not_wrapped():
    for borders in ([0, 2**32 + 2], [0, 2**32, 2], [2**32, 2**32 + 2]):
        with pytest.raises(UserError, match="cu_seqlens must"):
            span_f1([0, 0], [0, 0], borders)
        with pytest.raises(ValueError, match="cu_seqlens must"):
            span_counts(*torch.zeros(2, 2, dtype=torch.int64), torch.tensor(borders), torch.zeros(len(borders) - 1).long(), 1)
