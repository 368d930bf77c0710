"""Experiment remedies: learners are changed as they should be, and its analysis finds what was planted and nothing else."""

import json
from dataclasses import replace

import numpy as np
import pytest
from test_run import SMALL, interrupted, one_line_error

from kloss.cl.corpus import load_corpus
from kloss.cl.experiments import remedies, with_experiments
from kloss.cl.learner import Experience
from kloss.cl.results import REMEDIES as CHOICES
from kloss.cl.rules import AGEM, EWC, L2, RULES, OLoRA
from kloss.cl.study import plan as study_of
from kloss.config import Config
from kloss.run import DIVERGED, main, without_effect

LOCALES = ("en-US", "de-DE", "ja-JP")


def test_learners_have_their_remedies():
    some = ("replay=0.1", "a-gem=0.1", "l2=1", "ewc=1", "lr-adjust=0.8", "olora=0.5")
    config = Config(strategies=("shared",), experiments=("remedies",), languages=LOCALES, remedies=some)
    study = with_experiments(config, study_of(config, LOCALES))
    (trial,) = study.trials
    a, b, c = trial.order
    plain, replay, a_gem, l2, ewc, adjust, olora = study.learners
    assert plain == study.learners[trial.learners[0]] and plain.rule is None
    assert replay.experiences == (
        Experience((a,), (1.0,)),
        Experience((b, a), (1.0, 0.1)),
        Experience((c, a, b), (1.0, 0.1, 0.1)),
    )
    assert (l2.rule, ewc.rule, a_gem.rule) == (L2(1.0), EWC(1.0), AGEM(0.1))
    assert olora == replace(plain, rule=OLoRA(0.5), rank=24, alpha=24.0), "8 ranks, and the same scaling, for each language"
    assert [e.rate for e in adjust.experiences] == pytest.approx([1, 0.8, 0.64]) and adjust.rule is None
    for learner, to_score in zip(study.learners[1:], study.to_score[1:], strict=True):
        assert [e.locales[0] for e in learner.experiences] == [a, b, c] and learner.seed == plain.seed
        assert to_score == {1: [a], 2: [b], 3: [a, b, c]}
    assert (
        {name for name, _ in (text.split("=") for text in config.remedies)}
        == set(remedies.REMEDIES)
        == {*RULES, "replay", "lr-adjust"}
    )


def test_what_a_remedy_costs():
    corpus = load_corpus("synthetic", locales=("en-US", "de-DE"), synthetic={"train": 20, "test": 4})
    config = Config(
        strategies=("shared",), experiments=("remedies",), remedies=("replay=0.5", "a-gem=0.5", "l2=1", "olora=1"), epochs=2
    )
    study = with_experiments(config, study_of(config, corpus.locales))
    scores = [{1: {"en-US": [0, 0, 1], "de-DE": [0, 0, 1]}, 2: {"en-US": [0, 0, 1], "de-DE": [0, 0, 1]}} for _ in study.learners]
    entries = remedies.record(config, corpus, study, scores, [])
    assert [(entry["remedy"], entry["cost"]) for entry in entries] == [
        ("none", 1.0),
        ("replay=0.5", 1.25),
        ("a-gem=0.5", 1.8),  # 4 batches of 16 beside 80 utterances
        ("l2=1", 1.0),
        ("olora=1", 1.0),
    ]


def entries(effects, orders=6, noise=0.0, learned=0.6, seed=0, n=8):
    """effects: remedy -> what it adds to F1 at the end and when learned, on average; plain SHARED ends at half."""
    draw, result = np.random.default_rng(seed), []

    def counts(f1):
        return [[round(1000 * value), 1000, 1000] for value in np.clip(f1, 0, 1)]

    for o in range(orders):
        order_effect = 0.05 * draw.normal()
        for remedy, (more, better) in ({"none": (0, 0)} | effects).items():
            own = {"learned": learned + better + noise * draw.normal(size=n)}
            own["end"] = own["learned"] / 2 + order_effect * learned + more - better / 2 + noise * draw.normal(size=n)
            about = {"label": "SHARED LoRA r=8", "order_name": f"Order {o}", "seed": 0, "remedy": remedy, "cost": 1.5}
            result.append(about | {"order": [f"l{o}", *map(str, range(n - 1))]} | {k: counts(v) for k, v in own.items()})
    return result


