"""The tiny backbone: what its warm-up must have learnt, and from what."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kloss.cl.backbone import tiny_backbone, tiny_config
from kloss.cl.corpus import Sentences
from kloss.models import XLMRForTokenClassification

PAIRS = 24  # token i stands beside token PAIRS + i and no other
BOS, PAD, EOS, MASK, FIRST = 0, 1, 2, 3, 4


def paired_text(sentences: int, seed: int = 0) -> Sentences:
    first = np.random.default_rng(seed).integers(PAIRS, size=sentences)
    ids = np.stack([np.full(sentences, BOS), FIRST + first, FIRST + PAIRS + first, np.full(sentences, EOS)], 1)
    return Sentences(ids.ravel().astype(np.int32), np.full(ids.size, -100, np.int32), np.arange(sentences + 1) * 4)


@pytest.fixture
def corpus():
    text = paired_text(400)
    return SimpleNamespace(
        locales=("en-US",), labels=("O",), vocab_size=FIRST + 3 * PAIRS, sentences=lambda locale, partition: text,
        fingerprint="pairs", bos_id=BOS, pad_id=PAD, eos_id=EOS, mask_id=MASK, tokenizer_folder="none",
    )  # fmt: skip


def test_warm_up_learns_what_stands_beside_what(corpus, tmp_path):
    """Who knows only how frequent a token is, and on which side it stands, has a loss of log 24 = 3.2."""
    told = []
    tiny_backbone(corpus, 1, 64, 300, 64, 0, str(tmp_path), lambda done, total, text: told.append(float(text.split()[-1])))
    assert np.mean(told[-20:]) < 2.0


def test_warm_up_survives_steps_in_which_no_token_is_predicted(corpus, tmp_path):
    folder = tiny_backbone(corpus, 1, 32, 10, 1, 0, str(tmp_path), lambda done, total, text: None)
    model = XLMRForTokenClassification.from_pretrained(folder)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_tokens_that_the_text_never_uses_stay_as_drawn(corpus, tmp_path):
    folders = [tiny_backbone(corpus, 1, 32, steps, 8, 0, str(tmp_path), lambda *told: None) for steps in (0, 5)]
    drawn, warmed = (XLMRForTokenClassification.from_pretrained(folder).word_embeddings.weight for folder in folders)
    unused = slice(FIRST + 2 * PAIRS, None)
    assert torch.equal(drawn[unused], warmed[unused])
    assert not torch.equal(drawn[FIRST : FIRST + 2 * PAIRS], warmed[FIRST : FIRST + 2 * PAIRS])


def test_a_narrow_backbone_hears_its_context_as_the_base_model_does(corpus):
    """Weights of deviation s send a vector of unit entries to entries of s √width."""
    spread = {hidden: tiny_config(corpus, 1, hidden).initializer_range * hidden**0.5 for hidden in (32, 128, 768)}
    assert spread[32] == pytest.approx(spread[768]) == pytest.approx(spread[128]) == pytest.approx(0.02 * 768**0.5)
