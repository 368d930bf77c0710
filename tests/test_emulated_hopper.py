"""csrc/cuda/linear.cu on an emulated Hopper (tests/hopper): its values, and that it ends, whatever the order of its threads."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import assert_no_worse, fuzz_examples
from hypothesis import given, settings
from hypothesis import strategies as st

from kloss.kernels import Dropout, cuda_library, make_segments, row_keys
from kloss.kernels.dropout import keep_mask, stream_keys
from kloss.kernels.segments import with_work

HELD_BACK = sum(1 << warp for warp in range(12) if warp % 4)  # all warps but the first of each warpgroup
ROOT = Path(__file__).parents[1]
HERE, CUDA = Path(__file__).parent / "hopper", ROOT / "csrc" / "cuda"
MEMORY = {  # what a block's threads share has another place on a CPU
    "extern __shared__ uint8_t memory[];": "uint8_t* memory = emulated::block().memory;",
    "__shared__ uint64_t barriers[2 * B::STAGES];": "auto* barriers = (uint64_t*)(emulated::block().memory + emulated::MEMORY);",
}


def build(folder: Path, changes: dict[str, str]) -> ctypes.CDLL:
    """The kernel compiled for a CPU. changes: pieces of linear.cu, each there once, and what stands for them."""
    (folder / "cuda").mkdir(parents=True)
    shutil.copytree(ROOT / "csrc" / "shared", folder / "shared")
    for name in ("linear.cu", "linear.cuh", "halves.cuh"):
        text = (CUDA / name).read_text(encoding="utf-8")
        for old, new in (MEMORY | changes).items() if name == "linear.cu" else ():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "cuda" / name).write_text(text, encoding="utf-8")
    real = (CUDA / "hopper.cuh").read_text(encoding="utf-8")
    matrix = re.search(r"__device__ __forceinline__ uint64_t matrix\(.*?\n}\n", real, re.DOTALL)
    (folder / "matrix.h").write_text(f"namespace kloss {{\n{matrix[0]}}}\n", encoding="utf-8")
    for empty in ("cuda/hopper.cuh", "cuda/entry.cuh", "cuda_bf16.h", "cuda_fp16.h"):
        (folder / empty).write_text("#pragma once\n", encoding="utf-8")
    options = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fno-strict-aliasing", "-w", f"-I{folder}", f"-I{HERE}"]
    subprocess.run(["g++", *options, HERE / "run.cpp", "-o", folder / "linear.so"], check=True)
    library = ctypes.CDLL(str(folder / "linear.so"))
    library.kloss_linear.argtypes = cuda_library.ARGUMENTS["kloss_linear"]
    library.emulate.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_uint32]
    library.failure.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("hopper"), {})


class Case:
    """Both products of a layer: arguments, and what plain torch makes of them. Rows lie in order."""

    def __init__(self, lengths, adapter, adapters, k, n, rank, slices=1, p=0.0, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(0)

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(dtype)

        offsets = torch.tensor([0, *lengths]).cumsum(0).int()
        segments = make_segments(offsets, torch.tensor(adapter, dtype=torch.int32), adapters)
        assert segments.sorted
        rows, self.adapter, self.slices = int(offsets[-1]), segments.row_adapter, slices
        self.tiles = with_work(segments._replace(work=None)).work.tiles_64
        self.x, self.dy, self.bias, self.weight = normal(rows, k), normal(rows, n), normal(n), normal(n, k, scale=k**-0.5)
        self.a, self.b = normal(adapters, slices * rank, k, scale=rank**-0.5), normal(adapters, n, rank, scale=rank**-0.5)
        self.s, self.ds = normal(rows, slices * rank), normal(rows, slices * rank)
        keys = row_keys(torch.full((len(lengths),), 5), torch.arange(len(lengths)), offsets)
        seed, self.p = torch.arange(adapters) * 7 + 3, torch.full((adapters,), p) if p else None
        self.keys = stream_keys(seed[self.adapter.long()], keys, 3) if p else None
        dropout = Dropout(torch.full((adapters,), p), seed, keys, 3, self.adapter)
        self.kept, scale = keep_mask(dropout, torch.arange(k, dtype=torch.int32))
        self.scale = scale.reshape(-1, 1)

    def wanted(self, dtype):
        """y and dx in a dtype."""
        x, dy, bias, weight, a, b, s, ds = (
            t.to(dtype) for t in (self.x, self.dy, self.bias, self.weight, self.a, self.b, self.s, self.ds)
        )
        y, dx = torch.zeros(len(x), len(weight), dtype=dtype), torch.zeros_like(x)
        for g in range(len(a)):
            own = self.adapter == g
            parts = zip(s[own].chunk(self.slices, 1), b[g].chunk(self.slices), strict=True)
            y[own] = torch.cat([part @ block.t() for part, block in parts], 1)
            dx[own] = ds[own] @ a[g]
        dx = torch.where(self.kept, dx * self.scale.to(dtype), 0) if self.p is not None else dx
        return y + bias + x @ weight.t(), dx + dy @ weight

    def run(self, kernel, monkeypatch, *, seed=0, clusters=1, late=False, slow=0):
        """What the kernel makes of them. Fails with its words where it does not end."""

        def launch(name, device, *arguments):
            kernel.emulate(seed, 2 * clusters, late, slow)
            code, words = getattr(kernel, name)(*arguments, None), kernel.failure().decode()
            if code or words:
                raise RuntimeError(words or f"code {code}")

        monkeypatch.setattr(cuda_library, "_launch", launch)
        wide = [t.new_full((len(t) + 8, t.shape[1] + 8), torch.nan) for t in (self.dy, self.x)]
        y, dx = (t[:-8, :-8] for t in wide)
        cuda_library.linear(self.x, self.weight, self.s, self.b, self.bias, y, self.tiles, slices=self.slices)
        cuda_library.linear(self.dy, self.weight, self.ds, self.a, None, dx, self.tiles, self.p, self.keys, turned=True)
        if not all(t[-8:].isnan().all() and t[:, -8:].isnan().all() for t in wide):
            raise RuntimeError("written outside")
        return y, dx

    def check(self, made):
        for mine, plain, oracle in zip(made, self.wanted(self.x.dtype), self.wanted(torch.float64), strict=True):
            assert_no_worse(mine, plain, oracle, self.adapter % (int(self.adapter.max()) + 2))


def same_bits(made, again):
    return all(torch.equal(one, other) for one, other in zip(made, again, strict=True))


CASES = {
    "one tile": dict(lengths=[5], adapter=[0], adapters=1, k=64, n=128, rank=16),
    "two adapters in a block": dict(lengths=[40, 100], adapter=[0, 1], adapters=3, k=128, n=256, rank=32, p=0.5),
    "rows without an adapter": dict(lengths=[66, 20], adapter=[1, -1], adapters=2, k=192, n=256, rank=48),
    "slices": dict(lengths=[40, 100], adapter=[0, 1], adapters=2, k=128, n=384, rank=32, slices=3, p=0.5, dtype=torch.float16),
    "more ranks than a step": dict(lengths=[64, 10], adapter=[0, 1], adapters=2, k=72, n=136, rank=80, p=0.1),
    "several items of a cluster": dict(lengths=[150, 130], adapter=[0, 1], adapters=2, k=320, n=512, rank=16, p=0.5),
}


@pytest.mark.parametrize("name", CASES)
def test_values(name, kernel, monkeypatch):
    case = Case(**CASES[name])
    made = case.run(kernel, monkeypatch)
    case.check(made)
    again = case.run(kernel, monkeypatch, seed=1, clusters=3, late=True)
    assert same_bits(made, again)


# Two of four warpgroups have no rows, and many steps to wait for the others.
LAST = dict(lengths=[70], adapter=[0], adapters=1, k=1280, n=256, rank=32, p=0.5)


@pytest.mark.parametrize("slow", [0, HELD_BACK, 1, 0xF0, 0xF00], ids=["none", "held back", "loads", "first half", "second half"])
@pytest.mark.parametrize("late", [False, True])
def test_any_order_of_threads_gives_the_same_bits(late, slow, kernel, monkeypatch):
    for shape in (LAST, CASES["several items of a cluster"]):
        case = Case(**shape)
        made = case.run(kernel, monkeypatch)
        for seed in (1, 2) if shape is LAST else (1,):
            again = case.run(kernel, monkeypatch, seed=seed, late=late, slow=slow)
            assert same_bits(made, again)
        case.check(made)


@settings(max_examples=fuzz_examples(12), deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.tuples(st.sampled_from([0, 1, 2, -1]), st.sampled_from([1, 63, 64, 65, 130])), min_size=1, max_size=5),
    st.sampled_from([8, 72, 200, 320]), st.sampled_from([(1, 8), (1, 136), (1, 512), (3, 384), (3, 768)]),
    st.sampled_from([16, 48, 80, 128]), st.sampled_from([0.0, 0.5]), st.integers(1, 4), st.booleans(), st.integers(0, 2**12 - 1),
)  # fmt: skip
def test_any_shape_and_order(kernel, sequences, k, widths, rank, p, clusters, late, slow):
    """slow: warps."""
    adapter, lengths = zip(*sorted(sequences, key=lambda pair: pair[0] % 4), strict=True)
    case = Case(lengths, adapter, 3, k, widths[1], rank, widths[0], p)
    with pytest.MonkeyPatch.context() as patch:
        made = case.run(kernel, patch)
        again = case.run(kernel, patch, seed=1, clusters=clusters, late=late, slow=slow)
    case.check(made)
    assert same_bits(made, again)


def test_a_neighbour_that_is_nan_changes_no_bit(kernel, monkeypatch):
    case = Case(**CASES["two adapters in a block"])
    clean, own = case.run(kernel, monkeypatch), case.adapter == 1
    for rows in (case.x, case.dy, case.s, case.ds):
        rows[~own] = torch.nan
    case.a[0] = case.b[0] = torch.nan
    for one, other in zip(clean, case.run(kernel, monkeypatch), strict=True):
        assert torch.equal(one[own], other[own]) and other[~own].isnan().all()


# A fault, and what is seen of it: words of the run's failure, or "values".
FAULTS = {
    "warps without rows by themselves": (
        {"    if (warp == 0)\n      for (int s = at;": "      for (int s = at;"},
        "nobody can go on",
    ),
    "threads without rows by themselves": ({"& 1), __syncwarp(), release(s)": "& 1), release(s)"}, "nobody can go on"),
    "a stage that is being read": (
        {"      finish<1>();\n      release(at - 1);": "      release(at - 1);\n      finish<1>();"},
        "values",
    ),
    "a stage released too early": (
        {"      finish<1>();\n      release(at - 1);": "      finish<1>();\n      release(at);"},
        "nobody",
    ),
    "products that nobody awaits": ({"      finish<1>();\n": ""}, "values"),
    "a last product that nobody awaits": ({"    finish<0>();\n    release(at - 1);": "    release(at - 1);"}, "values"),
    "a stage free for one warpgroup": (
        {"init(block.empty(s), 2 * CLUSTER)": "init(block.empty(s), CLUSTER)"},
        "values|arrivals|nobody",
    ),
    "boxes that nobody awaits": ({"expect(full, B::STAGE)": "expect(full, B::STAGE - 2 * BOX)"}, "values|arrivals|nobody"),
    "the weight for one of two": ({"(uint16_t)((1 << CLUSTER) - 1)": "(uint16_t)0"}, "nobody"),
    "lines read before they are written": ({"    __syncwarp();\n    uint4 eight[4];": "    uint4 eight[4];"}, "values"),
    "a row too many": ({"row + 4 * r < last": "row + 4 * r <= last"}, "outside"),
    "a column too many": ({"column < l.width) *(uint4*)": "column < l.width + 8) *(uint4*)"}, "outside"),
    "a mask of the next item": ({"    ahead = 0;\n    filled()": "    ahead = 1;\n    filled()"}, "values|nobody"),
    "an adapter's term in the other's round": ({"now.round < 0 ? now.rounds : now.round": "0"}, "values|nobody"),
}
ONE_TYPE = {"  if (!bf16) function = turned ? choose<FPPair, true> : choose<FPPair, false>;\n": ""}  # compiles in half the time


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name, tmp_path, monkeypatch):
    changes, seen = FAULTS[name]
    broken = build(tmp_path / "hopper", changes | ONE_TYPE)

    def what_is_seen():
        for shape in (LAST, CASES["two adapters in a block"], CASES["several items of a cluster"]):
            case = Case(**shape)
            for seed in range(2):
                for late, slow in ((False, 0), (True, 0), (False, HELD_BACK), (True, 1)):
                    try:
                        case.check(case.run(broken, monkeypatch, seed=seed, late=late, slow=slow))
                    except AssertionError:
                        yield "values"
                    except RuntimeError as error:
                        yield str(error)

    assert re.search(seen, next(what_is_seen(), "nothing"))
