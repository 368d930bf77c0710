"""Experiment savings: forks begin where they should, and its analysis finds what was planted and nothing else."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_run import SMALL

from kloss.cl.experiments import savings, with_experiments
from kloss.cl.learner import Experience
from kloss.cl.probes import State
from kloss.cl.study import plan as study_of
from kloss.config import Config
from kloss.run import main

LOCALES = ("en-US", "de-DE", "ja-JP", "ar-SA")


def test_learners_start_where_they_should():
    config = Config(strategies=("shared",), experiments=("savings",), orders=2, languages=LOCALES, epochs=7)
    study = with_experiments(config, study_of(config, LOCALES))
    for trial in study.trials:
        (g,) = trial.learners
        for step, locale in enumerate(trial.order[:-1]):
            learners = savings._learners(study.learners[g], step)
            assert all(learner.experiences == (Experience((locale,)),) and learner.epochs == 1 for learner in learners.values())
            starts = {name: study.starts().get(study.learners.index(learner)) for name, learner in learners.items()}
            assert starts == {"new": None, "before": [State(g, step)] if step else None, "end": [State(g, len(LOCALES))]}
            assert all(study.to_score[study.learners.index(learner)] == {1: [locale]} for learner in learners.values())
    assert len(study.learners) == 2 + 2 * 3 * 3 - 2 - _common(study)


def _common(study):
    """New learners of a language that is not last in both orders are one."""
    first, second = (set(trial.order[:-1]) for trial in study.trials)
    return len(first & second)


def entries(saved, orders=6, noise=0.0, level=0.3, seed=0, n=8):
    draw = np.random.default_rng(seed)

    def counts(f1):
        return [[round(1000 * value), 1000, 1000] for value in np.clip(f1 + noise * draw.normal(size=n), 0, 1)]

    about = {"label": "SHARED LoRA r=8", "seed": 0}
    starts = {"forgotten": level / 2, "new": level / 1.5, "before": level, "end": level + saved}
    return [
        about | {"order_name": f"Order {o}", "order": [f"l{o}", *map(str, range(n))]} | {k: counts(v) for k, v in starts.items()}
        for o in range(orders)
    ]


def test_what_was_saved_is_found_and_nothing_where_nothing_was():
    section = savings.analyse({}, entries(0.1, noise=0.02))
    (finding,), (table,) = section.findings, section.tables
    assert (
        "fallen to 0.15 F1 are back at 0.40" in finding
        and "before it met them the adapter reaches 0.30, a new one 0.20" in finding
    )
    assert finding.endswith(", and something for 48 of 48 languages, counted in each run."), "eight in each of six"
    copies = entries(0.1, noise=0.02)
    assert savings.analyse({}, [*copies, *copies]) == section, "the same order drawn twice counts once"
    low, high = table.rows[0][2].split(" to ")
    assert 0 < float(low) < 0.1 < float(high) < 0.15
    false = 0
    for seed in range(100):
        low, high = savings.analyse({}, entries(0.0, noise=0.05, seed=seed)).tables[0].rows[0][2].replace("−", "-").split(" to ")
        false += not float(low) <= 0 <= float(high)
    assert false <= 12, "of 100 intervals of 95 %"


def test_what_cannot_be_said():
    floor = savings.analyse({}, entries(0.0, level=0.02))
    assert "teaches nothing" in floor.findings[0] and not floor.tables
    (one,) = savings.analyse({}, entries(0.1, orders=1)).findings
    assert "+0.100 (one run: no interval)" in one and "8 of 8" in one
    diverged = [entry | {"end": [None, *entry["end"][1:]]} for entry in entries(0.1, orders=1)]
    assert savings.analyse({}, diverged).findings == ["SHARED LoRA r=8 diverged."] and savings.analyse({}, []) is None


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def test_end_to_end(cache, tmp_path):
    """The fork before the second language is the sequence itself, where that has one epoch."""
    run = [*SMALL, "--cache", cache, "--strategies", "shared", "--experiments", "savings", "--epochs", "1", "--exact"]
    assert main([*run, "--out", str(tmp_path / "run")]) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    (entry,) = scores["experiments"]["savings"]
    assert len(entry["end"]) == len(entry["order"]) - 1 and None not in entry["end"]
    assert "<h2>Gone, or out of reach?</h2>" in (tmp_path / "run" / "report.html").read_text()
    (R,) = (run["R"] for run in scores["runs"])
    for start, row in (("forgotten", -1), ("new", 1)):
        tp, predicted, gold = entry[start][0]
        assert R[row][0] == pytest.approx(2 * tp / max(predicted + gold, 1))


def test_a_config_of_equal_learners_trains_them_once():
    config = Config(strategies=("shared", "non-shared"), experiments=("savings",), languages=LOCALES, epochs=1)
    study = with_experiments(config, study_of(config, LOCALES))
    plain = study_of(replace(config, experiments=()), LOCALES)
    assert len(study.learners) == len(plain.learners) + 2 * 3 - 1, "a new adapter of one epoch is NON-SHARED's"
