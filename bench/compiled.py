"""Compile every Triton kernel of kloss at its default configurations without a GPU, and print what each needs; then the roofline.

    python -m bench.compiled [--arch 80 90 100] [--jobs N]

The exit code is 1 if a kernel spills on sm_90, needs more shared memory than the chip has, or multiplies 16-bit operands without
tensor cores. Roofline times are estimates: no kernel is faster, most are slower.

The ops' own launchers run on tensors without memory, their kernels replaced by recorders. So what is compiled is what would be
launched, specialised as Triton's JIT specialises: divisibility by 16, integers equal to 1, None.
"""

import argparse
import inspect
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kloss.kernels import (
    adapter_linear_triton,
    add_norm_triton,
    attention_long_triton,
    attention_triton,
    cuda_library,
    dropout_triton,
    embed_triton,
    lora_hopper,
    lora_shrink,
    lora_tiles,
    lora_triton,
    token_loss_triton,
    tuned,
)  # fmt: skip
from kloss.kernels.buckets import attention_tiles
from kloss.kernels.dropout import RowDropout
from kloss.kernels.lora_torch import Backward, Forward
from kloss.kernels.segments import Segments, with_work

from . import cases

MODULES = (lora_shrink, lora_tiles, attention_triton, attention_long_triton, add_norm_triton, embed_triton)
MODULES += (adapter_linear_triton, token_loss_triton, dropout_triton)
KERNELS = {name: kernel for module in MODULES for name, kernel in vars(module).items() if name.endswith("_kernel")}
ARCHITECTURES, MAIN_ARCHITECTURE = (80, 90, 100), 90  # the others compile less: their time is bounded
# Bytes of shared memory a block may have, and a multiprocessor has (CUDA C++ Programming Guide, compute capabilities).
BLOCK_SHARED = {80: 166_912, 90: 232_448, 100: 232_448}
CHIP_SHARED = {80: 167_936, 90: 233_472, 100: 233_472}
RESERVED_SHARED, CHIP_REGISTERS, CHIP_WARPS, CHIP_BLOCKS = 1024, 65_536, 64, 32
TENSOR_CORE = re.compile(r"\b(wgmma\.mma_async|mma\.sync|tcgen05\.mma)\b")
PRODUCT = re.compile(r"\b(tl\.dot|add_product|scores|attend_short)\(")  # in a kernel's source
COPY = re.compile(r"cp\.async\.c[ag]\.shared\.global[^;]*, 0x10,")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TYPES |= {torch.int16: "i16", torch.int32: "i32", torch.int64: "i64"}
LABELS = 111
FLAGS = {"ranks_ptr": "ranks", "keys_ptr": "dropout", "dweight_ptr": "weights", "of_x_ptr": "gelu"}


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
    copies: int  # of 16 bytes a thread into shared memory, in PTX: the fast way to load a tile
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
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(cuda_library, "linear", lambda *args, **keywords: None))
        for module in (*MODULES, tuned):
            patches = {name: _Recorder(name, launches) for name in vars(module).keys() & KERNELS.keys()}
            if hasattr(module, "arch_of"):
                patches["arch_of"] = lambda device: arch
            stack.enter_context(mock.patch.multiple(module, **patches))
        yield launches


def all_launches(arch: int, *, op: str = "linear", **variant) -> list[Launch]:
    """Launches of forward and backward of an op at the study's batch, in order. variant: arguments of `run_<op>`."""
    adapters, rows = cases.STUDY.adapters, cases.STUDY.total
    with recorded(arch) as launches, torch.device("meta"):
        ends = torch.empty(adapters + 1, dtype=torch.int64)
        lists = torch.empty(adapters + 1, dtype=torch.int32), torch.empty(adapters, dtype=torch.int32)
        rest = torch.empty(rows, dtype=torch.int32), torch.empty(rows, dtype=torch.int64), None, None, ends
        globals()[f"run_{op}"](with_work(Segments(*lists, adapters, *rest)), **variant)
    return launches


def launches_of(arch: int, **variant) -> dict[str, Launch]:
    """Those of `all_launches` that differ in how they are compiled, by identity."""
    return {repr((launch.kernel, *specialise(launch))): launch for launch in all_launches(arch, **variant)}


# Each `run_<op>` calls the launchers of an op, forward and backward, on random tensors of the default device, and returns what
# they wrote. Tests run them in the interpreter, small. segments: with work lists.


