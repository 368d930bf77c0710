"""The ops of kloss. `reference` has each under the same name and signature, as its specification."""

from . import reference
from .adamw import adapter_adamw_
from .buckets import AttentionTiles, Buckets, Offsets
from .dropout import Dropout, StepDropout, row_keys
from .eager import (
    adapter_linear,
    add_norm,
    add_norm_twice,
    apply_dropout,
    attention_lists,
    gelu,
    packed_attention,
    span_counts,
    token_loss,
)
from .embed import embed
from .lists import BatchLists, batch_lists
from .multi_lora import lora_linear, multi_lora_linear
from .segments import Segments, make_segments

__all__ = [
    "AttentionTiles",
    "BatchLists",
    "Buckets",
    "Dropout",
    "Offsets",
    "Segments",
    "StepDropout",
    "adapter_adamw_",
    "adapter_linear",
    "add_norm",
    "add_norm_twice",
    "apply_dropout",
    "attention_lists",
    "batch_lists",
    "embed",
    "gelu",
    "lora_linear",
    "make_segments",
    "multi_lora_linear",
    "packed_attention",
    "reference",
    "row_keys",
    "span_counts",
    "token_loss",
]
