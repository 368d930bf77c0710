"""What the sections of the GPU suite do: linears, decisions, whole steps, other libraries. `gpu_suite.py` says in which order."""

import json
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from kloss.kernels import lora_shrink, lora_tiles, tuned
from kloss.models import XLMRConfig

from . import baselines, cases, profiled, whole_step
from .cases import Batch, Linear, Problem
from .timing import Clock, Times, gpu_clock, measure, rotation

NOW, NOISE = "now", 0.01  # the candidate that is set; smaller differences are none
REFUSED = (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError)
BASE = XLMRConfig(vocab_size=30_000, num_labels=111)  # XLM-R base, but for words that no batch would hold
Record = Callable[[Callable[[], object]], list[profiled.Event]]


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
# Kernels that are timed by themselves, in a pass forward and backward: their names, and whether the base product is in them.
ALONE = {
    "fused": ("expand_kernel", True), "expand": ("expand_kernel", False), "shrink": ("shrink_kernel", False),
    "reduce": ("reduce_kernel", False), "sum": ("sum_kernel", False),
}  # fmt: skip


class Shape(NamedTuple):
    """Where a decision is timed. linear: index into the section's linears."""

    linear: int
    rank: int
    batch: Batch | None = None  # None: the study's


class Decision(NamedTuple):
    """A choice that waits for hardware.

    name: what is set.
    decides: what follows from it.
    timed: "linear" (forward and backward, in Triton), "chosen" (the same by what serves best), a key of ALONE, or one of
        `cases.PARTS`.
    shapes: of all but `cases.PARTS`; their times are added up.
    candidates: what it could be -> the settings that make it so, as `changed` takes them. What is set now needs no entry.
    """

    name: str
    decides: str
    timed: str
    shapes: tuple[Shape, ...]
    candidates: Mapping[str, Mapping[str, object]]


def kernel_plan(
    batches: Sequence[Batch], ranks: Sequence[int], linears: Sequence[Linear]
) -> Iterator[tuple[Linear, Batch, int, tuple[str, ...]]]:
    """What the kernels section measures, in order, a target's needs first: linear, batch, rank, forms."""
    shapes = [(cases.STUDY, rank) for rank in ranks if rank in profiled.BOUNDS]
    shapes += [(batch, profiled.FLAT_RANK) for batch in batches if batch.comparable and batch != cases.STUDY]
    shapes += [(cases.STUDY, rank) for rank in ranks if rank not in profiled.BOUNDS]
    for (batch, rank), linear in product(shapes, linears):
        yield linear, batch, rank, tuple(FORMS) if batch == cases.STUDY else ("chosen",)
    yield from ((linears[0], batch, profiled.FLAT_RANK, tuple(FORMS)) for batch in batches if not batch.comparable)


