"""SHARED with as many weights as NON-SHARED: who learns, and that what was planted is found and nothing else."""

import json

import numpy as np
import pytest
from test_run import SMALL
from toy import cohorts

from kloss.cl.experiments import idle, weights, with_experiments
from kloss.cl.statistics import NO_INTERVAL, Interval
from kloss.cl.study import plan
from kloss.config import Config
from kloss.run import DIVERGED, main

THREE = ("en-US", "de-DE", "ja-JP")


def planned(**changes):
    config = Config(**{"strategies": ("non-shared", "shared"), "experiments": ("weights",)} | changes)
    return config, plan(config, THREE)


def test_shared_learns_with_as_many_times_the_rank_as_there_are_languages():
    config, study = planned(rank=(4, 8), orders=2, seeds=2, lr=(1e-3, 2e-3))
    before, whole = plan(config, THREE), with_experiments(config, study)
    added = whole.learners[len(before.learners) :]
    assert [learner.rank for learner in added] == [12] * 8 == [round(learner.alpha) for learner in added]
    assert len({learner.lr for learner in added}) == 2 and all(set(to) == {1, 2, 3} for to in whole.to_score[-8:])
    (own,) = cohorts(before)
    assert cohorts(whole) == [own, list(range(len(own), len(own) + 8))], "the study's learners keep their bank"
    config, study = planned(rank=(4, 8, 12, 24))  # both pairs are there
    assert with_experiments(config, study).learners == plan(config, THREE).learners
    assert [(trial.rank, wide.rank) for trial, wide in weights._learners(config, study)] == [(4, 12), (8, 24)]
    config, study = planned(alpha=2.0)
    assert with_experiments(config, study).learners[-1].alpha == 2.0


@pytest.mark.parametrize("strategies", [("shared",), ("non-shared",), ("vanilla", "mono")])
def test_without_both_strategies_there_is_nothing_to_look_at(strategies):
    config, study = planned(strategies=strategies)
    (line,) = idle(config, study)
    assert line.endswith("needs --strategies shared, of two languages or more with --strategies non-shared beside it")
    assert not weights.record(config, None, study, [], [])


N, HIDDEN, LABELS, ADAPTER = 6, 128, 5, 10_000
HEAD = LABELS * (HIDDEN + 1)


def counts_of(f1):
    return [[round(1e5 * value), 10**5, 10**5] for value in f1]


def planted(narrow, wide, isolated=0.6, learned=0.6, *, orders=3, seeds=3, noise=0.0, seed=0, trains=("*",), head=HEAD):
    """A study of both strategies, with what `record` gives; F1 at the end of each."""
    draw, runs, data = np.random.default_rng(seed), [], []
    for number in range(orders):
        order = [f"l{(i + number) % N}" for i in range(N)]
        for s in range(seeds):
            about = {"rank": 8, "lr": 0.003, "order": order, "seed": s}
            for strategy, end, parameters in (("shared", narrow, ADAPTER + head), ("non-shared", isolated, N * (ADAPTER + head))):
                R = np.tril(np.full((N + 1, N), learned), -1)
                if strategy == "shared":
                    R[-1, :-1] = np.clip(end + noise * draw.normal(size=N - 1), 0, 1)
                else:
                    R[R > 0] = end
                runs.append(about | {"strategy": strategy, "R": R.tolist(), "trainable_parameters": parameters})
            end = [*np.clip(wide + noise * draw.normal(size=N - 1), 0, 1), learned]
            sequence = {"order": order, "learned": counts_of([learned] * N), "end": counts_of(end)}
            data.append({"rank": 8, "lr": 0.003, "seed": s, "trains": list(trains), "wide": sequence})
    return {"runs": runs, "corpus": {"labels": LABELS}, "backbone": {"hidden": HIDDEN}}, data


