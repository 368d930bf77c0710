"""The data of two sections: F1 within experiences, step by step, and F1 over ranks and rates."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..cl.learner import Experience
from ..cl.spans import f1_from_counts
from ..cl.statistics import measured_mean
from ..cl.strategies import STRATEGIES
from ..cl.summary import Row
from ..cl.units import Run, traits
from . import figures
from .figures import Line, Panel, look

SHOWN = 4  # most strategies with a figure of their own
EARLIER = (figures.MUTED, "6 2")

Runs = Mapping[str, Sequence[Run]]  # label -> its runs
Traced = tuple[int, int, float, float]  # experience, step of the learner, F1 of its own languages, mean F1 of earlier ones


def experiences(run: Run) -> list[list[tuple[str, ...]]]:
    """The locales of each experience of each learner of a run; empty for a strategy that is not known here."""
    groups = run.get("groups") or {}
    if run["strategy"] not in STRATEGIES or run["strategy"] == "partial" and not groups.keys() >= set(run["order"]):
        return []
    streams = STRATEGIES[run["strategy"]].layout(run["order"], groups).streams
    return [[Experience.of(experience).locales for experience in stream] for stream in streams]


def traced(run: Run) -> list[list[Traced]]:
    """What was scored of each learner within its experiences."""
    streams = experiences(run)
    rows: list[list[Traced]] = [[] for _ in streams]
    for entry in run.get("curves") or ():
        g, i = entry["learner"], entry["experience"] - 1
        if 0 <= g < len(streams) and 0 <= i < len(streams[g]):
            own, before = streams[g][i], {locale for locales in streams[g][:i] for locale in locales}
            f1 = [_mean(entry["counts"], locales) for locales in (own, before - {*own})]
            rows[g].append((i, entry["step"], *f1))
    return [sorted(row) for row in rows]


def _mean(counts: Mapping[str, Sequence[int]], locales: Sequence[str] | set[str]) -> float:
    """Mean F1 over those of the locales that were scored; NaN if none was."""
    scored = [counts[locale] for locale in locales if len(counts.get(locale, ())) == 3]
    return float(np.mean(f1_from_counts(scored))) if scored else np.nan


def starts(row: Sequence[Traced]) -> dict[int, int]:
    """Where a learner's experiences begin: a score stands after every so many steps of each."""
    first: dict[int, int] = {}
    for i, step, *_ in row:
        first.setdefault(i, step)
    return {i: step - min(first.values()) for i, step in first.items()} if 0 in first else {}


def learning(strategies: Runs) -> dict[str, Any]:
    """F1 within experiences: of the language being learned for each strategy, and beside earlier ones for those that forget."""
    together: dict[str, Line] = {}
    joint: set[str] = set()
    panels: list[Panel] = []
    for n, (label, runs) in enumerate(strategies.items()):
        rows = {id(run): traced(run) for run in runs if not run.get("diverged")}
        curves = [_within(of_run) for of_run in rows.values() if any(of_run)]
        if curves:
            steps = np.array(sorted({step for curve in curves for step in curve}), np.float64)
            values = np.array([[curve.get(int(step), np.nan) for step in steps] for curve in curves])
            band = (np.fmin.reduce(values), np.fmax.reduce(values)) if len(values) > 1 else ()
            together[label] = Line(look(n), steps, measured_mean(values, axis=0), *band)
            if all(len(locales) > 1 for run in runs for stream in experiences(run) for locales in stream):
                joint.add(label)
        one = [run for run in runs if id(run) in rows and len(rows[id(run)]) == 1 and traits(run).can_change.any()]
        if one and rows[id(one[0])][0] and len(panels) < SHOWN:
            marks = [entry[:2] for entry in rows[id(one[0])][0]]
            alike = [run for run in one if run["order"] == one[0]["order"] and [e[:2] for e in rows[id(run)][0]] == marks]
            panels.append(_along(label, alike, [rows[id(run)][0] for run in alike]))
    if not together:
        return {}
    kinds = {"F1 of the language being learned": together.keys() - joint, "F1 of all languages, learned at once": joint}
    first = [
        figures.lines(caption, [together[label] for label in together if label in labels], "steps since it began", "F1")
        for caption, labels in kinds.items()
        if labels
    ]
    of_two = (("language being learned", look(0)), ("mean of earlier ones", ("currentColor", EARLIER[1])))
    return {"legend": [(label, line.look) for label, line in together.items()], "panels": first, "along": panels, "two": of_two}


