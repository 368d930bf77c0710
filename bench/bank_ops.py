"""On a CPU: AdamW of a bank, span counts and work lists, each beside what it replaces; where a training step's time goes.

    python -m bench.bank_ops [--threads 1] [--rounds 12]
    python -m bench.bank_ops --steps [--model FOLDER] [--dtype fp32 bf16] [--rounds 3]

Both sides take turns of equal time, and the fastest call of each counts: other programs only ever make one slower. The first
call of a turn finds caches full of the other side's data and code, so it has a figure of its own. A round of --steps runs the
step, packing alone, the frozen products alone, and the step with a clock around each operator. On one thread seconds are the
process's processor time, which other programs hardly change. Scoring is `evaluate` on eight cells of 200 utterances.
"""

import argparse
import json
import math
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kloss.cl.corpus import Corpus
from kloss.cl.evaluate import evaluate
from kloss.cl.packing import pack
from kloss.cl.spans import f1_from_counts, label_layout, span_f1
from kloss.kernels import make_segments, row_keys, shared_ops, span_counts
from kloss.kernels.segments import with_work
from kloss.machine import keep_memory
from kloss.models import TINY, XLMRConfig, XLMRForTokenClassification
from kloss.models.bank import TARGETS, _slots

from .timing import ROOT, environment
from .whole_step import DTYPES, TrainingStep, make_sentences, make_step

BASE = XLMRConfig(num_labels=111)
SMALL = XLMRConfig(hidden_size=384, intermediate_size=1536, num_labels=111)
TURN = 0.2  # seconds that a side is called again and again, at least once
Pair = tuple[str, Callable[[], object], Callable[[], object]]
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


