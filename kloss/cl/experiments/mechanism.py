"""What goes with forgetting? The share kept of each language in each run of SHARED against what the language is and where in the
order it stands: a regression over the score matrices, for which nothing is trained.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...config import Config
from ..effects import FEWEST_ORDERS, by_character, family
from ..metrics import FLOOR, retained, when_learned
from ..probes import Counts
from ..regression import Ints, Regression, regress
from ..study import Study
from ..summary import by_label, script
from ..units import Run
from .section import Needs, Scatter, Section, Table, between, signed

if TYPE_CHECKING:  # a report reads experiments, and needs no torch
    from ..corpus import Corpus

SHAPE = {"locales": [str], "overlap": [[float]]}
SHOWN = 8  # most figures
SCRIPT = "script of the last"  # whether it has the script of the language that is learned last
PROPERTIES = (
    "languages learned later", "F1 when learned", "subwords a word", "overlap with later ones", SCRIPT, "labels by character",
    "training utterances",
)  # fmt: skip


def plan(config: Config, study: Study) -> Needs:
    """The cells that it reads, which R has anyway."""
    trials = [trial for trial in study.trials if trial.strategy == "shared" and len(trial.order) > 1]
    steps = [(trial, i, locale) for trial in trials for i, locale in enumerate(trial.order, 1)]
    return Needs(cells=[(trial.learners[0], i, m) for trial, own, m in steps for i in (own, len(trial.order))])


def record(config: Config, corpus: "Corpus", study: Study, scores: Any, counts: list[Counts]) -> list[dict[str, Any]]:
    """One entry. overlap: share of a language's (row) training tokens that the training text of another one (column) has too."""
    if not plan(config, study).cells:
        return []
    tokens = np.stack([_tokens(corpus, locale) for locale in corpus.locales])
    overlap = [[round(float(own[other > 0].sum() / max(own.sum(), 1)), 4) for other in tokens] for own in tokens]
    return [{"locales": list(corpus.locales), "overlap": overlap}]


def _tokens(corpus: "Corpus", locale: str) -> Ints:
    """[V]: how often each token is in the training text."""
    tokens = np.bincount(corpus.sentences(locale, "train").input_ids, minlength=corpus.vocab_size)
    tokens[[corpus.bos_id, corpus.eos_id]] = 0
    return tokens


def observations(runs: Sequence[Run], corpus: Mapping[str, Any], entry: Mapping[str, Any]) -> list[tuple]:
    """(share kept, values of PROPERTIES, order, seed, locale) of each language that was learned and is not the last of its run.

    corpus: of scores.json. Runs of one order and seed count once, those that diverged not at all.
    """
    number, overlap = {locale: i for i, locale in enumerate(entry["locales"])}, np.array(entry["overlap"])
    subwords, utterances = corpus.get("tokens_per_word") or {}, corpus["train_utterances"]
    rows = []
    for (order, seed), R in {(tuple(run["order"]), run["seed"]): run["R"] for run in runs if not run.get("diverged")}.items():
        kept, learned = retained(R), when_learned(R)
        for i, locale in enumerate(order[:-1]):
            later = [number[other] for other in order[i + 1 :]]
            common = float(overlap[number[locale], later].mean())
            alike, character = script(locale) == script(order[-1]), by_character(locale)
            facts = (len(later), learned[i], subwords.get(locale, 0), common, alike, character, utterances.get(locale, 0))
            rows.append((float(kept[i]), facts, order, seed, locale))
    return [row for row in rows if row[0] == row[0]]


def fit(rows: Sequence[tuple]) -> Regression:
    """The regression over `observations`. With few orders they are no factor, and the last language's script has no effect."""
    kept, facts, orders, seeds, locales = zip(*rows, strict=True)
    properties = dict(zip(PROPERTIES, np.array(facts, dtype=np.float64).T, strict=True))
    by_order, runs, families = (
        np.unique([str(level) for level in levels], return_inverse=True)[1]
        for levels in (orders, zip(orders, seeds, strict=True), map(family, locales))
    )
    few = len(set(orders)) < FEWEST_ORDERS
    known = {name: values for name, values in properties.items() if not (few and name == SCRIPT)}
    result = regress(np.array(kept), known, runs, [families] if few else [families, by_order])
    groups = "families" if few else "families or orders"
    left_out = {name: reason.replace("groups", groups) for name, reason in result.left_out.items()}
    return result._replace(left_out=left_out | ({SCRIPT: f"takes {FEWEST_ORDERS} orders"} if few else {}))


