"""A tokenizer balanced by script: its text, learners and backbone of its own, and what the experiment finds."""

import csv
import json
import random
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
from test_run import SMALL, interrupted
from toy import cohorts

from kloss.cl import tokenizer as training
from kloss.cl.backbone import tiny_config
from kloss.cl.corpus import load_corpus
from kloss.cl.experiments import idle, tokenizer, with_experiments
from kloss.cl.learner import BALANCED
from kloss.cl.results import COLUMNS
from kloss.cl.spans import f1_from_counts
from kloss.cl.stream import Stream
from kloss.cl.study import plan
from kloss.cl.summary import script
from kloss.cl.tokenizer import load_tokenizer
from kloss.config import Config
from kloss.console import Console
from kloss.estimate import Machine, describe
from kloss.presets import DEMO_LANGUAGES
from kloss.run import DIVERGED, main, parse, prepare

SIXTY = {"train": 60, "test": 10, "seed": 0}
FIVE = ("en-US", "de-DE", "es-ES", "ja-JP", "ru-RU")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


def loaded(cache, **options):
    return load_corpus("synthetic", locales=FIVE, synthetic=SIXTY, cache=cache, vocabulary=300, **options)


def test_each_script_has_as_many_words_of_the_balanced_text_and_its_common_ones(cache, monkeypatch):
    """The text is what `train_tokenizer` gets; the study's is the training utterances as they come."""
    given = {}

    def train(texts, folder, size):
        given[len(given)] = texts = list(texts)
        return original(texts, folder, size)

    original = training.train_tokenizer
    monkeypatch.setattr(training, "train_tokenizer", train)
    plain, balanced = loaded(cache + "/1"), loaded(cache + "/1", balanced=True)
    study, texts = given[0], [Counter(text.split()) for text in given[1]]
    total, of_script = sum(len(text.split()) for text in study), defaultdict(Counter)
    for number, text in enumerate(study):
        of_script[script(FIVE_AS_READ[number // 60])].update(text.split())
    assert len(texts) == 3 and {sum(text.values()) for text in texts} == {total // 3}
    latin, repeated = 0, 0
    for text in texts:
        (name,) = [name for name, words in of_script.items() if text.keys() <= words.keys()]
        whole, copies = of_script[name], total // 3 // of_script[name].total()
        latin += name == "Latin" and not copies
        repeated += copies == 1
        assert all(copies * n <= text[word] <= (copies + 1) * n for word, n in whole.items())
    assert latin == 1 and repeated == 2, "180 utterances of Latin are cut, 60 of another script are repeated"
    again = loaded(cache + "/2", balanced=True)
    assert given[2] == given[1] and again.fingerprint == balanced.fingerprint != plain.fingerprint
    other = loaded(cache + "/2", balanced=True, seed=1)
    assert given[3] != given[1] and other.fingerprint not in (balanced.fingerprint, plain.fingerprint)


FIVE_AS_READ = ("de-DE", "en-US", "es-ES", "ja-JP", "ru-RU")  # the generator's order


def test_the_same_utterances_are_under_both_tokenizers(cache):
    plain, balanced = loaded(cache), loaded(cache, balanced=True)
    assert plain.labels == balanced.labels and plain.vocab_size <= 300 >= balanced.vocab_size
    read = [load_tokenizer(corpus.tokenizer_folder) for corpus in (plain, balanced)]
    for locale in FIVE:
        one, other = (corpus.sentences(locale, "train") for corpus in (plain, balanced))
        assert one.number == other.number and np.array_equal(one.labels[one.labels >= 0], other.labels[other.labels >= 0])
        texts = [[tokenizer.decode(part, skip_special_tokens=True) for part in np.split(s.input_ids, s.offsets[1:-1])]
                 for tokenizer, s in zip(read, (one, other), strict=True)]  # fmt: skip
        assert texts[0] == texts[1]
    gains = {locale: plain.tokens_per_word(locale) - balanced.tokens_per_word(locale) for locale in FIVE}
    assert gains["ru-RU"] > 0 > max(gains[locale] for locale in FIVE[:3])
    both = replace(plain, others={BALANCED: balanced})
    assert both.under("") is both and both.under(BALANCED) is balanced.under(BALANCED) is balanced
    with pytest.raises(KeyError):
        plain.under(BALANCED)


def config_of(**changes):
    return Config(strategies=("non-shared", "shared"), experiments=("tokenizer",), orders=2, seeds=2, **changes)


def test_the_learners_of_a_tokenizer_are_a_cohort_of_their_own():
    config = config_of()
    study = with_experiments(config, plan(config, FIVE))
    names = [learner.tokenizer for learner in study.learners]
    assert names == [""] * 14 + [BALANCED] * 4
    assert cohorts(study) == [list(range(14)), list(range(14, 18))]
    again, own = study.learners[14], study.learners[study.trials[-4].learners[0]]
    assert replace(again, tokenizer="") == own and again.name == own.name.replace(", seed", ", balanced tokenizer, seed")
    assert set(study.to_score[14]) == set(range(1, 6)) and sorted(study.to_score[14][5]) == sorted(FIVE)
    forks = [replace(learner, start=(learner, 5)) for learner in study.learners[12:]]
    forked = study._replace(learners=[*forks, *study.learners])
    sizes = [({forked.learners[g].tokenizer for g in members}, len(members)) for members in cohorts(forked)]
    assert sizes == [({""}, 14), ({BALANCED}, 4), ({""}, 2), ({BALANCED}, 4)], "forks behind what they begin with"


@pytest.mark.parametrize("changes", [{"backbone": "xlm-roberta-base"}, {"tokenizer": "./a-folder"}])
def test_where_no_tokenizer_is_trained_it_says_so_in_one_line_and_plans_nothing(changes):
    config = config_of(**changes)
    study = plan(config, FIVE)
    (line,) = idle(config, study)
    assert line == (
        "--experiments tokenizer has no effect: it needs --strategies shared, of two languages or more of several scripts, "
        "--backbone tiny and no --tokenizer: a pretrained backbone's embeddings belong to its vocabulary"
    )
    assert len(with_experiments(config, study).learners) == len(study.learners)
    assert not tokenizer.record(config, None, study, [], [])


def test_one_script_is_nothing_to_balance():
    assert idle(config_of(), plan(config_of(), FIVE[:3]))
    assert not idle(config_of(), plan(config_of(), FIVE[2:]))


ORDERS = [tuple(random.Random(number).sample(DEMO_LANGUAGES, 10)) for number in range(3)]
BEFORE = {m: 1.5 if script(m) == "Latin" else 2.5 for m in DEMO_LANGUAGES}
AFTER = {m: 2.0 if script(m) == "Latin" else 1.5 for m in DEMO_LANGUAGES}


def planted(study, balanced, *, noise=0.0, company=0.0, learned=0.8, after=AFTER, seed=0, seeds=3):
    """Entries where languages keep these shares: locale -> share.

    noise: of each score. company: deviation of what a backbone does to a language in all its scores.
    """
    draw, data = np.random.default_rng(seed), []
    shares = {}
    for name, share in (("study", study), (BALANCED, balanced)):
        shares[name] = {m: share(m) + company * draw.normal() for m in DEMO_LANGUAGES}
    for order in ORDERS:
        for s in range(seeds):
            entry = {"label": "SHARED LoRA r=8", "lr": 0.003, "seed": s, "subwords": after}
            for name in shares:
                kept = [np.clip(shares[name][m] + noise * draw.normal(), 0, 1) for m in order[:-1]]
                end = learned * np.array([*kept, 1.0])
                entry[name] = {"order": list(order), "learned": counts_of([learned] * 10), "end": counts_of(end)}
            data.append(entry)
    run = {"strategy": "shared", "label": "SHARED LoRA r=8", "lr": 0.003}
    return {"corpus": {"tokens_per_word": BEFORE}, "runs": [run]}, data


def counts_of(f1):
    return [[round(1e5 * value), 10**5, 10**5] for value in f1]


def rare(of_rare, of_latin):
    return lambda m: of_latin if script(m) == "Latin" else of_rare


def test_what_balance_does_to_rare_scripts_is_found():
    section = tokenizer.analyse(*planted(rare(0.2, 0.6), rare(0.5, 0.6), noise=0.02))
    others, latin, between = section.findings
    assert others.startswith(
        "SHARED LoRA r=8, the study's tokenizer → the balanced one, all but Latin (6): 2.50 → 1.50 subwords a word; "
        "F1 when learned 0.80 → 0.80, 0.00 (no interval); F1 at the end 0.27 → 0.47, +0.20 (+0.1"
    )
    assert (
        "; share kept 0.20 → 0.50, +0.30 (+0.2" in others
        and "no evidence" not in others
        and "share kept 0.60 → 0.60" in latin
        and "no evidence of a difference" in latin
    )
    assert "languages keep +0.40 against 6 others" in between and between.endswith("so part of it is the tokenizer's doing.")
    (table, languages) = section.tables
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows)[:3] == ["all", "Latin", "all but Latin"] and len(rows) == 3 + 6
    assert rows["Cyrillic"][:2] == ("1", "2.50 → 1.50") and rows["all but Latin"][3].startswith("0.000")
    assert {row[0]: row[1:3] for row in languages.rows}["en-US"] == ("Latin", "1.50 → 2.00") and len(languages.rows) == 10
    assert [row[1] for row in languages.rows][:4] == ["Latin"] * 4
    assert list(section.bars[0].values) == [
        f"{name}, {of}" for name in ("Latin", "all but Latin") for of in ("as it comes", "balanced")
    ]
    section = tokenizer.analyse(*planted(rare(0.5, 0.6), rare(0.2, 0.6), noise=0.02))
    assert section.findings[2].endswith("so balance makes it larger.")


def test_where_tokenizers_do_nothing_nothing_is_found_as_often_as_stated():
    """Neither where scores alone vary, nor where a backbone is good or bad for a language by chance."""
    wrong = np.zeros(4)
    groups = tokenizer.grouped(DEMO_LANGUAGES)
    for seed in range(100):
        _, data = planted(rare(0.3, 0.6), rare(0.3, 0.6), noise=0.1, seed=seed)
        pairs = tokenizer.paired(data)
        for i, name in enumerate(("all but Latin", "Latin")):
            *_, gap, ends = tokenizer.difference(tokenizer.over(pairs, groups[name]), "share kept")
            assert ends.low < gap < ends.high
            wrong[i] += not ends.low <= 0 <= ends.high
        wrong[2] += "no evidence" not in tokenizer._between("", "Latin", groups, pairs)[0]
        _, data = planted(rare(0.3, 0.6), rare(0.3, 0.6), company=0.1, noise=0.02, seed=seed, seeds=1)
        wrong[3] += "no evidence" not in tokenizer._between("", "Latin", groups, tokenizer.paired(data))[0]
    assert (wrong <= 10).all(), "of 100 without a difference five are expected to be taken for one"


def test_tokenizers_that_cut_alike_are_said_to():
    first, *_ = tokenizer.analyse(*planted(rare(0.2, 0.6), rare(0.5, 0.6), after=BEFORE)).findings
    assert first == (
        "SHARED LoRA r=8: both tokenizers cut every language into as many subwords (2.10 → 2.10 a word), so differences say "
        "nothing of them. With a smaller --vocabulary subwords are scarce."
    )


def test_what_was_not_learned_or_diverged_is_said_and_not_averaged():
    scores, data = planted(rare(0.2, 0.6), rare(0.5, 0.6))
    whole = tokenizer.analyse(scores, data).findings
    assert tokenizer.analyse(scores, [*data, *data]).findings == whole, "copies count once"
    data[0][BALANCED]["end"][3] = None
    data[0]["study"]["end"] = counts_of([0.0] * 10)
    assert tokenizer.analyse(scores, data).findings == whole
    for entry in data:
        entry["study"]["learned"][2] = None
    section = tokenizer.analyse(scores, data)
    assert section.findings == ["SHARED LoRA r=8 diverged."] and not section.tables
    section = tokenizer.analyse(*planted(rare(0.2, 0.6), rare(0.5, 0.6), learned=0.03))
    assert section.findings == ["SHARED LoRA r=8 learned nothing (0.03 F1 when learned, 0.03 with the balanced tokenizer)."]
    assert tokenizer.analyse(scores, []) is None


def test_a_language_counts_where_it_was_learned_with_both():
    scores, data = planted(lambda m: 0.5, lambda m: 0.7, seeds=1)
    for entry in data:
        at = entry["study"]["order"].index("ru-RU")
        entry["study"]["learned"][at] = entry["study"]["end"][at] = counts_of([0.02])[0]
    pairs = tokenizer.paired(data)
    assert all(np.isnan(of["ru-RU"][:, tokenizer.KEPT]).all() and not np.isnan(of["ru-RU"][:, :2]).any() for of in pairs.values())
    rows = {row[0]: row for row in tokenizer.analyse(scores, data).tables[0].rows}
    assert rows["Cyrillic"][-1] == rows["Cyrillic"][-1] and "not measured" in rows["Cyrillic"]


RUN = [*SMALL, "--experiments", "tokenizer", "--vocabulary", "150", "--checkpoint-seconds", "0"]


def test_a_run_stopped_in_either_cohort_ends_as_one_that_was_not(cache, tmp_path):
    run = [*RUN, "--cache", cache, "--strategies", "shared", "--orders", "2", "--exact"]
    assert main([*run, "--out", str(tmp_path / "whole")]) == 0
    for stop in (5, 23):  # of 18 rounds of the study's learners, and as many of the others
        interrupted([*run, "--out", str(tmp_path / f"{stop}")], stop)
        assert main([*run, "--out", str(tmp_path / f"{stop}")]) == 0
        assert (tmp_path / f"{stop}" / "scores.json").read_bytes() == (tmp_path / "whole" / "scores.json").read_bytes()
    scores = json.loads((tmp_path / "whole" / "scores.json").read_text())
    entries = scores["experiments"]["tokenizer"]
    assert len(entries) == 2 and entries[0]["subwords"] != scores["corpus"]["tokens_per_word"]
    for entry, matrix in zip(entries, scores["runs"], strict=True):
        assert entry["study"]["order"] == entry[BALANCED]["order"] == matrix["order"]
        assert f1_from_counts(entry["study"]["end"]).tolist() == matrix["R"][-1]
        assert None not in (*entry["study"]["end"], *entry[BALANCED]["end"], *entry[BALANCED]["learned"])
    assert any("balanced tokenizer" in choice for choice in scores["choices"])
    assert "<h2>Is it the tokenizer?</h2>" in (tmp_path / "whole" / "report.html").read_text()


def test_learners_of_a_tokenizer_are_those_of_a_run_with_that_tokenizer(cache, tmp_path):
    """With its utterances, its backbone and the draw of the study's learners."""
    run = [*SMALL, "--cache", cache, "--strategies", "shared", "--exact"]
    assert main([*RUN, *run[len(SMALL) :], "--out", str(tmp_path / "both")]) == 0
    with Console().progress() as progress:
        corpus, _ = prepare(parse([*RUN, *run[len(SMALL) :]]), progress)
    folder = str(corpus.under(BALANCED).tokenizer_folder)
    assert main([*run, "--experiments", "--tokenizer", folder, "--out", str(tmp_path / "alone")]) == 0
    both, alone = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("both", "alone"))
    (entry,) = both["experiments"]["tokenizer"]
    assert entry["subwords"] == alone["corpus"]["tokens_per_word"] != both["corpus"]["tokens_per_word"]
    with open(tmp_path / "alone" / "scores.csv", newline="") as file:
        cells = {(row["step"], row["tested"]): [int(row[name]) for name in COLUMNS[-3:]] for row in csv.DictReader(file)}
    order = entry[BALANCED]["order"]
    assert entry[BALANCED]["learned"] == [cells[str(i), locale] for i, locale in enumerate(order, 1)]
    assert entry[BALANCED]["end"] == [cells["3", locale] for locale in order]
    assert any(predicted for _, predicted, _ in entry[BALANCED]["learned"]), "spans were found, so that learners can differ"


def test_the_studys_own_scores_are_those_without_the_experiment(cache, tmp_path):
    run = [*RUN, "--cache", cache, "--strategies", "non-shared", "shared", "--exact"]
    assert main([*run, "--out", str(tmp_path / "with")]) == 0
    assert main([*run, "--experiments", "--out", str(tmp_path / "without")]) == 0
    one, other = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("with", "without"))
    assert one["runs"] == other["runs"] and "experiments" not in other
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("with", "without")]
    assert configs[0].keys() - configs[1].keys() == {"experiments", "corpus, balanced"}


