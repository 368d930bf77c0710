"""From a configuration to the learners to train, and from their scores to score matrices."""

import os
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

from ..config import Config
from ..errors import UserError
from ..files import read_json
from .languages import check_locales, groups
from .learner import ALL, Experience, Learner, Scores
from .probes import Probe, State
from .spans import f1_from_counts
from .strategies import STRATEGIES, Layout


class Trial(NamedTuple):
    """One score matrix: a strategy with a rank, a learning rate, a language order and a seed."""

    strategy: str
    rank: int | None  # None: full fine-tuning
    lr: float
    order: tuple[str, ...]
    order_name: str
    seed: int
    groups: dict[str, str] | None  # locale -> group, where the strategy shares adapters within groups
    layout: Layout
    learners: tuple[int, ...]  # for each learner of the layout, its index in Study.learners

    @property
    def label(self) -> str:
        """The name that trials over several orders and seeds share."""
        return STRATEGIES[self.strategy].name + ("" if self.rank is None else f" r={self.rank}")

    def matrix(self, scores: Sequence[Scores]) -> list[list[float | None]]:
        """Return R, F1 in [0, 1]: row i after i training steps, a column per language; None where nothing was measured.

        scores: of all learners of the study. A learner that diverged leaves cells unmeasured.
        """
        table = [[self.counts(scores, i, j) for j in range(len(self.order))] for i in range(self.layout.rows)]
        return [[None if counts is None else float(f1_from_counts([counts])[0]) for counts in row] for row in table]

    def counts(self, scores: Sequence[Scores], i: int, j: int) -> list[int] | None:
        """Return true positives, predicted and gold spans of R[i, j]; None if it was not measured."""
        learner, experience = self.layout.cell(i, j)
        return scores[self.learners[learner]].get(experience, {}).get(self.order[j])


class Study(NamedTuple):
    trials: list[Trial]
    learners: list[Learner]  # to be trained, each once
    to_score: list[dict[int, list[str]]]  # for each learner, experiences completed -> locales to score
    probes: tuple[tuple[str, Probe], ...] = ()  # by experiment, to be scored at the end
    weights: Sequence[int] = ()  # how many each learner has trained; empty before

    def starts(self) -> dict[int, list[State]]:
        """The states that learners begin with, by learner: a fork's one, a fusion's several."""
        index = {learner: g for g, learner in enumerate(self.learners)}
        forks = ((g, learner.parents) for g, learner in enumerate(self.learners) if learner.parents)
        return {g: [State(index[parent], experience) for parent, experience in parents] for g, parents in forks}

    def kept(self) -> dict[int, set[int]]:
        """For each learner the experiences after which its row is kept: forks begin with it, or probes are made of it."""
        kept: dict[int, set[int]] = {g: set() for g in range(len(self.learners))}
        starts = (state for states in self.starts().values() for state in states)
        for state in (*starts, *(state for _, probe in self.probes for state in probe.states)):
            kept[state.learner].add(state.experience)
        return kept


def random_order(locales: Sequence[str], seed: int, number: int) -> tuple[str, ...]:
    """Return the languages in the order that the seed draws for Order `number`, counted from 1."""
    order = list(locales)
    random.Random(f"{seed} order {number}").shuffle(order)
    return tuple(order)


def make_orders(config: Config, locales: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the orders by name: random, the first replaced by `config.order` if given."""
    orders = {f"Order {number}": random_order(locales, config.seed, number) for number in range(1, config.orders + 1)}
    if config.order:
        order = check_locales(config.order)
        if sorted(config.order) != sorted(locales):
            given = f"{len(config.order)}: {' '.join(config.order)}"
            raise UserError(f"--order must hold each of the {len(locales)} languages once, got {given}")
        orders["Order 1"] = order
    return orders


def make_groups(config: Config, locales: Sequence[str]) -> dict[str, str]:
    """Return locale -> group: by script, by family, or as a JSON file says."""
    if config.groups in ("script", "family"):
        return groups(locales, config.groups)
    if not os.path.isfile(config.groups):  # Path.is_file raises for a name that is too long
        raise UserError(f"--groups must be script, family or a JSON file, got {config.groups}")
    return groups(locales, read_json(Path(config.groups)))


def rated_label(config: Config, trial: Trial) -> str:
    """The trial's label, with its rate where adapters have several; `summary.by_label` names runs so."""
    return trial.label if trial.rank is None or len(config.lr) == 1 else f"{trial.label}, lr {trial.lr:g}"


def plan(config: Config, locales: Sequence[str]) -> Study:
    """Return all trials of a configuration over a corpus's languages; trials share equal learners."""
    index: dict[Learner, int] = {}
    to_score: list[dict[int, list[str]]] = []
    trials = []
    orders = make_orders(config, locales)
    for name in config.strategies:
        strategy = STRATEGIES[name]
        own_orders = {"all at once": tuple(locales)} if strategy.joint else orders
        mapping = make_groups(config, locales) if name == "partial" else None
        ranks, rates = ((None,), (config.full_lr,)) if strategy.full else (config.rank, config.lr)
        seeds = range(config.seed, config.seed + config.seeds)
        for rank, lr, (order_name, order), seed in product(ranks, rates, own_orders.items(), seeds):
            layout = strategy.layout(order, mapping or {})
            learners = [_learner(config, stream, rank, lr, seed) for stream in layout.streams]
            indices = tuple(index.setdefault(learner, len(index)) for learner in learners)
            to_score += [{} for _ in range(len(index) - len(to_score))]
            for row, (column, locale) in product(range(layout.rows), enumerate(order)):
                learner, experience = layout.cell(row, column)
                scored = to_score[indices[learner]].setdefault(experience, [])
                if locale not in scored:
                    scored.append(locale)
            trials.append(Trial(name, rank, lr, order, order_name, seed, mapping, layout, indices))
    return Study(trials, list(index), to_score)


def _learner(config: Config, stream: Sequence[Sequence[str] | Experience], rank: int | None, lr: float, seed: int) -> Learner:
    return Learner(
        experiences=tuple(map(Experience.of, stream)),
        rank=rank,
        lr=lr,
        seed=seed,
        init_seed=config.init_seed,
        dropout_seed=config.dropout_seed,
        alpha=float(rank or 1) if config.alpha is None else config.alpha,
        epochs=config.epochs,
        batch_size=config.batch_size,
        warmup=config.warmup,
        lora_dropout=0.0 if rank is None else config.lora_dropout,
        dropout=config.dropout,
        weight_decay=config.weight_decay,
        max_norm=config.max_norm,
        head_lr=config.head_lr,
        trains=ALL if rank is None else config.trains,
    )
