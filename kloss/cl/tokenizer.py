"""Load a tokenizer from a folder or the hub, or train a small one with XLM-R's special tokens.

The trainer of `tokenizers` sums in hash-map order, so its scores and ids differ between runs. A corpus's fingerprint must not,
so this trainer is deterministic. Method: Kudo 2018 (arXiv 1804.10959), with two simplifications. The best segmentation replaces
the expectation over all; the loss of dropping a piece is its count times the cost of its best re-segmentation.
"""

import math
import os
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UserError
from ..models.hub import model_folder
from .cache import SEAL, hash_files, key, open_entry

FORMAT = 1  # part of a trained tokenizer's cache key; increment when the same texts give another one
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0, 1, 2, 3; <mask> is the last
LONGEST = 8  # characters of a piece
MOST_WORDS = 20000  # distinct words to train on, the most frequent
LONGEST_WORD = 1000  # characters of a word that are trained on
PATTERNS = ("*.json", "*.txt", "*.model", "*.jinja")  # a tokenizer's files on the hub
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf")


def load_tokenizer(folder: str | Path) -> Any:
    """Load AutoTokenizer's tokenizer from a folder, for words, and run no code of it. Raises UserError if there is none.

    A word is only text: one that reads like a special token (<pad>, </s>, <mask>, [SEP]) is split into pieces, as by transformers
    with split_special_tokens, for the token itself would end a sentence or ask for a prediction. That option alone does not hold
    where the token is also a piece of the vocabulary, as in XLM-R's; there it is cut behind its first character.
    """
    from tokenizers import Regex, models
    from tokenizers.pre_tokenizers import Sequence, Split

    tokenizer = _load(folder)
    tokenizer.split_special_tokens = True
    backend = getattr(tokenizer, "backend_tokenizer", None)  # a tokenizer in Python has none, and keeps to the option
    special = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    cuts = [f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in special if len(token) > 1]
    if backend is not None and cuts and not isinstance(backend.model, models.BPE):  # which knows merges only
        cut = Split(Regex("|".join(cuts)), "merged_with_previous")
        backend.pre_tokenizer = Sequence([backend.pre_tokenizer, cut]) if backend.pre_tokenizer else cut
    return tokenizer


def _load(folder: str | Path) -> Any:
    """AutoTokenizer's tokenizer as it is; byte-level BPE with add_prefix_space, as transformers demands for words."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import AutoTokenizer

    def load(**options: bool) -> Any:
        return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, **options)

    try:
        tokenizer = load()
        steps = getattr(getattr(tokenizer, "backend_tokenizer", None), "pre_tokenizer", None)
        return load(add_prefix_space=True) if isinstance(steps, ByteLevel) and not steps.add_prefix_space else tokenizer
    except Exception as error:  # transformers raises many kinds
        line = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load a tokenizer from {str(folder)!r} ({line})") from error


def hash_tokenizer(folder: Path) -> str:
    """Return 32 hex digits that depend on a tokenizer's files, but not on model weights or an entry's digest beside them."""
    return hash_files(sorted(f for f in folder.iterdir() if f.is_file() and f.suffix not in _WEIGHTS and f.name != SEAL))


def tokenizer_folder(
    name: str | Path | None,
    cache: Path,
    digest: str,
    texts: Callable[[], Iterable[str]],
    progress: Callable | None = None,
    vocabulary: int = Config.vocabulary,
) -> Path:
    """Return a tokenizer's folder: `name` itself, a cached copy from the hub, or for None one trained on `texts`.

    digest: hash of what the texts come from; part of the trained tokenizer's cache key.
    vocabulary: most entries of a trained one.
    """
    if name is None:
        folder = cache / f"tokenizer-{key('trained', FORMAT, digest, vocabulary, LONGEST, MOST_WORDS)}"
        open_entry(folder, lambda temporary: train_tokenizer(texts(), temporary, vocabulary), progress)
        return folder
    source = model_folder(str(name), "tokenizer", PATTERNS)
    if os.path.isdir(os.path.expanduser(name)):
        return source.resolve()
    tokenizer = _load(source)
    with tempfile.TemporaryDirectory() as saved:
        tokenizer.save_pretrained(saved)
        folder = cache / f"tokenizer-{hash_tokenizer(Path(saved))}"
        open_entry(folder, lambda temporary: shutil.copytree(saved, temporary, dirs_exist_ok=True), progress)
    return folder


def special_ids(tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Return bos_id and eos_id (which open and close a sentence), pad_id, unk_id and mask_id.

    Raises UserError if the tokenizer lacks any but mask_id, which may be None.
    """
    first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
    last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    ids = {"bos_id": first, "pad_id": tokenizer.pad_token_id, "eos_id": last, "unk_id": tokenizer.unk_token_id}
    missing = ", ".join(name for name, value in ids.items() if value is None)
    if missing:
        raise UserError(f"the tokenizer in {folder} has no {missing}; needed: <s>, <pad>, </s> and <unk>")
    return ids | {"mask_id": tokenizer.mask_token_id}


