"""The command: a study end to end, killed and resumed, and one clear line for every mistake."""

import csv
import json
import os
import pwd
import re
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints
from unittest import mock

import numpy as np
import pytest
import torch
from test_files import ODD_ENTRIES, make_odd_entry

from kloss.cl.backbone import tiny_config
from kloss.cl.corpus import load_corpus
from kloss.cl.languages import LOCALES
from kloss.cl.rundir import open_run
from kloss.cl.runner import _Watch, on_signals
from kloss.cl.summary import best_on_dev
from kloss.cl.train import _Team
from kloss.config import LIMITS, Config, StrategyName
from kloss.console import Console, Silent
from kloss.errors import UserError
from kloss.estimate import Machine, describe
from kloss.models import XLMRForTokenClassification
from kloss.presets import demo, first_five, paper
from kloss.run import main, names_all, parse, prepare, without_effect

SMALL = [
    *("--languages", "en-US", "de-DE", "ja-JP", "--limit", "24", "--eval-limit", "8", "--epochs", "2", "--batch-size", "8"),
    *("--tiny-layers", "1", "--tiny-hidden", "32", "--pretrain-steps", "3", "--seeds", "1", "--rank", "2", "--warmup", "2"),
]


def interrupted(arguments, stop):
    """Runs the command, interrupted as step number `stop` begins; returns the team that would have taken it."""
    teams, original = [], _Team.advance

    def advance(team):
        teams.append(team)
        if len(teams) == stop:
            raise KeyboardInterrupt
        return original(team)

    with mock.patch.object(_Team, "advance", advance):
        assert main(arguments) == 130
    return teams[-1]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def small(cache, tmp_path):
    """A run of seconds: (arguments, run folder)."""
    return [*SMALL, "--cache", cache, "--out", str(tmp_path / "run")], tmp_path / "run"


def test_all_strategies_end_to_end(small, capsys):
    arguments, folder = small
    names = ["non-shared", "shared", "partial", "lora-multi", "vanilla", "multi", "mono"]
    assert main([*arguments, "--strategies", *names]) == 0
    scores = json.loads((folder / "scores.json").read_text())
    assert [run["strategy"] for run in scores["runs"]] == names
    for run in scores["runs"]:
        rows = 2 if "multi" in run["strategy"] else 4
        assert len(run["R"]) == rows and all(0 <= f1 <= 1 for row in run["R"] for f1 in row)
    page = (folder / "report.html").read_text()
    assert "NON-SHARED" in page and "http" not in page.replace("http://www.w3.org", "").replace("https://arxiv.org", "")
    assert {"config.json", "env.json", "log.jsonl"} <= {file.name for file in folder.iterdir()}
    assert "NON-SHARED" in capsys.readouterr().out
    before = (folder / "scores.json").read_bytes()
    assert main([*arguments, "--strategies", *names]) == 0  # a complete run is shown, not trained again
    assert (folder / "scores.json").read_bytes() == before
    assert "is complete already" in " ".join(capsys.readouterr().out.split())


def test_the_table_of_scores_has_every_cells_counts(small):
    arguments, folder = small
    assert main([*arguments, "--strategies", "non-shared", "shared", "multi", "--orders", "2"]) == 0
    scores = json.loads((folder / "scores.json").read_text())
    with open(folder / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(row) for run in scores["runs"] for row in run["R"]) == 2 * 2 * 12 + 6
    cells = {(row["strategy"], row["order"], int(row["step"]), row["tested"]): row for row in rows}
    assert len(cells) == len(rows)
    for run in scores["runs"]:
        for i, line in enumerate(run["R"]):
            for locale, f1 in zip(run["order"], line, strict=True):
                row = cells[run["strategy"], run["order_name"], i, locale]
                tp, predicted, gold = (int(row[name]) for name in ("TP", "predicted", "gold"))
                assert f1 == 2 * tp / (predicted + gold) and gold > 0
                assert (row["rank"], float(row["rate"]), row["seed"]) == (str(run["rank"] or ""), run["lr"], "0")
                trained = " ".join(run["order"]) if run["strategy"] == "multi" else run["order"][i - 1]
                assert row["trained"] == (trained if i else "")
    units = [run["unit"] for run in scores["runs"]]  # both orders of NON-SHARED are of the same learners
    assert units == [0, 0, 1, 2, 3]


def test_counts_of_slot_types_sum_up_to_the_scores(small):
    """Of all strategies, stopped and continued, with probes, scores within experiences and learners of experiments beside."""
    arguments, folder = small
    arguments = [
        *arguments,
        "--strategies",
        *get_args(StrategyName),
        "--epochs",
        "1",
        "--experiments",
        "pairs",
        "savings",
        "--score-every",
        "1",
    ]
    arguments += ["--checkpoint-seconds", "0"]
    assert main([*arguments, "--out", str(folder / "plain")]) == 0
    arguments.append("--slot-counts")
    assert main([*arguments, "--out", str(folder / "whole")]) == 0
    for stop in (2, 14):
        interrupted([*arguments, "--out", str(folder / "stopped")], stop)
    assert main([*arguments, "--out", str(folder / "stopped")]) == 0
    files = ("scores.json", "scores.csv", "slots.csv")
    plain, whole, stopped = (
        {name: (folder / run / name).read_bytes() for name in files if (folder / run / name).exists()}
        for run in ("plain", "whole", "stopped")
    )
    assert stopped == whole and plain == {name: whole[name] for name in files[:2]}
    scores, slots = (list(csv.reader(whole[name].decode().splitlines())) for name in files[1:])
    assert slots[0] == [*scores[0][:-3], "slot", "TP", "predicted", "gold"]
    sums: dict = {}
    for *cell, slot, tp, predicted, gold in slots[1:]:
        assert slot not in sums.setdefault(tuple(cell), {}) and 0 <= int(tp) <= min(int(predicted), int(gold))
        sums[tuple(cell)][slot] = np.array([int(tp), int(predicted), int(gold)])
    assert len(sums) == len(scores) - 1 and len({slot for each in sums.values() for slot in each}) > 3
    for *cell, tp, predicted, gold in scores[1:]:
        assert sum(sums[tuple(cell)].values()).tolist() == [int(tp), int(predicted), int(gold)]


