"""The data of each section: figures, and rows of formatted cells. page.html.j2 has the words and the HTML."""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..cl import metrics
from ..cl.effects import FEWEST_ORDERS
from ..cl.experiments.section import Section
from ..cl.metrics import FLOOR
from ..cl.statistics import FEWEST_TO_RESAMPLE, Floats, measured_mean
from ..cl.summary import LOSSES, Row, matrices, mean, summary_row
from ..cl.units import Run, traits
from . import figures
from .cells import NONE, Cell, between, count, counted, extent, number
from .figures import DOTTED, Line, Panel, look
from .languages import COLUMNS
from .paper import scored_on

PHASES, POINTS = 12, 120  # limits: curves, points per curve

JSON = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]  # label -> its runs
Log = Mapping[str, Sequence[JSON]]  # phase -> its entries in log.jsonl


def averages(row: Row, *names: str) -> list[Cell]:
    """Averages of a summary row with their intervals; CBT with its sign. What could not be lost says so."""
    cells = []
    for name in names:
        could, others = row["can_forget"], row["languages"] - 1
        if name in LOSSES and could == 0 and row["cbt"] is not None:
            cells.append(Cell("1" if name == "kept" else "0", "by construction"))
        else:
            interval = between(*(row[f"{name}_{end}"] for end in ("low", "high", "df")))
            if name == "cbt" and could is not None and 0 < could < others:
                interval = f"{interval}{interval and '; '}{could} of {others} could change"
            cells.append(Cell(number(row[name], sign=name == "cbt"), interval))
    return cells


def losing(rows: Sequence[Row]) -> list[Row]:
    """The rows whose learners could forget and were measured, the largest loss first."""
    return sorted((row for row in rows if row["cbt"] is not None and row["can_forget"]), key=lambda row: row["cbt"])


def headline(rows: Sequence[Row], compared: Sequence[Row]) -> dict[str, Any]:
    """The finding: the best strategy against the one that ends lowest, and the largest loss.

    compared: `comparisons`. Numbers have two digits, ends of intervals are a list, empty without one.
    """
    scored = [row for row in rows if row["f1"] is not None]
    best = max(scored, key=lambda row: row["f1"], default=None)
    far = min((row for row in scored if row is not best), key=lambda row: row["f1"], default=None)
    gap = next((row for row in compared if far is not None and row["other"] == far["label"] and row["units"]), None)
    worst, loss = next(iter(losing(rows)), None), None
    if worst is not None:
        sign, verb = (1, "gained") if round(worst["cbt"], 2) > 0 else (-1, "lost")
        ends = [] if worst["cbt_low"] is None else sorted((sign * worst["cbt_low"], sign * worst["cbt_high"]))
        loss = worst["label"], f"{verb} {abs(worst['cbt']):.2f} F1", [number(end, 2) for end in ends]
    ends = [] if gap is None or gap["difference_low"] is None else [gap["difference_low"], gap["difference_high"]]
    difference = None if gap is None else (number(gap["difference"], 2), [number(end, 2) for end in ends])
    return {"best": best, "far": far, "gap": difference, "loss": loss}


def asked(scores: JSON, strategies: Runs) -> str:
    """The question of the study."""
    names, locales = ", ".join(strategies), scores["corpus"]["locales"]
    if len(locales) == 1:
        return f"How well does each learn one language: {names}?"
    if len(strategies) == 1:
        return f"How much of {len(locales)} languages is left in the end: {names}?"
    return f"Which way of sharing learners leaves most of {len(locales)} languages at the end: {names}?"


def findings(rows: Sequence[Row], languages: JSON) -> list[str]:
    """What was found beside the headline: shares kept, groups of languages. languages: data of that section, empty without."""
    lines = []
    for row in losing(rows)[:COLUMNS]:
        if row["kept"] is not None:
            ends = between(row["kept_low"], row["kept_high"], None, 2)
            lines.append(f"{row['label']} keeps {row['kept']:.2f} of what it had learned of a language{ends and f' ({ends})'}.")
    free = [row["label"] for row in rows if row["can_forget"] == 0 and row["cbt"] is not None]
    if free:
        lines.append(f"{', '.join(free)}: no learner gets a second language, so nothing can be lost. That is no finding.")
    if languages.get("tests"):
        differ = languages["differ"]
        what = f"differ in {len(differ)}: {'; '.join(differ)}" if differ else "differ in none: no evidence that they matter here"
        lines.append(f"Scripts and ways of writing, {languages['tests']} tests at 0.05 without correction, {what}.")
    return lines


