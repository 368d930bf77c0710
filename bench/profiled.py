"""Where the time goes: events of torch's profiler, and the rows and tables that are made of them.

`record` and `waits_by_line` need CUDA. The command is for a CPU: where a training step's time goes, of many learners and of one.

    OMP_NUM_THREADS=1 python -m bench.profiled [--model FOLDER] [--dtype fp32 bf16] [--rounds 5]

--model: a backbone in transformers' format, such as multilingual-e5-small, for the cases named after it. A round runs the step,
packing alone, the frozen products alone, and the step with a clock around each operator; the fastest round counts. On one thread
seconds are the process's processor time, which other programs hardly change, else those of the wall, which they do. Scoring is
`evaluate` on eight cells of 200 utterances.
"""

import argparse
import json
import resource
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode

from kloss.cl.corpus import Corpus
from kloss.cl.evaluate import evaluate
from kloss.cl.packing import pack
from kloss.machine import keep_memory
from kloss.models import BASE, TINY, XLMRForTokenClassification

from .cases import KernelWork
from .timing import ROOT, environment
from .whole_step import DTYPES, TrainingStep, make_sentences, make_step

WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy", "cuStreamSynchronize", "cuEventSynchronize")
LAUNCHES = ("cudaLaunch", "cuLaunch")  # cudaLaunchKernel, cudaLaunchKernelExC, cuLaunchKernelEx, ...
MEMORY = ("Memcpy", "Memset")
# What a step on a CPU does -> how the names of the operators that do it begin. The rest is Python, dispatch and autograd.
GROUPS = {
    "frozen products": ("aten::addmm", "aten::mm"),
    "LoRA terms": ("kloss::cpu_lora_", "kloss::multi_lora"),  # the latter, where layers are not one function, with their products
    "attention": ("kloss::cpu_attention",),
    "norms, dropout": (
        "kloss::cpu_add_norm", "kloss::cpu_dropout", "kloss::dropout_", "kloss::row_keys", "kloss::kept_scaling",
        "aten::native_layer_norm",
    ),
    "GELU": ("aten::gelu",),
    "heads, loss": ("kloss::cpu_adapter_linear", "kloss::cpu_token_loss"),
    "AdamW": ("kloss::adamw_",),
    "gradients added, zeroed, copied": ("aten::add", "aten::copy_", "aten::fill_", "aten::zero_"),
}  # fmt: skip
PACKING, REST = "packing, segments", "Python, dispatch, autograd"
LABELS = ("O", *(f"{tag}-{kind}" for kind in range(55) for tag in "BI"))


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


def group_of(operator: str) -> str | None:
    """The entry of GROUPS that an operator belongs to; None: no entry."""
    return next((group for group, starts in GROUPS.items() if operator.startswith(starts)), None)


def shares(seconds: float, packing: float, operators: Mapping[str, float]) -> dict[str, float]:
    """Shares of a step by GROUPS, PACKING and REST; their sum is 1.

    seconds, packing: of a step and of its packing.
    operators: seconds of each by its name.
    """
    spent = dict.fromkeys(GROUPS, 0.0) | {PACKING: packing}
    for name, value in operators.items():
        group = group_of(name)
        if group is not None:
            spent[group] += value
    return {name: value / seconds for name, value in (spent | {REST: seconds - sum(spent.values())}).items()}


def frozen_products(step: TrainingStep) -> Callable[[], None]:
    """A call that does a step's products with frozen weights, forward and for dx, and nothing else."""
    layers = [(layer.qkv, layer.out, layer.up, layer.down) for layer in step.model.layers]
    linears = [cast(torch.nn.Linear, linear) for layer in layers for linear in layer]
    dtype, tokens = linears[0].weight.dtype, len(step.sentences.input_ids)
    widths = {width for linear in linears for width in linear.weight.shape}
    rows = {width: torch.randn(tokens, width, dtype=torch.float32).to(dtype) for width in widths}

    @torch.no_grad()
    def call() -> None:
        for linear in linears:
            F.linear(rows[linear.in_features], linear.weight, linear.bias)
        for linear in linears[1:]:  # the first one's input is frozen too
            F.linear(rows[linear.out_features], linear.weight.t())

    return call


