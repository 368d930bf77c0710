"""Languages against positions, and groups of languages: planted effects are found, and none where none were planted."""

import numpy as np
import pytest

from kloss.cl import effects
from kloss.cl.effects import contrasts, family, fit
from kloss.cl.languages import LANGUAGES, LOCALES
from kloss.cl.statistics import permutation_test

TEN = LOCALES[:10]


def runs_with(impact, orders, rng, noise=0.02, seeds=2):
    """Runs whose language at position i has -0.4/i, its own `impact`, and noise, as the last row of R."""
    runs = []
    for _ in range(orders):
        order = rng.permutation(TEN).tolist()
        for seed in range(seeds):
            R = np.zeros((11, 10))
            R[-1] = [-0.4 / (i + 1) + impact.get(m, 0) + rng.normal(0, noise) for i, m in enumerate(order)]
            R[-1, 0] = np.nan  # the first language destroys nothing
            runs.append({"strategy": "shared", "order": order, "seed": seed, "R": R})
    return runs


def last(run):
    return run["R"][-1]


def test_positions_are_told_from_languages():
    """Twelve random orders, no language worse than another: nine of them led a ranking of raw impact, at the second place."""
    rng = np.random.default_rng(0)
    result = fit(runs_with({}, 12, rng), last)
    assert result.orders == 12 and result.position > 0.9 and abs(result.language) < 0.2 and result.both > 0.9
    raw = {m: np.mean([R["R"][-1, R["order"].index(m)] for R in runs_with({}, 1, rng)]) for m in TEN}
    assert max(raw.values()) - min(v for v in raw.values() if v == v) > 0.1  # what one order's chart shows
    assert all(abs(effect) < 0.04 for effect, _ in result.effects.values())


def test_a_planted_destroyer_is_found_and_false_alarms_are_as_rare_as_stated():
    rng = np.random.default_rng(1)
    found, alarms, covered = [], [], []
    for _ in range(60):
        result = fit(runs_with({"de-DE": -0.1}, 6, rng, seeds=1), last)
        interval = result.effects["de-DE"][1]
        found.append(interval.high < 0)
        assert interval.df == 5
        none = fit(runs_with({}, 6, rng, seeds=1), last)
        alarms += [interval.low > 0 or interval.high < 0 for _, interval in none.effects.values()]
        covered.append(interval.low <= -0.1 * 0.9 <= interval.high)  # against the average language
    assert np.mean(found) > 0.9 and np.mean(alarms) < 0.07 and np.mean(covered) > 0.9


def test_few_orders_tell_nothing():
    rng = np.random.default_rng(2)
    runs = runs_with({}, effects.FEWEST_ORDERS - 1, rng)
    assert fit(runs, last) is None
    assert fit([*runs, *runs], last) is None  # copies are no more orders
    assert fit([*runs, *runs_with({}, 1, rng)], last) is not None
    diverged = [*runs, *(run | {"diverged": "nan"} for run in runs_with({}, 1, rng))]
    assert fit(diverged, last) is None
    assert fit(runs_with({}, 6, rng), lambda run: np.full(10, np.nan)) is None


def test_a_language_that_was_never_measured_has_no_effect():
    runs = runs_with({}, 6, np.random.default_rng(3))
    for run in runs:
        run["R"][-1, run["order"].index("de-DE")] = np.nan
    result = fit(runs, last)
    assert np.isnan(result.effects["de-DE"][0]) and not np.isnan(result.effects["af-ZA"][0])


def test_languages_of_a_family_are_one_value():
    """Alike within families and unrelated to script: languages taken as independent give several times the stated alarms."""
    rng = np.random.default_rng(0)
    families = sorted({family(m) for m in LOCALES})
    latin = [m for m in LOCALES if LANGUAGES[m].script == "Latin"]
    other = [m for m in LOCALES if m not in latin]
    naive, clustered, covered = [], [], []
    for _ in range(60):
        common = dict(zip(families, rng.normal(0, 1, len(families)), strict=True))
        values = {m: common[family(m)] + rng.normal(0, 0.2) for m in LOCALES}
        naive.append(permutation_test([values[m] for m in other], [values[m] for m in latin], samples=500).p_value < 0.05)
        contrast = contrasts(values)[0]
        clustered.append(contrast.p_value < 0.05)
        covered.append(contrast.interval.low <= 0 <= contrast.interval.high)
    assert np.mean(clustered) < 0.1 < np.mean(naive) and np.mean(covered) > 0.9
    planted = {m: float(m in other) + rng.normal(0, 0.5) for m in LOCALES}
    contrast = contrasts(planted)[0]
    assert contrast.p_value < 0.01 and contrast.interval.low > 0.4 and contrast.difference == pytest.approx(1, abs=0.4)


def test_labels_by_character_and_writing_without_spaces_are_two_contrasts():
    values = {m: 0.0 for m in LOCALES} | {"ja-JP": 1.0, "zh-CN": 1.0, "zh-TW": 1.0}
    latin, characters, spaces, spaced = contrasts(values)
    assert (characters.name, characters.languages, characters.families) == (
        "labelled by character against labelled by word", (3, 49), (2, 22),
    )  # fmt: skip
    assert characters.difference == 1.0
    assert (spaces.name, spaces.languages, spaces.families) == ("written without spaces against with spaces", (6, 46), (5, 20))
    assert spaces.difference == pytest.approx(2 / 5)  # Japonic and Sinitic of Japonic, Austroasiatic, Tibeto-Burman, Tai, Sinitic
    assert latin.languages == (23, 29) and spaced.languages == (17, 29) and spaced.difference == 0
    assert np.isnan(contrasts({"en-US": 0.1, "de-DE": 0.2})[0].difference)
    assert contrasts({"en-US": 0.1, "xx-XX": 0.2, "yy-YY": 0.4, "ja-JP": float("nan")})[0].families == (2, 1)
