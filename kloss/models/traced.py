"""What a graph of torch.compile holds of `use_adapters`: an operator that looks up a layer's batch when the graph runs.

So one graph serves all ids, blocks, tasks and threads. It is compiled for shapes, whether adapters drop, and whether their ranks
differ. Where a checkpoint runs the operator again in backward, it gets the batch of the forward pass, as without a compiler.
"""

import math
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import Dropout, Segments
from ..kernels.dropout import RowDropout, row_dropout
from ..kernels.segments import CHUNK, LONG_TILE, SHORT_TILE, Work, tile_capacity
from .blocks import Arguments

FIXED = (
    "{} would fix whose adapter each row gets: call it outside use_adapters for the base model, or on what "
    "kloss.adapters.detach(model, adapter) returns, which has one adapter merged"
)
_layers: WeakValueDictionary[int, Any] = WeakValueDictionary()
_numbers = count()


def key_of(layer: nn.Module) -> Tensor:
    """A new key by which graphs find the layer: int64 [], on the CPU. With a number each layer would need a graph of its own."""
    number = next(_numbers)
    _layers[number] = layer
    return torch.tensor(number, device="cpu")


def rows_of(x: Tensor) -> tuple[int, int]:
    """Sequences of an input [B, ..., K], and rows of each."""
    shape = x.shape
    if len(shape) == 3:
        return shape[0], shape[1]
    return (1, 1) if len(shape) < 2 else (shape[0], math.prod(shape[1:-1]))


def traced_arguments(x: Tensor, layer: Any) -> Arguments | None:
    """What `layer.arguments` gives, in a graph that is being compiled. Raises UserError in one to be exported, inside a block.

    layer: a MultiAdapterLinear, which knows this module.
    """
    blocks, adapters, training = layer.shared.blocks, layer.lora_a.shape[0], layer.training
    exports = torch.compiler._is_exporting_flag  # torch 2.11 takes `is_exporting()` for True wherever it compiles
    if not blocks.used or exports and not blocks.open:
        return None
    if exports:
        raise UserError(FIXED.format("torch.export"))
    drops, mixed_ranks = training and blocks.drops, blocks.mixed_ranks
    tensors = iter(torch.ops.kloss.layer_batch(x.detach(), layer.key, adapters, training, drops, mixed_ranks))
    cu_seqlens, adapter, row_adapter, order, ends, scaling = (next(tensors) for _ in range(6))
    work = None if x.device.type == "cpu" else Work(*(next(tensors) for _ in Work._fields))
    ranks = next(tensors) if mixed_ranks else None
    dropout = None
    if drops:
        p, seed, row_key = (next(tensors) for _ in range(3))
        # On a CPU the rows hold what the site decides.
        rest = (0, None, RowDropout(*tensors)) if x.device.type == "cpu" else (layer.site,)
        dropout = Dropout(p, seed, row_key, *rest)
    return Arguments(Segments(cu_seqlens, adapter, adapters, row_adapter, order, None, None, ends, work), scaling, ranks, dropout)


def _layer_batch(x: Tensor, key: Tensor, adapters: int, training: bool, drops: bool, mixed_ranks: bool) -> list[Tensor]:
    """The tensors of a layer's arguments. Copies, for a graph may write over what it has read."""
    layer = _layers[int(key)]
    given = layer.arguments(x, training)
    if given is None:  # no block, or none of this task or thread
        given = layer.shared.blocks.base(layer.shared).arguments(*rows_of(x), x.device, training)
    segments, scaling, ranks, dropout, _ = given
    tensors = [*segments[:2], *segments[3:5], segments.ends, scaling]
    tensors += segments.work or ()
    tensors += [ranks] if mixed_ranks else []
    if drops:
        tensors += dropout[:3]
        if x.device.type == "cpu":
            tensors += row_dropout(dropout, segments.row_adapter)
    return [tensor.clone() for tensor in tensors]


def _empty(x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=dtype)


def _work(x: Tensor, rows: int, adapters: int) -> Work:
    """Empty lists as `with_work` makes them."""
    short, long = (_empty(x, torch.int32, tile_capacity(rows, adapters, tile), 3) for tile in (SHORT_TILE, LONG_TILE))
    return Work(short, long, _empty(x, torch.int32, adapters + rows // CHUNK, 4), _empty(x, torch.int32, adapters + 1))


def _fake(x: Tensor, key: Tensor, adapters: int, training: bool, drops: bool, mixed_ranks: bool) -> list[Tensor]:
    sequences, length = rows_of(x)
    rows = sequences * length
    tensors = [_empty(x, torch.int32, sequences + 1), _empty(x, torch.int32, sequences), _empty(x, torch.int32, rows)]
    tensors += _empty(x, torch.int64, rows), _empty(x, torch.int64, adapters + 1), _empty(x, torch.float32, adapters)
    if x.device.type != "cpu":
        tensors += _work(x, rows, adapters)
    if mixed_ranks:
        tensors.append(_empty(x, torch.int64, adapters))
    if drops:
        tensors += _empty(x, torch.float32, adapters), _empty(x, torch.int64, adapters), _empty(x, torch.int64, rows)
        if x.device.type == "cpu":
            tensors += _empty(x, torch.int64, rows), _empty(x, torch.int16, rows), _empty(x, torch.float32, rows)
    return tensors


_library = torch.library.Library("kloss", "FRAGMENT")
_library.define(
    "layer_batch(Tensor x, Tensor key, int adapters, bool training, bool drops, bool mixed_ranks) -> Tensor[]",
    tags=torch.Tag.cudagraph_unsafe,  # a graph of CUDA would replay the lists of one batch
)
_library.impl("layer_batch", _layer_batch, "CompositeExplicitAutograd")
torch.library.register_fake("kloss::layer_batch", _fake, lib=_library)
