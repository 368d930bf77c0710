"""What the checkpoints of a run folder say of each learner, whichever processes, and however many, wrote them."""

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..config import Config
from ..errors import UserError
from ..models.rows import STATE
from .corpus import Corpus
from .progress import Record, check_progress
from .rundir import Checkpoint
from .shapes import check_shape
from .shares import Share
from .study import Study

CHECKPOINT = {
    "share?": {"cohorts": [[int]], "ranks": [(int, None)]},  # earlier versions did not say what was a process's share
    "finished": {str: {"weights": [int]}},
    "cohort": (int, None),
    "state?": dict,
    "probed?": [([int], None)],
}


class Saved(NamedTuple):
    """A checkpoint and the share that it is of."""

    checkpoint: Checkpoint
    share: Share


def score_every(config: Config, study: Study) -> list[int]:
    """For each learner, after how many steps it is scored besides: those of score matrices, none of experiments'."""
    shown = {g for trial in study.trials for g in trial.learners}
    return [config.score_every if g in shown else 0 for g in range(len(study.learners))]


def probes_of(study: Study, process: int, processes: int) -> range:
    """The probes that a process scores."""
    n = len(study.probes)
    return range(n * process // processes, n * (process + 1) // processes)


def checked_share(state: Any, config: Config, corpus: Corpus, study: Study, planned: Share, probes: int) -> Share:
    """Return the share of which a checkpoint's JSON is. Raises UserError if it cannot be of this study.

    planned: the share of a checkpoint that does not say it.
    """
    check_shape(state, CHECKPOINT)
    share = Share(**state["share"]) if "share" in state else planned
    if len(share.cohorts) != len(share.ranks) or not {g for c in share.cohorts for g in c} <= set(range(len(study.learners))):
        raise UserError(f"its share has learners other than the {len(study.learners)} of the study")
    probed = state.get("probed", [])
    if len(probed) > probes or any(count is not None and len(count) != 3 for count in probed):
        raise UserError(f"it has counts of {len(probed)} probes that cannot be those of {probes}")
    every = score_every(config, study)
    numbers = {str(number): members for number, members in enumerate(share.cohorts)}
    for number, result in state["finished"].items():
        if number not in numbers:
            raise UserError(f"it has a cohort {number}, of {len(numbers)}")
        members = numbers[number]
        learners, to_score = [study.learners[g] for g in members], [study.to_score[g] for g in members]
        check_progress(result, learners, corpus, to_score, [every[g] for g in members], config.slot_counts)
        for i, g in enumerate(members):
            if result["counters"][i][0] < len(study.learners[g].experiences) and str(i) not in result["failed"]:
                raise UserError(f"learner {i} of cohort {number} is not at its end")
        if len(result["weights"]) != len(members):
            raise UserError(f"it has {len(result['weights'])} numbers of weights for {len(members)} learners")
    if state["cohort"] is not None and not 0 <= state["cohort"] < len(share.cohorts):
        raise UserError(f"it is in cohort {state['cohort']}, of {len(share.cohorts)}")
    return share


def records(saved: Saved) -> Iterator[tuple[int, Record]]:
    """Each learner that a checkpoint tells of."""
    (tensors, state, _), share = saved
    for number, result in state["finished"].items():
        for i, g in enumerate(share.cohorts[int(number)]):
            yield g, _record(result, i, {}, None)
    number = state["cohort"]
    if number is not None:
        for i, g in enumerate(share.cohorts[number]):
            rows = {name: tensors[name][i] for name in STATE}
            end = f" of {i}"  # what rules have noted
            rows |= {name.removesuffix(end): tensor for name, tensor in tensors.items() if name.endswith(end)}
            yield g, _record(state["state"], i, rows, share.ranks[number])


def _record(result: Mapping[str, Any], i: int, row: dict[str, Tensor], rank: int | None) -> Record:
    curves, slots = (result[name][i] if name in result else {} for name in ("curves", "slots"))
    weights = None if row else result["weights"][i]
    return Record(result["counters"][i], result["scores"][i], curves, result["failed"].get(str(i)), weights, row, rank, slots)


def keep_furthest(known: dict[int, Record], found: Iterable[tuple[int, Record]], of: Container[int]) -> None:
    """Put into `known`, for each of these learners, what is found and further. Rows are copied: they come from large tensors."""
    for g, record in found:
        if g in of and (g not in known or record.progress > known[g].progress):
            known[g] = record._replace(row={name: tensor.clone() for name, tensor in record.row.items()})
