"""Adapters of a model after `kloss.attach` come and go, all outside `use_adapters`; an adapter is its row or its name.

    kloss.adapters.add(model, "fr")             kloss.adapters.save(model, "adapters")   # a folder for each, as peft's
    kloss.adapters.fork(model, "fr", "fr-CA")   kloss.adapters.load(model, "adapters")
    kloss.adapters.remove(model, "fr")          plain = kloss.adapters.detach(model, "fr-CA")

What stays is left to the bit: weights, gradients, and moments, steps and parameter groups of an `AdapterAdamW`, which follows.
Another optimiser, a scheduler or a wrapper for several processes has to be made anew where the number of adapters changes.
"""

import os
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from .errors import UserError
from .files import NAME_BYTES, user_path
from .models.attach import adapted_layers, read_peft, save_peft, whole_layers
from .models.blocks import RepeatedRows, Shared
from .models.peft_files import CONFIG
from .models.settings import ALPHA, DROPOUT, one_each

Adapter = int | str


def add(model: nn.Module, name: str, *, rank: int | None = None, alpha: float | None = None, dropout: float = 0.0) -> int:
    """Add an adapter, as `attach` makes them. Returns its row, the last.

    rank: at most the largest of the model, R, which is meant by None.
    alpha, dropout: as in `attach`.
    Raises UserError for a name that there is, and for numbers out of range.
    """
    shared = _changing(model)
    _check_new(shared, name)
    fits = f"a whole number in 1..{shared.rank}", lambda rank: isinstance(rank, Integral) and 1 <= int(rank) <= shared.rank
    (rank,) = one_each("rank", shared.rank if rank is None else rank, 1, *fits)
    (alpha,) = one_each("alpha", rank if alpha is None else alpha, 1, *ALPHA)
    (chance,) = one_each("dropout", dropout, 1, *DROPOUT)
    g = len(shared.names)
    _take(model, [*range(g), 0])
    shared.ranks[g], shared.alphas[g], shared.scaling[g], shared.chances[g] = rank, alpha, alpha / rank, chance
    shared.born(g, name)
    reset(model, g)
    return g


def fork(model: nn.Module, adapter: Adapter, name: str) -> int:
    """Add a copy of an adapter, with its optimiser's state but a dropout of its own. Returns its row, the last.

    Raises UserError for an adapter that there is not, and for a name that there is.
    """
    shared = _changing(model)
    source = shared.index(adapter)
    _check_new(shared, name)
    g = len(shared.names)
    _take(model, [*range(g), source])
    shared.born(g, name, shared.births[source])
    _drop_gradients(model, g)
    return g


def remove(model: nn.Module, adapter: Adapter) -> None:
    """Remove an adapter; the rows behind it move up. Raises UserError for one that there is not, and for the last."""
    shared = _changing(model)
    g = shared.index(adapter)
    if len(shared.names) == 1:
        raise UserError(f"the last adapter, {shared.names[0]}, cannot be removed; detach takes all off")
    _take(model, [row for row in range(len(shared.names)) if row != g])


def rename(model: nn.Module, adapter: Adapter, name: str) -> None:
    """Give an adapter another name. Raises UserError for an adapter that there is not, and for a name that there is."""
    shared = _changing(model)
    g = shared.index(adapter)
    _check_new(shared, name)
    shared.names[g] = name


@torch.no_grad()
def reset(model: nn.Module, adapter: Adapter) -> None:
    """Make an adapter what it was when it was made: A drawn from its seed, B zero, no gradients, nothing that an optimiser knows.

    Its rank, scaling and dropout stay. Raises UserError for an adapter that there is not.
    """
    shared = _changing(model)
    g = shared.index(adapter)
    for layer in adapted_layers(model):
        layer.lora_a[g] = layer.drawn([g])[0]
        layer.lora_b[g] = 0
    shared.begin_anew(g)
    _drop_gradients(model, g)


def save(model: nn.Module, folder: str | Path) -> None:
    """Write each adapter as peft does, into a folder of its name within `folder`, where folders of other names stay.

    Raises UserError, with nothing written, for a name that no folder can have.
    """
    names = adapted_layers(model)[0].shared.names
    for name in names:
        if name in (".", "..") or {"/", os.sep, "\0"} & {*name} or len(os.fsencode(name)) > NAME_BYTES:
            raise UserError(f"the adapter {name!r:.60} cannot be the name of a folder: rename it first")
    for g, name in enumerate(names):
        save_peft(model, user_path(folder) / name, g)


def load(model: nn.Module, folder: str | Path, *, head: Literal["error", "ignore"] = "error") -> list[str]:
    """Overwrite adapters by those that `save` or peft wrote, each from the folder of its name within `folder`.

    Adapters without a folder stay as they are. Returns the names of those that were loaded.
    head: as in `load_peft`.
    Raises UserError for a folder without adapters, an adapter of another name, and as `load_peft`. Then nothing has changed.
    """
    shared, root = _changing(model), user_path(folder)
    if not root.is_dir():
        raise UserError(f"{root} does not exist, or is no folder")
    folders = sorted(path.parent for path in root.glob(f"*/{CONFIG}"))
    if not folders:
        raise UserError(f"{root} holds no folder of an adapter, with {CONFIG} in it")
    for path in folders:
        if path.name not in shared.names:
            raise UserError(f"{path}: the model has no adapter of that name; there are {', '.join(shared.names)}")
    for write in [read_peft(model, path, path.name, head=head) for path in folders]:
        write()
    return [path.name for path in folders]


@torch.no_grad()
def detach(model: nn.Module, adapter: Adapter | None = None) -> nn.Module:
    """Take all adapters off, in place: the layers are what they were, nn.Linear as a rule.

    adapter: the one that is merged into the weights, W + scaling B A; None: none, and the weights are those of before.
    Returns the model. Its parameters still require no gradients. A weight that was tied and changes is tied no more.
    Raises UserError for an adapter that there is not.
    """
    shared = _changing(model)
    g = None if adapter is None else shared.index(adapter)
    linears = {layer: layer.as_before(g) for layer in whole_layers(model, "weight")}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in linears:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, linears[module])
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                owner = getattr(hook, "__self__", None)
                if isinstance(owner, RepeatedRows) and owner.blocks is shared.blocks:
                    del hooks[key]
    return model


def _changing(model: nn.Module) -> Shared:
    """The settings of a model's adapters, which are about to change. Raises UserError inside `use_adapters`, and if sharded."""
    shared = whole_layers(model)[0].shared
    shared.outside()
    return shared


def _check_new(shared: Shared, name: str) -> None:
    if not isinstance(name, str) or not name:
        raise UserError(f"the name must be text that is not empty, got {name!r}")
    if name in shared.names:
        raise UserError(f"there is an adapter {name} already")


@torch.no_grad()
def _take(model: nn.Module, rows: Sequence[int]) -> None:
    """Adapter j becomes what rows[j] was, in all layers and settings."""
    for layer in adapted_layers(model):
        for factor in (layer.lora_a, layer.lora_b):
            grad, factor.grad, taken = factor.grad, None, factor.data[rows]
            # A graph of before keeps what adds gradients of the old shape, until a change of dtype makes torch drop that.
            factor.data = taken.new_empty(0, dtype=torch.float16)
            factor.data = taken
            factor.grad = None if grad is None else grad[rows]
    shared = adapted_layers(model)[0].shared
    shared.take(rows)
    shared.blocks.forget()


def _drop_gradients(model: nn.Module, g: int) -> None:
    for layer in adapted_layers(model):
        for factor in (layer.lora_a, layer.lora_b):
            if factor.grad is not None:
                factor.grad[g] = 0
