"""Mean, confidence interval and test for values of which some were not measured: NaN, or None in JSON."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import comb, hypot, nan, sqrt, tan
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


class Interval(NamedTuple):
    """A confidence interval of a mean; NaN to NaN: there is none.

    Fewer than two values, or equal ones (F1 of 0 at the floor), do not tell how values vary: there is none.
    """

    low: float
    high: float
    df: int | None = None  # degrees of freedom of a t interval; None: a bootstrap, or no interval


NO_INTERVAL = Interval(nan, nan)
# A bootstrap of fewer values knows too little: a percentile interval of three is their range, and covers 74 %.
FEWEST_TO_RESAMPLE = 5


def _differ(values: Floats) -> bool:
    return len(values) > 1 and bool(np.ptp(values) > 0)


def t_quantile(p: float, df: float) -> float:
    """Quantile of Student's t, to about 1e-5 of its value. p: in [0.5, 1). df: degrees of freedom, 1 to 1000.

    With t = sqrt(df) tan(a) the density of a is proportional to cos(a)^(df-1), which is summed.

    >>> round(t_quantile(0.975, 2), 3), round(t_quantile(0.975, 30), 3)
    (4.303, 2.042)
    """
    angle = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(angle) ** (df - 1)
    below = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    return sqrt(df) * tan(float(np.interp(2 * p - 1, below / below[-1], angle)))


def t_interval(values: Values, *, level: float = 0.95) -> Interval:
    """Student's interval of a mean, with n-1 degrees of freedom. NO_INTERVAL without two different values.

    >>> low, high, df = t_interval([1, 2, 3])
    >>> round(low, 3), round(high, 3), df, t_interval([5])
    (-0.484, 4.484, 2, Interval(low=nan, high=nan, df=None))
    """
    values = _measured(values)
    n = len(values)
    if not _differ(values):
        return NO_INTERVAL
    mean, half = values.mean(), t_quantile((1 + level) / 2, n - 1) * values.std(ddof=1) / sqrt(n)
    return Interval(float(mean - half), float(mean + half), n - 1)


def bootstrap_interval(values: Values, *, level: float = 0.95, samples: int = 10000, seed: int = 0) -> Interval:
    """Studentised bootstrap interval of a mean (bootstrap-t; Efron & Tibshirani 1993, chapter 12).

    values: [n] independent values; NaN are dropped. level: in (0, 1).
    A resample of equal values has no standard error and is left out; where too many are such (most values are equal), the
    interval is `t_interval`.
    Returns NO_INTERVAL without two different values.
    Raises UserError for a level outside (0, 1).

    >>> low, high, df = bootstrap_interval([0.1, 0.2, 0.3, 0.4, 0.5])
    >>> low < 0.3 < high, df
    (True, None)
    """
    if not 0 < level < 1:
        raise UserError(f"level must lie between 0 and 1, not {level}")
    values = _measured(values)
    n = len(values)
    if not _differ(values):
        return NO_INTERVAL
    mean, spread = values.mean(), values.std()
    draws = values[np.random.default_rng(seed).integers(n, size=(samples, n))]
    several = np.ptp(draws, axis=1) > 0
    if several.mean() < (1 + level) / 2:
        return t_interval(values, level=level)
    draws = draws[several]
    t = (draws.mean(axis=1) - mean) / draws.std(axis=1)
    low, high = np.quantile(t, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(mean - high * spread), float(mean - low * spread))


def interval(values: Values) -> Interval:
    """95 % interval of the mean of independent values: t for fewer than FEWEST_TO_RESAMPLE, else bootstrap."""
    values = _measured(values)
    return t_interval(values) if len(values) < FEWEST_TO_RESAMPLE else bootstrap_interval(values)


def crossed_interval(table: Mapping[tuple[Any, Any], float]) -> Interval:
    """95 % interval of a mean over two crossed factors, such as orders and seeds.

    table: (level of one factor, level of the other) -> value. Cells may be missing.
    Values that share a level are not independent, so the means of the levels are the units, and each factor has an interval.
    Variances of the two factors add up. So the distances of both intervals' ends from their means do in squares, below and
    above. df is the smaller one of t intervals.
    In simulations of 2 to 12 levels this covers 93 to 99 %, most where neither factor does anything. The wider of the two
    intervals covers 88 to 94 % from five levels on, all values as one sample 40 to 90 %.

    >>> crossed_interval({("a", seed): value for seed, value in enumerate([1, 2, 3])}) == t_interval([1, 2, 3])
    True
    """
    known = []  # (mean over levels, interval); none of a factor whose levels have equal means
    for factor in (0, 1):
        levels: dict[Any, list[float]] = {}
        for key, value in table.items():
            levels.setdefault(key[factor], []).append(value)
        means = [float(measured_mean(values)) for values in levels.values()]
        ends = interval(means)
        if ends.low == ends.low:
            known.append((float(measured_mean(means)), ends))
    if len(known) < 2:
        return known[0][1] if known else NO_INTERVAL
    mean = float(measured_mean(list(table.values())))
    below, above = hypot(*(of - ends.low for of, ends in known)), hypot(*(ends.high - of for of, ends in known))
    df = min((ends.df for _, ends in known if ends.df is not None), default=None)
    return Interval(mean - below, mean + above, df)


def difference_interval(a: Values, b: Values, *, level: float = 0.95) -> Interval:
    """Welch's t interval of mean(a) - mean(b), degrees of freedom rounded down.

    Returns NO_INTERVAL with fewer than two values in a or b, or where all in each are equal.

    >>> difference_interval([1, 2, 3], [0, 0, 0]).df
    2
    """
    a, b = _measured(a), _measured(b)
    if min(len(a), len(b)) < 2 or not (_differ(a) or _differ(b)):
        return NO_INTERVAL
    parts = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    difference, variance = a.mean() - b.mean(), sum(parts)
    df = int(variance**2 / (parts[0] ** 2 / (len(a) - 1) + parts[1] ** 2 / (len(b) - 1)) + 1e-9)
    half = t_quantile((1 + level) / 2, df) * sqrt(variance)
    return Interval(float(difference - half), float(difference + half), df)


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
