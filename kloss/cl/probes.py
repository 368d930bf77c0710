"""Probes: rows made from kept states, scored as learners are, without training."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from torch import Tensor

    from ..models.slots import Slot

Counts = list[int] | None  # true positives, predicted and gold spans; None: a state was never reached
# From the rows [P] of states, the slots of a row, and a part to the row [P] that is scored.
Make = Callable[[Sequence["Tensor"], Mapping[str, "Slot"], str], "Tensor"]


class State(NamedTuple):
    learner: int  # its index in Study.learners
    experience: int  # how many it has completed


class Probe(NamedTuple):
    """A row to be made and scored.

    part: tells the experiment's probes of the same states apart.
    about: what it is, for scores.json.
    """

    make: Make
    states: tuple[State, ...]  # all of learners with one rank
    part: str
    locale: str
    about: dict[str, Any]

    @property
    def row(self) -> tuple[tuple[State, ...], str, Make]:
        """Probes with the same one score the same row."""
        return self.states, self.part, self.make
