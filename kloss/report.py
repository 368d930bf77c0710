"""The page that a run leaves behind: report.html, one file that opens offline, made from a run folder."""

from __future__ import annotations

import json
import math
import shlex
from html import escape
from pathlib import Path

import numpy as np

from kloss import page, plots
from kloss.aggregate import (
    by_label,
    by_language,
    change,
    is_sequential,
    kinds_of_writing,
    matrices,
    mean,
    script,
    script_contrasts,
    spaced,
    summary_row,
    summary_rows,
    writing,
)
from kloss.cl import metrics
from kloss.cl.languages import LANGUAGES
from kloss.errors import UserError
from kloss.files import read_json, write_text

__all__ = ["render", "summary_rows", "write_report"]

PAPER = "arXiv 2504.20356"
PAPER_TABLE = (  # strategy, its name there, F1 x 100, parameters
    ("multi", "MULTI", "75.03", "278 M"),
    ("non-shared", "NON-SHARED LoRA", "72–73", "278–2228 M"),
    ("vanilla", "VANILLA", "66", "278 M"),
    ("shared", "SHARED LoRA", "60–61", "5–43 M"),
)
HEAT_MAPS, COLUMNS, PHASES, POINTS = 6, 4, 12, 120  # the most of each: unfolded, in a table, curves, points


def write_report(run_folder) -> Path:
    """Writes report.html of a run folder from its scores.json, config.json, env.json and log.jsonl.

    The last three may be missing. Returns the path of the page.

    Raises UserError for a folder without scores.json, a file that cannot be read, or another format.
    """
    folder = Path(run_folder)
    scores = read_json(folder / "scores.json")
    if scores.get("format") != 1:
        given = scores.get("format")
        raise UserError(f"{folder / 'scores.json'} has format {given!r}; only format 1 is known")
    config, env = (read_json(p) if p.exists() else {} for p in (folder / "config.json", folder / "env.json"))
    log = folder / "log.jsonl"
    path = folder / "report.html"
    write_text(path, render(scores, config, env, _read_log(log) if log.exists() else {}))
    return path


def render(scores, config, env, phases):
    """The page as one string; what scores.json, config.json and env.json hold, and log.jsonl by phase."""
    shown, rows = by_label(scores["runs"]), summary_rows(scores)
    sequential = {label: runs for label, runs in shown.items() if is_sequential(runs)}
    measured = [row for row in rows if row["cbt"] is not None]
    body = [_results(rows, shown), _beside_the_paper(scores, rows)]
    if sequential:
        body += [_along_the_sequence(shown, sequential), _heat_maps(sequential)]
    if measured:
        focus = min(measured, key=lambda row: row["cbt"])["label"]
        body.append(_languages(scores["corpus"], sequential, focus))
    if phases:
        body.append(_training(phases))
    body.append(_setting(scores.get("choices", []), config, env))

    corpus, backbone, n = scores["corpus"], scores["backbone"], len(scores["runs"])
    facts = [
        f"{len(corpus['locales'])} languages of {corpus['name']}",
        f"{corpus['labels']} labels",
        f"{backbone['name']}, {page.count(backbone['parameters'])} parameters, "
        f"{backbone['layers']} layers of {backbone['hidden']}",
        f"{n} run{'' if n == 1 else 's'}",
    ]
    if env.get("commit"):
        facts.append(f"commit {env['commit'][:10]}{' (dirty)' if env.get('dirty') else ''}")
    header = (
        f"<p class='name'>kloss · {escape(scores['name'])}</p><h1>{_headline(rows)}</h1>"
        f"<p class='facts'>{' · '.join(map(escape, facts))}</p>"
    )
    return page.document(f"{scores['name']} · kloss", header, "".join(body))


def _read_log(path):
    """phase -> the entries of log.jsonl. A last line without its end was cut off by a kill: left out."""
    phases = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number} is not JSON: {error}") from error
        phases.setdefault(str(entry.get("phase", "")), []).append(entry)
    return phases


