"""The data of the section on languages: who lost, who destroyed, and what of it script, labels or positions explain."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..cl import metrics
from ..cl.effects import Contrast, by_character, contrasts, fit
from ..cl.languages import LANGUAGES
from ..cl.statistics import Interval
from ..cl.summary import by_language, change, final, impact, lost, matrices, mean, script, spaced
from ..cl.units import Run
from . import figures
from .cells import Cell, between, counted, number
from .figures import colour_of

COLUMNS = 4  # most strategies in the tables


def languages(corpus: Mapping[str, Any], sequential: Mapping[str, Sequence[Run]], focus: str | None) -> dict[str, Any]:
    """F1 by language and by script, and what explains what was lost under the strategy `focus`; None: none could lose any."""
    locales, tokens = corpus["locales"], corpus.get("tokens_per_word") or {}
    columns = list(sequential)[:COLUMNS]
    kinds = ((final, False), (lost(change), True), (lost(metrics.retained), False))
    scores = [(by_language(sequential[label], measure), sign) for label in columns for measure, sign in kinds]

    def cells(members: Sequence[str]) -> list[str]:
        """Subwords per word, then F1, its change and the share kept under each strategy of `columns`: means over locales."""
        f1 = [number(mean([mean(score.get(m, [])) for m in members]), sign=sign) for score, sign in scores]
        return [number(mean([tokens.get(m) for m in members]), 2), *f1]

    scripts: dict[str, list[str]] = {}
    for locale in locales:
        scripts.setdefault(script(locale), []).append(locale)
    by_script = [
        (Cell(name, colour=colour_of(members[0])), str(len(members)), *cells(members))
        for name, members in sorted(scripts.items(), key=lambda item: (-len(item[1]), item[0]))
    ]
    names = {m: LANGUAGES[m].name if m in LANGUAGES else "" for m in locales}
    by_locale = [
        (f"{m} {name}", script(m), "character" if by_character(m) else "word", "yes" if spaced(m) else "no", *cells([m]))
        for m, name in names.items()
    ]
    return {
        "focus": focus,
        "columns": columns,
        "by_script": by_script,
        "by_locale": by_locale,
        **(losses(sequential[focus]) if focus else {}),
    }


def _differences(of_change: Contrast, of_kept: Contrast) -> list[str]:
    """Which of a contrast's two tests is below 0.05, in words."""
    named = ((of_change, "change of F1"), (of_kept, "share kept"))
    return [f"{test.name} in the {what} ({number(test.difference, 2, True)})" for test, what in named if test.p_value < 0.05]


def _effect(effect: float, interval: Interval) -> Cell:
    return Cell(number(effect, sign=True), between(*interval))


def losses(runs: Sequence[Run]) -> dict[str, Any]:
    """What languages lost and destroyed in the runs of one strategy, and what of it positions and groups of languages explain."""
    measures = {"impact": impact, "change of F1": lost(change), "share kept": lost(metrics.retained)}
    changes, kept = (by_language(runs, measures[name]) for name in ("change of F1", "share kept"))
    fits = {name: fit(runs, measure) for name, measure in measures.items()}
    orders = len({tuple(order) for order, _ in matrices(runs)})
    destroyed = "What training each did to those before it (MBT, impact)"
    of_impact = fits["impact"]
    if of_impact is None:
        few = f"{counted(orders, 'order')}: mostly the place in the order, not the language"
        panel = figures.bars(destroyed, by_language(runs, impact), "mean change of F1", warning=few)
    else:
        effects = {m: (effect, interval) for m, (effect, interval) in of_impact.effects.items() if effect == effect}
        intervals = {m: (interval.low, interval.high) for m, (_, interval) in effects.items()}
        bars = {m: [effect] for m, (effect, _) in effects.items()}
        panel = figures.bars(f"{destroyed}, place in the order taken out", bars, "against the average language", intervals)
    explained = []
    for name, result in fits.items():
        if result is not None:
            apart = [m for m, (_, interval) in result.effects.items() if interval.low > 0 or interval.high < 0]
            shares = (number(share, 2) for share in (result.position, result.language, result.both, result.learned))
            of = f"{len(apart)} of {len(result.effects)}" + (f": {' '.join(apart)}" if 0 < len(apart) <= 6 else "")
            explained.append((name, *shares, of))
    effects_of = {name: result.effects for name, result in fits.items() if result is not None}
    by_effect = [
        (f"{m} {LANGUAGES[m].name if m in LANGUAGES else ''}", *(_effect(*effects[m]) for effects in effects_of.values()))
        for m in sorted(changes)
        if all(m in effects for effects in effects_of.values())
    ]
    means = [{m: mean(values) for m, values in of.items()} for of in (changes, kept)]
    tests = list(zip(*map(contrasts, means), strict=True))
    rows = []
    for of_change, of_kept in tests:
        sizes = [f"{counted(n, 'language')} in {f} famil{'y' if f == 1 else 'ies'}" for n, f in zip(*of_change[1:3], strict=True)]
        row: list[str | Cell] = [Cell(of_change.name, " against ".join(sizes))]
        for test in (of_change, of_kept):
            row.append(Cell(number(test.difference, sign=True), between(*test.interval)))
            row.append("< 0.001" if test.p_value < 0.001 else number(test.p_value))
        rows.append(row)
    return {
        "panels": [
            figures.bars("F1 at the end minus F1 when learned", changes, "change of F1"),
            figures.bars("Share of the F1 when learned that is kept at the end", kept, "F1 at the end / when learned"),
            panel,
        ],
        "explained": explained,
        "effects": by_effect if effects_of else [],
        "measures": list(effects_of),
        "orders": orders,
        "contrasts": rows,
        "tests": sum(test.p_value == test.p_value for pair in tests for test in pair),
        "differ": [name for test in tests for name in _differences(*test)],
    }
