"""Mean, confidence interval and test for values of which some were not measured: NaN, or None in JSON."""

from collections.abc import Sequence
from itertools import combinations
from math import comb, nan
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError

Floats = NDArray[np.float64]
Values = Floats | Sequence[float | None]


def measured_mean(values: Floats | Sequence[Any], axis: int | None = None) -> Floats:
    """Mean over the values that were measured; NaN without any.

    >>> float(measured_mean([0.25, None, 0.75]))
    0.5
    """
    values = np.asarray(values, dtype=np.float64)
    measured = ~np.isnan(values)
    count = measured.sum(axis)
    total = np.where(measured, values, 0.0).sum(axis)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _measured(values: Values) -> Floats:
    flat = np.asarray(values, dtype=np.float64).ravel()
    return flat[~np.isnan(flat)]


def bootstrap_interval(values: Values, *, level: float = 0.95, samples: int = 10000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean (Efron 1979).

    values: [n]; NaN are dropped. level: in (0, 1).
    Returns (low, high), or (NaN, NaN) for fewer than two values.
    Raises UserError for a level outside (0, 1).

    >>> low, high = bootstrap_interval([0.1, 0.2, 0.3, 0.4])
    >>> 0.1 <= low < 0.25 < high <= 0.4, bootstrap_interval([0.5])
    (True, (nan, nan))
    """
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, not {level}")
    values = _measured(values)
    if len(values) < 2:
        return nan, nan
    draws = np.random.default_rng(seed).integers(len(values), size=(samples, len(values)))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Comparison(NamedTuple):
    difference: float  # mean(a) - mean(b)
    p_value: float  # two-sided


def permutation_test(a: Values, b: Values, *, samples: int = 10000, seed: int = 0) -> Comparison:
    """Two-sided permutation test of mean(a) - mean(b).

    a, b: [n] and [m] independent values; NaN are dropped. Give one value per language: seeds are not new languages.
    samples: all C(n+m, n) splits are tested if there are no more than this.
    Otherwise random splits are drawn and p = (1 + hits) / (1 + samples) (Phipson & Smyth 2010).
    Returns NaN for both fields if a or b is empty.

    >>> permutation_test([3, 4, 5], [0, 1, 2])
    Comparison(difference=3.0, p_value=0.1)
    """
    a, b = _measured(a), _measured(b)
    n, m = len(a), len(b)
    if not n or not m:
        return Comparison(nan, nan)
    pool, observed = np.concatenate([a, b]), a.mean() - b.mean()
    exact = comb(n + m, n) <= samples
    if exact:
        sums = pool[np.array(list(combinations(range(n + m), n)))].sum(axis=1)
    else:
        sums = np.random.default_rng(seed).permuted(np.tile(pool, (samples, 1)), axis=1)[:, :n].sum(axis=1)
    differences = sums / n - (pool.sum() - sums) / m
    hits = int((np.abs(differences) >= abs(observed) - 1e-12).sum())  # slack for another order of summation
    return Comparison(float(observed), hits / len(sums) if exact else (hits + 1) / (samples + 1))
