"""Which process trains which learners, in which cohorts. All processes find the same plan, so each knows it of all."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from ..config import Config
from .corpus import Corpus
from .learner import Learner
from .stream import Stream
from .study import Study

MOST = 1 << 30
Kind = Callable[[int], tuple]  # of a learner, by its number
STEP_TOKENS = {"cuda": 2400, "cpu": 0}  # what a whole model's step costs beside its tokens, in tokens of packed adapters


class Share(NamedTuple):
    """What one process trains: cohorts of learners, one after another, and the rank of each one's bank; None: a whole model."""

    cohorts: list[list[int]]
    ranks: list[int | None]


class Stage(NamedTuple):
    """Learners that may train at the same time.

    forks: whether they begin with states of an earlier stage, which all processes have to have ended.
    shares: one of each process.
    """

    forks: bool
    shares: list[Share]


class Limits(NamedTuple):
    """How many adapters a cohort has.

    most: 0: as many as fit.
    fit: how many learners of this one's kind the memory holds, in a bank of this rank.
    exact: whether all banks of a stage have the largest rank of its learners, on which bits depend.
    """

    most: int = 0
    fit: Callable[[Learner, int], int] = lambda learner, rank: MOST
    exact: bool = False


def depth(learner: Learner) -> int:
    """How many learners lie before one that begins with others' states; 0 for one that begins anew."""
    return max((1 + depth(parent) for parent, _ in learner.parents), default=0)


def costs_of(study: Study, corpus: Corpus, device: str) -> list[float]:
    """What training each learner costs, in tokens of packed adapters. device: cuda or cpu."""
    streams = [Stream.of(corpus, learner) for learner in study.learners]
    extra = [STEP_TOKENS[device] if learner.rank is None else 0 for learner in study.learners]
    return [stream.tokens() + more * stream.steps() for stream, more in zip(streams, extra, strict=True)]


def stages(study: Study, limits: Limits, costs: Sequence[float] = (), processes: int = 1) -> list[Stage]:
    """The learners of each stage: adapters by depth, in cohorts of a kind, then whole models, which are cohorts of their own.

    costs: of each learner, by which they are dealt out; not needed for one process.
    """
    adapters: dict[int, list[int]] = {}
    for g, learner in enumerate(study.learners):
        if learner.rank is not None:
            adapters.setdefault(depth(learner), []).append(g)
    widest = max((trial.rank or 0 for trial in study.trials), default=0)

    def kind(g: int) -> tuple:
        """Learners of the same may be a cohort. With ranks above the study's they are apart: all its rows would be as wide."""
        learner = study.learners[g]
        lora = learner.method == "lora"
        return not lora, learner.kind, learner.tokenizer, lora and (learner.rank or 0) > widest > 0

    whole = [g for g, learner in enumerate(study.learners) if learner.rank is None]
    loads = [0.0] * processes
    models = [Share([[g] for g in share], [None] * len(share)) for share in _dealt(whole, costs, loads)]
    found = []
    for level, members in sorted(adapters.items()):
        last = level == max(adapters)  # whole models follow without waiting, and are dealt with it
        shares = _dealt(members, costs, loads if last else [0.0] * processes)
        largest: dict[tuple, int] = defaultdict(int)  # by kind
        for g in members if limits.exact else ():
            largest[kind(g)] = max(largest[kind(g)], study.learners[g].rank or 0)
        found.append(Stage(level > 0, [_cut(study, share, limits, kind, largest) for share in shares]))
    return found + ([Stage(False, models)] if whole else [])


def alone(config: Config, study: Study) -> list[Stage]:
    """The plan of one process whose memory is no limit."""
    return stages(study, Limits(config.max_learners, exact=config.exact))


def share_of(plan: Sequence[Stage], process: int) -> Share:
    """All that a process trains."""
    shares = [stage.shares[process] for stage in plan]
    return Share([c for share in shares for c in share.cohorts], [r for share in shares for r in share.ranks])


def cohorts_of(plan: Sequence[Stage]) -> list[tuple[list[int], int | None]]:
    """The cohorts of all processes, each with the rank of its bank."""
    shares = [share for stage in plan for share in stage.shares]
    return [pair for share in shares for pair in zip(share.cohorts, share.ranks, strict=True)]


def _dealt(members: Sequence[int], costs: Sequence[float], loads: list[float]) -> list[list[int]]:
    """Deal learners out to as many as have loads, which grow: the dearest first, each to who has the least."""
    shares: list[list[int]] = [[] for _ in loads]
    if len(loads) == 1:
        return [list(members)]
    for g in sorted(members, key=lambda g: (-costs[g], g)):
        least = loads.index(min(loads))
        shares[least].append(g)
        loads[least] += costs[g]
    return [sorted(share) for share in shares]


def _cut(study: Study, members: Sequence[int], limits: Limits, kind: Kind, largest: Mapping[tuple, int]) -> Share:
    """Cut adapters into cohorts of one kind. largest: by kind, the rank of all banks, or 0."""
    kinds: dict[tuple, list[int]] = {}
    for g in members:
        kinds.setdefault(kind(g), []).append(g)
    share = Share([], [])
    for own, alike in sorted(kinds.items()):
        _fill(share, study, alike, limits, largest.get(own, 0))
    return share


def _fill(share: Share, study: Study, members: Sequence[int], limits: Limits, largest: int) -> None:
    """Add cohorts of learners of a kind: of like ranks, where memory is the limit."""
    ranks = {g: study.learners[g].rank or 0 for g in members}
    fit = partial(limits.fit, study.learners[members[0]])
    if not limits.most and len(members) > fit(max(*ranks.values(), largest)):
        members = sorted(members, key=lambda g: (ranks[g], g))
    cohort: list[int] = []
    for g in members:
        wider = max(share.ranks[-1] or 0 if cohort else largest, ranks[g])
        if not cohort or len(cohort) >= (limits.most or max(1, fit(wider))):
            cohort, wider = [], max(largest, ranks[g])
            share.cohorts.append(cohort)
            share.ranks.append(wider)
        cohort.append(g)
        share.ranks[-1] = wider
