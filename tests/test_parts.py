"""Adapters of which a part goes from language to language: who learns, what is mixed, and what the experiment finds."""

import json

import numpy as np
import pytest
import torch
from test_run import SMALL, interrupted
from toy import ToyCorpus, cohorts, toy_model

from kloss.cl.experiments import idle, parts, with_experiments
from kloss.cl.learner import Learner
from kloss.cl.states import KeptRow
from kloss.cl.study import plan
from kloss.cl.train import Cohort
from kloss.config import Config
from kloss.models import AdapterBank
from kloss.run import DIVERGED, main

THREE = ("en-US", "de-DE", "ja-JP")
SHARED = {"rank": 4, "alpha": 4.0, "lr": 1e-2, "seed": 0, "epochs": 1, "batch_size": 4}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fork_takes_what_it_takes_and_draws_the_rest(dtype):
    parent = Learner([["aa"]], **SHARED)
    forks = [Learner([["bb"]], **SHARED, start=(parent, 1), takes=takes) for takes in (("*.a",), ("0.*", "head.*"), ("*",))]
    cohort = Cohort(toy_model().to(dtype), ToyCorpus(), forks, [{}] * 3)
    drawn, given = cohort.bank.param.clone(), torch.randn(cohort.bank.param.shape[1])
    for g in range(3):
        cohort.begin(g, [KeptRow(given, 4)])
    for name in cohort.bank.slots:
        now, own, other = (cohort.bank.view(row, name) for row in (cohort.bank.param, drawn, given[None]))
        for g, taken in enumerate((name.endswith(".a"), name.startswith(("0.", "head.")), True)):
            assert torch.equal(now[g], other[0] if taken else own[g]), (g, name)
    assert torch.equal(cohort.bank.work, cohort.bank.param.to(dtype)), "what the model reads"


def test_the_chains():
    config = Config(strategies=("non-shared", "shared"), experiments=("parts",), shared_parts=("*.a", "[0-1].*", "*.a"), orders=2)
    before, study = plan(config, THREE), plan(config, THREE)
    whole = with_experiments(config, study)
    added = whole.learners[len(before.learners) :]
    assert len(added) == 2 * 2 * 2, "the first of an order is NON-SHARED's"
    for trial, part, chain in parts._chains(config, study):
        assert [learner.experiences[0].locales for learner in chain] == [(locale,) for locale in trial.order]
        assert chain[0] in before.learners and all(learner.takes == (part,) for learner in chain[1:])
        assert [learner.start for learner in chain] == [None, (chain[0], 1), (chain[1], 1)]
    assert [len(members) for members in cohorts(whole)] == [len(before.learners), 4, 4]
    for (_, probe), (trial, _, chain) in zip(
        whole.probes, ((t, p, c) for t, p, c in parts._chains(config, study) for _ in c), strict=True
    ):
        own, last = probe.states
        assert whole.learners[own.learner] == chain[trial.order.index(probe.locale)] and whole.learners[last.learner] == chain[-1]
        assert own.experience == last.experience == 1


@pytest.mark.parametrize("part", ["*.a", "*.b", "1.*", "head.*"])
def test_the_mixture_is_the_own_row_with_the_part_of_the_last(part):
    bank = AdapterBank(toy_model().config, 2, 3)
    own, last = torch.randn(2, bank.param.shape[1])
    row = parts.with_part([own, last], bank.slots, part)
    taken = bank.columns([part])
    slots = bank.columns(["*"])
    assert taken.any() and torch.equal(row[taken], last[taken]) and torch.equal(row[slots & ~taken], own[slots & ~taken])


def test_one_language_is_nothing_to_share_with():
    config = Config(strategies=("shared",), experiments=("parts",))
    assert idle(config, plan(config, THREE[:1])) and not idle(config, plan(config, THREE))


N = 6


def counts_of(f1):
    return [[round(1e5 * value), 10**5, 10**5] for value in f1]


def planted(of_parts, shared=0.2, isolated=0.6, *, learned=0.6, noise=0.0, seed=0, orders=3, seeds=3):
    """Runs of both strategies and entries of parts, by F1 at the end."""
    draw, runs, data = np.random.default_rng(seed), [], []
    for number in range(orders):
        order = [f"l{(i + number) % N}" for i in range(N)]
        for s in range(seeds):
            about = {"rank": 8, "lr": 0.003, "order": order, "seed": s}
            for strategy, end in (("shared", shared), ("non-shared", isolated)):
                R = np.tril(np.full((N + 1, N), learned), -1)
                R[-1, :-1] = np.clip(end + noise * draw.normal(size=N - 1), 0, 1)
                runs.append(about | {"strategy": strategy, "R": R.tolist()})
            for part, end in of_parts.items():
                ends = [*np.clip(end + noise * draw.normal(size=N - 1), 0, 1), learned]
                data.append(about | {"part": part, "learned": counts_of([learned] * N), "end": counts_of(ends)})
    return {"runs": runs}, data


