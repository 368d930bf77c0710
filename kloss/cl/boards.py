"""TensorBoard's files of a run: each learner's loss and F1, by its own steps."""

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from .learner import folder_name
from .spans import f1_from_counts
from .train import Cohort

AfterStep = Callable[[Cohort, float], None]
SECONDS = 1.0  # between two losses of a learner


def writer() -> Callable[..., Any]:
    """Return torch's SummaryWriter. Raises UserError without the package tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs the package tensorboard: pip install tensorboard") from error
    return SummaryWriter


@contextmanager
def boards(folder: Path, members: Sequence[int], cohort: Cohort, after_step: AfterStep) -> Iterator[AfterStep]:
    """Give a function for `Cohort.train` that writes into `folder`, a TensorBoard run for each learner, then calls `after_step`.

    members: the learners' numbers in the study. What a stopped run wrote behind its last checkpoint is dropped: it comes again.
    Raises UserError where the file system refuses.
    """
    names = [folder_name(g, learner) for g, learner in zip(members, cohort.learners, strict=True)]
    made: list[Any] = []
    written = [_scored(cohort, g).keys() for g in range(len(names))]
    tables, last = _tables(cohort), -SECONDS

    @_writing(folder)
    def add(board: Any, tag: str, value: float, step: int) -> None:
        board.add_scalar(tag, value, step)

    @_writing(folder)
    def close(board: Any) -> None:
        board.close()

    def write(cohort: Cohort, loss: float) -> None:
        nonlocal last, tables
        now, before = time.monotonic(), tables
        tables = _tables(cohort)
        due = now - last >= SECONDS
        steps = cohort.steps.tolist() if due or tables != before else []  # which waits for a GPU
        for g, board in enumerate(made if steps else ()):
            if due and g in cohort.losses:
                add(board, "loss", cohort.losses[g], steps[g])
            scored = _scored(cohort, g)
            for experience, row in (scored[key] for key in scored.keys() - written[g]):
                for tag, locales in zip(("F1/being learned", "F1/learned before"), _parted(cohort, g, experience), strict=True):
                    counts = [row[locale] for locale in locales if locale in row]
                    if counts:
                        add(board, tag, float(f1_from_counts(counts).mean()), steps[g])
            written[g] = scored.keys()
        last = now if due else last
        after_step(cohort, loss)

    with _quiet_threads(), ExitStack() as stack:
        for name, step in zip(names, cohort.steps, strict=True):
            with _writing(folder):
                made.append(writer()(str(folder / name), purge_step=int(step) + 1))
            stack.callback(close, made[-1])
        yield write


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses, in the block, into a UserError; also as the decorator of a function."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """No traceback of threads to which the file system refused: TensorBoard's tell their writer, which then raises the same."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


def _tables(cohort: Cohort) -> int:
    """How many tables of scores there are."""
    return sum(map(len, cohort.scores)) + sum(map(len, cohort.curves))


def _scored(cohort: Cohort, g: int) -> dict[tuple[str, int], tuple[int, Mapping[str, list[int]]]]:
    """What was scored of a learner so far: experience, counted from 0, and counts by locale."""
    scored: dict[tuple[str, int], tuple[int, Mapping[str, list[int]]]] = {}
    scored |= {("end", i): (i - 1, row) for i, row in cohort.scores[g].items() if i > 0}
    return scored | {("step", step): (cohort.streams[g].experience, row) for step, row in cohort.curves[g].items()}


def _parted(cohort: Cohort, g: int, experience: int) -> tuple[Collection[str], Collection[str]]:
    """The locales of an experience of a learner, and those of the experiences before."""
    locales = [experience.locales for experience in cohort.learners[g].experiences]
    return locales[experience], {locale for before in locales[:experience] for locale in before} - {*locales[experience]}
