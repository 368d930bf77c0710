"""Everything a GPU has to show, in one command: tests, timings against the baselines, the tiles that might be
better.

    python -m bench.gpu_suite [--minutes 9] [--only tests kernels baselines tiles] [--out bench/results]

Needs torch and triton, and peft with transformers for the peft baselines (left out, and said so, where they
are absent). Times are of the GPU alone, by events; inputs rotate through more memory than the L2 cache holds,
so none starts warm. Every row is one JSON line, written only for an op whose correctness check passed in this
process. It stops taking up new measurements when its minutes are spent and prints what it left out.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from kloss.kernels import Dropout, Segments, make_segments, reference, tuned
from kloss.kernels.multi_lora import multi_lora_linear

from . import cases

ROOT = Path(__file__).resolve().parents[1]
L2_BYTES = 64 << 20  # more than any chip so far has: an H200 has 50 MiB
# What each op's entry in the table is tried with.
CANDIDATES: dict[str, list[dict]] = {
    "fused": [dict(BC=256), dict(BC=256, num_stages=4), dict(num_stages=4), dict(BC=64, num_warps=4)],
    "shrink": [dict(num_stages=4), dict(BK=128, num_stages=2), dict(num_warps=8)],
    "reduce": [dict(num_stages=3), dict(BK=32, num_stages=3), dict(num_warps=8)],
    "expand": [dict(num_stages=3), dict(num_warps=8)],
}
PARTS = ("tests", "kernels", "baselines", "tiles")


class Times(NamedTuple):
    """Quantiles of one call's time in microseconds."""

    p20: float
    p50: float
    p80: float


class Problem(NamedTuple):
    """One linear of the model with the batch of a step; everything on one device."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    segments: Segments
    dropout: Dropout
    dy: Tensor
    slices: int

    @property
    def bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.x, self.dy, self.weight, self.lora_a, self.lora_b))


def make_problem(
    linear: cases.Linear, batch: cases.Batch, rank: int, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Problem:  # fmt: skip
    """Random data of a linear and a batch, rows sorted by adapter as the packer leaves them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, device=device, generator=generator) * scale).to(dtype)

    _, k, n, slices = linear
    groups, t = batch.adapters, batch.total
    cu_seqlens = torch.arange(groups + 1, dtype=torch.int32, device=device) * batch.rows
    segments = make_segments(cu_seqlens, torch.arange(groups, dtype=torch.int32, device=device), groups, rows=t)
    ones = torch.ones(groups, device=device)
    dropout = Dropout(ones * 0.1, torch.arange(groups, device=device), torch.arange(t, device=device), 3)
    return Problem(
        normal(t, k), normal(n, k, scale=k**-0.5), normal(n), normal(groups, slices * rank, k, scale=k**-0.5),
        normal(groups, n, rank, scale=rank**-0.5), ones, segments, dropout, normal(t, n), slices,
    )  # fmt: skip