def test_the_part_that_can_be_shared_is_found():
    section = parts.analyse(*planted({"*.a": 0.5, "*.b": 0.2, "0.*": 0.05}, noise=0.005))
    best, all_of_them = section.findings
    assert best.startswith(
        "At rank 8, rate 0.003: of 3 ways to share a part the one that shares *.a ends highest, at 0.52 F1, with 0.83 kept "
        "(SHARED 0.27, NON-SHARED 0.60): +0.25 against SHARED (+0.2"
    )
    assert "better: shares *.a (+0.25, 0.83 kept)" in all_of_them and "worse: shares 0.* (−0.1" in all_of_them
    assert "not known to differ: shares *.b (0.00, 0.3" in all_of_them
    (table,) = section.tables
    assert [row[0] for row in table.rows] == ["SHARED", "NON-SHARED", "shares *.a", "shares *.b", "shares 0.*"]
    assert table.rows[1][3] == "all, by construction" and table.rows[2][3] == "0.835"
    assert table.rows[0][4] == "" == table.rows[1][5] and table.rows[2][5].startswith("−0.08")


def test_where_parts_do_nothing_nothing_is_found_as_often_as_stated():
    wrong = 0
    for seed in range(100):
        *_, text = parts.analyse(*planted({"*.a": 0.3}, 0.3, noise=0.1, seed=seed)).findings
        wrong += "not known to differ" not in text
    assert wrong <= 10, "of 100 without a difference five are expected to be taken for one"


def test_what_was_not_learned_or_diverged_is_said_and_not_averaged():
    scores, data = planted({"*.a": 0.5, "*.b": 0.2})
    whole = parts.analyse(scores, data).tables[0].rows
    data[0]["end"], data[3]["learned"][0] = [None] * N, None
    data[1]["seed"] = 7  # without a run of SHARED beside it
    scores["runs"][4]["diverged"] = "loss nan"
    rows = parts.analyse(scores, data).tables[0].rows
    assert [row[:4] for row in rows] == [row[:4] for row in whole]
    for entry in data:
        entry["end"][1] = None
    findings = [f"At rank 8, rate 0.003 what shares {part} diverged." for part in ("*.a", "*.b")]
    assert parts.analyse(scores, data).findings == findings
    assert parts.analyse(*planted({"*.a": 0.5}, learned=0.02)).findings == [
        "At rank 8, rate 0.003 SHARED learned nothing (0.02 F1 when learned)."
    ]
    (finding,) = parts.analyse({"runs": []}, planted({"*.a": 0.5})[1]).findings
    assert finding == "At rank 8, rate 0.003 SHARED diverged." and parts.analyse(scores, []) is None


RUN = [*SMALL, "--experiments", "parts", "--shared-parts", "*.a", "head.*", "--checkpoint-seconds", "0", "--exact"]


def test_a_run_stopped_at_any_link_ends_as_one_that_was_not(cache, tmp_path):
    run = [*RUN, "--cache", cache, "--strategies", "shared"]
    assert main([*run, "--out", str(tmp_path / "whole")]) == 0
    for stop in (5, 22, 28):  # 18 rounds with SHARED, then 6 for each link
        interrupted([*run, "--out", str(tmp_path / f"{stop}")], stop)
        assert main([*run, "--out", str(tmp_path / f"{stop}")]) == 0
        assert (tmp_path / f"{stop}" / "scores.json").read_bytes() == (tmp_path / "whole" / "scores.json").read_bytes()
    entries = json.loads((tmp_path / "whole" / "scores.json").read_text())["experiments"]["parts"]
    assert [entry["part"] for entry in entries] == ["*.a", "head.*"]
    for entry in entries:
        assert entry["learned"][-1] == entry["end"][-1], "the last one is its own mixture"
        assert None not in (*entry["learned"], *entry["end"])
    assert entries[0]["learned"][0] == entries[1]["learned"][0] and entries[0] != entries[1] | {"part": "*.a"}
    assert "<h2>Is a part enough to share?</h2>" in (tmp_path / "whole" / "report.html").read_text()


def test_learners_that_diverged(cache, tmp_path):
    folder = tmp_path / "run"
    assert main([*RUN, "--cache", cache, "--out", str(folder), "--strategies", "shared", "--lr", "1e30"]) == DIVERGED
    assert "SHARED diverged." in (folder / "report.html").read_text()


def test_a_part_that_no_adapter_has_is_one_line(cache, tmp_path, capsys):
    run = [*RUN, "--cache", cache, "--out", str(tmp_path / "run"), "--strategies", "shared"]
    run[run.index("head.*")] = "7.*"
    assert main(run) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "--shared-parts: '7.*' matches no part of an adapter" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists(), "it began the run"
