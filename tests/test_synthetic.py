"""The synthetic corpus: what its two dials move and leave alone, its spelling, stability and tokenizer."""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import unicodedata
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kloss.cl import massive, synthetic
from kloss.cl.languages import CHARACTER_LOCALES, LANGUAGES, LOCALES
from kloss.cl.synthetic import generate
from kloss.cl.tokenizer import SPECIAL, train_tokenizer, train_unigram
from kloss.errors import UserError

SPACED = tuple(locale for locale in LOCALES if LANGUAGES[locale].spaced)
KIN = [(a, b) for a, b in itertools.combinations(SPACED, 2) if LANGUAGES[a].family == LANGUAGES[b].family]
SLOTS = {
    "time", "date", "place_name", "person", "artist_name", "song_name", "business_name", "food_type",
    "event_name", "weather_descriptor", "color_type", "device_type", "house_place", "transport_type",
    "currency_name",
}  # fmt: skip


def parsed(locales=SPACED, **options):
    """locale -> (words, labels) of every utterance, by id."""
    found = {locale: [] for locale in locales}
    for number, record in enumerate(generate(locales, **options)):
        locale, _, words, labels = massive.utterance(("synthetic", number), record)
        found[locale].append((words, labels))
    return found


def jaccard(found, pairs):
    types = {locale: {word for words, _ in utterances for word in words} for locale, utterances in found.items()}
    return np.array([len(types[a] & types[b]) / len(types[a] | types[b]) for a, b in pairs])


def same_structure(found, pairs):
    """Share of the utterances whose label sequences, hence word order, are equal in both languages."""
    return np.mean([x == y for a, b in pairs for (_, x), (_, y) in zip(found[a], found[b], strict=True)])


def test_overlap_moves_shared_words_only():
    pairs = [*KIN, *itertools.combinations(["en-US", "ru-RU", "hi-IN", "tr-TR", "ar-SA", "fi-FI"], 2)]
    structures = []
    for overlap in (0.0, 0.4, 1.0):
        found = parsed(overlap=overlap, train=150, dev=0, test=0)
        assert np.abs(jaccard(found, pairs) - overlap / (2 - overlap)).max() < 0.08
        structures.append(same_structure(found, KIN))
    assert len(set(structures)) == 1


def test_relatedness_moves_structure_only():
    others = [("en-US", "ru-RU"), ("hi-IN", "tr-TR"), ("ar-SA", "ko-KR"), ("id-ID", "sw-KE")]
    structures, between, words = [], [], []
    for relatedness in (0.0, 0.5, 1.0):
        found = parsed(relatedness=relatedness, overlap=0.4, train=150, dev=0, test=0)
        structures.append(same_structure(found, KIN))
        between.append(same_structure(found, others))
        words.append(jaccard(found, KIN))
    assert structures[0] < 0.35 and structures[0] + 0.1 < structures[1] and structures[2] == 1.0
    assert max(between) < 0.5
    assert np.abs(np.array(words) - 0.25).max() < 0.06


def test_relatedness_moves_stems_and_meanings():
    def lexicons(relatedness):
        return synthetic._lexicons(0.3, relatedness, 0)

    def alike(lexicon, a, b):
        """(share of shared words with one meaning, share of the other words that begin alike)"""
        meanings = {form: concept for concept, form in lexicon[a].items()}
        shared = [(meanings[form], concept) for concept, form in lexicon[b].items() if form in meanings]
        own = [(lexicon[a][c], form) for c, form in lexicon[b].items() if form not in meanings]
        return np.mean([x == y for x, y in shared]), np.mean([x[:2] == y[:2] for x, y in own])

    low, high = lexicons(0.0), lexicons(1.0)
    assert alike(high, "de-DE", "sv-SE")[0] == 1.0 > alike(low, "de-DE", "sv-SE")[0]
    assert alike(high, "de-DE", "sv-SE")[1] > 0.95 and alike(low, "de-DE", "sv-SE")[1] < 0.1
    for lexicon in (low, high):
        assert 0.4 < alike(lexicon, "de-DE", "fi-FI")[0] < 1.0 and alike(lexicon, "de-DE", "fi-FI")[1] < 0.1
        assert all(len(set(words.values())) == len(words) for words in lexicon.values())


def test_dials_are_nested():
    low, high = (synthetic._lexicons(overlap, 0.6, 0)["en-US"] for overlap in (0.2, 0.6))
    other = [synthetic._lexicons(overlap, 0.6, 0)["ru-RU"] for overlap in (0.2, 0.6)]
    assert set(low.values()) & set(other[0].values()) < set(high.values()) & set(other[1].values())


LONGEST = 15  # words of an utterance


@settings(max_examples=8, deadline=None)
@given(st.sets(st.sampled_from(LOCALES), min_size=1, max_size=3), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**40))
def test_every_corpus_is_well_formed(locales, overlap, relatedness, seed):
    options = {"overlap": round(overlap, 2), "relatedness": round(relatedness, 2), "seed": seed}
    for number, record in enumerate(generate(sorted(locales), train=8, dev=2, test=3, **options)):
        assert tuple(record) == massive.KEYS and unicodedata.is_normalized("NFKC", record["utt"])
        locale, _, words, _ = massive.utterance(("synthetic", number), record)
        assert not LANGUAGES[locale].spaced or 4 <= len(words) <= LONGEST
    synthetic._lexicons.cache_clear()


