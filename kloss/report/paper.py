"""Beside the paper: its table and this run's, and what it found with what was found here."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..cl.effects import FEWEST_ORDERS, contrasts, fit
from ..cl.metrics import FLOOR, retained
from ..cl.statistics import Interval, crossed_interval
from ..cl.summary import Row, by_language, final, impact, lost, mean
from ..cl.units import Run, paired
from .cells import Cell, count, extent, number

PAPER_TABLE = (  # strategy, its name in the paper, F1 x 100, parameters
    ("multi", "MULTI", "75.03", "278 M"),
    ("non-shared", "NON-SHARED LoRA", "72–73", "278–2228 M"),
    ("vanilla", "VANILLA", "66", "278 M"),
    ("shared", "SHARED LoRA", "60–61", "5–43 M"),
)
MASSIVE = (52, 11514, 2974)  # languages, training and test utterances of each
RANKS = (32, 256)
DESTROYERS = ("zh-CN", "ja-JP")
FALL = 15  # points; the paper's SHARED falls by 15 to 30

JSON = Mapping[str, Any]
Runs = Mapping[str, Sequence[Run]]  # label -> its runs
Finding = tuple[str, Cell | str, str]  # what the paper found, what was found here, the verdict


def scored_on(corpus: JSON) -> tuple[str, list[int]]:
    """The partition that was scored, and its utterances per language."""
    return corpus.get("scored", "test"), list((corpus.get("scored_utterances") or corpus["test_utterances"]).values())


def beside_the_paper(scores: JSON, rows: Sequence[Row]) -> dict[str, Any]:
    """The paper's table with this run's figures beside, and whether the two compare."""
    backbone, corpus = scores["backbone"], scores["corpus"]
    train, (split, test) = list(corpus["train_utterances"].values()), scored_on(corpus)
    encoder = (backbone["layers"], backbone["hidden"], backbone["vocabulary"] >= 250002) == (12, 768, True)
    cells = []
    for strategy, name, f1, size in PAPER_TABLE:
        ours = [row for row in rows if row["strategy"] == strategy and row["f1"] is not None]
        sizes = [row["trainable_parameters"] for row in ours if row["trainable_parameters"]]
        cells.append((name, f1, size, extent([100 * row["f1"] for row in ours], "{:.1f}".format), extent(sizes, count)))
    comparable = encoder and "massive" in corpus["name"].lower() and (len(train), min(train), min(test)) == MASSIVE
    return {"comparable": comparable, "rows": cells, "train": extent(train, str), "test": extent(test, str), "split": split}


def findings(scores: JSON, strategies: Runs, rows: Sequence[Row]) -> list[Finding]:
    """The paper's findings, each with this run's figure and whether it is replicated, turned round, open or not tested.

    rows: summary rows of `strategies`. Of a strategy with several ranks or rates the one with the best F1 counts.
    """
    best: dict[str, Row] = {}
    for row in sorted((row for row in rows if row["f1"] is not None and _learned(row)), key=lambda row: row["f1"]):
        best[row["strategy"]] = row
    shared = strategies[best["shared"]["label"]] if "shared" in best else []
    return [
        ("NON-SHARED ends above SHARED, at 72–73 against 60–61.", *_isolation(best, strategies)),
        ("SHARED falls by 15 to 30 points on languages learned earlier.", *_fall(best.get("shared"))),
        ("MULTI is best.", *_joint(best, strategies)),
        ("Scripts other than Latin are forgotten most.", *_scripts(shared)),
        ("zh-CN and ja-JP destroy most.", *_destroyers(shared)),
        ("Transfer has donors and receivers, and is asymmetric.", *_transfer(scores)),
        ("Rank 32 is within a point of rank 256.", *_ranks(strategies)),
    ]


def _learned(row: Row) -> bool:
    return row["learned"] is None or row["learned"] >= FLOOR


def _not(takes: str) -> tuple[str, str]:
    return "–", f"not tested: takes {takes}"


def _points(value: float) -> str:
    return f"{number(100 * value, 1, sign=True)} points"


def _ends(low: float | None, high: float | None) -> str:
    """An interval in points."""
    if low is None or high is None or low != low:
        return "no interval"
    return f"{number(100 * low, 1)} to {number(100 * high, 1)}"


def _difference(a: Sequence[Run], b: Sequence[Run]) -> tuple[float, Interval]:
    """Final F1 of a minus that of b, paired, with its interval; NaN without pairs."""
    ends = [[None if (f1 := mean(final(run))) != f1 or run.get("diverged") else f1 for run in runs] for runs in (a, b)]
    pairs = paired(a, b, *ends)
    return mean(list(pairs.values())), crossed_interval(pairs)


def _verdict(interval: Interval, yes: str = "replicated", no: str = "turned round") -> str:
    """Whether the interval of a difference that the paper has above 0 is above 0."""
    if interval.low != interval.low:
        return "open: no interval"
    return yes if interval.low > 0 else no if interval.high < 0 else "open: the interval has 0 in it"


def _isolation(best: Mapping[str, Row], strategies: Runs) -> tuple[Cell | str, str]:
    if not {"non-shared", "shared"} <= best.keys():
        return _not("--strategies non-shared shared, both of which learn")
    value, interval = _difference(*(strategies[best[name]["label"]] for name in ("non-shared", "shared")))
    return Cell(_points(value), _ends(interval.low, interval.high)), _verdict(interval)


def _fall(row: Row | None) -> tuple[Cell | str, str]:
    if row is None or row["cbt"] is None:
        return _not("--strategies shared, which learns two languages or more")
    cbt, low, high = row["cbt"], row["cbt_low"], row["cbt_high"]
    verdict = "open: no interval"
    if low is not None:
        less = "replicated" if -100 * cbt >= FALL else "in part: it falls by less"
        verdict = _verdict(Interval(-high, -low), less)
    return Cell(_points(cbt), _ends(low, high)), verdict


def _joint(best: Mapping[str, Row], strategies: Runs) -> tuple[Cell | str, str]:
    joint = next((name for name in ("multi", "lora-multi") if name in best), None)
    others = [row for name, row in best.items() if name not in ("multi", "lora-multi")]
    if joint is None or not others:
        return _not("--strategies multi and others, which learn")
    label, next_ = best[joint]["label"], max(others, key=lambda row: row["f1"])
    value, interval = _difference(strategies[label], strategies[next_["label"]])
    against = Cell(_points(value), f"{label} minus {next_['label']}: {_ends(interval.low, interval.high)}")
    verdict = _verdict(interval)
    return against, f"in part: {label}" if verdict == "replicated" and joint != "multi" else verdict


def _scripts(shared: Sequence[Run]) -> tuple[Cell | str, str]:
    kept = {locale: mean(values) for locale, values in by_language(shared, lost(retained)).items()}
    tests = {test.name: test for test in contrasts(kept)}
    every, spaced = tests["not Latin against Latin"], tests["not Latin, but with spaces against Latin"]
    if every.p_value != every.p_value:
        return _not("--strategies shared, with languages in Latin script and others")
    text = f"{every.name}, p {number(every.p_value, 2)}"
    here = Cell(f"{number(every.difference, 2, sign=True)} of the share kept", text)
    if every.p_value >= 0.05:
        return here, "open: no evidence of a difference"
    if every.difference > 0:
        return here, "turned round"
    told = spaced.p_value < 0.05 and spaced.difference < 0
    return here, "replicated" if told else "in part: not shown where words are spaced"


def _destroyers(shared: Sequence[Run]) -> tuple[Cell | str, str]:
    result = fit(shared, impact)
    if result is None or not result.effects.keys() >= {*DESTROYERS}:
        return _not(f"--strategies shared --orders {FEWEST_ORDERS}, with both languages")
    effects = [result.effects[locale] for locale in DESTROYERS]
    here = [f"{locale} {_points(effect)}" for locale, (effect, _) in zip(DESTROYERS, effects, strict=True)]
    worse = [_verdict(Interval(-interval.high, -interval.low)) for _, interval in effects]
    verdict = worse[0] if worse[0] == worse[1] else "in part" if "replicated" in worse else "open: the intervals have 0 in them"
    return Cell("; ".join(here), "against the average language, places being equal"), verdict


def _transfer(scores: JSON) -> tuple[Cell | str, str]:
    if all(len(entry["locales"]) < 2 for entry in (scores.get("experiments") or {}).get("pairs", ())):
        return _not("--experiments pairs")
    return "see “Who gives to whom?”", "described, not tested"


def _ranks(strategies: Runs) -> tuple[Cell | str, str]:
    for runs in strategies.values():
        for others in strategies.values():
            a, b = runs[0], others[0]
            if (a.get("rank"), b.get("rank")) == RANKS and (a["strategy"], a["lr"]) == (b["strategy"], b["lr"]):
                value, (low, high, _) = _difference(runs, others)
                within = "replicated" if low >= -0.01 and high <= 0.01 else "open: the interval is wider than a point"
                outside = "not so" if low > 0.01 or high < -0.01 else within
                return Cell(_points(value), _ends(low, high)), "open: no interval" if low != low else outside
    return _not("--rank 32 256")
