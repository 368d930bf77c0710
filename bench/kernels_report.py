"""Compile every kernel at every default configuration, without a GPU, and print what each needs; then the
roofline.

    python -m bench.kernels_report [--arch 80 90 100] [--jobs N] [--json FILE]

Exit code 1 where a kernel spills on sm_90, asks for more shared memory than the chip has, or uses no tensor
core although its operands are 16 bits wide. Times in the roofline are estimates: no work is faster than these
ceilings, most is slower.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from . import cases
from .compiled import (
    ARCHITECTURES,
    BLOCK_SHARED,
    CHIP_WARPS,
    LaunchRecord,
    Resources,
    compile_launch,
    identity,
    multi_lora_launches,
)


def variants() -> Iterator[dict]:
    """Arguments of `multi_lora_launches` that between them reach every kernel of the default table."""
    for rank in cases.RANKS:
        for k in cases.WIDTHS:
            for n in cases.WIDTHS:
                yield dict(k=k, n=n, rank=rank, exact=True)
        yield dict(k=768, n=2304, rank=rank, slices=3, exact=True)
    for rank in (cases.RANKS[0], *cases.STUDY_RANKS):
        for mixed in (False, True):
            yield dict(k=768, n=768, rank=rank, exact=False, mixed=mixed)
            yield dict(k=768, n=2304, rank=rank, slices=3, exact=False, mixed=mixed)
    for rank in (32, 256):
        yield dict(k=768, n=768, rank=rank, exact=True, mixed=True)
        yield dict(k=768, n=2304, rank=rank, slices=3, exact=True, mixed=True)
        for dropout in (False, True):
            yield dict(k=768, n=2304, rank=rank, slices=3, exact=True, dropout=dropout, mixed=True, master=torch.float32)
        for exact in (True, False):
            yield dict(k=768, n=768, rank=rank, exact=exact, dtype=torch.float32)
    yield dict(k=768, n=768, rank=32, exact=True, dtype=torch.float16)


def launches_of(variant: dict, arch: int) -> dict[str, LaunchRecord]:
    """The launches of a variant at the study's batch, by identity."""
    made = multi_lora_launches(arch, rows=cases.STUDY.total, adapters=cases.STUDY.adapters, **variant)
    return {identity(launch): launch for launch in made}


def faults(launch: LaunchRecord, arch: int, used: Resources) -> list[str]:
    """What makes the report fail."""
    x = launch.arguments.get("x_ptr")
    half = x is not None and x.dtype in (torch.bfloat16, torch.float16)
    wrong = []
    if used.spills and arch == 90:
        wrong.append(f"spills {used.spills} bytes")
    if used.shared > BLOCK_SHARED[arch]:
        wrong.append(f"needs {used.shared} bytes of shared memory, the chip has {BLOCK_SHARED[arch]}")
    if half and not used.tensor_core:
        wrong.append("uses no tensor core")
    return wrong


