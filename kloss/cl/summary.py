"""Averages of runs: by strategy, language and script.

A run is an entry of "runs" in scores.json. Runs that diverged are in no average.
All is computed from the score matrices R, so old run folders can be reported again.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from typing import Any

import numpy as np

from .languages import LANGUAGES
from .metrics import summarise
from .statistics import Floats, bootstrap_interval, measured_mean

Run = Mapping[str, Any]
Row = dict[str, Any]
AVERAGED = ("f1", "cbt", "cft", "fwt", "forgetting", "worst")


def summary_rows(scores: Mapping[str, Any]) -> list[Row]:
    """One `summary_row` per strategy, in order of appearance: "summary" of scores.json."""
    return [summary_row(label, runs) for label, runs in by_label(scores["runs"]).items()]


def summary_row(label: str, runs: Sequence[Run]) -> Row:
    """Averages of the runs of one strategy, JSON-ready.

    Each name of AVERAGED has three keys: NAME, its mean over runs (None: undefined or not measured);
    NAME_low and NAME_high, the 95 % bootstrap interval over runs (None with fewer than two).
    """
    summaries = [summarise(run["R"]) for run in runs if not run.get("diverged")]
    row = {
        "label": label,
        "strategy": runs[0]["strategy"],
        "runs": len(runs),
        "orders": len({run["order_name"] for run in runs}),
        "seeds": len({run["seed"] for run in runs}),
        "diverged": len(runs) - len(summaries),
        "trainable_parameters": runs[0].get("trainable_parameters"),
        "steps": runs[0].get("steps"),
    }
    for name in AVERAGED:
        values = [summary[name] for summary in summaries if summary[name] is not None]
        row[name] = sum(values) / len(values) if values else None
        low, high = bootstrap_interval(values)
        row[name + "_low"], row[name + "_high"] = (None, None) if isnan(low) else (low, high)
    return row


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Label -> its runs. A label used with several learning rates is split by rate."""
    rates: dict[str, set[float | None]] = {}
    for run in runs:
        rates.setdefault(run["label"], set()).add(run.get("lr"))
    result: dict[str, list[Run]] = {}
    for run in runs:
        label = run["label"] if len(rates[run["label"]]) == 1 else f"{run['label']}, lr {run['lr']:g}"
        result.setdefault(label, []).append(run)
    return result


def matrices(runs: Sequence[Run]) -> list[tuple[list[str], Floats]]:
    """(order, R) of each run that did not diverge."""
    return [(run["order"], np.array(run["R"], dtype=np.float64)) for run in runs if not run.get("diverged")]


def by_language(runs: Sequence[Run], metric: Callable[[Floats], Floats]) -> dict[str, list[float]]:
    """Locale -> one value per run. metric: R -> [T], by position in the order."""
    result: dict[str, list[float]] = {}
    for order, R in matrices(runs):
        for locale, value in zip(order, metric(R), strict=True):
            result.setdefault(locale, []).append(float(value))
    return result


def change(R: Floats) -> Floats:
    """[T]: R[T,i] - R[i,i], the change of each language after its own step; NaN for the last."""
    result = R[-1] - np.diagonal(R[1:])
    result[-1] = np.nan
    return result


def mean(values: Sequence[float | None]) -> float:
    """`measured_mean` as a float."""
    return float(measured_mean(values))


def script(locale: str) -> str:
    """Script of a locale; "unknown" outside MASSIVE."""
    return LANGUAGES[locale].script if locale in LANGUAGES else "unknown"


def spaced(locale: str) -> bool:
    """Whether the language is written with spaces between words; True outside MASSIVE."""
    return locale not in LANGUAGES or LANGUAGES[locale].spaced


def script_contrasts(locales: Sequence[str]) -> list[tuple[str, list[str], str, list[str]]]:
    """(name, locales, name, locales) of the comparisons that tell the effect of script from that of word segmentation."""
    latin, other = [m for m in locales if script(m) == "Latin"], [m for m in locales if script(m) != "Latin"]
    spaces, none = [m for m in locales if spaced(m)], [m for m in locales if not spaced(m)]
    return [
        ("not Latin", other, "Latin", latin),
        ("no spaces between words", none, "spaces", spaces),
        ("not Latin, but spaces", [m for m in other if spaced(m)], "Latin", latin),
    ]
