"""The operators over the Triton kernels of everything but the multi-adapter linear: their schemas, shapes and gradients.

Arguments are those of the kernels' modules. `dropout` holds the three tensors of `RowDropout`, or nothing. The kernels are
imported with the first call, for Triton need not be there.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.library import custom_op

from .buckets import AttentionTiles
from .dropout import Dropout, RowDropout, row_tensors
from .segments import Segments, Work, with_work


def serves(x: Tensor) -> bool:
    """Whether the Triton kernels compute what x is an input of: on a GPU all but fp64."""
    return x.device.type == "cuda" and x.dtype != torch.float64


def _run(op: str, function: str, x: Tensor, *rest: Any) -> Any:
    """Call a function of an op's kernels on x's device: Triton launches on the current one."""
    with torch.cuda.device_of(x):
        return getattr(import_module(f".{op}_triton", __package__), function)(x, *rest)


def _rows(dropout: Sequence[Tensor]) -> RowDropout | None:
    return RowDropout(*dropout) if dropout else None


def _lists(dropout: Dropout | None) -> list[Tensor]:
    """What the kernels read of a site's dropout."""
    return [] if dropout is None else row_tensors(dropout)


def _with_rows(x: Tensor) -> Tensor:
    """The tensor with contiguous rows, as the kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


# Attention. tiles: the fields of AttentionTiles in one list.


def _tiles(tiles: Sequence[Tensor]) -> AttentionTiles:
    return AttentionTiles(tuple(tiles[:-2]), *tiles[-2:])


@custom_op("kloss::attention", mutates_args=())
def _attention(qkv: Tensor, heads: int, tiles: Sequence[Tensor], dropout: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return _run("attention", "forward", _with_rows(qkv), heads, _tiles(tiles), _rows(dropout))


@_attention.register_fake
def _(qkv: Tensor, heads: int, tiles: Sequence[Tensor], dropout: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    T, H = qkv.shape[0], qkv.shape[1] // 3
    return qkv.new_empty(T, H), qkv.new_empty(heads, T if tiles[-2].shape[0] else 0, dtype=torch.float32)


@custom_op("kloss::attention_backward", mutates_args=())
def _attention_backward(
    dout: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, tiles: Sequence[Tensor], dropout: Sequence[Tensor]
) -> Tensor:
    return _run("attention", "backward", _with_rows(dout), _with_rows(qkv), out, lse, heads, _tiles(tiles), _rows(dropout))


@_attention_backward.register_fake
def _(dout: Tensor, qkv: Tensor, *rest: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _save_attention(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.heads, tiles, dropout = inputs
    ctx.tiles = len(tiles)
    ctx.save_for_backward(qkv, *output, *tiles, *dropout)
    ctx.set_materialize_grads(False)


def _attention_gradient(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, None, list, list]:
    qkv, out, lse, *lists = ctx.saved_tensors
    tiles, dropout = lists[: ctx.tiles], lists[ctx.tiles :]
    dqkv = None if dout is None else _attention_backward(dout, qkv, out, lse, ctx.heads, tiles, dropout)
    return dqkv, None, [None] * len(tiles), [None] * len(dropout)


_attention.register_autograd(_attention_gradient, setup_context=_save_attention)


def attention(qkv: Tensor, heads: int, tiles: AttentionTiles, dropout: Dropout | None) -> Tensor:
    """`packed_attention`."""
    return _attention(qkv, heads, [*tiles.short, tiles.longer, tiles.cu_seqlens], _lists(dropout))[0]


# Dropout, residual and LayerNorm.


@custom_op("kloss::add_norm", mutates_args=())
def _add_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    return _run(
        "add_norm", "forward", _with_rows(x), _with_rows(residual), weight.contiguous(), bias.contiguous(), eps, _rows(dropout)
    )


@_add_norm.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@custom_op("kloss::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dy: Tensor,
    more_dy: Tensor | None,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout: Sequence[Tensor],
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dy, x, residual = (_with_rows(tensor) for tensor in (dy, x, residual))
    more_dy = None if more_dy is None else _with_rows(more_dy)
    return _run("add_norm", "backward", dy, more_dy, x, residual, weight.contiguous(), mean, rstd, _rows(dropout), need_weight)


@_add_norm_backward.register_fake
def _(dy: Tensor, more_dy: Tensor | None, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dropout = rest[-2]
    dweight = x.new_empty(x.shape[1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape if dropout else 0), dweight, torch.empty_like(dweight)


def _save_add_norm(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, _, dropout = inputs
    ctx.save_for_backward(x, residual, weight, *output[1:], *dropout)
    ctx.bias_dtype = bias.dtype
    ctx.set_materialize_grads(False)


def _add_norm_gradient(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | list | None, ...]:
    return *_add_norm_gradients(ctx, [dy]), None, [None] * (len(ctx.saved_tensors) - 5)


def _add_norm_gradients(ctx: Any, of_y: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Those of x, residual, weight and bias, given those of one or two uses of y."""
    x, residual, weight, mean, rstd, *dropout = ctx.saved_tensors
    given = [dy for dy in of_y if dy is not None]
    if not given:
        return (None,) * 4
    need_weight, both = ctx.needs_input_grad[2] or ctx.needs_input_grad[3], (*given, None)[:2]
    dx, dresidual, dweight, dbias = _add_norm_backward(*both, x, residual, weight, mean, rstd, dropout, need_weight)
    dweight, dbias = (dweight.to(weight.dtype), dbias.to(ctx.bias_dtype)) if need_weight else (None, None)
    return dx, dresidual if dropout else dx, dweight, dbias


