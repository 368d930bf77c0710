"""What experiments need and what they conclude, in forms that every experiment shares."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..learner import Learner
from ..probes import Probe
from ..statistics import Floats, Interval


class Needs(NamedTuple):
    """What an experiment needs of a study beside its score matrices."""

    learners: Sequence[tuple[Learner, Mapping[int, list[str]]]] = ()  # to be trained besides, and what is scored of them
    cells: Sequence[tuple[int, int, str]] = ()  # (learner, experiences completed, locale) to score
    probes: Sequence[Probe] = ()


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
