"""The embeddings of packed tokens: words, positions and the type, normed and dropped out. Arguments, dispatch, plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_ops
from .checks import FLOATS, check, check_dim, check_ids, readable
from .dropout import Dropout, check_row_keys
from .eager import apply_dropout


def embed(
    input_ids: Tensor,
    position: Tensor,
    words: Tensor,
    positions: Tensor,
    token_type: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    first_position: int = 0,
    dropout: Dropout | None = None,
) -> Tensor:
    """drop(LayerNorm(words[id] + positions[first_position + position] + token_type)) of every token.

    input_ids: int64 or int32 [T].
    position: int64 or int32 [T], within the token's sequence; one behind the table's end gets its last row.
    words: [V, H]. positions: [P, H]. token_type: [H]. All of one dtype.
    weight, bias: [H], of the tables' dtype or fp32.
    first_position: the row of `positions` that a sequence's first token has.
    Returns [T, H] in the tables' dtype, differentiable in the five tables and weights.
    Raises ValueError for tensors that do not fit each other, on a CPU also for ids or positions out of range. On a GPU an
    assertion stops the device.
    """
    check_dim("words", words, "V, H")
    check_dim("positions", positions, "P, H")
    (_, H), (P, _) = words.shape, positions.shape
    check("words", words, tuple(words.shape), FLOATS, input_ids.device)
    check("positions", positions, (P, H), (words.dtype,), words.device)
    check("token_type", token_type, (H,), (words.dtype,), words.device)
    single = () if words.dtype == torch.float64 else (torch.float32,)
    check("weight", weight, (H,), tuple(dict.fromkeys((words.dtype, *single))), words.device)
    check("bias", bias, (H,), (weight.dtype,), words.device)
    for name, tensor in (("input_ids", input_ids), ("position", position)):
        check(name, tensor, (input_ids.numel(),), (torch.int64, torch.int32), words.device)
    if not 0 <= first_position < P:
        raise ValueError(f"first_position must be one of the {P} rows of positions, got {first_position}")
    if readable(input_ids):
        check_ids("input_ids", input_ids, 0, len(words))
        check_ids("position", position, 0, 1 << 31)
    if triton_ops.serves(words):
        if dropout is not None:
            check_row_keys(dropout, input_ids[:, None])
        tables = words, positions, token_type
        return triton_ops.embed(input_ids, position, *tables, weight, bias, eps=eps, first=first_position, dropout=dropout)
    embedded = F.embedding(input_ids, words) + token_type
    embedded = embedded + F.embedding(position.clamp(max=P - 1 - first_position) + first_position, positions)
    return apply_dropout(F.layer_norm(embedded, (H,), weight, bias, eps), dropout)
