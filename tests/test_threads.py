"""The thread count of the tiny backbone's warm-up: kept with it, and said when a run on another count uses it."""

import json

import pytest
import torch
from test_run import SMALL

from kloss.cl import runner
from kloss.run import main


@pytest.fixture
def threads(monkeypatch):
    """Sets how many threads torch says it has; it has as many as before, since two are slow on a busy machine."""
    return lambda count: monkeypatch.setattr(torch, "get_num_threads", lambda: count)


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the small study in a folder: gives what was printed on one line, env.json and scores.json."""

    def run(name, *more):
        out = tmp_path / name
        assert main([*SMALL, "--strategies", "non-shared", "--cache", str(tmp_path / "cache"), "--out", str(out), *more]) == 0
        printed = " ".join(capsys.readouterr().out.split())
        return printed, json.loads((out / "env.json").read_text()), (out / "scores.json").read_bytes()

    return run


def test_a_backbone_of_another_thread_count_is_used_and_said(tmp_path, threads, run):
    threads(1)
    printed, environment, _ = run("first")
    assert "warmed up on" not in printed and environment["backbone_threads"] == environment["threads"] == 1
    (folder,) = (tmp_path / "cache").glob("backbone-*")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    threads(2)
    printed, environment, _ = run("second", "--max-learners", "2")  # in two cohorts, each of which loads the backbone
    assert printed.count("warmed up on 1 thread, this run has 2") == 1
    assert environment["backbone_threads"] == 1 and environment["threads"] == 2
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert len(list((tmp_path / "cache").glob("backbone-*"))) == 1


def test_a_run_that_is_continued_finds_its_backbone(tmp_path, threads, run):
    threads(2)
    _, environment, scores = run("run")
    assert environment["backbone_threads"] == 2
    (tmp_path / "run" / "scores.json").unlink()
    threads(1)
    printed, environment, again = run("run")
    assert "stopped on 2 threads" in printed and "warmed up on 2 threads, this run has 1" in printed
    assert environment["backbone_threads"] == 2 and again == scores


@pytest.mark.parametrize("known", [True, False])  # earlier versions kept no digest
def test_a_run_that_goes_on_with_a_backbone_warmed_up_on_other_threads_says_so(tmp_path, threads, run, known):
    """Its cache is gone, and the backbone is made again on as many threads as the run has, which itself are as before."""
    threads(2)
    _, environment, _ = run("run")
    before = environment | {"backbone_threads": 1, "backbone": "of one thread"}
    for env, words in ((before, " (threads of its warm-up: 1, now 2)"), (before | {"backbone_threads": 2}, "")):
        if not known:
            del env["backbone"]
        (tmp_path / "run/scores.json").unlink()
        (tmp_path / "run/env.json").write_text(json.dumps(env))
        printed, after, _ = run("run")
        assert (f"stopped on a tiny backbone of other weights{words}: scores may differ" in printed) is (known or words != "")
        assert after == environment
    (tmp_path / "run/scores.json").unlink()
    assert "other weights" not in run("run")[0]


def test_without_a_warm_up_threads_do_not_matter(threads, run):
    threads(1)
    assert run("first", "--pretrain-steps", "0")[1]["backbone_threads"] is None
    threads(2)
    assert "warmed up on" not in run("second", "--pretrain-steps", "0")[0]


def test_an_exact_study_is_the_same_on_one_thread_and_on_two(tmp_path, monkeypatch, capsys):
    weights = []
    train = runner.Cohort.train

    def recorded(cohort, *arguments):
        train(cohort, *arguments)
        weights.append(cohort.bank.param.clone())

    monkeypatch.setattr(runner.Cohort, "train", recorded)
    sizes = ["--limit", "200", "--tiny-hidden", "64", "--rank", "8", "--exact", "--epochs", "1"]
    before, files = torch.get_num_threads(), []
    for count in ("1", "2"):
        folder = tmp_path / count
        places = ["--cache", str(folder / "cache"), "--out", str(folder / "run")]
        assert main([*SMALL, *sizes, "--strategies", "non-shared", "lora-multi", "--threads", count, *places]) == 0
        assert torch.get_num_threads() == before
        assert json.loads((folder / "run/env.json").read_text())["threads"] == int(count)
        files += [(folder / "run/scores.json").read_bytes()]
        files += [file.read_bytes() for file in (folder / "cache").glob("backbone-*/model.safetensors")]
    assert "warmed up on" not in capsys.readouterr().out
    assert len(weights) == 2 and len(files) == 4
    assert files[:2] == files[2:] and torch.equal(*weights)
