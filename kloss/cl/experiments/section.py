"""What experiments need and what they conclude, in forms that every experiment shares."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import UserError
from ..learner import Learner, Scores
from ..probes import Probe
from ..statistics import Floats, Interval

SEQUENCE = {"order": [str], "learned": [([int], None)], "end": [([int], None)]}


class Needs(NamedTuple):
    """What an experiment needs of a study beside its score matrices."""

    learners: Sequence[tuple[Learner, Mapping[int, list[str]]]] = ()  # to be trained besides, and what is scored of them
    cells: Sequence[tuple[int, int, str]] = ()  # (learner, experiences completed, locale) to score
    probes: Sequence[Probe] = ()


def numbered(flag: str, texts: Sequence[str], most: Mapping[str, float], forms: Sequence[str], limits: str) -> dict[str, tuple]:
    """Name and number of each NAME=NUMBER of a flag. Raises UserError for what is unknown, out of range or named twice.

    most: the largest number of each name. forms, limits: how these are written, and what numbers are allowed, in words.
    """
    found: dict[str, tuple[str, float]] = {}
    for text in texts:
        name, _, given = text.partition("=")
        try:
            number = float(given)
        except ValueError:
            number = 0.0
        if not 0 < number <= most.get(name, 0.0):
            raise UserError(f"{flag}: {text!r} is none of {', '.join(forms)}, with {limits}")
        if text in found:
            raise UserError(f"{flag} names {text} twice")
        found[text] = name, number
    return found


def along(order: Sequence[str]) -> dict[int, list[str]]:
    """What is scored of a learner of languages one after another: each when it is learned, all at the end."""
    return {step: [locale] for step, locale in enumerate(order, 1)} | {len(order): list(order)}


def sequence(order: Sequence[str], scores: Scores) -> dict[str, Any]:
    """Of such a learner the counts of each language when learned and at the end, in the shape SEQUENCE; None if it diverged."""
    learned = [scores.get(step, {}).get(locale) for step, locale in enumerate(order, 1)]
    return {"order": list(order), "learned": learned, "end": [scores.get(len(order), {}).get(locale) for locale in order]}


class Bars(NamedTuple):
    """Named values, each once a unit of replication."""

    caption: str
    values: Mapping[str, Sequence[float]]
    label: str  # of the values


class Matrix(NamedTuple):
    """F1 of rows on columns, NaN where nothing was measured."""

    caption: str
    names: Sequence[str]  # of rows and columns
    values: Floats
    rows: str  # what a row is


class Scatter(NamedTuple):
    """y [n] at x [n], a dot for each observation of a language.

    slope, alone: of lines through the means: other properties being equal, and not.
    """

    caption: str
    x: Floats
    y: Floats
    locales: Sequence[str]
    xlabel: str
    ylabel: str
    slope: float
    alone: float


class Table(NamedTuple):
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Section(NamedTuple):
    """A section of the report: the question, the answer in sentences, then figures and tables. limits: what it cannot say."""

    title: str
    question: str
    findings: Sequence[str]
    limits: Sequence[str] = ()
    bars: Sequence[Bars] = ()
    matrices: Sequence[Matrix] = ()
    tables: Sequence[Table] = ()
    scatters: Sequence[Scatter] = ()


def signed(value: float, digits: int = 2) -> str:
    """A number with its sign, a true minus; none on what rounds to 0."""
    value = round(value, digits) + 0.0  # no -0
    return f"{value:{'+' if value else ''}.{digits}f}".replace("-", "−")


def between(interval: Interval, digits: int = 2) -> str:
    """An interval in words; empty where there is none."""
    return f"{signed(interval.low, digits)} to {signed(interval.high, digits)}" if interval.low == interval.low else ""


def with_interval(difference: float, interval: Interval, digits: int = 2) -> str:
    """A difference and its interval in words."""
    return f"{signed(difference, digits)} ({between(interval, digits) or 'no interval'})"


def or_unmeasured(value: float) -> str:
    """A value as a table's cell; NaN was not measured."""
    return f"{value:.3f}" if value == value else "not measured"
