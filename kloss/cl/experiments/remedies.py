"""What helps? SHARED with each of `--remedies` beside plain SHARED, all in one pass.

A remedy is a change of the learner: other experiences (replay, LR ADJUST), or a rule of `cl/rules.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..learner import Experience, Learner
from ..metrics import FLOOR
from ..probes import Counts
from ..rules import RULES
from ..spans import f1_from_counts
from ..statistics import Floats, Interval, crossed_interval
from ..study import Study, Trial, rated_label
from .section import Bars, Needs, Section, Table, along, between, numbered, sequence, signed, with_interval

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

COUNTS = [([int], None)]
SHAPE = {
    "label": str, "order_name": str, "seed": int, "order": [str], "remedy": str, "cost": float, "learned": COUNTS, "end": COUNTS,
}  # fmt: skip
PLAIN = "none"
UNKNOWN = "one run, no interval"
MEASURES = ("F1 at the end", "F1 when learned", "F1 lost")

Gains = list[tuple[float, Interval]]  # of each measure, against plain SHARED


def replayed(learner: Learner, number: float) -> Learner:
    """Each experience with that share of the sentences of each earlier language."""
    locales = [locale for experience in learner.experiences for locale in experience.locales]
    mixed = [Experience((locale, *locales[:i]), (1.0, *[number] * i)) for i, locale in enumerate(locales)]
    return replace(learner, experiences=tuple(mixed))


def adjusted(learner: Learner, number: float) -> Learner:
    """Each experience with that many times the rates of the one before."""
    slower = [replace(experience, rate=number**i) for i, experience in enumerate(learner.experiences)]
    return replace(learner, experiences=tuple(slower))


def ruled(name: str, learner: Learner, number: float) -> Learner:
    """With a rule; one with blocks has the learner's rank in each experience, and its scaling."""
    blocks = len(learner.experiences) if RULES[name].blocks else 1
    return replace(learner, rule=RULES[name](number), rank=blocks * (learner.rank or 0), alpha=blocks * learner.alpha)


# By name: the largest number, and a function from a learner and a number to the learner with the remedy.
REMEDIES: dict[str, tuple[float, Callable[..., Learner]]] = {
    "replay": (1.0, replayed),
    "lr-adjust": (1.0, adjusted),
    **{name: (1.0 if rule.replays else 1e30, partial(ruled, name)) for name, rule in RULES.items()},
}


def asked(config: Config) -> dict[str, Callable[[Learner], Learner]]:
    """The remedies of `--remedies`, by name and number. Raises UserError for one unknown, out of range or named twice."""
    most = {name: largest for name, (largest, _) in REMEDIES.items()}
    forms = [f"{name}={'NUMBER' if largest > 1 else 'SHARE'}" for name, largest in most.items()]
    found = numbered("--remedies", config.remedies, most, forms, "a number above 0, a share up to 1")
    return {text: partial(REMEDIES[name][1], number=number) for text, (name, number) in found.items()}


def _learners(config: Config, study: Study) -> list[tuple[Trial, str, Learner]]:
    """(trial of SHARED, remedy, learner), plain ones too."""
    result = []
    for trial in (trial for trial in study.trials if trial.strategy == "shared" and len(trial.order) > 1):
        plain = study.learners[trial.learners[0]]
        result += [(trial, PLAIN, plain), *((trial, name, change(plain)) for name, change in asked(config).items())]
    return result


def plan(config: Config, study: Study) -> Needs:
    """A learner for each remedy, scored on each language when it was learned, and on all at the end."""
    learners = []
    for trial, _, learner in _learners(config, study):
        learners.append((learner, along(trial.order)))
    return Needs(learners=learners)


def cost(corpus: "Corpus", learner: Learner) -> int:
    """Sentences that training visits, those of a second gradient included."""
    from ..stream import Stream  # needs torch

    stream, seconds = Stream.of(corpus, learner), 0
    if learner.rule is not None and learner.rule.replays:
        seconds = learner.batch_size * sum(stream.steps_of(i) for i in range(1, len(stream.experiences)))
    return stream.visits() + seconds


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """Of each learner: counts of each language when learned and at the end, and its cost in plain SHARED's."""
    entries, plain = [], 1
    for trial, remedy, learner in _learners(config, study):
        own = scores[study.learners.index(learner)]
        plain = cost(corpus, learner) if remedy == PLAIN else plain
        about = {"label": rated_label(config, trial), "order_name": trial.order_name, "seed": trial.seed}
        about |= {"order": list(trial.order), "remedy": remedy, "cost": round(cost(corpus, learner) / plain, 3)}
        entries.append(about | sequence(trial.order, own))
    return entries


