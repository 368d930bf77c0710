"""Convert an encoder from and to transformers' names."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..errors import UserError
from .architecture import XLMRConfig

LINEARS = {"out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
NORMS = {"norm_1": "attention.output.LayerNorm", "norm_2": "output.LayerNorm"}
QKV = ("query", "key", "value")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _names(num_layers: int, prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Our parameter names, each with the transformers names whose tensors it holds, concatenated."""
    for x in ("word", "position", "token_type"):
        yield f"{x}_embeddings.weight", (f"{prefix}embeddings.{x}_embeddings.weight",)
    for kind in ("weight", "bias"):
        yield f"embedding_norm.{kind}", (f"{prefix}embeddings.LayerNorm.{kind}",)
        yield f"classifier.{kind}", (f"classifier.{kind}",)
    for i in range(num_layers):
        layer = f"{prefix}encoder.layer.{i}"
        for kind in ("weight", "bias"):
            yield f"layers.{i}.qkv.{kind}", tuple(f"{layer}.attention.self.{x}.{kind}" for x in QKV)
            for ours, theirs in (LINEARS | NORMS).items():
                yield f"layers.{i}.{ours}.{kind}", (f"{layer}.{theirs}.{kind}",)


def _shape(config: XLMRConfig, name: str) -> tuple[int, ...]:
    """The shape of each of transformers' tensors within our parameter `name`, by the configuration; a head has any number."""
    width, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (config.vocab_size, width),
        "position_embeddings.weight": (config.max_position_embeddings, width),
        "token_type_embeddings.weight": (config.type_vocab_size, width),
        "qkv.weight": (width, width),
        "out.weight": (width, width),
        "up.weight": (inner, width),
        "up.bias": (inner,),
        "down.weight": (width, inner),
    }
    return shapes.get(name.split(".", 2)[-1] if name.startswith("layers.") else name, (width,))


def _check(tensor: object, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """The tensor. Raises UserError, with its name, for one that is not `shape` numbers, finite in `dtype`."""
    if not isinstance(tensor, Tensor):
        raise UserError(f"{name} is a {type(tensor).__name__}, a tensor is needed")
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, config.json says {shape}")
    if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = f"{tensor.dtype}, {tensor.layout}, on {tensor.device}".replace("torch.", "")
        raise UserError(f"{name} has {kind}; weights must be float32, float16, bfloat16 or float64, and dense")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise UserError(f"{name} has fewer numbers than its shape {shape} says")
    if not torch.stack(tensor.aminmax()).to(torch.float32).to(dtype).isfinite().all():
        raise UserError(f"{name} has NaN or infinite values in {str(dtype).removeprefix('torch.')}")
    return tensor


def from_transformers(state: Mapping[str, object], config: XLMRConfig, dtype: torch.dtype, source: str) -> dict[str, Tensor]:
    """Our state dict from transformers', without a head if the checkpoint has none for tokens.

    state: with or without the prefix of `config`, with or without a head; what else it holds (pooler, output layer of a language
    model, buffers) is left aside.
    dtype: in which the weights must be finite.
    source: the checkpoint's name, for messages.
    Raises UserError naming the first tensor that is missing, has another shape than `config` says, or is no finite floats; and
    for a layer beyond those that `config` counts. No size of `config` is allocated.
    """
    prefix = config.prefix
    if not any(name.startswith(prefix) for name in state):
        state = {name if name.startswith("classifier.") else prefix + name: t for name, t in state.items()}
    # Checkpoints of the first years of BERT call a LayerNorm's weight and bias gamma and beta.
    state = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): tensor for name, tensor in state.items()}
    ours = {}
    for name, theirs in _names(config.num_hidden_layers, prefix):
        if name.startswith("classifier."):
            continue
        parts = []
        for their_name in theirs:
            if their_name not in state:
                raise UserError(f"{source} has no tensor {their_name}; is it a {config.model_type} checkpoint?")
            parts.append(_check(state[their_name], _shape(config, name), dtype, f"{source}: {their_name}"))
        ours[name] = torch.cat(parts) if len(parts) > 1 else parts[0]
    further = f"{prefix}encoder.layer.{config.num_hidden_layers}."
    if any(name.startswith(further) for name in state):
        raise UserError(f"{source} holds more than the {config.num_hidden_layers} layers that config.json says")
    return ours | _head(state, config, dtype, source)


def _head(state: Mapping[str, object], config: XLMRConfig, dtype: torch.dtype, source: str) -> dict[str, Tensor]:
    """Weight [labels, H] and bias [labels] of a tagging head; nothing if there is no weight of that name."""
    weight = state.get("classifier.weight")
    if weight is None:
        return {}
    labels = max(1, len(weight)) if isinstance(weight, Tensor) and weight.dim() else 1
    head = {}
    for kind, shape in (("weight", (labels, config.hidden_size)), ("bias", (labels,))):
        name = f"classifier.{kind}"
        head[name] = _check(state.get(name), shape, dtype, f"{source}: {name}")
    return head


def to_transformers(state: Mapping[str, Tensor], num_layers: int, prefix: str = "roberta.") -> dict[str, Tensor]:
    """Our state dict under the names of transformers' class with a tagging head. prefix: `XLMRConfig.prefix`."""
    converted = {}
    for name, theirs in _names(num_layers, prefix):
        for their_name, tensor in zip(theirs, state[name].chunk(len(theirs)), strict=True):
            converted[their_name] = tensor.detach().cpu().clone()
    return converted
