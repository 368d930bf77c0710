"""Read MASSIVE: records from a folder, an archive or `datasets`, and their words and slots.

A record has the keys id, locale, partition, utt and annot_utt. In annot_utt, "[time : nine am]" marks a slot.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import re
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from .cache import hash_files
from .languages import CHARACTER_LOCALES, LANGUAGES

KEYS = ("id", "locale", "partition", "utt", "annot_utt")
PARTITIONS = ("train", "dev", "test")
ARCHIVES: dict[str, Any] = {".tar.gz": gzip.open, ".tgz": gzip.open, ".tar.xz": lzma.open, ".tar.bz2": bz2.open, ".tar": open}

_SLOT = re.compile(r"\[([^\[\]]*)\]|([\[\]])")
_CHARACTERS = re.compile(r"[\x21-\x7e]+|\S")
_JSONL = re.compile(r"(?:^|/)[^/.][^/]*\.jsonl$")

Position = tuple[str, int]  # file and line number, as text only in an error


class Source(NamedTuple):
    name: str
    digest: str  # depends on the contents
    read: Callable[[], Iterator[tuple[Position, dict]]]  # starts from the first record


def parse(annot_utt: str, locale: str) -> tuple[list[str], list[str]]:
    """Return the words of an annotated utterance and their BIO labels: B-time opens a slot, I-time continues it, O is none.

    Words end at whitespace and at slot borders. ja-JP, zh-CN and zh-TW have a word per character, but runs of ASCII stay whole.
    MASSIVE's own code keeps only whitespace-separated ASCII whole; 1 of these locales' 49,563 utterances differs.
    Raises UserError, without file and line, for unbalanced or nested brackets, or a slot without name or value.
    """
    split = _CHARACTERS.findall if locale in CHARACTER_LOCALES else str.split
    words, labels, end = [], [], 0
    for match in _SLOT.finditer(annot_utt):
        if match[2]:
            raise UserError(f"unbalanced or nested {match[2]!r} in annot_utt {annot_utt!r}")
        outside = split(annot_utt[end : match.start()])
        name, colon, value = match[1].partition(":")
        slot, inside = name.strip(), split(value)
        if not colon or not inside or len(slot.split()) != 1:
            raise UserError(f"malformed slot {match[0]!r} in annot_utt; allowed: [slot : value]")
        words += outside + inside
        labels += ["O"] * len(outside) + [f"B-{slot}"] + [f"I-{slot}"] * (len(inside) - 1)
        end = match.end()
    outside = split(annot_utt[end:])
    return words + outside, labels + ["O"] * len(outside)


def utterance(position: Position, record: dict) -> tuple[str, str, list[str], list[str]]:
    """Return (locale, partition, words, BIO labels) of a record; partition "validation" becomes "dev".

    Raises UserError with file and line for a missing key, a value that is not text, or an unknown locale or partition.
    So it does for an annot_utt that is malformed, has no words, or differs from utt once its brackets are removed.
    """
    try:
        for key in KEYS:
            if not isinstance(record.get(key), str):
                problem = "is not a text" if key in record else "is missing"
                raise UserError(f"key {key!r} {problem}; needed: {', '.join(KEYS)}")
        locale, partition = record["locale"], record["partition"]
        if locale not in LANGUAGES:
            raise UserError(f"unknown locale {locale!r}")
        partition = "dev" if partition == "validation" else partition
        if partition not in PARTITIONS:
            raise UserError(f"unknown partition {partition!r}; allowed: {', '.join(PARTITIONS)}")
        words, labels = parse(record["annot_utt"], locale)
        if not words:
            raise UserError("the utterance has no words")
        expected = record["utt"].split()
        if words != expected and not (locale in CHARACTER_LOCALES and "".join(words) == "".join(expected)):
            given = f"{record['annot_utt']!r} and {record['utt']!r}"
            raise UserError(f"annot_utt without its brackets is not utt: {given}")
    except UserError as error:
        raise UserError(f"{position[0]}:{position[1]}: {error}") from None
    return locale, partition, words, labels


def open_source(data: str | Path, locales: Iterable[str] | None) -> Source:
    """Find the corpus that `data` names: a folder of jsonl or parquet, an archive of jsonl, or a hub id.

    locales: files named after other locales are skipped; None reads all.
    Raises UserError for a path that does not exist or holds no data, or a data set that `datasets` cannot load.
    """
    selected = None if locales is None else frozenset(locales)
    path = Path(data).expanduser()
    if path.is_dir():
        files = sorted(file for sub in (".", "data", "jsonl") for file in (path / sub).glob("*.jsonl"))
        if files:
            files = [file for file in files if _JSONL.search(file.name) and _is_selected(file.name, selected)]
            return Source(path.resolve().name, hash_files(files), lambda: _read_files(files))
        if any(path.rglob("*.parquet")):
            return _open_hub(str(path), selected)
        raise UserError(f"no *.jsonl, data/*.jsonl, jsonl/*.jsonl or *.parquet in the folder {path}")
    ending = next((end for end in ARCHIVES if path.name.endswith(end)), None)
    if path.is_file():
        if ending is None:
            raise UserError(f"cannot read {path}; allowed: a folder of jsonl files, or {', '.join(ARCHIVES)}")
        name = path.name.removesuffix(ending)
        return Source(name, hash_files([path]), lambda: _read_archive(path, ARCHIVES[ending], selected))
    if ending is not None or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(data)):
        raise UserError(f"no such file or folder: {data}")
    return _open_hub(str(data), selected)


def _is_selected(file_name: str, selected: frozenset[str] | None) -> bool:
    """Return False only for a file named after a locale that is not selected."""
    stem = Path(file_name).stem
    return selected is None or stem in selected or stem not in LANGUAGES


def _read_lines(name: str, lines: Iterable[bytes]) -> Iterator[tuple[Position, dict]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{name}:{number}: not a line of JSON ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f"{name}:{number}: not a JSON object")
        yield (name, number), record


def _read_files(files: list[Path]) -> Iterator[tuple[Position, dict]]:
    for file in files:
        with open(file, "rb") as lines:
            yield from _read_lines(str(file), lines)


def _read_archive(path: Path, unpack: Callable, selected: frozenset[str] | None) -> Iterator[tuple[Position, dict]]:
    try:
        with unpack(path, "rb") as stream:
            with tarfile.open(fileobj=stream, mode="r|") as archive:
                for member in archive:
                    if member.isfile() and _JSONL.search(member.name) and _is_selected(member.name, selected):
                        yield from _read_lines(f"{path}/{member.name}", archive.extractfile(member) or ())
            while stream.read(1 << 20):  # to the end, where the checksum is
                continue
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path}: broken or unreadable archive ({type(error).__name__}: {error})") from error


def _open_hub(name: str, selected: frozenset[str] | None) -> Source:
    """Open a data set with `datasets`: a configuration per locale, as the hub has MASSIVE, or one for all locales."""
    import datasets

    revision = None
    try:
        try:
            configs = datasets.get_dataset_config_names(name)
        except RuntimeError:  # a data set with a loading script, which the hub also keeps as parquet
            revision = "refs/convert/parquet"
            configs = datasets.get_dataset_config_names(name, revision=revision)
        of_locales = [config for config in configs if config in LANGUAGES and _is_selected(config, selected)]
        to_load = of_locales or [config for config in configs if config not in LANGUAGES][:1]
        loaded = [datasets.load_dataset(name, config, revision=revision) for config in to_load]
    except Exception as error:  # `datasets` and its file systems raise many kinds
        line = " ".join(str(error).split())
        raise UserError(f"no such file or folder, and `datasets` cannot load {name!r} ({line})") from error
    digest = hashlib.blake2b(digest_size=16)
    splits = []
    for split, rows in (item for data_set in loaded for item in data_set.items()):
        missing = [key for key in KEYS if key not in rows.column_names and key != "partition"]
        if missing:
            allowed = ", ".join(KEYS)
            raise UserError(f"{name}, split {split!r}: key {missing[0]!r} is missing; needed: {allowed}")
        rows = rows.select_columns([key for key in KEYS if key in rows.column_names])
        splits.append((split, rows))
        digest.update(f"{split}\n".encode())
        for batch in rows.iter(batch_size=4096):
            digest.update(repr(sorted(batch.items())).encode())
    return Source(name.rstrip("/").split("/")[-1], digest.hexdigest(), lambda: _read_hub(name, splits))


def _read_hub(name: str, splits: list) -> Iterator[tuple[Position, dict]]:
    for split, rows in splits:
        batches = ((batch, zip(*batch.values(), strict=True)) for batch in rows.iter(batch_size=4096))
        records = (dict(zip(batch, values, strict=True)) for batch, columns in batches for values in columns)
        for number, record in enumerate(records, 1):
            yield (f"{name} ({split})", number), {"partition": split} | record | {"id": str(record["id"])}
