"""Is isolation needed? The NON-SHARED adapters of all languages, of a script or of a family become one adapter, without training.

mean: of the rows. TIES (Yadav et al. 2023, arXiv 2306.01708): of each row's change since its draw the largest fifth is kept, each
weight's sign is that of the changes' sum, and the changes of that sign are averaged. Adapters of one seed begin with the same
draw, which is what makes their factors comparable.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..languages import LANGUAGES
from ..probes import Counts, Probe, State
from ..spans import f1_from_counts
from ..study import Study, rated_label
from ..summary import by_label, final, mean, script
from ..units import units
from .pairs import trials_of_learners
from .section import Bars, Needs, Section

if TYPE_CHECKING:
    from torch import Tensor

    from ...models.slots import Slot
    from ..corpus import Corpus

SHAPE = {"label": str, "seed": int, "locale": str, "part": str, "counts": ([int], None)}
KEPT = 0.2  # of a row's changes, by TIES
OWN, MERGED = "own head", "merged head"
WAYS = ("mean of all", "TIES of all", "mean of its script", "mean of its family")


def merged(rows: Sequence["Tensor"], slots: Mapping[str, "Slot"], part: str) -> "Tensor":
    """One row of several. rows: the draw, the members, and for `OWN` the row whose head it gets."""
    import torch  # only here: a report needs none

    way, head = part.split(", ")
    own = rows[-1] if head == OWN else None
    start, members = rows[0], torch.stack(list(rows[1 : len(rows) - (own is not None)]))
    row = start + ties(members - start) if way.startswith("TIES") else members.mean(0)
    for name, slot in slots.items():
        if own is not None and name.startswith("head."):
            columns = slice(slot.start, slot.start + int(np.prod(slot.shape)))
            row[columns] = own[columns]
    return row


def ties(changes: "Tensor") -> "Tensor":
    """TIES of changes [n, P]: trimmed, with the elected sign, averaged."""
    import torch

    count = max(1, round(KEPT * changes.shape[1]))
    least = changes.abs().topk(count, 1).values[:, -1:]
    changes = torch.where(changes.abs() >= least, changes, 0)
    agree = (changes * changes.sum(0).sign()) > 0
    return torch.where(agree, changes, 0).sum(0) / agree.sum(0).clamp(min=1)


def plan(config: Config, study: Study) -> Needs:
    """Probes of every way, with either head."""
    probes = []
    for trial in trials_of_learners(study):
        learner = dict(zip(trial.order, trial.learners, strict=True))
        for locale in trial.order:
            known = LANGUAGES.get(locale)
            groups = {
                "all": list(trial.order),
                "its script": [other for other in trial.order if script(other) == script(locale)],
                "its family": [other for other in trial.order if known and LANGUAGES[other].family == known.family],
            }
            for way in WAYS:
                members = groups[way.split(" of ")[1]]
                if len(members) < 2:
                    continue  # alone: its own adapter
                states = (State(learner[members[0]], 0), *(State(learner[other], 1) for other in members))
                for head in (OWN, MERGED):
                    part = f"{way}, {head}"
                    about = {"label": rated_label(config, trial), "seed": trial.seed, "locale": locale, "part": part}
                    of = (*states, State(learner[locale], 1)) if head == OWN else states
                    probes.append(Probe(merged, of, part, locale, about))
    return Needs(probes=probes)


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """What each probe is, with its counts."""
    probes = [probe for name, probe in study.probes if name == "merge"]
    return [probe.about | {"counts": count} for probe, count in zip(probes, counts, strict=True)]


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """Mean F1 of each way beside the languages' own adapters and SHARED."""
    findings, bars = [], []
    for label in dict.fromkeys(entry["label"] for entry in data):
        values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for entry in (entry for entry in data if entry["label"] == label and entry["counts"] is not None):
            values[entry["part"]][entry["seed"]].append(float(f1_from_counts([entry["counts"]])[0]))
        means = {part: [float(np.mean(f1)) for f1 in seeds.values()] for part, seeds in values.items()}
        if not means:
            findings.append(f"{label} diverged.")
            continue
        beside: dict[str, list[float]] = {}
        for name, runs in by_label(scores["runs"]).items():
            same = name.partition(" r=")[2] == label.partition(" r=")[2]  # the rank, and the rate where there are several
            ended = [run for run in runs if same and run["strategy"] in ("non-shared", "shared") and not run.get("diverged")]
            if ended:  # NON-SHARED once a seed, SHARED once an order and seed
                beside[name] = list(units(ended, [mean(final(run)) for run in ended]).values())
        bars.append(Bars(f"{label}: F1 over languages, adapters merged", means | beside, "F1"))
        best = max(means, key=lambda part: float(np.mean(means[part])))
        own = float(np.mean(beside[label])) if label in beside else np.nan
        of_all = {head: mean(means[f"mean of all, {head}"]) for head in (OWN, MERGED)}
        findings.append(
            f"{label}: own adapters reach {own:.2f} F1; their mean {of_all[MERGED]:.2f}, with each language's own head "
            f"{of_all[OWN]:.2f}. Best merged: {best}, {np.mean(means[best]):.2f}."
        )
    limits = (
        "Means of a script or family are over the languages that have another one of it in the study; the others are in all "
        "other bars.",
        f"TIES keeps a share of {KEPT} and adds the merged change once: no setting was chosen.",
    )
    question = "Without training, how much of what separate adapters know survives in one adapter?"
    return Section("Is isolation needed?", question, findings, limits, bars) if data else None
