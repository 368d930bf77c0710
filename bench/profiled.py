"""Where the time goes: events of torch's profiler, and the rows and tables that are made of them.

`record` and `waits_by_line` need CUDA; all else is a function of a list of events.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType

from .cases import KernelWork
from .timing import ROOT

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuEventSynchronize")
LAUNCHES = ("cudaLaunch", "cuLaunch")  # cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernelEx, ...
MEMORY = ("Memcpy", "Memset")


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


def assign(kernels: Sequence[str]) -> list[str | None]:
    """The entry of `cases.lora_work` that each kernel belongs to; None: no entry.

    kernels: names of all kernels of passes forward and backward, in order of time. The vendor's product precedes the expand
    kernel that adds to it.
    """
    entries: list[str | None] = []
    entry, open_ = None, False  # open_: inside a y or dx block until its expand kernel ends it
    for name in kernels:
        if name.startswith("shrink_kernel"):
            entry, open_ = ("dS" if entry in ("S", "y") else "S"), True
        elif open_ and entry in ("S", "dS"):
            entry, open_ = ("y" if entry == "S" else "dx"), not name.startswith("expand_kernel")
        elif open_ and entry in ("y", "dx"):
            open_ = not name.startswith("expand_kernel")
        elif name.startswith("reduce_kernel"):
            entry = "dB" if entry == "dA" else "dA"
        elif not (name.startswith("sum_kernel") and entry in ("dA", "dB")):
            entries.append(None)
            continue
        entries.append(entry)
    return entries


def kernel_rows(events: Sequence[Event], passes: int, work: Sequence[KernelWork]) -> list[dict]:
    """A row for each kernel and entry of `work`, longest first.

    share: of the GPU's time.
    work: the entry or None.
    ceiling_share: time of the entry at the roofline, as a share of the time of all its kernels.
    Raises ValueError where no event is the GPU's.
    """
    gpu = _on_gpu(events)
    least = {item.name: item.seconds * 1e6 for item in work}
    spent: Counter[str | None] = Counter()
    kernels: dict[tuple[str | None, str], list[float]] = {}
    for event, entry in zip(gpu, assign([event.name for event in gpu]), strict=True):
        spent[entry] += event.us
        kernels.setdefault((entry, event.name), []).append(event.us)
    total = sum(spent.values())
    rows = []
    for (entry, name), us in kernels.items():
        share = least[entry] * passes / spent[entry] if entry in least else None
        rows.append({
            "kernel": name, "work": entry, "us_per_call": sum(us) / len(us), "calls_per_pass": len(us) / passes,
            "us_per_pass": sum(us) / passes, "share": sum(us) / total, "ceiling_share": share,
        })  # fmt: skip
    return sorted(rows, key=lambda row: -row["us_per_pass"])


def work_table(columns: Mapping[str, tuple[list[dict], Sequence[KernelWork]]]) -> list[str]:
    """Lines of a table, work by linear, with sums: microseconds per pass and share of the ceiling.

    columns: for each linear its `kernel_rows` and its work.
    """
    entries = [item.name for item in next(iter(columns.values()))[1]]
    least = {linear: {item.name: item.seconds * 1e6 for item in work} for linear, (_, work) in columns.items()}
    spent: dict[str, Counter] = {linear: Counter() for linear in columns}
    for linear, (rows, _) in columns.items():
        for row in rows:
            spent[linear][row["work"]] += row["us_per_pass"]

    def cell(linears: Iterable[str], entries: Sequence[str | None]) -> str:
        us = sum(spent[linear][entry] for linear in linears for entry in entries)
        at_best = sum(least[linear].get(entry, 0.0) for linear in linears for entry in entries)
        return f"{us:9.1f} {at_best / us:5.0%}" if us and at_best else f"{us:9.1f}      "

    lines = ["work  " + " ".join(f"{name[:17]:>17}" for name in (*columns, "all"))]
    for label, summed in (*((entry, [entry]) for entry in entries), ("other", [None]), ("all", [*entries, None])):
        cells = [cell(linears, summed) for linears in (*([linear] for linear in columns), list(columns))]
        lines.append(f"{label:6}" + " ".join(f"{text:>17}" for text in cells))
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