def limits(scores: JSON, rows: Sequence[Row], losers: Sequence[Run]) -> list[str]:
    """What the run cannot say: split, orders, seeds, utterances, floor. losers: runs of the strategy whose loss is shown."""
    corpus, lines = scores["corpus"], []
    split, sizes = scored_on(corpus)
    if split == "dev":
        lines.append("Scored on dev: for choosing settings. What was chosen is to be measured once on test.")
    else:
        lines.append(
            "Scored on test: settings that were chosen on the same utterances look better than they are (--eval-split dev)."
        )
    orders = len({tuple(run["order"]) for run in losers})
    if 0 < orders < FEWEST_ORDERS:
        few = "One order" if orders == 1 else f"Only {orders} orders"
        lines.append(
            f"{few}: how much a language lost or destroyed also depends on its place in the order. Which languages destroy "
            f"others is not known; that takes --orders {FEWEST_ORDERS} or more."
        )
    seeds = max((row["seeds"] for row in rows), default=1)
    if seeds == 1:
        lines.append("One seed: the chance of a draw of adapters and batches is in no figure.")
    elif seeds < FEWEST_TO_RESAMPLE:
        lines.append(f"{seeds} seeds: intervals of few values are wide, and take the values to be normally distributed.")
    lines.append(
        f"Intervals know orders and seeds only, not which utterances were tested ({extent(sizes, str)} a language): that needs "
        "the counts of each utterance, which are not kept."
    )
    low = [row["label"] for row in rows if row["learned"] is not None and row["learned"] < FLOOR]
    if low:
        lines.append(f"At the floor nothing can be lost: {', '.join(low)} learned nothing.")
    if corpus.get("synthetic"):
        lines.append("The corpus is synthetic: what holds between strategies may hold for real languages, levels do not.")
    return lines


def paired_differences(compared: Sequence[Row]) -> list[Sequence[str | Cell]]:
    """Rows of the table of final F1, best against each other strategy."""
    rows: list[Sequence[str | Cell]] = []
    for row in compared:
        interval = between(*(row[f"difference_{end}"] for end in ("low", "high", "df")))
        rows.append(
            (f"{row['label']} minus {row['other']}", Cell(number(row["difference"], sign=True), interval), str(row["units"]))
        )
    return rows


def results(rows: Sequence[Row], strategies: Runs) -> dict[str, Any]:
    """Averages by strategy, and by strategy and order. rows: summary rows of `strategies`."""
    cells, by_order = [], []
    for row in rows:
        means = averages(row, "f1", "cbt", "kept", "cft", "forgetting")
        sizes = count(row["trainable_parameters"]), count(row["steps"])
        warning = f"{row['diverged']} diverged" if row["diverged"] else ""
        different = "" if row["units"] == row["runs"] - row["diverged"] else f"{row['units']} different"
        runs = Cell(f"{row['runs']} ({row['orders']} × {row['seeds']})", different, warning)
        cells.append((row["label"], *means, number(row["worst"]), *sizes, runs))
    for label, members in strategies.items():
        for order in dict.fromkeys(run["order_name"] for run in members):
            row = summary_row(label, [run for run in members if run["order_name"] == order])
            by_order.append((label, order, *averages(row, "f1", "cbt"), number(row["worst"])))
    diverged = [(label, run) for label, runs in strategies.items() for run in runs if run.get("diverged")]
    return {"rows": cells, "by_order": by_order, "diverged": diverged}


def along_the_sequence(strategies: Runs, sequential: Runs) -> dict[str, Any]:
    """F1 and CBT by step, retention by hops; joint strategies as a level."""
    looks = {label: look(n) if label in sequential else (look(n)[0], DOTTED) for n, label in enumerate(strategies)}
    orders = {tuple(run["order"]) for runs in sequential.values() for run in runs}
    order, T = next(iter(orders)) if len(orders) == 1 else (), max(map(len, orders))
    steps = "after training on" if order else "languages trained"

    def chart(caption: str, drawn: Runs, curve: Callable[[Floats], Floats], xlabel: str, ylabel: str, **options: Any) -> Panel:
        series = []
        for label, runs in drawn.items():
            curves = [curve(R) if label in sequential else np.full(T, mean(R[-1])) for _, R in matrices(runs)]
            if curves:
                band = (np.fmin.reduce(curves), np.fmax.reduce(curves)) if len(curves) > 1 else ()
                y = measured_mean(curves, axis=0)
                series.append(Line(looks[label], np.arange(1.0, len(y) + 1), y, *band))
        return figures.lines(caption, series, xlabel, ylabel, **options)

    f1, cbt, backward = metrics.f1_per_step, metrics.backward_transfer_per_step, metrics.retention_curve
    forward = partial(backward, direction="forward")
    since, until = "hops since the language was learned", "hops until the language is learned"
    later = "Multi-hop, backward: what later training did to a language"
    earlier = "Multi-hop, forward: what earlier training gave a language"
    open_ = {label: runs for label, runs in sequential.items() if any(traits(run).can_change[:-1].any() for run in runs)}
    panels = [
        chart("Mean F1 over the languages seen so far", strategies, f1, steps, "F1", names=order),
        chart(earlier, sequential, forward, until, "F1 above untrained", zero=True),
    ]
    if open_:
        panels[1:1] = [
            chart("CBT: earlier languages against when learned", open_, cbt, steps, "CBT", names=order, zero=True),
            chart(later, open_, backward, since, "change of F1", zero=True),
        ]
    constructed = [label for label in sequential if label not in open_]
    return {
        "joint": len(strategies) > len(sequential),
        "legend": looks.items(),
        "panels": panels,
        "constructed": ", ".join(constructed),
    }