def test_counts_of_slot_types_belong_to_a_run(small, capsys):
    """What was scored before would lack them."""
    arguments, folder = small
    assert main([*arguments, "--epochs", "1"]) == 0
    line = one_line_error([*arguments, "--epochs", "1", "--slot-counts"], capsys)
    assert "holds a run of another configuration (slot_counts was its default, is True)" in line


def test_scores_within_experiences_survive_a_stop(small, monkeypatch):
    """24 utterances in batches of 8, two epochs: six steps an experience."""
    arguments, folder = small
    arguments = [*arguments, "--strategies", "shared", "non-shared", "--experiments", "savings", "--checkpoint-seconds", "0"]
    assert main([*arguments, "--out", str(folder / "plain")]) == 0
    arguments += ["--score-every", "2"]
    assert main([*arguments, "--out", str(folder / "whole")]) == 0
    calls, original = [], _Team.advance

    def advance(team):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return original(team)

    with monkeypatch.context() as patch:
        patch.setattr(_Team, "advance", advance)
        assert main([*arguments, "--out", str(folder / "stopped")]) == 130
    assert main([*arguments, "--out", str(folder / "stopped")]) == 0
    whole = (folder / "whole" / "scores.json").read_bytes()
    assert (folder / "stopped" / "scores.json").read_bytes() == whole
    plan = []
    with Console().progress() as progress:
        for some in (arguments[:-2], arguments):
            corpus, study = prepare(parse(some), progress)
            plan.append(int(dict(describe(parse(some), corpus, study, Machine(1, "cpu", 8 << 30)))["scoring"].split()[0]))
    # NON-SHARED's learners end with every language that comes later; each experience is scored twice within.
    ends = [locales for table in study.to_score[:4] for i, locales in table.items() if i > 0]
    tokens = sum(len(corpus.sentences(locale, "test").input_ids) for locales in ends for locale in locales)
    assert len(ends) == 3 + 3 and plan[1] - plan[0] == 2 * tokens
    plain, traced = (json.loads((folder / name / "scores.json").read_text()) for name in ("plain", "whole"))
    for run in traced["runs"]:
        learners, experiences = (1, 3) if run["strategy"] == "shared" else (3, 1)
        places = [(entry["learner"], entry["experience"], entry["step"]) for entry in run["curves"]]
        assert places == [(g, i + 1, 6 * i + k) for g in range(learners) for i in range(experiences) for k in (2, 4)]
        for entry in run["curves"]:
            locales = set(run["order"]) if learners == 1 else {run["order"][entry["learner"]]}
            assert locales <= entry["counts"].keys() and all(len(count) == 3 for count in entry["counts"].values())
        del run["curves"]
    assert traced == plain
    pages = [(folder / name / "report.html").read_text() for name in ("plain", "whole")]
    assert ["<h2>Within experiences</h2>" in page for page in pages] == [False, True]


