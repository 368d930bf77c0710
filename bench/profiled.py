"""What measurements say: from the profiler's events to the parts of a step, from the suite's rows to the targets.

`record` and `waits_by_line` need CUDA; all else is a function of a list of events or rows.
"""

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType

from . import cases
from .cases import Batch, Linear
from .timing import ROOT

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuEventSynchronize")
LAUNCHES = ("cudaLaunch", "cuLaunch")  # cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernelEx, ...
MEMORY = ("Memcpy", "Memset")
# Parts of a step by the names of kernels: Triton's are whole names, csrc's stand within C++ ones, the vendor's vary.
PARTS = {
    "S, dS": r"^shrink_kernel",
    "y, dx": r"^expand_kernel|\blinear_kernel|gemm|nvjet|cutlass|splitK",  # LoRA's terms and the base products
    "dA, dB": r"^(reduce|sum)_kernel",
    "attention": r"^attend_",
    "add_norm": r"^(add_norm|dropout_kernel)",
    "embeddings": r"^embed_",
    "heads, loss": r"^(adapter_linear|bias_gradient|token_loss)_",
    "AdamW": r"\b(squares|finish|update)_kernel\b",
    "lists, keys": r"^(keys|limits)_kernel|\b(phases|entries)_kernel\b",
    "GELU": r"Gelu",
    "copies, fills": r"^Mem(cpy|set)",
}

BOUNDS = {32: 1.15, 256: 1.8}  # rank -> time as a multiple of the frozen base products alone
FASTER = {"grouped_mm": 2.0, "peft in turn": 10.0}  # library -> its time as a multiple of ours
FLAT_RANK, FLAT = 32, 0.10


class Event(NamedTuple):
    """An event of the profiler, times in microseconds. on_gpu: a kernel, a copy or a fill; else the host's call of CUDA."""

    name: str
    on_gpu: bool
    start: float
    us: float


def events_of(function_events: Iterable) -> list[Event]:
    """Events of a finished profile (`profile.events()`) in order of time: the GPU's, and the host's calls of CUDA."""
    events = []
    for event in function_events:
        on_gpu = event.device_type == DeviceType.CUDA
        if not getattr(event, "is_user_annotation", False) and (on_gpu or event.name.startswith("cu")):
            events.append(Event(event.name, on_gpu, event.time_range.start, event.time_range.elapsed_us()))
    return sorted(events, key=lambda event: event.start)


def record(call: Callable[[], object]) -> list[Event]:
    """Events of a call, which is made twice: the first session also starts the profiler itself."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for _ in range(2):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            torch.cuda.synchronize()
    return events_of(profiler.events())


def part_of(kernel: str) -> str:
    """The part of a step that a kernel, a copy or a fill belongs to, of PARTS; "rest" for all else."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, kernel)), "rest")


def step_parts(events: Sequence[Event], least: Mapping[str, float]) -> list[dict]:
    """A row for each part of a step that the GPU spent time on, longest first.

    least: seconds of a part at the roofline (`cases.step_work`).
    us, share: of the GPU's time. kernels: launches. ceiling_share: time at the roofline as a share of the time; None without one.
    Raises ValueError where no event is the GPU's.
    """
    gpu = _on_gpu(events)
    us, kernels = Counter(), Counter(part_of(event.name) for event in gpu)
    for event in gpu:
        us[part_of(event.name)] += event.us
    total = sum(us.values())
    return [
        {
            "part": part, "us": spent, "share": spent / total, "kernels": kernels[part],
            "ceiling_share": 1e6 * least[part] / spent if least.get(part) else None,
        }
        for part, spent in us.most_common()
    ]  # fmt: skip


def parts_lines(parts: Sequence[dict]) -> list[str]:
    """The rows of `step_parts` as lines of a table."""
    lines = [f"{'part':16} {'µs':>10} {'share':>6} {'kernels':>8} {'of the ceiling':>15}"]
    for row in parts:
        ceiling = "" if row["ceiling_share"] is None else f"{row['ceiling_share']:.0%}"
        lines.append(f"{row['part']:16} {row['us']:10.1f} {row['share']:6.0%} {row['kernels']:8d} {ceiling:>15}".rstrip())
    return lines


def top_kernels(events: Sequence[Event], count: int = 15) -> list[dict]:
    """The kernels, copies and fills with most of the GPU's time: name, us of all calls, calls, share."""
    gpu = _on_gpu(events)
    us, calls = Counter(), Counter(event.name for event in gpu)
    for event in gpu:
        us[event.name] += event.us
    total = sum(us.values())
    most = us.most_common(count)
    return [{"kernel": name, "us": spent, "calls": calls[name], "share": spent / total} for name, spent in most]