def _lost(row):
    """NAME lost 0.31 F1 (0.28 to 0.34)"""
    sign = 1 if row["cbt"] > 0.005 else -1
    interval = ""
    if row["cbt_low"] is not None:
        ends = sorted((sign * row["cbt_low"], sign * row["cbt_high"]))
        interval = " <span class='ci'>({} to {})</span>".format(*(page.number(end, 2) for end in ends))
    verb = "gained" if sign > 0 else "lost"
    return f"<b>{escape(row['label'])}</b> {verb} {abs(row['cbt']):.2f} F1{interval}"


def _headline(rows):
    """The finding: who lost most, and who least."""
    measured = sorted((row for row in rows if row["cbt"] is not None), key=lambda row: row["cbt"])
    if measured:
        text = f"{_lost(measured[0])} on the languages it had learned earlier"
        return text + (f"; {_lost(measured[-1])}." if len(measured) > 1 else ".")
    scored = [row for row in rows if row["f1"] is not None]
    if not scored:
        return "Every run diverged: there is nothing to compare." if rows else "No run is in this folder."
    best = max(scored, key=lambda row: row["f1"])
    return (
        f"<b>{escape(best['label'])}</b> reached {best['f1']:.2f} F1. No two languages were learned one "
        "after the other, so none could be lost."
    )


def _results(rows, shown):
    cells = []
    for row in rows:
        diverged = f"<span class='bad'>{row['diverged']} diverged</span>" if row["diverged"] else ""
        cells.append(
            (
                escape(row["label"]),
                page.with_interval(row, "f1"),
                page.with_interval(row, "cbt", sign=True),
                page.with_interval(row, "cft"),
                page.with_interval(row, "forgetting"),
                page.number(row["worst"]),
                page.count(row["trainable_parameters"]),
                page.count(row["steps"]),
                f"{row['runs']} ({row['orders']} × {row['seeds']}){diverged}",
            )
        )
    body = [
        page.table(
            (
                "strategy",
                "F1",
                "CBT",
                "CFT",
                "forgetting",
                "worst language",
                "trainable",
                "steps",
                "runs (orders × seeds)",
            ),
            cells,
            "main",
        )
    ]
    diverged = [
        f"<li><b>{escape(label)}</b>, {escape(run['order_name'])}, seed {run['seed']} diverged "
        f"and is in no average: {escape(run['diverged'])}</li>"
        for label, runs in shown.items()
        for run in runs
        if run.get("diverged")
    ]
    if diverged:
        body.append(f"<ul class='warning'>{''.join(diverged)}</ul>")
    orders = [(label, name) for label, runs in shown.items() for name in dict.fromkeys(run["order_name"] for run in runs)]
    if len(orders) > len(rows):
        cells = []
        for label, name in orders:
            row = summary_row(label, [run for run in shown[label] if run["order_name"] == name])
            cells.append(
                (
                    escape(label),
                    escape(name),
                    page.with_interval(row, "f1"),
                    page.with_interval(row, "cbt", sign=True),
                    page.number(row["worst"]),
                )
            )
        head = ("strategy", "order", "F1", "CBT", "worst language")
        body.append(page.details("The same by order", page.table(head, cells, "two")))
    return page.section(
        "Results",
        "F1 is the mean over all languages after the last step, 0 to 1. CBT is how much earlier "
        "languages changed since they were learned (negative: forgotten), CFT the F1 on languages still to "
        "come, forgetting the distance from the best earlier score. Small print: 95 % bootstrap interval "
        "over runs.",
        *body,
    )


