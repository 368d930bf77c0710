"""Ahead-of-time compilation without a GPU: which launches an op makes, and what the compiler makes of each.

The launchers of the op itself run on tensors without memory, their kernels replaced by recorders; so what is
compiled here is what would be launched, specialised as Triton's JIT specialises (divisibility by 16, integers
equal to 1, None).
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kloss.kernels import lora_tiles, multi_lora, tuned
from kloss.kernels.segments import CHUNK, LONG_TILE, SHORT_TILE, tile_capacity

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory a block may have, and a multiprocessor has (CUDA C++ Programming Guide, compute capabilities).
BLOCK_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
CHIP_SHARED = {80: 167_936, 90: 233_472, 100: 233_472}
RESERVED_SHARED, CHIP_REGISTERS, CHIP_WARPS, CHIP_BLOCKS = 1024, 65_536, 64, 32
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}


class LaunchRecord(NamedTuple):
    """One launch. kernel: name in its module. arguments: name -> tensor or number, launch options among
    them.
    """

    kernel: str
    arguments: dict
    programs: int


class Resources(NamedTuple):
    """What a kernel needs. registers: of a thread. spills, shared: bytes. tensor_core: instruction ->
    occurrences in PTX.
    """

    registers: int
    spills: int
    shared: int
    tensor_core: dict[str, int]
    warps: int
    blocks_per_chip: int


class _Recorder:
    def __init__(self, name: str, launches: list[LaunchRecord]):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append(LaunchRecord(self.name, arguments, grid[0]))


@contextmanager
def recorded(arch: int) -> Iterator[list[LaunchRecord]]:
    """Within it kernels are not launched but listed, as they would be on a GPU of that architecture."""
    launches: list[LaunchRecord] = []
    kernels = {name: _Recorder(name, launches) for name in vars(lora_tiles) if name.endswith("_kernel")}
    with mock.patch.multiple(lora_tiles, **kernels), mock.patch.object(tuned, "arch_of", lambda device: arch):
        yield launches


def multi_lora_launches(
    arch: int, *, rows: int, adapters: int, k: int, n: int, rank: int, slices: int = 1, dropout: bool = True,
    exact: bool = False, dtype: torch.dtype = torch.bfloat16, master: torch.dtype | None = None, mixed: bool = False,
) -> list[LaunchRecord]:  # fmt: skip
    """The launches of forward and backward of `multi_lora_linear`. master: dtype of lora_a and lora_b. mixed:
    ranks given.
    """

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight, bias, dy = empty(rows, k), empty(n, k), empty(n), empty(rows, n)
    lora_a = empty(adapters, slices * rank, k, dtype=master or dtype)
    lora_b = empty(adapters, n, rank, dtype=master or dtype)
    order, row_key, seed = (empty(size, dtype=torch.int64) for size in (rows, rows, adapters))
    scaling, p = (empty(adapters, dtype=torch.float32) for _ in range(2))
    ranks = empty(adapters, dtype=torch.int64) if mixed else None
    short, long = (empty(tile_capacity(rows, adapters, size), 3, dtype=torch.int32) for size in (SHORT_TILE, LONG_TILE))
    chunks = empty(adapters + rows // CHUNK, 4, dtype=torch.int32)
    lists = order, short, long, chunks, empty(adapters + 1, dtype=torch.int32), ranks
    random = (p, seed, row_key) if dropout else (None, None, None)
    with recorded(arch) as launches:
        _, s, keys = multi_lora._forward(x, weight, bias, lora_a, lora_b, scaling, *lists, *random, 3, slices, exact)
        multi_lora._backward(dy, x, weight, lora_a, lora_b, scaling, s, keys, *lists, random[0], slices, exact, True, True, True)
    return launches


def specialise(launch: LaunchRecord) -> tuple[dict, dict, dict, dict]:
    """Signature, constants, attributes and options of a launch, as the JIT derives them."""
    options = {name: launch.arguments[name] for name in ("num_warps", "num_stages") if name in launch.arguments}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(getattr(lora_tiles, launch.kernel).params):
        name, value = parameter.name, launch.arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name] = "constexpr"
            constants[(index,)] = value
        else:
            signature[name] = "i64" if value >= 1 << 31 else "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes, options


def identity(launch: LaunchRecord) -> str:
    """Two launches with the same identity run the same compiled kernel."""
    return repr((launch.kernel, *specialise(launch)))


def compile_launch(launch: LaunchRecord, arch: int) -> Resources:
    """Compile one launch for an architecture (80, 90, 100); Triton's own cache keeps the result."""
    signature, constants, attributes, options = specialise(launch)
    source = ASTSource(getattr(lora_tiles, launch.kernel), signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = _usage(compiled.asm["cubin"])
    found: dict[str, int] = {}
    for name in TENSOR_CORE.findall(compiled.asm["ptx"]):
        found[name] = found.get(name, 0) + 1
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    blocks = min(
        CHIP_REGISTERS // (-(-registers // 8) * 8 * warps * 32), CHIP_SHARED[arch] // (shared + RESERVED_SHARED),
        CHIP_WARPS // warps, CHIP_BLOCKS,
    )  # fmt: skip
    return Resources(registers, spills, shared, found, warps, blocks)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes it keeps in local memory, read by the `cuobjdump` that Triton
    brings.
    """
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    if not found:
        raise RuntimeError(f"no resource usage in the output of {tool.name}: {done.stdout[:200]}{done.stderr[:200]}")
    return int(found[1]), int(found[2]) + int(found[3])