def summary(events: Sequence[Event], wall_us: float) -> dict:
    """The GPU's time against the wall's, and the host's launches, waits and copies.

    wall_us: of the same call without the profiler.
    launches, waits by name: None where the profile holds no call of CUDA.
    """
    gpu, host = _on_gpu(events), [event.name for event in events if not event.on_gpu]
    us = sum(event.us for event in gpu)
    return {
        "wall_us": wall_us, "gpu_us": us, "gpu_share": us / wall_us,
        "kernels": sum(not event.name.startswith(MEMORY) for event in gpu),
        "launches": sum(name.startswith(LAUNCHES) for name in host) if host else None,
        "waits": dict(Counter(name for name in host if name in WAITS)) if host else None,
        "device_to_host": sum(event.name.startswith("Memcpy DtoH") for event in gpu),
        "host_to_device": sum(event.name.startswith("Memcpy HtoD") for event in gpu),
    }  # fmt: skip


def summary_lines(step: dict, top: Sequence[dict]) -> list[str]:
    """A `summary` in words, then the table of its `top_kernels`."""
    if step["waits"] is None:
        host = "the profile holds no call of CUDA on the host"
    else:
        waits = ", ".join(f"{count} {name}" for name, count in step["waits"].items()) or "none"
        host = f"{step['launches']} launches; waits of the host for the GPU: {waits}"
    wall, gpu = 1e-3 * step["wall_us"], 1e-3 * step["gpu_us"]
    lines = [
        f"wall {wall:.2f} ms, GPU {gpu:.2f} ms ({step['gpu_share']:.0%}): {wall - gpu:.2f} ms of launches and waits",
        f"{step['kernels']} kernels, {host}",
        f"copies: {step['device_to_host']} to the host, {step['host_to_device']} from it",
    ]
    return lines + [f"{row['us']:9.1f} µs {row['share']:4.0%} {row['calls']:5d} x  {row['kernel'][:80]}" for row in top]


def waits_by_line(call: Callable[[], object]) -> Counter[str]:
    """How often each line of Python waits for the GPU in a call, by torch's synchronisation warnings."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    lines: Counter[str] = Counter()
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            path = Path(warning.filename)
            name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
            lines[f"{name}:{warning.lineno}"] += 1
    return lines


def _on_gpu(events: Sequence[Event]) -> list[Event]:
    gpu = [event for event in events if event.on_gpu]
    if not gpu:
        raise ValueError("the profiler saw no kernel on the GPU")
    return gpu


class StepSize(NamedTuple):
    """A whole step: utterances of each adapter."""

    adapters: int
    rank: int
    utterances: int


# Milliseconds that a step may take, by what a GPU's name says.
STEP_BOUNDS: dict[StepSize, dict[str, float]] = {
    StepSize(52, 32, 32): {"H200": 18, "H100": 21},
    StepSize(1, 32, 32): {"H200": 1.5},
    StepSize(52, 256, 32): {"H200": 42},
}
STEPS = tuple(STEP_BOUNDS)
PEFT_STEP = 50.0  # peft's whole step as a multiple of ours


class Target(NamedTuple):
    """One target.

    met: None where it was not measured, or where there is no bound for this GPU; `measured` then says so.
    distance: measured as a multiple of the bound, so that below 1 is met; None with met.
    """

    goal: str
    measured: str
    met: bool | None
    distance: float | None = None

    @property
    def line(self) -> str:
        answer = {None: "", True: "yes", False: "NO"}[self.met]
        if self.distance is not None:
            answer += f", {abs(1 - self.distance):.0%} {'to spare' if self.met else 'off'}"
        return f"{self.goal:76} {self.measured} {answer}".rstrip()


def layer_rows(rows: Sequence[dict], linears: Sequence[Linear], /, **fields: object) -> list[dict]:
    """The latest row with these fields of each linear that has one."""
    by_linear = {row["linear"]: row for row in rows if all(row.get(name) == value for name, value in fields.items())}
    return [by_linear[linear.name] for linear in linears if linear.name in by_linear]


def costs(rows: Sequence[dict], linears: Sequence[Linear], batches: Sequence[Batch]) -> dict[int, float]:
    """Adapters -> ns per row of a layer, forward and backward, for comparable batches with all linears measured."""
    per_row = {}
    for batch in sorted(batch for batch in batches if batch.comparable):
        layer = layer_rows(rows, linears, section="kernels", form="chosen", rank=FLAT_RANK, **batch._asdict())
        if len(layer) == len(linears):
            per_row[batch.adapters] = 1e3 * sum(row["p50"] for row in layer) / batch.total
    return per_row


def flatness(per_row: dict[int, float]) -> tuple[int, float] | None:
    """The number of adapters whose cost per row is farthest from one adapter's, and the signed relative difference."""
    differences = {adapters: ns / per_row[1] - 1 for adapters, ns in per_row.items() if adapters != 1 and 1 in per_row}
    return max(differences.items(), key=lambda item: abs(item[1]), default=None)


