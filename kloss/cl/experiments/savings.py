"""Is it gone, or only out of reach? A language that SHARED has forgotten is learned again for one epoch: from the adapter at its
end, from the same adapter as it was before it first met the language, and from a new one.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..learner import Learner
from ..metrics import FLOOR
from ..probes import Counts
from ..spans import f1_from_counts
from ..statistics import crossed_interval
from ..study import Study, Trial, rated_label
from .section import Bars, Needs, Section, Table, between, signed

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

STARTS = ("new", "before", "end")
COUNTS = [([int], None)]
SHAPE = {"label": str, "order_name": str, "seed": int, "order": [str], "forgotten": COUNTS} | dict.fromkeys(STARTS, COUNTS)
EPOCHS = 1  # of learning again


def _trials(study: Study) -> list[Trial]:
    return [trial for trial in study.trials if trial.strategy == "shared" and len(trial.order) > 1]


def _learners(parent: Learner, step: int) -> dict[str, Learner]:
    """Those that learn language `step` of the parent's order, counted from 0: by where they start. All see the same batches."""
    new = replace(parent, experiences=(parent.experiences[step],), epochs=EPOCHS)
    before = replace(new, start=(parent, step)) if step else new
    return {"new": new, "before": before, "end": replace(new, start=(parent, len(parent.experiences)))}


def plan(config: Config, study: Study) -> Needs:
    """Three learners of every language but the last, each scored on its own."""
    needed: dict[Learner, dict[int, list[str]]] = {}
    for trial in _trials(study):
        parent = study.learners[trial.learners[0]]
        for step, locale in enumerate(trial.order[:-1]):
            needed |= dict.fromkeys(_learners(parent, step).values(), {1: [locale]})
    return Needs(learners=list(needed.items()))


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """Counts of each language but the last: forgotten, at the end of the sequence, then learned again from each start."""
    entries = []
    for trial in _trials(study):
        (g,) = trial.learners
        own: dict[str, list[Counts]] = defaultdict(list)
        for step, locale in enumerate(trial.order[:-1]):
            own["forgotten"].append(scores[g].get(len(trial.order), {}).get(locale))
            for start, learner in _learners(study.learners[g], step).items():
                own[start].append(scores[study.learners.index(learner)].get(1, {}).get(locale))
        about = {"label": rated_label(config, trial), "order_name": trial.order_name, "seed": trial.seed}
        entries.append(about | {"order": list(trial.order)} | own)
    return entries


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """F1 after an epoch from each start, and what the end has saved, paired by language."""
    findings, bars, tables = [], [], []
    for label in dict.fromkeys(entry["label"] for entry in data):
        values: dict[str, dict[tuple, float]] = defaultdict(dict)
        better = total = 0
        for entry in (entry for entry in data if entry["label"] == label):
            key = tuple(entry["order"]), entry["seed"]
            if any(None in entry[kind] for kind in ("forgotten", *STARTS)) or key in values["end"]:
                continue  # it diverged, or is the same order drawn twice
            f1 = {kind: f1_from_counts(entry[kind]) for kind in ("forgotten", *STARTS)}
            for kind, each in f1.items():
                values[kind][key] = float(np.mean(each))
            better, total = better + int((f1["end"] > f1["before"]).sum()), total + len(f1["end"])
        if not values["end"]:
            findings.append(f"{label} diverged.")
            continue
        means = {kind: float(np.mean(list(of.values()))) for kind, of in values.items()}
        if means["end"] < FLOOR:
            findings.append(f"{label}: an epoch teaches nothing ({means['end']:.2f} F1), so nothing can have been saved.")
            continue
        names = {"forgotten": "forgotten", "new": "a new adapter", "before": "before it met the language", "end": "at its end"}
        bars.append(Bars(f"{label}: F1 after an epoch of the language, by where the adapter starts",
                         {names[kind]: list(values[kind].values()) for kind in ("forgotten", *STARTS)}, "F1"))  # fmt: skip
        rows = []
        for one, other in (("end", "before"), ("end", "new"), ("before", "new"), ("end", "forgotten")):
            pairs = {key: values[one][key] - values[other][key] for key in values[one]}
            gap, interval = float(np.mean(list(pairs.values()))), crossed_interval(pairs)
            rows.append((f"{names[one]} − {names[other]}", signed(gap, 3), between(interval, 3)))
        tables.append(Table(f"{label}: differences of F1 after an epoch", ("starts", "difference", "95 % interval"), rows))
        (_, saved, chance), *_ = rows
        findings.append(
            f"{label}: languages that had fallen to {means['forgotten']:.2f} F1 are back at {means['end']:.2f} after an epoch; "
            f"as it was before it met them the adapter reaches {means['before']:.2f}, a new one {means['new']:.2f}. Saved: "
            f"{saved} ({chance or 'one run: no interval'}), and something for {better} of {total} languages, counted in each run."
        )
    limits = (
        "At its end the adapter has learned more other languages than before it met this one; some of the savings may be theirs.",
        f"{EPOCHS} epoch, with the same batches from every start; intervals are over orders and seeds.",
    )
    question = "What was forgotten is learned again. Is that faster than learning it the first time?"
    return Section("Gone, or out of reach?", question, findings, limits, bars, (), tables) if data else None
