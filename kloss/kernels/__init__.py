"""The ops of kloss. `reference` has each under the same name and signature in plain torch."""

from . import reference
from .dropout import Dropout, row_keys
from .reference import (
    adapter_adamw_,
    adapter_linear,
    add_norm,
    gelu,
    lora_linear,
    multi_lora_linear,
    packed_attention,
    span_counts,
    token_loss,
)
from .segments import Segments, make_segments

__all__ = [
    "Dropout",
    "Segments",
    "adapter_adamw_",
    "adapter_linear",
    "add_norm",
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
