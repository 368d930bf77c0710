"""Averages of runs: by strategy, language and script.

A run is an entry of "runs" in scores.json. Runs that diverged are in no average.
All is computed from the score matrices R, so old run folders can be reported again.
"""

from collections.abc import Callable, Mapping, Sequence
from math import isnan, nan
from typing import Any

import numpy as np

from ..errors import UserError
from .languages import LANGUAGES
from .metrics import FLOOR, is_sequential, multi_hop_backward_transfer, retained, summarise, when_learned
from .statistics import NO_INTERVAL, Floats, Interval, Values, crossed_interval, measured_mean
from .units import Run, paired, traits, unit_of, units

Row = dict[str, Any]
AVERAGED = ("f1", "cbt", "kept", "cft", "fwt", "forgetting", "worst")  # kept: mean of `metrics.retained`
AT_THE_END = ("f1", "worst")  # read from R's last row alone
MOST_NAMES = 8  # of languages in a warning
LOSSES = ("cbt", "kept", "forgetting")  # no loss by construction where no language's learner changes after its own step


def summary_rows(scores: Mapping[str, Any]) -> list[Row]:
    """One `summary_row` per strategy, in order of appearance: "summary" of scores.json."""
    return [summary_row(label, runs) for label, runs in by_label(scores["runs"]).items()]


def summary_row(label: str, runs: Sequence[Run]) -> Row:
    """Averages of the runs of one strategy, JSON-ready.

    Each name of AVERAGED has four keys: NAME, its mean over units (None: undefined or not measured); NAME_low and NAME_high, its
    95 % interval over units (None with fewer than two, and for what is 0 by construction); NAME_df, the degrees of freedom of a
    t interval (None: a bootstrap). A unit is a value of its own, see `units`: copies of one learner count once.
    units: number of different final scores.
    can_forget: languages of a run that could be forgotten; where runs differ, of the run with most. None: no sequence.
    learned: the best F1 of any language when learned; below `metrics.FLOOR` nothing was learned.
    unlearned: the languages whose F1 when learned is below it, on average over runs.
    """
    summaries = [(run, summarise(run["R"], traits(run).own)) for run in runs if not run.get("diverged")]
    used = [run for run, _ in summaries]
    when = by_language(used, lambda run: when_learned(run["R"]))
    learned = {locale: f1 for locale, values in when.items() if not isnan(f1 := mean(values))}
    row = {
        "label": label,
        "strategy": runs[0]["strategy"],
        "runs": len(runs),
        "orders": len({run["order_name"] for run in runs}),
        "seeds": len({run["seed"] for run in runs}),
        "units": len({unit_of(run) for run in used}),
        "diverged": len(runs) - len(summaries),
        "trainable_parameters": runs[0].get("trainable_parameters"),
        "steps": runs[0].get("steps"),
        "languages": len(runs[0]["order"]),
        "can_forget": max(int(traits(run).can_change[:-1].sum()) for run in runs) if is_sequential(runs[0]["R"]) else None,
        "learned": max((value for values in when.values() for value in values if value == value), default=None),
        "unlearned": [locale for locale, f1 in learned.items() if f1 < FLOOR],
    }
    for name in AVERAGED:
        measured = [_kept(run) if name == "kept" else summary[name] for run, summary in summaries]
        values = units(used, measured, end=name in AT_THE_END)
        row[name] = sum(values.values()) / len(values) if values else None
        constructed = name in LOSSES and row["can_forget"] == 0
        row |= _named(name, NO_INTERVAL if constructed else crossed_interval(values))
    return row


def _kept(run: Run) -> float | None:
    """Mean share kept of the languages that could lose any."""
    kept = mean(lost(retained)(run)) if is_sequential(run["R"]) else nan
    return None if isnan(kept) else kept


def _named(name: str, interval: Interval) -> Row:
    low, high, df = interval
    return (
        {f"{name}_low": None, f"{name}_high": None, f"{name}_df": None}
        if isnan(low)
        else {f"{name}_low": low, f"{name}_high": high, f"{name}_df": df}
    )


