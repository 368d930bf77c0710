"""What the kernels of a batch walk, from its offsets and adapters alone: computed once for all layers, read by every one."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import shared_ops
from .buckets import CLASSES, AttentionTiles, Buckets, Offsets
from .dropout import row_keys
from .eager import attention_lists
from .segments import Segments, make_segments
from .tuned import bucket


class BatchLists(NamedTuple):
    """The lists of one batch.

    segments: the rows by adapter.
    position: int [T], each row's within its sequence; those behind the last sequence count from its end.
    attention: the `lists` of `packed_attention`.
    row_key: int64 [T], of `row_keys`; None where nobody drops.
    longest: rows of the longest sequence or more, as the host knows it; None if it does not.
    all_adapted: whether the host knows that every sequence has an adapter.
    """

    segments: Segments
    position: Tensor
    attention: Buckets | AttentionTiles | Offsets
    row_key: Tensor | None = None
    longest: int | None = None
    all_adapted: bool = False


def positions(cu_seqlens: Tensor, rows: int) -> Tensor:
    """`BatchLists.position` of packed sequences. cu_seqlens: int [S+1]. rows: T."""
    row = torch.arange(rows, device=cu_seqlens.device)
    return row - cu_seqlens[torch.searchsorted(cu_seqlens[1:], row.to(cu_seqlens.dtype), right=True)]


def batch_lists(
    cu_seqlens: Tensor,
    adapter: Tensor,
    num_adapters: int,
    rows: int,
    dtype: torch.dtype,
    *,
    step: Tensor | None = None,
    sequence: Tensor | None = None,
    longest: int | None = None,
    most: int | None = None,
    all_adapted: bool = False,
    in_order: bool = False,
) -> BatchLists:
    """All lists of a batch; on a GPU with csrc's library in two launches, and nowhere is anything read back from a GPU.

    cu_seqlens, adapter, num_adapters, rows: as in `make_segments`, int32.
    dtype: of the activations.
    step: int64 [G], each adapter's, and sequence: int64 [S], for `row_keys`; or both None.
    longest, all_adapted: of `BatchLists`.
    most: rows of the adapter with most of them or more, or None. On a GPU a bound spares launches.
    in_order: whether the host knows that rows lie by adapter, ascending, those without one last.
    Raises ValueError as `make_segments` and `row_keys` do.
    """
    device = cu_seqlens.device
    if device.type == "cuda" and dtype != torch.float64 and shared_ops.runs_on(device):
        classes = len(CLASSES[bucket(dtype)])
        made = shared_ops.work_lists(
            cu_seqlens, adapter, num_adapters, rows, step=step, sequence=sequence, classes=classes, longest=longest, most=most
        )
        assert made.longer is not None
        tiles = AttentionTiles(made.short, made.longer, cu_seqlens)
        segments = made.segments._replace(sorted=in_order or None)
        return BatchLists(segments, made.position, tiles, made.row_key, longest, all_adapted)
    segments, keys = make_segments(cu_seqlens, adapter, num_adapters, rows=rows), None
    if step is not None and sequence is not None:
        of_sequence = torch.cat([step, step.new_zeros(1)])[adapter.long()]  # adapter -1 finds the zero
        keys = row_keys(of_sequence, sequence, cu_seqlens, rows=rows)
    attention = attention_lists(cu_seqlens, cu_seqlens.new_empty(rows, 0, dtype=dtype))
    return BatchLists(segments, positions(cu_seqlens, rows), attention, keys, longest, all_adapted)
