"""Learners over processes: what one trains alone, two and three train to the bit, killed and resumed on other numbers."""

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import rich.console
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import STUDY, TO_SCORE
from test_run import SMALL
from toy import ToyCorpus, toy_model

from kloss.cl import runner
from kloss.cl.progress import Record
from kloss.cl.resume import keep_furthest
from kloss.cl.rundir import open_run
from kloss.cl.runner import Outcome, train_study
from kloss.cl.shares import Limits, Share, Stage, cohorts_of, costs_of, share_of, stages
from kloss.cl.study import Study
from kloss.cl.train import Cohort
from kloss.config import Config
from kloss.console import Console, Silent
from kloss.errors import UserError
from kloss.models import AdapterBank
from kloss.models.rows import STATE
from kloss.processes import Processes, own_gpu

HERE = Path(__file__).parent
SIZE = len(STUDY.learners)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}"}


def python(*arguments, **more):
    return subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=600, **more)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 1000), min_size=SIZE, max_size=SIZE), st.integers(1, 5), st.integers(0, 4))
def test_each_learner_has_one_process_and_none_has_much_more_than_another(tokens, processes, max_learners):
    plan = stages(STUDY, Limits(max_learners), tokens, processes)
    dealt = [g for members, _ in cohorts_of(plan) for g in members]
    assert sorted(dealt) == list(range(SIZE)) and [stage.forks for stage in plan] == [False, True, False]
    for members, rank in cohorts_of(plan):
        limit = 1 if rank is None else max_learners or SIZE
        assert 0 < len(members) <= limit and rank == max((STUDY.learners[g].rank for g in members), key=lambda r: r or 0)
    for part in (plan[:1], plan[1:]):  # what trains without waiting in between
        shares = [[g for stage in part for members in stage.shares[p].cohorts for g in members] for p in range(processes)]
        loads = [sum(tokens[g] for g in share) for share in shares]
        assert max(loads) - min(loads) <= max(tokens[g] for share in shares for g in share)
    exact = cohorts_of(stages(STUDY, Limits(max_learners, exact=True), tokens, processes))
    assert {rank for members, rank in exact if 1 in members} == {5}


def test_the_furthest_of_several_records_counts():
    def record(counters, failed=None, weights=None):
        return Record(counters, {}, {}, failed, weights, {"param": torch.zeros(1)}, 2)

    found = [record([0, 1, 2]), record([1, 0, 0]), record([0, 2, 0]), record([1, 0, 0], weights=7)]
    for several in (found, found[::-1]):
        known: dict = {}
        keep_furthest(known, [(3, each) for each in several] + [(4, found[0])], {3})
        assert known.keys() == {3} and known[3].counters == [1, 0, 0] and known[3].weights == 7
    diverged = record([0, 0, 1], "diverged at step 2")
    keep_furthest(known, [(3, diverged)], {3})
    assert known[3].failed  # it trains no more, wherever else it was before that was known


def test_a_fork_and_what_it_begins_with_may_be_of_two_processes():
    """So that those below must wait."""
    plan = stages(STUDY, Limits(4, exact=True), costs_of(STUDY, ToyCorpus(), "cpu"), 3)
    home = {g: p for p in range(3) for members in share_of(plan, p).cohorts for g in members}
    assert home[0] != home[6]


def test_killed_at_twenty_moments_and_resumed_on_other_numbers_gives_the_same(tmp_path):
    done = python(HERE / "jobs.py", tmp_path, "20", "0")
    assert done.returncode == 0, done.stderr
    kills, runs = map(int, done.stdout.split())
    assert kills == 20 and runs >= 1
    whole = (tmp_path / "whole-1" / "outcome.json").read_text()
    outcome = Outcome(*json.loads(whole))
    assert "diverged at step 2" in outcome.failed[1] and outcome.probed.count(None) == 3  # the probes of that learner
    assert len({str(scores) for scores in outcome.scores}) == len(STUDY.learners)
    for scores, slots in zip(outcome.scores, outcome.slots, strict=True):
        assert scores == {
            at: {locale: [sum(own[i::3]) for i in range(3)] for locale, own in row.items()} for at, row in slots.items()
        }
    adapters = {file.relative_to(tmp_path / "whole-1"): file.read_bytes() for file in tmp_path.glob("whole-1/adapters/*/*")}
    assert len(adapters) == 12
    for folder in (tmp_path / name for name in ("whole-2", "whole-3", *(f"killed-{i}" for i in range(runs)))):
        assert (folder / "outcome.json").read_text() == whole
        assert {file.relative_to(folder): file.read_bytes() for file in folder.glob("adapters/*/*")} == adapters


