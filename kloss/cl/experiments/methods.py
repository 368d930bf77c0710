"""Is it LoRA? SHARED by prefix tuning, IA³ or a fusion of finished adapters beside SHARED LoRA: same orders, seeds, batches."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..learner import ALL, Learner
from ..metrics import FLOOR
from ..probes import Counts
from ..spans import f1_from_counts
from ..statistics import Floats, Interval, crossed_interval, measured_mean
from ..study import Study, Trial, rated_label
from ..summary import MEASURES
from .section import SEQUENCE, Bars, Needs, Section, Table, along, between, numbered, sequence, signed, with_interval

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

SHAPE = SEQUENCE | {"label": str, "order_name": str, "seed": int, "method": str, "weights": int}
LORA = "LoRA"
PREFIX = 16  # keys and values of a layer
METHODS = ("prefix", "ia3", "fusion")


def changed(learner: Learner, method: str, rate: float) -> Learner:
    """The learner by another method at a rate; its head keeps its own."""
    head_lr = learner.lr if learner.head_lr is None else learner.head_lr
    learner_by = partial(replace, learner, method=method, lr=rate, head_lr=head_lr, lora_dropout=0.0, trains=ALL)
    if method == "fusion":
        alone = sorted(learner.experiences, key=lambda experience: experience.locales)
        return learner_by(donors=tuple((replace(learner, experiences=(experience,)), 1) for experience in alone))
    return learner_by(rank=PREFIX if method == "prefix" else 1, alpha=1.0)


def asked(config: Config) -> dict[str, Callable[[Learner], Learner]]:
    """What `--methods` asks for, by method and rate. Raises UserError for what is unknown, out of range or named twice."""
    forms = [f"{name}=RATE" for name in METHODS]
    found = numbered("--methods", config.methods, dict.fromkeys(METHODS, 1e30), forms, "a learning rate above 0")
    return {text: partial(changed, method=name, rate=rate) for text, (name, rate) in found.items()}


def _learners(config: Config, study: Study) -> list[tuple[Trial, str, Learner]]:
    """(trial of SHARED, method, learner), LoRA too."""
    result = []
    for trial in (trial for trial in study.trials if trial.strategy == "shared" and len(trial.order) > 1):
        lora = study.learners[trial.learners[0]]
        result += [(trial, LORA, lora), *((trial, name, change(lora)) for name, change in asked(config).items())]
    return result


def plan(config: Config, study: Study) -> Needs:
    """A learner of each method, scored on each language when it was learned and on all at the end; donors, scored by nobody."""
    learners: list[tuple[Learner, dict[int, list[str]]]] = []
    for trial, _, learner in _learners(config, study):
        learners += [(donor, {}) for donor, _ in learner.donors]
        learners.append((learner, along(trial.order)))
    return Needs(learners=learners)


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """Of each learner: how many weights it trains, and the counts of each language when learned and at the end."""
    entries = []
    for trial, method, learner in _learners(config, study):
        g = study.learners.index(learner)
        about = {"label": rated_label(config, trial), "order_name": trial.order_name, "seed": trial.seed}
        about |= {"order": list(trial.order), "method": method, "weights": study.weights[g]}
        entries.append(about | sequence(trial.order, scores[g]))
    return entries


def _values(entries: list[dict[str, Any]]) -> dict[str, dict[tuple, Floats]]:
    """Method -> (order, seed) -> MEASURES, means over languages; the share kept is of those that were learned, but the last."""
    values: dict[str, dict[tuple, Floats]] = {entry["method"]: {} for entry in entries}
    for entry in entries:
        if None not in (*entry["learned"], *entry["end"]):
            learned, end = f1_from_counts(entry["learned"]), f1_from_counts(entry["end"])
            kept = (end / np.where(learned >= FLOOR, learned, np.nan))[:-1]
            key = tuple(entry["order"]), entry["seed"]
            values[entry["method"]][key] = np.array([learned.mean(), end.mean(), measured_mean(kept)])
    return values


def _gaps(of: Mapping[tuple, Floats], lora: Mapping[tuple, Floats]) -> list[tuple[float, Interval]]:
    """Of each measure the mean difference from LoRA, paired by order and seed, and its interval."""
    pairs = {key: of[key] - lora[key] for key in of if key in lora}
    measured = [{key: float(pair[m]) for key, pair in pairs.items() if pair[m] == pair[m]} for m in range(len(MEASURES))]
    return [(float(measured_mean(list(gaps.values()))), crossed_interval(gaps)) for gaps in measured]


def _means(of: Mapping[tuple, Floats]) -> Floats:
    return measured_mean(list(of.values()), axis=0)


def _findings(label: str, values: Mapping[str, Mapping[tuple, Floats]], weights: Mapping[str, int]) -> list[str]:
    """A line for each method, and which keep more only where they learned less."""
    lora, lines, slow = values[LORA], [], []
    for method, of in values.items():
        learned, end, share = _means(of) if of else (0.0, 0.0, 0.0)
        if learned < FLOOR:
            lines.append(f"{label}, {method}: " + (f"learned nothing ({learned:.2f} F1 when learned)." if of else "diverged."))
            continue
        text = f"{learned:.2f} F1 when learned, {end:.2f} at the end; {share:.0%} kept"
        if method != LORA and lora:
            (_, own), _, (gap, kept) = _gaps(of, lora)
            ends = between(Interval(100 * kept.low, 100 * kept.high, kept.df), 0) or "one run, no interval"
            text += f", {signed(100 * gap, 0)} points against LoRA ({ends})"
            slow += [method] if own.high < 0 < kept.low else []
        lines.append(f"{label}, {method}: {weights[method]:,} weights, {text}.")
    if slow:
        lines.append(f"More is kept, but less was learned: {', '.join(slow)}.")
    return lines


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """F1 when learned, F1 at the end and the share kept by method, each against LoRA, paired by order and seed."""
    findings: list[str] = []
    bars, tables = [], []
    for label in dict.fromkeys(entry["label"] for entry in data):
        own = [entry for entry in data if entry["label"] == label]
        values, weights = _values(own), {entry["method"]: entry["weights"] for entry in own}
        findings += _findings(label, values, weights)
        rows = []
        for method, of in values.items():
            means = [f"{mean:.3f}" for mean in _means(of)] if of else ["diverged", "", ""]
            gaps = _gaps(of, values[LORA]) if method != LORA and of and values[LORA] else []
            cells = [with_interval(*gap, 3) for gap in gaps] or [""] * len(MEASURES)
            rows.append((method, f"{weights[method]:,}", *means, *cells))
        head = ("method", "weights", *MEASURES, *(f"{measure}: difference" for measure in MEASURES))
        tables.append(Table(f"{label}: methods, and their differences from LoRA with 95 % intervals", head, rows))
        for m in (1, 2):
            dots = {name: [float(x[m]) for x in of.values() if x[m] == x[m]] for name, of in values.items()}
            bars.append(Bars(f"{label}: {MEASURES[m]}, by method", {name: x for name, x in dots.items() if x}, MEASURES[m]))
    limits = (
        "Methods train other numbers of weights, at the rates that were asked for; another size or rate may do better. Choose "
        "rates with --eval-split dev. What learns less has less to lose: compare shares kept where as much was learned.",
        "A fusion's donors have learned each language alone before it begins; all that it can lose lies in gates and head.",
        "Differences are paired by order and seed, and intervals are over these, without correction for the number of methods.",
    )
    question = "SHARED learns the same languages in the same orders by other methods. Do they forget as LoRA does?"
    return Section("Is it LoRA?", question, findings, limits, bars, (), tables) if data else None