def _within(rows: Sequence[Sequence[Traced]]) -> dict[int, float]:
    """Step of an experience -> F1 of its own languages, the mean over a run's learners and experiences."""
    values: dict[int, list[float]] = {}
    for row in rows:
        begin = starts(row)
        for i, step, own, _ in row:
            if i in begin:
                values.setdefault(step - begin[i], []).append(own)
    most = max(map(len, values.values()), default=0)
    return {step: float(measured_mean(of)) for step, of in values.items() if len(of) == most}  # the same languages at each


def _along(label: str, runs: Sequence[Run], rows: Sequence[Sequence[Traced]]) -> Panel:
    """One learner through its sequence, the mean over runs of one order and the same marks; each experience ends with R's row."""
    order, begin = runs[0]["order"], starts(rows[0])
    curves = []
    for run, row in zip(runs, rows, strict=True):
        R, points = np.array(run["R"], np.float64), {step: (own, earlier) for _, step, own, earlier in row}
        for i in begin:
            end = begin.get(i + 1, run["steps"] if i == len(order) - 1 else None)
            if end is not None and len(R) == len(order) + 1:
                points[end] = (float(R[i + 1, i]), float(measured_mean(R[i + 1, :i])) if i else np.nan)
        curves.append(points)
    steps = sorted(curves[0])
    values = measured_mean([[points[step] for step in steps] for points in curves], axis=0)
    x = np.array(steps, np.float64)
    borders = [begin[i] for i in sorted(begin)]
    first = [steps.index(min(step for step in steps if step > border)) for border in borders]  # a language's line begins here
    own = Line(look(0), np.insert(x, first, np.nan), np.insert(values[:, 0], first, np.nan))
    lines = [own, Line(EARLIER, x, values[:, 1])]
    caption = f"{label}, {runs[0]['order_name']}: one language after another"
    return figures.sequence(caption, lines, borders, [order[i] for i in sorted(begin)], runs[0]["steps"])


def over_settings(strategies: Runs, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Final F1 and share kept over ranks, and over rates, where a strategy has several of them.

    rows: summary rows of `strategies`.
    """
    kinds = (("rank", "lr", "rate"), ("lr", "rank", "rank"))  # what differs, what is the same, its name
    adapters = [(runs[0], row) for runs, row in zip(strategies.values(), rows, strict=True) if runs[0].get("rank") is not None]
    figures_of = []
    for differs, same, name in kinds:
        series: dict[str, dict[float, Row]] = {}
        for run, row in adapters:
            strategy = STRATEGIES[run["strategy"]].name if run["strategy"] in STRATEGIES else run["strategy"]
            series.setdefault(f"{strategy}, {name} {run[same]:g}", {})[run[differs]] = row
        series = {label: of for label, of in series.items() if len(of) > 1}
        names = sorted({value for of in series.values() for value in of})
        looks = {label: look(n) for n, label in enumerate(series)}
        panels = []
        for measure, ylabel in (("f1", "F1 at the end"), ("kept", "share kept")):
            lines = []
            for label, of in series.items():
                values = [(names.index(value) + 1.0, of[value][measure]) for value in sorted(of)]
                constructed = measure == "kept" and not next(iter(of.values()))["can_forget"]
                points = np.array([point for point in values if point[1] is not None], np.float64)
                if len(points) > 1 and not constructed:
                    lines.append(Line(looks[label], *points.T))
            if lines:
                over = "ranks" if differs == "rank" else "learning rates"
                panels.append(figures.lines(f"{ylabel}, over {over}", lines, over[:-1], ylabel, [f"{v:g}" for v in names]))
        if panels:
            figures_of.append({"legend": list(looks.items()), "panels": panels})
    return figures_of
