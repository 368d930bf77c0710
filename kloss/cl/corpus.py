"""A parallel slot-filling corpus as flat arrays: utterances -> words and slots -> token ids and labels.

Utterances are read once; then each distinct word is tokenised once (a tokenizer given words treats each alike
wherever it stands) and the sentences are put together from the words' pieces. The arrays of all locales lie
in one cache folder, named by a hash of all that decides them, and are memory-mapped from there.
"""

import contextlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from . import massive, synthetic
from .cache import cache_folder, key, temporary_folder, written
from .languages import LOCALES, check_locales
from .tokenizer import hash_tokenizer, load_tokenizer, special_ids, tokenizer_folder

IGNORED = -100
FORMAT = 1  # part of every cache key; one more whenever the same input gives other arrays
_DTYPES = {"input_ids": np.int32, "labels": np.int32, "offsets": np.int64}

Report = Callable[[int, int, str], None]


class Sentences(NamedTuple):
    """n sentences end to end: input_ids, labels int32 [tokens]; offsets int64 [n+1] of their borders.

    A sentence is <s>, the words' pieces, </s>; the first piece of a word has its label, all else IGNORED.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    offsets: np.ndarray


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus; the arrays are read-only maps of files in the cache.

    labels: the BIO names, "O" first, then sorted; a label id is an index into it.
    truncated: for each locale, utterances cut at max_length, of all partitions and before limits.
    fingerprint: hex digits of all that decides what is trained on and scored.
    """

    name: str
    locales: tuple[str, ...]
    labels: tuple[str, ...]
    vocab_size: int
    bos_id: int
    pad_id: int
    eos_id: int
    unk_id: int
    mask_id: int | None
    tokenizer_folder: Path
    max_length: int
    limit: int | None
    eval_limit: int | None
    fingerprint: str
    truncated: dict[str, int]
    _index: dict = field(repr=False)
    _arrays: dict = field(repr=False)
    _limited: dict = field(repr=False, default_factory=dict)

    def sentences(self, locale: str, partition: str) -> Sentences:
        """The sentences of a locale and partition (train, dev, test), by their ids.

        A limit takes sentences at even distances, the same ids in every locale: MASSIVE's ids go by topic, so that its first
        few hundred utterances are jokes and lamps, with a slot in one word of seven.
        Raises UserError for a locale or a partition that the corpus does not have.
        """
        if locale not in self.locales or partition not in massive.PARTITIONS:
            allowed = f"{', '.join(self.locales)}; {', '.join(massive.PARTITIONS)}"
            raise UserError(f"no sentences for {locale!r}, {partition!r}; allowed: {allowed}")
        first, last = self._index[locale]["range"][partition]
        limit = self.limit if partition == "train" else self.eval_limit
        offsets = self._arrays["offsets"][first : last + 1]
        if limit is None or limit >= last - first:
            tokens = slice(int(offsets[0]), int(offsets[-1]))
            return Sentences(self._arrays["input_ids"][tokens], self._arrays["labels"][tokens], offsets - offsets[0])
        if (locale, partition) not in self._limited:
            chosen = np.arange(limit) * (last - first) // limit
            lengths = np.diff(offsets)[chosen]
            tokens = _ragged(offsets[chosen], lengths)
            ids, labels = (self._arrays[name][tokens] for name in ("input_ids", "labels"))
            self._limited[locale, partition] = Sentences(ids, labels, np.concatenate([[0], np.cumsum(lengths)]))
        return self._limited[locale, partition]

    def tokens_per_word(self, locale: str) -> float:
        """Pieces per word over the locale's whole training split, before truncation, without <s> and </s>."""
        return self._index[locale]["pieces"] / self._index[locale]["words"]


