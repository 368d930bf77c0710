"""Is a part of an adapter enough to share? A learner for each language of an order takes that part from the learner before it,
and the rest, head included, from its own draw. In the end each language has its own rest, and the part as the last one left it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..learner import Experience, Learner
from ..metrics import FLOOR
from ..probes import Counts, Probe, State
from ..statistics import Floats, crossed_interval, measured_mean
from ..study import Study, Trial
from ..summary import MEASURES, measures
from .scripts import measured
from .section import SEQUENCE, Bars, Needs, Section, Table, between, or_unmeasured, signed, with_interval

if TYPE_CHECKING:
    from torch import Tensor

    from ...models.bank import Slot
    from ..corpus import Corpus

SHAPE = SEQUENCE | {"part": str, "rank": int, "lr": float, "seed": int}
END = MEASURES.index("F1 at the end")

Units = dict[tuple, Floats]  # (order, seed) -> [3]: means of MEASURES over languages


def with_part(rows: Sequence["Tensor"], slots: Mapping[str, "Slot"], part: str) -> "Tensor":
    """The first row, with the part of the second."""
    own, last = rows
    row = own.clone()
    for name, slot in slots.items():
        if fnmatchcase(name, part):
            columns = slice(slot.start, slot.start + prod(slot.shape))
            row[columns] = last[columns]
    return row


def _chains(config: Config, study: Study) -> list[tuple[Trial, str, list[Learner]]]:
    """(trial of SHARED, what is shared, a learner for each language of its order)."""
    chains = []
    for trial in (trial for trial in study.trials if trial.strategy == "shared" and len(trial.order) > 1):
        for part in dict.fromkeys(config.shared_parts):
            chain: list[Learner] = []
            for locale in trial.order:
                new = replace(study.learners[trial.learners[0]], experiences=(Experience((locale,)),))
                chain.append(replace(new, start=(chain[-1], 1), takes=(part,)) if chain else new)
            chains.append((trial, part, chain))
    return chains


def plan(config: Config, study: Study) -> Needs:
    """The learners, each scored on its language, and the mixture of each with the last one."""
    learners, probes, numbers = [], [], {learner: g for g, learner in enumerate(study.learners)}
    for trial, part, chain in _chains(config, study):
        for learner, locale in zip(chain, trial.order, strict=True):
            learners.append((learner, {1: [locale]}))
            numbers.setdefault(learner, len(numbers))  # as `with_experiments` appends them
        states = [State(numbers[learner], 1) for learner in chain]
        probes += [Probe(with_part, (own, states[-1]), part, m, {}) for own, m in zip(states, trial.order, strict=True)]
    return Needs(learners=learners, probes=probes)


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """For each trial of SHARED and each part the counts of each language when learned and at the end."""
    entries, numbers = [], {learner: g for g, learner in enumerate(study.learners)}
    ends = iter(counts)
    for trial, part, chain in _chains(config, study):
        about = {"part": part, "rank": trial.rank, "lr": trial.lr, "seed": trial.seed, "order": list(trial.order)}
        learned = [scores[numbers[learner]].get(1, {}).get(m) for learner, m in zip(chain, trial.order, strict=True)]
        entries.append(about | {"learned": learned, "end": [next(ends) for _ in chain]})
    return entries


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """F1 and shares kept by what is shared, beside SHARED and NON-SHARED, paired by order and seed."""
    findings: list[str] = []
    bars, tables = [], []
    for rank, lr in dict.fromkeys((entry["rank"], entry["lr"]) for entry in data):
        at, kinds = f"rank {rank}, rate {lr:g}", dict[str, Units]()
        for strategy, name in (("shared", "SHARED"), ("non-shared", "NON-SHARED")):
            runs = [run for run in scores["runs"] if (run["strategy"], run["rank"], run["lr"]) == (strategy, rank, lr)]
            units = {(tuple(run["order"]), run["seed"]): _means(measures(run["order"], run["R"])) for run in runs
                     if not run.get("diverged")}  # fmt: skip
            kinds |= {name: units} if units else {}
        for part in dict.fromkeys(entry["part"] for entry in data):
            entries = [entry for entry in data if (entry["rank"], entry["lr"], entry["part"]) == (rank, lr, part)]
            whole = [entry for entry in entries if None not in (*entry["learned"], *entry["end"])]
            units = {(tuple(entry["order"]), entry["seed"]): _means(measured(entry)) for entry in whole}
            kinds |= {f"shares {part}": units} if units else {}
            findings += [] if units else [f"At {at} what shares {part} diverged."]
        means = {name: measured_mean(list(units.values()), axis=0) for name, units in kinds.items()}
        own = [name for name in kinds if name.startswith("shares")]
        if "SHARED" not in kinds or not own:
            findings += [] if "SHARED" in kinds else [f"At {at} SHARED diverged."]
            continue
        if means["SHARED"][0] < FLOOR:
            findings.append(f"At {at} SHARED learned nothing ({means['SHARED'][0]:.2f} F1 when learned).")
            continue
        findings += _findings(at, kinds, means, own)
        rows = []
        for name, units in kinds.items():
            cells = [*map(or_unmeasured, means[name])]
            cells[2] = "all, by construction" if name == "NON-SHARED" else cells[2]
            rows.append((name, *cells, *[_against(units, kinds.get(other)) for other in ("SHARED", "NON-SHARED")]))
        head = ("", *MEASURES, "F1 at the end − SHARED's", "− NON-SHARED's")
        tables.append(Table(f"By what languages share, {at}, differences with 95 % intervals", head, rows))
        dots = {name: [float(of[END]) for of in units.values()] for name, units in kinds.items()}
        bars.append(Bars(f"F1 at the end, {at}, a dot for each order and seed", dots, "F1"))
    limits = (
        "A learner for each language begins with new moments and a new warm-up; SHARED goes on with those that it has.",
        "A part is named as in --trains: *.a is A of all layers, [0-1].* the lowest two layers.",
        "Differences are paired by order and seed, and intervals are over these.",
    )
    question = "Each language has an adapter of its own, but for one part, which goes from language to language. Which parts can?"
    return Section("Is a part enough to share?", question, findings, limits, bars, (), tables) if data else None


def _means(of: Mapping[str, Floats]) -> Floats:
    return measured_mean(list(of.values()), axis=0)


def _gap(units: Units, others: Units) -> tuple[float, Any]:
    """The difference of F1 at the end, and its interval; NaN without an order and seed in common."""
    pairs = {unit: float(units[unit][END] - others[unit][END]) for unit in units if unit in others}
    return (float(np.mean(list(pairs.values()))) if pairs else np.nan), crossed_interval(pairs)


def _against(units: Units, others: Units | None) -> str:
    gap, ends = _gap(units, others or {})
    return "" if units is others or gap != gap else with_interval(gap, ends, 3)


def _findings(at: str, kinds: Mapping[str, Units], means: Mapping[str, Floats], own: Sequence[str]) -> list[str]:
    """The best part, then what each does against SHARED, by whether it is known."""
    best = max(own, key=lambda name: float(means[name][END]))
    texts = [f"{name} {means[name][END]:.2f}" for name in ("SHARED", "NON-SHARED") if name in means]
    gap, ends = _gap(kinds[best], kinds["SHARED"])
    lines = [
        f"At {at}: of {len(own)} ways to share a part the one that {best} ends highest, at {means[best][END]:.2f} F1, with "
        f"{means[best][2]:.2f} kept ({', '.join(texts)}): {signed(gap)} against SHARED ({between(ends) or 'no interval'})."
    ]
    known: dict[str, list[str]] = {}
    for name in own:
        gap, ends = _gap(kinds[name], kinds["SHARED"])
        verdict = "better" if ends.low > 0 else "worse" if ends.high < 0 else "not known to differ"
        known.setdefault(verdict, []).append(f"{name} ({signed(gap)}, {means[name][2]:.2f} kept)")
    return [*lines, f"At {at}, against SHARED: {'; '.join(f'{verdict}: ' + ', '.join(of) for verdict, of in known.items())}."]