def run_linear(
    segments: Segments, *, k: int, n: int, rank: int, slices: int = 1, dropout: bool = True, exact: bool = False,
    dtype: torch.dtype = torch.bfloat16, lora_dtype: torch.dtype | None = None, mixed: bool = False, hopper: bool = False,
    gelu: bool = False,
) -> list[Tensor]:  # fmt: skip
    """lora_dtype: of A and B; None: dtype. mixed: whether adapters have ranks of their own. hopper: as `lora_hopper` launches.
    gelu: of gelu(x), and with dy at gelu(y)."""
    G, rows = segments.num_adapters, segments.order.numel()
    x, weight, bias, dy = (torch.randn(*shape).to(dtype) for shape in ((rows, k), (n, k), (n,), (rows, n)))
    lora_a, lora_b = (torch.randn(G, *shape).to(lora_dtype or dtype) for shape in ((slices * rank, k), (n, rank)))
    scaling, ranks = torch.rand(G), torch.randint(1, rank + 1, (G,)) if mixed else None
    assert segments.work is not None
    lists = [segments.order, *segments.work]
    lists += [torch.full((G,), 0.5), torch.randint(99, (G,)), torch.randint(99, (rows,))] if dropout else []
    backend = lora_hopper if hopper else lora_triton
    activated = torch.empty_like(x) if gelu else None
    y, s, keys = backend.forward(Forward(x, weight, bias, lora_a, lora_b, scaling, ranks, lists, 3, slices, exact, activated))
    settings = ranks, lists, slices, exact, True, True, True, None, None, y if gelu else None
    return [y, *backend.backward(Backward(dy, x, weight, lora_a, lora_b, scaling, s, keys, *settings))]


def run_attention(
    segments: Segments, *, heads: int, width: int, dtype: torch.dtype = torch.bfloat16, dropout: bool = True
) -> list[Tensor]:
    """width: of a head."""
    rows, drops = segments.order.numel(), _drops(segments, dropout)
    tiles = attention_tiles(segments.cu_seqlens, rows, dtype)
    qkv = torch.randn(rows, 3 * heads * width).to(dtype)
    out, lse = attention_triton.forward(qkv, heads, tiles, drops)
    return [out, attention_triton.backward(torch.randn(rows, heads * width).to(dtype), qkv, out, lse, heads, tiles, drops)]


def run_add_norm(
    segments: Segments, *, width: int, dtype: torch.dtype = torch.bfloat16, dropout: bool = True, weights: bool = False
) -> list[Tensor]:
    """weights: whether they are trained; y has two uses if not."""
    rows, drops = segments.order.numel(), _drops(segments, dropout)
    x, dy, more_dy, residual = (torch.randn(rows, width).to(dtype) for _ in range(4))
    weight, bias = torch.randn(width).to(dtype), torch.randn(width).to(dtype)
    y, mean, rstd = add_norm_triton.forward(x, residual, weight, bias, 1e-5, drops)
    gradients = add_norm_triton.backward(dy, None if weights else more_dy, x, residual, weight, mean, rstd, drops, weights)
    gradients = gradients if weights else gradients[:2]  # the others are not written
    return [y, mean, rstd, *gradients, *([add_norm_triton.dropout(x, drops)] if drops else [])]


def run_embed(
    segments: Segments, *, width: int, vocabulary: int = 250_002, dtype: torch.dtype = torch.bfloat16, dropout: bool = True
) -> list[Tensor]:
    """The embeddings, with the lookup of 514 positions that XLM-R has."""
    rows, drops = segments.order.numel(), _drops(segments, dropout)
    ids, position = torch.randint(vocabulary, (rows,)), torch.randint(600, (rows,), dtype=torch.int32)
    tables = [torch.randn(*shape, width).to(dtype).contiguous() for shape in ((vocabulary,), (514,), ())]
    weight, bias, dy = torch.randn(width).to(dtype), torch.randn(width).to(dtype), torch.randn(rows, width).to(dtype)
    y, mean, rstd = embed_triton.forward(ids, position, *tables, weight, bias, 1e-5, 2, drops)
    return [y, mean, rstd, *embed_triton.backward(dy, ids, position, *tables, weight, mean, rstd, 2, drops)]


