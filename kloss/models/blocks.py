"""The blocks of `use_adapters`: whose adapters a layer computes with, in this task or thread, and in a backward pass.

Blocks are a stack in a context variable, so tasks of asyncio and threads have their own. Gradient checkpointing computes layers
again during backward, when their block may have ended. So each pass notes its batch under the number that autograd gives the next
node. The node that asks for the layers again has such a number too.
"""

import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from ..errors import UserError
from ..kernels import Dropout, Segments, make_segments, multi_lora_cpu, multi_lora_direct, row_keys
from .settings import Settings

PASSES = 1 << 14  # through layers, that a thread remembers for backward
LENGTHS = 64  # of batches, for which a compiled base model keeps its lists
INPUTS = "decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"


class Shared(Settings):
    """What all adapted layers of a model share: the adapters' settings and the blocks."""

    def __init__(self, *settings: Any):
        super().__init__(*settings)
        self.blocks = Blocks()
        _open.set(_open.get(()))  # who attaches knows that outside of blocks there is the base model

    def outside(self) -> None:
        """Raises UserError while a block is open."""
        if self.blocks.open:
            raise UserError("adapters change outside use_adapters, whose batch holds their settings")


class Arguments(NamedTuple):
    """Arguments of `multi_lora_linear` that all layers share: scaling fp32 [G], ranks int64 [G] or None if all are R.

    lists: of `multi_lora_direct`, None where it cannot serve.
    """

    segments: Segments
    scaling: Tensor
    ranks: Tensor | None
    dropout: Dropout | None
    lists: multi_lora_direct.Lists | None = None


class Batch:
    """The batch of a block. ids: the adapter of each batch row, or -1. step: of dropout."""

    is_repeated = False

    def __init__(self, shared: Shared, ids: list[int], step: int):
        self.shared, self.ids, self.step = shared, ids, step
        self.alike = all(g == ids[0] for g in ids)
        self.drops, self.mixed_ranks = any(shared.chances), min(shared.ranks) < shared.rank
        self.cache: dict[tuple[int, int, torch.device, bool], Arguments] = {}

    def repeated(self, times: int) -> "Batch":
        """This batch with each row several times, one after the other."""
        batch = Batch(self.shared, [g for g in self.ids for _ in range(times)], self.step)
        batch.is_repeated = True
        return batch

    def arguments(self, size: int, length: int, device: torch.device, training: bool) -> Arguments:
        """What all layers share, computed once.

        size: of the input's first dimension, that of the batch unless all ids are alike.
        length: rows of the input to each of the first dimension.
        """
        key = size, length, device, training and self.drops
        arguments = self.cache.get(key)
        if arguments is None:
            with torch.inference_mode(False):  # a training step may use what an evaluation computed
                self.cache[key] = arguments = self._compute(*key)
        return arguments

    def _compute(self, size: int, length: int, device: torch.device, drops: bool) -> Arguments:
        shared = self.shared
        ids = torch.tensor(self.ids[:1] * size if self.alike else self.ids, dtype=torch.int32)
        offsets = torch.arange(size + 1, dtype=torch.int32, device=device) * length
        segments = make_segments(offsets, ids.to(device), len(shared.ranks), rows=size * length)
        scaling = torch.tensor(shared.scaling, dtype=torch.float32, device=device)
        ranks = torch.tensor(shared.ranks, device=device) if self.mixed_ranks else None
        if not drops:
            return Arguments(segments, scaling, ranks, None, multi_lora_direct.make_lists(segments, scaling, ranks, None))
        # Earlier batch rows of the same adapter.
        number = torch.arange(size) if self.alike else (ids[:, None] == ids).tril(-1).sum(1)
        most = int(number.max()) + 1 if size else 0
        if most > 1 << 16 or length > 1 << 16:
            raise UserError(f"dropout takes 65536 positions and rows of one adapter, got {length} and {most}")
        keys = row_keys(torch.full((size,), self.step, device=device), number.to(device), offsets, rows=size * length)
        chances = torch.tensor(shared.chances, dtype=torch.float32, device=device)
        dropout = Dropout(chances, torch.tensor(shared.dropout_seeds, device=device), keys, 0)
        return Arguments(segments, scaling, ranks, dropout, multi_lora_direct.make_lists(segments, scaling, ranks, dropout))