def _beside_the_paper(scores, rows):
    backbone, corpus = scores["backbone"], scores["corpus"]
    given = (backbone["layers"], backbone["hidden"], backbone["vocabulary"] >= 250002, len(corpus["locales"]))
    if given == (12, 768, True, 52) and "massive" in corpus["name"].lower():
        note = "Backbone and corpus have the paper’s shape; its settings are partly inferred."
    else:
        here = f"{escape(backbone['name'])} on {escape(corpus['name'])}, {len(corpus['locales'])} languages"
        note = f"<b>Levels do not compare:</b> the paper used XLM-R base on MASSIVE, 52 languages; this run used {here}."
    cells = []
    for strategy, name, f1, size in PAPER_TABLE:
        ours = [row for row in rows if row["strategy"] == strategy and row["f1"] is not None]
        mine = _span([100 * row["f1"] for row in ours], lambda value: f"{value:.1f}")
        sizes = [row["trainable_parameters"] for row in ours if row["trainable_parameters"]]
        cells.append((name, f1, size, mine, _span(sizes, page.count)))
    head = ("method", "paper: F1 × 100", "paper: parameters", "this run: F1 × 100", "this run: trainable")
    return (
        "<aside><h3>Beside the paper</h3><p class='lead'>The two shaded columns are the figures printed "
        f"in {PAPER}, not measured here. {note}</p>{page.table(head, cells, 'paper')}</aside>"
    )


def _span(values, text):
    """The smallest and largest of some values as text, or one where they read the same."""
    return "–".join(dict.fromkeys((text(min(values)), text(max(values))))) if values else page.number(None)


def _along_the_sequence(shown, sequential):
    """F1 and CBT by step, retention by hops; joint strategies as a level."""
    looks = {label: plots.look(n) if label in sequential else (plots.look(n)[0], "1 2") for n, label in enumerate(shown)}
    orders = {tuple(run["order"]) for runs in sequential.values() for run in runs}
    order, T = list(next(iter(orders))) if len(orders) == 1 else None, max(map(len, orders))

    def lines(curve, strategies=sequential, **options):
        series = []
        for label, runs in strategies.items():
            every = [curve(R) if label in sequential else np.full(T, mean(R[-1])) for _, R in matrices(runs)]
            if every:
                band = (np.fmin.reduce(every), np.fmax.reduce(every)) if len(every) > 1 else (None, None)
                values = metrics.measured_mean(every, axis=0)
                series.append(plots.Line(np.arange(1, len(values) + 1), values, *band, *looks[label]))
        return plots.lines(series, **options)

    steps = {
        "xlabel": "after training on" if order else "languages trained",
        "names": order,
        "wide": order is not None and T > 16,
    }
    seen = lines(metrics.f1_per_step, shown, ylabel="F1", alt="F1 over the languages seen, by step", **steps)
    lost = lines(metrics.backward_transfer_per_step, ylabel="CBT", zero=True, alt="CBT by step", **steps)
    kept = lines(
        metrics.retention_curve,
        xlabel="hops since the language was learned",
        ylabel="change of F1",
        zero=True,
        alt="Change of F1 by hops since a language was learned",
    )
    given = lines(
        lambda R: metrics.retention_curve(R, "forward"),
        ylabel="F1 above untrained",
        zero=True,
        xlabel="hops until the language is learned",
        alt="F1 by hops until a language is learned",
    )
    joint = "" if len(shown) == len(sequential) else " Joint training has no sequence: a dotted level."
    return page.section(
        "Along the sequence",
        f"Lines are means over runs, bands the range over runs.{joint}",
        page.legend((label, *looks[label]) for label in shown),
        page.figures(
            ("Mean F1 over the languages seen so far", seen),
            ("CBT: earlier languages against when learned", lost),
            ("Multi-hop, backward: what later training did to a language", kept),
            ("Multi-hop, forward: what earlier training gave a language", given),
        ),
    )


