"""Do some languages destroy more, or only later ones? A few languages are pinned to the start, the middle or the end of each
order, the others staying as they were: what differs between the three is their place alone.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..languages import check_locales
from ..learner import Experience
from ..probes import Counts
from ..spans import f1_from_counts
from ..statistics import crossed_interval
from ..study import Study, Trial, rated_label
from .section import Bars, Needs, Section, Table, between, signed

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

SHAPE = {
    "label": str, "order_name": str, "seed": int, "place": str, "order": [str], "pinned": [str], "end": [([int], None)],
    "learned": [([int], None)],
}  # fmt: skip
AT = {"start": "at the start", "middle": "in the middle", "end": "at the end"}
POSITIONS = tuple(AT)


def pinned_order(order: Sequence[str], pinned: Sequence[str], place: str) -> tuple[str, ...]:
    """An order with some of its languages moved together to a place."""
    others = [locale for locale in order if locale not in pinned]
    at = {"start": 0, "middle": len(others) // 2, "end": len(others)}[place]
    return (*others[:at], *pinned, *others[at:])


def _designs(config: Config, study: Study) -> list[tuple[Trial, str, tuple[str, ...], list[str]]]:
    """(trial of SHARED, place, order, pinned languages), for every order and seed. Raises UserError for an unknown language."""
    designs = []
    for trial in (trial for trial in study.trials if trial.strategy == "shared"):
        pinned = [locale for locale in check_locales(config.pinned) if locale in trial.order]
        if pinned and len(pinned) < len(trial.order):
            designs += [(trial, place, pinned_order(trial.order, pinned, place), pinned) for place in POSITIONS]
    return designs


def _learner(study: Study, trial: Trial, order: Sequence[str]) -> Any:
    return replace(study.learners[trial.learners[0]], experiences=tuple(Experience((locale,)) for locale in order))


def plan(config: Config, study: Study) -> Needs:
    """A SHARED learner for each place, scored at the end, and on pinned languages when they were learned."""
    learners = []
    for trial, _, order, pinned in _designs(config, study):
        to_score = {order.index(locale) + 1: [locale] for locale in pinned} | {len(order): list(order)}
        learners.append((_learner(study, trial, order), to_score))
    return Needs(learners=learners)


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """For each learner the counts of all languages at the end, and of pinned ones when learned."""
    entries = []
    for trial, place, order, pinned in _designs(config, study):
        own = scores[study.learners.index(_learner(study, trial, order))]
        end = [own.get(len(order), {}).get(locale) for locale in order]
        learned = [own.get(order.index(locale) + 1, {}).get(locale) for locale in pinned]
        about = {"label": rated_label(config, trial), "order_name": trial.order_name, "seed": trial.seed, "place": place}
        entries.append(about | {"order": list(order), "pinned": pinned, "end": end, "learned": learned})
    return entries


def _others(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The order of the languages that are not pinned. Learners of one place that agree in it, and in the seed, are one."""
    return tuple(locale for locale in entry["order"] if locale not in entry["pinned"])


def _listed(texts: Sequence[str], last: str) -> str:
    return f" {last} ".join(filter(None, (", ".join(texts[:-1]), texts[-1])))


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """F1 of pinned and other languages by place, and the differences between places, paired by the others' order and seed."""
    findings, bars, tables = [], [], []
    for label in dict.fromkeys(entry["label"] for entry in data):
        values: dict[str, dict[str, dict[tuple, float]]] = defaultdict(lambda: defaultdict(dict))
        pinned: list[str] = []
        for entry in (entry for entry in data if entry["label"] == label):
            if None in (*entry["end"], *entry["learned"]):
                continue  # it diverged
            pinned, f1 = entry["pinned"], dict(zip(entry["order"], f1_from_counts(entry["end"]), strict=True))
            key = _others(entry), entry["seed"]
            values["pinned, at the end"][entry["place"]][key] = float(np.mean([f1[locale] for locale in pinned]))
            values["pinned, when learned"][entry["place"]][key] = float(np.mean(f1_from_counts(entry["learned"])))
            values["others, at the end"][entry["place"]][key] = float(np.mean([f1[locale] for locale in _others(entry)]))
        ended = [place for place in POSITIONS if place in values["others, at the end"]]
        if not ended:
            findings.append(f"{label} diverged.")
            continue
        for kind, places in values.items():
            bars.append(Bars(f"{label}: F1 of {kind}", {place: list(places[place].values()) for place in ended}, "F1"))
        rows = []
        for kind, places in values.items():
            for one, other in (("end", "start"), ("middle", "start"), ("end", "middle")):
                pairs = {key: places[one][key] - places[other][key] for key in places[one] if key in places[other]}
                if pairs:
                    mean = float(np.mean(list(pairs.values())))
                    rows.append((kind, f"{one} − {other}", signed(mean, 3), between(crossed_interval(pairs), 3)))
        if rows:
            head = ("F1 of", "places", "difference", "95 % interval")
            tables.append(Table(f"{label}: differences between places", head, rows))
        own, rest = (
            _listed([f"{np.mean(list(values[kind][place].values())):.2f}" for place in ended], "and")
            for kind in ("pinned, at the end", "others, at the end")
        )
        lost = [AT[place] for place in POSITIONS if place not in ended]
        findings.append(
            f"{label}, {', '.join(pinned)}: learned {_listed([AT[place] for place in ended], 'or')} of a sequence they end at "
            f"{own} F1; the others at {rest}." + (f" Learned {_listed(lost, 'or')}, every run diverged." if lost else "")
        )
    orders = len({_others(entry) for entry in data})
    limits = (
        f"{orders} order{'s' * (orders != 1)} of the languages that are not pinned; intervals are over these and seeds. Orders "
        "that differ in pinned languages alone are one.",
    )
    question = "The same languages at the start, in the middle and at the end of the same orders: does it matter, and to whom?"
    return Section("Languages or places?", question, findings, limits, bars, (), tables) if data else None
