"""A parallel slot-filling corpus as flat arrays: utterances -> words and slots -> token ids and labels.

Each distinct word is tokenised once, and sentences are assembled from the words' pieces: a tokenizer treats a word alike
wherever it stands. The arrays of all locales are memory-mapped from a cache folder, whose name hashes what decides them.
"""

import json
import random
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..config import Config
from ..errors import UserError
from . import massive, synthetic
from .cache import cache_folder, key, open_entry
from .languages import LANGUAGES, LOCALES, check_locales
from .learner import BALANCED
from .tokenizer import hash_tokenizer, load_tokenizer, special_ids, tokenizer_folder

IGNORED = -100
FORMAT = 1  # part of every cache key; increment when the same input gives other arrays
LONGEST_WORD = 10_000  # characters of a word that are tokenised

Locales = tuple[str, ...] | None  # None: all
OnProgress = Callable[[int, int, str], object]  # called with (done, total, text); a total of 0 means unknown


class Sentences(NamedTuple):
    """n sentences end to end: <s>, the words' pieces, </s>.

    The first piece of a word has the word's label; all other tokens have IGNORED.
    """

    input_ids: np.ndarray  # int32 [tokens]
    labels: np.ndarray  # int32 [tokens]
    offsets: np.ndarray  # int64 [n+1], sentence i is offsets[i] : offsets[i+1]

    @property
    def number(self) -> int:
        return len(self.offsets) - 1

    def take(self, index: np.ndarray) -> "Sentences":
        """Return sentences `index`, int [m], in that order."""
        starts = self.offsets[index]
        lengths = self.offsets[index + 1] - starts
        tokens = _ranges(starts, lengths)
        return Sentences(self.input_ids[tokens], self.labels[tokens], _cumulate(lengths))

    @staticmethod
    def concatenate(several: Sequence["Sentences"]) -> "Sentences":
        """Return the sentences of several sets as one."""
        if len(several) == 1:
            return several[0]
        ids, labels = (np.concatenate([getattr(s, name) for s in several]) for name in ("input_ids", "labels"))
        return Sentences(ids, labels, _cumulate(np.concatenate([np.diff(s.offsets) for s in several])))


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the indices of the ranges starts[i] : starts[i] + lengths[i], end to end: [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)


