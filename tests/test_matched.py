"""Experiments rates and ranks: what is kept of languages that two settings learned equally well."""

import json

import numpy as np
import pytest
from test_run import SMALL

from kloss.cl.experiments import EXPERIMENTS, idle, matched
from kloss.cl.study import plan as study_of
from kloss.config import Config
from kloss.run import main

N = 8


def runs(kept, learned=lambda setting: 0.6, orders=6, noise=0.0, seed=0):
    """SHARED at settings: `kept` and `learned` map a rate to the share kept and F1 when learned."""
    draw, result = np.random.default_rng(seed), []
    for order in range(orders):
        for lr in (1e-3, 3e-3):
            R = np.zeros((N + 1, N))
            for i in range(N):
                R[i + 1 :, i] = learned(lr)
                R[-1, i] *= np.clip(kept(lr) + noise * draw.normal(), 0, 1) if i < N - 1 else 1
            about = {"strategy": "shared", "rank": 8, "lr": lr, "order": [f"l{order + i}" for i in range(N)], "seed": 0}
            result.append(about | {"R": R.tolist()})
    return {"runs": result}


def interval(section):
    return [float(end) for end in section.tables[0].rows[0][2].replace("−", "-").split(" to ")]


def test_what_a_rate_keeps_is_found_and_nothing_where_there_is_nothing():
    section = matched.analyse(runs(lambda lr: 0.9 if lr == 1e-3 else 0.6, noise=0.02), [{"setting": "lr"}])
    low, high = interval(section)
    assert -0.36 < low < -0.3 < high < -0.24 and len(section.bars) == 3
    assert (
        "rate 0.003 keeps −0.30 against 0.001" in section.findings[0]
        and "; 42 languages, counted in each run)" in section.findings[0]
    )
    assert section.tables[0].head[-1] == "languages, counted in each run", "seven in each of six"
    false = 0
    for seed in range(100):
        low, high = interval(matched.analyse(runs(lambda lr: 0.7, noise=0.1, seed=seed), [{"setting": "lr"}]))
        false += not low <= 0 <= high
    assert false <= 12, "of 100 intervals of 95 %"


def test_languages_that_one_rate_learns_better_are_not_compared():
    section = matched.analyse(runs(lambda lr: 300 * lr, learned=lambda lr: 0.5 + 20 * lr), [{"setting": "lr"}])
    assert len(section.findings) == 1, "0.52 and 0.56 F1"
    section = matched.analyse(runs(lambda lr: 300 * lr, learned=lambda lr: 0.5 + 30 * lr), [{"setting": "lr"}])
    assert section.findings == ["SHARED, rank 8: rate 0.003 and 0.001 learned no language equally well."]
    assert section.tables[0].rows == [("0.003 against 0.001", "", "", "0")]
    diverged = runs(lambda lr: 0.5)
    for run in diverged["runs"][1::2]:
        run["diverged"] = "loss nan"
    assert matched.analyse(diverged, [{"setting": "lr"}]) is None and matched.analyse(diverged, []) is None


@pytest.mark.parametrize(("name", "several"), [("rates", ("--lr", "1e-3", "5e-3")), ("ranks", ("--rank", "1", "2"))])
def test_end_to_end(name, several, tmp_path):
    run = [*SMALL, *several, "--strategies", "shared", "--experiments", name, "--cache", str(tmp_path / "cache")]
    assert main([*run, "--out", str(tmp_path / "run")]) == 0
    entries = json.loads((tmp_path / "run" / "scores.json").read_text())["experiments"][name]
    assert entries == [{"setting": several[0].removeprefix("--")}]
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"<h2>Do {matched.NAMES[entries[0]['setting']][1]} forget, or learn, differently?</h2>" in page


def test_one_value_is_nothing_to_look_at():
    config = Config(strategies=("shared",), experiments=("rates", "ranks"), rank=(8, 16))
    study = study_of(config, ("en-US", "de-DE"))
    (line,) = idle(config, study)
    assert line.startswith("--experiments rates has no effect") and line.endswith("with several --lr")
    assert EXPERIMENTS["ranks"].plan(config, study).cells and not EXPERIMENTS["rates"].record(config, None, study, [], [])
