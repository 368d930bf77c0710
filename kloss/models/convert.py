"""Convert XLM-R from and to transformers' names and files. Nothing here unpickles code."""

from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_tensors

LINEARS = {"out": "attention.output.dense", "up": "intermediate.dense", "down": "output.dense"}
NORMS = {"norm_1": "attention.output.LayerNorm", "norm_2": "output.LayerNorm"}
QKV = ("query", "key", "value")


def find_checkpoint(name: str, files: tuple[str, ...]) -> dict[str, Path]:
    """Paths of a model's files by name, from a local folder or else from the hub. Files that do not exist are left out."""
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise UserError(f"backbone {name} is not a folder")
        folder = _download(name, files)
    return {file: folder / file for file in files if (folder / file).is_file()}


def _download(name: str, files: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except (OSError, ValueError) as error:  # the hub's errors derive from these two
        reason = str(error).splitlines()[0]
        raise UserError(f"backbone {name} is no local folder, and the hub did not give it: {reason}") from error


def read_weights(paths: dict[str, Path], name: str) -> dict[str, Tensor]:
    """The state dict of a checkpoint in transformers' format: model.safetensors, else pytorch_model.bin (tensors only)."""
    if "model.safetensors" in paths:
        return read_tensors(paths["model.safetensors"])
    if "pytorch_model.bin" not in paths:
        raise UserError(f"{name} holds neither model.safetensors nor pytorch_model.bin")
    import pickle

    try:
        return torch.load(paths["pytorch_model.bin"], map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, LookupError, ValueError, TypeError, pickle.UnpicklingError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]  # foreign bytes fail in many ways
        raise UserError(f"{paths['pytorch_model.bin']} is damaged, cut short or holds code: {reason}") from error


def _names(num_layers: int) -> dict[str, tuple[str, ...]]:
    """Our parameter name -> the transformers names whose tensors it holds, concatenated."""
    table: dict[str, tuple[str, ...]] = {}
    for x in ("word", "position", "token_type"):
        table[f"{x}_embeddings.weight"] = (f"roberta.embeddings.{x}_embeddings.weight",)
    for kind in ("weight", "bias"):
        table[f"embedding_norm.{kind}"] = (f"roberta.embeddings.LayerNorm.{kind}",)
        table[f"classifier.{kind}"] = (f"classifier.{kind}",)
        for i in range(num_layers):
            layer = f"roberta.encoder.layer.{i}"
            table[f"layers.{i}.qkv.{kind}"] = tuple(f"{layer}.attention.self.{x}.{kind}" for x in QKV)
            for ours, theirs in (LINEARS | NORMS).items():
                table[f"layers.{i}.{ours}.{kind}"] = (f"{layer}.{theirs}.{kind}",)
    return table


def from_transformers(state: dict[str, Tensor], num_layers: int, source: str) -> dict[str, Tensor]:
    """Our state dict from transformers'.

    state: with or without the prefix `roberta.`, with or without a head.
    source: the checkpoint's name, for messages.
    Raises UserError naming the first tensor that is missing.
    """
    if not any(name.startswith("roberta.") for name in state):
        state = {name if name.startswith("classifier.") else f"roberta.{name}": t for name, t in state.items()}
    # Checkpoints of the first years of BERT call a LayerNorm's weight and bias gamma and beta.
    state = {name.replace(".gamma", ".weight").replace(".beta", ".bias"): tensor for name, tensor in state.items()}
    ours = {}
    for name, theirs in _names(num_layers).items():
        missing = [x for x in theirs if x not in state]
        if missing and name.startswith("classifier."):
            continue
        if missing:
            raise UserError(f"{source} has no tensor {missing[0]}; is it an XLM-R checkpoint?")
        ours[name] = torch.cat([state[x] for x in theirs]) if len(theirs) > 1 else state[theirs[0]]
    return ours


def to_transformers(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Our state dict under the names of transformers' XLMRobertaForTokenClassification."""
    converted = {}
    for name, theirs in _names(num_layers).items():
        for their_name, tensor in zip(theirs, state[name].chunk(len(theirs)), strict=True):
            converted[their_name] = tensor.detach().cpu().clone()
    return converted
