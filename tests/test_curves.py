"""Figures of curves: F1 within experiences, and over ranks and rates."""

import re

import numpy as np
import pytest
from test_mechanism import study
from test_page import Nesting
from test_report import FIVE, fake_run, fake_scores, report, text_of

from kloss.cl.experiments import mechanism
from kloss.cl.summary import by_label, summary_rows
from kloss.report import curves, figures, sections

THREE = FIVE[:3]


def counts(f1):
    """True positives, predicted and gold spans with this F1."""
    return [round(100 * f1), 100, 100]


def shared(own, earlier, seed=0, order=THREE, every=10, steps=30):
    """A run of SHARED that is scored after 10 and 20 of an experience's 30 steps. own, earlier: F1 there, of experience, mark."""
    run = fake_run("shared", order, seed=seed)
    entries = []
    for i, mark in np.ndindex(len(order), 2):
        table = {order[i]: counts(own(i, mark))} | {order[j]: counts(earlier(i, mark)) for j in range(i)}
        entries.append({"learner": 0, "experience": i + 1, "step": steps * i + every * (mark + 1), "counts": table})
    return run | {"curves": entries, "steps": steps * len(order)}


def test_where_experiences_begin_is_read_from_marks():
    run = shared(lambda i, mark: 0.1 * i + 0.2 * mark, lambda i, mark: 0.5 - 0.1 * mark)
    (row,) = curves.traced(run)
    assert [entry[:2] for entry in row] == [(0, 10), (0, 20), (1, 40), (1, 50), (2, 70), (2, 80)]
    assert curves.starts(row) == {0: 0, 1: 30, 2: 60}
    np.testing.assert_allclose([own for *_, own, _ in row], [0, 0.2, 0.1, 0.3, 0.2, 0.4])
    assert np.isnan(row[0][3]) and row[2][3] == 0.5 and row[3][3] == pytest.approx(0.4)
    # An experience too short for a mark has no beginning to read, and no learner is drawn beyond what is known.
    assert curves.starts([entry for entry in row if entry[0]]) == {}


def test_lines_are_means_and_begin_anew_with_each_language(monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "lines", lambda caption, series, *_: drawn.update({caption: list(series)}))
    monkeypatch.setattr(figures, "sequence", lambda caption, series, *rest: drawn.update({caption: (series, *rest)}))
    runs = [shared(lambda i, mark, s=s: 0.2 + 0.2 * mark + 0.1 * s, lambda i, mark: 0.3, seed=s) for s in range(2)]
    broken = shared(lambda i, mark: 1, lambda i, mark: 1, seed=2) | {"diverged": "loss nan"}
    curves.learning({"SHARED r=8": [*runs, broken]})
    (line,) = drawn["F1 of the language being learned"]
    assert line.x.tolist() == [10, 20]
    np.testing.assert_allclose([line.y, line.low, line.high], [[0.25, 0.45], [0.2, 0.4], [0.3, 0.5]])
    (own, earlier), borders, names, end = drawn["SHARED r=8, Order 1: one language after another"]
    assert borders == [0, 30, 60] and names == list(THREE) and end == 90
    parts = np.split(own.y, np.flatnonzero(np.isnan(own.y)))[1:]
    learned = np.mean([np.diagonal(run["R"][1:]) for run in runs], axis=0)
    for part, f1 in zip(parts, learned, strict=True):  # two marks, then what R has of the experience's end
        np.testing.assert_allclose(part[1:], [0.25, 0.45, f1])
    assert np.isnan(earlier.y[:3]).all() and (earlier.y[3:5] == 0.3).all()
    assert earlier.y[5] == pytest.approx(np.mean([run["R"][2][0] for run in runs]))


def test_a_run_that_was_scored_within_experiences_shows_it(tmp_path):
    runs = [shared(lambda i, mark: 0.3, lambda i, mark: 0.2, seed=seed) for seed in range(2)]
    html = report(tmp_path, fake_scores(THREE, runs=runs))
    assert "Within experiences" in text_of(html) and "SHARED r=8, Order 1: one language after another" in html
    section = html.split("<h2>Within experiences</h2>")[1].split("<h2")[0]
    assert section.count("<figure") == 2 and all(name in section for name in THREE) and "mean of earlier ones" in section
    Nesting(html)
    html = report(tmp_path, fake_scores(THREE, runs=[fake_run("shared", THREE)]))
    assert "Within experiences" not in html and "Ranks and rates" not in html


