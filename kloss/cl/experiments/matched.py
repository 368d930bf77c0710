"""Do settings forget less, or only learn less? SHARED with several rates (`rates`) or ranks (`ranks`): what each setting keeps is
compared on the languages that both had learned equally well.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..probes import Counts
from ..statistics import crossed_interval, measured_mean
from ..study import Study
from ..summary import MEASURES, measures
from ..units import Run
from .section import Bars, Needs, Section, Table, between, signed

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

SHAPE = {"setting": str}
MATCHED = 0.05  # F1: what two settings may differ by on a language that both learned equally well
NAMES = {"lr": ("rate", "learning rates"), "rank": ("rank", "ranks")}


def plan(setting: str, config: Config, study: Study) -> Needs:
    """The cells that it reads, which R has anyway; none with one value of the setting ("lr" or "rank")."""
    trials = [trial for trial in study.trials if trial.strategy == "shared" and len(trial.order) > 1]
    if len({getattr(trial, setting) for trial in trials}) < 2:
        return Needs()
    steps = [(trial, step, locale) for trial in trials for step, locale in enumerate(trial.order, 1)]
    return Needs(cells=[(trial.learners[0], at, m) for trial, step, m in steps for at in (step, len(trial.order))])


def record(
    setting: str, config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]
) -> list[dict[str, Any]]:
    """One entry: which setting differs."""
    return [{"setting": setting}] if plan(setting, config, study).cells else []


def matched(low: Run, high: Run) -> tuple[float, int]:
    """How much more `high` keeps than `low` on languages that both learned equally well, and of how many."""
    one, other = (measures(run["order"], run["R"]) for run in (low, high))
    gaps = [other[m][2] - one[m][2] for m in one if abs(other[m][0] - one[m][0]) <= MATCHED]
    gaps = [gap for gap in gaps if gap == gap]
    return (float(np.mean(gaps)) if gaps else np.nan), len(gaps)


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """Means of each value of the setting, then neighbours compared on equally learned languages, paired by order and seed."""
    if not data:
        return None
    setting = data[0]["setting"]
    (one, several), fixed = NAMES[setting], "rank" if setting == "lr" else "lr"
    runs = [run for run in scores["runs"] if run["strategy"] == "shared" and not run.get("diverged")]
    findings: list[str] = []
    bars, tables = [], []
    for value in dict.fromkeys(run[fixed] for run in runs):
        own = [run for run in runs if run[fixed] == value]
        settings = sorted({run[setting] for run in own})
        if len(settings) < 2:
            continue
        at = f"SHARED, {NAMES[fixed][0]} {value:g}"
        by_setting = {s: {(tuple(run["order"]), run["seed"]): run for run in own if run[setting] == s} for s in settings}
        means = {
            s: np.array(
                [measured_mean(list(measures(run["order"], run["R"]).values()), axis=0) for run in by_setting[s].values()]
            )
            for s in settings
        }
        for i, measure in enumerate(MEASURES):
            bars.append(Bars(f"{at}: {measure}", {f"{one} {s:g}": means[s][:, i].tolist() for s in settings}, measure))
        rows = []
        for low, high in pairwise(settings):
            keys = [key for key in by_setting[low] if key in by_setting[high]]
            gaps = {key: matched(by_setting[low][key], by_setting[high][key]) for key in keys}
            pairs = {key: gap for key, (gap, _) in gaps.items() if gap == gap}
            languages = sum(count for _, count in gaps.values())
            if not pairs:
                findings.append(f"{at}: {one} {high:g} and {low:g} learned no language equally well.")
                rows.append((f"{high:g} against {low:g}", "", "", "0"))
                continue
            gap, interval = float(np.mean(list(pairs.values()))), crossed_interval(pairs)
            rows.append((f"{high:g} against {low:g}", signed(gap, 3), between(interval, 3), str(languages)))
            known = ": no evidence of a difference" if interval.low <= 0 <= interval.high else ""
            findings.append(
                f"{at}: of languages learned equally well, {one} {high:g} keeps {signed(gap)} against {low:g} "
                f"({between(interval) or 'one run, no interval'}; {languages} languages, counted in each run{known})."
            )
        head = (one, "difference in the share kept", "95 % interval", "languages, counted in each run")
        tables.append(Table(f"{at}: neighbouring {several}, on languages learned equally well", head, rows))
    limits = (
        f"Equally well: within {MATCHED:.2f} F1 when learned. Languages that one setting learns better are in no comparison.",
        "Intervals are over orders and seeds.",
    )
    question = f"Which {several} keep more of what was learned, once it is the same that was learned?"
    return Section(f"Do {several} forget, or learn, differently?", question, findings, limits, bars, (), tables) if bars else None