def ends(text):
    return [float(end) for end in text.replace("−", "-").split("(")[1].rstrip(")").split(" to ")]


def test_what_helps_is_found():
    section = remedies.analyse({}, entries({"replay=0.1": (0.2, 0), "l2=1": (-0.1, 0), "ewc=1": (0, -0.2)}, noise=0.02))
    best, by_verdict, slow = section.findings
    assert "ends at 0.3" in best and "of 3 remedies replay=0.1 leaves most: +0.2" in best and "for 1.50 times" in best
    assert by_verdict.startswith("F1 at the end: helps: replay=0.1 (+0.2") and "harms: l2=1 (−0.1" in by_verdict
    assert "no evidence: ewc=1" in by_verdict and slow == "Less is lost, but less was learned too: ewc=1."
    (table,) = section.tables
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == ["replay=0.1", "ewc=1", "l2=1"]
    wanted = {("replay=0.1", 2): 0.2, ("l2=1", 2): -0.1, ("ewc=1", 3): -0.2, ("ewc=1", 4): -0.2, ("l2=1", 4): 0.1}
    for (remedy, column), value in wanted.items():
        low, high = ends(rows[remedy][column])
        assert low < value < high and high - low < 0.06
    assert [list(bars.values) for bars in section.bars] == [["none", "replay=0.1", "l2=1", "ewc=1"]] * 2


def test_o_loras_rank_is_said():
    plain, some = (remedies.analyse({}, entries({name: (0.1, 0)})).limits for name in ("l2=1", "olora=1"))
    (line,) = set(some) - set(plain)
    assert some[:2] == plain and "as many ranks in each language as plain SHARED" in line and "8 times as many" in line


def test_nothing_is_found_where_nothing_was_planted():
    false = 0
    for seed in range(100):
        (table,) = remedies.analyse({}, entries({"l2=1": (0, 0)}, noise=0.1, seed=seed)).tables
        low, high = ends(table.rows[0][2])
        false += not low <= 0 <= high
    assert false <= 12, "of 100 intervals of 95 %"


def test_what_is_lost_is_of_all_languages_but_the_last():
    about = {"order": ["a", "b", "c"], "seed": 0, "remedy": "none"}
    learned, end = ([[tp, 10, 10] for tp in each] for each in ((8, 6, 4), (2, 4, 4)))
    ((f1, own, lost),) = remedies._values([about | {"learned": learned, "end": end}])["none"].values()
    assert (f1, own, lost) == pytest.approx((1 / 3, 0.6, 0.4))


def test_what_cannot_be_said():
    (floor,) = remedies.analyse({}, entries({"l2=1": (0, 0)}, learned=0.02)).findings
    assert "learned nothing (0.02 F1 when learned)" in floor
    (one,) = remedies.analyse({}, entries({"l2=1": (0.1, 0)}, orders=1)).findings
    assert "l2=1 leaves most: +0.10 at the end (one run: no interval)" in one
    some = entries({"l2=1": (0.1, 0), "ewc=1": (0.2, 0)})
    diverged = [entry | {"end": [None] * 8} if entry["remedy"] == "ewc=1" else entry for entry in some]
    section = remedies.analyse({}, diverged)
    assert "of 1 remedies l2=1" in section.findings[0] and [row[:2] for row in section.tables[0].rows][1] == ("ewc=1", "diverged")
    (none,) = remedies.analyse({}, [entry | {"end": [None] * 8} for entry in some]).findings
    assert none == "SHARED LoRA r=8 diverged." and remedies.analyse({}, []) is None
    only = [entry | {"end": [None] * 8} if entry["remedy"] != "none" else entry for entry in some]
    assert remedies.analyse({}, only).findings[0].endswith("; with every remedy it diverged.")


