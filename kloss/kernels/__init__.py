"""The ops of kloss. `reference` has each under the same name and signature in plain torch."""

from functools import wraps

from . import reference
from .dropout import Dropout, row_keys
from .reference import adapter_adamw_, adapter_linear, add_norm, gelu, packed_attention, span_counts, token_loss
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


def _home(x):
    """The module whose op runs for x: Triton's where x is on a GPU, imported then, and plain torch on a CPU."""
    if x.device.type == "cpu":
        return reference
    from . import multi_lora

    return multi_lora


@wraps(reference.multi_lora_linear)
def multi_lora_linear(x, *args, **keywords):
    return _home(x).multi_lora_linear(x, *args, **keywords)


@wraps(reference.lora_linear)
def lora_linear(x, *args, **keywords):
    return _home(x).lora_linear(x, *args, **keywords)
