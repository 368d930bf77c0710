"""Span F1 of BIO label arrays, as seqeval computes it by default."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError


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
    types = {name: n for n, name in enumerate(dict.fromkeys(label[2:] for label in labels if label != "O"))}
    return ["OBI".index(label[0]) for label in labels], [types.get(label[2:], -1) for label in labels]


def span_f1(
    pred: Any,
    gold: Any,
    cu_seqlens: ArrayLike | None = None,
    group: ArrayLike | None = None,
    num_groups: int | None = None,
    labels: Sequence[str] | None = None,
) -> float | NDArray[np.float64]:
    """Micro F1 of BIO spans, for all groups (languages) at once.

    An I-x after O or after another type opens a span. No span crosses a sequence border.

    pred, gold: int [T], label ids of packed rows. Rows with gold -100 are dropped from both.
        Or seqeval's form: lists of label names, one list per sequence.
    cu_seqlens: int [S+1], borders of the sequences; None: one sequence.
    group: int [S], group of each sequence.
    labels: names by id; None: O, then pairs B-x, I-x.
    Returns a float in 0..1. With `group`: float64 [num_groups], NaN for a group without sequences, 0 without spans.
    Raises UserError for lengths that differ and for labels that are not BIO.

    >>> span_f1([["B-x", "I-x", "O", "B-y"]], [["B-x", "I-x", "O", "B-x"]])
    0.5
    """
    import torch

    from ..kernels import span_counts

    if len(gold) and isinstance(gold[0], (list, tuple)):
        if [len(names) for names in pred] != [len(names) for names in gold]:
            raise UserError("pred and gold must hold the same sequences, of the same lengths")
        labels = tuple(dict.fromkeys(name for side in (gold, pred) for names in side for name in names))
        ids = {name: n for n, name in enumerate(labels)}
        cu_seqlens = np.cumsum([0, *map(len, gold)])
        pred, gold = ([ids[name] for names in side for name in names] for side in (pred, gold))
    pred, gold = torch.as_tensor(pred), torch.as_tensor(gold)
    if pred.shape != gold.shape or pred.ndim != 1:
        raise UserError(f"pred and gold must be [T], of one length, not {list(pred.shape)} and {list(gold.shape)}")
    borders = torch.as_tensor([0, len(gold)] if cu_seqlens is None else cu_seqlens, device=gold.device)
    S = len(borders) - 1
    groups = torch.zeros(S, dtype=torch.int64) if group is None else torch.as_tensor(group)
    if groups.shape != (S,):
        raise UserError(f"group must be [{S}], one number a sequence, not {list(groups.shape)}")
    num_groups = num_groups or (int(groups.max()) + 1 if S else 1)
    tags, types = (None, None) if labels is None else (torch.tensor(v, device=gold.device) for v in label_layout(labels))
    counts = span_counts(pred, gold, borders, groups.to(gold.device), num_groups, tags=tags, types=types)
    f1 = f1_from_counts(counts.cpu().numpy())
    if group is None:
        return float(f1[0])
    return np.where(np.bincount(groups.cpu().numpy(), minlength=num_groups) > 0, f1, np.nan)
