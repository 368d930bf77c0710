"""Train all learners of a study, cohort after cohort, with checkpoints that a stopped run continues from."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

from ..config import Config
from ..errors import UserError
from ..models import AdapterBank, XLMRForTokenClassification
from .corpus import Corpus
from .evaluate import score_probes
from .learner import Learner, Scores
from .probes import Counts, State
from .progress import check_progress
from .rundir import RunFolder
from .shapes import check_shape
from .states import KeptRow
from .study import Study
from .train import Cohort


class Progress(Protocol):
    """A progress display: work done, total (0: unknown), description; and one-off messages."""

    def __call__(self, done: int, total: int, text: str) -> None: ...

    def say(self, text: str) -> None: ...


class Outcome(NamedTuple):
    """Results, by learner if not said otherwise."""

    scores: list[Scores]
    curves: list[Scores]  # within experiences, by step
    failed: list[str | None]  # why training ended early; None: it did not
    weights: list[int]  # number of weights trained
    probed: list[Counts]  # of each of the study's probes


def depth(learner: Learner) -> int:
    """How many learners lie before a fork; 0 for one that begins anew."""
    return 0 if learner.start is None else 1 + depth(learner.start[0])


def cohorts_of(study: Study, max_learners: int) -> list[list[int]]:
    """The learners of each cohort: at most `max_learners` LoRA learners (0: no limit), then whole models one by one.

    A fork is in a later cohort than the learner that it begins with. A cohort has one tokenizer, for it has one backbone.
    Experiments' learners with a rank above the study's are apart, for a bank is as wide as its largest rank.
    """
    widest = max((trial.rank or 0 for trial in study.trials), default=0)
    kinds: dict[tuple[int, str, bool], list[int]] = {}
    for g, learner in enumerate(study.learners):
        if learner.rank is not None:
            kinds.setdefault((depth(learner), learner.tokenizer, learner.rank > widest), []).append(g)
    cohorts = []
    for _, lora in sorted(kinds.items()):
        size = max_learners or len(lora)
        cohorts += [lora[i : i + size] for i in range(0, len(lora), size)]
    return cohorts + [[g] for g, learner in enumerate(study.learners) if learner.rank is None]


def score_every(config: Config, study: Study) -> list[int]:
    """For each learner, after how many steps it is scored besides: those of score matrices, none of experiments'."""
    shown = {g for trial in study.trials for g in trial.learners}
    return [config.score_every if g in shown else 0 for g in range(len(study.learners))]


def train_study(
    config: Config,
    corpus: Corpus,
    study: Study,
    load: Callable[[Corpus], XLMRForTokenClassification],
    folder: RunFolder,
    progress: Progress,
) -> Outcome:
    """Train and score every learner, continuing from the folder's checkpoint if it has one.

    load: returns a fresh backbone for the corpus under one of its tokenizers.
    """
    saved, cohorts = folder.load_checkpoint(), cohorts_of(study, config.max_learners)
    if saved is not None:
        with folder.reading_checkpoint():
            _check(saved.state, config, corpus, study, cohorts)
        if not saved.verified:
            progress.say(f"the checkpoint in {folder.path} has no digest (earlier versions wrote none); it is used as it is")
    finished = {} if saved is None else saved.state["finished"]
    kept, starts, every = study.kept(), study.starts(), score_every(config, study)
    outcome = Outcome(
        [{} for _ in study.learners], [{} for _ in study.learners], [None] * len(study.learners), [0] * len(study.learners), []
    )
    for number, members in enumerate(cohorts):
        if str(number) not in finished:
            learners, to_score = [study.learners[g] for g in members], [study.to_score[g] for g in members]
            own = corpus.under(learners[0].tokenizer)
            cohort = Cohort(
                load(own),
                own,
                learners,
                to_score,
                pass_tokens=config.pass_tokens,
                exact=config.exact,
                partition=config.eval_split,
                to_keep=[kept[g] for g in members],
                keep=partial(_keep, folder, members),
                score_every=[every[g] for g in members],
            )
            for i, g in enumerate(members):
                if g in starts and outcome.failed[starts[g].learner]:
                    cohort.failed[i] = "was not begun: the learner that it begins with diverged"
                elif g in starts:
                    cohort.begin(i, folder.states.load(starts[g]))
            if saved is not None and saved.state["cohort"] == number:
                with folder.reading_checkpoint():
                    cohort.load_state(saved.tensors, saved.state.get("state"), finite=not saved.verified)
            watch = _Watch(cohort, number, finished, folder, config.checkpoint_seconds, progress)
            with on_signals(watch.stop):
                cohort.train(watch)
                weights = [cohort.bank.trainable(i, learner.trains) for i, learner in enumerate(learners)]
                if config.save_adapters:
                    _save_adapters(cohort, members, folder)
                finished[str(number)] = cohort.state()[1] | {"weights": weights}
                folder.save_checkpoint({}, {"finished": finished, "cohort": None})
            if watch.signal:  # during the last step
                raise KeyboardInterrupt(watch.signal)
        result = finished[str(number)]
        for i, g in enumerate(members):
            outcome.scores[g] = {int(experience): row for experience, row in result["scores"][i].items()}
            if "curves" in result:
                outcome.curves[g] = {int(step): row for step, row in result["curves"][i].items()}
            outcome.failed[g] = result["failed"].get(str(i))
            outcome.weights[g] = result["weights"][i]
    if study.probes:
        done = [] if saved is None else saved.state.get("probed", [])
        outcome.probed[:] = _probe(config, corpus, study, load, folder, progress, outcome, finished, done)
    return outcome