@pytest.mark.parametrize(
    "text", ["replay", "replay=", "replay=0", "replay=1.5", "a-gem=2", "l2=-1", "l2=x", "ewc=nan", "si=1", "=1"]
)
def test_a_remedy_that_is_none(text, capsys, tmp_path):
    arguments = [*SMALL, "--strategies", "shared", "--experiments", "remedies", "--out", str(tmp_path / "run")]
    line = one_line_error([*arguments, "--remedies", "l2=1", text], capsys)
    assert f"'{text}'" in line and "replay=SHARE" in line and "l2=NUMBER" in line and "lr-adjust=SHARE" in line


def test_a_remedy_that_diverged_is_in_the_exit_status(capsys, tmp_path):
    """Its learner is in no score matrix, and plain SHARED trained well: the run ended with 0 and no word."""
    arguments = [*SMALL, "--cache", str(tmp_path / "cache"), "--strategies", "shared", "--experiments", "remedies"]
    assert main([*arguments, "--remedies", "l2=1", "--out", str(tmp_path / "good")]) == 0
    assert "diverged_besides" not in json.loads((tmp_path / "good" / "scores.json").read_text())
    for again in range(2):  # the second time it is read from the folder
        assert main([*arguments, "--remedies", "l2=1e30", "--out", str(tmp_path / "run")]) == DIVERGED, again
        assert "Of the learners of experiments alone, 1 did not come to an end: 3x1 from " in capsys.readouterr().out
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["runs"][0]["diverged"] is None and "diverged at step" in scores["diverged_besides"][0]
    assert "Of the learners of experiments alone" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_of_fewer_default_remedies_is_another_one():
    """Its folder does not name them."""
    before = ("replay=0.2", "a-gem=0.2", "l2=0.03", "ewc=0.01", "lr-adjust=0.7")
    assert "remedies" not in Config(experiments=("remedies",), remedies=before).identity()
    assert Config(experiments=("remedies",)).identity()["remedies"] == (*before, Config.remedies[-1])
    assert "remedies" not in Config(experiments=("where",)).identity()


def test_a_remedy_named_twice(capsys, tmp_path):
    arguments = [*SMALL, "--strategies", "shared", "--experiments", "remedies", "--out", str(tmp_path / "run")]
    assert "--remedies names l2=1 twice" in one_line_error([*arguments, "--remedies", "l2=1", "l2=1"], capsys)
    (line,) = without_effect(Config(remedies=("l2=1",), experiments=()))
    assert line == "--remedies has no effect: no experiment is remedies"


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path):
    arguments = [
        *SMALL,
        "--cache",
        str(tmp_path / "cache"),
        "--strategies",
        "shared",
        "--experiments",
        "remedies",
        "--epochs",
        "1",
    ]
    arguments += ["--checkpoint-seconds", "0"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    for stop in (5, 3, 7):  # within the second language, then the third, then the second of O-LoRA's cohort
        interrupted([*arguments, "--out", str(tmp_path / "stopped")], stop)
    assert main([*arguments, "--out", str(tmp_path / "stopped")]) == 0
    whole = (tmp_path / "whole" / "scores.json").read_bytes()
    assert (tmp_path / "stopped" / "scores.json").read_bytes() == whole
    scores = json.loads(whole)
    entries = scores["experiments"]["remedies"]
    assert [entry["remedy"] for entry in entries] == ["none", *Config.remedies] and set(CHOICES) <= set(scores["choices"])
    assert all(len(entry[part]) == 3 and None not in entry[part] for entry in entries for part in ("learned", "end"))
    assert "<h2>What helps?</h2>" in (tmp_path / "whole" / "report.html").read_text()
    R = scores["runs"][0]["R"]
    assert [2 * tp / max(p + g, 1) for tp, p, g in entries[0]["end"]] == pytest.approx(R[-1])
