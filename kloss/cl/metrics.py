"""Metrics of a score matrix R: F1, transfer between languages, forgetting.

R: [T+1, T]; R[i, j] is the F1 (0 to 1) on the j-th language of the order after training step i. Row 0: before training.
NaN (None in JSON) means not measured. A mean leaves such terms out, and is NaN without terms. A sum with such a term is NaN.
With T = 1 most metrics have no terms: NaN.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from .spans import span_f1 as span_f1  # public here
from .statistics import Floats, measured_mean

Matrix = Floats | Sequence[Sequence[float | None]]
FLOOR = 0.05  # F1: what scores less on the language it was just trained on has learned nothing of it (our choice)
Own = NDArray[np.bool_] | None  # [T+1, T]: the cell is scored with the learner that the language ends with; None: all are


def _matrix(R: Matrix) -> Floats:
    R = np.array(R, dtype=np.float64)  # None becomes NaN
    if R.ndim != 2 or R.shape[0] != R.shape[1] + 1:
        raise UserError(f"a score matrix must be (T+1) x T, row 0 before training, not of shape {R.shape}")
    return R


def _before(T: int) -> NDArray[np.bool_]:
    """bool [T, T]: language j (column) was trained before step i (row)."""
    return np.tri(T, k=-1, dtype=bool)


def _check(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, not {value!r}")


def f1_per_step(R: Matrix) -> Floats:
    """[T]: mean F1 over the languages seen after step t, 1/t sum_{j<=t} R[t,j].

    >>> f1_per_step([[0, 0], [.8, .2], [.4, .6]]).tolist()
    [0.8, 0.5]
    """
    R = _matrix(R)
    return measured_mean(np.where(np.tri(R.shape[1], dtype=bool), R[1:], np.nan), axis=1)


def forward_transfer(R: Matrix) -> float:
    """CFT = 1/(T-1) sum_{i=1}^{T-1} 1/(T-i) sum_{j>i} R[i,j]: F1 on languages not yet trained.

    Our choice of formula, after Winata et al. (2023, arXiv 2305.16252).

    >>> forward_transfer([[0, 0, 0], [.8, .2, .4], [.5, .7, .1], [.4, .5, .6]])
    0.2
    """
    R = _matrix(R)
    return float(measured_mean(measured_mean(np.where(_before(R.shape[1]).T, R[1:], np.nan), axis=1)))


def backward_transfer_per_step(R: Matrix) -> Floats:
    """[T]: CBT after step t = 1/(t-1) sum_{i<t} (R[t,i] - R[i,i]); NaN at t = 1. Negative = forgotten.

    >>> backward_transfer_per_step([[0, 0, 0], [.75, 0, 0], [.5, .5, 0], [.25, .5, .5]]).tolist()
    [nan, -0.25, -0.25]
    """
    R = _matrix(R)
    change = R[1:] - np.diagonal(R[1:])
    return measured_mean(np.where(_before(R.shape[1]), change, np.nan), axis=1)


def backward_transfer(R: Matrix) -> float:
    """CBT = 1/(T-1) sum_{i<T} (R[T,i] - R[i,i]) (Winata et al. 2023). Negative = forgotten.

    The BWT of Lopez-Paz & Ranzato (2017) is the same formula.

    >>> backward_transfer([[0, 0], [.75, 0], [.25, .5]])
    -0.5
    """
    return float(backward_transfer_per_step(R)[-1])


def gem_forward_transfer(R: Matrix) -> float:
    """FWT = 1/(T-1) sum_{i=2}^T (R[i-1,i] - R[0,i]): what a language gained before its own step.

    Lopez-Paz & Ranzato (2017). Their baseline, a model at random initialisation, is row 0.

    >>> gem_forward_transfer([[.25, .25], [.75, .5], [.5, .5]])
    0.25
    """
    R = _matrix(R)
    return float(measured_mean(np.diagonal(R[1:], offset=1) - R[0, 1:]))


def forgetting_per_step(R: Matrix, *, include_last: bool = False, own: Own = None) -> Floats:
    """[T]: after step t, the mean over i<t of max_k R[k,i] - R[t,i]; NaN at t = 1.

    The maximum is over k = 1..t-1, so a language that still improves counts as negative forgetting.
    include_last: take it over k = 1..t instead; then forgetting is never negative.
    own: leave out of the maximum what another learner scored, which this one never knew and cannot forget (our choice).
    The last entry is the forgetting of Chaudhry et al. (2018).

    >>> forgetting_per_step([[0, 0, 0], [.5, 0, 0], [.75, .5, 0], [.25, .75, .5]]).tolist()
    [nan, -0.25, 0.125]
    >>> forgetting_per_step([[0, 0, 0], [.5, 0, 0], [.75, .5, 0], [.25, .75, .5]], include_last=True).tolist()
    [nan, 0.0, 0.25]
    >>> own = np.tri(4, 3, -1, dtype=bool)
    >>> forgetting_per_step([[0, 0, 0], [.5, .75, 0], [.5, .5, 0], [.5, .5, .5]], own=own).tolist()
    [nan, 0.0, 0.0]
    """
    R = _matrix(R)
    scored = R if own is None else np.where(own, R, np.nan)
    best = np.fmax.accumulate(scored[1:], axis=0)  # fmax ignores NaN
    if not include_last:
        best = np.vstack([np.full((1, R.shape[1]), np.nan), best[:-1]])
    return measured_mean(np.where(_before(R.shape[1]), best - R[1:], np.nan), axis=1)


def forgetting(R: Matrix, *, include_last: bool = False, own: Own = None) -> float:
    """Mean of `forgetting_per_step` over steps 2..T (M'hamdi et al. 2022, arXiv 2205.11152). Positive = forgotten.

    >>> forgetting([[0, 0], [.75, 0], [.25, .5]])
    0.5
    """
    return float(measured_mean(forgetting_per_step(R, include_last=include_last, own=own)))


def multi_hop_backward_transfer(R: Matrix, reading: str = "impact") -> Floats:
    """[T], by position: MBT of each language.

    reading: "impact" or "retention". The formula of arXiv 2504.20356 was not at hand; both readings are ours.
        impact: what training it did to earlier languages, 1/(i-1) sum_{j<i} (R[i,j] - R[i-1,j]); NaN for the first.
        retention: what later training did to it, the mean over hops h = 1..T-i of R[i+h,i] - R[i,i]; NaN for the last.

    >>> R = [[0, 0, 0], [.75, 0, 0], [.5, .5, 0], [.25, .25, .5]]
    >>> multi_hop_backward_transfer(R).tolist()
    [nan, -0.25, -0.25]
    >>> multi_hop_backward_transfer(R, reading="retention").tolist()
    [-0.375, -0.25, nan]
    """
    return _multi_hop(R, reading, "backward")


def multi_hop_forward_transfer(R: Matrix, reading: str = "impact") -> Floats:
    """[T], by position: MFT of each language.

    reading: "impact" or "retention", both ours as in `multi_hop_backward_transfer`.
        impact: what training it gave later languages, 1/(T-i) sum_{j>i} (R[i,j] - R[i-1,j]); NaN for the last.
        retention: what earlier training gave it, the mean over hops h = 1..i-1 of R[i-h,i] - R[0,i]; NaN for the first.

    >>> R = [[0, 0, 0], [.75, .25, .25], [.5, .5, .5], [.25, .25, .5]]
    >>> multi_hop_forward_transfer(R).tolist()
    [0.25, 0.25, nan]
    >>> multi_hop_forward_transfer(R, reading="retention").tolist()
    [nan, 0.25, 0.375]
    """
    return _multi_hop(R, reading, "forward")


def _multi_hop(R: Matrix, reading: str, direction: str) -> Floats:
    _check("reading", reading, ("impact", "retention"))
    if reading == "retention":
        return measured_mean(retention_by_hop(R, direction), axis=1)
    R = _matrix(R)
    before = _before(R.shape[1])
    return measured_mean(np.where(before if direction == "backward" else before.T, np.diff(R, axis=0), np.nan), axis=1)


def forgetting_by_cause(R: Matrix) -> Floats:
    """[T]: sum_{j<i} (R[i,j] - R[i-1,j]), what step i did to all earlier languages.

    This is the MBT of reading "impact", not normalised. The sum over steps is (T-1) CBT.

    >>> R = [[0, 0, 0], [.75, 0, 0], [.5, .5, 0], [.25, .5, .5]]
    >>> forgetting_by_cause(R).tolist(), 2 * backward_transfer(R)
    ([0.0, -0.25, -0.25], -0.5)
    """
    R = _matrix(R)
    return np.where(_before(R.shape[1]), np.diff(R, axis=0), 0.0).sum(axis=1)


def retention_by_hop(R: Matrix, direction: str = "backward") -> Floats:
    """[T, T-1]: change of language i (row) h hops (column h-1) from its own step; NaN outside the sequence.

    direction: "backward", R[i+h,i] - R[i,i], h steps after its own.
        "forward", R[i-h,i] - R[0,i], h steps before it.

    >>> retention_by_hop([[0, 0, 0], [.75, 0, 0], [.5, .5, 0], [.25, .25, .5]]).tolist()
    [[-0.25, -0.5], [-0.25, nan], [nan, nan]]
    """
    _check("direction", direction, ("backward", "forward"))
    R = _matrix(R)
    T = R.shape[1]
    position, hops = np.arange(1, T + 1)[:, None], np.arange(1, T)[None, :]
    row = position + (hops if direction == "backward" else -hops)
    base = np.diagonal(R[1:]) if direction == "backward" else R[0]
    change = R[np.clip(row, 0, T), position - 1] - base[:, None]
    return np.where((row >= 1) & (row <= T), change, np.nan)


def retention_curve(R: Matrix, direction: str = "backward") -> Floats:
    """[T-1]: mean of `retention_by_hop` over languages, by hops h = 1..T-1. Entry h has T-h languages.

    >>> retention_curve([[0, 0, 0], [.75, 0, 0], [.5, .5, 0], [.25, .25, .5]]).tolist()
    [-0.25, -0.5]
    """
    return measured_mean(retention_by_hop(R, direction), axis=0)


def retained(R: Matrix, floor: float = FLOOR) -> Floats:
    """[T]: R[T,i] / R[i,i], the share of a language's F1 when learned that is left at the end; NaN for the last.

    floor: a language with less F1 when learned has nothing to keep: NaN. Our choice.

    >>> retained([[0, 0, 0], [.75, 0, 0], [.5, .01, 0], [.25, .01, .5]]).round(3).tolist()
    [0.333, nan, nan]
    """
    R = _matrix(R)
    learned = np.diagonal(R[1:])
    result = np.where(learned >= floor, R[-1] / np.maximum(learned, floor), np.nan)
    result[-1] = np.nan
    return result


def when_learned(R: Matrix) -> Floats:
    """[T]: F1 on each language just after its own training: R[i,i], or the last row for joint training."""
    R = np.array(R, dtype=np.float64)
    return np.diagonal(R[1:]).copy() if len(R) == R.shape[1] + 1 else R[-1]


def is_sequential(R: Matrix) -> bool:
    """Whether R is (T+1) x T with T > 1.

    Raises UserError if it is neither that nor 2 x T, before and after one training step.
    """
    shape = np.asarray(R, dtype=np.float64).shape
    if len(shape) != 2 or shape[1] == 0 or shape[0] not in (2, shape[1] + 1):
        raise UserError(f"a score matrix must be (T+1) x T, or 2 x T (joint training), not {shape}")
    return shape[0] == shape[1] + 1 and shape[1] > 1


SEQUENTIAL: dict[str, Callable[[Floats, Own], float | Floats]] = {  # by name in scores.json
    "cft": lambda R, own: forward_transfer(R),
    "cbt": lambda R, own: backward_transfer(R),
    "bwt": lambda R, own: backward_transfer(R),
    "fwt": lambda R, own: gem_forward_transfer(R),
    "forgetting": lambda R, own: forgetting(R, own=own),
    "forgetting_last": lambda R, own: forgetting_per_step(R, own=own)[-1],
    "forgetting_including_last": lambda R, own: forgetting(R, include_last=True, own=own),
    "cbt_per_step": lambda R, own: backward_transfer_per_step(R),
    "mft_impact": lambda R, own: multi_hop_forward_transfer(R),
    "mbt_impact": lambda R, own: multi_hop_backward_transfer(R),
    "mft_retention": lambda R, own: multi_hop_forward_transfer(R, "retention"),
    "mbt_retention": lambda R, own: multi_hop_backward_transfer(R, "retention"),
    "forgetting_by_cause": lambda R, own: forgetting_by_cause(R),
    "retention_curve": lambda R, own: retention_curve(R),
    "retention_curve_forward": lambda R, own: retention_curve(R, "forward"),
    "retained": lambda R, own: retained(R),
}


def summarise(R: Matrix, own: Own = None) -> dict[str, Any]:
    """Every metric of one run, JSON-ready: floats, lists by position in the order, None where undefined.

    R: [T+1, T], or [2, T] for joint training. The latter defines only f1, f1_per_step (one entry) and worst.
    own: for forgetting, see `forgetting_per_step`.

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
    result |= {name: metric(R, own) if sequential else None for name, metric in SEQUENTIAL.items()}
    return {name: _json(value) for name, value in result.items()}


def _json(value: Any) -> Any:
    if value is None or isinstance(value, int):
        return value
    value = np.asarray(value)
    return [_json(v) for v in value] if value.ndim else None if np.isnan(value) else float(value)
