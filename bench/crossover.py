"""Where kloss wins on this machine and where it loses: a linear with many adapters, over adapters and the rows of each.

    python -m bench.crossover [--tables training inference skew shapes compiled memory] [--adapters 1 4 16 52 256 1024 4096]
                              [--rows 1 4 16 64 256] [--width 768] [--rank 32] [--minutes 1.25]

Every library gets the same weights, inputs and gradients; before the first cell their results are checked against fp64. Rounds
alternate between libraries in one process. A ratio is a library's time over ours in the same round, the median over rounds:
above 1 kloss is faster. Of more than 32 adapters peft gets 32, and AdapterHub 256 of more than that, and their time is scaled.
That favours them, AdapterHub 1.8-fold at 1024: `set_adapter` and the lists of a mixed batch take longer the more there are, and
few adapters stay in a cache. For skew and memory they get all. What does not run here is named in a line.

A further library is a function of a `cases.Problem` that gives a call, and a line of `bench/libraries.py`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from .cases import Batch, Linear, Problem, make_problem
from .libraries import COMPILED, INFERENCE, KLOSS, TRAINING, Library, check, why_absent
from .peak import peak
from .tables import plot, printed
from .timing import ROOT, environment

LEAST_ROUNDS = 3
MOST_ROWS = {"cpu": 4096, "cuda": 1 << 17}  # of all adapters
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TABLES = {"training": 0.5, "inference": 0.2, "skew": 0.1, "shapes": 0.15, "compiled": 0.05, "memory": 0.0}  # shares of the time
SKEWED, SENTENCE = (Batch(52, 16), Batch(52, 64)), 4  # rows of adapters are whole sentences
SHAPED, WIDTHS, RANKS = Batch(16, 16), (256, 768, 2048), (8, 32, 128)
AT_PEAK = Batch(52, 64)


class Cell(NamedTuple):
    """What is timed. skewed: whether rows of adapters follow Zipf's law."""

    batch: Batch
    width: int
    rank: int
    skewed: bool = False

    def problem(self, device: str, dtype: torch.dtype) -> Problem:
        counts = zipf(self.batch) if self.skewed else None
        return make_problem(
            Linear("square", self.width, self.width), self.batch, self.rank, device=device, dtype=dtype, counts=counts
        )

    def row(self, table: str) -> dict:
        about = {"adapters": self.batch.adapters, "rows": self.batch.rows, "width": self.width, "rank": self.rank}
        return {"case": "crossover", "table": table, **about, "skewed": self.skewed}


def zipf(batch: Batch) -> list[int]:
    """Rows of each adapter, the batch's together, in sentences: one each, and of the others 1 / g for adapter g."""
    each = batch.total // SENTENCE - batch.adapters
    ends = [sum(1 / g for g in range(1, n + 1)) for n in range(batch.adapters + 1)]
    shares = [round(each * end / ends[-1]) for end in ends]
    return [SENTENCE * (1 + b - a) for a, b in zip(shares, shares[1:], strict=False)]


def cells_of(table: str, options: argparse.Namespace) -> list[Cell]:
    """A table's cells."""
    width, rank, most = options.width, options.rank, MOST_ROWS[options.device]
    if table in ("training", "inference"):
        counts = options.rows if table == "training" else options.rows[::2]
        return [Cell(Batch(g, n), width, rank) for g in options.adapters for n in counts if g * n <= most]
    if table == "skew":
        return [Cell(batch, width, rank, skewed) for batch in SKEWED for skewed in (False, True)]
    if table == "shapes":
        return [Cell(SHAPED, w, r) for w in WIDTHS for r in RANKS]
    return [Cell(SHAPED if table == "compiled" else AT_PEAK, width, rank)]


def first(problem: Problem, adapters: int) -> Problem:
    """The problem's first adapters and their rows, whose segments serve libraries that ask for `counts` alone."""
    if adapters == len(problem.lora_a):
        return problem
    total = sum(problem.counts[:adapters])
    parts = {name: getattr(problem, name)[:adapters] for name in ("lora_a", "lora_b", "scaling")}
    segments = problem.segments._replace(cu_seqlens=problem.segments.cu_seqlens[: adapters + 1])
    return problem._replace(x=problem.x[:total], dy=problem.dy[:total], segments=segments, **parts)


Calls = dict[tuple[Cell, str], tuple[Callable[[], object], float]]  # of a cell's library, and what its time is multiplied by


def calls_of(cell: Cell, libraries: dict[str, Library], device: str, dtype: torch.dtype) -> Calls:
    """The calls of a cell."""
    problem, adapters = cell.problem(device, dtype), cell.batch.adapters
    most = {name: min(adapters, library.most or adapters) for name, library in libraries.items()}
    return {(cell, name): (own.make(first(problem, most[name])), adapters / most[name]) for name, own in libraries.items()}


