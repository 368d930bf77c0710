"""The sections of the GPU suite (kernels, baselines, profile, tiles), and the targets beside their measurements."""

import json
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from kloss.kernels import tuned
from kloss.models import XLMRConfig

from . import baselines, cases, profiled, whole_step
from .cases import Batch, Linear, Problem
from .timing import Clock, Times, gpu_clock, measure, rotation

BOUNDS = {32: 1.15, 256: 1.8}  # rank -> time as a multiple of the frozen base products alone
FASTER = {"grouped_mm": 2.0, "peft in turn": 10.0}  # library -> its time as a multiple of ours
FLAT_RANK, FLAT = 32, 0.10
# What each op's entry in the table is tried with.
CANDIDATES: dict[str, list[dict]] = {
    "fused": [dict(BC=256), dict(BC=256, num_stages=4), dict(num_stages=4), dict(BC=64, num_warps=4)],
    "shrink": [dict(num_stages=4), dict(BK=128, num_stages=2), dict(num_warps=8)],
    "reduce": [dict(num_stages=3), dict(BK=32, num_stages=3), dict(num_warps=8)],
    "expand": [dict(num_stages=3), dict(num_warps=8)],
}
PASSES = 10  # of forward and backward in one profile
Record = Callable[[Callable[[], object]], list[profiled.Event]]
REFUSED = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)
STEP: dict[str, Any] = dict(
    config=XLMRConfig(vocab_size=1000, num_hidden_layers=4, num_labels=111), adapters=52, rank=32, utterances=32
)


class Form(NamedTuple):
    """A way to run the op, and the products alone that it is compared with. work: its entries of `cases.lora_work`."""

    make: Callable[[Problem], Callable[[], object]]
    floor: Callable[[Problem], Callable[[], object]]
    baseline: str
    work: tuple[str, ...]


ALL_WORK = ("S", "y", "dS", "dx", "dA", "dB")
FORMS = {
    "chosen": Form(cases.forward_backward, cases.base_alone, "base alone", ALL_WORK),
    "exact": Form(partial(cases.forward_backward, exact=True), cases.base_alone, "base alone", ALL_WORK),
    "forward only": Form(cases.forward_only, cases.base_forward, "base forward alone", ALL_WORK[:2]),
}


def kernel_plan(
    batches: Sequence[Batch], ranks: Sequence[int], linears: Sequence[Linear]
) -> Iterator[tuple[Linear, Batch, int, tuple[str, ...]]]:
    """What the kernels section measures, in order, a target's needs first: linear, batch, rank, forms."""
    shapes = [(cases.STUDY, rank) for rank in ranks if rank in BOUNDS]
    shapes += [(batch, FLAT_RANK) for batch in batches if comparable(batch) and batch != cases.STUDY]
    shapes += [(cases.STUDY, rank) for rank in ranks if rank not in BOUNDS]
    for (batch, rank), linear in product(shapes, linears):
        yield linear, batch, rank, tuple(FORMS) if batch == cases.STUDY else ("chosen",)
    yield from ((linears[0], batch, FLAT_RANK, tuple(FORMS)) for batch in batches if not comparable(batch))


