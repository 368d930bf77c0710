"""What of a run is a value of its own, and what of its score matrix is so by construction: read from its strategy's layout.

Two runs whose last rows read the same learners are one value however many orders they were planned in (NON-SHARED). Intervals
count such values once, a test of two strategies pairs them.
"""

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .learner import Experience
from .strategies import STRATEGIES

Run = Mapping[str, Any]  # an entry of "runs" in scores.json
Unit = tuple[Hashable, int]  # (what of the order the value depends on, seed)


class Traits(NamedTuple):
    """What a strategy's layout says of R in one order of T languages."""

    end: Hashable  # what the last row reads: equal in two orders, equal learners
    can_change: NDArray[np.bool_]  # [T]: after its own step the language has another learner, or the same further trained
    can_destroy: NDArray[np.bool_]  # [T]: its step trains the learner of an earlier language
    own: NDArray[np.bool_]  # [T+1, T] (or [2, T]): the cell's learner is the one that the language ends with


def traits(run: Run) -> Traits:
    """The traits of a run. A strategy that is not known here, from another version, is taken to depend on everything."""
    groups = run.get("groups") or {}
    known = run["strategy"] in STRATEGIES and (run["strategy"] != "partial" or groups.keys() >= set(run["order"]))
    strategy = run["strategy"] if known else None
    return _traits(strategy, tuple(run["order"]), tuple(sorted(groups.items())), len(run["R"]))


@lru_cache(maxsize=4096)
def _traits(strategy: str | None, order: tuple[str, ...], groups: tuple[tuple[str, str], ...], rows: int) -> Traits:
    T = len(order)
    layout = None if strategy is None else STRATEGIES[strategy].layout(order, dict(groups))
    if layout is None or layout.rows != rows:
        return Traits(order, np.ones(T, bool), np.arange(T) > 0, np.ones((rows, T), bool))
    cells = np.array([[layout.cell(i, j) for j in range(T)] for i in range(layout.rows)])  # [rows, T, 2]
    last = cells[-1]
    learned = cells[[j + 1 if layout.rows == T + 1 else -1 for j in range(T)], range(T)]
    read = ((locale, _frozen(layout.streams[g][:experience])) for locale, (g, experience) in zip(order, last, strict=True))
    trained = (cells[1:] != cells[:-1]).any(axis=2) & np.tri(layout.rows - 1, T, k=-1, dtype=bool)  # by step: earlier languages
    can_destroy = trained.any(axis=1) if layout.rows == T + 1 else np.zeros(T, bool)
    return Traits(frozenset(read), (learned != last).any(axis=1), can_destroy, cells[..., 0] == last[:, 0])


def _frozen(stream: Sequence[Sequence[str] | Experience]) -> Hashable:
    return tuple(map(Experience.of, stream))


def unit_of(run: Run, *, end: bool = True) -> Unit:
    """The unit of a run's value. end: the value is read from R's last row alone, so it may not depend on the order."""
    return (traits(run).end if end else tuple(run["order"])), run["seed"]


def without_order(run: Run) -> bool:
    """Whether its last row reads the same learners in any order of the languages, by construction."""
    strategy = STRATEGIES.get(run["strategy"])
    turned = {**run, "order": run["order"][::-1]}
    return strategy is not None and (strategy.joint or traits(turned).end == traits(run).end)


def units(runs: Sequence[Run], values: Sequence[float | None], *, end: bool = True) -> dict[Unit, float]:
    """Each unit's value, for those that were measured. values: one per run."""
    pairs = zip(runs, values, strict=True)
    return {unit_of(run, end=end): value for run, value in pairs if value is not None and value == value}


def paired(
    a: Sequence[Run], b: Sequence[Run], values_a: Sequence[float | None], values_b: Sequence[float | None]
) -> dict[Unit, float]:
    """Differences a - b of values of R's last row, between runs of one seed and one order, each pair of units once.

    A strategy without an order, or whose last row does not depend on it, pairs with every order of the other. What of a strategy
    has one order left, since others diverged, does not.
    a, b: runs of one strategy each. values_a, values_b: one per run; None: not measured.
    """
    free = any(all(map(without_order, runs)) for runs in (a, b))

    def index(runs: Sequence[Run], values: Sequence[float | None]) -> dict[Hashable, dict[Unit, float]]:
        table: dict[Hashable, dict[Unit, float]] = {}
        for run, value in zip(runs, values, strict=True):
            if value is not None:
                key = (run["seed"], None if free else tuple(run["order"]))
                table.setdefault(key, {})[unit_of(run)] = value
        return table

    left, right = index(a, values_a), index(b, values_b)
    return {
        ((end_a, end_b), seed): value_a - value_b
        for key, of_a in left.items()  # in the order of the runs, so sums keep their bits
        for (end_a, seed), value_a in of_a.items()
        for (end_b, _), value_b in right.get(key, {}).items()
    }
