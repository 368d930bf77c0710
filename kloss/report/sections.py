"""The data of each section: figures, and rows of formatted cells. page.html.j2 has the words and the HTML."""

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from math import isnan
from typing import Any, NamedTuple

import numpy as np

from ..cl import metrics
from ..cl.languages import LANGUAGES
from ..cl.statistics import Floats, measured_mean, permutation_test
from ..cl.summary import Row, Run, by_language, change, matrices, mean, script, script_contrasts, summary_row
from . import figures
from .figures import DOTTED, WRITING, Line, Panel, colour_of, look

PAPER_TABLE = (  # strategy, its name in the paper, F1 x 100, parameters
    ("multi", "MULTI", "75.03", "278 M"),
    ("non-shared", "NON-SHARED LoRA", "72–73", "278–2228 M"),
    ("vanilla", "VANILLA", "66", "278 M"),
    ("shared", "SHARED LoRA", "60–61", "5–43 M"),
)
MASSIVE = (52, 11514, 2974)  # languages, training and test utterances of each
COLUMNS, PHASES, POINTS = 4, 12, 120  # limits: strategies in the table of languages, curves, points per curve
NONE = "–"

JSON = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]  # label -> its runs
Log = Mapping[str, Sequence[JSON]]  # phase -> its entries in log.jsonl


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


def averages(row: Row, *names: str) -> list[Cell]:
    """Averages of a summary row with their intervals; CBT with its sign."""
    cells = []
    for name in names:
        low, high = row[name + "_low"], row[name + "_high"]
        interval = "" if low is None else f"{number(low)} to {number(high)}"
        cells.append(Cell(number(row[name], sign=name == "cbt"), interval))
    return cells


def headline(rows: Sequence[Row]) -> dict[str, Any]:
    """The finding: largest and smallest loss as (label, words, ends of the interval), and the row with the best F1."""
    losses = []
    for row in sorted((row for row in rows if row["cbt"] is not None), key=lambda row: row["cbt"]):
        sign, verb = (1, "gained") if round(row["cbt"], 2) > 0 else (-1, "lost")
        ends = [] if row["cbt_low"] is None else sorted((sign * row["cbt_low"], sign * row["cbt_high"]))
        losses.append((row["label"], f"{verb} {abs(row['cbt']):.2f} F1", [number(end, 2) for end in ends]))
    scored = [row for row in rows if row["f1"] is not None]
    return {"losses": losses[:1] + losses[1:][-1:], "best": max(scored, key=lambda row: row["f1"], default=None)}


def results(rows: Sequence[Row], strategies: Runs) -> dict[str, Any]:
    """Averages by strategy, and by strategy and order. rows: summary rows of `strategies`."""
    cells, by_order = [], []
    for row in rows:
        means, sizes = averages(row, "f1", "cbt", "cft", "forgetting"), (count(row["trainable_parameters"]), count(row["steps"]))
        warning = f"{row['diverged']} diverged" if row["diverged"] else ""
        runs = Cell(f"{row['runs']} ({row['orders']} × {row['seeds']})", warning=warning)
        cells.append((row["label"], *means, number(row["worst"]), *sizes, runs))
    for label, members in strategies.items():
        for order in dict.fromkeys(run["order_name"] for run in members):
            row = summary_row(label, [run for run in members if run["order_name"] == order])
            by_order.append((label, order, *averages(row, "f1", "cbt"), number(row["worst"])))
    diverged = [(label, run) for label, runs in strategies.items() for run in runs if run.get("diverged")]
    return {"rows": cells, "by_order": by_order, "diverged": diverged}


def beside_the_paper(scores: JSON, rows: Sequence[Row]) -> dict[str, Any]:
    """The paper's table with this run's figures beside, and whether the two compare."""
    backbone, corpus = scores["backbone"], scores["corpus"]
    train, test = (list(corpus[name].values()) for name in ("train_utterances", "test_utterances"))
    encoder = (backbone["layers"], backbone["hidden"], backbone["vocabulary"] >= 250002) == (12, 768, True)
    cells = []
    for strategy, name, f1, size in PAPER_TABLE:
        ours = [row for row in rows if row["strategy"] == strategy and row["f1"] is not None]
        sizes = [row["trainable_parameters"] for row in ours if row["trainable_parameters"]]
        cells.append((name, f1, size, extent([100 * row["f1"] for row in ours], "{:.1f}".format), extent(sizes, count)))
    comparable = encoder and "massive" in corpus["name"].lower() and (len(train), min(train), min(test)) == MASSIVE
    return {"comparable": comparable, "rows": cells, "train": extent(train, str), "test": extent(test, str)}


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
    panels = [
        chart("Mean F1 over the languages seen so far", strategies, f1, steps, "F1", names=order),
        chart("CBT: earlier languages against when learned", sequential, cbt, steps, "CBT", names=order, zero=True),
        chart(later, sequential, backward, since, "change of F1", zero=True),
        chart(earlier, sequential, forward, until, "F1 above untrained", zero=True),
    ]
    return {"joint": len(strategies) > len(sequential), "legend": looks.items(), "panels": panels}


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


def languages(corpus: JSON, sequential: Runs, focus: str) -> dict[str, Any]:
    """Change of F1 by language and by script under the strategy `focus`, and whether scripts differ by more than chance."""
    locales, tokens = corpus["locales"], corpus.get("tokens_per_word") or {}
    changes = by_language(sequential[focus], change)
    impacts = by_language(sequential[focus], metrics.multi_hop_backward_transfer)

    columns = list(sequential)[:COLUMNS]
    kinds = ((lambda R: R[-1], False), (change, True))
    scores = [(by_language(sequential[label], metric), sign) for label in columns for metric, sign in kinds]

    def cells(members: Sequence[str]) -> list[str]:
        """Subwords per word, then F1 and its change under each strategy of `columns`: means over locales."""
        f1 = [number(mean([mean(score.get(m, [])) for m in members]), sign=sign) for score, sign in scores]
        return [number(mean([tokens.get(m) for m in members]), 2), *f1]

    scripts: dict[str, list[str]] = {}
    for locale in locales:
        scripts.setdefault(script(locale), []).append(locale)
    by_script = [
        (Cell(name, colour=colour_of(members[0])), str(len(members)), *cells(members))
        for name, members in sorted(scripts.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    means = {m: mean(values) for m, values in changes.items() if not isnan(mean(values))}
    contrasts = []
    for name_a, a, name_b, b in script_contrasts(list(means)):
        values = [means[m] for m in a], [means[m] for m in b]
        test = permutation_test(*values)
        title = f"{name_a} ({len(a)}) against {name_b} ({len(b)})"
        signed = (number(value, sign=True) for value in (*map(mean, values), test.difference))
        contrasts.append((title, *signed, "< 0.001" if test.p_value < 0.001 else number(test.p_value)))
    names = {m: LANGUAGES[m].name if m in LANGUAGES else "" for m in locales}
    colours = {colour_of(m) for m in locales}
    return {
        "focus": focus,
        "writing": [(kind, colour) for kind, colour, _ in WRITING if colour in colours],
        "panels": [
            figures.bars("F1 at the end minus F1 when learned", changes, "change of F1"),
            figures.bars("What training each did to those before it (MBT, impact)", impacts, "mean change of F1"),
        ],
        "columns": columns,
        "by_script": by_script,
        "contrasts": contrasts,
        "one_order": len({tuple(order) for order, _ in matrices(sequential[focus])}) == 1,
        "by_locale": [(f"{m} {name}", script(m), *cells([m])) for m, name in names.items()],
    }


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
