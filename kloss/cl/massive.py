"""Read MASSIVE: records from a folder, an archive or `datasets`, and their words and slots.

A record has the keys id, locale, partition, utt and annot_utt. In annot_utt, "[time : nine am]" marks a slot.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import os
import re
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import UserError
from ..files import lines_of, opened, parse_json, shown, user_path
from ..models.hub import refusal
from .cache import hash_files
from .languages import CHARACTER_LOCALES, LANGUAGES

KEYS = ("id", "locale", "partition", "utt", "annot_utt")
PARTITIONS = ("train", "dev", "test")
ARCHIVES: dict[str, Any] = {
    ".tar.gz": gzip.open,
    ".tgz": gzip.open,
    ".tar.xz": lzma.open,
    ".tar.bz2": bz2.open,
    ".tar": contextlib.nullcontext,
}
HEADER_BYTES = 1 << 20  # of an extended header in an archive

_SLOT = re.compile(r"\[([^\[\]]*)\]|([\[\]])")
_CHARACTERS = re.compile(r"[\x21-\x7e]+|\S")
_JSONL = re.compile(r"(?:^|/)[^/.][^/]*\.jsonl$")

_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)

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
            raise UserError(f"unbalanced or nested {match[2]!r} in annot_utt '{shown(annot_utt)}'")
        outside = split(annot_utt[end : match.start()])
        name, colon, value = match[1].partition(":")
        slot, inside = name.strip(), split(value)
        if not colon or not inside or len(slot.split()) != 1:
            raise UserError(f"malformed slot '{shown(match[0])}' in annot_utt; allowed: [slot : value]")
        words += outside + inside
        labels += ["O"] * len(outside) + [f"B-{slot}"] + [f"I-{slot}"] * (len(inside) - 1)
        end = match.end()
    outside = split(annot_utt[end:])
    return words + outside, labels + ["O"] * len(outside)


def utterance(position: Position, record: dict) -> tuple[str, str, list[str], list[str]]:
    """Return (locale, partition, words, BIO labels) of a record; partition "validation" becomes "dev".

    Raises UserError with file and line for a missing key, a value that is not text, or an unknown locale or partition.
    So it does for an annot_utt that is malformed, has no words, is no Unicode, or differs from utt once its brackets are removed.
    """
    try:
        for key in KEYS:
            if not isinstance(record.get(key), str):
                problem = "is not a text" if key in record else "is missing"
                raise UserError(f"key {key!r} {problem}; needed: {', '.join(KEYS)}")
        locale, partition = record["locale"], record["partition"]
        if locale not in LANGUAGES:
            raise UserError(f"unknown locale '{shown(locale)}'")
        partition = "dev" if partition == "validation" else partition
        if partition not in PARTITIONS:
            raise UserError(f"unknown partition '{shown(partition)}'; allowed: {', '.join(PARTITIONS)}")
        record["annot_utt"].encode()  # fails for half of a surrogate pair, which no tokenizer takes
        words, labels = parse(record["annot_utt"], locale)
        if not words:
            raise UserError("the utterance has no words")
        expected = record["utt"].split()
        if words != expected and not (locale in CHARACTER_LOCALES and "".join(words) == "".join(expected)):
            given = f"'{shown(record['annot_utt'])}' and '{shown(record['utt'])}'"
            raise UserError(f"annot_utt without its brackets is not utt: {given}")
    except (UserError, UnicodeEncodeError) as error:
        raise UserError(f"{position[0]}:{position[1]}: {error}") from None
    return locale, partition, words, labels


def utterances(source: Source, locales: Collection[str] | None) -> Iterator[tuple[str, str, str, list[str], list[str]]]:
    """Give (locale, partition, id, words, BIO labels) of a source's records in the locales; None: in all.

    Raises UserError as `utterance` does, and for an id that a locale has twice, in whatever files and partitions: so does a
    folder that holds a file twice, or an archive with two versions of the corpus. It names both places.
    """
    ids: dict[str, set[str]] = defaultdict(set)
    for position, record in source.read():
        locale, partition, words, labels = utterance(position, record)
        if locales is not None and locale not in locales:
            continue
        name = record["id"]
        if name in ids[locale]:
            places = (p for p, r in source.read() if r.get("locale") == locale and r.get("id") == name)
            first = ":".join(map(str, next(places, position)))
            raise UserError(f"{position[0]}:{position[1]}: {locale} has the id '{shown(name)}' already, at {first}")
        ids[locale].add(name)
        yield locale, partition, name, words, labels


def open_source(data: str | Path, locales: Iterable[str] | None) -> Source:
    """Find the corpus that `data` names: a folder of jsonl or parquet, an archive of jsonl, or a hub id.

    locales: files named after other locales are skipped; None reads all.
    Raises UserError for a path that does not exist or holds no data, or a data set that `datasets` cannot load.
    """
    selected = None if locales is None else frozenset(locales)
    path = user_path(data)
    try:
        if path.is_dir():
            return _open_folder(path, selected)
    except OSError as error:  # a folder within it that nobody may read
        raise UserError(f"cannot read {shown(error.filename or path, 500)}: {error.strerror}") from error
    ending = next((end for end in ARCHIVES if path.name.endswith(end)), None)
    if os.path.lexists(path):
        with opened(path):  # refuses what is no regular file
            pass
        if ending is None:
            raise UserError(f"cannot read {shown(path, 500)}; allowed: a folder of jsonl files, or {', '.join(ARCHIVES)}")
        name = path.name.removesuffix(ending)
        return Source(name, hash_files([path]), lambda: _read_archive(path, ARCHIVES[ending], selected))
    if ending is not None or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(data)):
        raise UserError(f"no such file or folder: {shown(data, 500)}")
    return _open_hub(str(data), selected)


def _open_folder(path: Path, selected: frozenset[str] | None) -> Source:
    folders = [path / sub for sub in (".", "data", "jsonl")]
    files = sorted(file for folder in folders if folder.is_dir() for file in folder.iterdir() if file.name.endswith(".jsonl"))
    tables = [] if files else sorted(path.rglob("*.parquet"))
    read = [file for file in files if _JSONL.search(file.name) and _is_selected(file.name, selected)]
    for file in read + tables:
        with opened(file):  # refuses what is no regular file
            pass
    if files:
        return Source(shown(path.resolve().name), hash_files(read), lambda: _read_files(read))
    if tables:
        return _open_hub(str(path), selected)
    raise UserError(f"no *.jsonl, data/*.jsonl, jsonl/*.jsonl or *.parquet in the folder {shown(path, 500)}")


def _is_selected(file_name: str, selected: frozenset[str] | None) -> bool:
    """Return False only for a file named after a locale that is not selected."""
    stem = Path(file_name).stem
    return selected is None or stem in selected or stem not in LANGUAGES


def _read_lines(name: str, stream: IO[bytes]) -> Iterator[tuple[Position, dict]]:
    for number, line in lines_of(stream, name):
        if not line.strip():
            continue
        record = parse_json(line, f"{name}:{number}: not a line of JSON")
        if not isinstance(record, dict):
            raise UserError(f"{name}:{number}: not a JSON object")
        yield (name, number), record


def _read_files(files: list[Path]) -> Iterator[tuple[Position, dict]]:
    for file in files:
        with opened(file) as stream:
            yield from _read_lines(shown(file, 500), stream)


class _Header(tarfile.TarInfo):
    """A header of an archive. `tarfile` takes a damaged one for the archive's end, and reads an extended one whole."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        if len(buf) < tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without its end mark")
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if not any(buf):  # the end mark
                raise
            raise tarfile.ReadError(str(error)) from error
        if header.type in _EXTENDED and not 0 <= header.size <= HEADER_BYTES:
            raise tarfile.ReadError(f"an extended header has a size of {header.size:,} bytes")
        return header