class Suite:
    """Runs measurements until `until`, writes a line for each, and remembers what was left out and what failed."""

    def __init__(
        self, out: Path, about: dict, clock: Clock = gpu_clock, device: str = "cuda", seconds: float = 0.25,
        dtype: torch.dtype = torch.bfloat16,
    ):  # fmt: skip
        self.clock, self.device, self.seconds, self.dtype = clock, device, seconds, dtype
        self.section, self.until, self.about = "", math.inf, about
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / f"gpu_suite-{datetime.now(UTC):%Y%m%d-%H%M%S}.jsonl"
        self.rows: list[dict] = []
        self.left_out: list[str] = []
        self.failed: list[str] = []
        self._checked: set[tuple] = set()

    def late(self, case: str) -> bool:
        """Whether the section's time is up; then the case is left out."""
        if time.monotonic() > self.until:
            self.left_out.append(f"{self.section}: {case}")
            return True
        return False

    @contextmanager
    def attempt(self, case: str) -> Iterator[None]:
        """Print a failure now and list it at the end; the next case gets its turn, since a GPU is rare."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            first = (str(error).splitlines() or [""])[0]
            self.failed.append(f"{self.section}: {case}: {type(error).__name__}: {first}")
            print(f"FAILED {self.failed[-1]}", flush=True)

    def check(self, linear: Linear, batch: Batch, rank: int) -> None:
        """`cases.check`, once for each case that passes."""
        if (linear, batch, rank) not in self._checked:
            cases.check(linear, batch, rank, device=self.device, dtype=self.dtype)
            self._checked.add((linear, batch, rank))

    def write(self, row: dict) -> None:
        """Append a line to the file, with section, dtype, commit, versions and device."""
        row = {**self.about, "section": self.section, "dtype": str(self.dtype), **row}
        self.rows.append(row)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def write_times(self, case: str, times: Times, *, baseline: str, floor: Times, **more: object) -> None:
        """Write the times of a case with the ratio to the baseline's, `floor`, measured in this run."""
        host_bound, ratio = times.host_bound or floor.host_bound, times.p50 / floor.p50
        row = {"case": case, **times._asdict(), "host_bound": host_bound, **more}
        if self.device == "cuda":
            row["peak_memory"] = torch.cuda.max_memory_allocated()
        print(f"{case:70} {times.p50:9.1f} µs  {ratio:6.2f} x {baseline}{'  launch-bound' * host_bound}", flush=True)
        self.write({**row, "baseline": baseline, "baseline_p50": floor.p50, "ratio": ratio})

    def time(self, problems: list[Problem], make: Callable[[Problem], Callable[[], object]]) -> Times:
        """Times of the calls that `make` gives."""
        calls = [make(problem) for problem in problems]
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return measure(calls, self.clock, self.seconds)

    def problems(self, linear: Linear, batch: Batch, rank: int) -> list[Problem]:
        """Enough problems that none starts in the cache."""
        return rotation(lambda seed: cases.make_problem(linear, batch, rank, device=self.device, dtype=self.dtype, seed=seed))

    def kernels(
        self, batches: Sequence[Batch] = cases.BATCHES, ranks: Sequence[int] = cases.STUDY_RANKS,
        linears: Sequence[Linear] = cases.XLMR_BASE,
    ) -> None:  # fmt: skip
        """Forward and backward, and forward only, against the base products alone."""
        for linear, batch, rank, forms in kernel_plan(batches, ranks, linears):
            case = case_name(linear, batch, rank)
            if self.late(case):
                continue
            with self.attempt(case):
                self.check(linear, batch, rank)
                problems = self.problems(linear, batch, rank)
                floors: dict[str, Times] = {}
                for name in forms:
                    form = FORMS[name]
                    if form.baseline not in floors:
                        floors[form.baseline] = self.time(problems, form.floor)
                    times = self.time(problems, form.make)
                    least = sum(work.seconds for work in cases.lora_work(linear, batch, rank) if work.name in form.work) * 1e6
                    widths = (linear.k, linear.n), (linear.n, linear.k)
                    fused = [name == "exact" or tuned.fuse(batch.total, batch.adapters, *shape) for shape in widths]
                    more = {
                        "form": name, "linear": linear.name, "k": linear.k, "n": linear.n, "slices": linear.slices, "rank": rank,
                        **batch._asdict(), "fused": fused, "ceiling_share": least / times.p50,
                    }  # fmt: skip
                    self.write_times(f"{case}, {name}", times, baseline=form.baseline, floor=floors[form.baseline], **more)

    def baselines(self, ranks: Sequence[int] = tuple(BOUNDS), linears: Sequence[Linear] = cases.XLMR_BASE) -> None:
        """grouped_mm and peft as multiples of our time in the same run."""
        named, further = baselines.baselines()
        if len(named) < len(FASTER):
            self.left_out.append("baselines: peft's, because peft or transformers is not installed")
        for rank, library, linear in (*product(ranks, named, linears), *product(ranks[:1], further, linears)):
            case = f"{case_name(linear, cases.STUDY, rank)}: {library.label}"
            if self.late(case):
                continue
            with self.attempt(case):
                self.check(linear, cases.STUDY, rank)
                problems = self.problems(linear, cases.STUDY, rank)
                ours = self.time(problems, library.ours)
                theirs = self.time(problems, library.make)
                more = {"library": library.name, "linear": linear.name, "rank": rank, **cases.STUDY._asdict()}
                self.write_times(case, theirs, baseline="kloss", floor=ours, **more)

    def profile(
        self, ranks: Sequence[int] = tuple(BOUNDS), linears: Sequence[Linear] = cases.XLMR_BASE, record: Record = profiled.record
    ) -> None:
        """Time by kernel and share of the ceiling of each linear's forward and backward; also the whole training step."""
        for rank in ranks:
            columns = {}
            for linear in linears:
                case = f"profile of {case_name(linear, cases.STUDY, rank)}"
                if self.late(case):
                    continue
                with self.attempt(case):
                    self.check(linear, cases.STUDY, rank)
                    work = cases.lora_work(linear, cases.STUDY, rank)
                    rows = profiled.kernel_rows(record(self.passes(linear, cases.STUDY, rank)), PASSES, work)
                    columns[linear.name] = rows, work
                    for row in rows:
                        self.write({"case": case, "linear": linear.name, "rank": rank, **cases.STUDY._asdict(), **row})
            if columns:
                print(f"GPU µs a pass and share of the ceiling, {cases.STUDY.adapters} x {cases.STUDY.rows} rows, r={rank}")
                print("\n".join(profiled.work_table(columns)), flush=True)
            if rank == ranks[0] and not self.late("training step"):
                with self.attempt("training step"):
                    self.training_step(record)

    def passes(self, linear: Linear, batch: Batch, rank: int) -> Callable[[], None]:
        """PASSES of forward and backward over rotating inputs."""
        calls = [cases.forward_backward(problem) for problem in self.problems(linear, batch, rank)]

        def run() -> None:
            for index in range(PASSES):
                calls[index % len(calls)]()

        return run

    def training_step(
        self, record: Record = profiled.record, waits: Callable[..., Counter] = profiled.waits_by_line, **changes: object
    ) -> None:
        """The trainer's step with all adapters in one pass: the GPU's time, the wall's, launches, and the host's waits."""
        sizes = STEP | changes
        whole_step.check_step(sizes["config"], sizes["rank"], device=self.device, dtype=self.dtype)
        step = whole_step.make_step(**sizes, dropout=0.1, device=self.device, dtype=self.dtype)
        walls = []
        for _ in range(8):  # the first ones compile
            began = time.perf_counter()
            step.run()
            walls.append(1e6 * (time.perf_counter() - began))
        events = record(step.run)
        summary, top = profiled.summary(events, sorted(walls[3:])[2]), profiled.top_kernels(events)
        summary["waits_by_line"] = dict(waits(step.run).most_common(20))
        shape = {name: sizes[name] for name in ("adapters", "rank", "utterances")}
        shape |= {"layers": sizes["config"].num_hidden_layers, "tokens": len(step.sentences.input_ids)}
        self.write({"case": "training step", **shape, **summary})
        for row in top:
            self.write({"case": "kernel of a training step", **shape, **row})
        print("training step, " + ", ".join(f"{name} {value}" for name, value in shape.items()))
        print("\n".join(profiled.summary_lines(summary, top)))
        for line, count in summary["waits_by_line"].items():
            print(f"  {count:4d} waits at {line}")

    def tiles(self, linears: Sequence[Linear] = cases.XLMR_BASE, rank: int = cases.STUDY_RANKS[0]) -> None:
        """Candidates for the table, each against the entry it would replace; one that the chip refuses is left out."""
        arch = tuned.arch_of(torch.device(self.device))
        for op, linear in product(CANDIDATES, linears[:: len(linears) - 1 or 1]):
            if self.late(f"{op} at {linear.name}"):
                continue
            with self.attempt(f"{op} at {linear.name}"):
                self.check(linear, cases.STUDY, rank)
                problems = self.problems(linear, cases.STUDY, rank)
                make = partial(cases.forward_backward, exact=op == "fused")
                floor = self.time(problems, make)
                for change in CANDIDATES[op]:
                    case = f"{op} {change} at {linear.name}"
                    if self.late(case):
                        continue
                    with self.attempt(case), table_entry(op, arch, change):
                        try:
                            cases.check(linear, cases.STUDY, rank, device=self.device, dtype=self.dtype)
                            times = self.time(problems, make)
                        except REFUSED as error:
                            self.left_out.append(f"{self.section}: {case}: {error}")
                            continue
                        more = {"op": op, "linear": linear.name, "rank": rank, **change}
                        self.write_times(case, times, baseline="the table's", floor=floor, **more)


