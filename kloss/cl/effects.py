"""What explains a language's loss: its script, its family, its labels, or only its place in the order."""

from collections.abc import Callable, Mapping, Sequence
from math import nan
from typing import NamedTuple

import numpy as np

from .languages import CHARACTER_LOCALES, LANGUAGES
from .metrics import when_learned
from .statistics import Floats, Interval, difference_interval, measured_mean, permutation_test, t_quantile
from .summary import Measure, script, spaced
from .units import Run

FEWEST_ORDERS = 5  # with fewer, a language's effect and that of its places in the order are hard to tell apart


class Fit(NamedTuple):
    """value = position + language, by least squares over languages and orders.

    Shares of variance are adjusted: 0 is what as many groups drawn at random explain on average, and less may come out.
    """

    orders: int
    position: float  # share that positions alone explain
    language: float  # that languages alone explain
    both: float
    learned: float  # both, and the F1 when learned
    effects: dict[str, tuple[float, Interval]]  # locale -> its mean against the average language, positions being equal


def fit(runs: Sequence[Run], measure: Measure) -> Fit | None:
    """Tell languages from positions, over the orders of runs that did not diverge.

    measure: NaN: not measured. Runs of one order are averaged.
    Intervals leave out one order after the other (jackknife) and are t with orders - 1 degrees of freedom.
    Returns None with fewer than FEWEST_ORDERS orders.
    """
    tables: dict[tuple[str, ...], list[Floats]] = {}
    for run in runs:
        if not run.get("diverged"):
            tables.setdefault(tuple(run["order"]), []).append(np.stack([measure(run), when_learned(run["R"])]))
    if len(tables) < FEWEST_ORDERS:
        return None
    locales = sorted(next(iter(tables)))
    rows = [
        (number, position, locales.index(locale), *values)
        for number, (order, several) in enumerate(tables.items())
        for position, (locale, values) in enumerate(zip(order, measured_mean(several, axis=0).T, strict=True))
    ]
    data = np.array([row for row in rows if not np.isnan(row[3:]).any()]).reshape(-1, 5)
    if not len(data):
        return None
    number, position, language = data[:, :3].astype(int).T
    value, learned = data[:, 3:].T
    T = len(locales)
    positions, languages = np.eye(T)[position], np.eye(T)[language]
    both = np.hstack([positions, languages])

    def effects(kept: np.ndarray) -> Floats:
        coefficients = np.linalg.lstsq(both[kept], value[kept], rcond=None)[0][T:]
        there = languages[kept].any(axis=0)
        return np.where(there, coefficients - coefficients[there].mean(), nan)

    whole = effects(np.ones(len(data), bool))
    left_out = np.stack([effects(number != k) for k in range(len(tables))])
    df = len(tables) - 1
    spread = ((left_out - left_out.mean(axis=0)) ** 2).mean(axis=0)
    half = t_quantile(0.975, df) * np.sqrt(df * spread)
    return Fit(
        orders=len(tables),
        position=_explained(positions, value),
        language=_explained(languages, value),
        both=_explained(both, value),
        learned=_explained(np.hstack([both, learned[:, None]]), value),
        effects={m: (float(e), Interval(float(e - h), float(e + h), df)) for m, e, h in zip(locales, whole, half, strict=True)},
    )


def _explained(design: Floats, value: Floats) -> float:
    """Adjusted R² of a least-squares fit; NaN for a constant value or without degrees of freedom."""
    solution, _, rank, _ = np.linalg.lstsq(design, value, rcond=None)
    n = len(value)
    total, left = ((value - value.mean()) ** 2).sum(), ((value - design @ solution) ** 2).sum()
    return nan if n <= rank or total < 1e-20 else float(1 - (left / (n - rank)) / (total / (n - 1)))


class Contrast(NamedTuple):
    """A comparison of two groups of languages, each family of a group one value."""

    name: str
    languages: tuple[int, int]
    families: tuple[int, int]
    difference: float  # of the means over families
    interval: Interval
    p_value: float


def family(locale: str) -> str:
    """Family of a locale; outside MASSIVE each is its own."""
    return LANGUAGES[locale].family if locale in LANGUAGES else locale


def by_character(locale: str) -> bool:
    """Whether the labels of a language are per character, not per word."""
    return locale in CHARACTER_LOCALES


def contrasts(values: Mapping[str, float]) -> list[Contrast]:
    """The comparisons that tell script from labelling unit and from word segmentation. values: locale -> mean; NaN are left out.

    Languages of a family are alike, so a family counts once in each group: its mean. The test permutes families between the
    groups, the interval is Welch's. A family with languages in both groups (Slavic: Latin and Cyrillic) is one value in each.
    """
    values = {m: value for m, value in values.items() if value == value}
    latin, other = _split(values, lambda m: script(m) == "Latin")
    characters, words = _split(values, by_character)
    spaces, none = _split(values, spaced)
    groups = (
        ("not Latin", other, "Latin", latin),
        ("labelled by character", characters, "labelled by word", words),
        ("written without spaces", none, "with spaces", spaces),
        ("not Latin, but with spaces", [m for m in other if spaced(m)], "Latin", latin),
    )
    return [contrast(f"{name_a} against {name_b}", values, a, b) for name_a, a, name_b, b in groups]


def _split(locales: Mapping[str, float], test: Callable[[str], bool]) -> tuple[list[str], list[str]]:
    return [m for m in locales if test(m)], [m for m in locales if not test(m)]


def contrast(name: str, values: Mapping[str, float], a: Sequence[str], b: Sequence[str]) -> Contrast:
    """Two groups of languages, see `contrasts`; NaN if one is empty. values: none of them NaN."""
    of_a, of_b = _by_family(values, a), _by_family(values, b)
    test = permutation_test(of_a, of_b)
    languages, families = (len(a), len(b)), (len(of_a), len(of_b))
    return Contrast(name, languages, families, test.difference, difference_interval(of_a, of_b), test.p_value)


def _by_family(values: Mapping[str, float], members: Sequence[str]) -> list[float]:
    families: dict[str, list[float]] = {}
    for m in members:
        families.setdefault(family(m), []).append(values[m])
    return [float(np.mean(group)) for group in families.values()]