def comparisons(scores: Mapping[str, Any]) -> list[Row]:
    """The strategy with the best final F1 against each other one: "comparisons" of scores.json, JSON-ready.

    Each has label, other, units (pairs of runs of one seed and order, copies counted once), the mean difference in F1 with its
    95 % interval: difference, difference_low, difference_high, difference_df; as in `summary_row`.
    """
    strategies = {label: [run for run in runs if not run.get("diverged")] for label, runs in by_label(scores["runs"]).items()}
    ends = {label: [_final(run) for run in runs] for label, runs in strategies.items()}
    means = {label: mean(list(units(runs, ends[label]).values())) for label, runs in strategies.items()}
    measured = [label for label in means if not isnan(means[label])]
    best = max(measured, key=means.__getitem__, default=None)
    rows = []
    for other in measured:
        if best is not None and other != best:
            pairs = paired(strategies[best], strategies[other], ends[best], ends[other])
            row = {
                "label": best,
                "other": other,
                "units": len(pairs),
                "difference": mean(list(pairs.values())) if pairs else None,
            }
            rows.append(row | _named("difference", crossed_interval(pairs)))
    return rows


def _final(run: Run) -> float | None:
    f1 = mean(final(run))
    return None if isnan(f1) else f1


def nothing_learned(rows: Sequence[Row]) -> bool:
    """Whether runs were measured, but no learner of any strategy reached `FLOOR` on a language it was trained on."""
    learned = [row["learned"] for row in rows if row["learned"] is not None]
    return bool(learned) and max(learned) < FLOOR


def warnings(rows: Sequence[Row], besides: Sequence[str] = ()) -> list[str]:
    """What must be read before any figure: nothing was learned, learners diverged. In the order of weight.

    besides: learners of experiments alone that diverged, with the reason: "diverged_besides" of scores.json.
    """
    best = max((row["learned"] for row in rows if row["learned"] is not None), default=0.0)
    floor = f"{FLOOR:.2f} F1 on a language just after its own training"
    lines = []
    if nothing_learned(rows):
        lines.append(
            f"Nothing was learned: no learner reached {floor} (the best: {best:.3f}). So nothing can be said of what was kept or "
            "lost; try another learning rate, more epochs or more utterances."
        )
    else:
        for row in rows:
            if row["learned"] is not None and row["learned"] < FLOOR:
                lines.append(f"{row['label']} learned nothing: it never reached {floor}; its other figures mean nothing.")
            elif row["unlearned"]:
                count, some = len(row["unlearned"]), ", ".join(row["unlearned"][:MOST_NAMES])
                more = f" and {count - MOST_NAMES} more" if count > MOST_NAMES else ""
                lines.append(
                    f"{row['label']} did not learn {count} of {row['languages']} languages, below {floor}: {some}{more}. "
                    "They pull its average down, and have nothing to lose."
                )
    for row in rows:
        if row["diverged"]:
            lines.append(f"{row['label']}: {row['diverged']} of {row['runs']} runs diverged and are in no average.")
    if besides:
        more = f" and {len(besides) - 1} more" if len(besides) > 1 else ""
        lines.append(f"Of the learners of experiments alone, {len(besides)} did not come to an end: {besides[0]}{more}.")
    return lines


def chosen_on_dev(scores: Mapping[str, Any], rows: Sequence[Row]) -> list[str]:
    """Of each strategy with several ranks or rates, the one with the best F1, if dev was scored: to be measured on test."""
    lines = []
    for strategy in dict.fromkeys(row["strategy"] for row in rows):
        several = [row for row in rows if row["strategy"] == strategy and row["f1"] is not None]
        if scores["corpus"].get("scored") == "dev" and len(several) > 1:
            best = max(several, key=lambda row: row["f1"])
            lines.append(
                f"Best on dev of {len(several)} settings of {strategy}: {best['label']}, F1 {best['f1']:.3f}. Run it alone with "
                "--eval-split test."
            )
    return lines