def test_a_row_goes_on_in_a_wider_bank():
    """With --max-learners the largest rank of a cohort depends on the number of processes."""
    learners = [STUDY.learners[0], STUDY.learners[4]]  # of ranks 2 and 5
    narrow, wide = (Cohort(toy_model(), ToyCorpus(), own, STUDY.to_score[:1] * len(own)) for own in (learners[:1], learners))
    narrow.bank.exp_avg.normal_()
    narrow.bank.param.copy_(narrow.bank.param + 1)
    narrow.bank.steps.fill_(2)
    narrow.streams[0].seek([0, 0, 2])
    tensors, state = narrow.state()
    scores = {"0": {locale: [0, 0, 1] for locale in ToyCorpus().locales}}
    record = Record(state["counters"][0], scores, {}, None, None, {name: tensors[name][0] for name in STATE}, 2)
    wide.resume({0: record})
    assert wide.bank.rank == 5 and wide.bank.steps.tolist() == [2, 0] and wide.streams[0].counters() == [0, 0, 2]
    assert wide.scores == [{0: scores["0"]}, {}] and wide.tokens > 0
    assert isinstance(narrow.bank, AdapterBank) and isinstance(wide.bank, AdapterBank)
    for matrix in ("param", "exp_avg"):
        for name in narrow.bank.slots:
            given, placed = (bank.view(getattr(bank, matrix), name)[0] for bank in (narrow.bank, wide.bank))
            if name.endswith(".a"):
                given, placed = given.view(-1, 2, given.shape[-1]), placed.view(-1, 5, placed.shape[-1])[:, :2]
            elif name.endswith(".b"):
                given, placed = given[:, :2], placed[:, :2]
            assert torch.equal(given, placed), name
    with pytest.raises(UserError, match="tensors are param"):
        wide.resume({1: record._replace(row={"param": tensors["param"][0]})})


class Lone(Processes):
    """One process of several, the others of which never come to anything."""

    def wait(self, meanwhile=None):
        pass


def test_a_checkpoint_of_other_learners_is_not_taken_for_that_of_ones_own(tmp_path):
    """A job dealt out otherwise, which had come no further than the first process's first step."""
    learners, said = [STUDY.learners[2], replace(STUDY.learners[2], seed=8)], []
    study = Study([], learners, TO_SCORE[2:3] * 2)

    class Stop(Silent):
        def __call__(self, done, total, text):
            said.append(text)
            if said.count(text) and len(said) == 2:
                raise KeyboardInterrupt

    def trained(folder, process, mine, progress):
        shares = [Share([[mine]], [3]), Share([[1 - mine]], [3])]
        with open_run(tmp_path / folder, {}, 0, 2) as run:
            config = Config(checkpoint_seconds=0)
            return train_study(
                config, ToyCorpus(), study, lambda _: toy_model(), run, progress, Lone(process, 2), [Stage(False, shares)]
            )

    alone = trained("alone", 0, 1, Silent())
    with pytest.raises(KeyboardInterrupt):
        trained("run", 0, 0, Stop())
    assert (tmp_path / "run" / "checkpoint-0-of-2.safetensors").exists()
    assert trained("run", 0, 1, Silent()).scores[1] == alone.scores[1] != {}


def test_what_another_process_finished_is_read_while_it_writes_the_next_checkpoint(tmp_path, monkeypatch):
    """Tensors are read from a file that is opened again by its name, which may be another one by then."""
    study = Study([], [STUDY.learners[2], replace(STUDY.learners[2], seed=8)], TO_SCORE[2:3] * 2)

    def trained(process):
        with open_run(tmp_path / "run", {}, process, 2) as run:
            plan = [Stage(False, [Share([[0]], [3]), Share([[1]], [3])])]
            of_both = Config(checkpoint_seconds=0), ToyCorpus(), study, lambda _: toy_model(), run, Silent()
            return train_study(*of_both, Lone(process, 2), plan)

    theirs, opened = trained(1), torch.UntypedStorage.from_file

    def replaced(file, *arguments, **more):
        assert "checkpoint-1-of-2" not in str(file)
        return opened(file, *arguments, **more)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", replaced)
    assert trained(0).scores[1] == theirs.scores[1] != {}


TOGETHER = """
import sys
from jobs import ends, start
from kloss.errors import UserError
from kloss.processes import ProcessLost, started

def differs():
    with started() as processes:
        processes.check_same({"the corpus": 1})
        try:
            processes.check_same({"the corpus": 1, "the backbone": "ab" if processes.rank == 1 else "cd"})
        except UserError as error:
            print(f"{processes.rank} {error}\\n", end="", flush=True)  # in one write
        except ProcessLost:
            print(f"{processes.rank} lost\\n", end="", flush=True)
    return 0

def dies():
    with started() as processes:
        processes.wait()
        if processes.rank == 0:
            return 5
        try:
            with processes.first():
                print("never", flush=True)
        except ProcessLost:
            return 6

print(ends(start(3, differs)))
print(ends(start(2, dies))[0])
"""


def test_processes_that_differ_or_end_are_noticed():
    done = python("-c", TOGETHER)
    assert done.returncode == 0, done.stderr
    differing = "1 the backbone is ab in process 1 and cd in process 0"
    assert sorted(done.stdout.splitlines()) == ["0 lost", differing, "2 lost", "5", "[0, 0, 0]"]


