"""Numbers as the page prints them."""

from collections.abc import Callable, Sequence
from math import isnan
from typing import NamedTuple

NONE = "–"


class Cell(NamedTuple):
    """Text with, if given: small print below, a warning in red, the colour of a swatch in front."""

    text: str
    interval: str = ""
    warning: str = ""
    colour: str = ""


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """Fixed digits and a true minus sign; a dash for what was not measured."""
    if value is None or isnan(value):
        return NONE
    value = round(value, digits) + 0.0  # no -0
    return f"{value:{'+' if sign and value else ''}.{digits}f}".replace("-", "−")


def count(value: float | None) -> str:
    """Three digits and a unit: 1.23 M"""
    if value is None:
        return NONE
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= 0.9995 * unit:  # the smaller unit would print 1e+03
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"


def counted(amount: int, noun: str) -> str:
    """1 run, 2 runs"""
    return f"{amount} {noun}{'' if amount == 1 else 's'}"


def extent(values: Sequence[float], text: Callable[[float], str]) -> str:
    """Smallest and largest value as text; once if they read the same."""
    return "–".join(dict.fromkeys((text(min(values)), text(max(values))))) if values else NONE


def between(low: float | None, high: float | None, df: int | None, digits: int = 3) -> str:
    """An interval, with its degrees of freedom where it is Student's; empty where there is none. Lines may break before these."""
    if low is None or high is None or isnan(low):
        return ""
    return f"{number(low, digits)}\xa0to\xa0{number(high, digits)}" + ("" if df is None else f", t\xa0{df}")