def best_on_dev(scores: Mapping[str, Any]) -> tuple[int, float]:
    """The adapters' rank and rate with the best final F1: the mean over strategies of that over runs.

    Only settings count with which every strategy of adapters ended all its runs.
    Raises UserError for scores on test, and where no setting counts.
    """
    if scores["corpus"].get("scored") != "dev":
        raise UserError("settings are chosen on dev, and this run was scored on test")
    settings: dict[tuple[int, float], dict[str, list[float]]] = {}
    for run in (run for run in scores["runs"] if run.get("rank") is not None):
        f1 = nan if run.get("diverged") else mean(final(run))
        settings.setdefault((run["rank"], run["lr"]), {}).setdefault(run["strategy"], []).append(f1)
    means = {setting: sum(map(np.mean, f1.values())) / len(f1) for setting, f1 in settings.items()}
    whole = [setting for setting, value in means.items() if not isnan(value)]
    if not whole:
        raise UserError("no rank and rate of adapters with which every strategy ended its runs")
    return max(whole, key=means.__getitem__)


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Label -> its runs. A label used with several learning rates is split by rate."""
    rates: dict[str, set[float | None]] = {}
    for run in runs:
        rates.setdefault(run["label"], set()).add(run.get("lr"))
    result: dict[str, list[Run]] = {}
    for run in runs:
        label = run["label"] if len(rates[run["label"]]) == 1 else f"{run['label']}, lr {run['lr']:g}"
        result.setdefault(label, []).append(run)
    return result


def matrices(runs: Sequence[Run]) -> list[tuple[list[str], Floats]]:
    """(order, R) of each run that did not diverge."""
    return [(run["order"], _matrix(run)) for run in runs if not run.get("diverged")]


MEASURES = ("F1 when learned", "F1 at the end", "share kept")


def measures(order: Sequence[str], R: object) -> dict[str, Floats]:
    """Locale -> [3], MEASURES of a sequence; NaN for the share kept of the last, and of what was not learned."""
    R = np.array(R, dtype=np.float64)
    return dict(zip(order, np.column_stack([when_learned(R), R[-1], retained(R)]), strict=True))


Measure = Callable[[Run], Floats]  # a run -> [T], by position in its order


def by_language(runs: Sequence[Run], measure: Measure) -> dict[str, list[float]]:
    """Locale -> one value per run that did not diverge."""
    result: dict[str, list[float]] = {}
    for run in runs:
        if not run.get("diverged"):
            for locale, value in zip(run["order"], measure(run), strict=True):
                result.setdefault(locale, []).append(float(value))
    return result


def lost(metric: Callable[[Floats], Floats]) -> Measure:
    """A metric of what later training did to each language; NaN where it could do nothing (a group of one language)."""
    return lambda run: np.where(traits(run).can_change, metric(_matrix(run)), nan)


def impact(run: Run) -> Floats:
    """MBT of reading "impact"; NaN for a language whose step trains no earlier language's learner."""
    return np.where(traits(run).can_destroy, multi_hop_backward_transfer(run["R"]), nan)


def final(run: Run) -> Floats:
    """[T]: F1 at the end."""
    return _matrix(run)[-1]


def _matrix(run: Run) -> Floats:
    return np.array(run["R"], dtype=np.float64)


def change(R: Floats) -> Floats:
    """[T]: R[T,i] - R[i,i], the change of each language after its own step; NaN for the last."""
    result = R[-1] - np.diagonal(R[1:])
    result[-1] = np.nan
    return result


def mean(values: Values) -> float:
    """`measured_mean` as a float."""
    return float(measured_mean(values))


def script(locale: str) -> str:
    """Script of a locale; "unknown" outside MASSIVE."""
    return LANGUAGES[locale].script if locale in LANGUAGES else "unknown"


def spaced(locale: str) -> bool:
    """Whether the language is written with spaces between words; True outside MASSIVE."""
    return locale not in LANGUAGES or LANGUAGES[locale].spaced
