"""The sections of the GPU suite: kernels, baselines, profile, tiles. Each takes up measurements while its time lasts."""

import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from kloss.kernels import tuned

from . import cases, profiled, targets, training_step
from .baselines import others
from .problems import Problem, base_alone, base_forward, check, forward_only, make_problem, together
from .timing import Clock, Times, gpu_clock, measure, rotation

# What each op's entry in the table is tried with.
CANDIDATES: dict[str, list[dict]] = {
    "fused": [dict(BC=256), dict(BC=256, num_stages=4), dict(num_stages=4), dict(BC=64, num_warps=4)],
    "shrink": [dict(num_stages=4), dict(BK=128, num_stages=2), dict(num_warps=8)],
    "reduce": [dict(num_stages=3), dict(BK=32, num_stages=3), dict(num_warps=8)],
    "expand": [dict(num_stages=3), dict(num_warps=8)],
}
PASSES = 10  # of forward and backward in one profile
REFUSED = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)


class Kind(NamedTuple):
    """A way to run the op, and the products alone that it is compared with. work: the entries of `cases.lora_work` it does."""

    make: Callable[[Problem], Callable[[], object]]
    floor: Callable[[Problem], Callable[[], object]]
    baseline: str
    work: tuple[str, ...]


ALL_WORK = ("S", "y", "dS", "dx", "dA", "dB")
KINDS = {
    "chosen": Kind(together, base_alone, "base alone", ALL_WORK),
    "exact": Kind(partial(together, exact=True), base_alone, "base alone", ALL_WORK),
    "forward only": Kind(forward_only, base_forward, "base forward alone", ALL_WORK[:2]),
}


def kernel_plan(
    batches: Sequence[cases.Batch], ranks: Sequence[int], linears: Sequence[cases.Linear]
) -> Iterator[tuple[cases.Linear, cases.Batch, int, tuple[str, ...]]]:
    """What the kernels section measures, what a target needs first: linear, batch, rank, kinds."""
    first = [rank for rank in ranks if rank in targets.BOUNDS]
    for rank, linear in product(first, linears):
        yield linear, cases.STUDY, rank, tuple(KINDS)
    even = [batch for batch in batches if targets.comparable(batch) and batch != cases.STUDY]
    for batch, linear in product(even, linears):
        yield linear, batch, targets.FLAT_RANK, ("chosen",)
    for rank, linear in product([rank for rank in ranks if rank not in first], linears):
        yield linear, cases.STUDY, rank, tuple(KINDS)
    for batch in batches:
        if not targets.comparable(batch):
            yield linears[0], batch, targets.FLAT_RANK, tuple(KINDS)


