"""The strategies of the study, each as what its learners go through and whose score fills which cell of R.

To add one: a function from (order, groups) to a Layout, and a line in STRATEGIES.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Order = Sequence[str]


class Layout(NamedTuple):
    """streams: for each learner, the locales of each experience. rows: of R, the untrained one included.
    cell(i, j): which learner, after how many of its experiences, is scored on the j-th language in row i."""

    streams: Sequence[Sequence[Sequence[str]]]
    rows: int
    cell: Callable[[int, int], tuple[int, int]]


class Strategy(NamedTuple):
    """layout: see Layout. full: the whole model is trained. joint: the order of the languages does not matter."""

    name: str
    layout: Callable[[Order, Mapping[str, str] | None], Layout]
    full: bool = False
    joint: bool = False


def one_each(order: Order, groups: Mapping[str, str] | None = None) -> Layout:
    """A learner per language. A language not yet learned is scored with the one trained last, a learned one with its own."""

    def cell(i: int, j: int) -> tuple[int, int]:
        return (0, 0) if i == 0 else (j if j < i else i - 1, 1)

    return Layout([[[locale]] for locale in order], len(order) + 1, cell)


def one_for_all(order: Order, groups: Mapping[str, str] | None = None) -> Layout:
    """One learner, one language after another."""
    return Layout([[[locale] for locale in order]], len(order) + 1, lambda i, j: (0, i))


def one_per_group(order: Order, groups: Mapping[str, str] | None) -> Layout:
    """A learner per group of languages, each group's one after another. A language is scored with its group's learner as it
    stands; while that has learned nothing, with the one trained last."""
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


def together(order: Order, groups: Mapping[str, str] | None = None) -> Layout:
    """One learner, one experience that holds all languages."""
    return Layout([[list(order)]], 2, lambda i, j: (0, i))


STRATEGIES = {
    "non-shared": Strategy("NON-SHARED LoRA", one_each),
    "shared": Strategy("SHARED LoRA", one_for_all),
    "partial": Strategy("partially shared LoRA", one_per_group),
    "lora-multi": Strategy("LoRA on MULTI", together, joint=True),
    "vanilla": Strategy("VANILLA", one_for_all, full=True),
    "multi": Strategy("MULTI", together, full=True, joint=True),
    "mono": Strategy("MONO", one_each, full=True),
}