class Suite:
    """Runs measurements until `until`, writes a line for each, and remembers what was left out and what failed."""

    def __init__(
        self, out: Path, about: dict, clock: Clock = gpu_clock, device: str = "cuda", seconds: float = 0.25,
        dtype: torch.dtype = torch.bfloat16,
    ):  # fmt: skip
        self.clock, self.device, self.seconds, self.dtype, self.config = clock, device, seconds, dtype, BASE
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
        """`cases.check` of all forms, once for each case that passes."""
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
        return self.time_calls([make(problem) for problem in problems])

    def time_calls(self, calls: list[Callable[[], object]]) -> Times:
        """Times of the calls, which are made in turn."""
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
                    more = {
                        "form": name, "linear": linear.name, "k": linear.k, "n": linear.n, "slices": linear.slices, "rank": rank,
                        **batch._asdict(), "ceiling_share": least / times.p50,
                    }  # fmt: skip
                    self.write_times(f"{case}, {name}", times, baseline=form.baseline, floor=floors[form.baseline], **more)

    def baselines(self, ranks: Sequence[int] = tuple(profiled.BOUNDS), linears: Sequence[Linear] = cases.XLMR_BASE) -> None:
        """grouped_mm and peft as multiples of our time in the same run."""
        named, further = baselines.baselines()
        if len(named) < len(profiled.FASTER):
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

    def decide(self, decision: Decision, linears: Sequence[Linear] = cases.XLMR_BASE) -> None:
        """Time a decision's candidates beside what is set now."""
        arch = tuned.arch_of(torch.device(self.device))
        now = set_now(decision, arch)
        for shape in decision.shapes or (Shape(0, 0),):
            floor: Times | None = None
            for label, settings in {NOW: {}, **decision.candidates}.items():
                case = f"{decision.name}, {label}: {decision.timed}"
                if decision.shapes:
                    case += f" at {case_name(linears[shape.linear], shape.batch or cases.STUDY, shape.rank)}"
                if (label != NOW and floor is None) or self.late(case):
                    continue
                with self.attempt(case), changed(settings, arch):
                    try:
                        times = self.time_calls(self.calls(decision.timed, shape, linears))
                    except REFUSED as error:
                        self.left_out.append(f"{self.section}: {case}: {error}")
                        continue
                    floor = floor or times
                    more = {"decision": decision.name, "candidate": label, "now": now, **shape._asdict()}
                    self.write_times(case, times, baseline=NOW, floor=floor, **more)

    def calls(self, timed: str, shape: Shape, linears: Sequence[Linear]) -> list[Callable[[], object]]:
        """What a decision times, checked, on enough data that none starts in the cache."""
        where = {"device": self.device, "dtype": self.dtype}
        if timed in cases.PARTS:
            cases.check_part(timed, self.config, **where)
            lengths = whole_step.massive_lengths(32 * cases.STUDY.adapters, torch.Generator().manual_seed(0))
            return [cases.make_part(timed, self.config, lengths, **where, seed=seed).forward_backward() for seed in range(2)]
        linear, batch = linears[shape.linear], shape.batch or cases.STUDY
        kernel, exact = ALONE.get(timed, ("", False))
        cases.check(linear, batch, shape.rank, **where, forms=("exact",) if exact else ("chosen",))
        op = cases.chosen_linear if timed == "chosen" else cases.triton_linear
        calls = [cases.forward_backward(problem, exact=exact, op=op) for problem in self.problems(linear, batch, shape.rank)]
        return [alone(call, kernel) for call in calls] if kernel else calls

    def vendor(self, linears: Sequence[Linear] = cases.XLMR_BASE) -> None:
        """The vendor's base products, forward and dx: alone, and on top of what is there."""
        for linear in linears[::2]:
            for name, make in (("alone", cases.base_alone), ("on top, beta = 1", cases.base_on_top)):
                case = f"{linear.name}, {cases.STUDY.adapters} x {cases.STUDY.rows} rows, base products {name}"
                if not self.late(case):
                    with self.attempt(case):
                        times = self.time(self.problems(linear, cases.STUDY, profiled.FLAT_RANK), make)
                        self.write_times(case, times, baseline="itself", floor=times, linear=linear.name, form=name)

    def steps(
        self,
        sizes: Sequence[profiled.StepSize],
        record: Record = profiled.record,
        waits: Callable[..., Counter] = profiled.waits_by_line,
    ) -> None:
        """The trainer's whole step, packing included: the wall's time, the GPU's by part and kernel, launches and waits."""
        for size in sizes:
            case = f"whole step, {size.adapters} x {size.utterances} utterances, r={size.rank}"
            if self.late(case):
                continue
            with self.attempt(case):
                few = replace(self.config, num_hidden_layers=min(2, self.config.num_hidden_layers))
                whole_step.check_step(few, size.rank, device=self.device, dtype=self.dtype)
                step = whole_step.make_step(self.config, **size._asdict(), dropout=0.1, device=self.device, dtype=self.dtype)
                for way, call in whole_step.ways_of_a_step(step).items():
                    with self.attempt(f"{case}, {way}"):
                        self.step(case, way, step, call, size, record, waits)

    def step(
        self, case: str, way: str, step: whole_step.TrainingStep, call: Callable[[], object], size: profiled.StepSize,
        record: Record, waits: Callable[..., Counter],
    ) -> None:  # fmt: skip
        """One way to run a step: time it, then profile it."""
        shape = {**size._asdict(), "layers": self.config.num_hidden_layers, "tokens": len(step.sentences.input_ids), "way": way}
        walls = whole_step.quantiles([whole_step.wall(call) for _ in range(10)][3:])  # the first ones compile
        self.write({"case": "whole step", **shape, **walls})
        events = record(call)
        least = cases.step_work(self.config, shape["tokens"], size.adapters, size.rank, step.bank.param.numel())
        parts, top = profiled.step_parts(events, least), profiled.top_kernels(events)
        summary = profiled.summary(events, walls["p50"])
        summary["waits_by_line"] = dict(waits(call).most_common(20))
        self.write({"case": "profile of a step", **shape, **summary})
        for row in parts:
            self.write({"case": "part of a step", **shape, **row})
        for row in top:
            self.write({"case": "kernel of a step", **shape, **row})
        print(f"{case}, {way}, {shape['tokens']} tokens")
        print("\n".join(profiled.summary_lines(summary, top)[:3] + profiled.parts_lines(parts)))
        print("\n".join(profiled.summary_lines(summary, top)[3:]))
        for line, count in summary["waits_by_line"].items():
            print(f"  {count:4d} waits at {line}", flush=True)

    def peft_step(self, size: profiled.StepSize) -> None:
        """peft's whole step, one adapter at a time, as a multiple of ours."""
        case = "peft's whole step"
        if self.late(case):
            return
        with self.attempt(case):
            ours, theirs, count = whole_step.beside_peft(self.config, **size._asdict(), device=self.device, dtype=self.dtype)
            row = {
                **size._asdict(),
                "layers": self.config.num_hidden_layers,
                "library": "peft whole step",
                "timed_adapters": count,
            }
            self.write({"case": case, **row, "p50": theirs, "baseline": "kloss", "baseline_p50": ours, "ratio": theirs / ours})
            print(f"{case}: {theirs / 1e3:.0f} ms, ours {ours / 1e3:.1f} ms: {theirs / ours:.1f} x", flush=True)


