"""The strategies of the study: which learners each has, and which learner's score fills which cell of R.

To add one: a function from (order, groups) to a Layout, a line in STRATEGIES, and its name in `config.StrategyName`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from .learner import Experience

Order = Sequence[str]


class Layout(NamedTuple):
    """The learners of a strategy, and where R's cells come from.

    cell(i, j): for row i and the j-th language, the learner to score and how many experiences it has completed.
    """

    streams: Sequence[Sequence[Sequence[str] | Experience]]  # for each learner, the locales of each experience, or more of it
    rows: int  # of R, the untrained row 0 included
    cell: Callable[[int, int], tuple[int, int]]


class Strategy(NamedTuple):
    name: str
    layout: Callable[[Order, Mapping[str, str]], Layout]
    full: bool = False  # full fine-tuning
    joint: bool = False  # the order of the languages does not matter


def one_each(order: Order, groups: Mapping[str, str]) -> Layout:
    """A learner per language. A language not yet learned is scored with the learner trained last."""

    def cell(i: int, j: int) -> tuple[int, int]:
        return (0, 0) if i == 0 else (j if j < i else i - 1, 1)

    return Layout([[[locale]] for locale in order], len(order) + 1, cell)


def one_for_all(order: Order, groups: Mapping[str, str]) -> Layout:
    """One learner, one language after another."""
    return Layout([[[locale] for locale in order]], len(order) + 1, lambda i, j: (0, i))


def one_per_group(order: Order, groups: Mapping[str, str]) -> Layout:
    """A learner per group of languages, one language after another.

    Until a group has learned a language, its languages are scored with the learner trained last.
    """
    names = list(dict.fromkeys(groups[locale] for locale in order))
    members = {name: [locale for locale in order if groups[locale] == name] for name in names}

    def cell(i: int, j: int) -> tuple[int, int]:
        if i == 0:
            return 0, 0
        group = groups[order[j]]
        if not any(groups[locale] == group for locale in order[:i]):
            group = groups[order[i - 1]]
        return names.index(group), sum(groups[locale] == group for locale in order[:i])

    return Layout([[[locale] for locale in members[name]] for name in names], len(order) + 1, cell)


def joint(order: Order, groups: Mapping[str, str]) -> Layout:
    """One learner, one experience with all languages."""
    return Layout([[list(order)]], 2, lambda i, j: (0, i))


STRATEGIES = {
    "non-shared": Strategy("NON-SHARED LoRA", one_each),
    "shared": Strategy("SHARED LoRA", one_for_all),
    "partial": Strategy("partially shared LoRA", one_per_group),
    "lora-multi": Strategy("LoRA on MULTI", joint, joint=True),
    "vanilla": Strategy("VANILLA", one_for_all, full=True),
    "multi": Strategy("MULTI", joint, full=True, joint=True),
    "mono": Strategy("MONO", one_each, full=True),
}