def load_corpus(
    data: str | Path,
    *,
    tokenizer: str | Path | None = None,
    locales: Iterable[str] | None = None,
    limit: int | None = None,
    eval_limit: int | None = None,
    max_length: int = 128,
    cache: str | Path | None = None,
    seed: int = 0,
    report: Report | None = None,
    synthetic: Mapping | None = None,
) -> Corpus:
    """Reads, tokenises and caches a corpus, or opens it from the cache.

    data: "synthetic", a folder of jsonl files, an archive (.tar.gz, .tgz, .tar.xz), or the name of a set on
    the hub.
    tokenizer: a folder or hub name for AutoTokenizer; None trains one on the training utterances.
    locales: in the order they are wanted; None takes all there are. limit, eval_limit: how many training,
    and how many dev and test, utterances of each locale, at even distances. max_length: tokens of a sentence, <s> and </s>
    among them.
    cache: a folder, see `cache_folder`. seed: of the synthetic corpus, unless `synthetic`, the options of its
    `generate`, has one. report: called with (done, total, text) as work goes on; total 0 means unknown.
    Raises UserError in one line for anything wrong with the input.
    """
    for name, value, least in (
        ("limit", limit, 1),
        ("eval_limit", eval_limit, 1),
        ("max_length", max_length, 3),
    ):
        if value is not None and value < least:
            raise UserError(f"{name} must be at least {least}, not {value}")
    wanted = None if locales is None else check_locales(locales)
    if wanted == ():
        raise UserError("no locales given")
    report = report or (lambda done, total, text: None)
    cache = cache_folder(cache)
    source = _open(data, wanted, seed, synthetic)
    canonical = None if wanted is None else tuple(locale for locale in LOCALES if locale in wanted)
    texts = key(source.digest, canonical)
    folder = tokenizer_folder(tokenizer, cache, texts, lambda: _texts(source, canonical, report))
    name = key("corpus", FORMAT, source.digest, hash_tokenizer(folder), max_length, canonical)
    built = cache / f"corpus-{name}"
    opened = _open_cache(built)
    if opened is None:
        _build(built, source, folder, canonical, max_length, report)
        opened = _open_cache(built)
        assert opened is not None, f"{built} vanished as soon as it was written"
    meta, arrays = opened
    order = wanted or tuple(meta["index"])
    return Corpus(
        name=source.name,
        locales=order,
        labels=tuple(meta["labels"]),
        **meta["tokenizer"],
        tokenizer_folder=folder,
        max_length=max_length,
        limit=limit,
        eval_limit=eval_limit,
        fingerprint=key(name, order, limit, eval_limit, "even"),
        truncated={locale: meta["index"][locale]["truncated"] for locale in order},
        _index=meta["index"],
        _arrays=arrays,
    )


def _open(data, wanted, seed, options) -> massive.Source:
    if str(data) != "synthetic":
        if options:
            raise UserError(f"synthetic options are given, but the data is {data}")
        return massive.open_source(data, wanted)
    options = synthetic.check_options(**{"seed": seed} | dict(options or {}))
    digest = key("synthetic", synthetic.VERSION, sorted(options.items()), wanted and sorted(wanted))
    name = f"synthetic ({', '.join(f'{k}={v}' for k, v in sorted(options.items()))})"

    def read():
        for number, record in enumerate(synthetic.generate(wanted or LOCALES, **options), 1):
            yield ("synthetic", number), record

    return massive.Source(name, digest, read)


def _texts(source: massive.Source, locales: tuple[str, ...] | None, report: Report) -> list[str]:
    """The training utterances, words parted by spaces, to train a tokenizer on."""
    report(0, 1, "training a tokenizer")
    texts = []
    for place, record in source.read():
        locale, partition, words, _ = massive.utterance(place, record)
        if partition == "train" and (locales is None or locale in locales):
            texts.append(" ".join(words))
    return texts


