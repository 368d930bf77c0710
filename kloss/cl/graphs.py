"""Work on packed batches as CUDA graphs: captured once for each bucket, then replayed with other contents.

What a function launches must follow from the batch's bucket alone: sizes and Python numbers are frozen by the capture. So it
reads nothing back from the device, and whatever changes between replays lies in tensors that it reads each time.
"""

import warnings
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packing import PackedBatch

Function = Callable[[PackedBatch], Tensor]


class _Captured(NamedTuple):
    """A graph; replay runs it on the batch, which stays where it is, as does the output. function: keeps what it reads alive."""

    function: Function
    batch: PackedBatch
    replay: Callable[[], None]
    output: Tensor


class Graphs:
    """Runs functions of packed batches on a device.

    On a GPU a function runs as it is for the first batch of a bucket, which compiles its kernels, is captured with the second
    one, and is replayed from then on. On a CPU, or if not enabled, it always runs as it is.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True):
        self.device, self.enabled = device, enabled and device.type == "cuda"
        self._pool: Any = None
        self._captured: dict[Hashable, _Captured | None] = {}

    def __call__(self, key: Hashable, function: Function, batch: PackedBatch) -> Tensor:
        """function(batch on the device).

        key: names the function and what it holds; with the batch's bucket it must decide what is launched.
        batch: on the host, padded.
        Returns what the function returns. It stays as it is: graphs share their memory, so a replayed one's output is copied out.
        """
        if not self.enabled:
            return function(batch.to(self.device))
        key = key, batch.bucket
        if key not in self._captured:
            self._captured[key] = None
            return function(batch.to(self.device))
        if self._captured[key] is None:
            static = batch.to(self.device)
            try:
                self._captured[key] = _Captured(function, static, *self._capture(function, static))
            except RuntimeError as error:
                self.enabled = False
                warnings.warn(f"training goes on without CUDA graphs, which could not be captured: {error}", stacklevel=2)
                return function(static)
        captured = self._captured[key]
        assert captured is not None
        captured.batch.numbers.copy_(batch.numbers.pin_memory(), non_blocking=True)
        captured.replay()
        return captured.output.clone()

    def _capture(self, function: Function, static: PackedBatch) -> tuple[Callable[[], None], Tensor]:
        """`replay` and `output` of a graph."""
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self._pool):
            output = function(static)
        return graph.replay, output