_add_norm.register_autograd(_add_norm_gradient, setup_context=_save_add_norm)


class _AddNormTwice(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, *dropout: Tensor) -> tuple:
        output = _add_norm(x, residual, weight, bias, eps, dropout)
        _save_add_norm(ctx, (x, residual, weight, bias, eps, dropout), output)
        return output[0], output[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *of_y: Tensor | None) -> tuple[Tensor | None, ...]:
        return *_add_norm_gradients(ctx, of_y), *(None,) * (len(ctx.saved_tensors) - 4)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: Dropout | None) -> Tensor:
    """`add_norm`."""
    return _add_norm(x, residual, weight, bias, eps, _lists(dropout))[0]


def add_norm_twice(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dropout: Dropout | None
) -> tuple[Tensor, Tensor]:
    """`add_norm_twice`."""
    return _AddNormTwice.apply(x, residual, weight, bias, eps, *_lists(dropout))


@custom_op("kloss::dropout", mutates_args=())
def _dropout(x: Tensor, keys: Tensor, threshold: Tensor, scale: Tensor) -> Tensor:
    return _run("add_norm", "dropout", _with_rows(x), RowDropout(keys, threshold, scale))


@_dropout.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape)


def _save_dropout(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


_dropout.register_autograd(lambda ctx, dy: (_dropout(dy, *ctx.saved_tensors), None, None, None), setup_context=_save_dropout)


def dropout(x: Tensor, rows: RowDropout) -> Tensor:
    """`apply_dropout`."""
    return _dropout(x, *(tensor.contiguous() for tensor in rows))


# Embeddings, LayerNorm and dropout. first: the position table's row of a sequence's first token.


@custom_op("kloss::embed", mutates_args=())
def _embed(
    input_ids: Tensor, position: Tensor, words: Tensor, positions: Tensor, token_type: Tensor, weight: Tensor, bias: Tensor,
    eps: float, first: int, dropout: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (tensor.contiguous() for tensor in (input_ids, position, words, positions, token_type, weight, bias))
    return _run("embed", "forward", *tensors, eps, first, _rows(dropout))


@_embed.register_fake
def _(input_ids: Tensor, position: Tensor, words: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    statistics = words.new_empty(input_ids.shape[0], dtype=torch.float32)
    return words.new_empty(input_ids.shape[0], words.shape[1]), statistics, torch.empty_like(statistics)


@custom_op("kloss::embed_backward", mutates_args=())
def _embed_backward(
    dy: Tensor, input_ids: Tensor, position: Tensor, words: Tensor, positions: Tensor, token_type: Tensor, weight: Tensor,
    mean: Tensor, rstd: Tensor, first: int, dropout: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (tensor.contiguous() for tensor in (input_ids, position, words, positions, token_type, weight))
    return _run("embed", "backward", _with_rows(dy), *tensors, mean, rstd, first, _rows(dropout))


@_embed_backward.register_fake
def _(dy: Tensor, input_ids: Tensor, position: Tensor, words: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    dweight = words.new_empty(words.shape[1], dtype=torch.float32)
    return words.new_empty(dy.shape), dweight, torch.empty_like(dweight)


def _save_embed(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, bias, _, ctx.first, dropout = inputs
    ctx.save_for_backward(*tensors, *output[1:], *dropout)
    ctx.bias_dtype = bias.dtype
    ctx.set_materialize_grads(False)


def _embed_gradient(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | list | None, ...]:
    (*tensors, mean, rstd), dropout = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
    nothing = None, None, [None] * len(dropout)
    if dy is None:
        return *(None,) * 7, *nothing
    input_ids, position, words, positions, _, weight = tensors
    de, dweight, dbias = _embed_backward(dy, *tensors, mean, rstd, ctx.first, dropout)
    rows, need = (position + ctx.first).clamp(max=len(positions) - 1), ctx.needs_input_grad
    d_words = torch.ops.aten.embedding_dense_backward(de, input_ids, len(words), -1, False) if need[2] else None
    d_positions = torch.ops.aten.embedding_dense_backward(de, rows, len(positions), -1, False) if need[3] else None
    d_type = de.sum(0) if need[4] else None
    return None, None, d_words, d_positions, d_type, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), *nothing


_embed.register_autograd(_embed_gradient, setup_context=_save_embed)


def embed(*tensors: Tensor, eps: float, first: int, dropout: Dropout | None) -> Tensor:
    """`embed`. tensors: its tensors, in their order."""
    return _embed(*tensors, eps, first, _lists(dropout))[0]


# A linear layer per adapter. lists: order, ends, row_adapter and the fields of Work.


def _segment_lists(segments: Segments) -> list[Tensor]:
    segments = with_work(segments)
    assert segments.work is not None
    return [segments.order, segments.ends, segments.row_adapter, *segments.work]


@custom_op("kloss::adapter_linear", mutates_args=())
def _adapter_linear(x: Tensor, weight: Tensor, bias: Tensor, lists: Sequence[Tensor]) -> Tensor:
    return _run("adapter_linear", "forward", _with_rows(x), weight, bias.contiguous(), lists[0], Work(*lists[3:]))


@_adapter_linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, lists: Sequence[Tensor]) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@custom_op("kloss::adapter_linear_backward", mutates_args=())
def _adapter_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, lists: Sequence[Tensor], need_x: bool, need_w: bool, need_b: bool
) -> tuple[Tensor, Tensor, Tensor]:
    order, ends, _, *work = lists
    return _run(
        "adapter_linear", "backward", dy.contiguous(), _with_rows(x), weight, order, ends, Work(*work), need_x, need_w, need_b
    )


@_adapter_linear_backward.register_fake
def _(
    dy: Tensor, x: Tensor, weight: Tensor, lists: Sequence[Tensor], need_x: bool, need_w: bool, need_b: bool
) -> tuple[Tensor, ...]:
    shapes = (x.shape if need_x else (0,)), (weight.shape if need_w else (0,)), (weight.shape[:2] if need_b else (0,))
    return tuple(tensor.new_empty(shape) for tensor, shape in zip((x, weight, weight), shapes, strict=True))


def _save_adapter_linear(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, bias, lists = inputs
    ctx.save_for_backward(x, weight, *lists)
    ctx.bias_dtype = bias.dtype


def _adapter_linear_gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | list | None, ...]:
    x, weight, *lists = ctx.saved_tensors
    needed = ctx.needs_input_grad[:3]
    gradients = _adapter_linear_backward(dy, x, weight, lists, *needed)
    dx, dw, db = (gradient if need else None for gradient, need in zip(gradients, needed, strict=True))
    return dx, dw, None if db is None else db.to(ctx.bias_dtype), [None] * len(lists)


_adapter_linear.register_autograd(_adapter_linear_gradient, setup_context=_save_adapter_linear)


def adapter_linear(x: Tensor, weight: Tensor, bias: Tensor, segments: Segments) -> Tensor:
    """`adapter_linear`."""
    return _adapter_linear(x, weight, bias, _segment_lists(segments))


# The mean loss of each adapter's labelled rows.


@custom_op("kloss::token_loss", mutates_args=())
def _token_loss(
    logits: Tensor, labels: Tensor, order: Tensor, ends: Tensor, row_adapter: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _run("token_loss", "forward", _with_rows(logits), labels.contiguous(), order, ends)


@_token_loss.register_fake
def _(logits: Tensor, labels: Tensor, order: Tensor, ends: Tensor, row_adapter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    G = ends.shape[0] - 1
    per_row = logits.new_empty(logits.shape[0], dtype=torch.float32)
    return per_row.new_empty(G), per_row.new_empty(G, dtype=torch.int64), per_row


@custom_op("kloss::token_loss_backward", mutates_args=())
def _token_loss_backward(
    dloss: Tensor, logits: Tensor, labels: Tensor, row_adapter: Tensor, count: Tensor, lse: Tensor
) -> Tensor:
    logits, labels = _with_rows(logits), labels.contiguous()
    return _run("token_loss", "backward", dloss.contiguous(), logits, labels, row_adapter, count, lse)


@_token_loss_backward.register_fake
def _(dloss: Tensor, logits: Tensor, *rest: Any) -> Tensor:
    return logits.new_empty(logits.shape)


def _save_token_loss(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    logits, labels, _, _, row_adapter = inputs
    ctx.save_for_backward(logits, labels, row_adapter, *output[1:])
    ctx.set_materialize_grads(False)


def _token_loss_gradient(ctx: Any, dloss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    return None if dloss is None else _token_loss_backward(dloss, *ctx.saved_tensors), None, None, None, None


_token_loss.register_autograd(_token_loss_gradient, setup_context=_save_token_loss)


def token_loss(logits: Tensor, labels: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """`token_loss`."""
    return _token_loss(logits, labels, segments.order, segments.ends, segments.row_adapter)[:2]