def _values(entries: list[dict[str, Any]]) -> dict[str, dict[tuple, Floats]]:
    """Remedy -> (order, seed) -> MEASURES, means over languages; the last of an order can't be lost. Without what diverged."""
    values: dict[str, dict[tuple, Floats]] = {entry["remedy"]: {} for entry in entries}
    for entry in entries:
        if None not in (*entry["learned"], *entry["end"]):
            learned, end = f1_from_counts(entry["learned"]), f1_from_counts(entry["end"])
            means = np.array([end.mean(), learned.mean(), (learned - end)[:-1].mean()])
            values[entry["remedy"]][tuple(entry["order"]), entry["seed"]] = means
    return values


def verdict(interval: Interval, better: int = 1) -> str:
    """What an interval of a difference says. better: 1, or -1 where less is better."""
    low, high = sorted((better * interval.low, better * interval.high))
    if low != low:
        return UNKNOWN
    return "helps" if low > 0 else "harms" if high < 0 else "no evidence"


def _findings(plain: str, gains: Mapping[str, Gains], costs: Mapping[str, float]) -> list[str]:
    """The best remedy, what the others do to the end, and which keep more only because they learn less."""
    if not gains:
        return [f"{plain}; with every remedy it diverged."]
    best = max(gains, key=lambda remedy: gains[remedy][0][0])
    (gap, ends), _, (less, _) = gains[best]
    chance = between(ends) or "one run: no interval"
    lines = [
        f"{plain}; of {len(gains)} remedies {best} leaves most: {signed(gap)} at the end ({chance}), {signed(less)} lost, for "
        f"{costs[best]:.2f} times the utterances."
    ]
    by_verdict: dict[str, list[str]] = {}
    for remedy, (end, _, _) in gains.items():
        by_verdict.setdefault(verdict(end[1]), []).append(f"{remedy} ({signed(end[0])})")
    if list(by_verdict) != [UNKNOWN]:
        lines.append("F1 at the end: " + "; ".join(f"{name}: {', '.join(of)}" for name, of in by_verdict.items()) + ".")
    slow = [name for name, (_, own, lost) in gains.items() if (verdict(own[1]), verdict(lost[1], -1)) == ("harms", "helps")]
    if slow:
        lines.append(f"Less is lost, but less was learned too: {', '.join(slow)}.")
    return lines


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """Final F1, F1 when learned and F1 lost by remedy, each against plain SHARED, paired by order and seed."""
    findings: list[str] = []
    bars, tables = [], []
    for label in dict.fromkeys(entry["label"] for entry in data):
        own = [entry for entry in data if entry["label"] == label]
        values = _values(own)
        plain = values.pop(PLAIN)
        if not plain:
            findings.append(f"{label} diverged.")
            continue
        end, learned, lost = np.mean(list(plain.values()), axis=0)
        if learned < FLOOR:
            findings.append(f"{label} learned nothing ({learned:.2f} F1 when learned), so there is nothing to remedy.")
            continue
        costs = {entry["remedy"]: entry["cost"] for entry in own}
        rows, gains = [], dict[str, Gains]()
        for remedy, of in values.items():
            pairs = {key: of[key] - plain[key] for key in of if key in plain}
            if not pairs:
                rows.append((remedy, "diverged", *[""] * len(MEASURES), f"{costs[remedy]:.2f}"))
                continue
            measured = [{key: float(pair[m]) for key, pair in pairs.items()} for m in range(len(MEASURES))]
            gains[remedy] = [(float(np.mean(list(gaps.values()))), crossed_interval(gaps)) for gaps in measured]
            cells = [with_interval(*gain, 3) for gain in gains[remedy]]
            rows.append((remedy, f"{np.mean([f1 for f1, *_ in of.values()]):.3f}", *cells, f"{costs[remedy]:.2f}"))
        rows.sort(key=lambda row: gains[row[0]][0][0] if row[0] in gains else -np.inf, reverse=True)
        head = ("remedy", MEASURES[0], *(f"{measure}: difference" for measure in MEASURES), "utterances, × plain")
        tables.append(Table(f"{label}: against plain SHARED, with 95 % intervals", head, rows))
        for m in (0, 2):
            dots = {name: [float(x[m]) for x in of.values()] for name, of in ({PLAIN: plain} | values).items() if of}
            bars.append(Bars(f"{label}: {MEASURES[m]}, by remedy", dots, "F1"))
        findings += _findings(f"{label} ends at {end:.2f} F1 and has lost {lost:.2f} of a language", gains, costs)
    limits: tuple[str, ...] = (
        "Each remedy is compared at 95 % without correction for their number, with the strengths that were asked for: another "
        "strength may do better. Choose them with --eval-split dev.",
        "Differences are paired by order and seed, and intervals are over these.",
    )
    languages = max((len(entry["order"]) for entry in data if entry["remedy"].startswith("olora=")), default=0)
    if languages:
        limits += (
            "O-LoRA trains as many ranks in each language as plain SHARED, and keeps those of earlier languages beside them: at "
            f"the end it has {languages} times as many.",
        )
    question = "SHARED learns the same languages in the same orders with a remedy. Is more left at the end, and is less lost?"
    return Section("What helps?", question, findings, limits, bars, (), tables) if data else None
