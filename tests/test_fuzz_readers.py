"""Fuzz what reads a user's data: every input is read or refused in one short line, never a traceback or a hang.

KLOSS_FUZZ=5 tries five times as many.
"""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import os
import shutil
import signal
import tarfile
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import fuzz_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_files import ODD_ENTRIES, make_odd_entry

from kloss.cl import massive
from kloss.cl.corpus import load_corpus
from kloss.cl.study import make_groups
from kloss.cl.tokenizer import train_tokenizer
from kloss.errors import UserError
from kloss.presets import demo


def fuzz(cases):
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]
    examples = fuzz_examples(cases)
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=checks)


class Hangs(BaseException):
    """No Exception, so that no reader catches it."""


def hang(number, frame):
    raise Hangs


@contextlib.contextmanager
def at_most(seconds):
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Outcomes(Counter):
    """How often a reader read and refused; a fuzzer that only does one of them tests nothing."""

    def of(self, function, *arguments, **options):
        """Returns what the function returns, None if it refuses as it should."""
        try:
            with at_most(20):
                result = function(*arguments, **options)
        except UserError as error:
            assert str(error).isprintable() and 0 < len(str(error)) < 2000, str(error)
            self["refused"] += 1
            return None
        self["read"] += 1
        return result

    def check(self, share=0.03):
        assert min(self["read"], self["refused"]) >= share * self.total(), self


@pytest.fixture
def counted():
    """Outcomes of one test, checked behind its last case."""
    counts = Outcomes()
    yield counts
    print(f"fuzzed: {dict(counts)}")
    counts.check()


def read(path, locales=None):
    return list(massive.utterances(massive.open_source(path, locales), locales))


ODD_TEXT = st.text(st.sampled_from('[]: ab\n\t\u3000東\u00ad\ufeff\0"\\é\U0001f600\ud800'), max_size=20) | st.text(max_size=20)
CHUNK = st.sampled_from(
    ["wake", "me", "[time : nine am]", "[date : now]", "[", "]", ":", "[:]", "[a]", "[a : [b : c]]", " ", "東京"]
)
ANNOTATED = st.lists(CHUNK, max_size=6).map(" ".join) | ODD_TEXT
NUMBERS = st.integers() | st.floats() | st.booleans() | st.none()
ODD_JSON = st.recursive(
    NUMBERS | ODD_TEXT, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ODD_TEXT, inner, max_size=3)
)


@st.composite
def records(draw, first=0):
    """A record as it should be, some with a change. first: 0 allows all changes, 3 leaves odd utterances only."""
    text = draw(st.sampled_from(["wake me at [time : nine am]", "stop", "[date : now] [time : nine]"]))
    locale = draw(st.sampled_from(["en-US", "en-US", "de-DE", "ja-JP"]))
    utt = " ".join(massive.parse(text, "en-US")[0])
    row = {
        "id": str(draw(st.integers(0, 30))),
        "locale": locale,
        "partition": draw(st.sampled_from(("train", *massive.PARTITIONS))),
    }
    row |= {"utt": utt, "annot_utt": text}
    change = draw(st.integers(first, 19))
    if change < 2:
        row[draw(st.sampled_from(massive.KEYS))] = draw(ODD_JSON)
    elif change == 2:
        del row[draw(st.sampled_from(massive.KEYS))]
    elif change == 3:
        row["annot_utt"] = row["utt"] = draw(ANNOTATED)
    return row


