"""Train all learners of a study, cohort after cohort, with checkpoints that a stopped run continues from."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from ..config import Config
from ..errors import UserError
from ..models import AdapterBank, XLMRForTokenClassification
from ..processes import ALONE, Processes
from .boards import AfterStep, boards
from .corpus import Corpus
from .evaluate import score_probes
from .learner import Learner, Scores, folder_name
from .probes import Counts, State
from .progress import Record
from .resume import Saved, checked_share, keep_furthest, probes_of, records, score_every
from .rundir import RunFolder
from .shares import Stage, alone, share_of
from .states import KeptRow, States
from .study import Study
from .train import Cohort

THIN = 1000  # a log grows by a line a second at first, and in the end by a thousandth of the time that it has taken


class Progress(Protocol):
    """A progress display: work done, total (0: unknown), description; and one-off messages."""

    def __call__(self, done: int, total: int, text: str) -> None: ...

    def say(self, text: str) -> None: ...

    def beside(self, process: int, done: int, total: int, text: str) -> None:
        """Work of another process; shown only where there are several."""


class Outcome(NamedTuple):
    """Results, by learner if not said otherwise."""

    scores: list[Scores]
    curves: list[Scores]  # within experiences, by step
    failed: list[str | None]  # why training ended early; None: it did not
    weights: list[int]  # number of weights trained
    probed: list[Counts]  # of each of the study's probes
    slots: list[Scores]  # three counts of each slot type, end to end; empty unless they are kept


def train_study(
    config: Config,
    corpus: Corpus,
    study: Study,
    load: Callable[[Corpus], XLMRForTokenClassification],
    folder: RunFolder,
    progress: Progress,
    processes: Processes = ALONE,
    plan: Sequence[Stage] | None = None,
) -> Outcome:
    """Train and score every learner, or this process's share of them, continuing from the folder's checkpoints.

    load: returns a fresh backbone for the corpus under one of its tokenizers.
    plan: which process trains what; None: that of one process, whose cohorts only the configuration limits.
    Returns the outcome of all learners, and raises ProcessLost if another process cannot do its share.
    """
    plan = alone(config, study) if plan is None else plan
    job = _Job(config, corpus, study, load, folder, progress, processes, plan)
    number = 0
    for stage in plan:
        if stage.forks:
            job.gather()
        for members in stage.shares[processes.rank].cohorts:
            job.train(number, members)
            number += 1
    if processes.number > 1:
        job.gather()
    if study.probes:
        job.probe()
    return job.outcome


class _Job:
    """One process's share of a study. outcome: of those learners of which it knows, which after `gather` are all so far."""

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        study: Study,
        load: Callable[[Corpus], XLMRForTokenClassification],
        folder: RunFolder,
        progress: Progress,
        processes: Processes,
        plan: Sequence[Stage],
    ):
        self.config, self.corpus, self.study, self.load = config, corpus, study, load
        self.folder, self.progress, self.processes = folder, progress, processes
        self.states = States(folder.path / "states", progress.say)
        self.kept, self.starts, self.every = study.kept(), study.starts(), score_every(config, study)
        self.shares = [share_of(plan, process) for process in range(processes.number)]
        self.share = self.shares[processes.rank]
        self.saved = self._read(processes.rank, processes.number)
        if self.saved is not None and not self.saved.checkpoint.verified:
            progress.say(f"the checkpoint in {folder.path} has no digest (earlier versions wrote none); it is used as it is")
        size = len(study.learners)
        self.looked = 0.0
        self.outcome = Outcome(
            [{} for _ in range(size)], [{} for _ in range(size)], [None] * size, [0] * size, [], [{} for _ in range(size)]
        )
        self.known = self._known()
        processes.wait()  # all have read what the first step of one may replace
        if self.saved is not None and self.saved.share != self.share:
            self.saved = None  # what it says of this process's learners is known
        self.finished = {} if self.saved is None else self.saved.checkpoint.state["finished"]

    def _read(self, process: int, processes: int, *, whole: bool = True) -> Saved | None:
        """A process's checkpoint. whole: with its tensors. Raises UserError if it cannot be of the study."""
        saved = self.folder.load_checkpoint((process, processes), whole=whole)
        if saved is None:
            return None
        with self.folder.reading_checkpoint((process, processes)):
            planned = share_of(alone(self.config, self.study), 0)
            probes = len(probes_of(self.study, process, processes))
            return Saved(saved, checked_share(saved.state, self.config, self.corpus, self.study, planned, probes))

    def _known(self) -> dict[int, Record]:
        """How far this process's learners are, if a checkpoint is of another job, in which they were dealt out otherwise."""
        number = self.processes.number
        shares = {(process, number): share for process, share in enumerate(self.shares)}
        found = {of: self._read(*of, whole=False) for of in self.folder.checkpoints()}
        others = [of for of, saved in found.items() if saved is not None and saved.share != shares.get(of)]
        if others and self.saved is not None and (self.processes.rank, number) not in others:
            others.append((self.processes.rank, number))
        known: dict[int, Record] = {}
        for of in others:
            saved = self._read(*of)
            with self.folder.reading_checkpoint(of):
                if saved is None or not saved.checkpoint.verified:
                    raise UserError("it has no digest, and can be continued only as the job that wrote it")
                keep_furthest(known, records(saved), {g for members in self.share.cohorts for g in members})
        return known

    def train(self, number: int, members: list[int]) -> None:
        """Train a cohort to its end, from where it is."""
        if str(number) not in self.finished:
            cohort = self._cohort(number, members)
            seconds = self.config.checkpoint_seconds
            watch = _Watch(cohort, number, self._state(), self.folder, seconds, self.progress, self._look)
            with on_signals(watch.stop), self._boards(cohort, members, watch) as after_step:
                cohort.train(after_step)
                weights = [cohort.bank.trainable(i, learner.trains) for i, learner in enumerate(cohort.learners)]
                if self.config.save_adapters:
                    self._save_adapters(cohort, members)
                self.finished[str(number)] = cohort.state()[1] | {"weights": weights}
                self.folder.save_checkpoint({}, self._state())
            if watch.signal:  # during the last step
                raise KeyboardInterrupt(watch.signal)
        self._enter(members, self.finished[str(number)])

    def _cohort(self, number: int, members: list[int]) -> Cohort:
        study, config = self.study, self.config
        own = self.corpus.under(study.learners[members[0]].tokenizer)
        cohort = Cohort(
            self.load(own),
            own,
            [study.learners[g] for g in members],
            [study.to_score[g] for g in members],
            pass_tokens=config.pass_tokens,
            exact=config.exact,
            rank=self.share.ranks[number],
            partition=config.eval_split,
            to_keep=[self.kept[g] for g in members],
            keep=partial(self._keep, members),
            score_every=[self.every[g] for g in members],
            slot_counts=config.slot_counts,
        )
        for i, g in enumerate(members):
            if any(self.outcome.failed[state.learner] for state in self.starts.get(g, ())):
                cohort.failed[i] = "was not begun: the learner that it begins with diverged"
            elif g in self.starts:
                cohort.begin(i, [self.states.load(state) for state in self.starts[g]])
        if self.known:
            cohort.resume({i: self.known[g] for i, g in enumerate(members) if g in self.known})
        elif self.saved is not None and self.saved.checkpoint.state["cohort"] == number:
            saved = self.saved.checkpoint
            with self.folder.reading_checkpoint():
                cohort.load_state(saved.tensors, saved.state.get("state"), finite=not saved.verified)
        return cohort

    def _keep(self, members: Sequence[int], state: State, row: KeptRow) -> None:
        """Keep a state of a cohort, whose learners are `members` of the study."""
        self.folder.check()
        self.states.keep(State(members[state.learner], state.experience), row)

    def _boards(self, cohort: Cohort, members: Sequence[int], watch: AfterStep) -> AbstractContextManager[AfterStep]:
        folder = self.folder.path / "tensorboard"
        return boards(folder, members, cohort, watch) if self.config.tensorboard else nullcontext(watch)

    def _state(self) -> dict:
        """What a checkpoint says of this process but for a cohort in training."""
        return {"share": self.share._asdict(), "finished": self.finished, "cohort": None}

    def _enter(self, members: Sequence[int], result: dict) -> None:
        """Put the results of a cohort into the outcome."""
        outcome = self.outcome
        for i, g in enumerate(members):
            for name, tables in (("scores", outcome.scores), ("curves", outcome.curves), ("slots", outcome.slots)):
                if name in result:
                    tables[g] = {int(at): row for at, row in result[name][i].items()}
            outcome.failed[g] = result["failed"].get(str(i))
            outcome.weights[g] = result["weights"][i]

    def _save_adapters(self, cohort: Cohort, members: Sequence[int]) -> None:
        """Write a cohort's adapters as peft does; none of learners that diverged, or that another job brought to their end."""
        if isinstance(cohort.bank, AdapterBank):
            for i, g in enumerate(members):
                if i not in cohort.failed and (g not in self.known or self.known[g].row):
                    self.folder.check()
                    cohort.bank.save_peft(_adapter_of(self.folder, g, cohort.learners[i]), i)

    def _look(self) -> None:
        """In process 0: show how far the others are, about once a second."""
        now = time.monotonic()
        if self.processes.rank > 0 or now - self.looked < 1:
            return
        self.looked = now
        for process in range(1, self.processes.number):
            entry = self.folder.last_entry(process)
            if entry is not None:
                text = f"{entry['phase']}, {entry['learners']} training, loss {entry['loss'] or math.nan:.3f}"
                self.progress.beside(process, entry["tokens"], entry["total"], f"{text}, {entry['tokens_per_second']:,} tokens/s")

    def gather(self) -> None:
        """Wait until all processes come here, and take over what the others have finished."""
        self.processes.wait(self._look)
        for process in range(self.processes.number):
            saved = None if process == self.processes.rank else self._read(process, self.processes.number, whole=False)
            if saved is not None:
                for number, result in saved.checkpoint.state["finished"].items():
                    self._enter(saved.share.cohorts[int(number)], result)

    def probe(self) -> None:
        """Score the probes, each process some."""
        rank, number = self.processes.rank, self.processes.number
        own = [self.study.probes[i][1] for i in probes_of(self.study, rank, number)]
        probed = [] if self.saved is None else self.saved.checkpoint.state.get("probed", [])

        def after_some(done: list[Counts]) -> None:
            self.progress(len(done), len(own), f"probes: {len(done)} of {len(own)}")
            self.folder.save_checkpoint({}, self._state() | {"probed": done})

        rest = self.states, self.outcome.failed, self.config, probed, after_some
        done = score_probes(own, self.study.learners, self.load(self.corpus), self.corpus, *rest)
        self.processes.wait(self._look)
        for process in range(number):
            saved = None if process == rank else self._read(process, number, whole=False)
            self.outcome.probed.extend(done if saved is None else saved.checkpoint.state.get("probed", []))


