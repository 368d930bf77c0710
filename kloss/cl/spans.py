"""Span F1 of BIO label arrays, as seqeval computes it by default."""

from collections.abc import Iterable, Sequence
from itertools import chain
from reprlib import repr  # short
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError

IGNORED = -100  # gold's id of a row that does not count


def f1_from_counts(counts: ArrayLike) -> NDArray[np.float64]:
    """F1 = 2 TP / (predicted + gold); 0 without spans.

    counts: int [..., 3], true positives, predicted and gold spans.

    >>> f1_from_counts([[1, 2, 2], [0, 0, 0]]).tolist()
    [0.5, 0.0]
    """
    counts = np.asarray(counts)
    return 2.0 * counts[..., 0] / np.maximum(counts[..., 1] + counts[..., 2], 1)


def label_layout(labels: Sequence[str]) -> tuple[list[int], list[int]]:
    """Tag and slot type of each BIO label.

    labels: names by id.
    Returns (tags, types), both by id: 0, 1, 2 for O, B, I; the index of the slot type, -1 for O.
    Raises UserError for a label that is not BIO.

    >>> label_layout(("O", "B-date", "B-time", "I-date"))
    ([0, 1, 1, 2], [-1, 0, 1, 0])
    """
    for label in labels:
        if label != "O" and label[:2] not in ("B-", "I-"):
            raise UserError(f"label {label!r} is not a BIO label: allowed are O, B-<type> and I-<type>")
    types = {name: n for n, name in enumerate(slot_names(labels))}
    return ["OBI".index(label[0]) for label in labels], [types.get(label[2:], -1) for label in labels]


def slot_names(labels: Sequence[str]) -> list[str]:
    """The slot types of BIO labels, by the index that `label_layout` gives them."""
    return list(dict.fromkeys(label[2:] for label in labels if label != "O"))


def span_f1(
    pred: Any,
    gold: Any,
    cu_seqlens: Any = None,
    group: Any = None,
    num_groups: int | None = None,
    labels: Sequence[str] | None = None,
) -> float | NDArray[np.float64]:
    """Micro F1 of BIO spans, for all groups (languages) at once.

    An I-x after O or after another type opens a span. No span crosses a sequence border.

    pred, gold: label ids of packed rows, int [T]. Rows with gold -100 are dropped from both.
        Or one entry per sequence: lists or arrays of ids, a padded array [S, L], or seqeval's lists of label names.
    cu_seqlens: int [S+1], borders of packed sequences; None: one sequence.
    group: int [S], group of each sequence.
    num_groups: None: as many as `group` names.
    labels: names by id. None: O, then pairs B-x, I-x; for label names those that occur.
    Returns a float in 0..1. With `group`: float64 [num_groups], NaN for a group without sequences, 0 without spans.
    Raises UserError for lengths that differ and for labels that are not BIO; with its place for an entry outside the labels.

    >>> span_f1([["B-x", "I-x", "O", "B-y"]], [["B-x", "I-x", "O", "B-x"]])
    0.5
    >>> span_f1([[1, 2, 0], [1, 1]], [[1, 2, 0], [1, -100]], labels=("O", "B-x", "I-x"))
    1.0
    """
    import torch

    from ..kernels import span_counts

    (pred, lengths), (gold, gold_lengths) = _flat("pred", pred), _flat("gold", gold)
    if lengths != gold_lengths:
        raise UserError("pred and gold must hold the same sequences, of the same lengths")
    if len(pred) != len(gold):
        raise UserError(f"pred and gold must be [T], of one length, not [{len(pred)}] and [{len(gold)}]")
    if labels is None and isinstance(pred, list) != isinstance(gold, list):
        raise UserError("pred and gold must both hold ids or both hold names, unless labels says which id a name has")
    if isinstance(gold, list) and labels is None:
        labels = tuple(dict.fromkeys([*gold, *pred]))
    pred, gold = (_ids(name, side, labels, lengths) for name, side in (("pred", pred), ("gold", gold)))
    if lengths is None:
        borders = np.array([0, len(gold)]) if cu_seqlens is None else _column("cu_seqlens", cu_seqlens)
    elif cu_seqlens is None:
        borders = np.cumsum([0, *lengths])
    else:
        raise UserError("cu_seqlens is for packed rows; pred and gold have one entry per sequence")
    S, narrow = max(0, len(borders) - 1), borders.astype(np.int32)
    borders = narrow if np.array_equal(narrow, borders) else borders
    groups = np.zeros(S, np.int64) if group is None else _column("group", group)
    if len(groups) != S:
        raise UserError(f"group must be [{S}], one number a sequence, not [{len(groups)}]")
    if num_groups is None:
        num_groups = int(groups.max()) + 1 if S else 1
    tags, types = (None, None) if labels is None else (torch.tensor(v, dtype=torch.int64) for v in label_layout(labels))
    rows, sequences = (tuple(map(torch.from_numpy, columns)) for columns in ((pred, gold), (borders, groups)))
    try:
        counts = span_counts(rows[0], rows[1], sequences[0], sequences[1], num_groups, tags=tags, types=types)
    except ValueError as error:
        counted = (gold != IGNORED) & (np.arange(len(gold)) < borders.max(initial=0))
        for name, ids in (("pred", pred), ("gold", gold)):
            _refuse_outside(name, ids, counted, labels, lengths)
        raise UserError(str(error)) from error
    f1 = f1_from_counts(counts.numpy())
    if group is None:
        return float(f1[0])
    return np.where(np.bincount(groups, minlength=num_groups) > 0, f1, np.nan)


