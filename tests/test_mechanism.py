"""What goes with forgetting: planted effects are found in score matrices, and none where none were planted."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from test_run import SMALL

from kloss.cl.corpus import Sentences
from kloss.cl.effects import by_character, family
from kloss.cl.experiments import idle, mechanism, sections
from kloss.cl.languages import LOCALES
from kloss.cl.regression import FEWEST_GROUPS, regress
from kloss.cl.study import plan
from kloss.cl.summary import script
from kloss.config import Config
from kloss.run import DIVERGED, main

LATER, LEARNED, SUBWORDS, OVERLAP, SCRIPT, CHARACTER, UTTERANCES = mechanism.PROPERTIES
TWENTY = LOCALES[::2][:20]


def study(keeps, orders=6, seeds=1, locales=TWENTY, rng=None, alike=0.0, chance=0.0):
    """scores.json of SHARED, and `mechanism`'s entry. keeps: property -> what one more of it adds to the share kept.

    Subwords a word are alike in families. alike: deviation of what a family, and a language, keep more. chance: of each value.
    """
    rng = rng or np.random.default_rng(0)
    of_family = {name: rng.normal(size=2) for name in sorted({family(m) for m in locales})}
    subwords = {m: float(2 + 0.3 * of_family[family(m)][0] + 0.3 * rng.normal()) for m in locales}
    kept = {m: alike * (of_family[family(m)][1] + rng.normal()) for m in locales}
    overlap = 0.2 + 0.1 * rng.random((len(locales), len(locales)))
    runs = []
    for _ in range(orders):
        order = [locales[i] for i in rng.permutation(len(locales))]
        for seed in range(seeds):
            learned = 0.6 + 0.05 * rng.normal(size=len(order))
            R = np.zeros((len(order) + 1, len(order)))
            np.fill_diagonal(R[1:], learned)
            for i, m in enumerate(order[:-1]):
                common = np.mean([overlap[locales.index(m), locales.index(other)] for other in order[i + 1 :]])
                facts = (len(order) - 1 - i, learned[i], subwords[m], common, script(m) == script(order[-1]), by_character(m))
                share = 0.5 + kept[m] + chance * rng.normal()
                share += sum(keeps.get(name, 0) * value for name, value in zip(mechanism.PROPERTIES, facts, strict=False))
                R[-1, i] = learned[i] * share
            run = {"strategy": "shared", "label": "SHARED LoRA r=8", "lr": 0.003, "order": order, "seed": seed, "R": R.tolist()}
            runs.append(run)
    corpus = {"locales": list(locales), "tokens_per_word": subwords, "train_utterances": dict.fromkeys(locales, 300)}
    return {"runs": runs, "corpus": corpus}, [{"locales": list(locales), "overlap": overlap.tolist()}]


def fit_of(scores, data):
    return mechanism.fit(mechanism.observations(scores["runs"], scores["corpus"], data[0]))


PLANTED = {LATER: -0.02, LEARNED: 0.5, SUBWORDS: -0.2, OVERLAP: 2.0, SCRIPT: 0.2}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_effect_is_found_with_its_size(name):
    result = fit_of(*study({name: PLANTED[name]}, orders=8, alike=0.005, chance=0.01))
    effect = result.effects[name]
    assert effect.interval.low < PLANTED[name] * effect.deviation < effect.interval.high
    assert effect.effect == pytest.approx(PLANTED[name] * effect.deviation, rel=0.25)
    assert not effect.interval.low <= 0 <= effect.interval.high
    assert result.explained > 0.7


def test_without_chance_every_effect_is_what_was_planted():
    result = fit_of(*study(PLANTED, orders=12))
    assert result.effects.keys() == PLANTED.keys()
    for name, size in PLANTED.items():
        assert result.effects[name].effect == pytest.approx(size * result.effects[name].deviation)
        assert result.effects[name].interval.high - result.effects[name].interval.low < 1e-9
    assert result.explained == pytest.approx(1)


@pytest.mark.parametrize("orders, locales", [(6, TWENTY), (2, LOCALES[:30])])
def test_false_alarms_are_as_rare_as_stated(orders, locales):
    """Families and languages keep more or less, for no reason that is looked at. Observations taken as independent: many more."""
    rng, alarms, naive = np.random.default_rng(3), {name: [] for name in mechanism.PROPERTIES}, []
    for _ in range(100):
        scores, data = study({}, orders, locales=locales, rng=rng, alike=0.05, chance=0.05)
        rows = mechanism.observations(scores["runs"], scores["corpus"], data[0])
        for name, effect in mechanism.fit(rows).effects.items():
            alarms[name].append(not effect.interval.low <= 0 <= effect.interval.high)
        subwords = {SUBWORDS: np.array([row[1][2] for row in rows])}
        run = np.array([int(row[2] != rows[0][2]) for row in rows])
        low, high, _ = (
            regress(np.array([row[0] for row in rows]), subwords, 0 * run, [np.arange(len(rows))]).effects[SUBWORDS].interval
        )
        naive.append(not low <= 0 <= high)
    rates = {name: np.mean(wrong) for name, wrong in alarms.items() if len(wrong) > 30}
    assert len(rates) >= 4 and max(rates.values()) <= 0.1 and np.mean(list(rates.values())) < 0.06, rates
    assert np.mean(naive) > 0.12


def test_what_goes_with_another_property_or_does_not_differ_is_left_out_by_name():
    rng = np.random.default_rng(0)
    n = 40
    run, groups = np.arange(n) % 2, np.arange(n) // 4
    one = rng.normal(size=n)
    properties = {
        "one": one,
        "its copy": -3 * one + 0.01 * rng.normal(size=n),
        "of the run": run.astype(float),
        "in one group": (groups < 1).astype(float),
        "mostly in one": (groups < 1) + 0.05 * rng.normal(size=n),
        "other": rng.normal(size=n),
    }
    result = regress(2 * one + 0.1 * rng.normal(size=n), properties, run, [groups])
    assert list(result.effects) == ["one", "other"]
    assert result.left_out == {
        "its copy": "goes with one, r = −1.00",
        "of the run": "does not differ",
        "in one group": "differs in too few groups",
        "mostly in one": "differs in too few groups",
    }
    assert result.effects["one"].effect == pytest.approx(2 * result.effects["one"].deviation, rel=0.05)
    low, high, _ = result.effects["other"].interval
    assert low < 0 < high and FEWEST_GROUPS == 3


def test_a_constant_added_to_a_run_changes_nothing():
    scores, data = study(PLANTED, alike=0.02, chance=0.02)
    rows = mechanism.observations(scores["runs"], scores["corpus"], data[0])
    first = rows[0][2]
    moved = [(row[0] + 0.3 * (row[2] == first), *row[1:]) for row in rows]
    for name, effect in mechanism.fit(rows).effects.items():
        assert mechanism.fit(moved).effects[name].interval[:2] == pytest.approx(effect.interval[:2])
        assert mechanism.fit(moved).effects[name].effect == pytest.approx(effect.effect)


def test_few_orders_tell_nothing_of_the_last_languages_script():
    assert fit_of(*study({}, 4, chance=0.1)).left_out[SCRIPT] == "takes 5 orders"
    assert SCRIPT in fit_of(*study({}, 8, chance=0.1)).effects


def test_observations_are_what_was_learned_each_run_once():
    scores, data = study({}, 2)
    order = scores["runs"][0]["order"]
    rows = mechanism.observations(scores["runs"], scores["corpus"], data[0])
    assert len(rows) == 2 * 19 and {row[4] for row in rows if row[2] == tuple(order)} == set(order[:-1])
    kept, facts, *_ = rows[0]
    R = scores["runs"][0]["R"]
    later = np.array(data[0]["overlap"])[TWENTY.index(order[0]), [TWENTY.index(m) for m in order[1:]]].mean()
    assert kept == pytest.approx(R[20][0] / R[1][0]) and facts[:2] == (19, R[1][0])
    assert facts[2:] == (
        scores["corpus"]["tokens_per_word"][order[0]], pytest.approx(later), script(order[0]) == script(order[-1]),
        by_character(order[0]), 300,
    )  # fmt: skip
    assert mechanism.observations([*scores["runs"], *scores["runs"]], scores["corpus"], data[0]) == rows
    scores["runs"][0]["R"][1][0] = 0.04  # below the floor
    scores["runs"][1] |= {"diverged": "nan"}
    assert len(mechanism.observations(scores["runs"], scores["corpus"], data[0])) == 18


def test_findings_say_what_was_found_what_was_not_and_what_cannot_be():
    section = mechanism.analyse(*study({SUBWORDS: -0.2}, alike=0.02, chance=0.02))
    first, none, not_told, explained = section.findings
    assert first.startswith("SHARED LoRA r=8: the share kept of a language goes with subwords a word (−0.")
    assert "for a standard deviation more; " in first
    assert re.search(r"; 114 observations of 20 languages of 1\d families in 6 runs\.$", first)
    assert "no evidence for languages learned later" in none and SUBWORDS not in none
    assert "labels by character (" in not_told
    assert f"{UTTERANCES} (does not differ)" in not_told and "%" in explained
    assert section.limits[0].startswith("This is correlation")
    (table,) = section.tables
    assert next(row for row in table.rows if row[0] == SUBWORDS)[2].startswith("−0.")
    section = mechanism.analyse(*study({}, alike=0.02, chance=0.02))
    assert section.findings[0].startswith("SHARED LoRA r=8: no property is shown to go with the share kept of a language; ")
    scores, data = study({}, 1, locales=("en-US", "ru-RU", "ja-JP"))
    assert "are too few to tell" in mechanism.analyse(scores, data).findings[0]
    for row in scores["runs"][0]["R"]:
        row[:] = [0.01] * 3
    assert "no language was learned" in mechanism.analyse(scores, data).findings[0]
    assert mechanism.analyse(scores, []) is None


def test_overlap_is_the_share_of_tokens_that_another_language_has_too():
    words = {"en-US": [5, 5, 5, 6], "de-DE": [5, 7], "ja-JP": [8]}
    corpus = SimpleNamespace(locales=tuple(words), vocab_size=10, bos_id=0, eos_id=2)
    corpus.sentences = lambda locale, partition: Sentences(np.array([0, *words[locale], 2]), None, None)
    config = Config(strategies=("shared",), experiments=("mechanism",))
    (entry,) = mechanism.record(config, corpus, plan(config, tuple(words)), None, [])
    assert entry == {"locales": list(words), "overlap": [[1, 0.75, 0], [0.5, 1, 0], [0, 0, 1]]}
    one = plan(config, ("en-US",))
    assert mechanism.record(config, corpus, one, None, []) == [] and len(idle(config, one)) == 1
    assert not idle(config, plan(config, tuple(words)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def test_mechanism_end_to_end(cache, tmp_path):
    """It trains nothing besides and scores nothing besides."""
    folder, plain = tmp_path / "run", tmp_path / "plain"
    run = [*SMALL, "--cache", cache, "--strategies", "shared", "non-shared", "--orders", "2"]
    assert main([*run, "--out", str(plain), "--experiments"]) == 0
    assert main([*run, "--out", str(folder), "--experiments", "mechanism"]) == 0
    scores = json.loads((folder / "scores.json").read_text())
    (entry,) = scores.pop("experiments")["mechanism"]
    overlap = np.array(entry["overlap"])
    assert (np.diag(overlap) == 1).all() and 0 < overlap[0, 1] < 1 and entry["locales"] == scores["corpus"]["locales"]
    without = json.loads((plain / "scores.json").read_text())
    assert without.pop("experiments", None) is None and scores == without
    assert "<h2>What goes with forgetting?</h2>" in (folder / "report.html").read_text()
    assert [section.title for section in sections(scores | {"experiments": {"mechanism": [entry]}})] == [
        "What goes with forgetting?"
    ]


def test_learners_that_diverged(cache, tmp_path):
    folder = tmp_path / "run"
    run = [*SMALL, "--cache", cache, "--out", str(folder), "--experiments", "mechanism", "--strategies", "shared"]
    assert main([*run, "--lr", "1e30"]) == DIVERGED
    assert "SHARED LoRA r=2 diverged." in (folder / "report.html").read_text()