_open: ContextVar[tuple[Batch, ...]] = ContextVar("kloss.use_adapters")  # of all models, the innermost last
_thread = threading.local()  # blocks: that it began and did not end; many: whether its backward ran in several threads before
_Hit = tuple[Batch | None]  # of a pass that was noted, None: the base model's


class _Passes:
    """The passes of one thread, each under autograd's number of the node to come."""

    def __init__(self) -> None:
        self.since = -1  # older ones are forgotten
        self.starts: list[int] = []  # with gradients: the first number of each run of passes of a batch
        self.batches: list[Batch | None] = []
        self.hidden: dict[int, Batch | None] = {}  # without: within the node before, a checkpoint if it asks

    def note(self, batch: Batch | None) -> None:
        """Remember a pass through a layer that begins now."""
        if self.batches and self.batches[-1] is batch and torch.is_grad_enabled():
            return
        number = torch.autograd._get_sequence_nr()
        if not torch.is_grad_enabled():
            self.hidden.setdefault(number, batch)
            if len(self.hidden) > PASSES:
                self.since = max(self.since, next(iter(self.hidden)))
                del self.hidden[next(iter(self.hidden))]
        else:
            self.starts.append(number)
            self.batches.append(batch)
            if len(self.starts) > PASSES:
                self.since = max(self.since, self.starts[1] - 1)
                del self.starts[0], self.batches[0]

    def of(self, node: Any) -> _Hit | None:
        """The batch of the pass that a node of a running backward pass computes again; None: it is not here."""
        number = node._sequence_nr()
        if number < self.since:
            return None
        # A reentrant checkpoint is the node itself, any other one is around the node.
        if isinstance(node, BackwardCFunction):
            inside = number + 1
            if inside not in self.hidden and type(node).__name__ == "CheckpointFunctionBackward":
                # Other nodes came first, as where it was the first to call what torch compiles.
                inside = next((hidden for hidden in self.hidden if hidden > number), inside)
            if inside in self.hidden:
                return (self.hidden[inside],)
        i = bisect_right(self.starts, number)
        return (self.batches[i - 1],) if i else None


