"""The blocks of `use_adapters`: whose adapters a layer computes with, in this task or thread, and in a backward pass.

Blocks are a stack in a context variable, so tasks of asyncio and threads have their own. Gradient checkpointing computes layers
again during backward, when their block may have ended. So each pass notes its batch under the number that autograd gives the next
node. The node that asks for the layers again has such a number too. A block that is opened within what is computed again, or by a
hook of backward, is opened again, and counts there.
"""

import threading
import weakref
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
    """The batch of a block. ids: the adapter of each batch row, or -1. step: of dropout. given: whether by the user."""

    is_repeated = False

    def __init__(self, shared: Shared, ids: list[int], step: int, *, given: bool = False):
        self.shared, self.ids, self.step, self.given = shared, ids, step, given
        self.opened = _Place.here()
        self.changes = shared.blocks.changes
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


class _Place(NamedTuple):
    """Where in a program one is: in which backward pass, or in which checkpoint's forward."""

    task: int  # of a backward pass, -1 outside
    number: int  # that autograd gives the next node, which within a reentrant checkpoint stays; -1 with gradients
    pack: weakref.ref | None  # what is done with tensors saved for backward, as any other checkpoint has it; None: nothing

    @classmethod
    def here(cls) -> "_Place":
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        number = -1 if torch.is_grad_enabled() else torch.autograd._get_sequence_nr()
        return cls(torch._C._current_graph_task_id(), number, hooks and weakref.ref(hooks[0]))

    @property
    def in_checkpoint(self) -> bool:
        """Whether this may be within a checkpoint's forward pass."""
        return self.number >= 0 or self.pack is not None


class _Hit(NamedTuple):
    """What was noted of a pass. batch: None is the base model. within: whether its block began within the same checkpoint."""

    batch: Batch | None
    within: bool


class _Passes:
    """The passes of one thread, each under autograd's number of the node to come."""

    def __init__(self) -> None:
        self.since = -1  # older ones are forgotten
        self.starts: list[int] = []  # with gradients: the first number of each run of passes of a batch
        self.hits: list[_Hit] = []
        self.hidden: dict[int, list[_Hit]] = {}  # without: within the node before, a checkpoint if it asks

    def note(self, batch: Batch | None) -> None:
        """Remember a pass through a layer that begins now."""
        hit = _Hit(batch, batch is not None and batch.opened.in_checkpoint and batch.opened == _Place.here())
        if self.hits and self.hits[-1] == hit and torch.is_grad_enabled():
            return
        number = torch.autograd._get_sequence_nr()
        if not torch.is_grad_enabled():
            hits = self.hidden.setdefault(number, [])
            if all(other.within != hit.within for other in hits):
                hits.append(hit)
            if len(self.hidden) > PASSES:
                self.since = max(self.since, next(iter(self.hidden)))
                del self.hidden[next(iter(self.hidden))]
        else:
            self.starts.append(number)
            self.hits.append(hit)
            if len(self.starts) > PASSES:
                self.since = max(self.since, self.starts[1] - 1)
                del self.starts[0], self.hits[0]

    def of(self, node: Any, within: bool) -> _Hit | None:
        """What was noted of the pass that a node of a running backward pass computes again; None: it is not here.

        within: whether its block is opened again, which decides between passes that a reentrant checkpoint does not tell apart.
        """
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
                return min(self.hidden[inside], key=lambda hit: hit.within != within)
        i = bisect_right(self.starts, number)
        return self.hits[i - 1] if i else None


class Blocks:
    """The open blocks of one model, and the passes that its layers remember. A copy starts without."""

    def __init__(self) -> None:
        # What graphs of torch.compile can read: whether any block is open, in any thread or task, or ever was; whether any is of
        # repeated rows; two of the last one's batch.
        self.open = self.used = self.repeating = self.drops = self.mixed_ranks = False
        self.changes = 0  # of the adapters' rows, so far
        self._count, self._repeating, self._lock = 0, 0, threading.Lock()
        self._own, self._of_threads = threading.local(), deque[_Passes](maxlen=64)
        self._again: Batch | None = None
        self._base: Batch | None = None

    def __reduce__(self) -> tuple:
        return Blocks, ()

    def batch(self, name: str, training: bool) -> Batch | None:
        """The batch to compute with, None for the base model. name: of the layer. training: whether adapters drop.

        Raises UserError in a thread that said nothing of adapters, for a pass whose batch nobody knows any more, and for a block
        that adapters did not outlive.
        """
        batch, again = self.innermost(), torch._C._current_graph_task_id() != -1
        if batch is not None and batch.changes != self.changes:
            raise UserError(
                f"{name}: adapters were added, removed or copied since this block of use_adapters began; what a task or thread "
                "computes with adapters has to end before the block that it was started in"
            )
        if again and self.used:
            return self._remembered(batch, name, training)
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
        self.changes += 1
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

    def _remembered(self, innermost: Batch | None, name: str, training: bool) -> Batch | None:
        """The batch of a pass within backward. A block that began there counts, but for a dropout's step that nobody gave it."""
        task = torch._C._current_graph_task_id()
        opened = innermost if innermost is not None and innermost.opened.task == task else None
        if opened and (opened.given or not (training and opened.drops)):
            self._passes().note(opened)  # for checkpoints within this one
            return opened
        hit = self._hit(innermost, opened is not None, name)
        if opened:
            key = task, torch._C._current_autograd_node()._sequence_nr()
            first = getattr(self._own, "first", (None, None))
            if hit.batch is None or hit.batch.ids != opened.ids or first[0] == key and first[1] is not opened:
                raise UserError(
                    f"{name}: the step of dropout that this block of use_adapters had in its forward pass is not known, for it "
                    "is one of several in a checkpoint, or of a hook: give it as use_adapters(..., step=...)"
                )
            self._own.first = key, opened
        elif hit.within:
            raise UserError(
                f"{name} is computed again for backward (gradient checkpointing), once within a block of use_adapters and once "
                "outside of it: a checkpoint must lie in one block, or open all of its blocks"
            )
        batch = hit.batch
        if batch is not self._again:
            if self._again is not None:
                self._again.cache.clear()
            self._again = batch
        return batch

    def _hit(self, innermost: Batch | None, opened: bool, name: str) -> _Hit:
        """What was noted of the pass that is computed again. It is this thread's, or of the one thread that can have made it."""
        node, own = torch._C._current_autograd_node(), getattr(self._own, "passes", None)
        mine = own and own.of(node, opened)
        others = [hit for passes in [*self._of_threads] if passes is not own and (hit := passes.of(node, opened))]
        if mine is None or innermost is None and any(hit.batch is not mine.batch for hit in others):
            others += [mine] if mine else []
            if len({id(hit.batch) for hit in others}) != 1:
                raise UserError(
                    f"{name} is computed again for backward (gradient checkpointing), and its batch is not known: "
                    "call backward inside use_adapters, in the forward pass's thread"
                )
        if mine:
            self._passes().note(mine.batch)  # for checkpoints within this one
        return mine or others[0]

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
        stack = _open.get(())
        place = stack.index(batch) if batch in stack else len(stack)
        # Hooks that end blocks of repeated rows run after an Exception, but not after Ctrl-C.
        interrupted = [other for other in stack[place + 1 :] if other.is_repeated and other.shared.blocks is self]
        for ended in (*interrupted, batch):
            with self._lock:
                self._count_block(ended, -1)
            _count_in_thread(-1)
            ended.cache.clear()
        _open.set(stack[:place])
        if len(stack) - len(interrupted) != place + 1:
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