def set_now(decision: Decision, arch: int) -> str:
    """What is set now of the first candidate's setting, in words; of a table's entry the fields that any candidate changes."""
    setting = next(iter(next(iter(decision.candidates.values()))))
    path, _, key = setting.partition(" ")
    if path == "tuned.TABLE":
        fields = dict.fromkeys(field for change in decision.candidates.values() for field in change[setting])  # type: ignore
        return ", ".join(f"{field}={getattr(entry_of(key, arch), field)}" for field in fields)
    value = _value(path)
    return str(value[key] if key else value)


def entry_of(op: str, arch: int) -> tuned.Launch:
    """The table's entry for an op in 16 bits on an architecture; a wide one that has none is the op's."""
    found = tuned.TABLE.get((op, arch, "half")) or tuned.DEFAULT.get((op, "half"))
    return found or entry_of(op.split()[-1], arch)


def _value(path: str) -> Any:
    module, name = path.split(".")
    return getattr(import_module(f"kloss.kernels.{module}"), name)


@contextmanager
def changed(settings: Mapping[str, Any], arch: int) -> Iterator[None]:
    """Within it settings of kloss.kernels have other values; nothing else may run meanwhile.

    settings: "module.NAME" -> its value; "module.NAME key" -> the value of an entry of a mapping; "tuned.TABLE op" -> the fields
        that change in an op's entry for `arch`.
    """
    with ExitStack() as stack:
        for setting, value in settings.items():
            path, _, key = setting.partition(" ")
            if path == "tuned.TABLE":
                patch: Any = mock.patch.dict(tuned.TABLE, {(key, arch, "half"): entry_of(key, arch)._replace(**value)})
            elif key:
                patch = mock.patch.dict(_value(path), {key: value})
            else:
                patch = mock.patch(f"kloss.kernels.{path}", value)
            stack.enter_context(patch)
        yield


def alone(call: Callable[[], object], kernel: str) -> Callable[[], object]:
    """A call that launches only this Triton kernel of the linear, as often as `call` does and with the same arguments.

    Raises ValueError where `call` launches none.
    """
    listed: list[Callable[[], object]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(**arguments: Any) -> None:
                listed.append(partial(real[grid], **arguments))
                real[grid](**arguments)

            return launch

    module = lora_shrink if hasattr(lora_shrink, kernel) else lora_tiles
    real = getattr(module, kernel)
    with mock.patch.object(module, kernel, Recorder()):
        call()
    if not listed:
        raise ValueError(f"no {kernel} was launched")
    return lambda: [launch() for launch in listed]


def case_name(linear: Linear, batch: Batch, rank: int) -> str:
    """A case in words."""
    return f"{linear.name}, {batch.adapters} x {batch.rows} rows, r={rank}"
