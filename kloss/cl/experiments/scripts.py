"""Does a shared adapter forget less where all its languages share a script? Beside each SHARED learner two more are trained: over
the n languages of the commonest script, and over n languages of scripts as mixed as can be.

The mixed ones: scripts take turns, the commonest first, and each gives its next language of the order until there are n. Those of
the commonest script stay where they are in the first sequence, at even distances; the others fill the gaps in their order. So
a language in both has the same place, and the first is learned from the same draw and batches.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..effects import contrast
from ..learner import Experience, Learner
from ..metrics import FLOOR, retained
from ..probes import Counts
from ..spans import f1_from_counts
from ..statistics import Floats, Interval, crossed_interval, measured_mean
from ..study import Study, Trial
from ..summary import MEASURES, by_label, by_language, lost, mean, measures, script
from ..units import Run
from .section import SEQUENCE, Bars, Needs, Section, Table, along, between, sequence, signed

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

SHAPE = {"label": str, "lr": float, "seed": int, "script": str, "alike": SEQUENCE, "mixed": SEQUENCE}
Sequences = tuple[tuple[str, ...], tuple[str, ...]]


def design_of(order: Sequence[str]) -> Sequences | None:
    """The sequence of the commonest script and the mixed one; None without two languages of a script and one of another."""
    of_script: dict[str, list[str]] = defaultdict(list)
    for locale in order:
        of_script[script(locale)].append(locale)
    common = min(of_script, key=lambda name: (-len(of_script[name]), name))
    alike = of_script[common]
    n = len(alike)
    if n < 2 or n == len(order):
        return None
    turns = {locale: turn for members in of_script.values() for turn, locale in enumerate(members)}
    taken = sorted(order, key=lambda locale: (turns[locale], locale not in alike, order.index(locale)))[:n]
    others = iter(sorted(set(taken) - set(alike), key=order.index))
    both = len(set(taken) & set(alike))
    places = {i * n // both for i in range(both)}
    return tuple(alike), tuple(alike[i] if i in places else next(others) for i in range(n))


def _designs(study: Study) -> list[tuple[Trial, Sequences]]:
    own = [(trial, design_of(trial.order)) for trial in study.trials if trial.strategy == "shared"]
    return [(trial, design) for trial, design in own if design is not None]


def _learner(study: Study, trial: Trial, order: Sequence[str]) -> Learner:
    return replace(study.learners[trial.learners[0]], experiences=tuple(Experience((locale,)) for locale in order))


def plan(config: Config, study: Study) -> Needs:
    """The learners of both sequences, scored on each language when learned and at the end."""
    learners = []
    for trial, design in _designs(study):
        for order in design:
            learners.append((_learner(study, trial, order), along(order)))
    return Needs(learners=learners)


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """For each trial of SHARED the counts of both sequences; None where a learner diverged."""
    entries = []
    for trial, design in _designs(study):
        entry: dict[str, Any] = {"label": trial.label, "lr": trial.lr, "seed": trial.seed, "script": script(design[0][0])}
        for name, order in zip(("alike", "mixed"), design, strict=True):
            entry[name] = sequence(order, scores[study.learners.index(_learner(study, trial, order))])
        entries.append(entry)
    return entries


def measured(sequence: Mapping[str, Any]) -> dict[str, Floats]:
    """`measures` of what was recorded of a sequence."""
    learned, end = (f1_from_counts(sequence[name]) for name in ("learned", "end"))
    return measures(sequence["order"], np.vstack([np.zeros(len(end)), np.diag(learned)[:-1], end]))


Means = dict[tuple, Floats]  # (sequences, seed) -> [2, 3], the means of MEASURES over the first sequence and the mixed one


def compared(entries: Sequence[Mapping[str, Any]]) -> tuple[Means, Means]:
    """The means over all languages, and over those in both sequences. Equal sequences of one seed count once."""
    of_all: Means = {}
    of_both: Means = {}
    for entry in entries:
        unit = (tuple(entry["alike"]["order"]), tuple(entry["mixed"]["order"])), entry["seed"]
        alike, mixed = measured(entry["alike"]), measured(entry["mixed"])
        of_all[unit] = np.stack([measured_mean(list(values.values()), axis=0) for values in (alike, mixed)])
        pairs = np.array([(alike[locale], mixed[locale]) for locale in alike if locale in mixed])
        of_both[unit] = measured_mean(pairs + 0 * pairs[:, ::-1], axis=0)  # NaN in one is NaN in both
    return of_all, of_both


def difference(means: Means, measure: str) -> tuple[float, float, float, Interval]:
    """A measure's means over the first sequence and the mixed one, their difference, paired, and its interval."""
    values = {unit: of[:, MEASURES.index(measure)] for unit, of in means.items()}
    pairs = {unit: float(alike - mixed) for unit, (alike, mixed) in values.items() if alike - mixed == alike - mixed}
    alike, mixed = (mean([float(values[unit][s]) for unit in pairs]) for s in (0, 1))
    return alike, mixed, mean(list(pairs.values())), crossed_interval(pairs)


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """F1 and shares kept of both sequences, over all languages and over those in both; then scripts in the study's own runs."""
    findings: list[str] = []
    bars, tables = [], []
    for label, runs in by_label(scores["runs"]).items():
        own = [entry for entry in data if (entry["label"], entry["lr"]) == (runs[0]["label"], runs[0]["lr"])]
        parts = ("alike", "learned"), ("alike", "end"), ("mixed", "learned"), ("mixed", "end")
        entries = [entry for entry in own if not any(None in entry[which][part] for which, part in parts)]
        if not entries:
            findings += [f"{label} diverged."] if own else []
            continue
        name, (of_all, of_both) = entries[0]["script"], compared(entries)
        alike, mixed, *_ = difference(of_all, "F1 when learned")
        if min(alike, mixed) < FLOOR:
            findings.append(
                f"{label} learned nothing ({alike:.2f} F1 on {name} only, {mixed:.2f} mixed), so nothing could be lost."
            )
            continue
        findings += [*_findings(label, entries, of_all, of_both), *_in_the_study(label, name, runs)]
        values = {
            f"{which}, {measure.removeprefix('F1 ')}": [float(of[s, m]) for of in of_all.values()]
            for m, measure in enumerate(MEASURES)
            for s, which in enumerate((name, "mixed"))
        }
        bars.append(Bars(f"{label}: a sequence's languages, a dot for each order and seed", values, "F1, or share of it"))
        rows = []
        for which, means in (("all", of_all), ("in both", of_both)):
            for measure in MEASURES:
                alike, mixed, gap, interval = difference(means, measure)
                rows.append((f"{measure}, {which}", f"{alike:.3f}", f"{mixed:.3f}", signed(gap, 3), between(interval, 3)))
        head = ("mean over languages", f"{name} only", "mixed", "difference", "95 % interval")
        tables.append(Table(f"{label}: sequences of one script and of several", head, rows))
    limits = (
        "The two sequences hold other languages, some of them harder; only those in both are the same.",
        "Differences are paired by order and seed, and intervals are over these.",
        "Languages of a script are often related, and others differ in labels and subwords too: a difference need not be the "
        "script's doing.",
    )
    question = "As many languages one after another, all of one script or of several: is less forgotten where the script is one?"
    return Section("Does a common script help?", question, findings, limits, bars, (), tables) if data else None


