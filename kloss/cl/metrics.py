"""Metrics of a score matrix R, span F1 of label arrays, and the interval and test used to compare groups.

R is (T+1) x T: R[i, j] = F1 (0 to 1) on the j-th language of the order after training step i; row 0 is
before any training. NaN (None in JSON) = not measured. Everywhere: a term that needs a cell not measured is
left out of its mean, a mean of no terms is NaN, and a *sum* with a missing term is NaN. T = 1 leaves most
metrics without terms: NaN.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np

from kloss.errors import UserError


def measured_mean(values, axis=None):
    """Mean over what was measured, that is not NaN (None); NaN where nothing was.

    >>> float(measured_mean([0.25, None, 0.75]))
    0.5
    """
    values = np.asarray(values, dtype=np.float64)
    measured = ~np.isnan(values)
    count = measured.sum(axis)
    total = np.where(measured, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _matrix(R):
    R = np.array(R, dtype=np.float64)  # None becomes NaN
    if R.ndim != 2 or R.shape[0] != R.shape[1] + 1:
        raise UserError(f"a score matrix must be (T+1) x T, row 0 before training, not of shape {R.shape}")
    return R


def _before(T):
    """bool [T, T]: language j (column) was trained before step i (row)."""
    return np.tri(T, k=-1, dtype=bool)


def _one_of(name, value, allowed):
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def f1_per_step(R):
    """[T]: after step t, the mean F1 over the languages seen, 1/t sum_{j<=t} R[t,j].

    >>> f1_per_step([[0, 0], [.8, .2], [.4, .6]]).tolist()
    [0.8, 0.5]
    """
    R = _matrix(R)
    return measured_mean(np.where(np.tri(R.shape[1], dtype=bool), R[1:], np.nan), axis=1)


def forward_transfer(R):
    """CFT = 1/(T-1) sum_{i=1}^{T-1} 1/(T-i) sum_{j>i} R[i,j]: F1 on languages not yet trained.

    Our choice of formula, after Winata et al. (2023, arXiv 2305.16252).

    >>> float(forward_transfer([[0, 0, 0], [.8, .2, .4], [.5, .7, .1], [.4, .5, .6]]))
    0.2
    """
    R = _matrix(R)
    later = _before(R.shape[1]).T
    return float(measured_mean(measured_mean(np.where(later, R[1:], np.nan), axis=1)))


def backward_transfer_per_step(R):
    """[T]: CBT after step t = 1/(t-1) sum_{i<t} (R[t,i] - R[i,i]); NaN at t = 1. Negative = forgotten.

    >>> backward_transfer_per_step([[0, 0, 0], [.75, 0, 0], [.5, .5, 0], [.25, .5, .5]]).tolist()
    [nan, -0.25, -0.25]
    """
    R = _matrix(R)
    change = R[1:] - np.diagonal(R[1:])
    return measured_mean(np.where(_before(R.shape[1]), change, np.nan), axis=1)


def backward_transfer(R):
    """CBT = 1/(T-1) sum_{i<T} (R[T,i] - R[i,i]) (Winata et al. 2023). Negative = forgotten.

    The BWT of Lopez-Paz & Ranzato (2017) is the same formula.

    >>> backward_transfer([[0, 0], [.75, 0], [.25, .5]])
    -0.5
    """
    return float(backward_transfer_per_step(R)[-1])


def gem_forward_transfer(R):
    """FWT = 1/(T-1) sum_{i=2}^T (R[i-1,i] - R[0,i]): what a language gained before its turn came.

    Lopez-Paz & Ranzato (2017); their baseline, a model at random initialisation, is row 0.

    >>> gem_forward_transfer([[.25, .25], [.75, .5], [.5, .5]])
    0.25
    """
    R = _matrix(R)
    return float(measured_mean(np.diagonal(R[1:], offset=1) - R[0, 1:]))


def forgetting_per_step(R, *, include_last=False):
    """[T]: after step t, mean over i<t of max_k R[k,i] - R[t,i]; NaN at t = 1.

    The maximum is over k = 1..t-1, *without* the row it is compared to, so a language that still improves
    counts as negative forgetting. `include_last` lets k run to t: never negative. Row 0 never counts.
    The last entry is the forgetting of Chaudhry et al. (2018).

    >>> forgetting_per_step([[0, 0, 0], [.5, 0, 0], [.75, .5, 0], [.25, .75, .5]]).tolist()
    [nan, -0.25, 0.125]
    >>> forgetting_per_step([[0, 0, 0], [.5, 0, 0], [.75, .5, 0], [.25, .75, .5]], include_last=True).tolist()
    [nan, 0.0, 0.25]
    """
    R = _matrix(R)
    best = np.fmax.accumulate(R[1:], axis=0)  # fmax passes over NaN
    if not include_last:
        best = np.vstack([np.full((1, R.shape[1]), np.nan), best[:-1]])
    return measured_mean(np.where(_before(R.shape[1]), best - R[1:], np.nan), axis=1)


def forgetting(R, *, include_last=False):
    """Forgetting after M'hamdi et al. (2022): `forgetting_per_step`, averaged over steps 2..T.

    arXiv 2205.11152. Positive = forgotten. The maximum leaves out the row compared to, unless `include_last`.

    >>> forgetting([[0, 0], [.75, 0], [.25, .5]])
    0.5
    """
    return float(measured_mean(forgetting_per_step(R, include_last=include_last)))


def multi_hop_backward_transfer(R, reading="impact"):
    """[T], by position: MBT of each language, in one of two readings.

    "impact", what training it did to the earlier ones: 1/(i-1) sum_{j<i} (R[i,j] - R[i-1,j]); NaN for the
    first. "retention", what later training did to it: the mean over hops h = 1..T-i of R[i+h,i] - R[i,i];
    NaN for the last. Both are our readings: the paper's own formula (arXiv 2504.20356) was not at hand.

    >>> R = [[0, 0, 0], [.75, 0, 0], [.5, .5, 0], [.25, .25, .5]]
    >>> multi_hop_backward_transfer(R).tolist()
    [nan, -0.25, -0.25]
    >>> multi_hop_backward_transfer(R, reading="retention").tolist()
    [-0.375, -0.25, nan]
    """
    _one_of("reading", reading, ("impact", "retention"))
    if reading == "retention":
        return measured_mean(retention_by_hop(R), axis=1)
    R = _matrix(R)
    return measured_mean(np.where(_before(R.shape[1]), np.diff(R, axis=0), np.nan), axis=1)


def multi_hop_forward_transfer(R, reading="impact"):
    """[T], by position: MFT of each language, in one of two readings.

    "impact", what training it gave the later ones: 1/(T-i) sum_{j>i} (R[i,j] - R[i-1,j]); NaN for the last.
    "retention", what earlier training gave it: the mean over hops h = 1..i-1 of R[i-h,i] - R[0,i]; NaN for
    the first. Our readings, as in `multi_hop_backward_transfer`.

    >>> R = [[0, 0, 0], [.75, .25, .25], [.5, .5, .5], [.25, .25, .5]]
    >>> multi_hop_forward_transfer(R).tolist()
    [0.25, 0.25, nan]
    >>> multi_hop_forward_transfer(R, reading="retention").tolist()
    [nan, 0.25, 0.375]
    """
    _one_of("reading", reading, ("impact", "retention"))
    if reading == "retention":
        return measured_mean(retention_by_hop(R, "forward"), axis=1)
    R = _matrix(R)
    return measured_mean(np.where(_before(R.shape[1]).T, np.diff(R, axis=0), np.nan), axis=1)


def forgetting_by_cause(R):
    """[T]: sum_{j<i} (R[i,j] - R[i-1,j]), what step i did to all before it; the steps add up to (T-1) CBT.

    The MBT of reading "impact", un-normalised: it splits all forgetting by its cause.

    >>> R = [[0, 0, 0], [.75, 0, 0], [.5, .5, 0], [.25, .5, .5]]
    >>> forgetting_by_cause(R).tolist(), 2 * backward_transfer(R)
    ([0.0, -0.25, -0.25], -0.5)
    """
    R = _matrix(R)
    return np.where(_before(R.shape[1]), np.diff(R, axis=0), 0.0).sum(axis=1)


def retention_by_hop(R, direction="backward"):
    """[T, T-1]: language i (row) h hops (column h-1) from its own step; NaN outside the sequence.

    "backward": R[i+h,i] - R[i,i], h steps after its own. "forward": R[i-h,i] - R[0,i], h steps before it.

    >>> retention_by_hop([[0, 0, 0], [.75, 0, 0], [.5, .5, 0], [.25, .25, .5]]).tolist()
    [[-0.25, -0.5], [-0.25, nan], [nan, nan]]
    """
    _one_of("direction", direction, ("backward", "forward"))
    R = _matrix(R)
    T = R.shape[1]
    position, hops = np.arange(1, T + 1)[:, None], np.arange(1, T)[None, :]
    row = position + (hops if direction == "backward" else -hops)
    base = np.diagonal(R[1:]) if direction == "backward" else R[0]
    change = R[np.clip(row, 0, T), position - 1] - base[:, None]
    return np.where((row >= 1) & (row <= T), change, np.nan)


def retention_curve(R, direction="backward"):
    """[T-1]: `retention_by_hop` averaged over languages, by hops h = 1..T-1; entry h is of T-h languages.

    >>> retention_curve([[0, 0, 0], [.75, 0, 0], [.5, .5, 0], [.25, .25, .5]]).tolist()
    [-0.25, -0.5]
    """
    return measured_mean(retention_by_hop(R, direction), axis=0)


def is_sequential(R):
    """Whether R is (T+1) x T with T > 1; if not, it must be 2 x T, before and after one training step."""
    shape = np.shape(R)
    if len(shape) != 2 or shape[1] == 0 or shape[0] not in (2, shape[1] + 1):
        raise UserError(f"a score matrix must be (T+1) x T, or 2 x T (joint training), not {shape}")
    return shape[0] == shape[1] + 1 and shape[1] > 1


def summarise(R):
    """Every metric of one run, JSON-ready: floats, lists by position in the order, None where undefined.

    R is (T+1) x T, or 2 x T for joint training, where only f1, f1_per_step (one entry) and worst are defined.

    >>> summary = summarise([[0, 0], [.75, 0], [.25, .5]])
    >>> summary["f1"], summary["worst"], summary["worst_position"], summary["cbt"], summary["cbt_per_step"]
    (0.375, 0.25, 1, -0.5, [None, -0.5])
    """
    sequential = is_sequential(R)
    R = np.array(R, dtype=np.float64)
    last = R[-1]
    worst = None if np.isnan(last).all() else int(np.nanargmin(last))
    result = {
        "f1": measured_mean(last),
        "f1_per_step": f1_per_step(R) if sequential else [measured_mean(last)],
        "worst": None if worst is None else last[worst],
        "worst_position": None if worst is None else worst + 1,
    }
    metrics = {
        "cft": forward_transfer,
        "cbt": backward_transfer,
        "bwt": backward_transfer,
        "fwt": gem_forward_transfer,
        "forgetting": forgetting,
        "forgetting_last": lambda R: forgetting_per_step(R)[-1],
        "forgetting_including_last": lambda R: forgetting(R, include_last=True),
        "cbt_per_step": backward_transfer_per_step,
        "mft_impact": multi_hop_forward_transfer,
        "mbt_impact": multi_hop_backward_transfer,
        "mft_retention": lambda R: multi_hop_forward_transfer(R, "retention"),
        "mbt_retention": lambda R: multi_hop_backward_transfer(R, "retention"),
        "forgetting_by_cause": forgetting_by_cause,
        "retention_curve": retention_curve,
        "retention_curve_forward": lambda R: retention_curve(R, "forward"),
    }
    result |= {name: metric(R) if sequential else None for name, metric in metrics.items()}
    return {name: _json(value) for name, value in result.items()}


def _json(value):
    if value is None or isinstance(value, int):
        return value
    value = np.asarray(value)
    return [_json(v) for v in value] if value.ndim else None if np.isnan(value) else float(value)


def bootstrap_interval(values, *, level=0.95, samples=10000, seed=0):
    """(low, high): percentile bootstrap interval of the mean of `values` [n] (Efron 1979).

    NaN are dropped; fewer than two values give (NaN, NaN): one value has no interval.

    >>> low, high = bootstrap_interval([0.1, 0.2, 0.3, 0.4])
    >>> 0.1 <= low < 0.25 < high <= 0.4, bootstrap_interval([0.5])
    (True, (nan, nan))
    """
    values = np.asarray(values, dtype=np.float64).ravel()
    values = values[~np.isnan(values)]
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, not {level}")
    if len(values) < 2:
        return float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    means = values[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Comparison(NamedTuple):
    difference: float  # mean(a) - mean(b)
    p_value: float  # two-sided


def permutation_test(a, b, *, samples=10000, seed=0):
    """Two-sided permutation test of mean(a) - mean(b), groups of [n] and [m] independent values.

    Exact over all C(n+m, n) splits where these are at most `samples`; else `samples` random ones and
    p = (1 + hits) / (1 + samples) (Phipson & Smyth 2010). NaN are dropped; an empty group gives NaN.
    Give it one value per language, not one per language and seed: seeds are not new languages.

    >>> permutation_test([3, 4, 5], [0, 1, 2])
    Comparison(difference=3.0, p_value=0.1)
    """
    a, b = (np.asarray(x, dtype=np.float64).ravel() for x in (a, b))
    a, b = a[~np.isnan(a)], b[~np.isnan(b)]
    n, m = len(a), len(b)
    if not n or not m:
        return Comparison(float("nan"), float("nan"))
    pool, observed = np.concatenate([a, b]), a.mean() - b.mean()
    exact = comb(n + m, n) <= samples
    if exact:
        first = pool[np.array(list(combinations(range(n + m), n)))].sum(axis=1)
    else:
        first = np.random.default_rng(seed).permuted(np.tile(pool, (samples, 1)), axis=1)[:, :n].sum(axis=1)
    differences = first / n - (pool.sum() - first) / m
    hits = int((np.abs(differences) >= abs(observed) - 1e-12).sum())  # slack: other orders of summing
    return Comparison(float(observed), hits / len(first) if exact else (hits + 1) / (samples + 1))


def f1_from_counts(counts):
    """[...]: F1 = 2 TP / (predicted + gold) of counts [..., 3] (TP, predicted, gold spans); 0 without spans.

    >>> f1_from_counts([[1, 2, 2], [0, 0, 0]]).tolist()
    [0.5, 0.0]
    """
    counts = np.asarray(counts)
    return 2.0 * counts[..., 0] / np.maximum(counts[..., 1] + counts[..., 2], 1)


def label_layout(labels):
    """(tags, types) of BIO label names, by id: 0/1/2 for O/B/I, and the number of the slot type (-1 for O).

    >>> label_layout(("O", "B-date", "B-time", "I-date"))
    ([0, 1, 1, 2], [-1, 0, 1, 0])
    """
    wrong = [name for name in labels if name != "O" and name[:2] not in ("B-", "I-")]
    if wrong:
        raise UserError(f"label {wrong[0]!r} is not a BIO label: allowed are O, B-<type> and I-<type>")
    numbers = {name: n for n, name in enumerate(dict.fromkeys(label[2:] for label in labels if label != "O"))}
    return ["OBI".index(label[0]) for label in labels], [numbers.get(label[2:], -1) for label in labels]


def span_f1(pred, gold, cu_seqlens=None, group=None, num_groups=None, labels=None):
    """Micro F1 of BIO spans as seqeval computes it by default, for all groups (languages) at once.

    pred, gold: int [T] label ids over packed rows, gold -100 = row ignored (dropped from both, as if it were
    not there); cu_seqlens: int [S+1] borders of the sequences (None: one sequence); group: int [S] group of
    each sequence; labels: names by id, from which tags and types are read (None: O, then pairs B-x, I-x).
    Or pred, gold: lists of lists of label names, seqeval's own form, one list a sequence; `group` as above.
    An I-x behind O or behind another type opens a span; no span crosses a sequence border.

    Returns a float in 0..1, or with `group` float64 [num_groups]: NaN for a group without a sequence, 0 for
    one without spans. Raises UserError for lengths that differ, or a label that is not BIO.

    >>> span_f1([["B-x", "I-x", "O", "B-y"]], [["B-x", "I-x", "O", "B-x"]])
    0.5
    """
    import torch

    from kloss.kernels import span_counts

    if len(gold) and isinstance(gold[0], (list, tuple)):
        if [len(s) for s in pred] != [len(s) for s in gold]:
            raise UserError("pred and gold must hold the same sequences, of the same lengths")
        labels = tuple(dict.fromkeys(name for side in (gold, pred) for names in side for name in names))
        ids = {name: n for n, name in enumerate(labels)}
        cu_seqlens = np.cumsum([0] + [len(s) for s in gold])
        pred, gold = ([ids[name] for sequence in side for name in sequence] for side in (pred, gold))
    pred, gold = torch.as_tensor(pred), torch.as_tensor(gold)
    if pred.shape != gold.shape or pred.ndim != 1:
        given = f"{list(pred.shape)} and {list(gold.shape)}"
        raise UserError(f"pred and gold must be [T], of one length, not {given}")
    cu_seqlens = torch.as_tensor([0, len(gold)] if cu_seqlens is None else cu_seqlens, device=gold.device)
    S = len(cu_seqlens) - 1
    groups = torch.zeros(S, dtype=torch.int64) if group is None else torch.as_tensor(group)
    if groups.shape != (S,):
        raise UserError(f"group must be [{S}], one number a sequence, not {list(groups.shape)}")
    num_groups = num_groups or (int(groups.max()) + 1 if S else 1)
    layout = (None, None) if labels is None else label_layout(labels)
    tags, types = (None if ids is None else torch.tensor(ids, device=gold.device) for ids in layout)
    counts = span_counts(pred, gold, cu_seqlens, groups.to(gold.device), num_groups, tags=tags, types=types)
    f1 = f1_from_counts(counts.cpu().numpy())
    if group is None:
        return float(f1[0])
    return np.where(np.bincount(groups.cpu().numpy(), minlength=num_groups) > 0, f1, np.nan)
