"""The runs of scores.json put together: averages by strategy, language and script, for report and CLI.

Averages are over runs (orders x seeds) that did not diverge, and are taken from the score matrices R again,
so that an old run folder can be reported anew. Intervals are 95 % bootstrap intervals over those runs.
"""

from __future__ import annotations

import math

import numpy as np

from kloss.cl import metrics
from kloss.cl.languages import LANGUAGES

AVERAGED = ("f1", "cbt", "cft", "fwt", "forgetting", "worst")
WRITING = (  # kinds of writing: few enough to tell their colours (Okabe & Ito 2008) apart
    ("Latin", "#0072B2", ("Latin",)),
    ("other alphabets", "#56B4E9", ("Cyrillic", "Greek", "Armenian", "Georgian", "Hangul")),
    ("consonant alphabets", "#009E73", ("Arabic", "Hebrew")),
    (
        "syllable alphabets",
        "#E69F00",
        ("Ethiopic", "Bengali", "Devanagari", "Kannada", "Malayalam", "Tamil", "Telugu", "Thai", "Khmer", "Myanmar"),
    ),
    ("Chinese and Japanese", "#D55E00", ("Han", "Japanese")),
    ("unknown", "#8A8A8A", ()),
)


def summary_rows(scores):
    """One dict a strategy, JSON-ready, in order of appearance: for the command line's table and scores.json.

    Keys: label, strategy, runs, orders, seeds, diverged (a count), trainable_parameters, steps, and for each
    of f1, cbt, cft, fwt, forgetting and worst its mean over the runs that did not diverge (None: not defined
    or not measured), with NAME_low and NAME_high, the bootstrap interval (None with fewer than two runs).
    """
    return [summary_row(label, runs) for label, runs in by_label(scores["runs"]).items()]


def summary_row(label, runs):
    """The entry of `summary_rows` for one list of runs."""
    good = [metrics.summarise(run["R"]) for run in runs if not run.get("diverged")]
    row = {
        "label": label,
        "strategy": runs[0]["strategy"],
        "runs": len(runs),
        "orders": len({run["order_name"] for run in runs}),
        "seeds": len({run["seed"] for run in runs}),
        "diverged": len(runs) - len(good),
        "trainable_parameters": runs[0].get("trainable_parameters"),
        "steps": runs[0].get("steps"),
    }
    for name in AVERAGED:
        values = [summary[name] for summary in good if summary[name] is not None]
        row[name] = sum(values) / len(values) if values else None
        low, high = metrics.bootstrap_interval(values)
        row[name + "_low"], row[name + "_high"] = (None, None) if math.isnan(low) else (low, high)
    return row


def by_label(runs):
    """label -> its runs; a label used with several learning rates is split by them."""
    rates = {}
    for run in runs:
        rates.setdefault(run["label"], set()).add(run.get("lr"))
    result = {}
    for run in runs:
        several = len(rates[run["label"]]) > 1
        label = f"{run['label']}, lr {run['lr']:g}" if several else run["label"]
        result.setdefault(label, []).append(run)
    return result


def matrices(runs):
    """[(order, R float64)] of the runs that did not diverge."""
    return [(run["order"], np.array(run["R"], dtype=np.float64)) for run in runs if not run.get("diverged")]


def is_sequential(runs):
    """Whether these runs learned one language after another."""
    return metrics.is_sequential(runs[0]["R"])


def by_language(runs, values):
    """locale -> [one number a run]; `values` is a function of R that gives one number a position."""
    result = {}
    for order, R in matrices(runs):
        for locale, value in zip(order, values(R), strict=True):
            result.setdefault(locale, []).append(float(value))
    return result


def change(R):
    """[T]: R[T,i] - R[i,i], what became of each language; NaN for the last, which had nothing after it."""
    result = R[-1] - np.diagonal(R[1:])
    result[-1] = np.nan
    return result


def mean(values):
    """Mean of a list over what was measured; NaN for none."""
    return float(metrics.measured_mean(values))


def script(locale):
    """The script of a locale, "unknown" for one that is not of MASSIVE."""
    return LANGUAGES[locale].script if locale in LANGUAGES else "unknown"


def spaced(locale):
    """Whether a locale's language is written with spaces between words."""
    return locale not in LANGUAGES or LANGUAGES[locale].spaced


def writing(locale):
    """(kind of writing, colour) of a locale."""
    found = ((kind, colour) for kind, colour, scripts in WRITING if script(locale) in scripts)
    return next(found, WRITING[-1][:2])


def kinds_of_writing(locales):
    """(kind, colour) of those kinds that occur."""
    present = {writing(locale) for locale in locales}
    return [(kind, colour) for kind, colour, _ in WRITING if (kind, colour) in present]


def script_contrasts(locales):
    """(name, locales, name, locales) of the comparisons that tell script from segmentation."""
    latin = [m for m in locales if script(m) == "Latin"]
    other = [m for m in locales if script(m) != "Latin"]
    return (
        ("not Latin", other, "Latin", latin),
        ("no spaces between words", [m for m in locales if not spaced(m)], "spaces", [m for m in locales if spaced(m)]),
        ("not Latin, but spaces", [m for m in other if spaced(m)], "Latin", latin),
    )