def rotation(make: Callable[[int], Problem]) -> list[Problem]:
    """As many problems as fill twice the L2 cache, at least two."""
    first = make(0)
    return [first, *(make(seed) for seed in range(1, max(2, -(-2 * L2_BYTES // first.bytes))))]


def measure(calls: list[Callable[[], object]], clock: Callable[[Callable[[], object]], float], seconds: float) -> Times:
    """Quantiles over calls taken in turn. clock: runs a call, returns microseconds. At least 10 measurements,
    3 not counted.
    """
    for index in range(3):
        clock(calls[index % len(calls)])
    taken: list[float] = []
    until = time.monotonic() + seconds
    while len(taken) < 10 or (time.monotonic() < until and len(taken) < 400):
        taken.append(clock(calls[len(taken) % len(calls)]))
    taken.sort()
    return Times(*(taken[min(len(taken) - 1, int(len(taken) * part))] for part in (0.2, 0.5, 0.8)))


def gpu_clock(call: Callable[[], object]) -> float:
    """Microseconds between two events around a call; a sleep on the GPU first, so that launches are queued,
    not waited for.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def together(one: Problem, *, exact: bool = False, backward: bool = True) -> Callable[[], object]:
    """Forward, and backward with gradients of x, A and B, of the multi-adapter linear."""
    x, lora_a, lora_b = (t.detach().requires_grad_(backward) for t in (one.x, one.lora_a, one.lora_b))

    def call():
        rest = one.scaling, one.segments
        y = multi_lora_linear(x, one.weight, one.bias, lora_a, lora_b, *rest, slices=one.slices, dropout=one.dropout, exact=exact)
        return torch.autograd.grad(y, (x, lora_a, lora_b), one.dy) if backward else y

    return call


def base_alone(one: Problem) -> Callable[[], object]:
    """The floor: the frozen base product and its dx, by the vendor."""
    return lambda: (torch.addmm(one.bias, one.x, one.weight.t()), one.dy @ one.weight)


def grouped_mm(one: Problem) -> Callable[[], object]:
    """What torch offers: F.grouped_mm for the LoRA products beside the vendor's base product, torch's
    dropout.
    """
    x, lora_a, lora_b = (t.detach().requires_grad_() for t in (one.x, one.lora_a, one.lora_b))
    offsets = one.segments.ends[:-1].to(torch.int32)
    scale = one.scaling.to(x.dtype)[one.segments.row_adapter.long()][:, None]

    def call():
        dropped = torch.nn.functional.dropout(x, 0.1)
        s = torch.nn.functional.grouped_mm(dropped, lora_a.transpose(1, 2), offs=offsets) * scale
        parts = [
            torch.nn.functional.grouped_mm(part.contiguous(), block.transpose(1, 2), offs=offsets)
            for part, block in zip(s.chunk(one.slices, 1), lora_b.chunk(one.slices, 1), strict=True)
        ]
        y = torch.addmm(one.bias, x, one.weight.t()) + torch.cat(parts, 1)
        return torch.autograd.grad(y, (x, lora_a, lora_b), one.dy)

    return call


class _PeftLinear:
    """One linear under peft with the problem's adapters: taken one at a time in training, or mixed in a batch
    in eval.
    """

    def __init__(self, one: Problem):
        from peft import LoraConfig, inject_adapter_in_model

        groups, rank = one.lora_b.shape[0], one.lora_a.shape[1]
        self.model = torch.nn.Module()
        self.model.base = torch.nn.Linear(*one.weight.t().shape, device=one.x.device, dtype=one.x.dtype)
        self.model.base.requires_grad_(False)
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=0.1, target_modules=["base"])
        for g in range(groups):
            inject_adapter_in_model(config, self.model, adapter_name=str(g))
        self.layer, self.one, self.groups = self.model.base.to(one.x.dtype), one, groups
        self.parts = list(zip(one.x.chunk(groups), one.dy.chunk(groups), strict=True))

    def sequential(self) -> None:
        for g, (x, dy) in enumerate(self.parts):
            self.layer.set_adapter(str(g))
            leaf = x.detach().requires_grad_()
            y = self.layer(leaf)
            torch.autograd.grad(y, (leaf, self.layer.lora_A[str(g)].weight, self.layer.lora_B[str(g)].weight), dy)

    @torch.no_grad()
    def mixed(self) -> Tensor:
        self.layer.eval()
        names = [str(g) for g in range(self.groups)]
        return self.layer(self.one.x.view(self.groups, -1, self.one.x.shape[1]), adapter_names=names)


def check(linear: cases.Linear, batch: cases.Batch, rank: int, *, device: str, dtype: torch.dtype) -> None:
    """Gradients of the op at this layer with a few adapters: off from fp64, norm-wise, at most twice as far
    as plain torch is.

    Raises AssertionError before anything of that shape is timed.
    """
    few = cases.Batch(min(4, batch.adapters), min(batch.rows, 1100))
    one = make_problem(linear, few, rank, device=device, dtype=dtype)
    part = make_segments(one.segments.cu_seqlens.cpu(), one.segments.adapter.cpu(), few.adapters)
    dropout = Dropout(*(t.cpu() if isinstance(t, Tensor) else t for t in one.dropout))

    def plain(dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, weight, bias, lora_a, lora_b, dy = (
            t.detach().cpu().to(dtype) for t in (one.x, one.weight, one.bias, one.lora_a, one.lora_b, one.dy)
        )
        leaves = [t.requires_grad_() for t in (x, lora_a, lora_b)]
        scaling = one.scaling.cpu()
        y = reference.multi_lora_linear(x, weight, bias, lora_a, lora_b, scaling, part, slices=one.slices, dropout=dropout)
        return torch.autograd.grad(y, leaves, dy)

    wanted, torchs = plain(torch.float64), plain(dtype)
    for exact in (False, True):
        got = together(one, exact=exact)()
        for name, ours, theirs, right in zip(("dx", "dA", "dB"), got, torchs, wanted, strict=True):
            error, allowed = (((t.cpu().double() - right).norm() / right.norm()).item() for t in (ours, theirs))
            allowed = 2 * allowed + torch.finfo(dtype).eps
            assert error <= allowed, f"{name} at {linear.name}, r={rank}: error {error:.1e}, allowed {allowed:.1e}"


class Suite:
    """Runs measurements while time is left, writes a line for each, and remembers what it left out."""

    def __init__(self, out: Path, minutes: float, clock=gpu_clock, device: str = "cuda", seconds: float = 0.25,
                 dtype: torch.dtype = torch.bfloat16):  # fmt: skip
        self.clock, self.device, self.seconds, self.dtype = clock, device, seconds, dtype
        self.deadline = time.monotonic() + 60 * minutes
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / f"gpu_suite-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
        self.about, self.rows, self.left_out = environment(device), [], []

    def late(self, what: str) -> bool:
        if time.monotonic() > self.deadline:
            self.left_out.append(what)
            return True
        return False

    def row(self, case: str, times: Times, *, baseline: str | None = None, floor: Times | None = None, **more) -> dict:
        """One line: the case, its times, and the ratio to the baseline measured in this run."""
        row = {**self.about, "case": case, **times._asdict(), **more}
        if self.device == "cuda":
            row["peak_memory"] = torch.cuda.max_memory_allocated()
        if floor is not None:
            row |= {"baseline": baseline, "baseline_p50": floor.p50, "ratio": times.p50 / floor.p50}
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{case:64} {times.p50:9.1f} µs" + (f"  {row['ratio']:6.2f} x {baseline}" if floor else ""), flush=True)
        return row

    def time(self, problems: list[Problem], make: Callable[[Problem], Callable[[], object]]) -> Times:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return measure([make(one) for one in problems], self.clock, self.seconds)

    def problems(self, linear: cases.Linear, batch: cases.Batch, rank: int) -> list[Problem]:
        return rotation(lambda seed: make_problem(linear, batch, rank, device=self.device, dtype=self.dtype, seed=seed))

    def kernels(self, batches=cases.BATCHES, ranks=cases.STUDY_RANKS, linears=cases.XLMR_BASE) -> None:
        """Forward and backward against the base products alone: all linears at the study's batch, then one
        over batches.
        """
        plan = [(linear, cases.STUDY, rank) for rank in ranks for linear in linears]
        plan += [(linears[0], batch, ranks[0]) for batch in batches if batch != cases.STUDY]
        totals: dict[int, list[float]] = {}
        for linear, batch, rank in plan:
            case = f"{linear.name}, {batch.adapters} x {batch.rows} rows, r={rank}"
            if self.late(case):
                continue
            problems = self.problems(linear, batch, rank)
            check(linear, batch, rank, device=self.device, dtype=self.dtype)
            floor = self.time(problems, base_alone)
            least = sum(one.seconds for one in cases.lora_work(linear, batch, rank)) * 1e6
            shape = {"linear": linear.name, "k": linear.k, "n": linear.n, "slices": linear.slices, "rank": rank}
            shape |= {**batch._asdict(), "dtype": str(self.dtype)}
            for name, exact in (("chosen", False), ("exact", True)):
                times = self.time(problems, lambda one, exact=exact: together(one, exact=exact))
                more = {**shape, "ceiling_share": least / times.p50, "fused": exact or self.fused(linear, batch)}
                self.row(f"{case}, {name}", times, baseline="base alone", floor=floor, **more)
                if name == "chosen" and batch == cases.STUDY:
                    totals.setdefault(rank, [0.0, 0.0])
                    totals[rank][0] += times.p50
                    totals[rank][1] += floor.p50
        for rank, (ours, floor) in totals.items():
            print(f"all linears measured at the study's batch, r={rank}: {ours / floor:.2f} x the base products alone")

    @staticmethod
    def fused(linear: cases.Linear, batch: cases.Batch) -> list[bool]:
        """What the table chose for forward and for dx."""
        return [tuned.fuse(batch.total, batch.adapters, length) for length in (linear.k, linear.n)]

    def baselines(self, batch=cases.STUDY, ranks=cases.STUDY_RANKS, linears=cases.XLMR_BASE[:3]) -> None:
        """grouped_mm and peft against ours, the ratio in the same run: how many times slower the other is."""
        others: list[tuple[str, Callable, bool]] = [(f"torch {torch.__version__} grouped_mm", grouped_mm, True)]
        try:
            version = metadata.version("peft")
            others += [
                (f"peft {version} one adapter at a time", lambda one: _PeftLinear(one).sequential, True),
                (f"peft {version} mixed batch, eval", lambda one: _PeftLinear(one).mixed, False),
            ]
        except metadata.PackageNotFoundError:
            self.left_out.append("peft baselines: peft is not installed")
        for rank in ranks[:1]:
            for linear in linears:
                for name, other, backward in others:
                    if linear.slices > 1 and name.startswith("peft"):
                        continue  # one adapter on a fused q, k, v is more work than three on its parts
                    case = f"{linear.name}, {batch.adapters} x {batch.rows} rows, r={rank}: {name}"
                    if self.late(case):
                        continue
                    problems = self.problems(linear, batch, rank)[:2]
                    check(linear, batch, rank, device=self.device, dtype=self.dtype)
                    ours = self.time(problems, lambda one, backward=backward: together(one, backward=backward))
                    self.row(case, self.time(problems, other), baseline="kloss", floor=ours, rank=rank)

    def tiles(self, batch=cases.STUDY, linears=cases.XLMR_BASE, rank=cases.STUDY_RANKS[0]) -> None:
        """Candidates for the table, each against the entry it would replace; an entry that the chip refuses
        is left out.
        """
        arch = tuned.arch_of(torch.device(self.device))
        for op, changes in CANDIDATES.items():
            for linear in linears[:: len(linears) - 1 or 1]:
                problems = self.problems(linear, batch, rank)
                make = together if op != "fused" else lambda one: together(one, exact=True)
                now = self.time(problems, make)
                for change in changes:
                    case = f"{op} {change} at {linear.name}"
                    if self.late(case):
                        continue
                    with table_entry(op, arch, change):
                        try:
                            check(linear, batch, rank, device=self.device, dtype=self.dtype)
                            times = self.time(problems, make)
                        except (triton.runtime.errors.OutOfResources, AssertionError) as reason:
                            self.left_out.append(f"{case}: {reason}")
                            continue
                    self.row(case, times, baseline="the table's", floor=now, **change)


class table_entry:
    """Within it the table has other values for an op on an architecture; nothing else may run meanwhile."""

    def __init__(self, op: str, arch: int, change: dict):
        self.key = (op, arch, "half")
        self.entry = tuned.launch(op, arch, torch.bfloat16)._replace(**change)

    def __enter__(self):
        self.before = tuned.TABLE.get(self.key)
        tuned.TABLE[self.key] = self.entry

    def __exit__(self, *failure):
        if self.before is None:
            del tuned.TABLE[self.key]
        else:
            tuned.TABLE[self.key] = self.before


def environment(device: str) -> dict:
    """Commit, versions and device, for every row."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "commit": git("rev-parse", "--short", "HEAD") or None, "dirty": bool(git("status", "--porcelain")),
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }  # fmt: skip


def run_tests() -> bool:
    """The tests marked gpu, in their own process."""
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], cwd=ROOT).returncode == 0


def parts_of(suite: Suite) -> Iterator[tuple[str, Callable[[], None]]]:
    yield from (("kernels", suite.kernels), ("baselines", suite.baselines), ("tiles", suite.tiles))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="when to take up nothing new")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("gpu_suite: there is no CUDA GPU here", file=sys.stderr)
        return 2
    began = time.monotonic()
    suite = Suite(asked.out, asked.minutes)
    passed = run_tests() if "tests" in asked.only else True
    for name, part in parts_of(suite):
        if name in asked.only:
            part()
    for what in suite.left_out:
        print(f"left out: {what}")
    tests = "passed" if passed else "FAILED"
    print(f"{len(suite.rows)} rows in {suite.file}, {time.monotonic() - began:.0f} s; tests {tests}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
