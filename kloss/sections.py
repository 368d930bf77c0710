"""The sections of the report, one function each: what scores.json and log.jsonl hold -> HTML."""

from __future__ import annotations

import json
import math
import shlex
from html import escape

import numpy as np

from kloss import page, plots
from kloss.aggregate import (
    by_language,
    change,
    kinds_of_writing,
    matrices,
    mean,
    script,
    script_contrasts,
    spaced,
    summary_row,
    writing,
)
from kloss.cl import metrics
from kloss.cl.languages import LANGUAGES

PAPER = "arXiv 2504.20356"
PAPER_TABLE = (  # strategy, its name there, F1 x 100, parameters
    ("multi", "MULTI", "75.03", "278 M"),
    ("non-shared", "NON-SHARED LoRA", "72–73", "278–2228 M"),
    ("vanilla", "VANILLA", "66", "278 M"),
    ("shared", "SHARED LoRA", "60–61", "5–43 M"),
)
MASSIVE = (52, 11514, 2974)  # languages, utterances of each to train on and to test with
HEAT_MAPS, COLUMNS, PHASES, POINTS = 6, 4, 12, 120  # the most of each: unfolded, in a table, curves, points


def counted(number, thing):
    """1 run, 2 runs"""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def results(rows, shown):
    """The table of strategies; rows: of `summary_rows`, shown: label -> runs."""
    cells = [
        (
            escape(row["label"]),
            page.with_interval(row, "f1"),
            page.with_interval(row, "cbt", sign=True),
            page.with_interval(row, "cft"),
            page.with_interval(row, "forgetting"),
            page.number(row["worst"]),
            page.count(row["trainable_parameters"]),
            page.count(row["steps"]),
            f"{row['runs']} ({row['orders']} × {row['seeds']})"
            + (f"<span class='bad'>{row['diverged']} diverged</span>" if row["diverged"] else ""),
        )
        for row in rows
    ]
    head = ("strategy", "F1", "CBT", "CFT", "forgetting", "worst language", "trainable", "steps", "runs (orders × seeds)")
    body = [page.table(head, cells, "main")]
    diverged = [
        f"<li><b>{escape(label)}</b>, {escape(run['order_name'])}, seed {run['seed']} diverged "
        f"and is in no average: {escape(run['diverged'])}</li>"
        for label, runs in shown.items()
        for run in runs
        if run.get("diverged")
    ]
    if diverged:
        body.append(f"<ul class='warning'>{''.join(diverged)}</ul>")
    parts = {}
    for label, runs in shown.items():
        for run in runs:
            parts.setdefault((label, run["order_name"]), []).append(run)
    if len(parts) > len(rows):
        cells = []
        for (label, order_name), runs in parts.items():
            row = summary_row(label, runs)
            f1, cbt = page.with_interval(row, "f1"), page.with_interval(row, "cbt", sign=True)
            cells.append((escape(label), escape(order_name), f1, cbt, page.number(row["worst"])))
        head = ("strategy", "order", "F1", "CBT", "worst language")
        body.append(page.details("The same by order", page.table(head, cells, "two")))
    return page.section(
        "Results",
        "F1 is the mean over all languages after the last step, 0 to 1. CBT is how much earlier languages changed since they "
        "were learned (negative: forgotten), CFT the F1 on languages still to come, forgetting the distance from the best "
        "earlier score, averaged over the steps. Small print: 95 % bootstrap interval over runs.",
        *body,
    )


def beside_the_paper(scores, rows):
    """The paper's table with this run's figures in columns of their own, and whether the two compare."""
    backbone, corpus = scores["backbone"], scores["corpus"]
    train, test = (corpus[name].values() for name in ("train_utterances", "test_utterances"))
    encoder = (backbone["layers"], backbone["hidden"], backbone["vocabulary"] >= 250002) == (12, 768, True)
    if encoder and "massive" in corpus["name"].lower() and (len(train), min(train), min(test)) == MASSIVE:
        note = "Backbone and corpus have the paper’s shape; its settings are partly inferred."
    else:
        note = (
            "<b>Levels do not compare:</b> the paper used XLM-R base on MASSIVE, 52 languages; this run used "
            f"{escape(backbone['name'])} on {escape(corpus['name'])}, {counted(len(train), 'language')} "
            f"with {_span(train, str)} training and {_span(test, str)} test utterances each."
        )
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


def along_the_sequence(shown, sequential):
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

    steps = {"xlabel": "after training on" if order else "languages trained", "names": order, "wide": bool(order) and T > 16}
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