class OperatorClock(TorchDispatchMode):
    """Adds up the processor time of this thread in each operator that autograd, or a function of Python, calls."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.thread_time()
        result = func(*args, **(kwargs or {}))
        self.seconds[func.name()] += time.thread_time() - start
        return result


def operators_of(call: Callable[[], object]) -> Counter[str]:
    """Seconds of each operator in a call."""
    with OperatorClock() as clock:
        call()
    return clock.seconds


def _clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def step_row(step: TrainingStep, rounds: int) -> dict[str, Any]:
    """Measure a step on a CPU: seconds, tokens per second, shares, and the rate of the frozen products alone."""
    calls = {
        "step": step.run,
        "packing": lambda: pack([(step.sentences, index, g) for g, index in enumerate(step.batches)], len(step.batches)),
        "frozen": frozen_products(step),
    }
    times: dict[str, list[float]] = {name: [] for name in (*calls, "system", "faults")}
    operators: dict[str, list[float]] = {}
    step.run()
    for turn in range(rounds):
        for name, call in calls.items():
            before, start = resource.getrusage(resource.RUSAGE_SELF), _clock()
            call()
            times[name].append(_clock() - start)
            if name == "step":
                after = resource.getrusage(resource.RUSAGE_SELF)
                times["system"].append(after.ru_stime - before.ru_stime)
                times["faults"].append(after.ru_minflt - before.ru_minflt)
        for name, seconds in operators_of(step.run).items():
            operators.setdefault(name, [0.0] * turn).append(seconds)
    fastest = {name: min(values) for name, values in times.items()}
    tokens = len(step.sentences.input_ids)
    return {
        "tokens": tokens, "seconds": fastest["step"], "median_seconds": statistics.median(times["step"]),
        "tokens_per_second": tokens / fastest["step"], "frozen_products_share": fastest["frozen"] / fastest["step"],
        "shares": shares(fastest["step"], fastest["packing"], {name: min(values) for name, values in operators.items()}),
        "system_share": statistics.mean(times["system"]) / fastest["step"],
        "page_faults": statistics.mean(times["faults"]),
    }  # fmt: skip


def scoring_rate(step: TrainingStep, cells: int = 8, utterances: int = 200) -> float:
    """Tokens per second of `evaluate` for cells of a learner and a language each."""
    generator = torch.Generator().manual_seed(1)
    text = [make_sentences(step.model.config, utterances, generator) for _ in range(cells)]
    corpus = cast(Corpus, SimpleNamespace(labels=LABELS, sentences=lambda locale, partition: text[int(locale)]))
    pairs = [(i % step.bank.adapters, str(i)) for i in range(cells)]
    start = _clock()
    evaluate(step.model, step.bank, corpus, pairs)
    return sum(len(sentences.input_ids) for sentences in text) / (_clock() - start)


def cpu_cases(model: XLMRForTokenClassification | None, dtype: torch.dtype) -> dict[str, Callable[[], TrainingStep]]:
    """The steps that the command measures, by name."""
    make = partial(make_step, dropout=0.1, dtype=dtype)
    base = replace(BASE, num_hidden_layers=4, num_labels=len(LABELS))
    tiny = replace(TINY, vocab_size=30_000, num_labels=len(LABELS))
    cases = {"base size x 52": partial(make, base, 52, 32, 4)}
    if model is not None:
        cases |= {f"model x {G}": partial(make, model.config, G, 8, 8, model=model) for G in (52, 1)}
    return cases | {"tiny x 1": partial(make, tiny, 1, 8, 16)}


def shares_table(rows: Sequence[dict]) -> list[str]:
    """Lines of a table of Markdown: groups by case."""
    lines = ["| | " + " | ".join(f"{row['name']}, {row['dtype']}" for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    for group in (*GROUPS, PACKING, REST):
        lines.append(f"| {group} | " + " | ".join(f"{row['shares'][group]:.1%}" for row in rows) + " |")
    lines.append("| of all, in the system (page faults) | " + " | ".join(f"{row['system_share']:.1%}" for row in rows) + " |")
    lines.append("| ms a step | " + " | ".join(f"{1e3 * row['seconds']:.1f}" for row in rows) + " |")
    lines.append("| tokens/s | " + " | ".join(f"{row['tokens_per_second']:,.0f}" for row in rows) + " |")
    lines.append("| frozen products alone / step | " + " | ".join(f"{row['frozen_products_share']:.0%}" for row in rows) + " |")
    scored = [row["scoring_tokens_per_second"] for row in rows]
    cells = ("" if rate is None else f"{rate:,.0f}" for rate in scored)
    return [*lines, "| scoring, tokens/s | " + " | ".join(cells) + " |"]


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure the cases, append their rows to the results, print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench.profiled", description="Where a training step's time goes on a CPU.")
    parser.add_argument("--model", type=Path, help="folder of a backbone in transformers' format")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--cases", nargs="+", help="words, one of which a case's name holds; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cpu_steps.jsonl", help="file that gets the rows")
    options = parser.parse_args(arguments)
    keep_memory()  # as a run does
    rows: list[dict] = []
    for dtype in options.dtype:
        kind = DTYPES[dtype]
        model = options.model and XLMRForTokenClassification.from_pretrained(options.model, len(LABELS), kind)
        for name, make in cpu_cases(model, kind).items():
            if any(word in name for word in options.cases or [""]):
                step = make()
                few = step.bank.adapters > 1
                row = step_row(step, options.rounds * (1 if few else 5))
                rate = max(scoring_rate(step) for _ in range(2)) if few and name.startswith("model") else None
                rows.append(environment("cpu") | {"case": "cpu_step", "name": name, "dtype": dtype, **row})
                rows[-1] |= {"adapters": step.bank.adapters, "scoring_tokens_per_second": rate}
                print(f"{name}, {dtype}: {1e3 * row['seconds']:.1f} ms", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print("\n".join(shares_table(rows)))
    return rows


if __name__ == "__main__":
    main()
