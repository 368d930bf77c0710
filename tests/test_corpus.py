"""Parsing of utterances, the tokenised corpus against transformers' own encoding, the cache, the errors."""

import contextlib
import gzip
import io
import json
import multiprocessing
import os
import re
import signal
import tarfile
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_files import ODD_ENTRIES, make_odd_entry, unprivileged

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


def lines(*ids, **more):
    return [GOOD | {"id": i} | more for i in ids]


def tar_of(path: Path, *members: tuple[tarfile.TarInfo | str, bytes]) -> Path:
    """An archive with members of these names or headers."""
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for header, content in members:
            if isinstance(header, str):
                header = tarfile.TarInfo(header)
                header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


@pytest.mark.parametrize("partition", ["train", "test"])
@pytest.mark.parametrize(
    ("names", "first", "second"),
    [
        (["en-US.jsonl", "data/en-US.jsonl"], "data/en-US.jsonl:2", "d/en-US.jsonl:1"),  # read in the order of their paths
        (["en-US.jsonl", "en-US (1).jsonl"], "d/en-US (1).jsonl:2", "d/en-US.jsonl:1"),
        (["en-US.jsonl", "jsonl/all.jsonl"], "d/en-US.jsonl:1", "jsonl/all.jsonl:2"),
        (["1.0/data/en-US.jsonl", "1.1/data/en-US.jsonl"], "data/en-US.jsonl:1", "data/en-US.jsonl:2"),  # in an archive
    ],
)
def test_an_id_in_two_files(tmp_path, tokenizer, partition, names, first, second):
    rows = [lines("7"), lines("8", "7", partition=partition)]
    if names[0] == "en-US.jsonl":
        source = tmp_path / "d"
        for name, some in zip(names, rows, strict=True):
            write((source / name).parent, some, Path(name).name)
    else:
        contents = ["\n".join(map(json.dumps, some)).encode() for some in rows]
        source = tar_of(tmp_path / "a.tar.gz", *zip(names, contents, strict=True))
    for folder in (tokenizer, None):  # None: a tokenizer is trained on the texts first
        with pytest.raises(UserError, match="en-US has the id '7' already, at ") as caught:
            load_corpus(source, tokenizer=folder, cache=tmp_path / "c")
        message = str(caught.value)
        assert re.findall(r"([^/]+/[^/]+\.jsonl:\d+)", message) == [second, first] and "\n" not in message
        assert source.suffix != ".gz" or "a.tar.gz/1.1/data" in message and "a.tar.gz/1.0/data" in message
    assert not [*(tmp_path / "c").glob("corpus-*"), *(tmp_path / "c").glob("tokenizer-*")]


def test_an_id_in_two_places_that_are_no_fault(tmp_path, tokenizer):
    rows = [*lines("1", "2"), *lines("1", "2", locale="de-DE"), *lines("3", "3", locale="fr-FR")]
    folder = write(tmp_path / "d", rows, "all.jsonl")
    corpus = load_corpus(folder, tokenizer=tokenizer, locales=["en-US", "de-DE"], cache=tmp_path)  # fr-FR is not read
    assert [corpus.sentences(locale, "train").number for locale in corpus.locales] == [2, 2]
    refuses(folder, r"all\.jsonl:6: fr-FR has the id '3' already, at .*all\.jsonl:5", tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ODD_ENTRIES)
def test_entries_that_are_no_files(tokenizer, tmp_path, kind):
    """Refused where they have the name of a wanted locale, else not looked at."""
    folder = write(tmp_path / "d", records())
    words = make_odd_entry(folder / "de-DE.jsonl", kind)
    refuses(folder, rf"de-DE\.jsonl:? {words}", tokenizer=tokenizer, cache=tmp_path / "c")
    assert load_corpus(folder, tokenizer=tokenizer, cache=tmp_path, locales=["en-US"]).locales == ("en-US",)


@pytest.mark.parametrize("kind", [kind for kind in ODD_ENTRIES if kind != "folder"])
@pytest.mark.parametrize("name", ["a.tar.gz", "a.txt"])
def test_sources_that_are_no_files(tokenizer, tmp_path, kind, name):
    words = make_odd_entry(tmp_path / name, kind)
    refuses(tmp_path / name, words, tokenizer=tokenizer, cache=tmp_path / "c")


def test_folders_without_permission(tokenizer, tmp_path):
    folder = write(tmp_path / "d", records())
    write(folder / "data", records(locale="de-DE"), "de-DE.jsonl")
    for part in (folder / "data" / "de-DE.jsonl", folder / "data", folder):
        mode = part.stat().st_mode
        part.chmod(0)
        tmp_path.chmod(0o755)
        with unprivileged(), pytest.raises(UserError, match=r"cannot (read|use) .*: Permission denied"):
            massive.open_source(folder, None)
        part.chmod(mode)


def test_paths_that_are_none(tokenizer, tmp_path):
    for path, words in (("a\0b", "null byte"), ("~nosuchuser/x", "no home folder"), ("a" * 5000, "too long"), ("", "is empty")):
        refuses(path, words, tokenizer=tokenizer, cache=tmp_path)