def test_odd_curves_are_no_error(tmp_path):
    odd = {"learner": 7, "experience": 1, "step": 5, "counts": {"en-US": [1, 2, 3]}}
    short = {"learner": 0, "experience": 1, "step": 10, "counts": {"en-US": [1]}}
    runs = [fake_run("shared", THREE) | {"curves": [odd, short]}, fake_run("other", THREE) | {"curves": [short]}]
    assert "Results" in report(tmp_path, fake_scores(THREE, runs=runs))
    runs = [shared(lambda i, mark: 0.3, lambda i, mark: 0.2), shared(lambda i, mark: 0.3, lambda i, mark: 0.2, seed=1, every=7)]
    runs[1]["curves"] = runs[1]["curves"][::-1]
    assert "one language after another" in report(tmp_path, fake_scores(THREE, runs=runs))  # other marks: the first run alone


def test_several_ranks_and_rates_are_curves():
    runs = []
    for rank, lr in ((4, 1e-3), (8, 1e-3), (32, 1e-3), (8, 3e-3)):
        for strategy in ("shared", "non-shared"):
            R = np.tril(np.full((4, 3), 0.1 + rank / 100 + lr), -1)
            runs.append(fake_run(strategy, THREE, label=f"{strategy.upper()} LoRA r={rank}", R=R) | {"rank": rank, "lr": lr})
    scores = fake_scores(THREE, runs=runs)
    over = curves.over_settings(by_label(runs), summary_rows(scores))
    assert [[label for label, _ in of["legend"]] for of in over] == [
        ["SHARED LoRA, rate 0.001", "NON-SHARED LoRA, rate 0.001"],
        ["SHARED LoRA, rank 8", "NON-SHARED LoRA, rank 8"],
    ]
    ranks, rates = ([panel for panel in of["panels"]] for of in over)
    assert [panel.caption for panel in (*ranks, *rates)] == [
        "F1 at the end, over ranks", "share kept, over ranks",
        "F1 at the end, over learning rates", "share kept, over learning rates",
    ]  # fmt: skip
    ticks = re.findall(r"<text[^>]*>([^<]*)</text>", ranks[0].svg)
    assert ticks[:3] == ["4", "8", "32"], ticks
    of_kept, of_f1 = ranks[1].svg.upper(), ranks[0].svg.upper()  # one line: NON-SHARED can lose nothing
    assert "#D55E00" in of_kept and "#0072B2" not in of_kept and "#0072B2" in of_f1
    assert curves.over_settings(by_label(runs[:2]), summary_rows({**scores, "runs": runs[:2]})) == []


def test_dots_and_lines_of_what_goes_with_forgetting():
    scores, data = study({mechanism.SCRIPT: 0.0, "subwords a word": -0.2}, alike=0.02, chance=0.02)
    section = mechanism.analyse(scores, data)
    scatter = next(scatter for scatter in section.scatters if scatter.xlabel == "subwords a word")
    observed = mechanism.observations(scores["runs"], scores["corpus"], data[0])
    assert len(scatter.x) == len(scatter.y) == len(scatter.locales) == len(observed)
    assert scatter.slope == pytest.approx(-0.2, abs=0.03)  # of one more, what was planted
    assert len(section.scatters) == len(section.tables[0].rows)
    panel = sections.panels(section)[list(section.scatters).index(scatter)]
    assert panel.caption == "SHARED LoRA r=8: subwords a word" and panel.svg.count("<use") >= len(observed)
    solid, dashed = re.findall(r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n"[^>]*stroke: var\(--ink\)', panel.svg)
    assert float(solid[0]) < float(solid[2]) and float(solid[1]) < float(solid[3])  # downwards, as y grows in SVG