def _cumulate(lengths: np.ndarray | array) -> np.ndarray:
    """Return int64 [n+1]: 0 and the cumulative sums of n lengths."""
    return np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus; the arrays are read-only maps of files in the cache."""

    name: str
    locales: tuple[str, ...]
    labels: tuple[str, ...]  # BIO names, "O" first, then sorted; a label id is an index into it
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
    fingerprint: str  # hex digits that depend on everything that is trained on and scored
    truncated: dict[str, int]  # per locale, utterances of all partitions cut at max_length, before limits
    _index: dict = field(repr=False)
    _arrays: dict[str, np.ndarray] = field(repr=False)
    _limited: dict[tuple[str, str], Sentences] = field(repr=False, default_factory=dict)
    tokenizer: str = ""  # the name that learners have for it
    others: Mapping[str, "Corpus"] = field(repr=False, default_factory=dict)  # the same utterances, by tokenizer

    def under(self, tokenizer: str) -> "Corpus":
        """Return the same utterances under the tokenizer of that name, which may be this one's."""
        return self if tokenizer == self.tokenizer else self.others[tokenizer]

    def sentences(self, locale: str, partition: str) -> Sentences:
        """Return the sentences of a locale and a partition (train, dev, test), sorted by id.

        A limit takes sentences at even distances, with the same ids in every locale. MASSIVE's ids go by topic: its first few
        hundred utterances are jokes and lamps, with one word of seven in a slot.
        Raises UserError for a locale or partition that the corpus does not have.
        """
        if locale not in self.locales or partition not in massive.PARTITIONS:
            allowed = f"{', '.join(self.locales)}; {', '.join(massive.PARTITIONS)}"
            raise UserError(f"no sentences for {locale!r}, {partition!r}; allowed: {allowed}")
        first, last = self._index[locale]["range"][partition]
        offsets = self._arrays["offsets"][first : last + 1]
        tokens = slice(int(offsets[0]), int(offsets[-1]))
        full = Sentences(self._arrays["input_ids"][tokens], self._arrays["labels"][tokens], offsets - offsets[0])
        limit = self.limit if partition == "train" else self.eval_limit
        if limit is None or limit >= full.number:
            return full
        if (locale, partition) not in self._limited:
            self._limited[locale, partition] = full.take(np.arange(limit) * full.number // limit)
        return self._limited[locale, partition]

    def words(self) -> np.ndarray:
        """Return the ids of all tokens of all partitions, before limits, sorted: int64 [n]."""
        return np.flatnonzero(np.bincount(self._arrays["input_ids"], minlength=1))

    def tokens_per_word(self, locale: str) -> float:
        """Return pieces per word over a locale's full training split, before truncation, without <s> and </s>."""
        return self._index[locale]["pieces"] / self._index[locale]["words"]


def load_corpus(
    data: str | Path,
    *,
    tokenizer: str | Path | None = None,
    locales: Iterable[str] | None = None,
    limit: int | None = None,
    eval_limit: int | None = None,
    max_length: int = Config.max_length,
    cache: str | Path | None = None,
    seed: int = Config.seed,
    progress: OnProgress | None = None,
    synthetic: Mapping[str, Any] | None = None,
    vocabulary: int = Config.vocabulary,
    balanced: bool = False,
) -> Corpus:
    """Read, tokenise and cache a corpus, or open it from the cache.

    data: "synthetic", a folder of jsonl files, an archive (.tar.gz, .tgz, .tar.xz), or a hub id.
    tokenizer: a folder or hub name for AutoTokenizer; None trains one on the training utterances.
    locales: the order of `Corpus.locales`; None takes all.
    limit, eval_limit: training utterances, and dev and test utterances, per locale, at even distances.
    max_length: tokens of a sentence, with <s> and </s>.
    cache: a folder, see `cache_folder`.
    seed: of the synthetic corpus, unless `synthetic`, the options of its `generate`, has one; and of what is `balanced`.
    vocabulary: most entries of a tokenizer that is trained.
    balanced: train it on text balanced by script, see `_balanced`; `tokenizer` must be None.
    Raises UserError in one line for anything wrong with the input.
    """
    for name, value, minimum in (("limit", limit, 1), ("eval_limit", eval_limit, 1), ("max_length", max_length, 3)):
        if value is not None and value < minimum:
            raise UserError(f"{name} must be at least {minimum}, not {value}")
    order = None if locales is None else check_locales(locales)
    if order == ():
        raise UserError("no locales given")
    progress = progress or (lambda done, total, text: None)
    cache = cache_folder(cache)
    source = _open(data, order, seed, synthetic)
    canonical = None if order is None else tuple(locale for locale in LOCALES if locale in order)
    digest = key(source.digest, canonical)
    assert tokenizer is None or not balanced

    def texts() -> list[str]:
        progress(0, 1, "training a tokenizer")
        return _balanced(source, canonical, seed) if balanced else _texts(source, canonical)

    text_digest = key(digest, BALANCED, seed) if balanced else digest
    folder = tokenizer_folder(tokenizer, cache, text_digest, texts, progress, vocabulary)
    name = key("corpus", FORMAT, source.digest, hash_tokenizer(folder), max_length, canonical)
    built = cache / f"corpus-{name}"
    open_entry(built, lambda temporary: _build(temporary, source, folder, canonical, max_length, progress), progress)
    meta = json.loads((built / "meta.json").read_text(encoding="utf-8"))
    arrays = {name: np.load(built / f"{name}.npy", mmap_mode="r") for name in Sentences._fields}
    order = order or tuple(meta["index"])
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
        tokenizer=BALANCED if balanced else "",
    )