def _keep(folder: RunFolder, members: Sequence[int], state: State, row: KeptRow) -> None:
    """Keep a state of a cohort, whose learners are `members` of the study."""
    folder.check()
    folder.states.keep(State(members[state.learner], state.experience), row)


def _save_adapters(cohort: Cohort, members: Sequence[int], folder: RunFolder) -> None:
    """Write the adapters of a cohort, whose learners are `members` of the study, as peft does; none of those that diverged."""
    if isinstance(cohort.bank, AdapterBank):
        for i, g in enumerate(members):
            if i not in cohort.failed:
                folder.check()
                name = re.sub(r"[^\w.=]+", "-", f"{g} {cohort.learners[i].name}")
                cohort.bank.save_peft(folder.path / "adapters" / name, i)


def _probe(
    config: Config,
    corpus: Corpus,
    study: Study,
    load: Callable[[Corpus], XLMRForTokenClassification],
    folder: RunFolder,
    progress: Progress,
    outcome: Outcome,
    finished: dict,
    done: list[Counts],
) -> list[Counts]:
    """Score the probes that are not `done`."""
    probes = [probe for _, probe in study.probes]

    def after_some(done: list[Counts]) -> None:
        progress(len(done), len(probes), f"probes: {len(done)} of {len(probes)}")
        folder.save_checkpoint({}, {"finished": finished, "cohort": None, "probed": done})

    rest = folder.states, outcome.failed, config, done, after_some
    return score_probes(probes, study.learners, load(corpus), corpus, *rest)


STATE = {"finished": {str: {"weights": [int]}}, "cohort": (int, None), "state?": dict, "probed?": [([int], None)]}


def _check(state: Any, config: Config, corpus: Corpus, study: Study, cohorts: list[list[int]]) -> None:
    """Check that a checkpoint's JSON can be of this study. Raises UserError if it cannot."""
    check_shape(state, STATE)
    probed = state.get("probed", [])
    if len(probed) > len(study.probes) or any(count is not None and len(count) != 3 for count in probed):
        raise UserError(f"it has counts of {len(probed)} probes that cannot be those of {len(study.probes)}")
    every = score_every(config, study)
    numbers = {str(number): members for number, members in enumerate(cohorts)}
    for number, result in state["finished"].items():
        if number not in numbers:
            raise UserError(f"it has a cohort {number}, of {len(cohorts)}")
        members = numbers[number]
        learners, to_score = [study.learners[g] for g in members], [study.to_score[g] for g in members]
        check_progress(result, learners, corpus, to_score, [every[g] for g in members])
        for i, g in enumerate(members):
            if result["counters"][i][0] < len(study.learners[g].experiences) and str(i) not in result["failed"]:
                raise UserError(f"learner {i} of cohort {number} is not at its end")
        if len(result["weights"]) != len(members):
            raise UserError(f"it has {len(result['weights'])} numbers of weights for {len(members)} learners")


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
    """Called after every step: updates the progress display, writes the log and, at intervals, a checkpoint."""

    def __init__(self, cohort: Cohort, number: int, finished: dict, folder: RunFolder, interval: float, progress: Progress):
        self.number, self.finished, self.folder = number, finished, folder
        self.interval, self.progress = interval, progress
        self.total, self.reported = cohort.total_tokens(), set(cohort.failed)
        size = len(cohort.learners)
        self.name = f"cohort {number + 1}: {cohort.learners[0].name if size == 1 else f'{size} learners'}"
        self.saved = self.logged = time.monotonic()
        self.tokens, self.first = cohort.tokens, True
        self.unsaved, self.signal = False, 0

    def stop(self, number: int) -> None:
        """Note a signal, for after the step. Raises KeyboardInterrupt if there is nothing to save, or for a second signal."""
        if self.signal or not self.unsaved:
            raise KeyboardInterrupt(number)
        self.signal = number

    def __call__(self, cohort: Cohort, loss: float) -> None:
        now = time.monotonic()
        active = sum(not stream.finished and g not in cohort.failed for g, stream in enumerate(cohort.streams))
        self.progress(cohort.tokens, self.total, f"{self.name}, {active} training, loss {loss:.3f}")
        for g in sorted(cohort.failed.keys() - self.reported):
            self.reported.add(g)
            self.progress.say(f"{cohort.learners[g].name} {cohort.failed[g]}; it is stopped, the others go on")
        if self.first or now - self.logged > 1:
            speed = (cohort.tokens - self.tokens) / max(now - self.logged, 1e-9)
            self.folder.log(
                phase=self.name,
                step=int(cohort.steps.max()),
                tokens=cohort.tokens,
                learners=active,
                loss=round(loss, 5) if loss == loss else None,
                tokens_per_second=round(speed),
            )
            self.logged, self.tokens, self.first = now, cohort.tokens, False
        self.unsaved = True
        if self.signal or now - self.saved > self.interval:
            tensors, state = cohort.state()
            self.folder.save_checkpoint(tensors, {"finished": self.finished, "cohort": self.number, "state": state})
            self.saved, self.unsaved = time.monotonic(), False
            if self.signal:
                raise KeyboardInterrupt(self.signal)