def measure(calls: Calls, seconds: float, cuda: bool = False) -> dict[tuple[Cell, str], list[float]]:
    """Seconds of each call, in rounds that alternate between them, for that long but at least LEAST_ROUNDS."""
    times: dict[tuple[Cell, str], list[float]] = {key: [] for key in calls}
    until, rounds = time.monotonic() + seconds, 0
    while rounds <= LEAST_ROUNDS or time.monotonic() < until:
        for key, (call, factor) in calls.items():
            began = time.perf_counter()
            call()
            if cuda:
                torch.cuda.synchronize()
            if rounds:  # the first one warms up
                times[key].append(factor * (time.perf_counter() - began))
        rounds += 1
    return times


def timed(table: str, cells: Sequence[Cell], options: argparse.Namespace, absent: dict[str, str]) -> Iterator[dict]:
    """The rows of a table whose cells are timed. Those of a skewed batch have a ratio to the batch before it, too."""
    own = {"inference": INFERENCE, "compiled": COMPILED}.get(table, TRAINING)
    libraries = {name: library for name, library in own.items() if name not in absent}
    if table == "skew":  # the first adapters are not like the others
        libraries = {name: library._replace(most=None) for name, library in libraries.items()}
    seconds, together = 60 * options.minutes * TABLES[table] / len(cells), 2 if table == "skew" else 1
    for done in range(0, len(cells), together):
        calls: Calls = {}
        for cell in cells[done : done + together]:
            calls |= calls_of(cell, libraries, options.device, DTYPES[options.dtype])
        times = measure(calls, together * seconds, options.device == "cuda")
        for cell in cells[done : done + together]:
            medians = {name: statistics.median(times[cell, name]) for name in libraries}
            ratios = {name: ratio(times[cell, name], times[cell, KLOSS]) for name in libraries if name != KLOSS}
            row = cell.row(table) | {"rounds": len(times[cell, KLOSS]), "seconds": medians, "ratio": ratios}
            if cell.skewed:
                row["of_equal"] = {name: ratio(times[cell, name], times[cells[done], name]) for name in libraries}
            yield row
        if sys.stderr.isatty():
            print(f"{table}: {done + together} of {len(cells)} cells\033[K", end="\r", file=sys.stderr, flush=True)


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Of times in the same rounds."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def peaks(cells: Sequence[Cell], device: str, dtype: torch.dtype, absent: dict[str, str]) -> list[dict]:
    """The rows of table `memory`: the bytes that each library's first call takes at its most."""
    rows = []
    for cell in cells:
        problem, small = (each.problem(device, dtype) for each in (cell, cell._replace(batch=Batch(2, 2))))
        for direction, libraries in (("training", TRAINING), ("inference", INFERENCE)):
            sizes = {}
            for name, library in libraries.items():
                if name not in absent:
                    library.make(small)()  # what a first call of all takes once
                    sizes[name] = peak(library.make(problem), device)
            if None not in sizes.values():
                rows.append(cell.row("memory") | {"direction": direction, "bytes": sizes})
    return rows


def elsewhere(cells: Sequence[Cell], device: str, dtype: torch.dtype, absent: dict[str, str]) -> list[dict]:
    """`peaks` in a new process."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(peaks, (cells, device, dtype, absent))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(prog="python -m bench.crossover", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tables", choices=tuple(TABLES), nargs="+", default=[*TABLES])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16" if cuda else "fp32")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 4, 16, 52, 256, 1024, 4096])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 64, 256], help="of each adapter")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--minutes", type=float, default=1.25, help="for all tables; libraries take theirs to get ready besides")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder of crossover.jsonl and its picture")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measure all cells, append their rows, print the tables and where kloss loses, draw the picture."""
    options = parse(arguments)
    device, dtype = options.device, DTYPES[options.dtype]
    absent, about = why_absent(device), environment(device) | {"dtype": options.dtype}
    absent |= check(options.rank, options.width, device, dtype, absent)
    print(about["device"], *(f"without {name}: {why}" for name, why in absent.items()), sep="\n", flush=True)
    rows: list[dict] = []
    for table in options.tables:
        cells = cells_of(table, options)
        own = elsewhere(cells, device, dtype, absent) if table == "memory" else timed(table, cells, options, absent)
        new = [about | row for row in own]
        print(*printed(table, new), sep="\n", flush=True)
        rows += new
    options.out.mkdir(parents=True, exist_ok=True)
    with open(options.out / "crossover.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"\n{len(rows)} rows in {options.out / 'crossover.jsonl'}")
    if picture := plot(rows, options.out / f"crossover-{device}.png"):
        print(f"picture: {picture}")
    return rows


if __name__ == "__main__":
    main()
