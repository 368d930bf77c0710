"""Tokenizers of other models against transformers: pieces of words, special tokens, literal special tokens, very long words."""

import json
import time

import pytest
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kloss.cl.corpus import load_corpus
from kloss.cl.tokenizer import LONGEST_WORD, hash_tokenizer, load_tokenizer, tokenizer_folder, train_tokenizer

TEXTS = ["Go home now, please!", "stop the music", "play a song by Bach", "wie spät ist es", "spiel (noch) 2 Lieder"] * 9
TEXTS += ["a <b> / c"] * 9
UTTERANCES = ["go home now", "spiel zwei Lieder, bitte!", "über  das Öl 気", "Bach's 2nd song"]
LITERAL = ["<pad> go", "play </s> now", "the <mask>", "a<s>b </s></s> <unk>", "</s>"]
IN_BRACKETS = ["[PAD] [SEP] home [MASK]", "go[CLS] [UNK]"]  # which MASSIVE takes for slots


def bert(folder):
    made = BertWordPieceTokenizer()
    made.train_from_iterator(TEXTS, vocab_size=200, min_frequency=1, show_progress=False)
    made.save_model(str(folder))


def roberta(folder):
    made = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator(TEXTS, vocab_size=400, min_frequency=1, show_progress=False, special_tokens=special)
    made.save_model(str(folder))


def xlm_roberta(folder):
    train_tokenizer(TEXTS, folder, vocab_size=120)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "XLMRobertaTokenizer"}))


# What transformers asks for words, how a sentence begins and ends, and a word with its piece.
KINDS = {
    "bert": (bert, {}, "[CLS]", "[SEP]", "home", "home"),
    "roberta": (roberta, {"add_prefix_space": True}, "<s>", "</s>", "home", "Ġhome"),
    "xlm-roberta": (xlm_roberta, {}, "<s>", "</s>", "song", "▁song"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """The folder of a model of a kind with its tokenizer's files, transformers' tokenizer for words, and what is known of it."""
    folder = tmp_path_factory.mktemp("tokenizer")
    make, options, *known = KINDS[request.param]
    make(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": request.param}))
    return folder, AutoTokenizer.from_pretrained(folder, **options), *known


def corpus_of(utterances, folder, tmp_path):
    records = [
        {"id": str(i), "locale": "en-US", "partition": partition, "utt": text, "annot_utt": text}
        for i, text in enumerate(utterances)
        for partition in ("train", "dev", "test")
    ]
    records = [r | {"id": f"{r['id']}-{r['partition']}"} for r in records]
    (tmp_path / "data").mkdir(parents=True)
    (tmp_path / "data" / "en-US.jsonl").write_text("\n".join(json.dumps(record) for record in records))
    return load_corpus(tmp_path / "data", tokenizer=folder, cache=tmp_path / "cache")


def ids_of(corpus):
    sentences = corpus.sentences("en-US", "train")
    return [sentences.input_ids[a:b].tolist() for a, b in zip(sentences.offsets[:-1], sentences.offsets[1:], strict=True)]


def test_sentences_are_those_of_transformers(kind, tmp_path):
    folder, theirs, first, last, word, piece = kind
    corpus = corpus_of(UTTERANCES, folder, tmp_path)
    assert ids_of(corpus) == [theirs(text.split(), is_split_into_words=True).input_ids for text in UTTERANCES]
    names = theirs.convert_ids_to_tokens([corpus.bos_id, corpus.eos_id])
    assert names == [first, last] and corpus.pad_id == theirs.pad_token_id and corpus.mask_id == theirs.mask_token_id
    assert theirs.convert_ids_to_tokens(ids_of(corpus_of([f"x {word}"], folder, tmp_path / "b"))[0])[-2] == piece


def without_special_pieces(folder, target):
    """Transformers' tokenizer over a vocabulary that has other pieces in the places of the special tokens."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    stored = json.loads((target / "tokenizer.json").read_text())
    special = [token["content"] for token in stored["added_tokens"]]
    stored["model"]["vocab"] = [
        [f"\ue000{piece}" if piece in special else piece, score] for piece, score in stored["model"]["vocab"]
    ]
    (target / "tokenizer.json").write_text(json.dumps(stored | {"added_tokens": []}))
    return PreTrainedTokenizerFast(tokenizer_file=str(target / "tokenizer.json"), bos_token=None)


def test_a_literal_special_token_is_text(kind, tmp_path):
    """A Unigram vocabulary has the tokens as pieces, the most probable ones, so transformers' option needs one without them."""
    folder, usual, *_ = kind
    theirs = usual
    if type(theirs).__name__ == "XLMRobertaTokenizer":
        theirs = without_special_pieces(folder, tmp_path / "other")
    corpus = corpus_of(LITERAL, folder, tmp_path)
    words = [text.split() for text in (*LITERAL, *IN_BRACKETS)]
    wanted = [theirs(text, is_split_into_words=True, split_special_tokens=True).input_ids for text in words]
    assert ids_of(corpus) == wanted[: len(LITERAL)]
    assert [load_tokenizer(folder)(text, is_split_into_words=True).input_ids for text in words] == wanted
    special = {corpus.bos_id, corpus.pad_id, corpus.eos_id, corpus.mask_id}
    assert all(not special & set(ids[1:-1]) for ids in wanted)
    taken = [usual(text, is_split_into_words=True).input_ids for text in words]
    assert any(special & set(ids[1:-1]) for ids in taken)  # which transformers takes for the tokens themselves


def test_a_copy_from_the_hub_is_the_tokenizer_as_it_was(kind, tmp_path, monkeypatch):
    folder, theirs, *_ = kind
    monkeypatch.setattr("kloss.cl.tokenizer.model_folder", lambda name, kind, patterns: folder)
    copy = tokenizer_folder("some/name", tmp_path, "", list)
    assert copy.parent == tmp_path and "split_special_tokens" not in (copy / "tokenizer_config.json").read_text()
    theirs.save_pretrained(tmp_path / "saved")
    assert hash_tokenizer(copy) == hash_tokenizer(tmp_path / "saved")


LONG = {"letters": "x" * 10**7, "marks": "\u0323\u0301" * 10**6, "ligatures": "\ufdfa" * 10**6}


@pytest.mark.parametrize("word", LONG.values(), ids=LONG)
def test_a_word_of_ten_megabytes_is_trained_on_by_its_beginning(tmp_path, word):
    began = time.monotonic()
    train_tokenizer([*TEXTS, f"stop {word} now"], tmp_path / "long", vocab_size=200)
    assert time.monotonic() - began < 5  # all of it took 5 s a megabyte
    train_tokenizer([*TEXTS, f"stop {word[:LONGEST_WORD]} now"], tmp_path / "short", vocab_size=200)
    assert hash_tokenizer(tmp_path / "long") == hash_tokenizer(tmp_path / "short")


def test_words_of_the_longest_length_are_trained_on_whole(tmp_path):
    """And spaces in disguise still divide words, as they do before and after NFKC."""
    word = "ab" * (LONGEST_WORD // 2)
    for folder, end in (("whole", "c"), ("other", "d")):
        train_tokenizer([f"{word[:-1]}{end} a\u00a0b\u2003c x\u00b4y"], tmp_path / folder, vocab_size=200)
    assert hash_tokenizer(tmp_path / "whole") != hash_tokenizer(tmp_path / "other")