def test_all_locales_named_are_none_named(tmp_path):
    """They were another corpus in the cache, and another run."""
    data, cache = tmp_path / "data", tmp_path / "cache"
    data.mkdir()
    for locale in LOCALES:
        text = [("wake me at [time : nine]", "train"), ("call [person : anna] now", "train"), ("wake me [time : now]", "test")]
        lines = [
            {"id": str(n), "locale": locale, "partition": split, "utt": re.sub(r"\[\w+ : (\w+)\]", r"\1", utt), "annot_utt": utt}
            for n, (utt, split) in enumerate(text)
        ]
        (data / f"{locale}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [*SMALL[4:], "--data", str(data), "--cache", str(cache), "--strategies", "lora-multi", "--epochs", "1"]
    none, all_ = tmp_path / "none", tmp_path / "all"
    assert main([*arguments, "--languages", "--out", str(none)]) == 0
    entries = {entry.name for entry in cache.iterdir()}
    assert main([*arguments, "--languages", *LOCALES, "--out", str(all_)]) == 0
    assert {entry.name for entry in cache.iterdir()} == entries
    assert (all_ / "config.json").read_bytes() == (none / "config.json").read_bytes()
    assert (all_ / "scores.json").read_bytes() == (none / "scores.json").read_bytes()
    assert main([*arguments, "--languages", *LOCALES, "--out", str(none)]) == 0, "one run folder"
    # A folder that an earlier version began, with all of them in its settings, goes on as it began.
    with Console().progress() as progress:
        old = replace(parse([*arguments, "--languages", *LOCALES]).checked(), out=str(tmp_path / "old"))
        corpus = load_corpus(str(data), locales=LOCALES, limit=24, eval_limit=8, cache=cache)
        with open_run(old.out, old.identity() | {"corpus": corpus.fingerprint}):
            pass
        assert not names_all(old) and prepare(old, progress)[0].fingerprint == corpus.fingerprint
    assert main([*arguments, "--languages", *LOCALES, "--out", old.out]) == 0
    before, after = (json.loads((folder / "scores.json").read_text()) for folder in (none, Path(old.out)))
    assert before == after
    assert not names_all(replace(old, languages=LOCALES[::-1], out="")) and not names_all(replace(old, languages=(), out=""))


def test_all_locales_named_must_be_there(tmp_path, capsys):
    data = tmp_path / "data"
    jsonl(data)
    line = one_line_error(["--data", str(data), "--languages", *LOCALES, "--cache", str(tmp_path), "--dry-run"], capsys)
    assert "data has no utterances in " in line and "zh-TW" in line and "en-US" not in line


def test_a_reader_that_leaves_ends_the_command_without_a_traceback():
    """`--help | head -3` ended in a traceback. `true` has left before anything is written."""
    command = f"{sys.executable} -m kloss.run --help | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (f"{128 + signal.SIGPIPE}\n", "")


def test_settings_are_chosen_on_dev(small, capsys):
    arguments, folder = small
    assert main([*arguments, "--strategies", "shared", "--eval-split", "dev", "--out", str(folder / "dev")]) == 0
    assert main([*arguments, "--strategies", "shared", "--out", str(folder / "test")]) == 0
    dev, test = (json.loads((folder / split / "scores.json").read_text()) for split in ("dev", "test"))
    assert dev["corpus"]["scored"] == "dev" and set(dev["corpus"]["scored_utterances"].values()) == {8}
    assert test["corpus"]["scored"] == "test" and "scored on dev" in (folder / "dev" / "report.html").read_text()
    with open(folder / "dev" / "scores.csv", newline="") as file:
        gold = {row["tested"]: int(row["gold"]) for row in csv.DictReader(file)}
    with Console().progress() as progress:
        corpus, _ = prepare(parse([*arguments, "--eval-split", "dev"]), progress)
    for locale, spans in gold.items():
        labels = corpus.sentences(locale, "dev").labels
        assert spans == sum(corpus.labels[n].startswith("B-") for n in labels if n >= 0)
    assert "eval_split was 'dev', is its default" in one_line_error(
        [*arguments, "--strategies", "shared", "--out", str(folder / "dev")], capsys
    )


def test_a_run_takes_what_a_run_on_dev_chose(small, capsys):
    arguments, folder = small
    dev, test, plain = (folder / name for name in ("dev", "test", "plain"))
    several = ["--rank", "1", "2", "--lr", "1e-3", "5e-3", "--epochs", "2"]
    assert main([*arguments, *several, "--strategies", "shared", "--eval-split", "dev", "--out", str(dev)]) == 0
    rank, lr = best_on_dev(json.loads((dev / "scores.json").read_text()))
    chosen = ["--epochs", "2", "--strategies", "shared"]
    assert main([*arguments, *chosen, "--select", str(dev), "--out", str(test)]) == 0
    assert main([*arguments, *chosen, "--rank", str(rank), "--lr", str(lr), "--out", str(plain)]) == 0
    assert (test / "scores.json").read_bytes() == (plain / "scores.json").read_bytes()
    for wrong, words in ((test, "chosen on dev"), (folder / "none", "none/scores.json")):
        assert words in one_line_error([*arguments, "--select", str(wrong), "--out", str(folder / "x")], capsys)


def test_a_setting_counts_if_every_strategy_ended_with_it():
    def run(strategy, rank, lr, f1, **more):
        return {"strategy": strategy, "rank": rank, "lr": lr, "R": [[0.0, 0.0], [0.1, 0.1], [f1, f1]], **more}

    runs = [run("shared", 8, 1e-3, 0.4), run("non-shared", 8, 1e-3, 0.5), run("vanilla", None, 1.0, 0.9)]
    runs += [run("shared", 8, 3e-3, 0.6), run("non-shared", 8, 3e-3, 0.2), run("shared", 4, 1e-2, 0.9)]
    runs += [run("non-shared", 4, 1e-2, 0.9, diverged="loss nan")]
    assert best_on_dev({"corpus": {"scored": "dev"}, "runs": runs}) == (8, 1e-3)
    with pytest.raises(UserError, match="no rank and rate"):
        best_on_dev({"corpus": {"scored": "dev"}, "runs": runs[-1:]})


def test_a_split_without_utterances_is_refused(small, tmp_path, capsys):
    """All scores were 0, as if nothing had been learned."""
    data = jsonl(tmp_path / "data", {"id": "2", "partition": "test"})
    arguments = [*small[0], "--data", data, "--languages", "en-US", "--cache", str(tmp_path / "cache")]
    assert f"--eval-split dev: {data} has no such utterances of en-US" in one_line_error(
        [*arguments, "--eval-split", "dev"], capsys
    )
    (tmp_path / "data" / "en-US.jsonl").unlink()
    (tmp_path / "data").rmdir()
    jsonl(tmp_path / "data")
    assert "--eval-split test" in one_line_error(arguments, capsys)


def test_a_study_in_which_a_learner_diverged_does_not_end_with_0(small, capsys):
    arguments, folder = small
    diverging = [*arguments, "--strategies", "shared", "--lr", "1e-3", "1e25"]
    for _ in range(2):  # trained; complete already
        assert main(diverging) == 3
        out = " ".join(capsys.readouterr().out.split())
        assert "lr 1e+25: 1 of 1 runs diverged and are in no average." in out
        assert out.index("Nothing was learned: no learner reached") < out.index("F1 in points")
    scores = json.loads((folder / "scores.json").read_text())
    assert [bool(run["diverged"]) for run in scores["runs"]] == [False, True]


def test_equal_settings_are_refused(small, capsys):
    """`--rank 8 8` trained one learner and reported it as two runs, with an interval."""
    assert "--rank names 8 twice" in one_line_error([*small[0], "--rank", "8", "8"], capsys)
    assert "--strategies names shared twice" in one_line_error([*small[0], "--strategies", "shared", "shared"], capsys)
    # Reports name both 0.001, and averaged them.
    assert "--lr names 0.001 twice" in one_line_error([*small[0], "--lr", "1e-3", "1.0000001e-3"], capsys)
    assert not small[1].exists()


def test_backbone_without_warm_up(small):
    assert main([*small[0], "--pretrain-steps", "0", "--strategies", "non-shared"]) == 0


def test_dry_run_writes_nothing(small, capsys):
    arguments, folder = small
    assert main([*arguments, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "4 learners" in out and "minutes" in out and not folder.exists()


# Imports once, then forks a child for every attempt, so that twenty kills cost seconds and not minutes.
ATTEMPTS = """
import os, random, signal, sys, time
import matplotlib.backends.backend_svg, matplotlib.pyplot, rich.progress, tyro
from kloss.run import main
arguments, folder, cache, seed = eval(sys.argv[1])
chance = random.Random(seed)

def start(out):
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main([*arguments, "--cache", cache, "--checkpoint-seconds", "0", "--out", out]))
    return pid

def finish(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

assert finish(start(folder + "/whole")) == 0
began = time.monotonic()
assert finish(start(folder + "/timed")) == 0
length = time.monotonic() - began
kills, runs = 0, 0
while kills < 20:
    out = f"{folder}/killed-{runs}"
    while True:
        pid = start(out)
        time.sleep(chance.uniform(0.05, 0.9) * length)
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert os.waitstatus_to_exitcode(status) == 0
            break
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        if kills == 20:
            assert finish(start(out)) == 0
            break
    runs += 1
print(kills, runs)
"""


def test_killed_twenty_times_and_resumed_gives_the_same_scores(cache, tmp_path):
    arguments = [*SMALL, "--strategies", "non-shared", "shared", "vanilla", "--epochs", "6"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    given = repr((arguments, str(tmp_path), cache, 0))
    done = subprocess.run([sys.executable, "-c", ATTEMPTS, given], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kills, runs = map(int, done.stdout.split())
    assert kills == 20 and runs >= 1
    whole = (tmp_path / "whole" / "scores.json").read_bytes()
    for i in range(runs):
        assert (tmp_path / f"killed-{i}" / "scores.json").read_bytes() == whole
        left = {file.name for file in (tmp_path / f"killed-{i}").iterdir() if not file.name.startswith(".report.html.")}
        assert left == {
            ".lock",
            "config.json",
            "env.json",
            "log.jsonl",
            "checkpoint.safetensors",
            "scores.json",
            "scores.csv",
            "report.html",
            "states",
        }


def test_a_stopped_run_goes_on_and_does_not_begin_again(small, monkeypatch, capsys):
    arguments, folder = [*small[0], "--strategies", "non-shared", "vanilla", "--checkpoint-seconds", "0"], small[1]
    rounds, stop_at = [], None

    def advance(team):
        if len(rounds) == stop_at:
            raise KeyboardInterrupt
        rounds.append(team)
        return original(team)

    original = _Team.advance
    monkeypatch.setattr(_Team, "advance", advance)
    assert main([*arguments, "--out", str(folder / "whole")]) == 0
    whole = len(rounds)
    for stop_at in (4, 9, whole - 2):  # among the adapters, among the whole model's first steps, near the end
        rounds.clear()
        out = ["--out", str(folder / f"stopped-{stop_at}")]
        assert main([*arguments, *out]) == 130
        assert "continues from the last checkpoint" in capsys.readouterr().err
        done, stop_at = len(rounds), None
        assert main([*arguments, *out]) == 0
        assert len(rounds) == whole and done > 0


def one_line_error(arguments, capsys):
    """Runs the command, which must end with status 2; returns its one line."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert len(lines) == 1 and "Traceback" not in captured.err + captured.out
    return lines[0]


def jsonl(folder, *lines):
    folder.mkdir()
    good = {"id": "1", "locale": "en-US", "partition": "train", "utt": "wake me", "annot_utt": "wake [time : me]"}
    text = "".join((line if isinstance(line, str) else json.dumps(good | line)) + "\n" for line in ({}, *lines))
    (folder / "en-US.jsonl").write_text(text)
    return str(folder)


def test_mistakes_of_the_command_line(small, capsys):
    arguments, folder = small
    for extra, words in (
        (["--rank", "0"], "--rank must lie between 1 and 10,000, got 0"),
        (["--lr"], "--lr needs at least one value"),
        (["--strategies"], "--strategies needs at least one of non-shared, shared"),
        (["--max-learners", "-1"], "--max-learners must lie between 0 and"),
        (["--languages", "en-US", "xx-YY"], "xx-YY"),
        (["--data", "/no/such/place"], "/no/such/place"),
        (["--backbone", "/no/such/model"], "/no/such/model"),
        (["--dropout", "1"], "--dropout must lie between 0 and 0.999, got 1"),
        (["--epochs", "0"], "--epochs must lie between 1 and"),
        (["--pretrain-batch", "0"], "--pretrain-batch must lie between 1 and"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "torch sees no CUDA GPU here")]),
    ):
        assert words in one_line_error([*arguments, *extra], capsys)
        assert not (folder / "scores.json").exists()


def test_numbers_out_of_range_are_refused_before_any_work(small, tmp_path, capsys):
    arguments = [*small[0], "--cache", str(tmp_path / "cache")]
    floats = ["lr", "full_lr", "max_norm", "weight_decay", "alpha", "dropout", "lora_dropout", "overlap", "relatedness"]
    floats.append("checkpoint_seconds")
    values = [(name, value) for name in floats for value in ("nan", "inf", "-inf", "-1") if (name, value) != ("max_norm", "inf")]
    values += [("seed", "-1"), ("seed", str(2**64)), ("max_norm", "1e-320"), ("limit", "0"), ("max_length", "2")]
    values += [(name, "9" * 30) for name, kind in get_type_hints(Config).items() if "int" in str(kind)]
    for name, value in values:
        flag = f"--{name.replace('_', '-')}"
        for more in ([], ["--dry-run"]):
            assert f"{flag} must lie between" in one_line_error([*arguments, flag, value, *more], capsys)
    assert not small[1].exists() and not (tmp_path / "cache").exists()


PATHS = ("data", "tokenizer", "backbone", "groups", "out", "cache")


@pytest.mark.parametrize("name", PATHS)
def test_paths_that_name_nothing_are_refused_before_any_work(small, tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "circle").symlink_to("circle")
    for given, words in (
        ("a\0b", r"a\x00b is no path: embedded null byte"),
        ("~nosuchuser/a", "~nosuchuser/a: no home folder is known for it"),
        ("a" * 256, "File name too long"),
        ("none/" + "a" * 256, "a name has at most 255 bytes"),
        ("a/" * 2100, "File name too long"),
        ("circle/a", "Too many levels of symbolic links"),
        *([] if name in ("out", "cache") else [("", f"--{name} is empty")]),
    ):
        for more in ([], ["--dry-run"]):
            line = one_line_error([*small[0], "--strategies", "partial", f"--{name}={given}", *more], capsys)
            assert f"--{name}" in line and words in line and len(line) < 2000
    assert [entry.name for entry in tmp_path.iterdir()] == ["circle"]


def test_a_tilde_is_a_home_folder_in_every_path(small, tmp_path, monkeypatch, capsys):
    """A shell leaves --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    data = Path(jsonl(tmp_path / "data", {"id": "2", "partition": "test"}))
    (tmp_path / "groups.json").write_text('{"en-US": "a"}')
    flags = ["--data=~/data", "--cache=~/cache", "--out=~/out", "--groups=~/groups.json"]
    flags += ["--strategies", "partial", "--languages", "en-US"]
    monkeypatch.chdir(data)
    assert main([*small[0], *flags, "--pretrain-steps", "0", "--epochs", "1"]) == 0
    assert (tmp_path / "out" / "scores.json").exists() and list((tmp_path / "cache").glob("corpus-*"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["data"] == "~/data"
    tokenizer = next((tmp_path / "cache").glob("tokenizer-*")).rename(tmp_path / "tokenizer")
    (tmp_path / "model").mkdir()
    line = one_line_error([*small[0], *flags, "--tokenizer=~/tokenizer", "--backbone=~/model", "--out=~/other"], capsys)
    assert f"{tmp_path}/model" in line and tokenizer.is_dir()
    assert [entry.name for entry in data.iterdir()] == ["en-US.jsonl"]


def test_a_user_without_a_home(small, monkeypatch, capsys):
    arguments = [x for x in small[0] if x != "--cache"]
    arguments.remove(small[0][small[0].index("--cache") + 1])
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    line = one_line_error(arguments, capsys)
    assert "--cache ~/.cache: no home folder is known for it" in line
    assert main([*small[0], "--dry-run"]) == 0  # with a cache of its own


@pytest.mark.parametrize("kind", ODD_ENTRIES)
def test_groups_that_are_no_file(small, tmp_path, capsys, kind):
    make_odd_entry(tmp_path / "groups", kind)
    arguments = [*small[0], "--strategies", "partial", "--groups", str(tmp_path / "groups")]
    assert "groups" in one_line_error(arguments, capsys)


def test_groups_belong_to_a_run_by_what_their_file_says(small, tmp_path, capsys):
    file, folder = tmp_path / "groups.json", small[1]
    arguments = [*small[0], "--strategies", "partial", "--groups", str(file)]
    groups = {"en-US": "a", "de-DE": "a", "ja-JP": "b"}
    file.write_text(json.dumps(groups))
    interrupted([*arguments, "--checkpoint-seconds", "0"], 3)
    changed = json.dumps(groups | {"de-DE": "b"})
    file.write_text(changed)
    capsys.readouterr()
    words = "holds a run of another configuration (group of de-DE was 'a', is 'b'); choose another --out"
    assert words in one_line_error(arguments, capsys)
    file.write_text(json.dumps(groups | {"fr-FR": "a"}, indent=1))  # which changes nothing
    assert main(arguments) == 0
    file.write_text(changed)
    assert words in one_line_error(arguments, capsys)  # complete
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if "group of" not in key}))
    assert main(arguments) == 0
    assert "does not say what groups it has (earlier versions wrote none)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": ' * 100_000, "not readable JSON"),
        ("[" * 500 + "]" * 500, "an object is needed"),
        ('{"en-US": ' + "[" * 500 + "]" * 500 + ', "de-DE": "a", "ja-JP": "b"}', "the group of en-US must be a name"),
        (json.dumps({"a" * 10**6: "a"}), "unknown locale"),
        (json.dumps({"en-US": "a" * 10**6 + "\n", "de-DE": "a", "ja-JP": "b"}), "the group of en-US must be a name"),
        ('{"en-US": "\\ud800", "de-DE": "a", "ja-JP": "b"}', "the group of en-US must be a name"),
    ],
)
def test_groups_of_hostile_json(small, tmp_path, capsys, text, words):
    (tmp_path / "groups").write_text(text)
    line = one_line_error([*small[0], "--strategies", "partial", "--groups", str(tmp_path / "groups")], capsys)
    assert words in line and len(line) < 2000


def test_studies_that_are_too_large(small, tmp_path, capsys):
    arguments = [*small[0], "--cache", str(tmp_path / "cache")]
    for more, words in (
        (["--orders", "10000"], "20,000 score matrices"),
        (["--seeds", "5001"], "10,002 score matrices"),
        (["--seeds", "100", "--orders", "100", "--rank", "2", "3"], "40,000 score matrices"),
        (["--limit", "1000000"], "synthetic train must be a whole number, at least 1 and at most 100,000"),
    ):
        assert words in one_line_error([*arguments, *more, "--dry-run"], capsys)
    assert not list((tmp_path / "cache").glob("corpus-*"))


def test_memory_is_counted_before_any_work(small, tmp_path, monkeypatch, capsys):
    arguments, folder = small
    assert main([*arguments, "--dry-run"]) == 0
    capsys.readouterr()
    sizes = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 16}  # 256 MiB
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    for more, words in (
        (
            ["--rank", "10000", "--max-learners", "4"],
            "a cohort of 4 adapters of rank 10,000 (see --max-learners) needs 0.3 GiB for training; cpu has 0.2",
        ),
        (["--tiny-layers", "10000", "--tiny-hidden", "1024"], "the tiny backbone of width 1,024 needs 1,875."),
        (["--tiny-hidden", "4096"], "the tiny backbone of width 4,096 needs "),
    ):
        assert words in one_line_error([*arguments, *more], capsys)
    assert main([*arguments, "--rank", "10000", "--max-learners", "4", "--dry-run"]) == 0  # a plan for another machine
    capsys.readouterr()
    assert main([*arguments, "--rank", "10000", "--dry-run"]) == 0
    cohorts = [line for line in capsys.readouterr().out.splitlines() if "1 learners, " in line]
    assert len(cohorts) == 4  # those of rank 10,000 one by one
    assert main([*arguments, "--rank", "10000", "--epochs", "1"]) == 0


def test_every_number_has_its_limits():
    numbers = {name for name, kind in get_type_hints(Config).items() if "int" in str(kind) or "float" in str(kind)}
    assert sorted(" ".join(LIMITS).split()) == sorted(numbers)


def test_positions_of_the_tiny_backbone_are_checked_before_its_warm_up(small, capsys):
    for more in ([], ["--dry-run"]):
        message = one_line_error([*small[0], "--max-length", "513", "--pretrain-steps", "100000", *more], capsys)
        assert "--max-length 513 is beyond backbone tiny's 512" in message


def test_without_clipping(small, capsys):
    arguments, folder = [*small[0], "--max-norm", "inf"], small[1]
    assert main([*arguments, "--dry-run"]) == 0 and "off (--max-norm inf)" in capsys.readouterr().out
    assert main(arguments) == 0 and main(arguments) == 0
    config, scores = (json.loads((folder / f"{name}.json").read_text()) for name in ("config", "scores"))
    assert config["max_norm"] == "inf" and "gradients not clipped" in scores["choices"][0]
    assert "gradients not clipped" in (folder / "report.html").read_text()


def test_a_plan_for_other_machines_is_of_a_dry_run():
    assert without_effect(Config(plan_for="8xh200")) == ["--plan-for has no effect: it is for --dry-run"]
    assert not without_effect(Config(plan_for="8xh200", dry_run=True))


def test_a_scaling_of_zero_runs_to_the_end(small):
    assert main([*small[0], "--alpha", "0"]) == 0


@pytest.mark.parametrize(
    "flags, strategy, reason",
    [
        ("--groups family", "shared", "no strategy is partial"),
        ("--order de-DE en-US ja-JP --orders 2", "multi", "every strategy trains all languages at once"),
        ("--lr 1 --alpha 1 --lora-dropout 0 --max-learners 3", "multi", "every strategy trains whole models"),
        ("--full-lr 1", "shared", "no strategy trains whole models"),
    ],
)
def test_flags_without_effect_are_named(small, capsys, flags, strategy, reason):
    assert main([*small[0], "--dry-run", "--strategies", strategy, *flags.split()]) == 0
    out = " ".join(capsys.readouterr().out.split())
    for flag in (part for part in flags.split() if part.startswith("--")):
        assert out.count(f"{flag} has no effect: {reason}") == 1
    assert main([*small[0], "--dry-run", "--strategies", "partial", "vanilla", *flags.split()]) == 0
    assert "has no effect" not in capsys.readouterr().out


def test_flags_of_other_data_and_backbones_are_named():
    config = replace(Config(), data="folder", backbone="folder", overlap=0.5, relatedness=0.1, tiny_layers=9, pretrain_steps=9)
    assert [line.split()[0] for line in without_effect(config)][-4:] == [
        "--overlap", "--relatedness", "--tiny-layers", "--pretrain-steps",
    ]  # fmt: skip
    assert not without_effect(demo()) and not without_effect(paper()) and not without_effect(first_five())


def test_arguments_that_are_no_text(small, capsys):
    assert "is not UTF-8" in one_line_error([*small[0], "--data", "folder\udcff"], capsys)


# Sends the signal itself after some steps, so that it arrives while a step runs.
SIGNALLED = """
import os, signal, sys
for ignored in (signal.SIGINT, signal.SIGHUP):  # they are, where the tests run in the background, and stay so in a run
    signal.signal(ignored, signal.SIG_DFL)
from kloss.cl.train import _Team
from kloss.run import main
number, after, arguments = eval(sys.argv[1])
advance, steps = _Team.advance, 0

def signalled(team):
    global steps
    steps += 1
    if steps == after:
        os.kill(os.getpid(), number)
    return advance(team)

_Team.advance = signalled
sys.exit(main(arguments))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_run_behind_a_checkpoint(small, tmp_path, number):
    arguments = [*small[0], "--strategies", "non-shared", "vanilla", "--checkpoint-seconds", "1000"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}

    def run(after, out):
        given = repr((int(number), after, [*arguments, "--out", str(tmp_path / out)]))
        return subprocess.run([sys.executable, "-c", SIGNALLED, given], env=environment, capture_output=True, text=True)

    assert run(0, "whole").returncode == 0
    for after in (3, 20):  # among the adapters, among the whole model's steps
        stopped = run(after, "stopped")
        assert stopped.returncode == 128 + number and stopped.stderr.count("\n") == 1, stopped.stderr
        assert "the same command continues" in stopped.stderr
        assert (tmp_path / "stopped" / "checkpoint.safetensors").exists()
    assert run(0, "stopped").returncode == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert max(steps) > 3
    whole, stopped = ((tmp_path / out / "scores.json").read_bytes() for out in ("whole", "stopped"))
    assert whole == stopped


def test_an_ignored_signal_stays_ignored():
    heard = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with on_signals(heard.append):
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_signal_does_not_wait():
    watch = _Watch.__new__(_Watch)
    watch.unsaved, watch.signal = True, 0
    watch.stop(15)  # there is something to save: the step comes to its end
    with pytest.raises(KeyboardInterrupt) as stopped:
        watch.stop(2)
    assert watch.signal == 15 and stopped.value.args == (2,)
    watch.unsaved, watch.signal = False, 0
    with pytest.raises(KeyboardInterrupt):
        watch.stop(15)


def test_a_run_continued_on_other_threads_says_so(small, capsys):
    arguments, folder = small
    assert main(arguments) == 0
    assert "threads" not in capsys.readouterr().out
    (folder / "scores.json").unlink()
    environment = json.loads((folder / "env.json").read_text())
    for text, warned in (
        (json.dumps(environment | {"threads": 99}), True),
        (json.dumps(environment), False),
        ("damaged", False),
    ):
        (folder / "env.json").write_text(text)
        assert main(arguments) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert ("stopped on 99 threads" in out and "scores may differ" in out) is warned
        (folder / "scores.json").unlink()


@pytest.mark.parametrize(
    "flag, allowed",
    [
        ("--strategies", "non-shared"),
        ("--preset", "first-five"),
        ("--device", "cuda"),
        ("--dtype", "bf16"),
        ("--groop", "--groups"),
    ],
)
def test_unknown_choices_are_refused_with_the_allowed_ones(flag, allowed, capsys):
    with pytest.raises(SystemExit) as ended:
        main([flag, "telepathy"])
    captured = capsys.readouterr()
    assert ended.value.code == 2 and "Traceback" not in captured.err
    assert flag in captured.err and allowed in captured.err


def test_help_has_sections_and_choices_and_flat_flags(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for words in ("data options", "study options", "adapter options", "tiny options", "synthetic options", "machine options"):
        assert words in text
    assert "{fp32,bf16,fp16}" in text and all(f"--{name.replace('_', '-')}" in text for name in vars(Config()))


def test_flags_override_a_preset():
    assert parse([]) == demo() and parse(["--preset=demo", "--rank", "2", "4"]) == replace(demo(), rank=(2, 4))
    config = parse(["--seed", "3", "--preset", "first-five", "--together", "5"])
    assert config == replace(first_five(), seed=3, max_learners=5)
    assert config == parse(["--preset", "first-five", "--max-learners", "5", "--seed", "3"])


def test_only_settings_that_change_figures_are_a_runs_identity():
    others = {"out": "x", "cache": "x", "checkpoint_seconds": 1.0, "device": "cpu", "preset": "paper", "dry_run": True}
    others |= {"threads": 3, "save_adapters": True, "select": "x", "plan_for": "8xh200", "tensorboard": True}
    assert replace(Config(), **others).identity() == Config().identity()
    # At their defaults these stand in no run folder: older ones lack them.
    unnamed = {"eval_split", "experiments", "head_lr", "methods", "pinned", "remedies", "score_every", "shared_parts", "trains"}
    unnamed |= {"vocabulary", "slot_counts", "init_seed", "dropout_seed"}
    assert vars(Config()).keys() - Config().identity().keys() == others.keys() | unnamed
    later = Config(eval_split="dev", experiments=("where",)).identity()
    assert later["eval_split"] == "dev" and later["experiments"] == ("where",)


@pytest.mark.parametrize(
    "line, words",
    [
        ("{not json", "en-US.jsonl:2"),
        ({"annot_utt": "wake [time : me"}, "en-US.jsonl:2"),
        ({"annot_utt": "wake time : me]"}, "en-US.jsonl:2"),
    ],
)
def test_broken_data_names_file_and_line(small, tmp_path, capsys, line, words):
    arguments = [x for x in small[0] if x not in ("--languages", "en-US", "de-DE", "ja-JP")]
    data = jsonl(tmp_path / "data", line)
    assert words in one_line_error([*arguments, "--languages", "en-US", "--data", data], capsys)


def test_other_configuration_in_the_folder(small, capsys):
    arguments, folder = small
    assert main(arguments) == 0
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert "seed was 0, is 7" in one_line_error([*arguments, "--seed", "7"], capsys)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_folder_that_is_no_run(small, capsys):
    arguments, folder = small
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert "is not a run folder" in one_line_error(arguments, capsys)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_checkpoint_cut_short(small, capsys):
    arguments, folder = small
    assert main(arguments) == 0
    (folder / "scores.json").unlink()
    checkpoint = folder / "checkpoint.safetensors"
    cut = checkpoint.read_bytes()[:-7][:200]
    checkpoint.write_bytes(cut)
    assert "checkpoint.safetensors is damaged or cut short" in one_line_error(arguments, capsys)
    assert checkpoint.read_bytes() == cut


@pytest.mark.filterwarnings("ignore:.*new head")
def test_backbone_with_too_small_a_vocabulary(small, tmp_path, capsys):
    from toy import toy_model

    arguments, _ = small
    toy_model().save_pretrained(tmp_path / "model")
    assert main(arguments) == 0  # its corpus and tokenizer are in the cache now
    tokenizer = next(Path(arguments[arguments.index("--cache") + 1]).glob("tokenizer-*"))
    capsys.readouterr()
    other = [*arguments[:-1], str(tmp_path / "other"), "--backbone", str(tmp_path / "model"), "--tokenizer", str(tokenizer)]
    assert "more than the 40 of backbone" in one_line_error(other, capsys)


@pytest.fixture
def pretrained(small, tmp_path):
    """(Arguments of a run on a backbone in a folder, the run folder, what puts the weights of a seed there)."""
    arguments, folder = small
    config = parse(arguments)
    corpus, _ = prepare(config, Silent())

    def put(seed):
        XLMRForTokenClassification.random(tiny_config(config, corpus), seed).save_pretrained(tmp_path / "model")

    put(1)
    named = ("--backbone", str(tmp_path / "model"), "--tokenizer", str(corpus.tokenizer_folder), "--strategies", "shared")
    return [*arguments, *named, "--experiments"], folder, put


def test_a_run_goes_on_with_the_backbones_weights_that_it_began_on(pretrained, capsys):
    arguments, folder, put = pretrained
    interrupted([*arguments, "--checkpoint-seconds", "0"], 3)
    began = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    put(2)
    capsys.readouterr()
    line = one_line_error(arguments, capsys)
    assert "holds a run on other weights of backbone" in line and "put those back, or choose another --out" in line
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == began
    put(1)
    assert main(arguments) == 0
    assert "digest of its backbone" not in capsys.readouterr().out
    assert main(arguments) == 0  # complete
    put(2)
    assert "holds a run on other weights of backbone" in one_line_error(arguments, capsys)


def test_a_run_folder_that_does_not_say_its_backbones_weights_goes_on_with_one_line(pretrained, capsys):
    """That of an earlier version."""
    arguments, folder, put = pretrained
    interrupted([*arguments, "--checkpoint-seconds", "0"], 3)
    environment = json.loads((folder / "env.json").read_text())
    del environment["backbone"]
    (folder / "env.json").write_text(json.dumps(environment))
    capsys.readouterr()
    put(2)
    assert main(arguments) == 0
    assert " ".join(capsys.readouterr().out.split()).count("has no digest of its backbone (earlier versions wrote none)") == 1
    assert json.loads((folder / "env.json").read_text()).keys() == environment.keys() | {"backbone"}


def test_long_utterances_are_counted(small, capsys):
    arguments, _ = small
    assert main([*arguments, "--max-length", "6"]) == 0
    assert "utterances are longer than 6 subwords and were cut" in " ".join(capsys.readouterr().out.split())


def run_with_small_files(arguments, limit):
    """The command where no file may have more than `limit` bytes, as on a disk that fills up: its one line of error."""

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "kloss.run", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_full_disk(small):
    arguments, folder = small
    assert main([*arguments, "--dry-run"]) == 0
    assert "cannot write" in run_with_small_files([*arguments, "--checkpoint-seconds", "0"], 100_000)
    assert not [file for file in folder.rglob("*") if "partial" in file.name]
    assert main(arguments) == 0  # with room again, it goes on


@pytest.mark.parametrize("limit", [1_000, 4_000, 100_000])  # the tokenizer, the corpus, the backbone is too large
def test_full_disk_under_the_cache(small, tmp_path, limit):
    arguments = [*small[0], "--cache", str(tmp_path / "cache")]
    assert "cannot write" in run_with_small_files(arguments, limit)
    assert not list((tmp_path / "cache").glob(".tmp-*"))
    assert main(arguments) == 0
