"""Sentences end to end, without padding, as the model takes them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import Segments, make_segments
from .corpus import Sentences


class PackedBatch(NamedTuple):
    """input_ids int64 [T], labels int64 [T] (-100: none), cu_seqlens int32 [S+1], segments, sequence int64 [S]: the number of
    each sequence within its own part."""

    input_ids: Tensor
    labels: Tensor
    cu_seqlens: Tensor
    segments: Segments
    sequence: Tensor


def pooled(parts: Sequence[Sentences]) -> Sentences:
    """The sentences of several parts as one."""
    if len(parts) == 1:
        return parts[0]
    starts = np.cumsum([0] + [len(part.input_ids) for part in parts])
    offsets = [part.offsets[:-1] + start for part, start in zip(parts, starts, strict=False)] + [starts[-1:]]
    return Sentences(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("input_ids", "labels")),
        np.concatenate(offsets),
    )


def pack(
    parts: Sequence[tuple[Sentences, np.ndarray, int]], num_adapters: int, device: str | torch.device = "cpu"
) -> PackedBatch:
    """Packs sentences of several parts.

    parts: for each, the sentences, the indices of those to take, and the adapter that they go through.
    """
    lengths, positions, ids, labels, starts = [], [], [], [], []
    for sentences, index, _ in parts:
        start = sentences.offsets[index]
        length = sentences.offsets[index + 1] - start
        ends = np.cumsum(length)
        rows = np.arange(ends[-1] if len(ends) else 0) + np.repeat(start - ends + length, length)
        ids.append(sentences.input_ids[rows])
        labels.append(sentences.labels[rows])
        lengths.append(length)
        positions.append(np.arange(len(index)))
        starts.append(len(index))
    cu_seqlens = torch.from_numpy(np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int32))
    adapter = torch.from_numpy(np.repeat([adapter for _, _, adapter in parts], starts).astype(np.int32))
    cu_seqlens, adapter = cu_seqlens.to(device), adapter.to(device)
    return PackedBatch(
        torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device),
        torch.from_numpy(np.concatenate(labels).astype(np.int64)).to(device),
        cu_seqlens,
        make_segments(cu_seqlens, adapter, num_adapters, rows=sum(map(len, ids))),
        torch.from_numpy(np.concatenate(positions)).to(device),
    )
