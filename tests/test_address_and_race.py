"""Every Triton kernel in the interpreter: it touches only the tensors it names, and its programs do not depend on each other.

A pointer gets its tensor's number in bits that no address has. Arithmetic keeps them. So a load or a store is held to the tensor
whose pointer it was made from, even where another one lies behind it in memory.
"""

import importlib.util
import random
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

from bench import compiled
from kloss import kernels
from kloss.kernels import lora_triton, make_segments, segments
from kloss.kernels.segments import with_work

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
TAG = 48  # addresses of a process are below 2^47
NOBODY, SEVERAL = -1, -2


class Argument(NamedTuple):
    """A tensor of a launch, over the memory from its first element to its last.

    own: which elements are the tensor's.
    reader, writer: the program that touched each, NOBODY or SEVERAL.
    """

    tensor: Tensor
    own: np.ndarray
    reader: np.ndarray
    writer: np.ndarray


def argument(tensor: Tensor) -> Argument:
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    own = torch.zeros(steps + 1 if tensor.numel() else 0, dtype=torch.bool)
    own.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return Argument(tensor, own.numpy(), *(np.full(len(own), NOBODY) for _ in range(2)))


class Watch:
    """Stands in front of the interpreter's memory. order: of the programs, "forwards", "backwards" or "shuffled"."""

    def __init__(self, order: str):
        self.order, builder = order, interpreter.interpreter_builder
        self.convert, self.load, self.store = interpreter._implicit_cvt, builder.create_masked_load, builder.create_masked_store
        self.set_grid_dim, self.set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
        self.arguments: list[Argument] = []
        self.launched = False

    def given(self, value):
        """An argument of a launch, converted."""
        converted = self.convert(value)
        if self.launched:
            self.arguments, self.launched = [], False
        if isinstance(value, Tensor):
            self.arguments.append(argument(value))
            converted.handle.data = converted.handle.data + np.uint64(len(self.arguments) << TAG)
        return converted

    def begin(self, *grid: int) -> None:
        self.set_grid_dim(*grid)
        self.programs, self.launched = list(range(grid[0])), True
        if self.order == "shuffled":
            random.Random(0).shuffle(self.programs)
        elif self.order == "backwards":
            self.programs.reverse()

    def program(self, x: int, y: int, z: int) -> None:
        self.running = self.programs[x]
        self.set_grid_idx(self.running, y, z)

    def address(self, pointers, mask, write: bool):
        """The pointers without their tags. Raises AssertionError for an element that is not the tensor's, or that another program
        wrote, or that another program read where this one writes."""
        live = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        tags, address = pointers.data >> np.uint64(TAG), pointers.data & np.uint64((1 << TAG) - 1)
        for tag in np.unique(tags[live]):
            assert 1 <= tag <= len(self.arguments), f"{'store to' if write else 'load of'} no tensor"
            tensor, own, reader, writer = self.arguments[int(tag) - 1]
            step = (address[live & (tags == tag)] - np.uint64(tensor.data_ptr())).astype(np.int64)
            index, rest = np.divmod(step, tensor.element_size())
            named = f"{'store to' if write else 'load of'} tensor {int(tag)}, {tuple(tensor.shape)}, by program {self.running}"
            inside = (index >= 0) & (index < len(own)) & (rest == 0)
            assert inside.all() and own[index].all(), f"{named}: outside of it"
            assert np.isin(writer[index], (NOBODY, self.running)).all(), f"{named}: another program wrote there"
            if write:
                assert np.isin(reader[index], (NOBODY, self.running)).all(), f"{named}: another program read there"
                writer[index] = self.running
            else:
                reader[index] = np.where(np.isin(reader[index], (NOBODY, self.running)), self.running, SEVERAL)
        return interpreter.TensorHandle(address, pointers.dtype)

    def watched_load(self, pointers, mask, *rest):
        return self.load(self.address(pointers, mask, False), mask, *rest)

    def watched_store(self, pointers, value, mask, *rest):
        return self.store(self.address(pointers, mask, True), value, mask, *rest)


@contextmanager
def watched(order: str = "forwards"):
    """Within it every access of a kernel is checked, and the programs of a launch run in that order."""
    watch, builder = Watch(order), interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_implicit_cvt", watch.given)
        patch.setattr(builder, "create_masked_load", watch.watched_load)
        patch.setattr(builder, "create_masked_store", watch.watched_store)
        patch.setattr(builder, "set_grid_dim", watch.begin)
        patch.setattr(builder, "set_grid_idx", watch.program)
        yield


