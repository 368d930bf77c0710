"""The ops of kloss. `reference` has each under the same name and signature in plain torch."""

from functools import wraps

import torch

from . import multi_lora_cpu, reference
from .buckets import Buckets, make_buckets
from .dropout import Dropout, row_keys
from .reference import adapter_adamw_, adapter_linear, add_norm, gelu, packed_attention, span_counts, token_loss
from .segments import Segments, make_segments

__all__ = [
    "Buckets",
    "Dropout",
    "Segments",
    "adapter_adamw_",
    "adapter_linear",
    "add_norm",
    "gelu",
    "lora_linear",
    "make_buckets",
    "make_segments",
    "multi_lora_linear",
    "packed_attention",
    "reference",
    "row_keys",
    "span_counts",
    "token_loss",
]


def _home(x, weight, slices=1):
    """The module whose multi-adapter linear runs: Triton's on a GPU, imported then; on a CPU csrc's, or plain torch."""
    if x.device.type != "cpu":
        from . import multi_lora

        return multi_lora
    return multi_lora_cpu if multi_lora_cpu.fits(x, weight, slices) else reference


@wraps(reference.multi_lora_linear)
def multi_lora_linear(x, weight, bias, *args, **keywords):
    x, weight, bias = reference.lower(x, weight, bias)
    return _home(x, weight, keywords.get("slices", 1)).multi_lora_linear(x, weight, bias, *args, **keywords)


@wraps(reference.lora_linear)
def lora_linear(x, weight, bias, lora_a, lora_b, scaling, **keywords):
    cu_seqlens = torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0]
    segments = make_segments(cu_seqlens, torch.zeros_like(cu_seqlens[1:]), 1, rows=x.shape[0])
    scaling = scaling.reshape(1) if isinstance(scaling, torch.Tensor) else torch.full((1,), scaling, device=x.device)
    return multi_lora_linear(x, weight, bias, lora_a[None], lora_b[None], scaling, segments, **keywords)