def step_targets(rows: Sequence[dict], device: str) -> list[Target]:
    """Whole steps against STEP_BOUNDS, by the fastest way, and against peft's."""
    answers = []
    for size, bounds in STEP_BOUNDS.items():
        bound = next((bound for name, bound in bounds.items() if name in device), None)
        allowed = " or ".join(f"{ms:g} ms on an {name}" for name, ms in bounds.items())
        goal = f"whole step, {size.adapters} x {size.utterances} utterances, r={size.rank}: at most {allowed}"
        own = [row for row in rows if row.get("case") == "whole step" and size._asdict().items() <= row.items()]
        if not own:
            answers.append(Target(goal, "not measured", None))
            continue
        fastest = min(own, key=lambda row: row["p50"])
        ms, measured = 1e-3 * fastest["p50"], f"{1e-3 * fastest['p50']:.2f} ms {fastest['way']}"
        if bound is None:
            answers.append(Target(goal, f"{measured}; no bound for this GPU", None))
        else:
            answers.append(Target(goal, measured, ms <= bound, ms / bound))
    goal = f"whole step at least {PEFT_STEP:g} x as fast as peft one adapter at a time, r={STEPS[0].rank}"
    peft = [row["ratio"] for row in rows if row.get("library") == "peft whole step"]
    if peft:
        answers.append(Target(goal, f"{peft[-1]:.1f} x", peft[-1] >= PEFT_STEP, PEFT_STEP / peft[-1]))
    else:
        answers.append(Target(goal, "not measured", None))
    return answers


def targets(
    rows: Sequence[dict], linears: Sequence[Linear] = cases.XLMR_BASE, batches: Sequence[Batch] = cases.BATCHES
) -> list[Target]:
    """The targets of the linears. One needs measurements of all linears, else it counts as not measured."""
    answers: list[Target] = []

    def add(goal: str, distance: Callable[[float], float], **fields: object) -> None:
        layer = layer_rows(rows, linears, **fields, **cases.STUDY._asdict())
        if len(layer) < len(linears):
            answers.append(Target(goal, f"not measured ({len(layer)} of {len(linears)} linears)", None))
        else:
            ratio = sum(row["p50"] for row in layer) / sum(row["baseline_p50"] for row in layer)
            host_bound = any(row["host_bound"] for row in layer)
            measured = f"{ratio:.2f} x" + ", launch-bound" * host_bound
            answers.append(Target(goal, measured, distance(ratio) <= 1, distance(ratio)))

    for rank, bound in BOUNDS.items():
        goal = f"forward + backward, r={rank}: at most {bound} x the base products alone"
        add(goal, lambda ratio, bound=bound: ratio / bound, section="kernels", form="chosen", rank=rank)
    for (name, times), rank in product(FASTER.items(), BOUNDS):
        goal = f"at least {times:g} x as fast as {name}, r={rank}"
        add(goal, lambda ratio, times=times: times / ratio, section="baselines", library=name, rank=rank)
    adapters = [batch.adapters for batch in sorted(batch for batch in batches if batch.comparable)]
    per_row = costs(rows, linears, batches)
    worst = flatness(per_row)
    goal = f"cost per row of {', '.join(map(str, adapters))} adapters flat within {FLAT:.0%}, r={FLAT_RANK}"
    if worst is None or [*per_row] != adapters:
        answers.append(Target(goal, f"not measured ({', '.join(map(str, per_row)) or 'none'} of them)", None))
    else:
        each = ", ".join(f"{adapters}: {ns:.1f}" for adapters, ns in per_row.items())
        answers.append(Target(goal, f"{worst[1]:+.1%} at {worst[0]} adapters; ns: {each}", abs(worst[1]) <= FLAT))
    return answers
