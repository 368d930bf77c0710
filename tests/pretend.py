"""A pretended GPU: tensors that say they lie on cuda:0 and hold their numbers on the CPU.

It stands in for the rules of a device, not for its speed or its arithmetic. Mixing devices raises as it would there. Whatever
makes the host wait is recorded. The multi-adapter linear runs in Triton, here in its interpreter. A captured graph is the list of
the ops that ran, on the tensors that they ran on, with all numbers that the host gave them.
"""

import traceback
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import kloss
from kloss.cl.graphs import Graphs
from kloss.kernels import feed_forward, shared_ops

GPU = torch.device("cuda:0")
ATEN = torch.ops.aten
# These give the host a number or a size that only the device knows.
READS = {ATEN._local_scalar_dense, ATEN.nonzero, ATEN.masked_select, ATEN.equal, ATEN.unique_dim, ATEN._unique2, ATEN.bincount}
INDEXING = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_}  # by a mask: as many results as it has ones
COPIES = {ATEN._to_copy, ATEN.copy_}


class Pretended(Tensor):
    """A tensor on the pretended GPU; `inner` has its numbers."""

    @staticmethod
    def __new__(cls, inner: Tensor):
        layout = dict(strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype)
        # To C++ it is on no device at all: autograd would look for the threads of a real GPU.
        tensor = Tensor._make_wrapper_subclass(cls, inner.shape, device="meta", **layout)
        tensor.inner = inner
        return tensor

    def _set_data(self, value):
        self.inner = value.inner

    device = property(lambda self: GPU)
    data = property(lambda self: self.detach(), _set_data)
    __torch_function__ = torch._C._disabled_torch_function_impl  # results are what the mode makes them

    def __repr__(self):
        return f"Pretended({self.inner!r})"

    def data_ptr(self):
        return self.inner.data_ptr()

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on the pretended GPU outside `pretended_gpu`")


class PretendedGpu(TorchDispatchMode):
    """Runs every op on the tensors' numbers.

    waits: (op, place) of each op for which the host would wait.
    calls: the ops of kloss that ran on the GPU.
    captures, replays: how many graphs were captured, and how often one ran.
    """

    def __init__(self):
        super().__init__()
        self.waits: list[tuple[str, str]] = []
        self.calls: list[str] = []
        self.pinned: set[int] = set()  # addresses of pinned memory
        self.graph: Graph | None = None  # being captured
        self.captures = self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, op = dict(kwargs or {}), func.overloadpacket
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        here = [x for x in tensors if isinstance(x, Pretended)]
        away = [x for x in tensors if not isinstance(x, Pretended)]
        assert not any(x.is_meta for x in away), f"{func}: a list as index; torch made its tensor on no device, give it a tensor"
        if here and op not in INDEXING | COPIES and any(x.dim() for x in away):
            raise RuntimeError(f"{func}: expected all tensors on one device, found cuda:0 and cpu")
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = "cpu"
        to_gpu = bool(here) if target is None else torch.device(target).type == "cuda"
        if op == ATEN.copy_:
            to_gpu = isinstance(args[0], Pretended)
        if self._waits(op, args, kwargs, here, away, to_gpu):
            self.waits.append((str(op), _place()))
        if here and func.namespace == "kloss":
            self.calls.append(str(op))
        given_args = tree_map(_inner, args), tree_map(_inner, kwargs)
        result = func(*given_args[0], **given_args[1])
        if self.graph is not None and to_gpu:
            self.graph.add(func, *given_args, result)
        given = {id(x.inner): x for x in here}  # an op in place returns the tensor that it was given
        wrapped = tree_map(lambda x: given.get(id(x), Pretended(x)) if isinstance(x, Tensor) else x, result)
        return wrapped if to_gpu else result

    def _waits(self, op, args, kwargs, here, away, to_gpu: bool) -> bool:
        """Whether the host would wait: for a number, for a size, or for a copy out, or in from memory that is not pinned."""
        soon = kwargs.get("non_blocking") or (op == ATEN.copy_ and len(args) > 2 and args[2])
        if op in COPIES and soon and all(x.data_ptr() in self.pinned for x in away):
            return not to_gpu
        if not here:
            return to_gpu and bool(away)
        by_mask = op in INDEXING and any(x.dtype == torch.bool for x in tree_leaves(args[1]) if isinstance(x, Tensor))
        uneven = op == ATEN.repeat_interleave and kwargs.get("output_size") is None
        arrives = bool(away) and op in INDEXING | COPIES
        return op in READS or by_mask or uneven or arrives or not to_gpu


class Graph:
    """The ops of a capture. Afterwards all that they made is poisoned: a capture computes nothing."""

    def __init__(self):
        self.ops: list[tuple] = []
        self.made: dict[int, Tensor] = {}  # by the address of the memory

    def add(self, func, args, kwargs, result):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        results = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        new = [x.untyped_storage().data_ptr() not in given for x in results]
        self.made |= {x.untyped_storage().data_ptr(): x for x, is_new in zip(results, new, strict=True) if is_new}
        if not results or any(new) or func._schema.is_mutable:  # not a view
            self.ops.append((func, args, kwargs, results, new))

    def poison(self):
        for tensor in self.made.values():
            tensor.untyped_storage().fill_(0xFF)  # NaN, -1, True

    def replay(self):
        for func, args, kwargs, results, new in self.ops:
            again = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
            for old, value, is_new in zip(results, again, new, strict=True):
                if is_new:
                    old.copy_(value)


def _inner(x):
    return x.inner if isinstance(x, Pretended) else x


def _place() -> str:
    """The innermost line of kloss that is being run."""
    home = str(Path(kloss.__file__).parent)
    lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(home)]
    return f"{Path(lines[-1].filename).name}:{lines[-1].name}" if lines else "outside kloss"


def _capture(gpu: PretendedGpu, function, static):
    gpu.graph, waits = Graph(), len(gpu.waits)
    try:
        output, graph = function(static), gpu.graph
    finally:
        gpu.graph = None
    if len(gpu.waits) > waits:  # as a real capture does
        raise RuntimeError(f"the host waits within a capture: {gpu.waits[waits:]}")
    graph.poison()
    gpu.captures += 1

    def replay():
        gpu.replays += 1
        with torch.utils._python_dispatch._disable_current_modes(), torch.no_grad():
            graph.replay()

    return replay, output


@contextmanager
def pretended_gpu(monkeypatch):
    """Within the block cuda:0 is there. Yields the mode."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "get_device_name", lambda device=None: "pretended")
        patch.setattr(torch.cuda, "get_device_properties", lambda device=None: SimpleNamespace(total_memory=1 << 36))
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device) makes its tensor on the CPU and sends it over
        try:
            with PretendedGpu() as mode:
                patch.setattr(Tensor, "pin_memory", lambda tensor: mode.pinned.add(tensor.data_ptr()) or tensor)
                patch.setattr(shared_ops, "runs_on", lambda device: shared_ops.built())
                patch.setattr(Graphs, "_capture", partial(_capture, mode))
                patch.setattr(feed_forward, "LEAST", 0)
                yield mode
        finally:
            torch._C._set_only_lift_cpu_tensors(before)