def _heat_maps(sequential):
    chosen = {}
    for label, runs in sequential.items():
        runs = [run for run in runs if not run.get("diverged")] or runs
        runs = [run for run in runs if run["order"] == runs[0]["order"]]
        chosen[label] = runs, metrics.measured_mean([run["R"] for run in runs], axis=0)
    largest = max(np.max(R, initial=0.01, where=~np.isnan(R)) for _, R in chosen.values())
    figures = []
    for label, (runs, R) in chosen.items():
        count = f"{len(runs)} run{'' if len(runs) == 1 else 's'}"
        caption = f"{escape(label)} · {escape(runs[0]['order_name'])}, {count}"
        caption += " <span class='bad'>diverged</span>" if runs[0].get("diverged") else ""
        figure = plots.heat_map(R, runs[0]["order"], largest=largest, alt=f"Scores of {label}")
        figures.append((caption, figure))
    more = figures[HEAT_MAPS:]
    return page.section(
        "Score matrices",
        "R: a row is a step, a column a language, a cell its F1. A language that is kept "
        "stays bright below the white line, one that is forgotten darkens downwards; above it are languages "
        "not learned yet. All share one colour scale.",
        page.figures(*figures[:HEAT_MAPS]),
        page.details(f"{len(more)} more", page.figures(*more)) if more else "",
    )


def _bars(values, ylabel):
    """Languages by their mean, with the range over runs, coloured by kind of writing; * = no spaces."""
    measured = {locale: v for locale, v in values.items() if not math.isnan(mean(v))}
    names = sorted(measured, key=lambda locale: mean(measured[locale]))
    low, high = ([float(pick(measured[name])) for name in names] for pick in (np.nanmin, np.nanmax))
    ticks = [name if spaced(name) else f"{name} *" for name in names]
    heights, colours = [mean(measured[name]) for name in names], [writing(name)[1] for name in names]
    return plots.bars(ticks, heights, low, high, colours, ylabel=ylabel, alt=ylabel)