def _open(data: str | Path, locales: Locales, seed: int, options: Mapping[str, Any] | None) -> massive.Source:
    if str(data) != "synthetic":
        if options:
            raise UserError(f"synthetic options are given, but the data is {data}")
        return massive.open_source(data, locales)
    checked = synthetic.check_options(**{"seed": seed} | dict(options or {}))._asdict()
    settings = sorted(checked.items())
    digest = key("synthetic", synthetic.VERSION, settings, locales and sorted(locales))
    name = f"synthetic ({', '.join(f'{k}={v}' for k, v in settings)})"

    def read() -> Iterator[tuple[massive.Position, dict]]:
        for number, record in enumerate(synthetic.generate(locales or LOCALES, **checked), 1):
            yield ("synthetic", number), record

    return massive.Source(name, digest, read)


def _texts(source: massive.Source, locales: Locales) -> list[str]:
    """Return the training utterances, words separated by spaces, to train a tokenizer on."""
    utterances = massive.utterances(source, locales)
    return [" ".join(words) for _, partition, _, words, _ in utterances if partition == "train"]


def _balanced(source: massive.Source, locales: Locales, seed: int) -> list[str]:
    """Return a text for each script, all with the same number of words, and together with as many as the training utterances.

    A script with too many words gives as many of them, drawn without replacement. One with too few is repeated whole, and what
    then lacks is drawn so. Where labels are by character, a word is one character.
    """
    words: dict[str, list[str]] = defaultdict(list)
    for locale, partition, _, texts, _ in massive.utterances(source, locales):
        if partition == "train":
            words[LANGUAGES[locale].script].extend(texts)
    each = sum(map(len, words.values())) // len(words)
    drawn = {name: random.Random(f"{seed} {name}").sample(own, each % len(own)) for name, own in sorted(words.items())}
    return [" ".join(words[name] * (each // len(words[name])) + rest) for name, rest in drawn.items()]


class _Utterances:
    """The utterances of a locale and partition, as read. words, labels: indices into tables, all utterances end to end."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.lengths, self.words, self.labels = array("i"), array("i"), array("i")


def _read(
    source: massive.Source, locales: Locales, progress: OnProgress
) -> tuple[dict[tuple[str, str], _Utterances], list[str], list[str]]:
    """Return the utterances by locale and partition, the distinct words, and the label names as first seen."""
    utterances: dict[tuple[str, str], _Utterances] = defaultdict(_Utterances)
    words: dict[str, int] = {}
    names = {"O": 0}
    progress(0, 1, f"reading {source.name}")
    for count, (locale, partition, name, texts, labels) in enumerate(massive.utterances(source, locales), 1):
        target = utterances[locale, partition]
        target.ids.append(name)
        target.lengths.append(len(texts))
        target.words.extend([words.setdefault(text, len(words)) for text in texts])
        target.labels.extend([names.setdefault(label, len(names)) for label in labels])
        if count % 20000 == 0:
            progress(count, 0, f"reading {source.name}")
    present = {locale for locale, _ in utterances}
    absent = [locale for locale in locales or () if locale not in present]
    if absent or not utterances:
        raise UserError(f"{source.name} has no utterances" + (f" in {', '.join(absent)}" if absent else ""))
    untrained = [locale for locale in LOCALES if locale in present and (locale, "train") not in utterances]
    if untrained:
        raise UserError(f"{source.name} has no training utterances in {', '.join(untrained)}")
    return utterances, list(words), list(names)


def _tokenise(words: list[str], tokenizer: Callable, unk_id: int, progress: OnProgress) -> tuple[np.ndarray, np.ndarray]:
    """Return the pieces of all words, int32 [pieces], and where each word starts, int64 [words+1].

    A word without pieces becomes one <unk>, so that its label does not vanish. Of a very long one the beginning counts, for
    tokenisers take seconds for a million characters, and a sentence is cut to the model's positions anyway.
    """
    pieces, counts, step = array("i"), array("i"), 20000
    for start in range(0, len(words), step):
        progress(start, len(words), "tokenising words")
        batch = [[word[:LONGEST_WORD]] for word in words[start : start + step]]
        for ids in tokenizer(batch, is_split_into_words=True, add_special_tokens=False)["input_ids"]:
            ids = ids or [unk_id]
            pieces.extend(ids)
            counts.append(len(ids))
    progress(len(words), len(words), "tokenising words")
    return np.array(pieces, np.int32), _cumulate(counts)


def _assemble(
    utterances: _Utterances, pieces: np.ndarray, starts: np.ndarray, label_ids: np.ndarray, bos_id: int, eos_id: int, room: int
) -> tuple[Sentences, int, int, int]:
    """Assemble sentences, sorted by id. Returns them and numbers: sentences cut, pieces before cutting, words.

    pieces, starts: of all words, see `_tokenise`.
    label_ids: int32, the label id of each label name as first seen.
    room: pieces that fit between <s> and </s>.
    """
    ids, word_labels = utterances.ids, label_ids[np.array(utterances.labels)]
    order = np.array(sorted(range(len(ids)), key=lambda i: (len(ids[i]), ids[i], i)), np.int64)
    by_word = Sentences(np.array(utterances.words, np.int64), word_labels, _cumulate(utterances.lengths)).take(order)
    words = by_word.input_ids
    counts = np.diff(starts)[words]
    piece_ids, piece_labels = pieces[_ranges(starts[words], counts)], np.full(counts.sum(), IGNORED, np.int32)
    first_pieces = _cumulate(counts)
    piece_labels[first_pieces[:-1]] = by_word.labels
    borders = first_pieces[by_word.offsets]
    full = np.diff(borders)
    kept = np.minimum(full, room)
    offsets = _cumulate(kept + 2)
    input_ids, labels = np.empty(offsets[-1], np.int32), np.full(offsets[-1], IGNORED, np.int32)
    source, target = _ranges(borders[:-1], kept), _ranges(offsets[:-1] + 1, kept)
    input_ids[target], labels[target] = piece_ids[source], piece_labels[source]
    input_ids[offsets[:-1]], input_ids[offsets[1:] - 1] = bos_id, eos_id
    return Sentences(input_ids, labels, offsets), int((full > room).sum()), len(piece_ids), len(words)


def _build(
    into: Path, source: massive.Source, tokenizer_folder: Path, locales: Locales, max_length: int, progress: OnProgress
) -> None:
    """Read and tokenise a source into the folder `into`."""
    tokenizer = load_tokenizer(tokenizer_folder)
    special = special_ids(tokenizer, tokenizer_folder)
    utterances, words, names = _read(source, locales, progress)
    pieces, starts = _tokenise(words, tokenizer, special["unk_id"], progress)
    slots = {name[2:] for name in names if name != "O"}
    labels = ["O", *sorted(f"{tag}-{slot}" for slot in slots for tag in "BI")]
    label_ids = np.array([labels.index(name) for name in names], np.int32)
    index: dict[str, dict] = {}
    everything: list[Sentences] = []
    first = 0
    present = [locale for locale in LOCALES if (locale, "train") in utterances]
    for done, locale in enumerate(present):
        progress(done, len(present), "putting sentences together")
        index[locale] = {"range": {}, "truncated": 0}
        for partition in massive.PARTITIONS:
            bos_id, eos_id, room = special["bos_id"], special["eos_id"], max_length - 2
            given = utterances.pop((locale, partition), _Utterances())
            sentences, cut, num_pieces, num_words = _assemble(given, pieces, starts, label_ids, bos_id, eos_id, room)
            everything.append(sentences)
            index[locale]["range"][partition] = [first, first + sentences.number]
            first += sentences.number
            index[locale]["truncated"] += cut
            if partition == "train":
                index[locale] |= {"pieces": num_pieces, "words": num_words}
    arrays = Sentences.concatenate(everything)._asdict()
    special["vocab_size"] = max(len(tokenizer), int(pieces.max()) + 1)
    sizes = {name: len(values) for name, values in arrays.items()}
    meta = {"labels": labels, "tokenizer": special, "index": index, "sizes": sizes}
    for name, values in arrays.items():
        np.save(into / f"{name}.npy", values)
    (into / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    progress(len(present), len(present), "putting sentences together")
