"""Is it the tokenizer's doing that languages of rare scripts are forgotten? Each SHARED learner learns again, in the same order
and from the same draw, with a tokenizer that is trained on text balanced by script, and a tiny backbone warmed up with it.

The study's tokenizer is trained on the training text as it comes, where most words have the commonest script.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..effects import contrast
from ..learner import BALANCED, Learner
from ..metrics import FLOOR
from ..probes import Counts
from ..statistics import Floats, measured_mean
from ..study import Study, Trial
from ..summary import MEASURES, by_label, mean, script
from .scripts import Means, difference, measured
from .section import SEQUENCE, Bars, Needs, Section, Table, along, between, or_unmeasured, sequence, signed, with_interval

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

SHAPE = {"label": str, "lr": float, "seed": int, "subwords": {str: float}, "study": SEQUENCE, "balanced": SEQUENCE}
ALIKE = 0.05  # subwords a word: two tokenizers that differ by no more in any language cut alike
KEPT = MEASURES.index("share kept")

Paired = dict[tuple, dict[str, Floats]]  # (order, seed) -> locale -> [2, 3]: MEASURES with the balanced tokenizer, the study's


def _learners(config: Config, study: Study) -> list[tuple[Trial, Learner, Learner]]:
    """(trial of SHARED, its learner, the one that learns again); none where no tokenizer is trained, or of one script."""
    if config.backbone != "tiny" or config.tokenizer:
        return []
    trials = [trial for trial in study.trials if trial.strategy == "shared" and len(set(map(script, trial.order))) > 1]
    own = [(trial, study.learners[trial.learners[0]]) for trial in trials]
    return [(trial, learner, replace(learner, tokenizer=BALANCED)) for trial, learner in own]


def plan(config: Config, study: Study) -> Needs:
    """A second learner for each one of SHARED, both scored on each language when learned and at the end."""
    learners = []
    for trial, *both in _learners(config, study):
        learners += [(learner, along(trial.order)) for learner in both]
    return Needs(learners=learners)


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """For each trial of SHARED the counts of both learners; None where one diverged. subwords: of the balanced tokenizer."""
    entries = []
    for trial, *both in _learners(config, study):
        own = corpus.under(BALANCED)
        entry: dict[str, Any] = {"label": trial.label, "lr": trial.lr, "seed": trial.seed}
        entry["subwords"] = {locale: round(own.tokens_per_word(locale), 3) for locale in corpus.locales}
        for name, learner in zip(("study", BALANCED), both, strict=True):
            entry[name] = sequence(trial.order, scores[study.learners.index(learner)])
        entries.append(entry)
    return entries


def paired(entries: Sequence[Mapping[str, Any]]) -> Paired:
    """Each language's measures with both tokenizers; what was not measured with one is NaN with both."""
    pairs: Paired = {}
    for entry in entries:
        balanced, study = measured(entry[BALANCED]), measured(entry["study"])
        both = {locale: np.stack([balanced[locale], study[locale]]) for locale in study}
        pairs[tuple(entry["study"]["order"]), entry["seed"]] = {m: one + 0 * one[::-1] for m, one in both.items()}
    return pairs


