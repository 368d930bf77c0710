"""Two runs beside each other: what differs in their settings, and paired differences of their scores."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..cl.metrics import summarise
from ..cl.statistics import crossed_interval
from ..cl.summary import by_label, final, mean
from ..cl.units import Run, Unit, traits, unit_of
from .cells import between, counted, number

MOST = 12  # settings in a line


class Read(NamedTuple):
    """A run folder: its name, scores.json, and config.json ({} without one)."""

    name: str
    scores: Mapping[str, Any]
    config: Mapping[str, Any]


def compare(old: Read, new: Read) -> list[str]:
    """Lines that say what is different in `new`, against `old`."""
    sides = [
        {label: [run for run in runs if not run.get("diverged")] for label, runs in by_label(read.scores["runs"]).items()}
        for read in (old, new)
    ]
    pairs = _matched(*sides)
    lines = [f"{new.name} minus {old.name}, paired by order and seed; 95 % intervals, t: Student's", _settings(old, new)]
    lines += _utterances(old, new)
    for a, b in pairs:
        lines.append(f"{a if a == b else f'{a} → {b}'}: {_difference(sides[0][a], sides[1][b])}")
    for i, name in enumerate((old.name, new.name)):
        alone = [label for label in sides[i] if label not in {pair[i] for pair in pairs}]
        if alone:
            lines.append(f"only in {name}: {'; '.join(alone)}")
    return lines if pairs else [*lines, "no strategy is in both: there is nothing to pair"]


def _matched(ours: Mapping[str, Sequence[Run]], theirs: Mapping[str, Sequence[Run]]) -> list[tuple[str, str]]:
    """Pairs of labels of one strategy, rank and rate; then of strategies with one label left in each: another rank or rate."""
    keys = [
        {label: (runs[0]["strategy"], runs[0].get("rank"), runs[0]["lr"]) for label, runs in side.items() if runs}
        for side in (ours, theirs)
    ]
    pairs = [(a, b) for a, key in keys[0].items() for b, other in keys[1].items() if key == other]
    left = [[label for label in side if label not in {pair[i] for pair in pairs}] for i, side in enumerate(keys)]
    for strategy in dict.fromkeys(keys[0][label][0] for label in left[0]):
        several = [[label for label in labels if keys[i][label][0] == strategy] for i, labels in enumerate(left)]
        if [len(labels) for labels in several] == [1, 1]:
            pairs.append((several[0][0], several[1][0]))
    return pairs


def _settings(old: Read, new: Read) -> str:
    names = [name for name in {**old.config, **new.config} if name != "corpus" and old.config.get(name) != new.config.get(name)]
    texts = [f"{name} {_text(old.config.get(name))} → {_text(new.config.get(name))}" for name in names]
    more = f" and {len(texts) - MOST} more" if len(texts) > MOST else ""
    return f"settings: {'; '.join(texts[:MOST])}{more}" if texts else "settings: the same"


def _text(value: object) -> str:
    """A setting as on the command line; a dash for a default that config.json does not name."""
    return "–" if value in (None, []) else " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _utterances(old: Read, new: Read) -> list[str]:
    """A warning, unless both runs were trained and scored on the same utterances."""
    known = old.config.get("corpus"), new.config.get("corpus")
    about = [(read.scores["corpus"]["name"], read.scores["corpus"].get("scored", "test")) for read in (old, new)]
    if known[0] is not None and known[0] == known[1] and about[0] == about[1]:
        return []
    return ["Not the same utterances or languages: a difference is of these too, and intervals do not know it."]


def _difference(old: Sequence[Run], new: Sequence[Run]) -> str:
    """F1 of both, of what is paired if anything is, and the differences in F1 and CBT, new minus old."""
    ends = [{unit_of(run): f1 for run in runs if (f1 := mean(final(run))) == f1} for runs in (old, new)]
    pairs = _pairs(*ends)
    levels = " → ".join(number(mean([f1 for unit, f1 in of.items() if unit in pairs or not pairs])) for of in ends)
    if not pairs:
        return f"F1 {levels}; no two runs of one order and seed, so no difference"
    text = f"F1 {levels}: {_shown(pairs)}, {counted(len(pairs), 'pair')}"
    losing = [[run for run in runs if traits(run).can_change[:-1].any()] for runs in (old, new)]
    losses = [{unit_of(run, end=False): summarise(run["R"], traits(run).own)["cbt"] for run in runs} for runs in losing]
    both = _pairs(*({unit: cbt for unit, cbt in of.items() if cbt is not None} for of in losses))
    return f"{text}; CBT {_shown(both)}" if both else text


def _pairs(old: Mapping[Unit, float], new: Mapping[Unit, float]) -> dict[Unit, float]:
    return {unit: new[unit] - value for unit, value in old.items() if unit in new}


def _shown(differences: Mapping[Unit, float]) -> str:
    """The mean with its interval; equal values have none."""
    ends = between(*crossed_interval(differences))
    one = "one value, no interval" if len(differences) == 1 else "no interval"
    return f"{number(mean(list(differences.values())), sign=True)} ({ends or one})"
