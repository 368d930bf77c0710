"""Parsing of utterances, the tokenised corpus against transformers' own encoding, the cache, the errors."""

import contextlib
import io
import json
import multiprocessing
import os
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kloss.cl import cache as cache_module
from kloss.cl import corpus as corpus_module
from kloss.cl import massive
from kloss.cl.corpus import IGNORED, cache_folder, load_corpus
from kloss.cl.languages import LOCALES
from kloss.cl.synthetic import generate
from kloss.cl.tokenizer import train_tokenizer
from kloss.errors import UserError

SMALL = ("en-US", "ja-JP", "th-TH")


def shared_folder() -> Path:
    folder = Path(__file__).resolve().parents[1].parent / "shared"
    if not (folder / "massive").is_dir():
        pytest.skip("no ../shared with MASSIVE here")
    return folder


def records(locale="en-US", texts=("play [song_name : blue moon] now", "stop it", "call [person : ann]")):
    for i, text in enumerate(texts):
        utt = " ".join(massive.parse(text, "en-US")[0])
        yield {"id": str(i), "locale": locale, "partition": "train", "utt": utt, "annot_utt": text}


def write(folder: Path, rows, name="en-US.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    (folder / name).write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for locale in SMALL:
        write(folder, generate([locale], train=40, dev=5, test=10), f"{locale}.jsonl")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tokenizer")
    texts = [json.loads(line)["utt"] for file in sorted(data.glob("*.jsonl")) for line in file.open(encoding="utf-8")]
    train_tokenizer(texts, folder, vocab_size=600)
    return folder


def archive(folder: Path, path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as tar:
        tar.add(folder, arcname="1.1/data")
        tar.addfile(tarfile.TarInfo("1.1/data/._en-US.jsonl"), io.BytesIO())
    return path


WORD = st.text(st.characters(exclude_categories=("Z", "C"), exclude_characters="[]"), min_size=1, max_size=5)
SLOT = st.sampled_from(["time", "place_name", "person"])
CHUNKS = st.lists(st.tuples(st.none() | SLOT, st.lists(WORD, min_size=1, max_size=4)), min_size=1, max_size=6)


@given(CHUNKS, st.sampled_from([" ", "  "]))
def test_parse_gives_words_and_slots_back(chunks, space):
    parts = [space.join(words) if slot is None else f"[{slot} : {space.join(words)}]" for slot, words in chunks]
    words, labels = massive.parse(space.join(parts), "en-US")
    assert words == [word for _, words in chunks for word in words]
    tags = [(slot, i) for slot, words in chunks for i in range(len(words))]
    assert labels == ["O" if slot is None else f"{'I' if i else 'B'}-{slot}" for slot, i in tags]


@given(CHUNKS, st.sampled_from(["ja-JP", "zh-CN", "zh-TW"]))
def test_parse_by_character_loses_nothing(chunks, locale):
    parts = [" ".join(words) if slot is None else f"[{slot} : {' '.join(words)}]" for slot, words in chunks]
    words, labels = massive.parse(" ".join(parts), locale)
    assert "".join(words) == "".join(word for _, words in chunks for word in words)
    assert len(words) == len(labels)
    assert all(len(word) == 1 or word.isascii() for word in words)
    assert sum(label[0] == "B" for label in labels) == sum(slot is not None for slot, _ in chunks)


@pytest.mark.parametrize(
    ("locale", "text", "words", "labels"),
    [
        ("en-US", "at [time : 10:30 pm]", ["at", "10:30", "pm"], ["O", "B-time", "I-time"]),
        ("en-US", "[date:friday][time:nine]", ["friday", "nine"], ["B-date", "B-time"]),
        ("ja-JP", "[radio_name : abc fm局] を", ["abc", "fm", "局", "を"], ["B-radio_name", *["I-radio_name"] * 2, "O"]),
        ("zh-CN", "放 [artist_name : 周杰倫]", list("放周杰倫"), ["O", "B-artist_name", *["I-artist_name"] * 2]),
        ("th-TH", "เล่า มุก [joke_type : ตลก]", ["เล่า", "มุก", "ตลก"], ["O", "O", "B-joke_type"]),
    ],
)
def test_parse_examples(locale, text, words, labels):
    assert massive.parse(text, locale) == (words, labels)


@pytest.mark.parametrize(
    "text", ["a [time : b", "a ] b", "[time : a [date : b]]", "[ : a]", "[time a]", "[time : ]", "[the time : a]", "[]"]
)
def test_malformed_annotation_names_file_and_line(tmp_path, text):
    rows = [*records(), {"id": "9", "locale": "en-US", "partition": "train", "utt": "a b", "annot_utt": text}]
    refuses(write(tmp_path / "data", rows), r"en-US\.jsonl:4: (unbalanced|malformed)")


def refuses(data, words, **options):
    cache = cache_folder(Path(str(data) + "-cache")) if "cache" not in options else options.pop("cache")
    with pytest.raises(UserError, match=words) as caught:
        load_corpus(data, cache=cache, **options)
    assert "\n" not in str(caught.value)
    assert not list(Path(cache).glob("corpus-*"))


def per_utterance(row, tokenizer, labels, max_length):
    """Ids and labels of one utterance with transformers' own encoding and word_ids."""
    words, names = massive.parse(row["annot_utt"], row["locale"])
    encoded = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length)
    marks, previous = [], None
    for word in encoded.word_ids():
        marks.append(IGNORED if word is None or word == previous else labels.index(names[word]))
        previous = word
    return encoded["input_ids"], marks


def assert_equals_transformers(corpus, rows, tokenizer_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    for locale in corpus.locales:
        for partition in massive.PARTITIONS:
            found = corpus.sentences(locale, partition)
            chosen = [row for row in rows if (row["locale"], row["partition"]) == (locale, partition)]
            assert len(found.offsets) == len(chosen) + 1
            for i, row in enumerate(chosen):
                ids, marks = per_utterance(row, tokenizer, corpus.labels, corpus.max_length)
                tokens = slice(*found.offsets[i : i + 2])
                assert found.input_ids[tokens].tolist() == ids
                assert found.labels[tokens].tolist() == marks


def rows_of(folder):
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.open(encoding="utf-8")]


@pytest.mark.parametrize("max_length", [128, 9])
def test_equals_transformers(data, tokenizer, tmp_path, max_length):
    corpus = load_corpus(data, tokenizer=tokenizer, cache=tmp_path, max_length=max_length)
    assert corpus.locales == SMALL and corpus.labels[0] == "O" and list(corpus.labels[1:]) == sorted(corpus.labels[1:])
    assert_equals_transformers(corpus, rows_of(data), tokenizer)
    longest = max(np.diff(corpus.sentences(locale, "train").offsets).max() for locale in SMALL)
    assert (longest == 9 and min(corpus.truncated.values()) > 0) if max_length == 9 else not any(corpus.truncated.values())
    ids = (corpus.bos_id, corpus.pad_id, corpus.eos_id, corpus.unk_id, corpus.mask_id)
    assert ids == (0, 1, 2, 3, corpus.vocab_size - 1)


def test_arrays(data, tokenizer, tmp_path):
    corpus = load_corpus(data, tokenizer=tokenizer, cache=tmp_path)
    sentences = corpus.sentences("ja-JP", "dev")
    assert [a.dtype for a in sentences] == [np.int32, np.int32, np.int64]
    assert isinstance(sentences.input_ids, np.memmap) and not sentences.input_ids.flags.writeable
    assert sentences.offsets[0] == 0 and len(sentences.input_ids) == len(sentences.labels) == sentences.offsets[-1]


def test_tokens_per_word(data, tokenizer, tmp_path):
    corpus = load_corpus(data, tokenizer=tokenizer, cache=tmp_path)
    for locale in SMALL:
        train = corpus.sentences(locale, "train")
        pieces = len(train.input_ids) - 2 * (len(train.offsets) - 1)
        assert corpus.tokens_per_word(locale) == pieces / (train.labels != IGNORED).sum() > 1


def test_words_without_pieces_keep_their_label(tmp_path, tokenizer):
    rows = list(records(texts=("play [song_name : \u00ad moon] \ufeff",)))
    corpus = load_corpus(write(tmp_path / "data", rows), tokenizer=empties(tokenizer, tmp_path), cache=tmp_path / "c")
    sentences = corpus.sentences("en-US", "train")
    kept = sentences.labels != IGNORED
    assert [corpus.labels[i] for i in sentences.labels[kept]] == ["O", "B-song_name", "I-song_name", "O"]
    assert sentences.input_ids[kept][[1, 3]].tolist() == [corpus.unk_id] * 2


def empties(folder: Path, tmp_path: Path) -> Path:
    """A copy of the tokenizer that strips the soft hyphen and the byte order mark."""
    text = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    strip = [{"type": "Replace", "pattern": {"String": c}, "content": ""} for c in "\u00ad\ufeff"]
    text["normalizer"] = {"type": "Sequence", "normalizers": [text["normalizer"], *strip]}
    copy = tmp_path / "strips"
    copy.mkdir()
    (copy / "tokenizer.json").write_text(json.dumps(text), encoding="utf-8")
    (copy / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    return copy


def test_sorted_by_id(tmp_path, tokenizer):
    rows = [r | {"id": i} for r, i in zip(records(), ["10", "9", "100"], strict=True)]
    corpus = load_corpus(write(tmp_path / "a", rows), tokenizer=tokenizer, cache=tmp_path / "c")
    ordered = load_corpus(write(tmp_path / "b", [rows[1], rows[0], rows[2]]), tokenizer=tokenizer, cache=tmp_path / "c")
    assert np.array_equal(corpus.sentences("en-US", "train")[0], ordered.sentences("en-US", "train")[0])


def test_limits_and_fingerprint(data, tokenizer, tmp_path):
    def load(**options):
        return load_corpus(data, tokenizer=tokenizer, cache=tmp_path, **options)

    whole, limited = load(), load(limit=7, eval_limit=3)
    for partition, n in (("train", 7), ("dev", 3), ("test", 3)):
        for locale in SMALL:
            a, b = whole.sentences(locale, partition), limited.sentences(locale, partition)
            total = len(a.offsets) - 1
            chosen = [i * total // n for i in range(n)]  # at even distances, the same ids in every locale
            assert len(set(chosen)) == n == len(b.offsets) - 1 < total
            for i, j in enumerate(chosen):
                for name in ("input_ids", "labels"):
                    mine = getattr(b, name)[b.offsets[i] : b.offsets[i + 1]]
                    assert np.array_equal(mine, getattr(a, name)[a.offsets[j] : a.offsets[j + 1]])
    assert len(list(tmp_path.glob("corpus-*"))) == 1
    turned = ({"locales": reversed(SMALL)}, {"locales": SMALL[:2]}, {"max_length": 20}, {"limit": 7}, {"eval_limit": 7})
    prints = [load(**options).fingerprint for options in ({}, *turned)]
    assert len(set(prints)) == len(prints) and load().fingerprint == prints[0]
    assert load(limit=1000).sentences("en-US", "train").offsets[-1] == whole.sentences("en-US", "train").offsets[-1]
    assert load(locales=["th-TH", "en-US"]).locales == ("th-TH", "en-US")


def test_fingerprint_follows_content(tmp_path, tokenizer):
    prints = set()
    for i, texts in enumerate((("go [time : now]",), ("go [date : now]",), ("go [date : now]", "stop"))):
        folder = write(tmp_path / str(i) / "same", records(texts=texts))
        prints.add(load_corpus(folder, tokenizer=tokenizer, cache=tmp_path / "c").fingerprint)
    prints.add(load_corpus(folder, tokenizer=empties(tokenizer, tmp_path), cache=tmp_path / "c").fingerprint)
    assert len(prints) == 4


def same(a, b):
    assert a.labels == b.labels and a.locales == b.locales
    for locale in a.locales:
        for partition in massive.PARTITIONS:
            pairs = zip(a.sentences(locale, partition), b.sentences(locale, partition), strict=True)
            assert all(np.array_equal(x, y) for x, y in pairs)


@pytest.mark.parametrize(("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tgz", "w:gz"), ("a.tar.xz", "w:xz")])
def test_archives(data, tokenizer, tmp_path, name, mode):
    path = archive(data, tmp_path / name, mode)
    same(load_corpus(path, tokenizer=tokenizer, cache=tmp_path), load_corpus(data, tokenizer=tokenizer, cache=tmp_path))


@pytest.mark.parametrize("sub", ["data", "jsonl"])
def test_folders_within(data, tokenizer, tmp_path, sub):
    for file in data.glob("*.jsonl"):
        write(tmp_path / "x" / sub, [line.rstrip() for line in file.open(encoding="utf-8")], file.name)
    corpus = load_corpus(tmp_path / "x", tokenizer=tokenizer, cache=tmp_path)
    same(corpus, load_corpus(data, tokenizer=tokenizer, cache=tmp_path))


def test_only_wanted_files_are_read(tokenizer, tmp_path):
    write(tmp_path / "d", records())
    write(tmp_path / "d", ["not JSON"], "de-DE.jsonl")
    assert load_corpus(tmp_path / "d", tokenizer=tokenizer, cache=tmp_path, locales=["en-US"]).locales == ("en-US",)


@pytest.mark.parametrize("per_locale", [True, False])
def test_through_datasets(data, tokenizer, tmp_path, per_locale):
    """A folder of parquet as `datasets` loads it: a configuration per locale, as on the hub, or one."""
    datasets = pytest.importorskip("datasets")
    rows, folder = rows_of(data), tmp_path / "hub"
    folder.mkdir()
    configs = []
    for config in SMALL if per_locale else ["default"]:
        files = []
        for split in massive.PARTITIONS:
            chosen = [r for r in rows if r["partition"] == split and (not per_locale or r["locale"] == config)]
            split = "validation" if split == "dev" else split
            table = [{k: v for k, v in r.items() if k != "partition"} | {"scenario": 3} for r in chosen]
            datasets.Dataset.from_list(table).to_parquet(folder / f"{config}-{split}.parquet")
            files.append(f"  - split: {split}\n    path: {config}-{split}.parquet\n")
        configs.append(f"- config_name: {config}\n  data_files:\n" + "".join(files))
    (folder / "README.md").write_text("---\nconfigs:\n" + "".join(configs) + "---\n", encoding="utf-8")
    for locales in (None, ["ja-JP"]):
        corpus = load_corpus(folder, tokenizer=tokenizer, cache=tmp_path, locales=locales)
        same(corpus, load_corpus(data, tokenizer=tokenizer, cache=tmp_path, locales=locales))


def test_synthetic_and_its_tokenizer(tmp_path):
    options = {"train": 20, "dev": 2, "test": 3}
    corpus = load_corpus("synthetic", locales=SMALL, synthetic=options, cache=tmp_path, seed=5)
    assert_equals_transformers(corpus, list(generate(SMALL, **options, seed=5)), corpus.tokenizer_folder)
    again = load_corpus("synthetic", locales=SMALL, synthetic=options | {"seed": 5}, cache=tmp_path)
    other = load_corpus("synthetic", locales=SMALL, synthetic=options, cache=tmp_path)
    assert again.fingerprint == corpus.fingerprint != other.fingerprint
    assert len(list(tmp_path.glob("tokenizer-*"))) == len(list(tmp_path.glob("corpus-*"))) == 2


def test_second_load_tokenises_nothing(data, tokenizer, tmp_path, monkeypatch):
    calls = []
    first = load_corpus(data, tokenizer=tokenizer, cache=tmp_path, progress=lambda *call: calls.append(call))
    assert {text for _, _, text in calls} >= {"tokenising words", "putting sentences together"}
    monkeypatch.setattr(corpus_module, "_build", None)
    same(first, load_corpus(data, tokenizer=tokenizer, cache=tmp_path))


def test_default_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kloss" and (tmp_path / "kloss").is_dir()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "kloss"
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache"):
        cache_folder(tmp_path / "file")


def build(data, tokenizer, cache, signals, pause):
    """In another process: load, stopping at `pause` until told to go on."""
    written = cache_module.written

    @contextlib.contextmanager
    def wait(*arguments, **options):
        with written(*arguments, **options) as temporary:
            yield temporary
            signals[0].set()
            assert signals[1].wait(60)

    if pause:
        cache_module.written = wait
    load_corpus(data, tokenizer=tokenizer, cache=cache)


def test_killed_writer_and_two_writers(data, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    signals = context.Event(), context.Event()
    killed = context.Process(target=build, args=(data, tokenizer, tmp_path, signals, True))
    killed.start()
    assert signals[0].wait(60)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert not list(tmp_path.glob("corpus-*")) and len(left := list(tmp_path.glob(".tmp-*"))) == 1

    signals = context.Event(), context.Event()
    slow = context.Process(target=build, args=(data, tokenizer, tmp_path, signals, True))
    slow.start()
    assert signals[0].wait(60)
    os.utime(left[0], (0, time.time() - 100_000))
    first = load_corpus(data, tokenizer=tokenizer, cache=tmp_path)
    signals[1].set()
    slow.join(60)
    assert slow.exitcode == 0 and not list(tmp_path.glob(".tmp-*"))
    same(first, load_corpus(data, tokenizer=tokenizer, cache=tmp_path))


GOOD = {"id": "9", "locale": "en-US", "partition": "train", "utt": "a b", "annot_utt": "a b"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", r"en-US\.jsonl:4: not a line of JSON"),
        ("[1]", r"en-US\.jsonl:4: not a JSON object"),
        ({k: v for k, v in GOOD.items() if k != "annot_utt"}, r":4: key 'annot_utt' is missing"),
        (GOOD | {"utt": None}, r":4: key 'utt' is not a text"),
        (GOOD | {"utt": "a c"}, r":4: annot_utt without its brackets is not utt"),
        (GOOD | {"utt": " ", "annot_utt": " "}, r":4: the utterance has no words"),
        (GOOD | {"locale": "en-UK"}, r":4: unknown locale 'en-UK'"),
        (GOOD | {"partition": "trian"}, r":4: unknown partition 'trian'; allowed: train"),
    ],
)
def test_wrong_lines(tmp_path, row, words):
    refuses(write(tmp_path / "data", [*records(), row]), words)


def test_wrong_sources(data, tokenizer, tmp_path):
    def refused(source, words, **options):
        refuses(source, words, tokenizer=tokenizer, cache=tmp_path, **options)

    refused(tmp_path / "nothing", "no such file or folder")
    refused("nothing.tar.gz", "no such file or folder")
    refused("nothing", "no such file or folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "jsonl")
    (tmp_path / "a.zip").write_bytes(b"PK")
    refused(tmp_path / "a.zip", "allowed")
    refused(write(tmp_path / "blank", []), "has no utterances")
    refused(data, "de-DE", locales=["de-DE", "en-US"])
    refused(data, "did you mean en-US", locales=["en-UK"])
    refused(data, "no locales", locales=[])
    refused(data, "limit must be at least 1, not 0", limit=0)
    refused(data, "max_length must be at least 3", max_length=2)
    refused(data, "synthetic options", synthetic={"train": 3})
    refused("synthetic", "unknown option", synthetic={"trian": 3})
    only_test = write(tmp_path / "only", [r | {"partition": "test"} for r in records()])
    refused(only_test, "no training utterances in en-US")


@pytest.mark.parametrize(("name", "mode"), [("a.tar.gz", "w:gz"), ("a.tar.xz", "w:xz")])
@pytest.mark.parametrize("damage", ["cut", "garbage", "checksum"])
def test_broken_archives(data, tmp_path, tokenizer, name, mode, damage):
    path = archive(data, tmp_path / name, mode)
    content = bytearray(path.read_bytes())
    content = {"cut": content[: len(content) // 2], "garbage": b"no archive" * 99, "checksum": content}[damage]
    if damage == "checksum":
        content[-6] ^= 1
    path.write_bytes(content)
    refuses(path, "broken or unreadable archive", tokenizer=tokenizer, cache=tmp_path)


def test_wrong_tokenizers(data, tmp_path):
    (tmp_path / "t").mkdir()
    refuses(data, "cannot load a tokenizer", tokenizer=tmp_path / "t", cache=tmp_path)


@pytest.mark.massive
def test_massive_equals_transformers(tmp_path):
    folder, locales = shared_folder(), ("my-MM", "en-US", "zh-TW", "km-KH", "ur-PK")
    path, tokenizer = folder / "massive" / "massive-1.1-compact.tar.xz", folder / "xlmr-tokenizer"
    corpus = load_corpus(path, tokenizer=tokenizer, locales=locales, cache=tmp_path, limit=300, eval_limit=100)
    assert (corpus.vocab_size, corpus.bos_id, corpus.pad_id, corpus.eos_id, corpus.unk_id) == (250002, 0, 1, 2, 3)
    found, rows = {}, []
    for place, record in massive.open_source(path, locales).read():
        locale, partition, _, _ = massive.utterance(place, record)
        found.setdefault((locale, partition), []).append(record)
    for (_, partition), records in found.items():
        n = 300 if partition == "train" else 100
        rows += [records[i * len(records) // n] for i in range(n)]
    taken = {place: len(records) for place, records in found.items()}
    assert_equals_transformers(corpus, rows, tokenizer)
    assert taken == {(lo, p): n for lo in locales for p, n in (("train", 11514), ("dev", 2033), ("test", 2974))}


@pytest.mark.massive
def test_massive_whole(tmp_path):
    folder = shared_folder()
    path, tokenizer = folder / "massive" / "massive-1.1-compact.tar.xz", folder / "xlmr-tokenizer"
    start = time.monotonic()
    corpus = load_corpus(path, tokenizer=tokenizer, cache=tmp_path)
    cold = time.monotonic() - start
    start = time.monotonic()
    load_corpus(path, tokenizer=tokenizer, cache=tmp_path)
    warm = time.monotonic() - start
    assert corpus.locales == LOCALES and len(corpus.labels) == 111
    assert all(len(corpus.sentences(lo, p).offsets) == n + 1 for lo in LOCALES for p, n in (("train", 11514), ("test", 2974)))
    assert round(corpus.tokens_per_word("vi-VN"), 2) == 1.16 and round(corpus.tokens_per_word("my-MM"), 1) == 3.5
    assert cold < 180 and warm < 3, (cold, warm)
