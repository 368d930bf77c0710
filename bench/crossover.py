"""Where kloss wins on this machine and where it loses: a linear's forward and backward, over adapters and the rows of each.

    python -m bench.crossover [--adapters 1 4 16 52 256 1024] [--rows 1 4 16 64 256] [--width 768] [--rank 32] [--minutes 3]

Every library gets the same weights, inputs and gradients, and one batch for each adapter; before the first cell their results are
checked against fp64. Rounds alternate between libraries in one process. A ratio is a library's time over ours in the same round,
the median over rounds: above 1 kloss is faster. peft takes one adapter after another; of more than MOST_PEFT that many are timed
and scaled, which favours it, for `set_adapter` takes longer the more adapters there are.

A further library is a function of a `cases.Problem` that gives a call, and a line of LIBRARIES.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kloss.kernels import multi_lora_linear

from .baselines import PeftLinear, grouped_mm, torch_loop
from .cases import Batch, Linear, Problem, base_alone, forward_backward, make_problem
from .timing import ROOT, environment, versions

MOST_PEFT, LEAST_ROUNDS = 32, 3
MOST_ROWS = {"cpu": 4096, "cuda": 1 << 17}  # of all adapters
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Make = Callable[[Problem], Callable[[], Any]]


def peft(problem: Problem, switched: bool = True) -> Callable[[], object]:
    """peft, one adapter at a time; a call has as many of them as MOST_PEFT allows."""
    return PeftLinear(_first(problem, MOST_PEFT), switched=switched).in_turn


FLOOR = "the base alone"  # no library: what is left without adapters
LIBRARIES: dict[str, Make] = {
    "kloss": partial(forward_backward, op=multi_lora_linear),
    "peft": peft,
    "peft without set_adapter": lambda problem: peft(problem, switched=False),
    "torch, a loop": lambda problem: torch_loop(problem)[0],
    "torch, grouped_mm": grouped_mm,
    FLOOR: base_alone,
}


def libraries(device: str) -> dict[str, Make]:
    """Those that run here: peft where it is installed, grouped_mm on a GPU."""
    installed = all(versions(("peft", "transformers")).values())
    absent = [name for name in LIBRARIES if name.startswith("peft") and not installed]
    absent += ["torch, grouped_mm"] if device == "cpu" else []
    return {name: make for name, make in LIBRARIES.items() if name not in absent}


def _first(problem: Problem, adapters: int) -> Problem:
    """The problem's first adapters and their rows. Their segments are not those of the rest."""
    own, rows = min(adapters, len(problem.lora_a)), len(problem.x) // len(problem.lora_a)
    parts = {name: getattr(problem, name)[:own] for name in ("lora_a", "lora_b", "scaling")}
    return problem._replace(x=problem.x[: own * rows], dy=problem.dy[: own * rows], **parts)


def check(linear: Linear, rank: int, device: str, dtype: torch.dtype) -> None:
    """Hold ours and peft's results, without dropout, to twice the error of plain torch. Raises AssertionError."""
    problem = make_problem(linear, Batch(3, 5), rank, device=device, dtype=dtype)._replace(dropout=None)
    exact = problem._replace(**{name: t.double() for name, t in problem._asdict().items() if isinstance(t, Tensor)})
    sides = {"kloss": LIBRARIES["kloss"](problem)(), "torch": torch_loop(problem)[0]()}
    if "peft" in libraries(device):
        sides["peft"] = PeftLinear(problem, 0.0).results()
    oracle = torch_loop(exact)[0]()
    errors = {
        name: [((a.double() - b).norm() / b.norm()).item() for a, b in zip(values, oracle, strict=True)]
        for name, values in sides.items()
    }
    for name, own in errors.items():
        wrong = [error for error, plain in zip(own, errors["torch"], strict=True) if error > 2 * plain + torch.finfo(dtype).eps]
        assert not wrong, f"{name} is off by {wrong}; plain torch by {errors['torch']}"


def measure(problem: Problem, makes: dict[str, Make], seconds: float) -> dict[str, list[float]]:
    """Seconds of each library's calls, in rounds that alternate between them, for that long but at least LEAST_ROUNDS."""
    scale = max(1.0, len(problem.lora_a) / MOST_PEFT)
    calls = {name: (make(problem), scale if name.startswith("peft") else 1.0) for name, make in makes.items()}
    times: dict[str, list[float]] = {name: [] for name in makes}
    until, rounds = time.monotonic() + seconds, 0
    while rounds <= LEAST_ROUNDS or time.monotonic() < until:
        for name, (call, factor) in calls.items():
            began = time.perf_counter()
            call()
            if problem.x.is_cuda:
                torch.cuda.synchronize()
            if rounds:  # the first one warms up
                times[name].append(factor * (time.perf_counter() - began))
        rounds += 1
    return times


