"""Least squares within runs, with intervals for observations that are alike in groups, such as families."""

from collections.abc import Iterator, Mapping, Sequence
from math import nan
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .statistics import Floats, Interval, t_quantile

Ints = NDArray[np.int64]
APART = 0.1  # share of its variance that a property must not have in common with those before it
FEWEST_GROUPS = 3  # groups that it must differ in


class Effect(NamedTuple):
    deviation: float  # standard deviation of the property within runs
    effect: float  # of one deviation more on the value, the other properties being equal
    interval: Interval
    alone: float  # the same, the others not being equal


class Regression(NamedTuple):
    effects: dict[str, Effect]
    left_out: dict[str, str]  # property -> why its effect cannot be told
    explained: float  # adjusted R² within runs; NaN without effects


def regress(value: Floats, properties: Mapping[str, Floats], run: Ints, factors: Sequence[Ints]) -> Regression:
    """Least squares of values on properties within runs: each run has its own mean.

    value: [n]. properties: name -> [n]. run: [n]. factors: [n] each; observations of one group (family, order) may be alike.
    Intervals leave out one group after the other (jackknife); of several factors the wider one is given. They are t; its degrees
    of freedom count the groups by their weight in what a property has for itself, less one.
    Left out: what does not differ within runs, what goes with properties before it (`APART`), what differs in few groups.

    In simulations, with random effects of languages and families and none planted, at most 6 % of the intervals leave 0 out.
    """
    y, X = _within(value[:, None], run)[:, 0], np.empty((len(value), 0))
    used: list[str] = []
    left_out: dict[str, str] = {}
    for name, column in properties.items():
        more = _within(column[:, None], run)
        reason = _untold(X, more[:, 0], used, factors)
        columns = np.column_stack([properties[m] for m in [*used, name]])
        if not reason and not all(_solvable(columns[kept], run[kept]) for kept in _without_each(factors)):
            reason = "differs in too few groups"
        if reason:
            left_out[name] = reason
        else:
            used.append(name)
            X = np.hstack([X, more])
    if not used:
        return Regression({}, left_out, nan)
    columns = np.column_stack([properties[name] for name in used])
    whole, halves = _coefficients(columns, value, run), np.zeros(len(used))
    for factor in factors:
        several = np.stack([_coefficients(columns[kept], value[kept], run[kept]) for kept in _without_each([factor])])
        errors = np.sqrt((len(several) - 1) * several.var(axis=0))
        for i, error in enumerate(errors):
            df = max(1, int(_groups(_rest(np.delete(X, i, 1), X[:, i]), factor)) - 1)
            halves[i] = max(halves[i], t_quantile(0.975, df) * error)
    effects = {}
    for i, (name, deviation) in enumerate(zip(used, X.std(axis=0), strict=True)):
        effect, half = float(deviation * whole[i]), float(deviation * halves[i])
        alone = float(deviation * (X[:, i] @ y) / (X[:, i] @ X[:, i]))
        effects[name] = Effect(float(deviation), effect, Interval(effect - half, effect + half), alone)
    left, total = len(y) - len(np.unique(run)) - len(used), len(y) - len(np.unique(run))
    rest = _rest(X, y)
    explained = 1 - (rest @ rest / left) / (y @ y / total) if left > 0 and y @ y > 1e-20 else nan
    return Regression(effects, left_out, float(explained))


def _untold(X: Floats, column: Floats, used: Sequence[str], factors: Sequence[Ints]) -> str:
    """Why the effect of a column beside those of X cannot be told, all within runs; empty if it can."""
    total = column @ column
    if total < 1e-12:
        return "does not differ"
    rest = _rest(X, column)
    if rest @ rest < APART * total:
        r = [float(column @ other / np.sqrt(total * (other @ other))) for other in X.T]
        most = int(np.argmax(np.abs(r)))
        return f"goes with {used[most]}, r = {r[most]:.2f}".replace("-", "−")
    return "" if all(_groups(rest, factor) >= FEWEST_GROUPS for factor in factors) else "differs in too few groups"


def _within(X: Floats, run: Ints) -> Floats:
    """Columns less their means within runs."""
    member = np.equal.outer(np.unique(run), run).astype(float)
    return X - member.T @ (member @ X / member.sum(axis=1, keepdims=True))


def _rest(X: Floats, column: Floats) -> Floats:
    """What the columns of X do not explain of a column."""
    return column - X @ _solved(X, column)


def _groups(column: Floats, factor: Ints) -> float:
    """How many groups a column's sum of squares is spread over: their number if evenly, 1 if one has all."""
    weights = np.array([float(np.square(column[factor == level]).sum()) for level in np.unique(factor)])
    return float(weights.sum() ** 2 / np.square(weights).sum())


def _without_each(factors: Sequence[Ints]) -> Iterator[NDArray[np.bool_]]:
    for factor in factors:
        yield from (factor != level for level in np.unique(factor))


def _solvable(columns: Floats, run: Ints) -> bool:
    X = _within(columns, run)
    scale = np.sqrt(np.square(X).sum(axis=0))
    return bool((scale > 1e-9).all()) and np.linalg.matrix_rank(X / scale, tol=1e-3) == X.shape[1]


def _coefficients(columns: Floats, value: Floats, run: Ints) -> Floats:
    return _solved(_within(columns, run), _within(value[:, None], run)[:, 0])


def _solved(X: Floats, value: Floats) -> Floats:
    return np.asarray(np.linalg.lstsq(X, value, rcond=None)[0], np.float64)
