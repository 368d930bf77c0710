"""What a checkpoint says of how far learners are, and whether it can be so."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ..errors import UserError
from .corpus import Corpus
from .learner import Learner
from .shapes import check_shape
from .spans import slot_names
from .stream import Stream

TABLES = [{str: {str: [int]}}]
PROGRESS = {"counters": [[int]], "scores": TABLES, "curves?": TABLES, "slots?": TABLES, "failed": {str: str}, "tokens": int}


class Record(NamedTuple):
    """How far a learner is: what `Cohort.state` says of it alone."""

    counters: list[int]
    scores: dict[str, dict[str, list[int]]]
    curves: dict[str, dict[str, list[int]]]
    failed: str | None
    weights: int | None  # how many it trains; None: its cohort was not at its end
    row: dict[str, Tensor]  # empty where its cohort was at its end
    rank: int | None  # that of the bank of which this is a row
    slots: Mapping[str, dict[str, list[int]]] = {}

    @property
    def progress(self) -> tuple:
        """The greatest of several is of the furthest."""
        return self.failed is not None, self.counters, self.weights is not None


def check_progress(
    state: object,
    learners: Sequence[Learner],
    corpus: Corpus,
    to_score: Sequence[Mapping[int, Sequence[str]]],
    score_every: Sequence[int],
    slot_counts: bool = False,
) -> None:
    """Check that the JSON of `Cohort.state` can be that of these learners. Raises UserError if it cannot."""
    check_shape(state, PROGRESS)
    assert isinstance(state, dict)
    streams, numbers = [Stream.of(corpus, learner) for learner in learners], {str(g) for g in range(len(learners))}
    curves, slots = (state.get(name, [{} for _ in learners]) for name in ("curves", "slots"))
    lengths = {len(state["counters"]), len(state["scores"]), len(curves), len(slots)}
    if lengths != {len(streams)} or not state["failed"].keys() <= numbers:
        raise UserError(f"it is not of {len(streams)} learners")
    if state["tokens"] < 0:
        raise UserError(f"tokens are {state['tokens']}")
    for g, (stream, counters, table, curve) in enumerate(zip(streams, state["counters"], state["scores"], curves, strict=True)):
        if not stream.comes_by(counters):
            raise UserError(f"counters of learner {g} are {counters}")
        stream.seek(counters)
        scored = {str(experience): set(to_score[g].get(experience, ())) for experience in range(counters[0] + 1)}
        marks = stream.marks(score_every[g]).items()
        traced = {str(step): set(to_score[g].get(i + 1, ())) for step, i in marks if step <= stream.step}
        for wanted, given in ((scored, table), (traced, curve)):
            there = {at: row.keys() for at, row in given.items()}
            if str(g) in state["failed"]:  # it is scored up to where it diverged
                wanted = {at: wanted[at] for at in wanted.keys() & there}
            if there != wanted:
                raise UserError(f"learner {g} has not the scores of its experiences")
        for count in (count for row in (*table.values(), *curve.values()) for count in row.values()):
            if len(count) != 3 or not 0 <= count[0] <= min(count):
                raise UserError(f"learner {g} has a score of {count}, not true positives, predicted and gold spans")
        if slot_counts and not _adds_up(slots[g], table, len(slot_names(corpus.labels))):
            raise UserError(f"learner {g} has counts of slot types that are not those of its scores")


def _adds_up(table: Mapping, scores: Mapping, slots: int) -> bool:
    """Whether a table has the locales of the scores, with counts of so many slot types that sum up to them."""
    if {at: row.keys() for at, row in table.items()} != {at: row.keys() for at, row in scores.items()}:
        return False
    pairs = [(table[at][locale], scores[at][locale]) for at in scores for locale in scores[at]]
    return all(len(own) == 3 * slots and min(own) >= 0 and [sum(own[i::3]) for i in range(3)] == of for own, of in pairs)
