"""The tiny backbone: what its warm-up must have learnt, and from what."""

from types import SimpleNamespace

import numpy as np
import pytest

from kloss.cl.backbone import tiny_backbone, tiny_config
from kloss.cl.corpus import Sentences
from kloss.config import Config
from kloss.models import XLMRForTokenClassification

PAIRS = 24  # token i stands beside token 2 PAIRS + i and no other; those in between stand nowhere
BOS, PAD, EOS, MASK, FIRST = 0, 1, 2, 3, 4


def corpus_of(sentences: int, paired: bool):
    """Sentences of two tokens, one of either side; unpaired, each is drawn on its own."""
    first, second = np.random.default_rng(0).integers(PAIRS, size=(2, sentences))
    second = first if paired else second
    ids = np.stack([np.full(sentences, BOS), FIRST + first, FIRST + 2 * PAIRS + second, np.full(sentences, EOS)], 1)
    text = Sentences(ids.ravel().astype(np.int32), np.full(ids.size, -100, np.int32), np.arange(sentences + 1) * 4)
    return SimpleNamespace(
        locales=("en-US",), labels=("O",), vocab_size=FIRST + 3 * PAIRS, sentences=lambda locale, partition: text,
        fingerprint=f"paired: {paired}", max_length=4, bos_id=BOS, pad_id=PAD, eos_id=EOS, mask_id=MASK, tokenizer_folder="none",
    )  # fmt: skip


def settings(folder, layers, hidden, steps, batch):
    return Config(tiny_layers=layers, tiny_hidden=hidden, pretrain_steps=steps, pretrain_batch=batch, cache=str(folder))


@pytest.fixture
def corpus():
    return corpus_of(400, paired=True)


@pytest.mark.parametrize("paired, least, most", [(True, 0.0, 2.0), (False, 2.5, 3.5)])
def test_warm_up_learns_what_stands_beside_what_and_sees_no_hidden_token(tmp_path, paired, least, most):
    """Who knows only how frequent a token is, and on which side it stands, has a loss of log 24 = 3.2."""
    told = []
    corpus = corpus_of(4000, paired)
    config = settings(tmp_path, 1, 64, 300, 64)
    tiny_backbone(config, corpus, lambda done, total, text: told.append(float(text.split()[-1])))
    assert least < np.mean(told[-20:]) < most


def test_a_step_that_predicts_no_token_has_no_loss(corpus, tmp_path):
    told = []
    config = settings(tmp_path, 1, 32, 10, 1)
    tiny_backbone(config, corpus, lambda done, total, text: told.append(float(text.split()[-1])))
    assert 0.0 in told and np.isfinite(told).all()


def test_tokens_that_the_text_never_uses_stay_as_drawn(corpus, tmp_path):
    folders = [tiny_backbone(settings(tmp_path, 1, 32, steps, 8), corpus, lambda *told: None) for steps in (0, 5)]
    drawn, warmed = (XLMRForTokenClassification.from_pretrained(folder).word_embeddings.weight for folder in folders)
    moved = (drawn != warmed).any(1)
    assert not moved[FIRST + PAIRS : FIRST + 2 * PAIRS].any()
    assert moved[FIRST : FIRST + PAIRS].any() and moved[FIRST + 2 * PAIRS :].any()


def test_a_narrow_backbone_hears_its_context_as_the_base_model_does(corpus):
    """Weights of deviation s send a vector of unit entries to entries of s √width."""
    spread = {n: tiny_config(Config(tiny_hidden=n), corpus).initializer_range * n**0.5 for n in (32, 128, 768)}
    assert spread[32] == pytest.approx(spread[768]) == pytest.approx(spread[128]) == pytest.approx(0.02 * 768**0.5)