def _open_cache(folder: Path):
    """(meta, arrays) of a finished cache folder; None where there is none. A damaged one is moved away."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in _DTYPES}
        if {name: len(values) for name, values in arrays.items()} == meta["sizes"]:
            return meta, arrays
    except (OSError, ValueError, EOFError):  # a file is missing, cut short, or no array
        pass
    with contextlib.suppress(FileNotFoundError):  # another process may have moved it
        os.rename(folder, temporary_folder(folder.parent) / "damaged")
    return None


class _Part:
    """The utterances of a locale and partition as they are read; words and labels are indices into tables."""

    def __init__(self):
        self.ids, self.lengths, self.words, self.labels = [], array("i"), array("i"), array("i")


def _read(source: massive.Source, locales: tuple[str, ...] | None, report: Report):
    """(parts by locale and partition, distinct words, label names as first seen)."""
    parts: dict[tuple[str, str], _Part] = {}
    words, names = {}, {"O": 0}
    report(0, 1, f"reading {source.name}")
    for count, (place, record) in enumerate(source.read(), 1):
        locale, partition, texts, labels = massive.utterance(place, record)
        if locales is not None and locale not in locales:
            continue
        part = parts.get((locale, partition))
        if part is None:
            part = parts[locale, partition] = _Part()
        part.ids.append(record["id"])
        part.lengths.append(len(texts))
        part.words.extend([words.setdefault(text, len(words)) for text in texts])
        part.labels.extend([names.setdefault(label, len(names)) for label in labels])
        if count % 20000 == 0:
            report(count, 0, f"reading {source.name}")
    found = {locale for locale, _ in parts}
    absent = [locale for locale in locales or () if locale not in found]
    if absent or not parts:
        raise UserError(f"{source.name} has no utterances" + (f" in {', '.join(absent)}" if absent else ""))
    untrained = [locale for locale in LOCALES if locale in found and (locale, "train") not in parts]
    if untrained:
        raise UserError(f"{source.name} has no training utterances in {', '.join(untrained)}")
    return parts, list(words), list(names)


def _tokenise(words, tokenizer, unk_id, report):
    """(pieces of all words end to end int32, start of each int64 [words+1]), as `is_split_into_words` gives.

    A word the tokenizer gives no piece becomes one <unk>: its label must not vanish.
    """
    pieces, counts, step = array("i"), array("i"), 20000
    for start in range(0, len(words), step):
        report(start, len(words), "tokenising words")
        batch = [[word] for word in words[start : start + step]]
        for ids in tokenizer(batch, is_split_into_words=True, add_special_tokens=False)["input_ids"]:
            ids = ids or [unk_id]
            pieces.extend(ids)
            counts.append(len(ids))
    report(len(words), len(words), "tokenising words")
    return np.array(pieces, np.int32), np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _ragged(starts, lengths):
    """Indices [sum of lengths] of the ranges starts[i] : starts[i] + lengths[i], end to end."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def _assemble(part, pieces, starts, label_ids, bos_id, eos_id, room):
    """(input_ids, labels, tokens per sentence, sentences cut, pieces, words) of one part, by its ids.

    pieces [pieces of all words], starts [words+1]: of the table of words. room: pieces that fit between <s>
    and </s>.
    """
    order = np.array(sorted(range(len(part.ids)), key=lambda i: (len(part.ids[i]), part.ids[i], i)), np.int64)
    lengths = np.array(part.lengths, np.int64)
    chosen = _ragged((np.cumsum(lengths) - lengths)[order], lengths[order])
    lengths = lengths[order]
    words, labels = np.array(part.words, np.int64)[chosen], label_ids[np.array(part.labels)[chosen]]
    counts = np.diff(starts)[words]
    ids = pieces[_ragged(starts[words], counts)]
    marks = np.full(len(ids), IGNORED, np.int32)
    marks[np.cumsum(counts) - counts] = labels
    sentence = np.repeat(np.arange(len(lengths)), lengths)
    full = np.bincount(sentence, counts, minlength=len(lengths)).astype(np.int64)
    kept = np.minimum(full, room)
    taken = _ragged(np.cumsum(full) - full, kept)
    tokens = kept + 2
    ends = np.cumsum(tokens)
    input_ids, targets = np.empty(ends[-1], np.int32), np.full(ends[-1], IGNORED, np.int32)
    inside = _ragged(ends - tokens + 1, kept)
    input_ids[inside], targets[inside] = ids[taken], marks[taken]
    input_ids[ends - tokens], input_ids[ends - 1] = bos_id, eos_id
    return input_ids, targets, tokens, int((full > room).sum()), len(ids), len(words)


def _build(final: Path, source, folder: Path, locales, max_length, report) -> None:
    tokenizer = load_tokenizer(folder)
    special = special_ids(tokenizer, folder)
    parts, words, names = _read(source, locales, report)
    pieces, starts = _tokenise(words, tokenizer, special["unk_id"], report)
    slots = {name[2:] for name in names if name != "O"}
    labels = ["O", *sorted(f"{tag}-{slot}" for slot in slots for tag in "BI")]
    label_ids = np.array([labels.index(name) for name in names], np.int32)
    columns = {name: [] for name in _DTYPES}
    index, sentences = {}, 0
    found = [locale for locale in LOCALES if (locale, "train") in parts]
    for done, locale in enumerate(found):
        report(done, len(found), "putting sentences together")
        index[locale] = {"range": {}, "truncated": 0}
        for partition in massive.PARTITIONS:
            part = parts.pop((locale, partition), None) or _Part()
            index[locale]["range"][partition] = [sentences, sentences + len(part.ids)]
            sentences += len(part.ids)
            if not part.ids:
                continue
            *arrays, cut, piece_count, word_count = _assemble(
                part, pieces, starts, label_ids, special["bos_id"], special["eos_id"], max_length - 2
            )
            for column, values in zip(columns.values(), arrays, strict=True):
                column.append(values)
            index[locale]["truncated"] += cut
            if partition == "train":
                index[locale] |= {"pieces": piece_count, "words": word_count}
    arrays = {name: np.concatenate(values).astype(_DTYPES[name]) for name, values in columns.items()}
    arrays["offsets"] = np.concatenate([[0], np.cumsum(arrays["offsets"])]).astype(np.int64)
    vocab_size = max(len(tokenizer), int(pieces.max()) + 1)
    sizes = {name: len(values) for name, values in arrays.items()}
    special["vocab_size"] = vocab_size
    meta = {"labels": labels, "tokenizer": special, "index": index, "sizes": sizes}
    with written(final) as temporary:
        for name, values in arrays.items():
            np.save(temporary / f"{name}.npy", values)
        (temporary / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    report(len(found), len(found), "putting sentences together")
