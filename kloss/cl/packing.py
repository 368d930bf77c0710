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
    adapter = np.repeat([adapter for *_, adapter in parts], lengths)
    sequence = np.concatenate([np.arange(length) for length in lengths])
    numbers = [text.input_ids, text.labels, text.offsets, adapter, sequence]
    input_ids, labels, offsets, adapters, sequences = send(numbers, torch.device(device))
    cu_seqlens = offsets.to(torch.int32)
    segments = make_segments(cu_seqlens, adapters.to(torch.int32), num_adapters, rows=len(text.input_ids))
    return PackedBatch(input_ids, labels, cu_seqlens, segments, sequences)


def send(arrays: Sequence[np.ndarray], device: torch.device) -> tuple[Tensor, ...]:
    """Arrays of integers as int64 tensors on a device, in one copy, which the host does not wait for."""
    staged = torch.from_numpy(np.concatenate(arrays, dtype=np.int64))
    if device.type == "cuda":
        staged = staged.pin_memory()
    return staged.to(device, non_blocking=True).split([len(array) for array in arrays])