@pytest.mark.parametrize(
    "text, words",
    [
        ('{"a": ' * 100_000, "not a line of JSON: maximum recursion depth"),
        ('{"a": ' + "1" * 5000 + "}", "not a line of JSON: .*4300 digits"),
        ("\x00" * 5_000_000, "not a line of JSON"),
        (GOOD | {"annot_utt": "[" * 5_000_000}, "unbalanced or nested"),
        (GOOD | {"annot_utt": "a " * 5_000_000}, "without its brackets is not utt"),
        (GOOD | {"locale": "a" * 5_000_000}, "unknown locale"),
        (GOOD | {"partition": "\n" * 5_000_000}, "unknown partition"),
        (GOOD | {"annot_utt": "\ud800", "utt": "\ud800"}, "surrogates not allowed"),
        (GOOD | {"annot_utt": "[\ud800 : a] b"}, "surrogates not allowed"),
    ],
)
def test_lines_of_hostile_data(tmp_path, text, words):
    line = text if isinstance(text, str) else json.dumps(text)
    folder = write(tmp_path / "d", [*records(), line])
    with pytest.raises(UserError, match=rf"en-US\.jsonl:4: .*{words}") as caught:
        load_corpus(folder, cache=tmp_path / "c")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 2000


def test_a_line_without_end(tmp_path):
    """1 GB of zeros packed into 1 MB: refused within 20 MB, where it took 2.2 GB."""
    path, block = tmp_path / "a.tar.gz", gzip.compress(bytes(1 << 20))
    header = tarfile.TarInfo("en-US.jsonl")
    header.size = 1 << 30
    path.write_bytes(gzip.compress(header.tobuf()) + block * 1024)
    tracemalloc.start()
    try:
        refuses(path, "en-US.jsonl:1: the line has more than 16,777,216 bytes")
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()


def numbered(size: int, name: str = "en-US.jsonl", kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header with a size and a type of one's own."""
    header = tarfile.TarInfo(name)
    header.type = kind
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 8 * 32 + sum(block[156:]))
    return bytes(block)


ROW = json.dumps(GOOD).encode() + b"\n"


def test_headers_with_nonsense_numbers(tmp_path):
    """Each stands in front of a good archive, or in the place of its second header."""
    good = tar_of(tmp_path / "good.tar", ("en-US.jsonl", ROW), ("de-DE.jsonl", ROW.replace(b"en-US", b"de-DE"))).read_bytes()
    assert len(list(massive.open_source(tmp_path / "good.tar", None).read())) == 2

    def pax(**values):
        header = tarfile.TarInfo("en-US.jsonl")
        header.pax_headers = {name.replace("_", "."): value for name, value in values.items()}
        return header.tobuf(tarfile.PAX_FORMAT) + good

    for number, (content, words) in enumerate((
        (numbered(1 << 80, "README") + good, "it ends within a member"),
        (numbered(-1000) + good, "en-US.jsonl has a size of -1,000 bytes"),
        (numbered(1 << 30, kind=tarfile.GNUTYPE_LONGNAME) + good, "has a size of 1,073,741,824 bytes"),
        (numbered(1 << 30, kind=tarfile.XHDTYPE) + good, "has a size of 1,073,741,824 bytes"),
        (numbered(10, kind=tarfile.GNUTYPE_SPARSE) + good, "en-US.jsonl is a sparse file"),
        (pax(size="-5"), "en-US.jsonl has a size of -5 bytes"),
        (pax(size="9" * 30), "not a line of JSON"),
        (pax(GNU_sparse_map="0,x", GNU_sparse_size="1"), "ValueError: invalid literal"),
        (pax(GNU_sparse_size="x"), "ValueError: invalid literal"),
        (good[:1024] + bytes([good[1024] ^ 1]) + good[1025:], "bad checksum"),  # of the second header
        (good[:600], "unexpected end of data"),
        (good[:1024], "it ends without its end mark"),  # behind the first member
        (good[:1100], "it ends without its end mark"),
    )):  # fmt: skip
        path = tmp_path / f"{number}.tar"
        path.write_bytes(content)
        started = time.monotonic()
        with pytest.raises(UserError, match=words) as caught:
            list(massive.open_source(path, None).read())
        assert str(caught.value).startswith(str(path)) and str(caught.value).isprintable()
        assert time.monotonic() - started < 10


def test_a_long_name_in_an_archive(tmp_path):
    """A header of honest length is read."""
    name = f"{'a' * 50}/" * 20 + "en-US.jsonl"
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as tar:
            header = tarfile.TarInfo(name)
            header.size = len(ROW)
            tar.addfile(header, io.BytesIO(ROW))
        assert [record for _, record in massive.open_source(tmp_path / "a.tar", None).read()] == [GOOD]


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


def test_of_a_very_long_word_the_beginning_is_tokenised():
    """XLM-R's tokenizer takes 3.4 s for a million characters."""
    from kloss.cl.corpus import LONGEST_WORD, _tokenise

    seen = []

    def tokenizer(batch, **_):
        seen.extend(batch)
        return {"input_ids": [[7]] * len(batch)}

    pieces, starts = _tokenise(["a", "b" * 2_000_000], tokenizer, 3, lambda *_: None)
    assert [[len(word) for word in words] for words in seen] == [[1], [LONGEST_WORD]]
    assert pieces.tolist() == [7, 7] and starts.tolist() == [0, 1, 2]