def _adapter_of(folder: RunFolder, g: int, learner: Learner) -> Path:
    """Where learner g of a study is written as peft does."""
    return folder.path / "adapters" / folder_name(g, learner)


def unsaved(folder: RunFolder, study: Study) -> list[str]:
    """A line if, behind a run with `--save-adapters`, learners of LoRA have no adapter in the folder."""
    own = [(g, learner) for g, learner in enumerate(study.learners) if learner.rank is not None and learner.method == "lora"]
    number = sum(not _adapter_of(folder, g, learner).exists() for g, learner in own)
    line = (
        f"--save-adapters: {number} of {len(own)} learners of LoRA are not in {folder.path / 'adapters'}: "
        "they had ended before it was given, or diverged"
    )
    return [line] if number else []


@contextmanager
def on_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Call `handler` with the number of each SIGINT, SIGTERM and SIGHUP while the block runs; ignored ones (nohup) stay so."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, lambda number, frame: handler(number))
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class _Watch:
    """Called after every step: updates the progress display, writes the log and, at intervals, a checkpoint.

    look: called when the log is written.
    """

    def __init__(
        self,
        cohort: Cohort,
        number: int,
        state: dict,
        folder: RunFolder,
        interval: float,
        progress: Progress,
        look: Callable[[], None] = lambda: None,
    ):
        self.state, self.folder = state | {"cohort": number}, folder
        self.interval, self.progress, self.look = interval, progress, look
        self.total, self.reported = cohort.total_tokens(), set(cohort.failed)
        size = len(cohort.learners)
        self.name = f"cohort {number + 1}: {cohort.learners[0].name if size == 1 else f'{size} learners'}"
        self.phase = self.name if folder.process == 0 else f"process {folder.process}, {self.name}"
        self.began = self.saved = self.logged = time.monotonic()
        self.tokens, self.first, self.pace = cohort.tokens, True, ""
        self.unsaved, self.signal = False, 0

    def stop(self, number: int) -> None:
        """Note a signal, for after the step. Raises KeyboardInterrupt if there is nothing to save, or for a second signal."""
        if self.signal or not self.unsaved:
            raise KeyboardInterrupt(number)
        self.signal = number

    def __call__(self, cohort: Cohort, loss: float) -> None:
        now = time.monotonic()
        active = sum(not stream.finished and g not in cohort.failed for g, stream in enumerate(cohort.streams))
        self.progress(cohort.tokens, self.total, f"{self.name}, {active} training, loss {loss:.3f}{self.pace}")
        for g in sorted(cohort.failed.keys() - self.reported):
            self.reported.add(g)
            self.progress.say(f"{cohort.learners[g].name} {cohort.failed[g]}; it is stopped, the others go on")
        if self.first or now - self.logged > max(1.0, (now - self.began) / THIN):
            speed, f1 = (cohort.tokens - self.tokens) / max(now - self.logged, 1e-9), cohort.f1_when_learned()
            text = "" if f1 is None else f", F1 {f1:.2f} when learned"
            self.pace = text + ("" if self.first else f", {speed:,.0f} tokens/s")
            self.folder.log(
                phase=self.phase,
                step=int(cohort.steps.max()),
                tokens=cohort.tokens,
                total=self.total,
                learners=active,
                loss=round(loss, 5) if loss == loss else None,
                f1=None if f1 is None else round(f1, 4),
                tokens_per_second=round(speed),
            )
            self.logged, self.tokens, self.first = now, cohort.tokens, False
            self.look()
        self.unsaved = True
        if self.signal or now - self.saved > self.interval:
            tensors, state = cohort.state()
            self.folder.save_checkpoint(tensors, self.state | {"state": state})
            self.saved, self.unsaved = time.monotonic(), False
            if self.signal:
                raise KeyboardInterrupt(self.signal)