def test_the_plan_counts_tokens_under_both(cache):
    with Console().progress() as progress:
        corpus, study = prepare(parse([*RUN, "--cache", cache, "--strategies", "shared"]), progress)
        lines = dict(describe(parse(RUN), corpus, study, Machine(1, "cpu", 8 << 30)))
    own, other = (Stream.of(corpus, learner) for learner in study.learners)
    assert own.tokens() != other.tokens() and own.steps() == other.steps()
    assert lines["cohort 1"].split(", ")[2] == f"{own.tokens()} tokens"
    assert lines["cohort 2"].split(", ")[2] == f"{other.tokens()} tokens"
    balanced = corpus.under(BALANCED)
    scored = [
        (c, locale) for c, to in zip((corpus, balanced), study.to_score, strict=True) for row in to.values() for locale in row
    ]
    assert lines["scoring"] == f"{sum(len(c.sentences(locale, 'test').input_ids) for c, locale in scored)} tokens"
    assert tiny_config(parse(RUN), balanced).vocab_size == balanced.vocab_size


def test_learners_that_diverged(cache, tmp_path):
    folder = tmp_path / "run"
    assert main([*RUN, "--cache", cache, "--out", str(folder), "--strategies", "shared", "--lr", "1e30"]) == DIVERGED
    assert "SHARED LoRA r=2 diverged." in (folder / "report.html").read_text()
