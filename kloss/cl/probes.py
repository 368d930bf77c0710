"""Probes: rows made from kept states, scored as learners are, without training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..config import Config
from ..models import AdapterBank, XLMRForTokenClassification
from ..models.bank import Slot
from .corpus import Corpus
from .evaluate import evaluate
from .learner import Learner
from .states import State, States

MOST_ROWS = 64  # of a bank of probes

Counts = list[int] | None  # true positives, predicted and gold spans; None: a state was never reached
Make = Callable[[Sequence[Tensor], Mapping[str, Slot], str], Tensor]  # from (rows [P] of the states, slots, part) to a row [P]


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


def run_probes(
    probes: Sequence[Probe],
    learners: Sequence[Learner],
    model: XLMRForTokenClassification,
    corpus: Corpus,
    states: States,
    failed: Sequence[str | None],
    config: Config,
    done: list[Counts],
    after_some: Callable[[list[Counts]], None],
) -> list[Counts]:
    """Score the probes behind those that are `done`; `after_some(done)` is called as results come in.

    learners, failed: of the whole study; probes of learners that diverged are None.
    """
    weight = model.freeze_backbone().classifier.weight
    while len(done) < len(probes):
        rows: dict[tuple, int] = {}
        chunk: list[Probe] = []
        for probe in probes[len(done) :]:
            row = probe.states, probe.part, probe.make
            if len(rows) == MOST_ROWS and row not in rows or chunk and _rank(probe, learners) != _rank(chunk[0], learners):
                break
            chunk.append(probe)
            if not any(failed[state.learner] for state in probe.states):
                rows.setdefault(row, len(rows))
        counts = {}
        if rows:
            kept = {state: states.load(state) for states_, _, _ in rows for state in states_}
            rank = max(row.rank for row in kept.values())
            alphas = [
                learners[states_[0].learner].alpha * rank / (learners[states_[0].learner].rank or 1) for states_, _, _ in rows
            ]
            bank = AdapterBank(model, len(rows), rank, alpha=alphas, dtype=weight.dtype, device=weight.device, exact=config.exact)
            for (states_, part, make), g in rows.items():
                bank.param[g] = make([kept[state].param for state in states_], bank.slots, part)
            bank.refresh()
            scored = [probe for probe in chunk if (probe.states, probe.part, probe.make) in rows]
            pairs = [(rows[probe.states, probe.part, probe.make], probe.locale) for probe in scored]
            found = evaluate(model, bank, corpus, pairs, partition=config.eval_split, pass_tokens=config.pass_tokens)
            counts = {id(probe): row for probe, row in zip(scored, found.tolist(), strict=True)}
        done = [*done, *(counts.get(id(probe)) for probe in chunk)]
        after_some(done)
    return done


def _rank(probe: Probe, learners: Sequence[Learner]) -> int | None:
    return learners[probe.states[0].learner].rank
