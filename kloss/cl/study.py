"""From a configuration to the learners that have to be trained, and from their scores back to score matrices."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..config import Config
from ..errors import UserError
from ..files import read_json
from .languages import check_locales, groups
from .learner import Learner
from .spans import f1_from_counts
from .strategies import STRATEGIES, Layout

Scores = Mapping[int, Mapping[str, Sequence[int]]]


class Trial(NamedTuple):
    """One score matrix: a strategy with a rank (None: whole model), a rate, an order of the languages and a seed.

    learners: index, in the study's list, of each learner of the layout.
    """

    strategy: str
    rank: int | None
    lr: float
    order: tuple[str, ...]
    order_name: str
    seed: int
    groups: dict[str, str] | None
    layout: Layout
    learners: tuple[int, ...]

    @property
    def label(self) -> str:
        """What the trials over several orders and seeds have in common."""
        return STRATEGIES[self.strategy].name + ("" if self.rank is None else f" r={self.rank}")

    def matrix(self, scores: Sequence[Scores]) -> list[list[float | None]]:
        """R, F1 in 0 to 1, rows after training steps with the untrained one first; None where nothing was measured, as for a
        learner that diverged."""
        return [
            [self._f1(scores, *self.layout.cell(i, j), locale) for j, locale in enumerate(self.order)]
            for i in range(self.layout.rows)
        ]

    def _f1(self, scores: Sequence[Scores], learner: int, experience: int, locale: str) -> float | None:
        counts = scores[self.learners[learner]].get(experience, {}).get(locale)
        return None if counts is None else float(f1_from_counts([counts])[0])


class Study(NamedTuple):
    """learners: all that must be trained, each once. wanted: what each is scored on, {experiences had: locales}."""

    trials: list[Trial]
    learners: list[Learner]
    wanted: list[dict[int, list[str]]]


def random_order(locales: Sequence[str], seed: int, number: int) -> tuple[str, ...]:
    """The languages of Order `number` (from 1) as the seed draws them."""
    order = list(locales)
    random.Random(f"{seed} order {number}").shuffle(order)
    return tuple(order)


def make_orders(config: Config, locales: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The orders by name: random ones drawn from the seed, the first replaced by config.order if that is given."""
    found = {f"Order {number}": random_order(locales, config.seed, number) for number in range(1, config.orders + 1)}
    if config.order:
        order = check_locales(config.order)
        if sorted(order) != sorted(locales):
            raise UserError(f"--order must hold each of the {len(locales)} languages once, got {len(order)}: {' '.join(order)}")
        found["Order 1"] = order
    return found


def make_groups(config: Config, locales: Sequence[str]) -> dict[str, str]:
    """Locale -> group for partially shared adapters: by script, by family, or a JSON file's map."""
    if config.groups in ("script", "family"):
        return groups(locales, config.groups)
    if not Path(config.groups).is_file():
        raise UserError(f"--groups must be script, family or a JSON file, got {config.groups}")
    return groups(locales, read_json(Path(config.groups)))


def plan(config: Config, locales: Sequence[str]) -> Study:
    """All trials of a configuration over the languages of its corpus; equal learners are shared between trials."""
    unknown = [name for name in config.strategies if name not in STRATEGIES]
    if unknown or not config.strategies:
        raise UserError(f"unknown strategy {', '.join(unknown) or '(none)'}; allowed: {', '.join(STRATEGIES)}")
    index: dict[Learner, int] = {}
    wanted: list[dict[int, list[str]]] = []
    trials = []
    orders = make_orders(config, locales)
    for name in config.strategies:
        strategy = STRATEGIES[name]
        chosen = {"all at once": tuple(locales)} if strategy.joint else orders
        mapping = make_groups(config, locales) if name == "partial" else None
        for rank in (None,) if strategy.full else config.rank:
            for lr in (config.full_lr,) if strategy.full else config.lr:
                for order_name, order in chosen.items():
                    for seed in range(config.seed, config.seed + config.seeds):
                        layout = strategy.layout(order, mapping)
                        numbers = tuple(
                            index.setdefault(_learner(config, stream, rank, lr, seed), len(index)) for stream in layout.streams
                        )
                        wanted += [{} for _ in range(len(index) - len(wanted))]
                        for i in range(layout.rows):
                            for j, locale in enumerate(order):
                                learner, experience = layout.cell(i, j)
                                row = wanted[numbers[learner]].setdefault(experience, [])
                                if locale not in row:
                                    row.append(locale)
                        trials.append(Trial(name, rank, lr, order, order_name, seed, mapping, layout, numbers))
    return Study(trials, list(index), wanted)


def _learner(config: Config, stream: Sequence[Sequence[str]], rank: int | None, lr: float, seed: int) -> Learner:
    return Learner(
        experiences=tuple(tuple(experience) for experience in stream),
        rank=rank,
        lr=lr,
        seed=seed,
        alpha=float(config.alpha or rank or 1),
        epochs=config.epochs,
        batch_size=config.batch_size,
        warmup=config.warmup,
        lora_dropout=0.0 if rank is None else config.lora_dropout,
        dropout=config.dropout,
        weight_decay=config.weight_decay,
        max_norm=config.max_norm,
    )