def run_heads(segments: Segments, *, width: int, labels: int = LABELS, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """The tagging heads."""
    G, rows = segments.num_adapters, segments.order.numel()
    order, ends, work = segments.order, segments.ends, segments.work
    assert work is not None
    x, dy = torch.randn(rows, width).to(dtype), torch.randn(rows, labels).to(dtype).contiguous()
    weight, bias = torch.randn(G, labels, width).to(dtype), torch.randn(G, labels).to(dtype).contiguous()
    y = adapter_linear_triton.forward(x, weight, bias, order, work)
    return [y, *adapter_linear_triton.backward(dy, x, weight, order, ends, work, True, True, True)]


def run_loss(segments: Segments, *, labels: int = LABELS, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """The mean loss of each adapter."""
    rows = segments.order.numel()
    logits, given = torch.randn(rows, labels).to(dtype), torch.randint(labels, (rows,))
    loss, count, lse = token_loss_triton.forward(logits, given, segments.order, segments.ends)
    dlogits = token_loss_triton.backward(torch.randn_like(loss), logits, given, segments.row_adapter, count, lse)
    return [loss, count, lse, dlogits]


def run_dropout(segments: Segments, *, sites: int = 86) -> list[Tensor]:
    """The keys of all sites and the limits of the rows."""
    G, rows, adapter = segments.num_adapters, segments.order.numel(), segments.row_adapter
    keys = dropout_triton.keys(torch.randint(99, (G,)), torch.randint(99, (rows,)), adapter, 0, sites)
    return [keys, *dropout_triton.limits(torch.rand(G), adapter, rows)]


def _drops(segments: Segments, dropout: bool) -> RowDropout | None:
    rows = segments.order.numel()
    state = torch.randint(1 << 60, (rows,)), torch.zeros(rows, dtype=torch.int16), torch.full((rows,), 2.0)
    return RowDropout(*state) if dropout else None


def variants() -> Iterator[dict]:
    """Arguments of `launches_of` that between them reach every kernel, and every entry of the table that an architecture has."""
    qkv, down = dict(k=768, n=2304, slices=3), dict(k=3072, n=768)
    for rank in (32, 256):
        yield from (dict(qkv, rank=rank, exact=True), dict(qkv, rank=rank, hopper=True), dict(down, rank=rank, mixed=True))
    yield dict(k=768, n=768, rank=32, dtype=torch.float32)
    yield from (dict(k=768, n=3072, rank=32, gelu=True, hopper=hopper, mixed=not hopper) for hopper in (False, True))
    yield from (dict(op="attention", heads=12, width=64), dict(op="add_norm", width=768), dict(op="embed", width=768))
    yield from (dict(op="heads", width=768), dict(op="loss"), dict(op="dropout"))


def more_variants() -> Iterator[dict]:
    """Those of `variants`, and all that differ in how they are specialised: each rank, mixed ranks, odd widths, fp32 masters."""
    yield from variants()
    qkv, square, fp32 = dict(k=768, n=2304, slices=3), dict(k=768, n=768), dict(dtype=torch.float32)
    for rank in cases.RANKS:
        for k in cases.WIDTHS:
            for n in cases.WIDTHS:
                yield dict(k=k, n=n, rank=rank, exact=True)
    for rank in cases.STUDY_RANKS:
        yield from (dict(qkv, rank=rank), dict(qkv, rank=rank, mixed=True, exact=True))
    yield from (dict(square, rank=8, mixed=True), dict(square, rank=32, dropout=False, lora_dtype=torch.float32))
    yield dict(square, rank=256, lora_dtype=torch.float32)
    yield dict(square, rank=32, dtype=torch.float16, gelu=True)
    yield from (dict(square, rank=256, exact=True, **fp32), dict(square, rank=32, gelu=True, **fp32))
    yield dict(k=41, n=23, rank=1)
    for odd in (dict(rank=17), dict(rank=17, exact=True), dict(rank=256), dict(rank=17, exact=True, **fp32)):
        yield dict(k=1001, n=1111, mixed=True, **odd)
    yield from (dict(op="attention", heads=12, width=64, **more) for more in (fp32, dict(dropout=False)))
    yield from (dict(op="attention", heads=4, width=32), dict(op="attention", heads=3, width=20))
    for width in (128, 384, 768):
        yield dict(op="add_norm", width=width, weights=True)
    yield dict(op="add_norm", width=768, dropout=False, **fp32)
    yield from (dict(op="embed", width=384, dropout=False), dict(op="embed", width=1001, **fp32))
    yield from (dict(op="heads", width=128, labels=9, **fp32), dict(op="loss", labels=9, **fp32))


def specialise(launch: Launch) -> tuple[dict, dict, dict, dict]:
    """Signature, constants, attributes and options of a launch, as the JIT derives them."""
    given, parameters = launch.arguments, KERNELS[launch.kernel].params
    names = {parameter.name for parameter in parameters}
    options = {name: value for name, value in given.items() if name not in names}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(parameters):
        name, value = parameter.name, given[parameter.name]
        aligned = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
        if isinstance(value, torch.Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            signature[name], aligned = "constexpr", False
            constants[(index,)] = value
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name] = "i64" if value >= 1 << 31 else "i32"
            aligned &= value % 16 == 0
        if not (parameter.do_not_specialize or isinstance(value, float)):  # empty ones count: the cache's keys hold them
            attributes[(index,)] = [["tt.divisibility", 16]] if aligned else []
    return signature, constants, attributes, options


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile one launch for an architecture; Triton's own cache keeps the result."""
    compiled = binary_of(launch, arch)
    registers, spills = _usage(compiled.asm["cubin"])
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    blocks = min(
        CHIP_REGISTERS // (-(-registers // 8) * 8 * warps * 32), CHIP_SHARED[arch] // (shared + RESERVED_SHARED),
        CHIP_WARPS // warps, CHIP_BLOCKS,
    )  # fmt: skip
    ptx = compiled.asm["ptx"]
    return Resources(registers, spills, shared, dict(Counter(TENSOR_CORE.findall(ptx))), len(COPY.findall(ptx)), warps, blocks)


def binary_of(launch: Launch, arch: int) -> triton.compiler.CompiledKernel:
    """What Triton compiles a launch to: `asm` has the PTX and the cubin."""
    signature, constants, attributes, options = specialise(launch)
    source = ASTSource(KERNELS[launch.kernel], signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


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
    multiplies = PRODUCT.search(inspect.getsource(KERNELS[launch.kernel].fn))
    reasons = []
    if used.spills and arch == 90:
        reasons.append(f"spills {used.spills} bytes")
    if used.shared > BLOCK_SHARED[arch]:
        reasons.append(f"needs {used.shared} bytes of shared memory, the chip has {BLOCK_SHARED[arch]}")
    if multiplies and dtype_of(launch) in ("bf16", "fp16") and not used.tensor_core:
        reasons.append("uses no tensor core")
    return reasons


def dtype_of(launch: Launch) -> str:
    """The dtype of the kernel's first argument, which is what it reads most of."""
    return TYPES[next(value for value in launch.arguments.values() if isinstance(value, torch.Tensor)).dtype]


def kernel_name(launch: Launch) -> str:
    """The kernel, its dtype, its tile, and the options that tell one configuration from another."""
    given = launch.arguments
    sizes = [name for name in given if name.isupper() and name[0] == "B" and len(name) == 2]
    flags = [name.lower() for name in ("FUSED", "DROPOUT") if given.get(name)]
    flags += [
        word for name, word in FLAGS.items() if given.get(name) is not None and not (name == "keys_ptr" and "p_ptr" in given)
    ]
    tile = "·".join(sizes) + " " + "x".join(str(given[name]) for name in sizes)
    return " ".join([f"{launch.kernel.removesuffix('_kernel'):7} {dtype_of(launch):4} {tile}", *flags])


def table_line(launch: Launch, used: Resources, faults: list[str]) -> str:
    """A line of the table. warps: the share of a multiprocessor's that its blocks occupy."""
    cores = ", ".join(f"{count} {instruction}" for instruction, count in used.tensor_core.items()) or "-"
    warps = used.blocks_per_chip * used.warps / CHIP_WARPS
    numbers = f"{used.registers:4d} {used.spills:6d} {used.shared:6d} {used.copies:6d} {used.blocks_per_chip:6d} {warps:6.0%}"
    return f"{kernel_name(launch):58} {numbers}  {cores}" + "".join(f"  FAULT: {fault}" for fault in faults)


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
            launches, jobs = zip(*jobs_for(arch, more_variants() if arch == MAIN_ARCHITECTURE else variants()), strict=True)
            print(f"\nsm_{arch}: {len(jobs)} kernels\n{'kernel':58} regs spills shared copies blocks  warps  tensor core")
            for launch, used in zip(launches, pool.map(_compile, jobs), strict=True):
                wrong = faults(launch, arch, used)
                failed += bool(wrong)
                print(table_line(launch, used, wrong), flush=True)
    print(f"\nEstimates, a layer of XLM-R base, {cases.STUDY.adapters} adapters x {cases.STUDY.rows} rows, bf16:")
    print("rank  kernel     GFLOP    MB     µs at 788 TFLOP/s, 4.3 TB/s")
    for row in cases.roofline():
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