def grid(adapters: Sequence[int], rows: Sequence[int], ratios: dict[tuple[int, int], float]) -> list[str]:
    """A library's ratios as a table's lines."""
    lines = ["adapters  rows of each: " + "".join(f"{n:>8}" for n in rows)]
    for g in adapters:
        cells = (f"{ratios[g, n]:.2f}" if (g, n) in ratios else "" for n in rows)
        lines.append(f"{g:>8}                " + "".join(f"{cell:>8}" for cell in cells))
    return lines


def crossover(rows: Sequence[dict], peer: str) -> str:
    """Where a library is faster than kloss, in words. rows: of the file."""
    lost = [row for row in rows if peer in row["ratio"] and row["ratio"][peer] < 1]
    of = sum(peer in row["ratio"] for row in rows)
    if not lost:
        return f"{peer}: kloss is faster in all {of} cells"
    cells = ", ".join(f"{row['adapters']} x {row['rows']} ({row['ratio'][peer]:.2f})" for row in lost)
    return f"{peer}: faster than kloss in {len(lost)} of {of} cells (adapters x rows): {cells}"


def plot(rows: Sequence[dict], adapters: Sequence[int], counts: Sequence[int], file: Path) -> None:
    """A map for each library: colour and number are its ratio, bold where it is faster than kloss."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    peers = [name for name in LIBRARIES if any(name in row["ratio"] for row in rows)]
    figure = Figure(figsize=(4.2 * len(peers), 3.6), layout="constrained")
    for axes, peer in zip(figure.subplots(1, len(peers), squeeze=False)[0], peers, strict=True):
        cells = {(row["adapters"], row["rows"]): row["ratio"][peer] for row in rows if peer in row["ratio"]}
        values = torch.tensor([[cells.get((g, n), float("nan")) for n in counts] for g in adapters]).log2()
        axes.imshow(values.numpy(), cmap="PuOr", norm=TwoSlopeNorm(0, -4, 4), origin="lower", aspect="auto")
        for (g, n), ratio in cells.items():
            bold = "bold" if ratio < 1 else "normal"
            axes.text(counts.index(n), adapters.index(g), f"{ratio:.3g}", ha="center", va="center", fontsize=8, weight=bold)
        axes.set_xticks(range(len(counts)), list(map(str, counts)))
        axes.set_yticks(range(len(adapters)), list(map(str, adapters)))
        axes.set_title(f"{peer} / kloss", fontsize=10)
        axes.set_xlabel("rows of each adapter")
    figure.axes[0].set_ylabel("adapters")
    about = rows[0]
    setting = f"{about['device']}, {about['dtype']}, width {about['width']}, r={about['rank']}"
    figure.suptitle(f"times as multiples of kloss's: forward and backward of a linear; {setting}", fontsize=9)
    figure.savefig(file, dpi=110)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure all cells, append their rows, print a table for each library and where it wins, draw the picture."""
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.crossover", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16" if cuda else "fp32")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 52, 256, 1024] + [4096] * cuda)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="of each adapter")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder of crossover.jsonl and its picture")
    options = parser.parse_args(arguments)
    device, dtype, linear = options.device, DTYPES[options.dtype], Linear("square", options.width, options.width)
    makes, about = libraries(device), environment(device)
    print(f"{about['device']}; absent: {', '.join(LIBRARIES.keys() - makes.keys()) or 'nothing'}", flush=True)
    check(linear, options.rank, device, dtype)
    cells = [(g, n) for g in options.adapters for n in options.rows if g * n <= MOST_ROWS[device]]
    rows = []
    for done, (g, n) in enumerate(cells, 1):
        problem = make_problem(linear, Batch(g, n), options.rank, device=device, dtype=dtype)
        times = measure(problem, makes, 60 * options.minutes / len(cells))
        ratios = {
            name: statistics.median(a / b for a, b in zip(own, times["kloss"], strict=True))
            for name, own in times.items()
            if name != "kloss"
        }
        seconds = {name: statistics.median(own) for name, own in times.items()}
        rows.append(about | {
            "case": "crossover", "adapters": g, "rows": n, "width": options.width, "rank": options.rank, "dtype": options.dtype,
            "rounds": len(times["kloss"]), "seconds": seconds, "ratio": ratios,
        })  # fmt: skip
        print(f"{done}/{len(cells)}: {g} adapters x {n} rows: kloss {1e3 * seconds['kloss']:.2f} ms", end="\r", file=sys.stderr)
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "crossover.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    for peer in rows[0]["ratio"]:
        ratios = {(row["adapters"], row["rows"]): row["ratio"][peer] for row in rows}
        print(f"\n{peer}, time / kloss's", *grid(options.adapters, options.rows, ratios), sep="\n")
    print("", *(crossover(rows, peer) for peer in rows[0]["ratio"] if peer != FLOOR), sep="\n")
    picture = options.out / f"crossover-{device}.png"
    plot(rows, options.adapters, options.rows, picture)
    print(f"\n{len(rows)} rows in {options.out / 'crossover.jsonl'}; picture: {picture}")
    return rows


if __name__ == "__main__":
    main()
