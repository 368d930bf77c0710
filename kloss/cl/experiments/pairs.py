"""Who gives to whom? Every NON-SHARED adapter is scored on every language: transfer without an order, donors as rows."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..probes import Counts
from ..spans import f1_from_counts
from ..statistics import Floats
from ..study import Study, Trial, rated_label
from .section import Matrix, Needs, Section, Table, signed

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

SHAPE = {"label": str, "seed": int, "locales": [str], "counts": [[([int], None)]]}
RESAMPLED = 1000
SHOWN = 8  # languages in a table
SHARES = "Shares that effects explain are adjusted: of noise they explain nothing on average. What is below that is shown as 0 %."


def trials_of_learners(study: Study) -> list[Trial]:
    """A LoRA trial of NON-SHARED, of two languages or more, for each set of learners: orders share them."""
    own = [trial for trial in study.trials if trial.strategy == "non-shared" and len(trial.order) > 1]
    return list({frozenset(trial.learners): trial for trial in own}.values())


def plan(config: Config, study: Study) -> Needs:
    """Each adapter on every language."""
    trials = trials_of_learners(study)
    return Needs(cells=[(g, 1, locale) for trial in trials for g in trial.learners for locale in trial.order])


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """For each trial the counts of every adapter (row) on every language (column); None where it diverged."""
    entries = []
    for trial in trials_of_learners(study):
        cells = [[scores[g].get(1, {}).get(locale) for locale in trial.order] for g in trial.learners]
        about = {"label": rated_label(config, trial), "seed": trial.seed, "locales": list(trial.order)}
        entries.append(about | {"counts": cells})
    return entries


def additive(F: Floats) -> tuple[float, Floats, Floats]:
    """Mean, row effects and column effects of F's cells off the diagonal, by least squares; effects sum to 0.

    F: [n, n], NaN where nothing was measured. The effect of a row or column without a cell is NaN.
    """
    n = len(F)
    i, j = np.nonzero(~np.eye(n, dtype=bool) & ~np.isnan(F))
    measured = np.isin(np.arange(2 * n), [*i, *(n + j)])
    design = np.zeros((len(i) + 2, 2 * n + 1))
    cells = np.arange(len(i))
    design[cells, 0] = design[cells, 1 + i] = design[cells, 1 + n + j] = 1
    design[len(i), 1 : 1 + n], design[len(i) + 1, 1 + n :] = measured[:n], measured[n:]
    fit = np.linalg.lstsq(design, np.append(F[i, j], [0, 0]), rcond=None)[0]
    effects = np.where(measured, fit[1:], np.nan)
    return float(fit[0]), effects[:n], effects[n:]


def rest(F: Floats) -> Floats:
    """F less its mean and the effects of rows and columns."""
    mean, rows, columns = additive(F)
    return F - (mean + rows[:, None] + columns[None, :])


def explained(F: Floats) -> dict[str, float]:
    """Shares of the variance off the diagonal that donors, receivers, and both explain beyond chance.

    They are adjusted, as in `effects.Fit`: 0 is what effects of noise explain on average, and less is 0. NaN where as many
    effects fit any values.
    """
    mean, donors, receivers = additive(F)
    used = ~np.eye(len(F), dtype=bool) & ~np.isnan(F)
    cells, rows, columns = used.sum(), used.any(axis=1).sum(), used.any(axis=0).sum()
    total = float(np.square(F[used] - F[used].mean()).sum())

    def share(fit: Floats, fitted: int) -> float:
        if cells <= fitted:
            return np.nan
        left = float(np.square((F - fit)[used]).sum())
        return max(0.0, 1 - (left / (cells - fitted)) / (total / (cells - 1))) if total else 0.0

    d, r = donors[:, None] + 0 * F, receivers[None, :] + 0 * F
    return {
        "donors": share(F[used].mean() + d, rows),
        "receivers": share(F[used].mean() + r, columns),
        "both": share(mean + d + r, rows + columns - 1),
    }


def symmetry(F: Floats, draw: np.random.Generator) -> tuple[float, float, float]:
    """Correlation of i to j with j to i, donors' and receivers' effects taken out; its 95 % interval, languages resampled."""
    left = rest(F)

    def correlation(index: Any) -> float:
        i, j = np.triu_indices(len(index), 1)
        i, j = np.asarray(index)[i], np.asarray(index)[j]
        used = (i != j) & ~np.isnan(left[i, j]) & ~np.isnan(left[j, i])
        one, other = left[i, j][used], left[j, i][used]
        spread = np.sqrt(np.square(one).sum() * np.square(other).sum())
        return float((one * other).sum() / spread) if spread else 0.0

    values = [correlation(draw.integers(len(F), size=len(F))) for _ in range(RESAMPLED)]
    low, high = np.quantile(values, (0.025, 0.975))
    return correlation(np.arange(len(F))), float(low), float(high)


def ranking(given: Floats, received: Floats, locales: Sequence[str], *, largest: bool) -> list[tuple[str, ...]]:
    """Rows of a table: the languages with the largest or smallest effects of both kinds. Effects that are NaN are left out."""
    columns = []
    for effects in (given, received):
        known = ((effect, locale) for effect, locale in zip(effects, locales, strict=True) if effect == effect)
        columns.append([(locale, signed(effect, 3)) for effect, locale in sorted(known, reverse=largest)[:SHOWN]])
    return [(*left, *right) for left, right in zip_longest(*columns, fillvalue=("", ""))]


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """Heat map, donors and receivers for each kind of NON-SHARED adapters; mean over seeds."""
    findings, matrices, tables = [], [], []
    for label in dict.fromkeys(entry["label"] for entry in data):
        locales = scores["corpus"]["locales"]
        stacked = []
        for entry in (entry for entry in data if entry["label"] == label):
            at = [entry["locales"].index(locale) for locale in locales]
            f1 = [[np.nan if c is None else float(f1_from_counts([c])[0]) for c in row] for row in entry["counts"]]
            stacked.append(np.array(f1)[np.ix_(at, at)])
        if np.isnan(stacked).all():
            findings.append(f"{label} diverged.")
            continue
        measured = [np.where(np.isnan(one), 0, one) for one in stacked]
        seen = sum((~np.isnan(one)).astype(float) for one in stacked)
        F = np.where(seen > 0, sum(measured) / np.maximum(seen, 1), np.nan)
        own, off = np.diag(F), F[~np.eye(len(F), dtype=bool)]
        if np.isnan(off).all():
            continue  # of one language: earlier versions kept it
        _, donors, receivers = additive(F)
        shares = explained(F)
        findings.append(
            f"{label}: on its own language an adapter reaches {np.nanmean(own):.2f} F1, on another one {np.nanmean(off):.2f} "
            f"({np.nanmin(off):.2f} to {np.nanmax(off):.2f})."
        )
        if shares["both"] == shares["both"]:
            findings.append(
                f"{label}: beyond chance who gives explains {shares['donors']:.0%} of how transfer varies, who receives "
                f"{shares['receivers']:.0%}, both {shares['both']:.0%}."
            )
        if len(locales) >= 5:
            r, low, high = symmetry(F, np.random.default_rng(0))
            known = "" if low <= 0 <= high else f": languages that give to each other {'do so both ways' if r > 0 else 'differ'}"
            text = f"{label}: the rest is symmetric to r = {r:.2f} ({low:.2f} to {high:.2f}){known}."
            findings.append(text.replace("-0.", "−0."))
        matrices.append(Matrix(f"{label}: F1 of each adapter (row) on each language (column)", locales, F, "adapter of"))
        lines = ranking(donors, receivers, locales, largest=True)
        tables.append(Table(f"{label}: best donors and receivers", ("donor", "effect on F1", "receiver", "effect on F1"), lines))
    limits = (
        "Effects are differences from the average pair, one measurement a pair and seed: small ones are noise.",
        SHARES,
        "Every adapter was trained on as many utterances, not as many tokens.",
    )
    question = "What does an adapter trained on one language do for each other one?"
    return Section("Who gives to whom?", question, findings, limits, (), matrices, tables) if findings else None