# Sequences and adapters without rows, rows without an adapter, rows behind the last offset, tiles that are not full.
ODD = dict(lengths=[5, 0, 1, 70, 3, 2], adapter=[2, 1, 0, 2, -1, 3], adapters=5, rows=84)
CLASSES = dict(lengths=[5, 0, 1, 40, 18], adapter=[2, 1, 0, 2, -1], adapters=3, rows=66)
FULL = dict(lengths=[3, 40], adapter=[1, 0], adapters=2)
NONE = dict(lengths=[3, 0], adapter=[-1, 1], adapters=2)
EMPTY = dict(lengths=[0], adapter=[0], adapters=2)
FP32, FP16 = dict(dtype=torch.float32), dict(dtype=torch.float16)
CASES = {
    "linear": (FULL, "linear", dict(k=41, n=23, rank=1, **FP32)),
    "linear, mixed ranks": (ODD, "linear", dict(k=24, n=72, rank=19, slices=3, mixed=True, **FP32)),
    "linear, exact": (ODD, "linear", dict(k=33, n=24, rank=8, slices=3, mixed=True, exact=True, **FP16)),
    "linear, chunks": (ODD, "linear", dict(k=8, n=8, rank=65, **FP16)),
    "linear, gelu": (ODD, "linear", dict(k=72, n=24, rank=9, mixed=True, gelu=True, **FP32)),
    "linear, gelu of nobody": (NONE, "linear", dict(k=20, n=24, rank=17, gelu=True, **FP16)),
    "linear, nobody": (NONE, "linear", dict(k=20, n=24, rank=17, **FP32)),
    "linear, no rows": (EMPTY, "linear", dict(k=20, n=24, rank=17, **FP32)),
    "attention": (CLASSES, "attention", dict(heads=3, width=5, **FP32)),
    "attention, half": (ODD, "attention", dict(heads=1, width=24, dropout=False, **FP16)),
    "attention, no rows": (EMPTY, "attention", dict(heads=2, width=5, **FP32)),
    "add_norm": (ODD, "add_norm", dict(width=23, weights=True, **FP32)),
    "add_norm, half": (ODD, "add_norm", dict(width=130, **FP16)),
    "add_norm, no rows": (EMPTY, "add_norm", dict(width=23, weights=True, **FP32)),
    "embed": (ODD, "embed", dict(width=23, vocabulary=9, **FP32)),
    "embed, half": (ODD, "embed", dict(width=130, vocabulary=9, dropout=False, **FP16)),
    "embed, no rows": (EMPTY, "embed", dict(width=23, vocabulary=9, **FP32)),
    "heads": (FULL, "heads", dict(width=41, labels=23, **FP32)),
    "heads, odd rows": (ODD, "heads", dict(width=16, labels=5, **FP16)),
    "heads, nobody": (NONE, "heads", dict(width=16, labels=5, **FP16)),
    "loss": (ODD, "loss", dict(labels=23, **FP32)),
    "dropout": (ODD, "dropout", dict(sites=3)),
    "dropout, no rows": (EMPTY, "dropout", dict(sites=3)),
    "loss, no rows": (EMPTY, "loss", dict(labels=23, **FP32)),
}
randn = torch.randn


def gapped(*shape: int) -> Tensor:
    """Random values with a gap behind each row, so that one element too many is none of the tensor's."""
    return randn(*shape[:-1], shape[-1] + 3)[..., : shape[-1]] if len(shape) > 1 else randn(*shape)


def run(name: str) -> list[Tensor]:
    """What the kernels of a case write."""
    batch, op, sizes = CASES[name]
    cu_seqlens = torch.tensor([0, *batch["lengths"]]).cumsum(0).to(torch.int32)
    adapter = torch.tensor(batch["adapter"], dtype=torch.int32)
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segments, "CHUNK", 16)
        patch.setattr(torch, "randn", gapped)
        lists = with_work(make_segments(cu_seqlens, adapter, batch["adapters"], rows=batch.get("rows")))
        return getattr(compiled, f"run_{op}")(lists, **sizes)


@pytest.mark.parametrize("name", CASES)
def test_programs_touch_their_own_elements_and_their_order_does_not_matter(name):
    results = []
    for order in ("forwards", "backwards", "shuffled"):
        with watched(order):
            results.append(run(name))
    for got in results:
        assert all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(got, results[0], strict=True))