def analyse(scores: Mapping[str, Any], data: list[dict[str, Any]]) -> Section | None:
    """The effects of properties on the share kept, one fit for each kind of SHARED."""
    findings: list[str] = []
    tables, scatters = [], []
    orders = 0
    for label, runs in by_label(scores["runs"]).items():
        if runs[0]["strategy"] != "shared" or not data:
            continue
        rows = observations(runs, scores["corpus"], data[0])
        if not rows:
            none = f"{label}: no language was learned ({FLOOR:.2f} F1) before the last one, so nothing could be lost."
            findings.append(f"{label} diverged." if all(run.get("diverged") for run in runs) else none)
            continue
        result, orders = fit(rows), max(orders, len({row[2] for row in rows}))
        findings += _findings(label, rows, result)
        lines = [
            (name, f"{e.deviation:.3g}", signed(e.effect, 3), between(e.interval, 3), signed(e.alone, 3))
            for name, e in result.effects.items()
        ]
        scatters += _scatters(label, rows, result)
        head = ("property", "one deviation", "effect on the share kept", "95 % interval", "alone")
        if lines:
            tables.append(Table(f"{label}: one standard deviation more of a property, the others being equal", head, lines))
    limits = (
        "This is correlation: no language was given its properties by chance, so none of them is shown to be a cause.",
        "F1 when learned is what the share kept is a share of: chance in it alone makes an effect below 0.",
        "Intervals take families to be independent"
        + (", and orders." if orders >= FEWEST_ORDERS else f"; chance of orders is in them from {FEWEST_ORDERS} orders on.")
        + " Languages of one script and several families may be alike all the same.",
        "Overlap is the share of a language's training tokens that a later language's training text has too, a mean over these.",
    )
    question = (
        "Do languages keep less that are learned early, cut into more subwords, or unlike those that come later? The share kept "
        "beside their properties, each with the others taken out."
    )
    title = "What goes with forgetting?"
    return Section(title, question, findings, limits, (), (), tables, scatters[:SHOWN]) if findings else None


def _scatters(label: str, rows: Sequence[tuple], result: Regression) -> list[Scatter]:
    """The share kept over each property whose effect can be told."""
    kept, facts = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], np.float64)
    drawn = []
    for name, effect in result.effects.items():
        slopes = effect.effect / effect.deviation, effect.alone / effect.deviation
        x = facts[:, PROPERTIES.index(name)]
        drawn.append(Scatter(f"{label}: {name}", x, kept, [row[4] for row in rows], name, "share kept", *slopes))
    return drawn


def _findings(label: str, rows: Sequence[tuple], result: Regression) -> list[str]:
    known = {name: effect for name, effect in result.effects.items() if not effect.interval.low <= 0 <= effect.interval.high}
    unknown = [name for name in result.effects if name not in known]
    runs, languages = {row[2:4] for row in rows}, {row[4] for row in rows}
    families = {family(locale) for locale in languages}
    effects = [f"{name} ({signed(e.effect)}, {between(e.interval)})" for name, e in known.items()]
    of = f"{len(rows)} observations of {len(languages)} languages of {len(families)} families in {len(runs)} runs"
    lines = []
    if effects:
        lines.append(
            f"{label}: the share kept of a language goes with {' and '.join(effects)}, for a standard deviation more; {of}."
        )
    elif unknown:
        lines.append(f"{label}: no property is shown to go with the share kept of a language; {of}.")
    else:
        lines.append(f"{label}: {of} are too few to tell what goes with the share kept.")
    if unknown:
        lines.append(f"{label}: no evidence for {', '.join(unknown)}.")
    if result.left_out:
        named = [f"{name} ({reason})" for name, reason in result.left_out.items()]
        lines.append(f"{label}: not to be told apart here: {', '.join(named)}.")
    if result.explained == result.explained:
        lines.append(
            f"{label}: the {len(result.effects)} that can be told explain {max(result.explained, 0):.0%} of how the share varies "
            "among a run's languages; at 95 % one property in twenty goes with it by chance."
        )
    return lines
