"""Where the time goes: events of torch's profiler, and the rows and tables that are made of them.

`record` and `waits_by_line` need CUDA; all else is a function of a list of events.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.autograd import DeviceType

from .cases import Work

ROOT = Path(__file__).resolve().parents[1]
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuEventSynchronize")
LAUNCHES = ("cudaLaunch", "cuLaunch")  # cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernelEx, ...
MEMORY = ("Memcpy", "Memset")


class Event(NamedTuple):
    """What the profiler saw, times in microseconds. on_gpu: a kernel, a copy or a fill; else a call of CUDA on the host."""

    name: str
    on_gpu: bool
    start: float
    us: float


def events_of(function_events: Iterable) -> list[Event]:
    """Events of a finished profile (`profile.events()`) in order of time: the GPU's, and the host's calls of CUDA."""
    found = []
    for event in function_events:
        on_gpu = event.device_type == DeviceType.CUDA
        if getattr(event, "is_user_annotation", False) or not (on_gpu or event.name.startswith("cu")):
            continue
        found.append(Event(event.name, on_gpu, event.time_range.start, event.time_range.elapsed_us()))
    return sorted(found, key=lambda event: event.start)


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
    """The entry of `cases.lora_work` that each kernel works for, given all kernels of passes forward and backward in order.

    Backward follows forward, and the vendor's product comes before the expand that adds to it; None: a kernel of neither.
    """
    entries, now, open_ = [], None, False  # open_: an expand is still to come, so that what comes before it belongs to it
    for name in kernels:
        if name.startswith("shrink_kernel"):
            now, open_ = ("dS" if now in ("S", "y") else "S"), True
        elif open_ and now in ("S", "dS"):
            now, open_ = ("y" if now == "S" else "dx"), not name.startswith("expand_kernel")
        elif open_ and now in ("y", "dx"):
            open_ = not name.startswith("expand_kernel")
        elif name.startswith("reduce_kernel"):
            now = "dB" if now == "dA" else "dA"
        elif not (name.startswith("sum_kernel") and now in ("dA", "dB")):
            entries.append(None)
            continue
        entries.append(now)
    return entries


def kernel_rows(events: Sequence[Event], passes: int, work: Sequence[Work]) -> list[dict]:
    """A row for each kernel and entry of `work`, longest first.

    us_per_call; calls_per_pass; us_per_pass; share: of the GPU's time; work: the entry or None; ceiling_share: of the entry's
    time with all its kernels, how much it would take at the ceilings. Raises ValueError where there is no event of a GPU.
    """
    gpu = _on_gpu(events)
    least = {one.name: one.seconds * 1e6 for one in work}
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


def work_table(columns: dict[str, tuple[list[dict], Sequence[Work]]]) -> list[str]:
    """Lines of a table: microseconds a pass and the share of the ceiling, work by linear, with their sum.

    columns: for each linear its `kernel_rows` and its work.
    """
    names = [one.name for one in next(iter(columns.values()))[1]]
    least = {linear: {one.name: one.seconds * 1e6 for one in work} for linear, (_, work) in columns.items()}
    spent: dict[str, Counter] = {linear: Counter() for linear in columns}
    for linear, (rows, _) in columns.items():
        for row in rows:
            spent[linear][row["work"]] += row["us_per_pass"]

    def cell(linears: Iterable[str], chosen: Sequence[str | None]) -> str:
        us = sum(spent[linear][name] for linear in linears for name in chosen)
        at_best = sum(least[linear].get(name, 0.0) for linear in linears for name in chosen)
        return f"{us:9.1f} {at_best / us:5.0%}" if us and at_best else f"{us:9.1f}      "

    lines = ["work  " + " ".join(f"{name[:17]:>17}" for name in (*columns, "all"))]
    for label, chosen in (*((name, [name]) for name in names), ("other", [None]), ("all", [*names, None])):
        cells = [*([linear] for linear in columns), list(columns)]
        lines.append(f"{label:6}" + " ".join(f"{cell(linears, chosen):>17}" for linears in cells))
    return lines


def top_kernels(events: Sequence[Event], count: int = 15) -> list[dict]:
    """The kernels, copies and fills that take most of the GPU's time: name, us of all calls, calls, share."""
    gpu = _on_gpu(events)
    us, calls = Counter(), Counter(event.name for event in gpu)
    for event in gpu:
        us[event.name] += event.us
    total = sum(us.values())
    most = us.most_common(count)
    return [{"kernel": name, "us": spent, "calls": calls[name], "share": spent / total} for name, spent in most]


def summary(events: Sequence[Event], wall_us: float) -> dict:
    """The GPU's time against the wall's, and what the host did: launches, waits, copies.

    wall_us: of the same call, taken without the profiler. waits: calls that waited for the GPU, by name. launches and waits are
    None where the profile holds no call of CUDA at all.
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


def summary_lines(found: dict, top: Sequence[dict]) -> list[str]:
    """The summary in words, then the table of its kernels."""
    if found["waits"] is None:
        host = "the profile holds no call of CUDA on the host"
    else:
        waits = ", ".join(f"{count} {name}" for name, count in found["waits"].items()) or "none"
        host = f"{found['launches']} launches; waits of the host for the GPU: {waits}"
    gap = 1e-3 * (found["wall_us"] - found["gpu_us"])
    lines = [
        f"wall {1e-3 * found['wall_us']:.2f} ms, GPU {1e-3 * found['gpu_us']:.2f} ms ({found['gpu_share']:.0%}): "
        f"{gap:.2f} ms of launches and waits",
        f"{found['kernels']} kernels, {host}",
        f"copies: {found['device_to_host']} to the host, {found['host_to_device']} from it",
    ]
    return lines + [f"{row['us']:9.1f} µs {row['share']:4.0%} {row['calls']:5d} x  {row['kernel'][:80]}" for row in top]


def waits_by_line(call: Callable[[], object]) -> Counter[str]:
    """How often each line of Python waits for the GPU in a call, as torch's synchronisation warnings say."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter()
    for warning in caught:
        if "synchronizing CUDA operation" in str(warning.message):
            path = Path(warning.filename)
            name = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name
            places[f"{name}:{warning.lineno}"] += 1
    return places


def _on_gpu(events: Sequence[Event]) -> list[Event]:
    found = [event for event in events if event.on_gpu]
    if not found:
        raise ValueError("the profiler saw no kernel on the GPU")
    return found
