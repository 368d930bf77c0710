"""csrc/cuda compiles for every chip where nvcc is, without spills; and Python and C agree on the entry points."""

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton

from kloss.kernels import cuda_library

ROOT = Path(__file__).resolve().parents[1]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
CHIPS = ("sm_80", "sm_90a", "sm_100")
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
KERNELS = {"adamw": {"squares", "finish", "update"}, "lists": {"phases", "entries"}, "spans": {"spans"}, "linear": {"linear"}}
COUNTS = {"adamw": 17, "lists": 2, "spans": 1, "linear": 8}  # types of gradients and copies, packed or not; types, widths, ways
MOST_REGISTERS = {"linear": 168}  # as many as its 384 threads can have; of the others 64


def tool(*arguments: str) -> str:
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([program, *arguments], capture_output=True, text=True, check=True).stdout


def kernels_of(listing: str, pattern: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """(kernel, its template arguments) -> what `pattern` finds behind its mangled name."""
    found = re.findall(rf"_ZN\w*?\d([a-z]+)_kernel(\w*){pattern}", listing, re.DOTALL)
    return {(name, arguments): tuple(rest) for name, arguments, *rest in found}


def compile_all(folder: Path) -> dict[tuple[str, str], str]:
    """(source, chip) -> its cubin."""

    def compiled(job):
        source, chip = job
        target = folder / f"{source.stem}.{chip}.cubin"
        command = [NVCC, "-O3", "-std=c++17", "-fmad=false", "-cubin", f"-arch={chip}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (source.stem, chip), str(target)

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(compiled, [(source, chip) for source in SOURCES for chip in CHIPS]))


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_every_chips_code(tmp_path):
    """One test, so that one process compiles: no spills, 16 bytes at once where rows are packed, a barrier before each phase."""
    cubins = compile_all(tmp_path)
    for (source, chip), cubin in cubins.items():
        used = kernels_of(tool("-res-usage", cubin), r":\s*REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)")
        assert {name for name, _ in used} == KERNELS[source]
        assert len(used) == COUNTS[source]
        for kernel, (registers, stack, local) in used.items():
            given = source, chip, kernel, registers, stack, local
            assert int(registers) <= MOST_REGISTERS.get(source, 64) and stack == local == "0", given
    for chip in CHIPS:
        code = kernels_of(tool("-sass", cubins["adamw", chip]), r"\n(.*?)(?=Function :|\Z)")
        updates = {arguments: body for (name, arguments), (body,) in code.items() if name == "update"}
        assert len(updates) == 10
        for arguments, body in updates.items():
            wide = [len(re.findall(rf"{kind}\S*\.128", body)) for kind in ("LDG", "STG")]
            assert min(wide) >= 3 if "Li4E" in arguments else max(wide) == 0, (chip, arguments, wide)
        code = kernels_of(tool("-sass", cubins["lists", chip]), r"\n(.*?)(?=Function :|\Z)")
        (body,) = next(rest for (name, _), rest in code.items() if name == "phases")
        assert len(re.findall(r"\bBAR\.SYNC", body)) >= 6, chip  # the first one guards nothing
    code = kernels_of(tool("-sass", cubins["linear", "sm_90a"]), r"\n(.*?)(?=Function :|\Z)")
    assert len(code) == COUNTS["linear"]
    for arguments, (body,) in code.items():
        counts = {word: body.count(word) for word in ("WARPGROUP.DEPBAR.LE gsb0, 0x1", "MULTICAST", "MEMBAR.ALL.GPU")}
        waits, boxes, fences = counts.values()
        assert waits == 1 and boxes >= 2, (arguments, counts)  # products of two steps are under way; a box goes to both CTAs
        assert fences == 2, (arguments, counts)  # where a cluster begins and ends: within the steps they took half of the time


def test_python_gives_each_entry_point_its_arguments():
    text = "".join(source.read_text(encoding="utf-8") for source in SOURCES)
    kinds = {"int64_t": "c_long", "int": "c_int", "double": "c_double"}
    for name, arguments in cuda_library.ARGUMENTS.items():
        declared = re.search(rf"{name}\((.*?)\)", text, re.DOTALL)[1].split(",")
        for argument, given in zip(declared, arguments, strict=True):
            kind, _, _ = argument.strip().removeprefix("const ").rpartition(" ")
            wanted = (
                "LP_c_long" if kind == "int64_t*" else "LP_c_void_p" if kind == "void* const*" else kinds.get(kind, "c_void_p")
            )
            assert given.__name__ == wanted, (name, argument)


@pytest.fixture
def no_gpu(monkeypatch):
    """The library with tensors on the CPU in place of a GPU's: each launch fails before anything reads a pointer."""
    if not cuda_library._files() or torch.cuda.is_available():
        pytest.skip("built without nvcc, or there is a GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))


def test_a_failed_launch_raises(no_gpu):
    floats, longs, ints = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    row, on = torch.zeros(2), torch.ones(2, dtype=torch.bool)
    adamw = floats, floats, floats, floats, longs, row, 4, row, row, row, on, 0.9, 0.999, 1e-8
    for work in (None, floats.bfloat16()):
        with pytest.raises(RuntimeError, match=r"kloss_adamw: CUDA error \d+"):
            cuda_library._adamw(*adamw, work, 0, row)
    with pytest.raises(RuntimeError, match=r"kloss_span_counts: CUDA error \d+"):
        cuda_library._span_counts(longs, longs, ints, longs, None, None, torch.zeros(4, 3, dtype=torch.int64))
    tiles = torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 3, dtype=torch.int32), torch.zeros(2, 4, dtype=torch.int32)
    rows = torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.int64)
    head = ints, ints[:2], longs, longs, False, *rows, torch.zeros(3, dtype=torch.int64), *tiles, ints
    with pytest.raises(RuntimeError, match=r"kloss_work_lists: CUDA error \d+"):
        cuda_library._work_lists(*head, tiles[0], None, None, tiles[1], rows[1], rows[0])


