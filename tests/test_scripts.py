"""Sequences of one script and of several: who is in them, and that what was planted is found and nothing else."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from test_run import SMALL

from kloss.cl.experiments import idle, scripts
from kloss.cl.languages import LOCALES
from kloss.cl.study import plan
from kloss.cl.summary import script
from kloss.config import Config
from kloss.presets import DEMO_LANGUAGES
from kloss.run import DIVERGED, main


def test_the_sequences_of_the_demo():
    alike, mixed = scripts.design_of(DEMO_LANGUAGES)
    assert alike == ("en-US", "de-DE", "es-ES", "tr-TR") and mixed == ("en-US", "ru-RU", "ar-SA", "hi-IN")
    alike, mixed = scripts.design_of(("ja-JP", "de-DE", "en-US"))
    assert alike == ("de-DE", "en-US") and mixed == ("de-DE", "ja-JP")
    order = ("ja-JP", "ru-RU", "de-DE", "ar-SA", "en-US")  # the commonest script has its turn first
    assert scripts.design_of(order) == (("de-DE", "en-US"), ("de-DE", "ja-JP"))
    order = ("ru-RU", "en-US", "mn-MN", "de-DE", "fr-FR", "es-ES", "it-IT", "nl-NL")  # Cyrillic gives two, then Latin alone
    assert scripts.design_of(order) == (
        ("en-US", "de-DE", "fr-FR", "es-ES", "it-IT", "nl-NL"),
        ("en-US", "de-DE", "ru-RU", "es-ES", "it-IT", "mn-MN"),
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_of_the_mixed_sequence(seed):
    draw = random.Random(seed)
    order = draw.sample(LOCALES, draw.randint(8, 52))
    design = scripts.design_of(order)
    counts = Counter(map(script, order))
    if design is None:
        assert max(counts.values()) == 1 or len(counts) == 1
        return
    alike, mixed = design
    assert [locale for locale in order if script(locale) == script(alike[0])] == list(alike)
    assert len(alike) == max(counts.values()) == len(mixed) == len(set(mixed)) and set(mixed) <= set(order)
    taken = Counter(map(script, mixed))
    for one in counts:  # as even as can be: none has two fewer than another one, unless it has no more to give
        assert all(taken[one] >= taken[other] - 1 or taken[one] == counts[one] for other in counts)
    both = [locale for locale in mixed if locale in alike]
    assert all(mixed.index(locale) == alike.index(locale) for locale in both) and alike[0] in both and alike[-1] not in both
    others = [locale for locale in mixed if locale not in alike]
    assert others == sorted(others, key=order.index)


@pytest.mark.parametrize("locales", [("en-US", "de-DE"), ("en-US", "ru-RU", "ja-JP"), ("en-US",)])
def test_without_a_common_script_and_another_one_there_is_nothing_to_look_at(locales):
    assert scripts.design_of(locales) is None
    config = Config(strategies=("shared",), experiments=("scripts",))
    study = plan(config, locales)
    assert not any(scripts.plan(config, study))
    (line,) = idle(config, study)
    assert line.endswith("needs --strategies shared, of two languages or more of one script and one of another")


ORDERS = [tuple(random.Random(number).sample(DEMO_LANGUAGES, 10)) for number in range(4)]


def counts_of(f1):
    return [[round(1e5 * value), 10**5, 10**5] for value in f1]


def planted(alike, mixed, *, noise=0.0, learned=0.8, seeds=3, orders=ORDERS, seed=0):
    """A study of SHARED and `scripts`' entries for it. alike, mixed: locale -> share that is kept in either sequence."""
    draw, data, runs = np.random.default_rng(seed), [], []
    about = {"label": "SHARED LoRA r=8", "lr": 0.003}
    for order in orders:
        for s in range(seeds):
            entry = about | {"seed": s, "script": "Latin"}
            for name, members, share in zip(("alike", "mixed"), scripts.design_of(order), (alike, mixed), strict=True):
                f1 = np.array([learned] * len(members))
                kept = np.clip([share(locale) + noise * draw.normal() for locale in members], 0, 1)
                end = np.append((f1 * kept)[:-1], f1[-1])
                entry[name] = {"order": list(members), "learned": counts_of(f1), "end": counts_of(end)}
            data.append(entry)
            R = np.zeros((11, 10))
            np.fill_diagonal(R[1:], learned)
            R[-1, :-1] = [learned * np.clip(mixed(locale) + noise * draw.normal(), 0, 1) for locale in order[:-1]]
            run = about | {"strategy": "shared", "order": list(order), "order_name": order[0], "seed": s, "R": R.tolist()}
            runs.append(run)
    return {"runs": runs}, data


def rows_of(section):
    (table,) = section.tables
    return {row[0]: row[1:] for row in table.rows}


def test_what_a_common_script_saves_is_found():
    section = scripts.analyse(*planted(lambda m: 0.6, lambda m: 0.3, noise=0.02))
    everywhere, same, _ = section.findings
    assert (
        "4 languages one after another: of what was learned, 0.60 is kept where all are Latin, 0.30 where they have 4 scripts"
        in everywhere
    )
    assert everywhere.endswith("less is forgotten where the script is one).") and same.endswith(everywhere[-20:])
    rows = rows_of(section)
    alike, mixed, gap, ends = rows["share kept, in both"]
    low, high = map(float, ends.split(" to "))
    assert 0.2 < low < float(gap) < high < 0.4 and gap.startswith("+") and abs(float(alike) - float(mixed) - float(gap)) < 0.002
    assert rows["F1 when learned, all"][:3] == ("0.800", "0.800", "0.000")
    section = scripts.analyse(*planted(lambda m: 0.3, lambda m: 0.6, noise=0.02))
    assert all(finding.endswith("more is forgotten where the script is one).") for finding in section.findings[:2])