class _Ending(io.RawIOBase):
    """A stream that may be read behind its end a few times only: `tarfile` does so for ever where a header's numbers say so."""

    def __init__(self, stream: IO[bytes]):
        self.stream, self.left = stream, 8

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.left -= not data
        if not self.left:
            raise EOFError("it ends within a member")
        return data


def _read_archive(path: Path, unpack: Callable, selected: frozenset[str] | None) -> Iterator[tuple[Position, dict]]:
    with opened(path) as file:
        try:
            with unpack(file) as stream:
                with tarfile.open(fileobj=_Ending(stream), mode="r|", tarinfo=_Header) as archive:
                    for member in archive:
                        if member.size < 0:
                            raise tarfile.ReadError(f"{shown(member.name)} has a size of {member.size:,} bytes")
                        if member.isfile() and _JSONL.search(member.name) and _is_selected(member.name, selected):
                            yield from _read_member(archive, member, shown(f"{path}/{member.name}", 500))
                while stream.read(1 << 20):  # to the end, where the checksum is
                    continue
        except UserError:
            raise
        except (OSError, EOFError, ValueError, LookupError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
            what = f"{type(error).__name__}: {shown(error)}"  # `tarfile` trusts the numbers that it reads
            raise UserError(f"{shown(path, 500)}: broken or unreadable archive ({what})") from error


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str) -> Iterator[tuple[Position, dict]]:
    if member.issparse():
        raise UserError(f"{name} is a sparse file, which is not read; make the archive without --sparse")
    content = archive.extractfile(member)
    assert content is not None, name
    yield from _read_lines(name, content)


def _open_hub(name: str, selected: frozenset[str] | None) -> Source:
    """Open a data set with `datasets`: a configuration per locale, as the hub has MASSIVE, or one for all locales."""
    import datasets

    if not (os.path.exists(name) or datasets.config.HF_HUB_OFFLINE) and (reason := refusal(name, "dataset")):
        advice = "give a local folder or archive, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
        raise UserError(f"no such file or folder, and the hub did not give {name} ({shown(reason)}); {advice}")
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
        line = shown(" ".join(str(error).split()), 500)
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
