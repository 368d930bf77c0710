"""Read the weights of a checkpoint in transformers' format: which of its files count, shards. Nothing here unpickles code."""

import os
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_json, read_tensors

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# What a backbone needs of the hub.
PATTERNS = ("config.json", "model*.safetensors*", "pytorch_model*.bin*")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint. The first of `WEIGHTS` that is there counts, as for transformers; others are never read.

    So a broken file is an error though an older one of another kind lies beside it. An index names the file of each tensor; its
    shards lie in the folder, and each tensor is taken from its own shard alone.
    Raises UserError for files that are missing, damaged, outside the folder, or hold anything but tensors.
    """
    there = [file for file in WEIGHTS if os.path.lexists(folder / file)]
    if not there:
        raise UserError(f"{folder} holds neither {WEIGHTS[0]} nor {WEIGHTS[2]}, nor an index of shards")
    path = folder / there[0]
    return _shards(path) if path.suffix == ".json" else read_file(path)


def _shards(index: Path) -> dict[str, Tensor]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise UserError(f"{index}: weight_map must name the file of each tensor, got {str(files)[:80]}")
    state = {}
    for file in sorted(set(files.values())):
        if PurePath(file).is_absolute() or ".." in PurePath(file).parts:
            raise UserError(f"{index} names the shard {file!r}, which lies outside the folder")
        path = index.parent / file
        if not os.path.lexists(path):
            raise UserError(f"{index} names the shard {file!r}, which is missing")
        shard = read_file(path)
        for name in (name for name, of in files.items() if of == file):
            if name not in shard:
                raise UserError(f"{path} has no tensor {name}, though {index.name} names it")
            state[name] = shard[name]
    return state


def read_file(path: Path) -> dict[str, Any]:
    """What one file holds by name, which need not be tensors: safetensors by its suffix, else what torch.save wrote."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # foreign bytes fail in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is damaged, cut short or holds code: {reason}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{path} holds a {type(state).__name__}, a dictionary of tensors by name is needed")
    return state