def describe(launch: LaunchRecord) -> str:
    """The constants that tell one configuration from another."""
    names = [name for name in launch.arguments if name.isupper() and name[0] == "B" and len(name) == 2]
    flags = [name.lower() for name in ("FUSED", "DROPOUT") if launch.arguments.get(name)]
    given = [name for name in ("ranks",) if launch.arguments.get(f"{name}_ptr") is not None]
    tensor = launch.arguments.get("x_ptr", launch.arguments.get("out_ptr"))
    dtype = str(tensor.dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    tiles = "x".join(str(launch.arguments[name]) for name in names)
    words = [f"{launch.kernel.removesuffix('_kernel'):7} {dtype:5} {'·'.join(names)} {tiles}", *flags, *given]
    return " ".join(words).strip()


def line(launch: LaunchRecord, used: Resources, wrong: list[str]) -> str:
    """A row of the table. blocks: how many fit on one multiprocessor; warps: the share of its warps they
    are.
    """
    cores = ", ".join(f"{count} {what}" for what, count in used.tensor_core.items()) or "-"
    share = used.blocks_per_chip * used.warps / CHIP_WARPS
    numbers = f"{used.registers:4d} {used.spills:6d} {used.shared:6d} {used.blocks_per_chip:6d} {share:6.0%}"
    return f"{describe(launch):58} {numbers}  {cores}" + "".join(f"  FAULT: {one}" for one in wrong)


def roofline() -> list[dict]:
    """Estimates for all linears of a layer of XLM-R base at the study's batch, per rank: FLOPs, bytes, time, and the ratio to
    the base products alone, kernels one after another and overlapped.
    """
    rows = []
    for rank in cases.STUDY_RANKS:
        work = [one for linear in cases.XLMR_BASE for one in cases.lora_work(linear, cases.STUDY, rank)]
        floor = sum(one.seconds for linear in cases.XLMR_BASE for one in cases.base_work(linear, cases.STUDY.total))
        for name in dict.fromkeys(one.name for one in work):
            same = [one for one in work if one.name == name]
            rows.append({
                "rank": rank, "kernel": name, "gflop": sum(one.flops for one in same) / 1e9,
                "mbytes": sum(one.bytes for one in same) / 1e6, "us": sum(one.seconds for one in same) * 1e6,
            })  # fmt: skip
        total = sum(one.seconds for one in work)
        # Where kernels that wait for memory run beside those that compute, the larger of both sums is left.
        beside = max(sum(one.flops for one in work) / cases.PEAK_FLOPS, sum(one.bytes for one in work) / cases.PEAK_BYTES)
        ratios = {"ratio_to_base_alone": total / floor, "ratio_overlapped": beside / floor}
        rows.append({"rank": rank, "kernel": "all", "us": total * 1e6, **ratios})
    return rows


def _compile(job: tuple[dict, int, str]) -> Resources:
    variant, arch, name = job
    return compile_launch(launches_of(variant, arch)[name], arch)


def jobs_for(arch: int, wanted: Iterator[dict]) -> tuple[list[LaunchRecord], list[tuple[dict, int, str]]]:
    """Every compiled kernel once, and what a process needs to know to compile it (tensors without memory do
    not travel).
    """
    found: dict[str, tuple[LaunchRecord, tuple[dict, int, str]]] = {}
    for variant in wanted:
        for name, launch in launches_of(variant, arch).items():
            found.setdefault(name, (launch, (variant, arch, name)))
    return [launch for launch, _ in found.values()], [job for _, job in found.values()]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels_report", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    asked = parser.parse_args(arguments)
    rows, failed = [], 0
    with ProcessPoolExecutor(asked.jobs, mp_context=get_context("spawn")) as pool:
        for arch in asked.arch:
            launches, jobs = jobs_for(arch, variants())
            print(f"\nsm_{arch}: {len(jobs)} kernels\n{'kernel':58} regs spills shared blocks  warps  tensor core")
            for launch, used in zip(launches, pool.map(_compile, jobs), strict=True):
                wrong = faults(launch, arch, used)
                failed += bool(wrong)
                print(line(launch, used, wrong), flush=True)
                rows.append({"arch": arch, "kernel": describe(launch), **used._asdict(), "faults": wrong})
    estimates = roofline()
    print(f"\nEstimates, a layer of XLM-R base, {cases.STUDY.adapters} adapters x {cases.STUDY.rows} rows, bf16:")
    print("rank  kernel     GFLOP    MB     µs at 788 TFLOP/s, 4.3 TB/s")
    for row in estimates:
        if row["kernel"] == "all":
            one_by_one, beside = row["ratio_to_base_alone"], row["ratio_overlapped"]
            tail = f"{row['us']:24.0f}  {one_by_one:.2f} x the base products alone; {beside:.2f} x if memory and products overlap"
        else:
            tail = f"{row['gflop']:9.1f} {row['mbytes']:6.0f} {row['us']:7.0f}"
        print(f"{row['rank']:4d}  {row['kernel']:6} {tail}")
    if asked.json:
        asked.json.write_text(json.dumps({"kernels": rows, "estimates": estimates}, indent=1))
    if failed:
        print(f"{failed} kernels have faults", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