def test_what_the_library_would_trust_is_checked(no_gpu):
    floats, longs, row = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    good = dict(
        param=floats, grad=floats, exp_avg=floats, exp_avg_sq=floats, step=longs, lr=row, tail=8, tail_lr=row,
        weight_decay=row, max_norm=row, active=torch.ones(2, dtype=torch.bool), beta_1=0.9, beta_2=0.999, eps=1e-8, work=None,
        variant=0, norms=row,
    )  # fmt: skip
    for change, message in (
        (dict(grad=floats[:1]), "grad must be"),
        (dict(grad=floats.double()), "grad must be"),
        (dict(exp_avg=torch.zeros(8, 2).t()), "exp_avg must be"),
        (dict(exp_avg_sq=floats.half()), "exp_avg_sq must be"),
        (dict(step=row), "step must be"),
        (dict(lr=row[:1]), "lr must be"),
        (dict(tail_lr=row[:1]), "tail_lr must be"),
        (dict(tail=9), "tail must be a column, or 8, not 9"),
        (dict(work=floats), "work must not be param"),
        (dict(work=floats.half(), grad=floats.bfloat16()), "work must have grad's type"),
        (dict(active=row), "active must be"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda_library._adamw(**good | change)
    counts, ints = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(ValueError, match="gold must be"):
        cuda_library._span_counts(longs, longs[:1], ints, longs, None, None, counts)
    with pytest.raises(ValueError, match="belong together"):
        cuda_library._span_counts(longs, longs, ints, longs, longs, None, counts)


def test_what_the_linear_would_trust_is_checked(no_gpu):
    T, K, N, G, R = 70, 64, 384, 3, 16
    good = dict(
        x=torch.zeros(T, K), weight=torch.zeros(N, K), s=torch.zeros(T, 3 * R), factor=torch.zeros(G, N, R), bias=torch.zeros(N),
        y=torch.zeros(T, N),
    )  # fmt: skip
    good = {name: tensor.bfloat16() for name, tensor in good.items()} | {
        "tiles": torch.zeros(4, 3, dtype=torch.int32),
        "slices": 3,
    }
    with pytest.raises(RuntimeError, match=r"kloss_linear: CUDA error \d+"):
        cuda_library.linear(**good)
    turned = good | {"weight": good["weight"].t().contiguous(), "factor": torch.zeros(G, 3 * R, N).bfloat16(), "slices": 1}
    with pytest.raises(RuntimeError, match=r"kloss_linear: CUDA error \d+"):
        cuda_library.linear(**turned, turned=True)
    narrow = {"weight": torch.zeros(192, K), "factor": torch.zeros(G, 192, R), "bias": torch.zeros(192), "y": torch.zeros(T, 192)}
    narrow = {name: tensor.bfloat16() for name, tensor in narrow.items()}
    for change, message in (
        ({"weight": good["weight"].t()}, "weight must be"),
        ({"weight": good["weight"].half()}, "weight must be"),
        ({"s": good["s"][:, ::2]}, "s must be"),
        ({"factor": good["factor"][:, :-8]}, "factor must be"),
        ({"factor": good["factor"].transpose(1, 2).contiguous().transpose(1, 2)}, "factor must be"),
        ({"x": torch.zeros(T, K + 1).bfloat16()[:, :K]}, "x must be"),
        ({"y": torch.zeros(T, N + 4).bfloat16()[:, 4:]}, "y must be"),
        ({"bias": good["bias"][1:]}, "bias must be"),
        ({"tiles": good["tiles"].long()}, "tiles must be"),
        ({"p": torch.zeros(G + 1)}, "p must be"),
        ({"keys": torch.zeros(T)}, "keys must be"),
        (narrow, "192 columns and 3 slices do not fit"),
        ({"s": torch.zeros(T, 24).bfloat16(), "factor": torch.zeros(G, N, 8).bfloat16()}, "rank 8"),
    ):
        with pytest.raises(ValueError, match=message):
            cuda_library.linear(**good | change)