def case_name(linear: Linear, batch: Batch, rank: int) -> str:
    """A case in words."""
    return f"{linear.name}, {batch.adapters} x {batch.rows} rows, r={rank}"


@contextmanager
def table_entry(op: str, arch: int, change: dict) -> Iterator[None]:
    """Within it the table has other values for an op on an architecture; nothing else may run meanwhile."""
    key = (op, arch, "half")
    before = tuned.TABLE.get(key)
    tuned.TABLE[key] = tuned.launch(op, arch, torch.bfloat16)._replace(**change)
    try:
        yield
    finally:
        del tuned.TABLE[key]
        if before is not None:
            tuned.TABLE[key] = before


class Target(NamedTuple):
    """One target. met: None where it was not measured; `measured` then says what is missing."""

    goal: str
    measured: str
    met: bool | None

    @property
    def line(self) -> str:
        return f"{self.goal:72} {self.measured} {({None: '', True: 'yes', False: 'NO'})[self.met]}".rstrip()


def comparable(batch: Batch) -> bool:
    """Whether a batch has the study's number of rows within 5 %, so that their costs per row compare."""
    return abs(batch.total - cases.STUDY.total) <= 0.05 * cases.STUDY.total


def layer_rows(rows: Sequence[dict], linears: Sequence[Linear], /, **fields: object) -> list[dict]:
    """The latest row with these fields of each linear that has one."""
    by_linear = {row["linear"]: row for row in rows if all(row.get(name) == value for name, value in fields.items())}
    return [by_linear[linear.name] for linear in linears if linear.name in by_linear]