def test_harder_languages_are_told_from_mixed_company():
    """Other scripts keep less wherever they are: the sequences differ, the languages in both do not."""
    share = lambda m: 0.7 if script(m) == "Latin" else 0.2  # noqa: E731
    everywhere, same, study = scripts.analyse(*planted(share, share, noise=0.02)).findings
    assert everywhere.endswith("less is forgotten where the script is one).") and same.endswith("no evidence of a difference).")
    assert "4 Latin ones keep +0.5" in study and study.endswith("scripts differ.") and "no evidence" not in study


def test_where_scripts_do_nothing_nothing_is_found_as_often_as_stated():
    wrong = np.zeros(2)
    for seed in range(100):
        section = scripts.analyse(*planted(lambda m: 0.5, lambda m: 0.5, noise=0.1, seed=seed))
        wrong += ["no evidence" not in finding for finding in section.findings[:2]]
    assert (wrong <= 10).all(), "of 100 without a difference five are expected to be taken for one"


def test_copies_of_one_pair_of_sequences_count_once():
    scores, data = planted(lambda m: 0.6, lambda m: 0.3, noise=0.02, seeds=1, orders=ORDERS[:1])
    (finding, *_) = scripts.analyse(scores, data).findings
    assert "(chance is not known from so few runs)" in finding
    assert scripts.analyse(scores, [*data, *data]).findings[0] == finding


def test_what_was_not_learned_or_diverged_is_said_and_not_averaged():
    section = scripts.analyse(*planted(lambda m: 0.6, lambda m: 0.3, learned=0.03))
    assert section.findings == ["SHARED LoRA r=8 learned nothing (0.03 F1 on Latin only, 0.03 mixed), so nothing could be lost."]
    assert not section.tables and not section.bars
    scores, data = planted(lambda m: 0.6, lambda m: 0.3)
    whole = scripts.analyse(scores, data).findings[0]
    data[0]["mixed"]["end"][2] = None
    data[0]["alike"]["end"] = counts_of([0.0] * 4)
    assert scripts.analyse(scores, data).findings[0][:100] == whole[:100]
    for entry in data:
        entry["alike"]["learned"][1] = None
    assert scripts.analyse(scores, data).findings == ["SHARED LoRA r=8 diverged."]
    assert scripts.analyse(scores, []) is None


def test_a_language_below_the_floor_has_no_share():
    sequence = {"order": ["en-US", "de-DE", "fr-FR"], "learned": counts_of([0.5, 0.04, 0.6]), "end": counts_of([0.25, 0.04, 0.6])}
    values = scripts.measured(sequence)
    assert values["en-US"].tolist() == [0.5, 0.25, 0.5] and np.isnan(values["de-DE"][2]) and np.isnan(values["fr-FR"][2])


def test_a_language_in_both_counts_where_it_was_learned_in_both():
    order = ("en-US", "de-DE", "fr-FR", "es-ES")
    alike = {"order": list(order), "learned": counts_of([0.5] * 4), "end": counts_of([0.1, 0.4, 0.5, 0.5])}
    mixed = {"order": ["en-US", "ru-RU", "fr-FR", "ja-JP"], "learned": counts_of([0.02, 0.5, 0.5, 0.5])}
    mixed["end"] = counts_of([0.02, 0.1, 0.25, 0.5])
    (of_all,), (of_both,) = (means.values() for means in scripts.compared([{"seed": 0, "alike": alike, "mixed": mixed}]))
    assert of_both[:, 2].tolist() == [1, 0.5], "of fr-FR alone"
    assert of_both[:, 0] == pytest.approx([0.5, 0.26]) and of_all[:, 2] == pytest.approx([(0.2 + 0.8 + 1) / 3, (0.2 + 0.5) / 2])


def test_rates_are_apart():
    scores, data = planted(lambda m: 0.6, lambda m: 0.3)
    other, more = planted(lambda m: 0.3, lambda m: 0.6)
    scores["runs"] += [run | {"lr": 0.01} for run in other["runs"]]
    findings = scripts.analyse(scores, data + [entry | {"lr": 0.01} for entry in more]).findings
    assert [finding.split(", ")[1] for finding in findings[::3]] == ["lr 0.003", "lr 0.01"]
    assert "0.60 is kept" in findings[0] and "0.30 is kept" in findings[3]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def test_scripts_end_to_end(cache, tmp_path):
    """The language that is first in both is learned alike, to the bit."""
    folder = tmp_path / "run"
    run = [*SMALL, "--cache", cache, "--out", str(folder), "--experiments", "scripts", "--exact"]
    assert main([*run, "--strategies", "shared", "partial", "--orders", "2", "--seeds", "2"]) == 0
    entries = json.loads((folder / "scores.json").read_text())["experiments"]["scripts"]
    assert len(entries) == 4
    for entry in entries:
        alike, mixed = entry["alike"], entry["mixed"]
        assert sorted(alike["order"]) == ["de-DE", "en-US"] and mixed["order"] == [alike["order"][0], "ja-JP"]
        assert alike["learned"][0] == mixed["learned"][0] is not None
        assert alike["learned"][-1] == alike["end"][-1] and None not in (*alike["end"], *mixed["end"])
    assert "<h2>Does a common script help?</h2>" in (folder / "report.html").read_text()


def test_learners_that_diverged(cache, tmp_path):
    folder = tmp_path / "run"
    run = [*SMALL, "--cache", cache, "--out", str(folder), "--experiments", "scripts", "--strategies", "shared", "--lr", "1e30"]
    assert main(run) == DIVERGED
    assert "SHARED LoRA r=2 diverged." in (folder / "report.html").read_text()