def _languages(corpus, sequential, focus):
    """Loss and impact by language and by script, and whether scripts differ by more than chance."""
    locales, tokens = corpus["locales"], corpus.get("tokens_per_word") or {}
    swatch = '<i style="background:{}"></i>{}'.format
    kinds = "".join(f"<span>{swatch(colour, kind)}</span>" for kind, colour in kinds_of_writing(locales))
    changes = by_language(sequential[focus], change)
    impacts = by_language(sequential[focus], metrics.multi_hop_backward_transfer)
    body = [
        f'<p class="legend">{kinds}<span>* no spaces between words</span></p>',
        page.figures(
            ("F1 at the end minus F1 when learned", _bars(changes, "change of F1")),
            ("What training each did to those before it (MBT, impact)", _bars(impacts, "mean change of F1")),
        ),
    ]

    columns = list(sequential)[:COLUMNS]
    shown = [by_language(sequential[label], values) for label in columns for values in (_last, change)]
    means = [{locale: mean(every.get(locale, [])) for locale in locales} for every in shown]

    def cells(members):
        return [page.number(mean([one[m] for m in members]), sign=n % 2 == 1) for n, one in enumerate(means)]

    scripts = {}
    for locale in locales:
        scripts.setdefault(script(locale), []).append(locale)
    rows = [
        (
            swatch(writing(members[0])[1], escape(name)),
            len(members),
            page.number(mean([tokens.get(m) for m in members]), 2),
            *cells(members),
        )
        for name, members in sorted(scripts.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    over = (("", 3), *((escape(label), 2) for label in columns))
    head = ("subwords a word", *len(columns) * ("F1", "change"))
    body.append("<h3>By script</h3>" + page.table(("script", "languages", *head), rows, over=over))

    loss = {m: mean(v) for m, v in changes.items() if not math.isnan(mean(v))}
    rows = []
    for name_a, a, name_b, b in script_contrasts(list(loss)):
        a, b = [loss[m] for m in a], [loss[m] for m in b]
        test = metrics.permutation_test(a, b)
        rows.append(
            (
                f"{name_a} ({len(a)}) against {name_b} ({len(b)})",
                page.number(mean(a), sign=True),
                page.number(mean(b), sign=True),
                page.number(test.difference, sign=True),
                "&lt; 0.001" if test.p_value < 0.001 else page.number(test.p_value),
            )
        )
    place = " All runs share one order, so a language’s change also depends on its place in it."
    if len({tuple(run["order"]) for run in sequential[focus]}) > 1:
        place = ""
    body.append(
        f"<h3>Do scripts differ? Change of F1 under {escape(focus)}</h3>"
        + page.table(("groups (languages)", "first", "second", "difference", "p"), rows)
        + "<p class='note'>Two-sided permutation tests, one value a language (its mean over runs). The "
        "languages without spaces are not Latin either: the third row leaves them out, to tell script from "
        f"segmentation.{place}</p>"
    )
    rows = [
        (
            f"{m} {escape(LANGUAGES[m].name) if m in LANGUAGES else ''}",
            script(m),
            page.number(tokens.get(m), 2),
            *cells([m]),
        )
        for m in locales
    ]
    body.append(page.details("Every language", page.table(("language", "script", *head), rows, "two", over)))
    lead = f"For {escape(focus)}, which forgot most. Thin lines: range over runs."
    return page.section("Languages", lead, *body)


def _last(R):
    return R[-1]


def _numbers(entries, *names):
    """[n, names] of the log entries in which all these are numbers."""
    rows = [[entry.get(name) for name in names] for entry in entries]
    rows = [row for row in rows if all(isinstance(value, (int, float)) for value in row)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))


def _training(every):
    phases = dict(sorted(every.items(), key=lambda item: -len(item[1]))[:PHASES])
    figures, rows = [], []
    for caption, name, unit in (
        ("Training loss", "loss", "loss"),
        ("Throughput", "tokens_per_second", "tokens a second"),
    ):
        series = []
        for n, entries in enumerate(phases.values()):
            points = _numbers(entries, "step", name)
            if len(points) > 1:
                shares = np.array_split(points, min(len(points), POINTS))
                x, y = np.array([share.mean(axis=0) for share in shares]).T
                series.append(plots.Line(x, y, None, None, *plots.look(n)))
        if series:
            figures.append((caption, plots.lines(series, xlabel="step", ylabel=unit, alt=caption)))
    for phase, entries in phases.items():
        steps, losses, speeds, times = (_numbers(entries, name)[:, 0] for name in ("step", "loss", "tokens_per_second", "time"))
        rows.append(
            (
                escape(phase),
                page.count(steps.max() if len(steps) else None),
                page.number(losses[-1] if len(losses) else None),
                page.count(np.median(speeds) if len(speeds) else None),
                f"{np.ptp(times):.0f} s" if len(times) > 1 else page.number(None),
            )
        )
    legend = page.legend((phase, *plots.look(n)) for n, phase in enumerate(phases)) if figures else ""
    head = ("phase", "last step", "last loss", "tokens a second, median", "time")
    lead = f"From log.jsonl; a line has up to {POINTS} points, each the mean of a share of the steps."
    if len(every) > PHASES:
        lead += f" Of {len(every)} phases, the {PHASES} with most entries."
    return page.section("Training", lead, legend, page.figures(*figures), page.table(head, rows))


def _setting(choices, config, env):
    body = ["<ul class='choices'>" + "".join(f"<li>{escape(choice)}</li>" for choice in choices) + "</ul>"]
    command = env.get("command") or env.get("argv")
    if command:
        body.append(f"<pre>{escape(command if isinstance(command, str) else shlex.join(command))}</pre>")
    for title, values in (("Configuration", config), ("Environment", env)):
        rows = [
            (escape(key), f"<code>{escape(v if isinstance(v, str) else json.dumps(v))}</code>") for key, v in page.flat(values)
        ]
        if rows:
            body.append(page.details(title, page.table(("setting", "value"), rows, "settings")))
    lead = f"What {PAPER} does not state, or what we could not read there, is our own choice:"
    lead = lead if choices else "No choice of our own is declared."
    return page.section("Choices and setting", lead, *body)