def costs(rows: Sequence[dict], linears: Sequence[Linear], batches: Sequence[Batch]) -> dict[int, float]:
    """Adapters -> ns per row of a layer, forward and backward, for comparable batches with all linears measured."""
    per_row = {}
    for batch in sorted(filter(comparable, batches)):
        layer = layer_rows(rows, linears, section="kernels", form="chosen", rank=FLAT_RANK, **batch._asdict())
        if len(layer) == len(linears):
            per_row[batch.adapters] = 1e3 * sum(row["p50"] for row in layer) / batch.total
    return per_row


def flatness(per_row: dict[int, float]) -> tuple[int, float] | None:
    """The number of adapters whose cost per row is farthest from one adapter's, and the signed relative difference."""
    differences = {adapters: ns / per_row[1] - 1 for adapters, ns in per_row.items() if adapters != 1 and 1 in per_row}
    return max(differences.items(), key=lambda item: abs(item[1]), default=None)


def targets(
    rows: Sequence[dict], linears: Sequence[Linear] = cases.XLMR_BASE, batches: Sequence[Batch] = cases.BATCHES
) -> list[Target]:
    """All targets. One needs measurements of all linears, else it counts as not measured."""
    answers: list[Target] = []

    def add(goal: str, at_most: float = math.inf, at_least: float = 0.0, **fields: object) -> None:
        layer = layer_rows(rows, linears, **fields, **cases.STUDY._asdict())
        if len(layer) < len(linears):
            answers.append(Target(goal, f"not measured ({len(layer)} of {len(linears)} linears)", None))
        else:
            ratio = sum(row["p50"] for row in layer) / sum(row["baseline_p50"] for row in layer)
            host_bound = any(row["host_bound"] for row in layer)
            answers.append(Target(goal, f"{ratio:.2f} x" + ", launch-bound" * host_bound, at_least <= ratio <= at_most))

    for rank, bound in BOUNDS.items():
        goal = f"forward + backward, r={rank}: at most {bound} x the base products alone"
        add(goal, at_most=bound, section="kernels", form="chosen", rank=rank)
    for (name, times), rank in product(FASTER.items(), BOUNDS):
        goal = f"at least {times:g} x as fast as {name}, r={rank}"
        add(goal, at_least=times, section="baselines", library=name, rank=rank)
    adapters = [batch.adapters for batch in sorted(filter(comparable, batches))]
    per_row = costs(rows, linears, batches)
    worst = flatness(per_row)
    goal = f"cost per row of {', '.join(map(str, adapters))} adapters flat within {FLAT:.0%}, r={FLAT_RANK}"
    if worst is None or [*per_row] != adapters:
        answers.append(Target(goal, f"not measured ({', '.join(map(str, per_row)) or 'none'} of them)", None))
    else:
        each = ", ".join(f"{adapters}: {ns:.1f}" for adapters, ns in per_row.items())
        answers.append(Target(goal, f"{worst[1]:+.1%} at {worst[0]} adapters; ns: {each}", abs(worst[1]) <= FLAT))
    return answers