def train_tokenizer(texts: Iterable[str], folder: str | Path, vocab_size: int = Config.vocabulary) -> None:
    """Train a Unigram tokenizer (NFKC, Metaspace) and save it to a folder that AutoTokenizer loads.

    Entries: <s> 0, <pad> 1, </s> 2, <unk> 3, pieces by falling score, <mask> last. Characters take at most half of them.
    texts: of a word longer than LONGEST_WORD only the beginning counts, since the time grows with the characters.
    vocab_size: limit on the entries; texts with few pieces give fewer.
    Raises UserError for no texts or a vocab_size below 7.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    counted = Counter("▁" + word for text in texts for raw in text.split() for word in _normalized(raw[:LONGEST_WORD]))
    if not counted or vocab_size < len(SPECIAL) + 3:
        raise UserError(f"cannot train a tokenizer of {vocab_size} entries on {len(counted)} distinct words")
    words = dict(sorted(counted.items(), key=lambda item: (-item[1], item[0]))[:MOST_WORDS])
    pieces = train_unigram(words, vocab_size - len(SPECIAL) - 1)
    vocabulary = [(piece, 0.0) for piece in SPECIAL] + sorted(pieces.items(), key=lambda item: (-item[1], item[0]))
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index("<unk>")))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens([*SPECIAL, AddedToken("<mask>", lstrip=True, special=True)])
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    names |= {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    trained = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    try:
        trained.save_pretrained(folder)
    except Exception as error:  # `tokenizers` has a single kind; the text of a file-system error has its number
        if "os error" in str(error):
            raise OSError(str(error)) from error
        raise


def _normalized(word: str) -> list[str]:
    """The words that NFKC makes of one: none, one, or several if it has spaces in disguise."""
    return [part[:LONGEST_WORD] for part in unicodedata.normalize("NFKC", word).split()]


def train_unigram(words: dict[str, int], size: int) -> dict[str, float]:
    """Return at most `size` pieces with their log probabilities, from words with their counts."""
    counted: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counted[character] += count
    characters = dict(_largest(counted, size // 2))
    substrings: Counter[str] = Counter()
    for word, count in words.items():
        for start in range(len(word)):
            for end in range(start + 2, min(start + LONGEST, len(word)) + 1):
                substrings[word[start:end]] += count
    seeds = {piece: count * len(piece) for piece, count in substrings.items() if characters.keys() >= set(piece)}
    pieces = _log({**characters, **{piece: seeds[piece] for piece, _ in _largest(seeds, 3 * size)}})
    while True:
        for _ in range(2):
            pieces = _log(_count(words, pieces, characters))
        room = size - len(characters)
        long = [piece for piece in pieces if piece not in characters]
        if len(long) <= room:
            return {piece: round(score, 6) for piece, score in pieces.items()}
        counts = _count(words, pieces, characters)
        loss = {p: counts.get(p, 0) * (pieces[p] - _segment(p, pieces, leave_out=p)[0]) for p in long}
        kept = _largest(loss, max(room, int(0.7 * len(long))))
        pieces = {piece: pieces[piece] for piece in (*characters, *(piece for piece, _ in kept))}


def _largest(scores: Mapping[str, float], count: int) -> list[tuple[str, float]]:
    """Return the `count` entries with the largest scores; ties, to 6 decimals, go by the piece."""
    return sorted(scores.items(), key=lambda item: (-round(item[1], 6), item[0]))[:count]


def _log(counts: Mapping[str, float]) -> dict[str, float]:
    total = math.log(sum(counts.values()))
    return {piece: math.log(count) - total for piece, count in counts.items()}


def _count(words: dict[str, int], pieces: dict[str, float], characters: dict[str, float]) -> dict[str, float]:
    """Count the pieces of the words' best segmentations. Unused pieces are dropped, characters are not."""
    counts = dict.fromkeys(characters, 0.1)
    for word, count in words.items():
        for piece in _segment(word, pieces)[1]:
            if piece in pieces:
                counts[piece] = counts.get(piece, 0) + count
    return counts


def _segment(word: str, pieces: dict[str, float], leave_out: str | None = None) -> tuple[float, list[str]]:
    """Return (log probability, pieces) of the best segmentation; a character that is no piece costs 100.

    leave_out: a piece not to use.
    """
    best = [(0.0, 0)]  # for each end: (log probability, start of the last piece)
    for end in range(1, len(word) + 1):
        last = (best[end - 1][0] - 100.0, end - 1)
        for start in range(max(0, end - LONGEST), end):
            score = pieces.get(word[start:end])
            if score is not None and best[start][0] + score > last[0] and word[start:end] != leave_out:
                last = (best[start][0] + score, start)
        best.append(last)
    segments, end = [], len(word)
    while end:
        segments.append(word[best[end][1] : end])
        end = best[end][1]
    return best[-1][0], segments[::-1]
