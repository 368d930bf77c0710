"""What --dry-run says of memory is what a pass keeps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.whole_step import make_step
from kloss.cl.languages import LOCALES
from kloss.cl.study import plan
from kloss.config import Config
from kloss.estimate import _sizes, kept_per_token, with_pass_tokens
from kloss.kernels.cpu_library import built
from kloss.models import BASE, TINY, AdapterBank, XLMRForTokenClassification


@pytest.mark.skipif(not built(), reason="csrc is not built")
@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_backward_keeps_of_a_token_is_what_the_plan_says(rank, dtype):
    if dtype == torch.bfloat16 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("this processor computes bf16 in fp32")
    widths = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_hidden_layers": 3}
    sizes = replace(TINY, **widths, vocab_size=50, num_labels=7)
    made = make_step(sizes, 3, rank, 4, dropout=0.1, dtype=dtype)
    tokens = len(made.sentences.input_ids)
    lasting = {t.untyped_storage().data_ptr() for t in (*made.model.parameters(), made.bank.param, made.bank.work)}
    kept = {}

    def keep(tensor):
        if tensor._base is not None and tensor._base.shape[1:] == tensor.shape == (tokens,):
            kept[tensor._base.data_ptr()] = tensor._base  # a site's keys keep those of all sites
        elif tensor.shape and tensor.shape[0] == tokens and tensor.untyped_storage().data_ptr() not in lasting:
            kept[tensor.data_ptr()] = tensor  # alive, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made.run()
    bytes_per_token = sum(tensor.nbytes for tensor in kept.values()) / tokens
    held = 2  # LoRA's thresholds, which a layer does not save but hold
    assert bytes_per_token + held == sum(kept_per_token(sizes, rank, dtype.itemsize).values())


def test_sizes_of_a_backbone_in_a_folder_are_read(tmp_path):
    sizes = replace(TINY, vocab_size=50, hidden_size=64, intermediate_size=256)
    corpus = SimpleNamespace(labels=("O", "B-x", "I-x"))
    XLMRForTokenClassification.random(sizes).save_pretrained(tmp_path)
    assert _sizes(Config(backbone=str(tmp_path)), corpus) == replace(sizes, num_labels=3)
    assert _sizes(Config(backbone="some/one"), corpus) is None


def test_passes_fill_a_gpus_memory_and_no_more():
    """Kept tensors, weights and moments fit; more memory holds more tokens; a given number stays."""
    config = Config(pass_tokens=0, dtype="bf16", rank=(32,))
    sizes = replace(BASE, num_labels=111)
    study = plan(config, LOCALES)
    state = len(study.learners) * AdapterBank.width_of(sizes, 32) * 16
    kept = sum(kept_per_token(sizes, 32, 2).values())
    chosen = [with_pass_tokens(config, study, sizes, free).pass_tokens for free in (20 << 30, 80 << 30, 141 << 30)]
    for tokens, free in zip(chosen, (20 << 30, 80 << 30, 141 << 30), strict=True):
        assert 0.59 * (free - state) < tokens * kept < 0.61 * (free - state)
    assert 1024 < chosen[0] < chosen[1] < chosen[2]
    assert with_pass_tokens(config, study, sizes, 1 << 20).pass_tokens == 1024
    assert with_pass_tokens(config, study, sizes, None).pass_tokens == Config.pass_tokens
    assert with_pass_tokens(replace(config, pass_tokens=7), study, sizes, 80 << 30).pass_tokens == 7
    whole = replace(config, strategies=("vanilla",))
    assert with_pass_tokens(whole, plan(whole, LOCALES), sizes, 20 << 30).pass_tokens > 1024