def line_of(row, wrong):
    text = json.dumps(row)
    depth = 5_000
    return {
        "cut": text[: len(text) // 2],
        "twice": text + text,
        "blank": "",
        "bom": "\ufeff" + text,
        "deep": '{"id": ' * depth,
        "deep and closed": "[" * depth + "]" * depth,
        "digits": text.replace('"wake', "9" * depth + ' "wake'),
        "number": '{"id": ' + "9" * depth + "}",
        "list": f"[{text}]",
        "crlf": text + "\r",
        "": text,
    }[wrong].encode("utf-8", "surrogatepass")


WRONG = st.sampled_from(["cut", "twice", "blank", "bom", "deep", "deep and closed", "digits", "number", "list", "crlf"])
LINES = st.lists(
    st.builds(line_of, records(), st.just("") | st.just("") | st.just("") | WRONG) | st.binary(max_size=30), max_size=4
)
GOOD_LINES = st.lists(
    st.builds(line_of, records(3), st.just("")), min_size=1, max_size=4, unique_by=lambda line: json.loads(line)["id"]
)


@fuzz(500)
@given(LINES | GOOD_LINES, st.sampled_from([None, ["en-US"], ["de-DE", "en-US"]]))
def test_lines(tmp_path, counted, lines, locales):
    (tmp_path / "en-US.jsonl").write_bytes(b"\n".join(lines))
    counted.of(read, tmp_path, locales)


@fuzz(100)
@given(GOOD_LINES, st.booleans())
def test_corpora(tmp_path, tokenizer, counted, lines, trained):
    (tmp_path / "en-US.jsonl").write_bytes(b"\n".join(lines))
    cache = tmp_path / "cache"
    corpus = counted.of(load_corpus, tmp_path, tokenizer=None if trained else tokenizer, cache=cache)
    if corpus is not None:
        assert sum(corpus.sentences(lo, p).number for lo in corpus.locales for p in massive.PARTITIONS) == len(lines)
    shutil.rmtree(cache)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["wake me at nine am", "stop now nine"], folder, vocab_size=60)
    return folder


@fuzz(500)
@given(ANNOTATED, st.sampled_from(["en-US", "ja-JP"]))
def test_annotated_utterances(counted, text, locale):
    parsed = counted.of(massive.parse, text, locale)
    if parsed is None:
        return
    words, labels = parsed
    assert len(words) == len(labels) and all(words)
    row = {"id": "1", "locale": locale, "partition": "train", "utt": " ".join(words), "annot_utt": text}
    again = counted.of(massive.utterance, ("x", 1), row)
    assert again is None or again[2:] == (words, labels)


UNPACKED = {".tar.gz": gzip.compress, ".tgz": gzip.compress, ".tar.xz": lzma.compress, ".tar.bz2": bz2.compress, ".tar": bytes}
FIELDS = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "mtime": (136, 148), "type": (156, 157), "link": (157, 257)}
FIELDS |= {"magic": (257, 265), "prefix": (345, 500), "sparse": (386, 495)}
SIZES = [
    b"\x80" + bytes(3) + b"\x7f" * 8,
    b"\xff" * 12,
    b"\xff" * 4 + bytes(8),
    b"00000000777\0",
    b"77777777777\0",
    b"99999999999\0",
]
TYPES = [bytes([kind]) for kind in b"0\x00123456789xgLKSXDMNV"]
PAX = {
    "size": ["-5", "9" * 30, "x"],
    "path": ["a\nb.jsonl", "en-US.jsonl", "x/" * 999],
    "GNU.sparse.map": ["0,x", "5,1,-3", "0,9"],
}
PAX |= {
    "GNU.sparse.major": ["1"],
    "GNU.sparse.minor": ["0"],
    "GNU.sparse.size": ["9" * 30, "x", "-1"],
    "GNU.sparse.name": ["en-US.jsonl"],
}
PAX |= {
    "GNU.sparse.numblocks": ["3", "-1"],
    "GNU.sparse.realsize": ["9" * 20, "-9"],
    "hdrcharset": ["BINARY", "x"],
    "mtime": ["nan"],
}