def test_the_longest_utterance_is_what_the_grammar_can_say():
    """All that a frame may have, each value in its longest form: please book the ticket by .. from .. .. to .. .. on .. .."""

    def most(verb, noun, roles):
        slots = [role.rstrip("?").split(":") for role in roles.split()]
        values = sum(bool(marker) + max(len(pools.split()) for _, pools in synthetic._VALUES[slot]) for marker, slot in slots)
        return len(["please", verb]) + (len(["the", noun]) if noun else 0) + values

    assert max(most(*frame) for frame in synthetic._FRAMES) == LONGEST


def test_parallel_and_independent_of_other_locales():
    alone = list(generate(["hi-IN"], train=30, dev=5, test=6))
    together = list(generate(["zh-CN", "hi-IN", "af-ZA"], train=30, dev=5, test=6))
    assert [r for r in together if r["locale"] == "hi-IN"] == alone
    assert Counter(r["partition"] for r in alone) == {"train": 30, "dev": 5, "test": 6}
    assert [r["locale"] for r in together[::41]] == ["zh-CN", "hi-IN", "af-ZA"]
    slots = [[sorted(label for label in labels if label[0] == "B") for _, labels in u] for u in parsed(train=40).values()]
    assert all(other == slots[0] for other in slots)


def test_slots_and_lengths():
    found = parsed(train=200)["en-US"]
    labels = Counter(label for _, labels in found for label in labels)
    assert {label[2:] for label in labels if label != "O"} == SLOTS
    assert min(labels[f"B-{slot}"] for slot in SLOTS) >= 5
    assert 5 < np.mean([len(words) for words, _ in found]) < 8


def test_scripts():
    names = {"Han": "CJK UNIFIED", "Japanese": ("HIRAGANA", "CJK UNIFIED")}
    for locale in LOCALES:
        script = LANGUAGES[locale].script
        name = names.get(script, script.upper())
        letters = "".join(r["utt"] for r in generate([locale], overlap=0, train=30)).replace(" ", "")
        assert all(unicodedata.name(letter).startswith(name) for letter in letters), locale
        assert len(set(letters)) > 15


def test_spaces():
    for locale in LOCALES:
        rows = list(generate([locale], overlap=0, train=100))
        spaced = np.mean([" " in row["utt"] for row in rows])
        assert spaced == (0 if locale in CHARACTER_LOCALES else 1) or not LANGUAGES[locale].spaced
    words = [np.mean([len(row["utt"].split()) for row in generate([locale])]) for locale in ("th-TH", "en-US")]
    assert words[0] < 0.8 * words[1]


def test_golden():
    """If this fails, sentences have changed: count synthetic.VERSION up, and set the new digest."""
    text = json.dumps(list(generate(LOCALES, train=5, dev=1, test=1, seed=3)), ensure_ascii=False)
    digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
    assert (synthetic.VERSION, digest) == (1, "f1cfb1115033323e")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"overlap": 1.1}, "overlap must lie in"),
        ({"relatedness": -0.1}, "relatedness must lie in"),
        ({"relatedness": float("nan")}, "relatedness must lie in"),
        ({"train": 0}, "train must be a whole number, at least 1"),
        ({"test": 1.5}, "test must be"),
        ({"seed": "x"}, "seed must be"),
    ],
)
def test_wrong_options(options, words):
    with pytest.raises(UserError, match=words):
        next(generate(["en-US"], **options))


TEXTS = [record["utt"] for record in generate(LOCALES[:12], train=60, dev=0, test=0)]


def test_tokenizer_is_xlmrs_in_form(tmp_path):
    from transformers import AutoTokenizer

    train_tokenizer(TEXTS, tmp_path, vocab_size=500)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_tokens_to_ids([*SPECIAL, "<mask>"]) == [0, 1, 2, 3, len(tokenizer) - 1]
    assert 490 < len(tokenizer) <= 500
    names = ("cls_token", "pad_token", "sep_token", "unk_token", "mask_token", "bos_token", "eos_token")
    assert [getattr(tokenizer, n) for n in names] == ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<s>", "</s>"]
    encoded = tokenizer(TEXTS[::50])["input_ids"]
    assert all(ids[0] == 0 and ids[-1] == 2 and 3 not in ids for ids in encoded)
    assert tokenizer.batch_decode(encoded, skip_special_tokens=True) == TEXTS[::50]
    assert tokenizer("\u4e95")["input_ids"][-2] == 3


def test_tokenizer_is_the_same_every_time(tmp_path):
    for folder, texts in (("a", TEXTS), ("b", TEXTS[::-1])):
        train_tokenizer(texts, tmp_path / folder, 400)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    words = dict(Counter(word for text in TEXTS for word in text.split()))
    code = "import sys; from kloss.cl.tokenizer import *; print(train_unigram(eval(sys.stdin.read()), 300))"
    environment = os.environ | {"PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, input=repr(words), text=True, check=True, capture_output=True, env=environment)
    assert eval(other.stdout) == train_unigram(words, 300)


def test_unigram_finds_the_words():
    words = {"▁aaab": 50, "▁cd": 40, "▁aaabcd": 30, "▁e": 5, "f": 1}
    pieces = train_unigram(words, 16)
    assert len(pieces) <= 16 and {"▁aaab", "▁cd", "▁", "a", "b", "c", "d", "e", "f"} <= set(pieces)
    assert np.isclose(np.exp(list(pieces.values())).sum(), 1, atol=1e-3)
    assert {"▁", "a"} < set(train_unigram(words, 4)) and len(train_unigram(words, 4)) <= 4


def test_no_room_for_a_tokenizer(tmp_path):
    for texts, size in (([], 100), (["a"], 6)):
        with pytest.raises(UserError, match="cannot train a tokenizer"):
            train_tokenizer(texts, tmp_path, vocab_size=size)