# Of each module masks that are too wide, the words of the report, and the case that finds them.
BROKEN = {
    "shrink, contraction": ("lora_shrink", "m_k = o_k < K\n", "m_k = o_k < K + 1\n", "outside", "linear"),
    "order, rows": ("lora_tiles", "order_ptr + o_i, mask=m_t, other=0)", "order_ptr + o_i)", "outside", "linear"),
    "shrink, rows": ("lora_shrink", "bitcast=True), mask=m_t)", "bitcast=True))", "outside|another program", "linear"),
    "shrink, ranks": ("lora_shrink", "o_c < tl.where(g >= 0, C, 0)", "o_c < tl.where(g >= 0, C + 1, 0)", "outside", "linear"),
    "shrink, gelu": ("lora_shrink", "m_x)\n        if", "m_x | True)\n        if", "another program", "linear, gelu"),
    "expand, columns": ("lora_tiles", "m_c = o_c < C\n    o_n", "m_c = o_c <= C\n    o_n", "outside", "linear"),
    "expand, rows": ("lora_tiles", "mask=m_t[:, None] & m_r[None, :]", "mask=m_r[None, :]", "outside", "linear"),
    "reduce, columns": ("lora_tiles", "m_c, m_r = o_c < C,", "m_c, m_r = o_c <= C,", "outside", "linear"),
    "attention, rows": ("attention_triton", "(o_t < end)", "(o_t < end + 99)", "another program", "attention"),
    "attention, heads": ("attention_triton", " & (i_h < heads)", "", "outside", "attention"),
    "attention, width": ("attention_triton", "= o_d < D", "= o_d <= D", "outside", "attention"),
    "attention, tiles": ("attention_triton", "i_n < tiles", "i_n <= tiles", "outside", "attention"),
    "attention, behind": ("attention_triton", "+ S) + last - i", "+ S)", "another program", "attention"),
    "long attention, keys": ("attention_long_triton", "m_k = o_k < end", "m_k = o_k < end + 99", "outside", "attention"),
    "long attention, width": ("attention_long_triton", "o_d, o_d < D", "o_d, o_d <= D", "another program", "attention"),
    "add_norm, width": ("add_norm_triton", "o_h < H\n", "o_h <= H\n", "outside", "add_norm"),
    "embed, width": ("embed_triton", "m_t, m_h = o_t < T, o_h < H", "m_t, m_h = o_t < T, o_h <= H", "outside", "embed"),
    "embed, positions": ("embed_triton", "tl.minimum(position + first, P - 1)", "position + first", "outside", "embed"),
    "heads, outputs": ("adapter_linear_triton", "m_n, m_t = o_n < N", "m_n, m_t = o_n <= N", "outside", "heads"),
    "dropout, rows": (
        "dropout_triton",
        "m_t = o_t < T\n    g = tl.zeros",
        "m_t = o_t <= T\n    g = tl.zeros",
        "outside",
        "dropout",
    ),
    "dropout, adapters": ("dropout_triton", "(g >= 0) & (g < G)", "g < G", "outside", "dropout"),
    "loss, rows": ("token_loss_triton", "o_i < tl.load(ends_ptr + G - 1)", "o_i >= 0", "outside", "loss"),
    "loss, sums": ("token_loss_triton", "m_t = o_i < last", "m_t = o_i >= 0", "outside", "loss"),
    "loss, labels": ("token_loss_triton", "(o_c < C)", "(o_c <= C)", "outside", "loss"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_mask_that_is_too_wide_is_found(name, tmp_path, monkeypatch):
    module, old, new, words, case = BROKEN[name]
    source = (Path(kernels.__file__).parent / f"{module}.py").read_text(encoding="utf-8")
    assert old in source
    (tmp_path / "broken.py").write_text(source.replace(old, new), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("kloss.kernels.broken", tmp_path / "broken.py")
    broken = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "kloss.kernels.broken", broken)
    spec.loader.exec_module(broken)
    launchers = {"lora_shrink": ["shrink"], "lora_tiles": ["expand", "reduce"]}.get(module)
    if launchers:
        for launcher in launchers:
            monkeypatch.setattr(lora_triton, launcher, getattr(broken, launcher))
    else:
        user = compiled.attention_triton if module == "attention_long_triton" else compiled
        monkeypatch.setattr(user, module, broken)
    with watched(), pytest.raises(InterpreterError, match=words):
        run(case)