def _flat(name: str, side: Any) -> tuple[NDArray[np.int64] | list[str], list[int] | None]:
    """The entries of all sequences end to end, ids or names, and the length of each sequence, None for packed rows."""
    if hasattr(side, "detach"):  # a tensor
        side = side.tolist() if side.is_floating_point() else side.detach().cpu().numpy()
    if isinstance(side, np.ndarray) and side.dtype.kind in "iu" and side.ndim in (1, 2):
        numbers = np.require(side.reshape(-1), np.int64, ("A", "C", "W", "E"))  # what torch takes, without a copy if it is that
        return numbers, None if side.ndim == 1 else [side.shape[1]] * side.shape[0]
    side = _plain(side)
    if isinstance(side, str) or not isinstance(side, Iterable):
        raise UserError(f"{name} must be lists or arrays of label ids or names, not {repr(side)}")
    rows: list[Any] = [_plain(row) for row in side]
    lengths = None
    if any(isinstance(row, list | tuple) for row in rows):
        wrong = next((s for s, row in enumerate(rows) if not isinstance(row, list | tuple)), None)
        if wrong is not None:
            raise UserError(f"{name}[{wrong}] is {repr(rows[wrong])}, other entries are sequences")
        lengths, rows = [len(row) for row in rows], list(chain.from_iterable(rows))
    kinds = set(map(type, rows))
    if not kinds <= {int, str}:
        rows = list(map(_plain, rows))
        kinds = set(map(type, rows))
    if kinds <= {int} and all(-(2**63) <= bound < 2**63 for bound in ((min(rows), max(rows)) if rows else ())):
        return np.array(rows, np.int64), lengths
    if kinds == {str} and lengths is not None:
        return rows, lengths
    if kinds == {str}:
        raise UserError(f"{name} holds label names outside sequences: one list of names per sequence is needed")
    expected = str if type(rows[0]) is str else int
    t = next(t for t, entry in enumerate(rows) if type(entry) is not expected or (type(entry) is int and abs(entry) >= 2**63))
    raise UserError(f"{_place(name, t, lengths)} is {repr(rows[t])}; all entries must be integers, or all label names")


def _plain(value: Any) -> Any:
    """An array, or a number or text of numpy's or torch's, as Python's."""
    return value.tolist() if hasattr(value, "tolist") else value


def _column(name: str, values: Any) -> NDArray[np.int64]:
    numbers, lengths = _flat(name, values)
    if lengths is not None or isinstance(numbers, list):
        raise UserError(f"{name} must be one list of integers")
    return numbers


def _ids(
    name: str, side: NDArray[np.int64] | list[str], labels: Sequence[str] | None, lengths: list[int] | None
) -> NDArray[np.int64]:
    """The ids of a side that may hold names."""
    if not isinstance(side, list):
        return side
    ids = {label: n for n, label in enumerate(labels or ())}
    unknown = next((t for t, label in enumerate(side) if label not in ids), None)
    if unknown is not None:
        raise UserError(f"{_place(name, unknown, lengths)} is {repr(side[unknown])}, none of the {len(ids)} labels")
    return np.array([ids[label] for label in side], np.int64)


def _refuse_outside(
    name: str, ids: NDArray[np.int64], counted: NDArray[np.bool_], labels: Sequence[str] | None, lengths: list[int] | None
) -> None:
    """Raise UserError with the place of the first counted id that is no label's."""
    outside = counted & ((ids < 0) if labels is None else (ids < 0) | (ids >= len(labels)))
    if outside.any():
        t = int(outside.argmax())
        allowed = "0 or more" if labels is None else f"0 to {len(labels) - 1}"
        raise UserError(f"{_place(name, t, lengths)} is {ids[t]}, allowed are {allowed}, and {IGNORED} in gold for a row to skip")


def _place(name: str, t: int, lengths: list[int] | None) -> str:
    """Where entry t stands, as one would index it."""
    if lengths is None:
        return f"{name}[{t}]"
    ends = np.cumsum(lengths)
    s = int(np.searchsorted(ends, t, side="right"))
    return f"{name}[{s}][{t - int(ends[s]) + lengths[s]}]"
