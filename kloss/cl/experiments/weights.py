"""Does SHARED lose because it has fewer weights? NON-SHARED of rank r has an adapter for each of G languages. Beside SHARED of
rank r, which has one, SHARED of rank G·r learns the same orders with as many adapter weights.

Heads do not count: SHARED has one of them, NON-SHARED one for each language.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..learner import Learner
from ..metrics import FLOOR
from ..probes import Counts
from ..statistics import Floats, Interval, crossed_interval, measured_mean
from ..study import Study, Trial
from ..summary import MEASURES, measures
from .scripts import measured
from .section import SEQUENCE, Bars, Needs, Section, Table, along, between, or_unmeasured, sequence, signed, with_interval

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

SHAPE = {"rank": int, "lr": float, "seed": int, "trains": [str], "wide": SEQUENCE}
AS_GOOD = 0.02  # F1: how far below NON-SHARED the interval of wide SHARED may reach if weights are all that it lacked
Means = dict[tuple, Floats]  # (order, seed) -> [3, 3]: SHARED, wide SHARED, NON-SHARED; means of MEASURES over languages


def _learners(config: Config, study: Study) -> list[tuple[Trial, Learner]]:
    """(trial of SHARED, its learner at G times the rank), for the least rank, and for those whose G-fold is a rank too."""
    learners, isolated = [], {trial.rank for trial in study.trials if trial.strategy == "non-shared"}
    for trial in (trial for trial in study.trials if trial.strategy == "shared" and trial.rank in isolated):
        own, languages = study.learners[trial.learners[0]], len(trial.order)
        rank = languages * (own.rank or 0)
        if languages > 1 and (own.rank == min(config.rank) or rank in config.rank):
            alpha = float(rank) if config.alpha is None else config.alpha
            learners.append((trial, replace(own, rank=rank, alpha=alpha)))
    return learners


def plan(config: Config, study: Study) -> Needs:
    """SHARED at G times the rank, scored on each language when learned and at the end."""
    return Needs(learners=[(wide, along(trial.order)) for trial, wide in _learners(config, study)])


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """For each trial of SHARED the counts of its wide learner; None where it diverged."""
    entries = []
    for trial, wide in _learners(config, study):
        own = sequence(trial.order, scores[study.learners.index(wide)])
        entries.append({"rank": trial.rank, "lr": trial.lr, "seed": trial.seed, "trains": list(config.trains), "wide": own})
    return entries


def compared(runs: Sequence[Mapping[str, Any]], entries: Sequence[Mapping[str, Any]]) -> Means:
    """The three beside each other, without those of which one diverged. runs, entries: of one rank and rate."""
    known = {(run["strategy"], tuple(run["order"]), run["seed"]): run for run in runs if not run.get("diverged")}
    means: Means = {}
    for entry in entries:
        unit = tuple(entry["wide"]["order"]), entry["seed"]
        both = [known.get((strategy, *unit)) for strategy in ("shared", "non-shared")]
        if None not in (*both, *entry["wide"]["learned"], *entry["wide"]["end"]):
            shared, isolated = (measures(run["order"], run["R"]) for run in both if run is not None)
            wide = measured(entry["wide"])
            for locale, of in shared.items():  # a share of what one did not learn is none of the other
                of[2], wide[locale][2] = (of + 0 * wide[locale])[2], (wide[locale] + 0 * of)[2]
            means[unit] = np.stack([measured_mean(list(of.values()), axis=0) for of in (shared, wide, isolated)])
    return means


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """F1 and shares kept of SHARED, SHARED with as many weights as NON-SHARED, and NON-SHARED, paired by order and seed."""
    findings: list[str] = []
    bars, tables, limits = [], [], []
    by_rate: dict[int, dict[float, Means]] = {}
    for rank, lr in dict.fromkeys((entry["rank"], entry["lr"]) for entry in data):
        entries = [entry for entry in data if (entry["rank"], entry["lr"]) == (rank, lr)]
        runs = [run for run in scores["runs"] if (run["rank"], run["lr"]) == (rank, lr)]
        languages, means = len(entries[0]["wide"]["order"]), compared(runs, entries)
        at = f"rank {rank}, rate {lr:g}"
        names = f"SHARED r={rank}", f"SHARED r={languages * rank}", f"NON-SHARED r={rank}"
        if not means:
            findings.append(f"At {at} one of {names[0]}, {names[1]} and {names[2]} diverged in every run.")
            continue
        mean, by_rate.setdefault(rank, {})[lr] = measured_mean(list(means.values()), axis=0), means
        if mean[:, 0].min() < FLOOR:
            least = names[int(mean[:, 0].argmin())]
            findings.append(
                f"At {at} {least} learned nothing ({mean[:, 0].min():.2f} F1 when learned), so nothing can be compared."
            )
            continue
        one = next(run for run in runs if run["strategy"] == "shared")["trainable_parameters"]
        head = head_weights(scores, entries[0]["trains"])
        weights = [one - head, languages * (one - head), languages * (one - head)]
        findings += _findings(names, lr, weights[1], head, languages, means)
        rows = [(name, f"{n:,}", *map(or_unmeasured, of)) for name, n, of in zip(names, weights, mean, strict=True)]
        rows[2] = (*rows[2][:-1], "all, by construction")
        tables.append(Table(f"Means, {at}", ("", "adapter weights", *MEASURES), rows))
        rows = []
        for other, number in ((0, 3), (2, 2)):
            gaps = [_gap(means, m, other) for m in range(number)]
            cells = [with_interval(gap, ends, 3) if gap == gap else "" for gap, ends in gaps]
            rows.append((f"{names[1]} − {names[other]}", *cells, *[""] * (3 - number)))
        tables.append(Table(f"Differences, {at}, with 95 % intervals", ("", *MEASURES), rows))
        for m in (0, 1):
            dots = {name: [float(of[i, m]) for of in means.values()] for i, name in enumerate(names)}
            bars.append(Bars(f"{MEASURES[m]}, {at}, a dot for each order and seed", dots, "F1"))
        if languages * rank > scores["backbone"]["hidden"]:
            limits.append(
                f"Rank {languages * rank} is above the backbone's width of {scores['backbone']['hidden']}: the adapter has as "
                "many weights, but they can do no more than fewer could."
            )
    findings += [_at_their_best(rank, rates) for rank, rates in by_rate.items() if len(rates) > 1]
    limits += [
        "At one rate a larger rank moves further. Where there are several --lr, each is compared at its best too, chosen by the "
        "same scores: to choose apart from them take --eval-split dev.",
        "NON-SHARED keeps all that it learned by construction. Differences are paired by order and seed, and intervals are over "
        "these.",
    ]
    question = "One adapter for all languages has a fraction of the weights that an adapter for each has. Is that what it lacks?"
    return Section("Is it the number of weights?", question, findings, limits, bars, (), tables) if data else None


def head_weights(scores: Mapping[str, Any], patterns: Sequence[str]) -> int:
    """Trained weights of a head. patterns: of `--trains`."""
    labels, hidden = scores["corpus"]["labels"], scores["backbone"]["hidden"]
    sizes = {"head.weight": labels * hidden, "head.bias": labels}
    return sum(size for name, size in sizes.items() if any(fnmatchcase(name, pattern) for pattern in patterns))


def _gap(means: Means, m: int, other: int) -> tuple[float, Any]:
    """How much more of a measure the wide SHARED has than another one, and its interval."""
    pairs = {unit: float(of[1, m] - of[other, m]) for unit, of in means.items()}
    pairs = {unit: gap for unit, gap in pairs.items() if gap == gap}
    return (float(np.mean(list(pairs.values()))) if pairs else np.nan), crossed_interval(pairs)


def _share(lefts: Interval) -> str:
    """What weights are of what SHARED lacks. lefts: of how much more wide SHARED has than NON-SHARED."""
    if lefts.low > -AS_GOOD:
        return f"what it lacks, to within {AS_GOOD:.2f} F1"
    return f"{'part' if lefts.high < 0 else 'at least part'} of what it lacks"


def _findings(names: Sequence[str], lr: float, weights: int, head: int, languages: int, means: Means) -> list[str]:
    narrow, wide, isolated = names
    mean = measured_mean(list(means.values()), axis=0)
    (gained, gains), (left, lefts) = _gap(means, 1, 0), _gap(means, 1, 2)
    known = "one run, no interval"
    if gains.low == gains.low:
        known = f"{between(gains)}: no evidence that weights are what it lacks"
        if gains.low > 0:
            known = f"{between(gains)}: weights are {_share(lefts)}"
        elif gains.high < 0:
            known = f"{between(gains)}: at this rate more weights make it worse"
    lines = [
        f"{wide} and {isolated} have {weights:,} adapter weights each, {narrow} {weights // languages:,}. Heads do not count: "
        f"{head:,} weights each, {languages} of them in NON-SHARED.",
        f"At rate {lr:g} {narrow} ends at {mean[0, 1]:.2f} F1, {wide} {mean[1, 1]:.2f}, {isolated} {mean[2, 1]:.2f}. As many "
        f"weights bring SHARED {signed(gained)} ({known}); against NON-SHARED it has {with_interval(left, lefts)}.",
    ]
    more, ends = _gap(means, 0, 0)
    if not ends.low <= 0 <= ends.high and ends.low == ends.low:
        lines.append(
            f"{wide} learned {'more' if more > 0 else 'less'} than {narrow} ({signed(more)} F1 when learned, {between(ends)}): "
            "one rate does not suit both ranks alike. Compare each at its best, of several --lr."
        )
    kept, keeps = _gap(means, 2, 0)
    if kept == kept:
        chance = between(keeps) or "no interval"
        chance += ": no evidence of a difference" if keeps.low <= 0 <= keeps.high else ""
        lines.append(
            f"Of languages that both learned {narrow} keeps {mean[0, 2]:.2f}, {wide} {mean[1, 2]:.2f}: {signed(kept)} "
            f"({chance}). When learned, F1 is {mean[0, 0]:.2f} and {mean[1, 0]:.2f}."
        )
    return lines


def _at_their_best(rank: int, rates: Mapping[float, Means]) -> str:
    """The three, each at the rate with the best F1 at the end, paired by order and seed."""
    ends = {lr: {unit: of[:, 1] for unit, of in means.items()} for lr, means in rates.items()}
    best = [max(ends, key=lambda lr: float(np.mean([of[i] for of in ends[lr].values()]))) for i in range(3)]
    units = set.intersection(*[set(ends[lr]) for lr in best])
    three = {unit: [float(ends[lr][unit][i]) for i, lr in enumerate(best)] for unit in units}
    if not three:
        return f"At rank {rank} the best rates have no order and seed in common."
    narrow, wide, isolated = (f"{np.mean([of[i] for of in three.values()]):.2f} F1 (rate {lr:g})" for i, lr in enumerate(best))
    texts = []
    for other in (0, 2):
        pairs = {unit: of[1] - of[other] for unit, of in sorted(three.items())}
        texts.append(with_interval(float(np.mean(list(pairs.values()))), crossed_interval(pairs)))
    return (
        f"Each at its best of {len(rates)} rates: SHARED r={rank} {narrow}, as many weights {wide}, NON-SHARED r={rank} "
        f"{isolated}. The weights bring {texts[0]}; against NON-SHARED it has {texts[1]}."
    )