def over(pairs: Paired, locales: Sequence[str]) -> Means:
    """Means over some languages, by order and seed."""
    return {unit: measured_mean(np.stack([of[locale] for locale in locales]), axis=0) for unit, of in pairs.items()}


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """F1 and shares kept with both tokenizers by script, paired by order and seed, beside subwords a word."""
    findings: list[str] = []
    bars, tables = [], []
    before = scores["corpus"].get("tokens_per_word") or {}
    for label, runs in by_label(scores["runs"]).items():
        own = [entry for entry in data if (entry["label"], entry["lr"]) == (runs[0]["label"], runs[0]["lr"])]
        entries = [e for e in own if not any(None in e[of][part] for of in ("study", BALANCED) for part in ("learned", "end"))]
        if not entries:
            findings += [f"{label} diverged."] if own else []
            continue
        pairs, after = paired(entries), entries[0]["subwords"]
        groups = grouped(entries[0]["study"]["order"])
        balanced, study, *_ = difference(over(pairs, groups["all"]), "F1 when learned")
        if min(balanced, study) < FLOOR:
            findings.append(f"{label} learned nothing ({study:.2f} F1 when learned, {balanced:.2f} with the balanced tokenizer).")
            continue
        subwords = {name: [mean([of[m] for m in group]) for of in (before, after)] for name, group in groups.items()}
        cut = {name: f"{one:.2f} → {other:.2f}" for name, (one, other) in subwords.items()}
        if max(abs(after[m] - before[m]) for m in groups["all"]) <= ALIKE:
            findings.append(
                f"{label}: both tokenizers cut every language into as many subwords ({cut['all']} a word), so differences say "
                "nothing of them. With a smaller --vocabulary subwords are scarce."
            )
        common, others = list(groups)[1:3]
        findings += [_finding(label, name, len(groups[name]), cut[name], over(pairs, groups[name])) for name in (others, common)]
        findings += _between(label, common, groups, pairs)
        rows = []
        for name, group in groups.items():
            cells = [
                (or_unmeasured(one), _gap(gap, ends))
                for _, one, gap, ends in (difference(over(pairs, group), m) for m in MEASURES)
            ]
            rows.append((name, str(len(group)), cut[name], *[cell for pair in cells for cell in pair]))
        head = ("languages", "number", "subwords a word", *[text for m in MEASURES for text in (m, "difference")])
        tables.append(Table(f"{label}: the study's tokenizer → balanced, differences with 95 % intervals", head, rows))
        lines = []
        for m in sorted(groups["all"], key=lambda m: (script(m) != common, script(m), m)):
            kept = measured_mean([of[m] for of in pairs.values()], axis=0)[:, KEPT]
            lines.append((m, script(m), f"{before[m]:.2f} → {after[m]:.2f}", *map(or_unmeasured, (kept[1], kept[0]))))
        tables.append(Table(f"{label}, by language", ("language", "script", "subwords a word", "share kept", "balanced"), lines))
        values = {
            f"{name}, {of}": [float(means[s, KEPT]) for means in over(pairs, groups[name]).values()]
            for name in (common, others)
            for s, of in ((1, "as it comes"), (0, "balanced"))
        }
        bars.append(Bars(f"{label}: share kept, a dot for each order and seed", values, "share kept"))
    limits = (
        "Each tokenizer has one backbone, warmed up once. What chance does there is in the differences, but in no interval over "
        "orders and seeds; the comparison of scripts has it in part, for what it does to all languages alike falls out. Another "
        "--seed draws it anew.",
        "The backbones are tiny, and warmed up on the same text that adapters learn from, so they are no pretrained ones.",
        "Text is balanced by its words: a script with many languages has fewer of each. The two tokenizers have as many entries.",
    )
    question = (
        "Where text has mostly one script, so has a tokenizer's vocabulary, and other languages are cut into more subwords. Is "
        "less of them forgotten if each script has as much of the tokenizer's training text?"
    )
    return Section("Is it the tokenizer?", question, findings, limits, bars, (), tables) if data else None


def grouped(order: Sequence[str]) -> dict[str, list[str]]:
    """All languages, those of the commonest script, all others, then those of each other script."""
    scripts = [script(locale) for locale in order]
    common = min(set(scripts), key=lambda name: (-scripts.count(name), name))
    others = f"all but {common}"
    groups = {"all": list(order), common: [], others: [locale for locale in order if script(locale) != common]}
    for locale in sorted(order, key=lambda locale: (script(locale), locale)):
        groups.setdefault(script(locale), []).append(locale)
    return groups


def _finding(label: str, name: str, number: int, cut: str, means: Means) -> str:
    texts = [f"{cut} subwords a word"]
    for measure in MEASURES:
        balanced, study, gap, ends = difference(means, measure)
        known = f"{between(ends) or 'no interval'}{': no evidence of a difference' if ends.low <= 0 <= ends.high else ''}"
        texts.append(
            f"{measure} {study:.2f} → {balanced:.2f}, {signed(gap)} ({known})" if gap == gap else f"{measure} not measured"
        )
    return f"{label}, the study's tokenizer → the balanced one, {name} ({number}): {'; '.join(texts)}."


def _between(label: str, common: str, groups: Mapping[str, Sequence[str]], pairs: Paired) -> list[str]:
    """What languages of the commonest script keep beyond the others, with each tokenizer, and what balance changes of it."""
    kept = {m: measured_mean([of[m] for of in pairs.values()], axis=0)[:, KEPT] for m in groups["all"]}
    kept = {m: both for m, both in kept.items() if both[0] == both[0]}
    own, others = ([m for m in kept if (script(m) == common) == alike] for alike in (True, False))
    balanced, study, change = (
        contrast(common, {m: float(value(both)) for m, both in kept.items()}, own, others)
        for value in (lambda both: both[0], lambda both: both[1], lambda both: both[0] - both[1])
    )
    if change.difference != change.difference:
        return []
    known = "no evidence that it is the tokenizer's doing"
    if change.p_value < 0.05:
        narrower = abs(balanced.difference) < abs(study.difference)
        known = "so part of it is the tokenizer's doing" if narrower else "so balance makes it larger"
    ends = between(change.interval) or "no interval"
    return [
        f"{label}: {len(own)} {common} languages keep {signed(study.difference)} against {len(others)} others with the study's "
        f"tokenizer and {signed(balanced.difference)} with the balanced one, each family counted once; the change is "
        f"{signed(change.difference)} ({ends}; permutation test p = {change.p_value:.3f}): {known}."
    ]


def _gap(gap: float, ends: Any) -> str:
    return with_interval(gap, ends, 3) if gap == gap else "not measured"