def heat_maps(sequential: Runs) -> list[Panel]:
    """R of each strategy, averaged over the runs with its first order; diverged runs only where there are no others."""
    means = {}
    for label, runs in sequential.items():
        runs = [run for run in runs if not run.get("diverged")] or runs
        runs = [run for run in runs if run["order"] == runs[0]["order"]]
        means[label] = runs, measured_mean([run["R"] for run in runs], axis=0)
    largest = max(np.max(R, initial=0.01, where=~np.isnan(R)) for _, R in means.values())
    panels = []
    for label, (runs, R) in means.items():
        caption = f"{label} · {runs[0]['order_name']}, {counted(len(runs), 'run')}"
        panels.append(figures.heat_map(caption, R, runs[0]["order"], largest, "diverged" if runs[0].get("diverged") else ""))
    return panels


def _numbers(entries: Iterable[JSON], *names: str) -> Floats:
    """[n, names]: the log entries in which all these are numbers."""
    rows = [[entry.get(name) for name in names] for entry in entries]
    rows = [row for row in rows if all(isinstance(value, (int, float)) for value in row)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))


def training(log: Log) -> dict[str, Any]:
    """Loss, throughput and time of the phases with most entries."""
    phases = dict(sorted(log.items(), key=lambda item: -len(item[1]))[:PHASES])
    panels, rows = [], []
    for caption, name, ylabel in (("Training loss", "loss", "loss"), ("Throughput", "tokens_per_second", "tokens a second")):
        series = []
        for n, entries in enumerate(phases.values()):
            points = _numbers(entries, "step", name)
            if len(points) > 1:
                shares = np.array_split(points, min(len(points), POINTS))
                series.append(Line(look(n), *np.array([share.mean(axis=0) for share in shares]).T))
        if series:
            panels.append(figures.lines(caption, series, "step", ylabel))
    for phase, entries in phases.items():
        steps, losses, speeds, times = (_numbers(entries, name)[:, 0] for name in ("step", "loss", "tokens_per_second", "time"))
        step, loss = max(steps, default=None), losses[-1] if len(losses) else None
        speed = np.median(speeds) if len(speeds) else None
        time = f"{np.diff(times).clip(0).sum():.0f} s" if len(times) > 1 else NONE  # a continued run counts from 0 again
        rows.append((phase, count(step), number(loss), count(speed), time))
    legend = [(phase, look(n)) for n, phase in enumerate(phases)]
    return {"legend": legend, "panels": panels, "rows": rows, "phases": len(log), "shown": PHASES, "points": POINTS}


def _flat(value: JSON, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of a nested dict."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield from _flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item if isinstance(item, str) else json.dumps(item)


def setting(choices: Sequence[str], config: JSON, env: JSON) -> dict[str, Any]:
    """Declared choices, the command, its configuration and environment."""
    command = env.get("command") or env.get("argv") or ""
    command = command if isinstance(command, str) else shlex.join(command)
    tables = [("Configuration", list(_flat(config))), ("Environment", list(_flat(env)))]
    return {"choices": choices, "command": command, "tables": tables}


def panels(section: Section) -> list[Panel]:
    """The figures of an experiment's section."""
    drawn = [figures.named_bars(*bars) for bars in section.bars if bars.values]
    drawn += [figures.scatter(*scatter) for scatter in section.scatters]
    for caption, names, values, rows in section.matrices:
        largest = float(np.nanmax(np.abs(values), initial=0.0)) or 1.0
        drawn.append(figures.heat_map(caption, values, names, largest, rows=rows))
    return drawn