def test_weights_that_shared_lacks_are_found():
    section = weights.analyse(*planted(0.2, 0.4, noise=0.01))
    totals, end, kept = section.findings
    assert totals.startswith("SHARED r=48 and NON-SHARED r=8 have 60,000 adapter weights each, SHARED r=8 10,000.")
    assert totals.endswith(f"{HEAD} weights each, 6 of them in NON-SHARED.")
    assert end.startswith(
        "At rate 0.003 SHARED r=8 ends at 0.27 F1, SHARED r=48 0.44, NON-SHARED r=8 0.60. As many weights bring SHARED"
    )
    assert " SHARED +0.17 (+0.1" in end and "weights are part of what it lacks); against NON-SHARED it has −0.16 (−0.1" in end
    assert "keeps 0.33, SHARED r=48 0.67: +0.34 (+0.3" in kept and "no evidence" not in kept
    means, gaps = section.tables
    assert [row[1] for row in means.rows] == ["10,000", "60,000", "60,000"] and means.rows[2][-1] == "all, by construction"
    assert [row[0] for row in gaps.rows] == ["SHARED r=48 − SHARED r=8", "SHARED r=48 − NON-SHARED r=8"]
    assert gaps.rows[0][1] == "0.000 (no interval)" and gaps.rows[1][-1] == "" and len(section.limits) == 2
    assert "weights are what it lacks, to within 0.02 F1)" in weights.analyse(*planted(0.2, 0.6, noise=0.01)).findings[1]
    assert "at this rate more weights make it worse" in weights.analyse(*planted(0.4, 0.2, noise=0.01)).findings[1]


def test_no_evidence_of_a_difference_is_not_taken_for_equality():
    """One noisy NON-SHARED seed made weights "what it lacks" where they bring 0.05 of 0.23 F1."""
    scores, data = planted(0.2, 0.26, noise=0.005, orders=1)
    for run in scores["runs"]:
        if run["strategy"] == "non-shared":
            run["R"] = np.where(np.array(run["R"]) > 0, 0.3 if run["seed"] == 2 else 0.6, 0.0).tolist()
    end = weights.analyse(scores, data).findings[1]
    assert "weights are at least part of what it lacks); against NON-SHARED it has −0.18 (−0.6" in end and " to +0." in end
    for low, high, words in (
        (-0.019, 0.3, "what it lacks, to"),
        (0.01, 0.02, "what it lacks, to"),
        (-0.3, -0.01, "part of"),
        (-0.3, 0.3, "at least"),
    ):
        assert weights._share(Interval(low, high)).startswith(words)
    assert weights._share(NO_INTERVAL) == "at least part of what it lacks"


def test_a_rate_too_high_for_the_rank_is_said():
    scores, data = planted(0.2, 0.2, noise=0.01)
    for number, entry in enumerate(data):
        entry["wide"]["learned"] = counts_of([0.3 + 0.01 * number] * N)
    text = weights.analyse(scores, data).findings[2]
    assert text.startswith("SHARED r=48 learned less than SHARED r=8 (−0.22 F1 when learned, −0.2")
    assert text.endswith("several --lr.")


def test_each_is_compared_at_its_best_rate():
    scores, data = planted(0.1, 0.3, 0.3, noise=0.01)
    faster, more = planted(0.2, 0.01, 0.5, noise=0.01)
    scores["runs"] += [run | {"lr": 0.01} for run in faster["runs"]]
    *_, best = weights.analyse(scores, data + [entry | {"lr": 0.01} for entry in more]).findings
    assert best.startswith(
        "Each at its best of 2 rates: SHARED r=8 0.27 F1 (rate 0.01), as many weights 0.35 F1 (rate 0.003), NON-SHARED r=8 "
        "0.50 F1 (rate 0.01). The weights bring +0.09 (+0.0"
    )
    assert "against NON-SHARED it has −0.15 (−0.1" in best
    assert not any("at its best of" in text for text in weights.analyse(scores, data).findings)


def test_where_weights_do_nothing_nothing_is_found_as_often_as_stated():
    wrong = np.zeros(2)
    for seed in range(100):
        scores, data = planted(0.3, 0.3, noise=0.1, seed=seed)
        means = weights.compared(scores["runs"], data)
        _, end, kept = weights._findings(("a", "b", "c"), 0.003, 6, 1, N, means)
        wrong += ["no evidence that weights" not in end, "no evidence of a difference" not in kept]
    assert (wrong <= 10).all(), "of 100 without a difference five are expected to be taken for one"