class Blocks:
    """The open blocks of one model, and the passes that its layers remember. A copy starts without."""

    def __init__(self) -> None:
        # What graphs of torch.compile can read: whether any block is open, in any thread or task, or ever was; whether any is of
        # repeated rows; two of the last one's batch.
        self.open = self.used = self.repeating = self.drops = self.mixed_ranks = False
        self._count, self._repeating, self._lock = 0, 0, threading.Lock()
        self._own, self._of_threads = threading.local(), deque[_Passes](maxlen=64)
        self._again: Batch | None = None
        self._base: Batch | None = None

    def __reduce__(self) -> tuple:
        return Blocks, ()

    def batch(self, name: str) -> Batch | None:
        """The batch to compute with, None for the base model. name: of the layer.

        Raises UserError in a thread that said nothing of adapters, and for a pass whose batch nobody knows any more.
        """
        batch, again = self.innermost(), torch._C._current_graph_task_id() != -1
        if again and self.used:
            return self._remembered(batch, name)
        if batch is None and not again and _open.get(None) is None and threading.current_thread() is not threading.main_thread():
            raise UserError(
                f"{name}: this thread ({threading.current_thread().name}) is in no block of use_adapters, for a new thread does "
                "not see those of others. Start it with contextvars.copy_context().run, or open a block in it; "
                "ids of -1 are the base model alone"
            )
        if self.used:
            self._passes().note(batch)
        return batch

    def forget(self) -> None:
        """Forget all passes: their batches' rows are not these adapters' any more."""
        self._own, self._again, self._base = threading.local(), None, None
        self._of_threads.clear()

    def base(self, shared: Shared) -> Batch:
        """A batch of no adapter, for a graph that was compiled for blocks."""
        if self._base is None or len(self._base.cache) >= LENGTHS:
            self._base = Batch(shared, [-1], 0)
            self._base.drops, self._base.mixed_ranks = self.drops, self.mixed_ranks
        return self._base

    def innermost(self) -> Batch | None:
        """The batch of this model's innermost block in this task or thread."""
        for batch in reversed(_open.get(())):
            if batch.shared.blocks is self:
                return batch
        return None

    def _passes(self) -> _Passes:
        if not hasattr(self._own, "passes"):
            self._own.passes = _Passes()
            self._of_threads.append(self._own.passes)
        return self._own.passes

    def _remembered(self, innermost: Batch | None, name: str) -> Batch | None:
        """The batch of the pass that is computed again. It is this thread's, or of the one thread that can have made it."""
        node, own = torch._C._current_autograd_node(), getattr(self._own, "passes", None)
        mine = own and own.of(node)
        others = [hit for passes in [*self._of_threads] if passes is not own and (hit := passes.of(node))]
        if mine is None or innermost is None and any(hit[0] is not mine[0] for hit in others):
            others += [mine] if mine else []
            if len({id(hit[0]) for hit in others}) != 1:
                raise UserError(
                    f"{name} is computed again for backward (gradient checkpointing), and its batch is not known: "
                    "call backward inside use_adapters, in the forward pass's thread"
                )
        batch = (mine or others[0])[0]
        if mine:
            self._passes().note(batch)  # for checkpoints within this one
        if batch is not self._again:
            if self._again is not None:
                self._again.cache.clear()
            self._again = batch
        return batch

    @contextmanager
    def within(self, batch: Batch) -> Iterator[None]:
        """The block of a batch."""
        self.enter(batch)
        try:
            yield
        finally:
            self.leave(batch)

    def enter(self, batch: Batch) -> None:
        """Begin a block."""
        if not self.used:
            multi_lora_cpu.look()
        self.used, self.drops, self.mixed_ranks, self._base = True, batch.drops, batch.mixed_ranks, None
        _open.set((*_open.get(()), batch))
        with self._lock:
            self._count_block(batch, 1)
        _count_in_thread(1)

    def leave(self, batch: Batch) -> None:
        """End a block, and those within it that were left open. Raises UserError where it is not the innermost."""
        with self._lock:
            self._count_block(batch, -1)
        _count_in_thread(-1)
        batch.cache.clear()
        stack = _open.get(())
        _open.set(stack[: stack.index(batch)] if batch in stack else stack)
        if not stack or stack[-1] is not batch:
            raise UserError(
                "a block of use_adapters ended out of order: blocks end innermost first, in the task or thread they began in. "
                "A generator must not yield inside one"
            )

    def _count_block(self, batch: Batch, change: int) -> None:
        self._count, self._repeating = self._count + change, self._repeating + change * batch.is_repeated
        self.open, self.repeating = self._count > 0, self._repeating > 0


def _count_in_thread(change: int) -> None:
    """Keep a GPU's backward in this thread while it has blocks. There nested checkpoints are known too."""
    before = getattr(_thread, "blocks", 0)
    _thread.blocks = max(0, before + change)
    if not before:
        _thread.many = torch.autograd.is_multithreading_enabled()
    if not before or not _thread.blocks:
        torch.autograd.set_multithreading_enabled(_thread.many and not _thread.blocks)


class RepeatedRows:
    """Hooks of a model that repeat the ids where `generate` repeats batch rows, for beams and several returned sequences.

    They know its calls by `use_cache`, which others leave to the model, and by gradients being off.
    """

    def __init__(self, blocks: Blocks):
        self.blocks = blocks

    def before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Open a block of repeated ids around the call."""
        if torch.is_grad_enabled() or kwargs.get("use_cache") is None or not self.blocks.open:
            return
        batch, given = self.blocks.innermost(), next((x for name in INPUTS if isinstance(x := kwargs.get(name), Tensor)), None)
        if batch is not None and given is not None:
            times, rest = divmod(given.shape[0], len(batch.ids))
            if times > 1 and not rest:
                self.blocks.enter(batch.repeated(times))

    def after(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        """End it, after an exception too."""
        if self.blocks.repeating and (batch := self.blocks.innermost()) is not None and batch.is_repeated:
            self.blocks.leave(batch)