def test_each_process_of_a_machine_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_gpu() == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this machine has no GPU of its own: there are 2"):
        own_gpu()


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Runs the command by torchrun: how many processes, run folder, further arguments -> what became of it."""
    folder = tmp_path_factory.mktemp("jobs")

    def run(number, out, *arguments):
        started = ["-m", "torch.distributed.run", "--nproc-per-node", str(number)] if number else []
        command = [*SMALL, "--cache", str(folder / "cache"), "--out", str(folder / out), "--exact", *arguments]
        return python(*started, "-m", "kloss.run", *command), folder / out

    return run


def test_the_command_by_torchrun(jobs):
    flags = [
        "--strategies",
        "non-shared",
        "shared",
        "vanilla",
        "--experiments",
        "pairs",
        "where",
        "methods",
        "tokenizer",
        "parts",
    ]
    flags += ["--shared-parts", "*.a"]
    alone, expected = jobs(0, "alone", *flags)
    together, folder = jobs(2, "together", *flags)
    assert alone.returncode == together.returncode == 0, together.stderr
    assert (folder / "scores.json").read_bytes() == (expected / "scores.json").read_bytes()
    assert together.stdout.count("report: ") == 1 and "process 1" not in together.stdout
    assert json.loads((folder / "env.json").read_text())["processes"] == 2
    lines = [line for name in ("log.jsonl", "log-1.jsonl") for line in (folder / name).read_text().splitlines()]
    phases = {json.loads(line)["phase"] for line in lines}
    assert len(phases) > 6 and any(phase.startswith("process 1, ") for phase in phases)
    assert all(phase in (folder / "report.html").read_text() for phase in phases)
    again, _ = jobs(0, "together", *flags)
    assert "complete already" in again.stdout


def test_a_users_mistake_is_one_line_of_a_job(jobs):
    done, folder = jobs(2, "mistake", "--languages", "en-US", "xx-YY")
    lines = [line for line in done.stderr.splitlines() if line.startswith("kloss:")]
    assert done.returncode and len(lines) == 1 and "xx-YY" in lines[0] and not folder.exists()


def test_a_log_of_ten_days_stays_small(monkeypatch):
    """A line a second at first; ten days would be 864,000 of them."""
    seconds, lines = iter(range(10 * 86_400)), []
    monkeypatch.setattr(runner.time, "monotonic", lambda: float(next(seconds)))
    cohort = SimpleNamespace(learners=[STUDY.learners[0]], failed={}, streams=[], tokens=0, steps=torch.zeros(1))
    cohort.total_tokens, cohort.f1_when_learned = lambda: 10, lambda: 0.25
    folder = SimpleNamespace(process=2, log=lambda **entry: lines.append(entry))
    shown = []
    watch = runner._Watch(cohort, 0, {}, folder, math.inf, lambda *what: shown.append(what), lambda: shown.append("looked"))
    with contextlib.suppress(RuntimeError, StopIteration):
        while True:
            watch(cohort, 0.5)
    assert 1000 < len(lines) < 9000 and shown.count("looked") == len(lines)
    assert lines[-1] | {"tokens_per_second": 0} == {
        "phase": f"process 2, cohort 1: {STUDY.learners[0].name}", "step": 0, "tokens": 0, "total": 10, "learners": 0,
        "loss": 0.5, "f1": 0.25, "tokens_per_second": 0,
    }  # fmt: skip
    assert shown[-2][2].endswith("0 training, loss 0.500, F1 0.25 when learned, 0 tokens/s")


def test_f1_when_learned_is_of_what_was_learned_last():
    cohort = Cohort(toy_model(), ToyCorpus(), STUDY.learners[:3:2], TO_SCORE[:2])
    assert cohort.f1_when_learned() is None
    cohort.scores = [{0: {"aa": [0, 0, 9]}, 1: {"aa": [9, 9, 9]}, 2: {"aa": [0, 9, 9], "bb": [3, 6, 6]}}, {0: {"aa": [0, 0, 1]}}]
    assert cohort.f1_when_learned() == pytest.approx(0.5)
    cohort.scores[1][1] = {"aa": [4, 4, 4]}
    assert cohort.f1_when_learned() == pytest.approx(0.75)


def test_the_last_entry_of_another_process(tmp_path):
    with open_run(tmp_path, {}, 0, 2) as run:
        assert run.last_entry(1) is None
        log = tmp_path / "log-1.jsonl"
        log.write_text('{"tok')
        assert run.last_entry(1) is None
        log.write_text('{"tokens": 1}\n' * 1000 + '{"tokens": 2}\n{"tok')
        assert run.last_entry(1) == {"tokens": 2}


def test_a_terminal_has_a_bar_for_each_process():
    console = Console()
    console.out = rich.console.Console(force_terminal=True, width=120, file=io.StringIO(), record=True)
    with console.progress() as progress:
        progress(5, 10, "cohort 1: 4 learners, 4 training")
        progress.beside(1, 3, 12, "process 1, cohort 1: 5 learners, 2 training")
        progress.beside(1, 6, 12, "process 1, cohort 2: 5 learners, 1 training")
        tasks = [(task.description, task.completed, task.total) for task in progress.progress.tasks]
    assert tasks == [("cohort 1: 4 learners, 4 training", 5, 10), ("process 1, cohort 2: 5 learners, 1 training", 6, 12)]