def test_a_rank_above_the_width_is_said():
    scores, data = planted(0.2, 0.2)
    scores["backbone"]["hidden"], scores["corpus"]["labels"] = 32, 0
    assert weights.analyse(scores, data).limits[0].startswith("Rank 48 is above the backbone's width of 32")


def test_only_trained_weights_of_a_head_are_taken_off():
    for trains, head in ((("*.b",), 0), (("*.a", "head.bias"), LABELS), (("[0-3].*", "head.*"), HEAD)):
        rows = weights.analyse(*planted(0.2, 0.2, trains=trains, head=head)).tables[0].rows
        assert [row[1] for row in rows] == ["10,000", "60,000", "60,000"]


def test_what_was_not_learned_or_diverged_is_said_and_not_averaged():
    scores, data = planted(0.2, 0.4)
    whole = weights.analyse(scores, data).findings
    assert weights.analyse(scores, [*data, *data]).findings == whole, "copies count once"
    data[0]["wide"]["end"] = [None] * N
    scores["runs"][2]["diverged"] = "loss nan"
    scores["runs"][2]["R"][-1][0] = 1.0
    assert [text.split(" (")[0] for text in weights.analyse(scores, data).findings] == [text.split(" (")[0] for text in whole]
    for entry in data:
        entry["wide"]["learned"][1] = None
    (finding,) = weights.analyse(scores, data).findings
    assert finding == "At rank 8, rate 0.003 one of SHARED r=8, SHARED r=48 and NON-SHARED r=8 diverged in every run."
    (finding,) = weights.analyse(*planted(0.01, 0.01, learned=0.02)).findings
    assert finding == "At rank 8, rate 0.003 SHARED r=8 learned nothing (0.02 F1 when learned), so nothing can be compared."
    assert weights.analyse(scores, []) is None


def test_shares_are_of_languages_that_both_learned():
    scores, data = planted(0.3, 0.3, seeds=1, orders=1)
    data[0]["wide"]["learned"][0] = data[0]["wide"]["end"][0] = counts_of([0.01])[0]
    scores["runs"][0]["R"][-1][0] = 0.6
    (means,) = weights.compared(scores["runs"], data).values()
    assert means[:2, 2].tolist() == [0.5, 0.5] and means[0, 1] > 0.35 > means[1, 1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def test_end_to_end(cache, tmp_path):
    """The totals are those that the runner counts, and the study's scores those without the experiment."""
    run = [*SMALL, "--cache", cache, "--strategies", "non-shared", "shared", "--epochs", "1"]
    assert main([*run, "--rank", "2", "6", "--experiments", "weights", "--out", str(tmp_path / "both")]) == 0
    both = json.loads((tmp_path / "both" / "scores.json").read_text())
    assert main([*run, "--experiments", "weights", "--out", str(tmp_path / "added")]) == 0
    assert main([*run, "--experiments", "--out", str(tmp_path / "without")]) == 0
    added, without = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("added", "without"))
    assert added["runs"] == without["runs"] and len(added["experiments"]["weights"]) == 1
    (wide,) = (run for run in both["runs"] if (run["strategy"], run["rank"]) == ("shared", 6))
    head = weights.head_weights(both, ["*"])
    isolated, shared = (run["trainable_parameters"] for run in added["runs"])
    assert wide["trainable_parameters"] - head == isolated - 3 * head == 3 * (shared - head)
    for scores in (both, added):
        (entry,) = scores["experiments"]["weights"]
        assert entry["rank"] == 2 and entry["wide"]["order"] == wide["order"] and None not in entry["wide"]["end"]
    assert weights.measured(both["experiments"]["weights"][0]["wide"])["en-US"][1] == wide["R"][-1][wide["order"].index("en-US")]
    assert "<h2>Is it the number of weights?</h2>" in (tmp_path / "added" / "report.html").read_text()


def test_learners_that_diverged(cache, tmp_path):
    folder = tmp_path / "run"
    run = [*SMALL, "--cache", cache, "--out", str(folder), "--experiments", "weights", "--lr", "1e30"]
    assert main([*run, "--strategies", "shared", "non-shared"]) == DIVERGED
    assert "NON-SHARED r=2 diverged in every run." in (folder / "report.html").read_text()
