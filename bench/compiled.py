"""Compile every Triton kernel at every default configuration without a GPU, and print what each needs; then the roofline.

    python -m bench.compiled [--arch 80 90 100] [--jobs N]

The exit code is 1 if a kernel spills on sm_90, needs more shared memory than the chip has, or multiplies 16-bit operands without
tensor cores. Roofline times are estimates: no kernel is faster, most are slower.

The op's own launchers run on tensors without memory, their kernels replaced by recorders. So what is compiled is what would be
launched, specialised as Triton's JIT specialises: divisibility by 16, integers equal to 1, None.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kloss.kernels import lora_tiles, lora_triton, tuned
from kloss.kernels.lora_torch import Backward, Forward
from kloss.kernels.segments import CHUNK, LONG_TILE, SHORT_TILE, tile_capacity

from . import cases

ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory a block may have, and a multiprocessor has (CUDA C++ Programming Guide, compute capabilities).
BLOCK_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
CHIP_SHARED = {80: 167_936, 90: 233_472, 100: 233_472}
RESERVED_SHARED, CHIP_REGISTERS, CHIP_WARPS, CHIP_BLOCKS = 1024, 65_536, 64, 32
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}


class Launch(NamedTuple):
    """One launch of a kernel. kernel: its name. arguments: name -> tensor, number or launch option."""

    kernel: str
    arguments: dict


class Resources(NamedTuple):
    """What a kernel needs."""

    registers: int  # of a thread
    spills: int  # bytes
    shared: int  # bytes of a block
    tensor_core: dict[str, int]  # instruction -> occurrences in PTX
    warps: int  # of a block
    blocks_per_chip: int  # that fit on one multiprocessor


class _Recorder:
    def __init__(self, kernel: str, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda **arguments: self.launches.append(Launch(self.kernel, arguments))


@contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """Within it kernels are not launched but listed, as they would be on a GPU of that architecture."""
    launches: list[Launch] = []
    kernels = {name: _Recorder(name, launches) for name in vars(lora_tiles) if name.endswith("_kernel")}
    with mock.patch.multiple(lora_tiles, **kernels), mock.patch.object(tuned, "arch_of", lambda device: arch):
        yield launches


def launches_of(
    arch: int, *, k: int, n: int, rank: int, slices: int = 1, dropout: bool = True, exact: bool = False,
    dtype: torch.dtype = torch.bfloat16, lora_dtype: torch.dtype | None = None, mixed: bool = False,
) -> dict[str, Launch]:  # fmt: skip
    """Different launches of forward and backward of the multi-adapter linear at the study's batch, by identity.

    lora_dtype: of A and B; None: dtype.
    mixed: whether adapters have ranks of their own.
    """
    adapters, rows = cases.STUDY.adapters, cases.STUDY.total

    def empty(*shape, dtype=dtype):
        return torch.empty(*shape, dtype=dtype, device="meta")

    x, weight, bias, dy = empty(rows, k), empty(n, k), empty(n), empty(rows, n)
    lora_a = empty(adapters, slices * rank, k, dtype=lora_dtype or dtype)
    lora_b = empty(adapters, n, rank, dtype=lora_dtype or dtype)
    scaling, p = (empty(adapters, dtype=torch.float32) for _ in range(2))
    order, row_key, seed = (empty(size, dtype=torch.int64) for size in (rows, rows, adapters))
    ranks = empty(adapters, dtype=torch.int64) if mixed else None
    tiles = [empty(tile_capacity(rows, adapters, size), 3, dtype=torch.int32) for size in (SHORT_TILE, LONG_TILE)]
    lists = [order, *tiles, empty(adapters + rows // CHUNK, 4, dtype=torch.int32), empty(adapters + 1, dtype=torch.int32)]
    lists += [p, seed, row_key] if dropout else []
    with recorded(arch) as launches:
        _, s, keys = lora_triton.forward(Forward(x, weight, bias, lora_a, lora_b, scaling, ranks, lists, 3, slices, exact))
        saved = x, weight, lora_a, lora_b, scaling, s, keys
        lora_triton.backward(Backward(dy, *saved, ranks, lists, slices, exact, need_x=True, need_a=True, need_b=True))
    return {repr((launch.kernel, *specialise(launch))): launch for launch in launches}


def variants() -> Iterator[dict]:
    """Arguments of `launches_of` that between them reach every kernel of the default table."""
    qkv, square = dict(k=768, n=2304, slices=3), dict(k=768, n=768)
    for rank in cases.RANKS:
        for k in cases.WIDTHS:
            for n in cases.WIDTHS:
                yield dict(k=k, n=n, rank=rank, exact=True)
        yield dict(qkv, rank=rank, exact=True)
    for rank in (cases.RANKS[0], *cases.STUDY_RANKS):
        for mixed in (False, True):
            yield dict(square, rank=rank, mixed=mixed)
            yield dict(qkv, rank=rank, mixed=mixed)
    for rank in (32, 256):
        yield dict(square, rank=rank, exact=True, mixed=True)
        yield dict(qkv, rank=rank, exact=True, mixed=True)
        for dropout in (False, True):
            yield dict(qkv, rank=rank, exact=True, dropout=dropout, mixed=True, lora_dtype=torch.float32)
        for exact in (True, False):
            yield dict(square, rank=rank, exact=exact, dtype=torch.float32)
    yield dict(square, rank=32, exact=True, dtype=torch.float16)


def specialise(launch: Launch) -> tuple[dict, dict, dict, dict]:
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


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile one launch for an architecture; Triton's own cache keeps the result."""
    signature, constants, attributes, options = specialise(launch)
    source = ASTSource(getattr(lora_tiles, launch.kernel), signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spills = _usage(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    blocks = min(
        CHIP_REGISTERS // (-(-registers // 8) * 8 * warps * 32), CHIP_SHARED[arch] // (shared + RESERVED_SHARED),
        CHIP_WARPS // warps, CHIP_BLOCKS,
    )  # fmt: skip
    return Resources(registers, spills, shared, dict(Counter(TENSOR_CORE.findall(compiled.asm["ptx"]))), warps, blocks)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and its bytes of local memory, read by the `cuobjdump` that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", done.stdout + done.stderr)
    if not usage:
        raise RuntimeError(f"no resource usage in the output of {tool.name}: {done.stdout[:200]}{done.stderr[:200]}")
    return int(usage[1]), int(usage[2]) + int(usage[3])


def faults(launch: Launch, arch: int, used: Resources) -> list[str]:
    """The reasons for which the report fails."""
    x = launch.arguments.get("x_ptr")
    half = x is not None and x.dtype in (torch.bfloat16, torch.float16)
    reasons = []
    if used.spills and arch == 90:
        reasons.append(f"spills {used.spills} bytes")
    if used.shared > BLOCK_SHARED[arch]:
        reasons.append(f"needs {used.shared} bytes of shared memory, the chip has {BLOCK_SHARED[arch]}")
    if half and not used.tensor_core:
        reasons.append("uses no tensor core")
    return reasons


def kernel_name(launch: Launch) -> str:
    """The kernel, its dtype, its tile, and the options that tell one configuration from another."""
    sizes = [name for name in launch.arguments if name.isupper() and name[0] == "B" and len(name) == 2]
    flags = [name.lower() for name in ("FUSED", "DROPOUT") if launch.arguments.get(name)]
    ranks = ["ranks"] if launch.arguments.get("ranks_ptr") is not None else []
    dtype = TYPES[launch.arguments.get("x_ptr", launch.arguments.get("out_ptr")).dtype]
    tile = "x".join(str(launch.arguments[name]) for name in sizes)
    return " ".join([f"{launch.kernel.removesuffix('_kernel'):7} {dtype:5} {'·'.join(sizes)} {tile}", *flags, *ranks])


def table_line(launch: Launch, used: Resources, faults: list[str]) -> str:
    """A line of the table. warps: the share of a multiprocessor's that its blocks occupy."""
    cores = ", ".join(f"{count} {instruction}" for instruction, count in used.tensor_core.items()) or "-"
    warps = used.blocks_per_chip * used.warps / CHIP_WARPS
    numbers = f"{used.registers:4d} {used.spills:6d} {used.shared:6d} {used.blocks_per_chip:6d} {warps:6.0%}"
    return f"{kernel_name(launch):58} {numbers}  {cores}" + "".join(f"  FAULT: {fault}" for fault in faults)


def roofline() -> list[dict]:
    """Estimates for all linears of a layer of XLM-R base at the study's batch, for each rank.

    Each kernel's FLOPs, bytes and time; then their sum as a ratio to the base products alone, in sequence and overlapped.
    """
    rows = []
    for rank in cases.STUDY_RANKS:
        work = [item for linear in cases.XLMR_BASE for item in cases.lora_work(linear, cases.STUDY, rank)]
        floor = sum(item.seconds for linear in cases.XLMR_BASE for item in cases.base_work(linear, cases.STUDY.total))
        for name in dict.fromkeys(item.name for item in work):
            same = [item for item in work if item.name == name]
            rows.append({
                "rank": rank, "kernel": name, "gflop": sum(item.flops for item in same) / 1e9,
                "mbytes": sum(item.bytes for item in same) / 1e6, "us": sum(item.seconds for item in same) * 1e6,
            })  # fmt: skip
        total = sum(item.seconds for item in work)
        # Where memory-bound kernels run beside compute-bound ones, the larger of both sums is left.
        compute, memory = sum(item.flops for item in work) / cases.PEAK_FLOPS, sum(item.bytes for item in work) / cases.PEAK_BYTES
        ratios = {"ratio_to_base_alone": total / floor, "ratio_overlapped": max(compute, memory) / floor}
        rows.append({"rank": rank, "kernel": "all", "us": total * 1e6, **ratios})
    return rows


def _compile(job: tuple[int, dict, str]) -> Resources:
    arch, variant, identity = job
    return compile_launch(launches_of(arch, **variant)[identity], arch)


def jobs_for(arch: int, variants: Iterable[dict]) -> list[tuple[Launch, tuple[int, dict, str]]]:
    """Every kernel once, with what a process needs to compile it: tensors without memory cannot be pickled."""
    jobs: dict[str, tuple[Launch, tuple[int, dict, str]]] = {}
    for variant in variants:
        for identity, launch in launches_of(arch, **variant).items():
            jobs.setdefault(identity, (launch, (arch, variant, identity)))
    return list(jobs.values())


def main(arguments: list[str] | None = None) -> int:
    """Compile, print the table and the estimates; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compiled", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    options = parser.parse_args(arguments)
    failed = 0
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for arch in options.arch:
            launches, jobs = zip(*jobs_for(arch, variants()), strict=True)
            print(f"\nsm_{arch}: {len(jobs)} kernels\n{'kernel':58} regs spills shared blocks  warps  tensor core")
            for launch, used in zip(launches, pool.map(_compile, jobs), strict=True):
                wrong = faults(launch, arch, used)
                failed += bool(wrong)
                print(table_line(launch, used, wrong), flush=True)
    print(f"\nEstimates, a layer of XLM-R base, {cases.STUDY.adapters} adapters x {cases.STUDY.rows} rows, bf16:")
    print("rank  kernel     GFLOP    MB     µs at 788 TFLOP/s, 4.3 TB/s")
    for row in roofline():
        if row["kernel"] == "all":
            in_sequence, overlapped = row["ratio_to_base_alone"], row["ratio_overlapped"]
            numbers = f"{row['us']:24.0f}  {in_sequence:.2f} x the base products alone; {overlapped:.2f} x if kernels overlap"
        else:
            numbers = f"{row['gflop']:9.1f} {row['mbytes']:6.0f} {row['us']:7.0f}"
        print(f"{row['rank']:4d}  {row['kernel']:6} {numbers}")
    if failed:
        print(f"{failed} kernels have faults", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