def _findings(label: str, entries: Sequence[Mapping[str, Any]], of_all: Means, of_both: Means) -> list[str]:
    name, n = entries[0]["script"], len(entries[0]["alike"]["order"])
    several = max(len(set(map(script, entry["mixed"]["order"]))) for entry in entries)
    pairs = [set(entry["alike"]["order"]) & set(entry["mixed"]["order"]) for entry in entries]

    def kept(means: Means) -> str:
        alike, mixed, gap, interval = difference(means, "share kept")
        if gap != gap:
            return "none was learned"
        known = "chance is not known from so few runs"
        if interval.low <= 0 <= interval.high:
            known = f"{between(interval)}: no evidence of a difference"
        elif interval.low == interval.low:
            known = f"{between(interval)}: {'less' if gap > 0 else 'more'} is forgotten where the script is one"
        where = f"{alike:.2f} is kept where all are {name}, {mixed:.2f} where they have {several} scripts"
        return f"{where}; difference {signed(gap)} ({known})"

    same = f"{len(pairs[0])} of {n}" + (f" each time, {len(set.union(*pairs))} in all" if len(entries) > 1 else "")
    learned = "{:.2f} and {:.2f} F1 when learned".format(*difference(of_both, "F1 when learned")[:2])
    return [
        f"{label}, {n} languages one after another: of what was learned, {kept(of_all)}.",
        f"{label}, the same languages at the same places in both ({same}; {learned}): {kept(of_both)}.",
    ]


def _in_the_study(label: str, name: str, runs: Sequence[Run]) -> list[str]:
    """What the study's own sequences say of languages of the script against the others."""
    kept = {locale: mean(values) for locale, values in by_language(runs, lost(retained)).items()}
    kept = {locale: value for locale, value in kept.items() if value == value}
    own, others = ([m for m in kept if (script(m) == name) == alike] for alike in (True, False))
    test = contrast(name, kept, own, others)
    if test.difference != test.difference:
        return []
    known = "scripts differ" if test.p_value < 0.05 else "no evidence that scripts differ"
    ends = between(test.interval) or "no interval"
    return [
        f"{label}, within the study's sequences of all languages: {len(own)} {name} ones keep {signed(test.difference)} against "
        f"{len(others)} others, each family counted once ({ends}; permutation test p = {test.p_value:.3f}): {known}."
    ]
