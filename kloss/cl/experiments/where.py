"""Where is it lost? A learner at its end gets one part of itself back as it was when it had just learned a language.

The part is its head, its adapter, the adapter's A or B, or the adapter of a quarter of the layers. What comes back with it was
lost there; what does not was lost in what was not given back, or in how both fit together.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..metrics import FLOOR
from ..probes import Counts, Probe, State
from ..spans import f1_from_counts
from ..study import Study
from ..summary import by_label
from .section import Bars, Needs, Section

if TYPE_CHECKING:
    from torch import Tensor

    from ...models.slots import Slot
    from ..corpus import Corpus

SHAPE = {"label": str, "lr": float, "order_name": str, "seed": int, "locale": str, "part": str, "counts": ([int], None)}
QUARTERS = 4
PARTS = ("head", "A", "B", *(f"layers {quarter}" for quarter in range(QUARTERS)), "adapter")


def holds(part: str, name: str, layers: int) -> bool:
    """Whether a part holds the slot of a name, such as 0.qkv.a or head.weight, in a backbone of so many layers."""
    if name.startswith("head.") or part == "head":
        return name.startswith("head.") and part == "head"
    if part.startswith("layers"):
        return int(name.split(".")[0]) in layers_of(int(part.split()[1]), layers)
    return part == "adapter" or name.endswith(f".{part.lower()}")


def layers_of(quarter: int, layers: int) -> range:
    """The layers, counted from 0, of a quarter."""
    return range(quarter * layers // QUARTERS, (quarter + 1) * layers // QUARTERS)


def give_back(rows: Sequence["Tensor"], slots: Mapping[str, "Slot"], part: str) -> "Tensor":
    """The first row, with a part of the second."""
    end, learned = rows
    row, layers = end.clone(), 1 + max(int(name.split(".")[0]) for name in slots if not name.startswith("head."))
    for name, slot in slots.items():
        if holds(part, name, layers):
            columns = slice(slot.start, slot.start + int(np.prod(slot.shape)))
            row[columns] = learned[columns]
    return row


def plan(config: Config, study: Study) -> Needs:
    """A probe for each part of each LoRA learner that trains on several languages, and each of these but its last."""
    probes: dict[tuple, Probe] = {}
    for trial in study.trials:
        for g in trial.learners:
            learner, run = study.learners[g], {"label": trial.label, "order_name": trial.order_name, "seed": trial.seed}
            last = len(learner.experiences)
            for step in range(1, last if learner.rank is not None else 0):
                (locale,) = learner.experiences[step - 1].locales
                states = State(g, last), State(g, step)
                for part in PARTS:
                    about = run | {"lr": trial.lr, "locale": locale, "part": part}
                    probes.setdefault((states, part), Probe(give_back, states, part, locale, about))
    return Needs(probes=list(probes.values()))


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """What each probe is, with its counts."""
    probes = [probe for name, probe in study.probes if name == "where"]
    return [probe.about | {"counts": count} for probe, count in zip(probes, counts, strict=True)]


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """F1 of the languages learned before the last, when learned, at the end, and with each part given back."""
    layers, findings, bars = scores["backbone"]["layers"], [], []
    runs = {(run["label"], run["lr"], run["order_name"], run["seed"]): run for run in scores["runs"]}
    found: dict[tuple, dict[str, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
    for entry in data:
        key = tuple(entry[name] for name in ("label", "lr", "order_name", "seed"))
        if entry["counts"] is not None and key in runs:
            found[key][entry["locale"]][entry["part"]] = float(f1_from_counts([entry["counts"]])[0])
    rated = {(run["label"], run["lr"]): name for name, of in by_label(scores["runs"]).items() for run in of}
    for setting in dict.fromkeys(key[:2] for key in found):
        label, values = rated[setting], defaultdict[str, list[float]](list)
        for key, languages in found.items():
            if key[:2] != setting:
                continue
            run = runs[key]
            for name, row in (("when learned", None), ("at the end", -1)):
                column = {locale: run["order"].index(locale) for locale in languages}
                cells = [run["R"][j + 1 if row is None else row][j] for j in column.values()]
                values[name].append(float(np.mean([cell for cell in cells if cell is not None])))
            for part in PARTS:
                values[part].append(float(np.mean([parts[part] for parts in languages.values() if part in parts])))
        names = {part: _named(part, layers) for part in PARTS if _named(part, layers)}
        ordered = {"at the end": values["at the end"]} | {names[part]: values[part] for part in names}
        bars.append(Bars(f"{label}: F1 of earlier languages, with their own part given back",
                         ordered | {"when learned": values["when learned"]}, "F1"))  # fmt: skip
        findings += _findings(label, {name: float(np.mean(value)) for name, value in values.items()}, names)
    limits = ("The part is given back to a row that has moved on, so shares of parts need not add up to one.",)
    return Section("Where is it lost?", __doc__.split("\n")[0].split("? ")[1], findings, limits, bars) if bars else None


def _named(part: str, layers: int) -> str:
    """A part as the report says it; empty for a quarter without layers."""
    if not part.startswith("layers"):
        return f"own {part}"
    own = layers_of(int(part.split()[1]), layers)
    return "" if not own else f"own layer {own[0] + 1}" if len(own) == 1 else f"own layers {own[0] + 1}–{own[-1] + 1}"


def _findings(label: str, means: Mapping[str, float], names: Mapping[str, str]) -> list[str]:
    learned, end = means["when learned"], means["at the end"]
    lost = learned - end
    if not lost > FLOOR:
        return [f"{label} lost nothing to speak of on earlier languages ({learned:.2f} F1 when learned, {end:.2f} at the end)."]

    def share(part: str) -> str:
        return f"{(means[part] - end) / lost:.0%}"

    by_depth = [f"{names[part]} {share(part)}" for part in names if part.startswith("layers")]
    return [
        f"{label}: earlier languages fell from {learned:.2f} F1 to {end:.2f}. With the own adapter {share('adapter')} of that "
        f"comes back, with the own head {share('head')}; with the adapter's own A {share('A')}, with its B {share('B')}.",
        f"{label}, by depth: {', '.join(by_depth)}.",
    ]