def optimisers(config: XLMRConfig, rank: int, adapters: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The bank's AdamW, and torch's fused one with an optimiser for each adapter; norms and clipping on both sides."""
    slots = _slots(config, TARGETS, rank, True)
    width = max(slot.start + math.prod(slot.shape) for slot in slots.values())

    def matrix(scale: float) -> Tensor:
        return shared_ops.huge_pages(torch.empty(adapters, width)).normal_().mul_(scale)

    param, grad, exp_avg, exp_avg_sq = matrix(0.02), matrix(1e-2), matrix(0), matrix(0)
    step, rate, one = torch.zeros(adapters, dtype=torch.int64), torch.full((adapters,), 1e-3), torch.ones(adapters)
    theirs = []
    for g in range(adapters):
        own = []
        for start, shape in slots.values():
            part = slice(start, start + math.prod(shape))
            own.append(torch.nn.Parameter(param[g, part].reshape(shape).clone()))
            own[-1].grad = grad[g, part].reshape(shape).clone()
        theirs.append((own, torch.optim.AdamW(own, lr=1e-3, weight_decay=0.01, fused=True)))

    def ours() -> None:
        shared_ops.adamw_(
            param, grad, exp_avg, exp_avg_sq, step, rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=one * 0.01,
            max_norm=one, active=one.bool(),
        )  # fmt: skip

    def per_adapter() -> None:
        for own, optimiser in theirs:
            torch.nn.utils.clip_grad_norm_(own, 1.0)
            optimiser.step()

    return ours, per_adapter


def spans(utterances: int) -> tuple[Callable[[], object], Callable[[], object], Callable[[], object]]:
    """Span counts of 52 languages, their span F1 from label tensors, and seqeval's F1 from lists of names.

    utterances: of each language, some 7 words and 20 subwords each; from the 201st on they come again.
    """
    from seqeval.metrics import f1_score

    draw = torch.Generator().manual_seed(0)
    sequences, words = [], []
    for _ in range(52 * 200):
        slot = torch.randint(0, 55, (), generator=draw)
        word = [0, 0, 1 + 2 * slot, 2 + 2 * slot, 0, 0, 0][: torch.randint(4, 8, (), generator=draw)] * 2
        word = [int(label) for label in word[: torch.randint(4, 12, (), generator=draw)]]
        words.append(word)
        sequences.append(
            [-100, *(label for w in word for label in (w, *[-100] * int(torch.randint(0, 4, (), generator=draw)))), -100]
        )
    again = [200 * language + n % 200 for language in range(52) for n in range(utterances)]
    sequences, words = [sequences[n] for n in again], [words[n] for n in again]
    gold = torch.tensor([label for sequence in sequences for label in sequence])
    wrong = torch.rand(gold.shape, generator=draw) < 0.2
    pred = torch.where(wrong, torch.randint(0, 111, gold.shape, generator=draw), gold.clamp(min=0))
    borders = torch.tensor([0, *map(len, sequences)]).cumsum(0).int()
    group = torch.arange(52).repeat_interleave(utterances)
    tags, types = map(torch.tensor, label_layout(LABELS))
    told = iter(pred[gold >= 0].tolist())
    theirs = [[LABELS[next(told)] for _ in word] for word in words]
    truth = [[LABELS[label] for label in word] for word in words]

    def counts() -> Tensor:
        return span_counts(pred, gold, borders, group, 52, tags=tags, types=types)

    def f1() -> object:
        return span_f1(pred, gold, borders, group, 52, LABELS)

    def seqeval() -> list[float]:
        return [f1_score(truth[i : i + utterances], theirs[i : i + utterances]) for i in range(0, 52 * utterances, utterances)]

    np.testing.assert_allclose(f1_from_counts(counts()), seqeval(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(f1(), seqeval(), rtol=0, atol=1e-12)
    return counts, f1, seqeval


def lists(sequences: int, adapters: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """The work lists and row keys of a batch, and torch's ops that make them."""
    draw = torch.Generator().manual_seed(0)
    cu = torch.cat([torch.zeros(1), torch.randint(4, 20, (sequences,), generator=draw).cumsum(0)]).int()
    owner = (torch.arange(sequences) * adapters // sequences).int()
    rows, step, number = int(cu[-1]), torch.arange(adapters), torch.arange(sequences) % 32
    return (
        lambda: shared_ops.work_lists(cu, owner, adapters, rows, step=step, sequence=number),
        lambda: (with_work(make_segments(cu, owner, adapters, rows=rows)), row_keys(step[owner.long()], number, cu, rows=rows)),
    )


def pairs() -> Iterator[Pair]:
    yield "AdamW, base r=32, 4 adapters, beside torch's fused one per adapter", *optimisers(BASE, 32, 4)
    yield "AdamW, e5-small r=8, 52 adapters, beside torch's fused one per adapter", *optimisers(SMALL, 8, 52)
    for utterances in (200, 2974):  # the latter are MASSIVE's test set
        counts, f1, seqeval = spans(utterances)
        yield f"span counts, 52 x {utterances} utterances, beside seqeval's F1", counts, seqeval
        yield f"span F1 from label tensors, 52 x {utterances} utterances, beside seqeval's", f1, seqeval
    yield "work lists, 1664 sequences of 52 adapters, beside torch's ops", *lists(1664, 52)
    yield "work lists, 8 sequences of one adapter, beside torch's ops", *lists(8, 1)


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


def measure_steps(options: argparse.Namespace) -> list[dict]:
    """Measure the cases, append their rows to the results, print a table."""
    keep_memory()  # as a run does
    rows: list[dict] = []
    for dtype in options.dtype:
        kind = DTYPES[dtype]
        model = options.model and XLMRForTokenClassification.from_pretrained(options.model, len(LABELS), kind)
        for name, make in cpu_cases(model, kind).items():
            if any(word in name for word in options.cases or [""]):
                step = make()
                together = step.bank.adapters > 1
                row = step_row(step, options.rounds * (1 if together else 5))
                rate = max(scoring_rate(step) for _ in range(2)) if together and name.startswith("model") else None
                rows.append(environment("cpu") | {"case": "cpu_step", "name": name, "dtype": dtype, **row})
                rows[-1] |= {"adapters": step.bank.adapters, "scoring_tokens_per_second": rate}
                print(f"{name}, {dtype}: {1e3 * row['seconds']:.1f} ms", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with open(options.out, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print("\n".join(shares_table(rows)))
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    """Print how fast the ops are, or measure steps and return their rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.bank_ops", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", action="store_true", help="where a training step's time goes")
    parser.add_argument("--model", type=Path, help="for --steps: folder of a backbone in transformers' format")
    parser.add_argument("--dtype", nargs="+", choices=sorted(DTYPES), default=["fp32", "bf16"])
    parser.add_argument("--cases", nargs="+", help="words, one of which a case's name holds; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/cpu_steps.jsonl", help="file that gets the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.steps:
        return measure_steps(options)
    assert shared_ops.runs_on(torch.device("cpu")), "csrc is not built"
    for name, *sides in pairs():
        first: list[list[float]] = [[], []]
        seconds: list[list[float]] = [[], []]
        for _ in range(options.rounds):
            for run, firsts, times in zip(sides, first, seconds, strict=True):
                end, calls = time.perf_counter() + TURN, len(times)
                while len(times) == calls or time.perf_counter() < end:
                    start = time.perf_counter()
                    run()
                    times.append(time.perf_counter() - start)
                firsts.append(times[calls])
        (ours, theirs), cold = map(min, seconds), min(first[0])
        text = f"{name}: {ours * 1e3:.3f} ms, {theirs * 1e3:.3f} ms, {theirs / ours:.2f}x"
        print(f"{text}; first call after the other side {cold * 1e3:.3f} ms, {min(first[1]) / cold:.2f}x", flush=True)
    return []


if __name__ == "__main__":
    main()
