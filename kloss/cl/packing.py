"""Sentences end to end, without padding, as the model takes them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import Segments, make_segments
from .corpus import Sentences


class Part(NamedTuple):
    sentences: Sentences
    indices: np.ndarray  # int [n], which of them to pack
    adapter: int  # its row in the bank; -1: the base model alone


class PackedBatch(NamedTuple):
    """S sentences with T tokens in all."""

    input_ids: Tensor  # int64 [T]
    labels: Tensor  # int64 [T], IGNORED where there is none
    cu_seqlens: Tensor  # int32 [S+1]
    segments: Segments
    sequence: Tensor  # int64 [S], each sentence's position within its part


def pack(
    parts: Sequence[tuple[Sentences, np.ndarray, int]], num_adapters: int, device: str | torch.device = "cpu"
) -> PackedBatch:
    """Pack sentences into one batch. parts: each a `Part`, or a tuple of its fields."""
    text = Sentences.concatenate([sentences.take(indices) for sentences, indices, _ in parts])
    lengths = [len(indices) for _, indices, _ in parts]
    cu_seqlens = torch.from_numpy(text.offsets.astype(np.int32)).to(device)
    adapter = torch.from_numpy(np.repeat([adapter for *_, adapter in parts], lengths).astype(np.int32)).to(device)
    return PackedBatch(
        torch.from_numpy(text.input_ids.astype(np.int64)).to(device),
        torch.from_numpy(text.labels.astype(np.int64)).to(device),
        cu_seqlens,
        make_segments(cu_seqlens, adapter, num_adapters, rows=len(text.input_ids)),
        torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])).to(device),
    )
