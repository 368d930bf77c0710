"""What --dry-run says of memory is what a pass keeps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench.whole_step import make_step
from kloss.config import Config
from kloss.estimate import _sizes, kept_per_token
from kloss.kernels.cpu_library import built
from kloss.models import TINY, XLMRForTokenClassification


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