class Suite:
    """Runs measurements until `until`, writes a line for each, and remembers what was left out and what failed."""

    def __init__(self, out: Path, about: dict, clock: Clock = gpu_clock, device: str = "cuda", seconds: float = 0.25,
                 dtype: torch.dtype = torch.bfloat16):  # fmt: skip
        self.clock, self.device, self.seconds, self.dtype = clock, device, seconds, dtype
        self.section, self.until, self.about = "", math.inf, about
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / f"gpu_suite-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
        self.rows: list[dict] = []
        self.left_out: list[str] = []
        self.failed: list[str] = []
        self._checked: set[tuple] = set()

    def late(self, what: str) -> bool:
        """Whether the section's time is up; then `what` is left out."""
        if time.monotonic() > self.until:
            self.left_out.append(f"{self.section}: {what}")
            return True
        return False

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """A failure is shown now and named again at the end, and the next case gets its turn: a GPU is rare."""
        try:
            yield
        except Exception as reason:
            traceback.print_exc()
            first = (str(reason).splitlines() or [""])[0]
            self.failed.append(f"{self.section}: {what}: {type(reason).__name__}: {first}")
            print(f"FAILED {self.failed[-1]}", flush=True)

    def check(self, linear: cases.Linear, batch: cases.Batch, rank: int) -> None:
        """`problems.check`, once for each case that passes."""
        if (linear, batch, rank) not in self._checked:
            check(linear, batch, rank, device=self.device, dtype=self.dtype)
            self._checked.add((linear, batch, rank))

    def write(self, row: dict) -> dict:
        """One line of the file, with section, dtype, commit, versions and device."""
        row = {**self.about, "section": self.section, "dtype": str(self.dtype), **row}
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        return row

    def row(self, case: str, times: Times, *, baseline: str, floor: Times, **more) -> dict:
        """A measurement: the case, its times, and the ratio to the baseline measured in this run."""
        waits = times.host_bound or floor.host_bound
        row = {"case": case, **times._asdict(), "host_bound": waits, **more}
        if self.device == "cuda":
            row["peak_memory"] = torch.cuda.max_memory_allocated()
        row |= {"baseline": baseline, "baseline_p50": floor.p50, "ratio": times.p50 / floor.p50}
        print(f"{case:70} {times.p50:9.1f} µs  {row['ratio']:6.2f} x {baseline}{'  waits for the host' * waits}", flush=True)
        return self.write(row)

    def time(self, problems: list[Problem], make: Callable[[Problem], Callable[[], object]]) -> Times:
        calls = [make(one) for one in problems]
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return measure(calls, self.clock, self.seconds)

    def problems(self, linear: cases.Linear, batch: cases.Batch, rank: int) -> list[Problem]:
        return rotation(lambda seed: make_problem(linear, batch, rank, device=self.device, dtype=self.dtype, seed=seed))

    def kernels(self, batches=cases.BATCHES, ranks=cases.STUDY_RANKS, linears=cases.XLMR_BASE) -> None:
        """Forward and backward, and forward only, against the base products alone; then the cost per row by adapters."""
        for linear, batch, rank, kinds in kernel_plan(batches, ranks, linears):
            case = describe(linear, batch, rank)
            if self.late(case):
                continue
            with self.attempt(case):
                self.check(linear, batch, rank)
                problems = self.problems(linear, batch, rank)
                floors: dict[str, Times] = {}
                for name in kinds:
                    kind = KINDS[name]
                    if kind.baseline not in floors:
                        floors[kind.baseline] = self.time(problems, kind.floor)
                    times = self.time(problems, kind.make)
                    work = [one for one in cases.lora_work(linear, batch, rank) if one.name in kind.work]
                    fused = [name == "exact" or tuned.fuse(batch.total, batch.adapters, size) for size in (linear.k, linear.n)]
                    more = {
                        "kind": name, "linear": linear.name, "k": linear.k, "n": linear.n, "slices": linear.slices, "rank": rank,
                        **batch._asdict(), "fused": fused, "ceiling_share": sum(one.seconds for one in work) * 1e6 / times.p50,
                    }  # fmt: skip
                    self.row(f"{case}, {name}", times, baseline=kind.baseline, floor=floors[kind.baseline], **more)
        print(targets.flatness_line(targets.costs(self.rows, linears, batches)))

    def baselines(self, batch=None, ranks=tuple(targets.BOUNDS), linears=cases.XLMR_BASE) -> None:
        """grouped_mm and peft against ours, the ratio in the same run: how many times slower the other is."""
        batch = batch or cases.STUDY
        named, further = others()
        if len(named) < len(targets.FASTER):
            self.left_out.append("baselines: peft's, because peft or transformers is not installed")
        for rank, other, linear in (*product(ranks, named, linears), *product(ranks[:1], further, linears)):
            case = f"{describe(linear, batch, rank)}: {other.label}"
            if self.late(case):
                continue
            with self.attempt(case):
                self.check(linear, batch, rank)
                problems = self.problems(linear, batch, rank)
                ours = self.time(problems, other.ours)
                theirs = self.time(problems, other.make)
                more = {"other": other.name, "linear": linear.name, "rank": rank, **batch._asdict()}
                self.row(case, theirs, baseline="kloss", floor=ours, **more)

    def profile(self, batch=None, ranks=tuple(targets.BOUNDS), linears=cases.XLMR_BASE, record=profiled.record) -> None:
        """Where a pass of each linear spends its time, and against which ceiling; then the whole training step."""
        batch = batch or cases.STUDY
        for rank in ranks:
            columns = {}
            for linear in linears:
                case = f"profile of {describe(linear, batch, rank)}"
                if self.late(case):
                    continue
                with self.attempt(case):
                    self.check(linear, batch, rank)
                    work = cases.lora_work(linear, batch, rank)
                    rows = profiled.kernel_rows(record(self.passes(linear, batch, rank)), PASSES, work)
                    columns[linear.name] = rows, work
                    for row in rows:
                        self.write({"case": case, "linear": linear.name, "rank": rank, **batch._asdict(), **row})
            if columns:
                print(f"GPU µs a pass and share of the ceiling, {batch.adapters} x {batch.rows} rows, r={rank}")
                print("\n".join(profiled.work_table(columns)), flush=True)
            if rank == ranks[0] and not self.late("training step"):
                with self.attempt("training step"):
                    self.training_step(record)

    def passes(self, linear: cases.Linear, batch: cases.Batch, rank: int) -> Callable[[], None]:
        """Forward and backward, as often as a profile holds, over rotating inputs; made once already."""
        calls = [together(one) for one in self.problems(linear, batch, rank)]

        def run():
            for index in range(PASSES):
                calls[index % len(calls)]()

        run()
        return run

    def training_step(self, record=profiled.record, waits=profiled.waits_by_line, **sizes) -> None:
        """One packed step of all adapters: the GPU's time, the wall's, launches, and where the host waits."""
        checked = {name: size for name, size in sizes.items() if name in ("config", "rank")}
        training_step.check_step(device=self.device, dtype=self.dtype, **checked)
        step, batch = training_step.make_step(device=self.device, dtype=self.dtype, **sizes)
        walls = []
        for _ in range(8):  # the first ones compile
            began = time.perf_counter()
            step.step(batch)
            if self.device == "cuda":
                torch.cuda.synchronize()
            walls.append(1e6 * (time.perf_counter() - began))
        events = record(lambda: step.step(batch))
        found, top = profiled.summary(events, sorted(walls[3:])[2]), profiled.top_kernels(events)
        found["waits_by_line"] = dict(waits(lambda: step.step(batch)).most_common(20))
        bank = step.bank
        shape = {"adapters": bank.adapters, "rank": bank.rank, "layers": bank.config.num_hidden_layers}
        shape["tokens"] = batch.input_ids.numel()
        self.write({"case": "training step", **shape, **found})
        for row in top:
            self.write({"case": "kernel of a training step", **shape, **row})
        print(", ".join(f"{name} {value}" for name, value in shape.items()), end=": training step, ")
        print("\n".join(profiled.summary_lines(found, top)))
        for place, count in found["waits_by_line"].items():
            print(f"  {count:4d} waits at {place}")

    def tiles(self, batch=None, linears=cases.XLMR_BASE, rank=cases.STUDY_RANKS[0]) -> None:
        """Candidates for the table, each against the entry it would replace; one that the chip refuses is left out."""
        batch, arch = batch or cases.STUDY, tuned.arch_of(torch.device(self.device))
        for op, linear in product(CANDIDATES, linears[:: len(linears) - 1 or 1]):
            if self.late(f"{op} at {linear.name}"):
                continue
            with self.attempt(f"{op} at {linear.name}"):
                self.check(linear, batch, rank)
                problems = self.problems(linear, batch, rank)
                make = partial(together, exact=op == "fused")
                now = self.time(problems, make)
                for change in CANDIDATES[op]:
                    self.tile(op, arch, change, linear, batch, rank, problems, make, now)

    def tile(self, op, arch, change, linear, batch, rank, problems, make, now) -> None:
        """One candidate."""
        case = f"{op} {change} at {linear.name}"
        if self.late(case):
            return
        with self.attempt(case), table_entry(op, arch, change):
            try:
                check(linear, batch, rank, device=self.device, dtype=self.dtype)
                times = self.time(problems, make)
            except REFUSED as reason:
                self.left_out.append(f"{self.section}: {case}: {reason}")
                return
            self.row(case, times, baseline="the table's", floor=now, op=op, linear=linear.name, rank=rank, **change)


def describe(linear: cases.Linear, batch: cases.Batch, rank: int) -> str:
    """A case in words."""
    return f"{linear.name}, {batch.adapters} x {batch.rows} rows, r={rank}"


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
