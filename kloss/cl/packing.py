"""Sentences end to end, without padding between them, as the model takes them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import BatchLists, batch_lists
from ..kernels.buckets import CLASSES
from ..kernels.segments import CHUNK
from .corpus import IGNORED, Sentences


class Part(NamedTuple):
    sentences: Sentences
    indices: np.ndarray  # int [n], which of them to pack
    adapter: int  # its row in the bank; -1: the base model alone


class PackedBatch(NamedTuple):
    """S sentences with T tokens in all.

    A padded batch has rows behind the last sentence, labelled IGNORED, and empty sentences, so that S and T are capacities.
    """

    numbers: Tensor  # int64, the memory of all others
    input_ids: Tensor  # int64 [T]
    labels: Tensor  # int64 [T], IGNORED where there is none
    number: Tensor  # int64 [S], each sentence's position within its part, or what `pack` was given
    cu_seqlens: Tensor  # int32 [S+1]
    adapter: Tensor  # int32 [S]
    num_adapters: int
    longest: int  # tokens of the longest sentence
    most: int  # tokens of the adapter with most of them
    tokens: int  # without padding
    all_adapted: bool  # whether every sentence has an adapter
    in_order: bool  # whether sentences lie by adapter, ascending, those without one last

    def to(self, device: torch.device) -> "PackedBatch":
        """The batch on a device; the host does not wait for a GPU."""
        numbers = send(self.numbers, device)
        if numbers is self.numbers:
            return self
        input_ids, labels, number, cu_seqlens, adapter = _views(numbers, *self.capacity)
        return self._replace(
            numbers=numbers, input_ids=input_ids, labels=labels, number=number, cu_seqlens=cu_seqlens, adapter=adapter
        )

    @property
    def capacity(self) -> tuple[int, int]:
        """T and S."""
        return self.input_ids.numel(), self.adapter.numel()

    @property
    def bucket(self) -> tuple[int, ...]:
        """What decides, with the model, which kernels are launched, and over how much."""
        classes = sum(self.longest > rows for rows in CLASSES["half"])
        return *self.capacity, self.num_adapters, classes, int(self.most > CHUNK), int(self.all_adapted), int(self.in_order)

    def lists(self, dtype: torch.dtype, step: Tensor | None = None) -> BatchLists:
        """`batch_lists` for activations of a dtype. step: int64 [G], each adapter's, where it drops."""
        sequence = None if step is None else self.number
        return batch_lists(
            self.cu_seqlens, self.adapter, self.num_adapters, self.capacity[0], dtype,
            step=step, sequence=sequence, longest=self.longest, most=self.most,
            all_adapted=self.all_adapted, in_order=self.in_order,
        )  # fmt: skip


def _views(numbers: Tensor, rows: int, sentences: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tensors of a batch within its numbers."""
    input_ids, labels, number, rest = numbers.split([rows, rows, sentences, numbers.numel() - 2 * rows - sentences])
    ints = rest.view(torch.int32)
    return input_ids, labels, number, ints[: sentences + 1], ints[sentences + 1 : 2 * sentences + 1]


def send(numbers: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device. On a GPU they are a copy that the host does not wait for."""
    return numbers if device.type == "cpu" else numbers.pin_memory().to(device, non_blocking=True)


def capacity(count: int) -> int:
    """The count rounded up in steps of a sixteenth to a thirty-second of itself, at least 16."""
    step = max(16, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


def pack(
    parts: Sequence[tuple[Sentences, np.ndarray, int]],
    num_adapters: int,
    *,
    number: np.ndarray | None = None,
    padded: bool = False,
) -> PackedBatch:
    """Pack sentences into one batch on the host.

    parts: each a `Part`, or a tuple of its fields.
    number: int [S], of each sentence; None: its position within its part.
    padded: whether to round S and T up to a `capacity`.
    """
    text = Sentences.concatenate([sentences.take(indices) for sentences, indices, _ in parts])
    counts = [len(indices) for _, indices, _ in parts]
    tokens, count = len(text.input_ids), sum(counts)
    rows, sentences = (capacity(tokens), capacity(count)) if padded else (tokens, count)
    numbers = torch.zeros(2 * rows + sentences + sentences + 1, dtype=torch.int64)
    tensors = _views(numbers, rows, sentences)
    input_ids, labels, own, cu_seqlens, adapter = (tensor.numpy() for tensor in tensors)
    input_ids[:tokens], labels[:tokens], labels[tokens:] = text.input_ids, text.labels, IGNORED
    own[:count] = np.concatenate([np.arange(n) for n in counts]) if number is None else number
    cu_seqlens[: count + 1], cu_seqlens[count + 1 :] = text.offsets, tokens
    adapter[:count], adapter[count:] = np.repeat([adapter for *_, adapter in parts], counts), -1
    lengths = np.diff(text.offsets)
    owners = np.bincount(np.maximum(adapter[:count], 0), lengths)
    longest, most, adapted = int(lengths.max(initial=0)), int(owners.max(initial=0)), bool((adapter[:count] >= 0).all())
    in_order = bool((np.diff(np.where(adapter < 0, num_adapters, adapter)) >= 0).all())
    return PackedBatch(numbers, *tensors, num_adapters, longest, most, tokens, adapted, in_order)