def heat_maps(sequential):
    """R of each strategy, averaged over the runs that share its first order; the diverged only where there are no others."""
    chosen = {}
    for label, runs in sequential.items():
        runs = [run for run in runs if not run.get("diverged")] or runs
        runs = [run for run in runs if run["order"] == runs[0]["order"]]
        chosen[label] = runs, metrics.measured_mean([run["R"] for run in runs], axis=0)
    largest = max(np.max(R, initial=0.01, where=~np.isnan(R)) for _, R in chosen.values())
    figures = []
    for label, (runs, R) in chosen.items():
        caption = f"{escape(label)} · {escape(runs[0]['order_name'])}, {counted(len(runs), 'run')}"
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


def languages(corpus, sequential, focus):
    """Loss and impact by language and by script, and whether scripts differ by more than chance."""
    locales, tokens = corpus["locales"], corpus.get("tokens_per_word") or {}
    swatch = '<i style="background:{}"></i>{}'.format
    colours = "".join(f"<span>{swatch(colour, kind)}</span>" for kind, colour in kinds_of_writing(locales))
    changes = by_language(sequential[focus], change)
    impacts = by_language(sequential[focus], metrics.multi_hop_backward_transfer)
    body = [
        f'<p class="legend">{colours}<span>* no spaces between words</span></p>',
        page.figures(
            ("F1 at the end minus F1 when learned", _bars(changes, "change of F1")),
            ("What training each did to those before it (MBT, impact)", _bars(impacts, "mean change of F1")),
        ),
    ]

    columns = list(sequential)[:COLUMNS]
    kinds = ((lambda R: R[-1], False), (change, True))
    scores = [(by_language(sequential[label], values), sign) for label in columns for values, sign in kinds]

    def cells(members):
        """F1 and its change under each strategy that has columns, averaged over some languages."""
        return [page.number(mean([mean(score.get(m, [])) for m in members]), sign=sign) for score, sign in scores]

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
    if len({tuple(order) for order, _ in matrices(sequential[focus])}) > 1:
        place = ""
    body.append(
        f"<h3>Do scripts differ? Change of F1 under {escape(focus)}</h3>"
        + page.table(("groups (languages)", "first", "second", "difference", "p"), rows)
        + "<p class='note'>Two-sided permutation tests, one value a language (its mean over runs). The "
        "languages without spaces are not Latin either: the third row leaves them out, to tell script from "
        f"segmentation.{place}</p>"
    )
    names = {m: LANGUAGES[m].name if m in LANGUAGES else "" for m in locales}
    rows = [(escape(f"{m} {names[m]}"), script(m), page.number(tokens.get(m), 2), *cells([m])) for m in locales]
    body.append(page.details("Every language", page.table(("language", "script", *head), rows, "two", over)))
    lead = f"For {escape(focus)}, which has the lowest CBT. Thin lines: range over runs."
    return page.section("Languages", lead, *body)


def _numbers(entries, *names):
    """[n, names] of the log entries in which all these are numbers."""
    rows = [[entry.get(name) for name in names] for entry in entries]
    rows = [row for row in rows if all(isinstance(value, (int, float)) for value in row)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), len(names))


def training(every):
    """Loss, throughput and time of each phase; every: phase -> its entries in log.jsonl."""
    phases = dict(sorted(every.items(), key=lambda item: -len(item[1]))[:PHASES])
    figures, rows = [], []
    for caption, name, unit in (("Training loss", "loss", "loss"), ("Throughput", "tokens_per_second", "tokens a second")):
        series = []
        for n, entries in enumerate(phases.values()):
            points = _numbers(entries, "step", name)
            if len(points) > 1:
                shares = np.array_split(points, min(len(points), POINTS))
                x, y = np.array([share.mean(axis=0) for share in shares]).T
                series.append(plots.Line(x, y, None, None, *plots.look(n)))
        if series:
            figures.append((caption, plots.lines(series, xlabel="step", ylabel=unit, alt=caption)))
    for phase, entries in phases.items():  # a run taken up again counts its time from 0 again
        steps, losses, speeds, times = (_numbers(entries, name)[:, 0] for name in ("step", "loss", "tokens_per_second", "time"))
        rows.append(
            (
                escape(phase),
                page.count(steps.max() if len(steps) else None),
                page.number(losses[-1] if len(losses) else None),
                page.count(np.median(speeds) if len(speeds) else None),
                f"{np.diff(times).clip(0).sum():.0f} s" if len(times) > 1 else page.number(None),
            )
        )
    legend = page.legend((phase, *plots.look(n)) for n, phase in enumerate(phases)) if figures else ""
    head = ("phase", "last step", "last loss", "tokens a second, median", "time")
    lead = f"From log.jsonl; a line has up to {POINTS} points, each the mean of a share of its entries."
    if len(every) > PHASES:
        lead += f" Of {len(every)} phases, the {PHASES} with most entries."
    return page.section("Training", lead, legend, page.figures(*figures), page.table(head, rows))


def setting(choices, config, env):
    """What was chosen, by which command it ran, with which configuration and where."""
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
