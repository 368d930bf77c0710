"""The ops of kloss. `reference` has each under the same name and signature, as its specification."""

from . import reference
from .adamw import adapter_adamw_
from .buckets import Buckets, make_buckets
from .dropout import Dropout, StepDropout, apply_dropout, row_keys
from .eager import adapter_linear, add_norm, gelu, packed_attention, span_counts, token_loss
from .multi_lora import lora_linear, multi_lora_linear
from .segments import Segments, make_segments

__all__ = [
    "Buckets",
    "Dropout",
    "Segments",
    "StepDropout",
    "adapter_adamw_",
    "adapter_linear",
    "add_norm",
    "apply_dropout",
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
