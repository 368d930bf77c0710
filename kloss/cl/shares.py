"""Which process trains which learners, in which cohorts. It follows from the study alone, so each process knows it of all."""

from collections.abc import Sequence
from typing import NamedTuple

from .learner import Learner
from .study import Study


class Stage(NamedTuple):
    """Learners that may train at the same time.

    forks: whether they begin with states of an earlier stage, which all processes have to have ended.
    rank: the largest of their ranks; None: they train whole models.
    cohorts: of each process, in the order in which it trains them.
    """

    forks: bool
    rank: int | None
    cohorts: list[list[list[int]]]


def depth(learner: Learner) -> int:
    """How many learners lie before a fork; 0 for one that begins anew."""
    return 0 if learner.start is None else 1 + depth(learner.start[0])


def stages(study: Study, max_learners: int, tokens: Sequence[int] = (), processes: int = 1) -> list[Stage]:
    """The learners of each stage: LoRA learners by depth, then whole models.

    max_learners: of LoRA learners in a cohort; 0: no limit. Whole models are cohorts of their own.
    tokens: of each learner, by which they are dealt out; not needed for one process.
    """
    lora: dict[int, list[int]] = {}
    for g, learner in enumerate(study.learners):
        if learner.rank is not None:
            lora.setdefault(depth(learner), []).append(g)
    whole = [g for g, learner in enumerate(study.learners) if learner.rank is None]
    found, loads = [], [0] * processes
    for level, members in sorted(lora.items()):
        if level > 0:
            loads = [0] * processes  # they waited for each other
        shares = _dealt(members, tokens, loads)
        rank = max(study.learners[g].rank or 0 for g in members)
        found.append(Stage(level > 0, rank, [_cut(share, max_learners or len(members)) for share in shares]))
    if whole:
        found.append(Stage(False, None, [_cut(share, 1) for share in _dealt(whole, tokens, loads)]))
    return found


def cohorts_of(study: Study, max_learners: int) -> list[list[int]]:
    """The learners of each cohort of a single process."""
    return [cohort for stage in stages(study, max_learners) for cohort in stage.cohorts[0]]


def _dealt(members: Sequence[int], tokens: Sequence[int], loads: list[int]) -> list[list[int]]:
    """Deal learners out to as many as have loads, which grow: the longest first, each to who has the least."""
    shares: list[list[int]] = [[] for _ in loads]
    if len(loads) == 1:
        return [list(members)]
    for g in sorted(members, key=lambda g: (-tokens[g], g)):
        least = loads.index(min(loads))
        shares[least].append(g)
        loads[least] += tokens[g]
    return [sorted(share) for share in shares]


def _cut(members: Sequence[int], size: int) -> list[list[int]]:
    return [list(members[i : i + size]) for i in range(0, len(members), size)]