@st.composite
def archives(draw):
    """The ending and bytes of an archive, most of them damaged somewhere."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))) as tar:
        names = st.sampled_from(
            ["en-US.jsonl", "1.1/data/en-US.jsonl", "de-DE.jsonl", "README", "._x.jsonl", "a" * 120 + ".jsonl", "é.jsonl"]
        )
        for i in range(draw(st.integers(0, 3))):
            row = line_of({"id": str(i), "locale": "en-US", "partition": "train", "utt": "a b", "annot_utt": "a b"}, "")
            header = tarfile.TarInfo(draw(names))
            header.size = len(row)
            keys = draw(st.lists(st.sampled_from(sorted(PAX)), max_size=2)) if draw(st.integers(0, 3)) == 0 else []
            header.pax_headers = {name: draw(st.sampled_from(PAX[name])) for name in keys}
            tar.addfile(header, io.BytesIO(row))
    content = bytearray(stream.getvalue())
    damage = draw(st.sampled_from(["", "", "field", "field", "field", "bytes", "cut"]))
    headers = [at for at in range(0, len(content), 512) if content[at + 257 : at + 262] == b"ustar"]
    if damage == "field" and headers:
        at = draw(st.sampled_from(headers))
        field = draw(st.sampled_from(sorted(FIELDS)))
        first, last = FIELDS[field]
        given_sizes = {"size": st.sampled_from(SIZES), "type": st.sampled_from(TYPES)}
        value = draw(given_sizes.get(field, st.binary(max_size=last - first)))
        content[at + first : at + first + len(value)] = value
        content[at + 148 : at + 156] = b" " * 8
        content[at + 148 : at + 156] = b"%06o\0 " % sum(content[at : at + 512])
    elif damage:
        damaged(draw, content, damage)
    ending = draw(st.sampled_from(sorted(UNPACKED)))
    packed = bytearray(UNPACKED[ending](bytes(content)))
    damage = draw(st.sampled_from(["", "", "", "bytes", "cut"]))
    if damage:
        damaged(draw, packed, damage)
    return ending, bytes(packed)


def damaged(draw, content, damage):
    """Cut bytes off, or change some; in place."""
    if damage == "cut":
        del content[draw(st.integers(0, len(content))) :]
        return
    for _ in range(draw(st.integers(1, 4)) if content else 0):
        content[draw(st.integers(0, min(len(content), 4096) - 1))] = draw(st.integers(0, 255))


@fuzz(500)
@given(archives())
def test_archives(tmp_path, counted, archive):
    ending, content = archive
    path = tmp_path / f"a{ending}"
    path.write_bytes(content)
    counted.of(read, path)


ENTRY_NAMES = [
    "en-US.jsonl",
    "de-DE.jsonl",
    "x.jsonl",
    "data",
    "jsonl",
    ".x.jsonl",
    "a\nb.jsonl",
    "é.jsonl",
    b"\xff.jsonl",
    "x" * 249 + ".jsonl",
    "x.txt",
]
ENTRIES = st.dictionaries(
    st.sampled_from(ENTRY_NAMES), st.sampled_from(["good", "good", "empty", "closed", "within", *ODD_ENTRIES]), max_size=4
)


@fuzz(200)
@given(ENTRIES, st.sampled_from([None, ["en-US"]]))
def test_folders(counted, entries, locales):
    with tempfile.TemporaryDirectory() as temporary:
        for i, (name, kind) in enumerate(entries.items()):
            path = Path(temporary) / os.fsdecode(name)
            row = line_of({"id": str(i), "locale": "en-US", "partition": "train", "utt": "a b", "annot_utt": "a b"}, "")
            if kind == "within":
                path.mkdir()
                (path / "en-US.jsonl").write_bytes(row)
            elif kind in ("good", "empty", "closed"):
                path.write_bytes(b"" if kind == "empty" else row)
                path.chmod(0 if kind == "closed" else 0o600)
            else:
                make_odd_entry(path, kind)
        counted.of(read, temporary, locales)


GROUP = st.sampled_from(["a", "b", "", "東"]) | ODD_JSON
GROUPS = st.dictionaries(st.sampled_from(["en-US", "de-DE", "xx-XX"]) | ODD_TEXT, GROUP, max_size=4) | ODD_JSON
ALL_GROUPS = st.fixed_dictionaries({locale: GROUP for locale in ("en-US", "de-DE")}, optional={"fr-FR": GROUP})
TEXTS = st.builds(lambda value: json.dumps(value).encode(), GROUPS | ALL_GROUPS | ALL_GROUPS)


@fuzz(200)
@given(TEXTS | st.binary(max_size=30) | st.builds(line_of, st.just({"en-US": "a", "de-DE": "wake"}), WRONG))
def test_groups(tmp_path, counted, text):
    (tmp_path / "groups.json").write_bytes(text)
    config = replace(demo(), groups=str(tmp_path / "groups.json"))
    groups = counted.of(make_groups, config, ("en-US", "de-DE"))
    assert groups is None or set(groups) == {"en-US", "de-DE"} and all(isinstance(name, str) for name in groups.values())
