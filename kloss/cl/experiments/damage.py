"""What does learning a language do to each other one? A learner that was trained on all languages is forked, a fork for each
language, and trained on that one again: no order, no position, and a causal matrix of what each did to each.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..learner import Experience, Learner
from ..metrics import FLOOR
from ..probes import Counts
from ..spans import f1_from_counts
from ..statistics import Floats, interval, measured_mean
from ..study import Study, Trial, rated_label
from ..summary import script
from .pairs import SHARES, additive, explained, ranking, rest
from .section import Matrix, Needs, Section, Table, signed

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

SHAPE = {"label": str, "seed": int, "locales": [str], "before": [([int], None)], "after": [[([int], None)]]}


def _trials(study: Study) -> list[Trial]:
    """A trial of joint LoRA training on two languages or more for each learner."""
    joint = [trial for trial in study.trials if trial.strategy == "lora-multi" and len(trial.order) > 1]
    return list({trial.learners: trial for trial in joint}.values())


def _fork(parent: Learner, locale: str) -> Learner:
    return replace(parent, experiences=(Experience((locale,)),), start=(parent, len(parent.experiences)))


def plan(config: Config, study: Study) -> Needs:
    """The forks, scored on every language."""
    parents = [(study.learners[trial.learners[0]], trial.order) for trial in _trials(study)]
    return Needs(learners=[(_fork(parent, locale), {1: list(order)}) for parent, order in parents for locale in order])


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """Counts of every language before the fork, and after each fork (row); None where it diverged."""
    entries = []
    for trial in _trials(study):
        (g,) = trial.learners
        forks = [study.learners.index(_fork(study.learners[g], locale)) for locale in trial.order]
        before = [scores[g].get(1, {}).get(locale) for locale in trial.order]
        after = [[scores[fork].get(1, {}).get(locale) for locale in trial.order] for fork in forks]
        about = {"label": rated_label(config, trial), "seed": trial.seed, "locales": list(trial.order)}
        entries.append(about | {"before": before, "after": after})
    return entries


def _f1(counts: Counts) -> float:
    return np.nan if counts is None else float(f1_from_counts([counts])[0])


def by_script(change: Floats, locales: list[str]) -> list[tuple[float, float]]:
    """For each language that was learned: mean change of others of its script, and of those of other scripts; NaN without any."""
    scripts = np.array([script(locale) for locale in locales])
    pairs = []
    for i, row in enumerate(change):
        others = np.arange(len(row)) != i
        alike = scripts == scripts[i]
        pairs.append((float(measured_mean(row[others & alike])), float(measured_mean(row[others & ~alike]))))
    return pairs


def less_harm(change: Floats, locales: list[str]) -> Floats:
    """For each language that was learned: how much less it harms those of its script than others; NaN without both.

    What each language does and suffers on average is taken out first, for all languages learned are tried on the same others.
    Else fragile ones of a script make one gap, which counts once for each language learned.
    A script's languages are alike to more, so some of its effect is taken out too: values are scaled by what is left of 1.
    All are NaN where nothing is left, as with one language of another script than all others.
    """
    alike = np.array([[float(script(one) == script(other)) for other in locales] for one in locales])
    gaps, left = ([a - b for a, b in by_script(rest(x), locales)] for x in (change, alike + 0 * change))
    scale = float(measured_mean(left))
    return np.array(gaps) / (scale if scale > 1e-9 else np.nan)


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """The matrix of changes, whom learning harms and what, alike scripts against others; mean over seeds."""
    findings, matrices, tables = [], [], []
    locales = scores["corpus"]["locales"]
    for label in dict.fromkeys(entry["label"] for entry in data):
        changes, levels = [], []
        for entry in (entry for entry in data if entry["label"] == label):
            at = [entry["locales"].index(locale) for locale in locales]
            before = np.array([_f1(counts) for counts in entry["before"]])[at]
            after = np.array([[_f1(counts) for counts in row] for row in entry["after"]])[np.ix_(at, at)]
            changes.append(after - before)
            levels.append(before)
        if np.isnan(changes).all():
            findings.append(f"{label} diverged, or all of its forks did.")
            continue
        if np.nanmean(levels) < FLOOR:
            findings.append(f"{label} learned nothing ({np.nanmean(levels):.2f} F1), so nothing could be harmed.")
            continue
        change = np.nanmean(changes, 0)
        off = change[~np.eye(len(change), dtype=bool)]
        findings.append(
            f"{label}, at {np.nanmean(levels):.2f} F1 on all languages: one of them learned again changes its own F1 by "
            f"{signed(np.nanmean(np.diag(change)))}, and that of each other one by {signed(np.nanmean(off))} on average "
            f"({signed(np.nanmin(off))} to {signed(np.nanmax(off))})."
        )
        shares = explained(change)
        if shares["both"] == shares["both"]:
            findings.append(
                f"{label}: beyond chance which language is learned explains {shares['donors']:.0%} of how the harm varies, which "
                f"one is harmed {shares['receivers']:.0%}, both {shares['both']:.0%}."
            )
        gaps = less_harm(change, locales)
        low, high, _ = interval(gaps)
        if low == low:
            known = "no evidence of a difference" if low <= 0 <= high else "less harm" if low > 0 else "more harm"
            findings.append(
                f"{label}: beyond what each language does and suffers on average, those of the learned one's script change by "
                f"{signed(float(np.nanmean(gaps)), 3)} against others ({signed(low, 3)} to {signed(high, 3)}): {known}."
            )
        matrices.append(
            Matrix(f"{label}: change of F1 of each language (column) by learning one (row)", locales, change, "learned")
        )
        _, learned, harmed = additive(change)
        lines = ranking(learned, harmed, locales, largest=False)
        head = ("learning it harms", "effect on F1", "it is harmed", "effect on F1")
        tables.append(Table(f"{label}: who harms and who is harmed most", head, lines))
    limits = (
        "Forks begin with fresh moments and a new warm-up, and are trained on utterances that their parent has seen.",
        "Effects are differences from the average pair, one measurement a pair and seed. Seeds are averaged.",
        SHARES,
    )
    question = "A learner of all languages is forked; each fork is trained on one of them again. What happens to the others?"
    return Section("Who harms whom?", question, findings, limits, (), matrices, tables) if data else None
