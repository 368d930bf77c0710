"""Everything a GPU has to show, in one command: tests, timings, baselines, where the time goes, better tiles, the targets.

    python -m bench.gpu_suite [--minutes 9] [--only tests kernels baselines profile tiles] [--out bench/results]

Needs torch and triton; what else is absent is said first. Times are of the GPU alone, by events; inputs rotate through more
memory than the L2 cache holds, so none starts warm. Every row is one JSON line, written only for an op whose check passed in
this process. A section takes up nothing new when its share of the minutes is spent, and what it left is there for the next.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import cases
from .suite import Suite
from .surroundings import environment, remarks, run_tests, test_command, versions
from .targets import targets

SHARES = {"tests": 0.35, "kernels": 0.25, "baselines": 0.15, "profile": 0.15, "tiles": 0.10}


def deadlines(began: float, minutes: float, asked: Sequence[str]) -> dict[str, float]:
    """When each section ends at the latest, in the order they run: together they have all the minutes, in proportion."""
    chosen = {name: share for name, share in SHARES.items() if name in asked}
    ends, at = {}, began
    for name, share in chosen.items():
        at += 60 * minutes * share / sum(chosen.values())
        ends[name] = at
    return ends


def run_sections(suite: Suite, sections: dict[str, Callable[[], None]], ends: dict[str, float]) -> None:
    """The sections that have a deadline, in its order; a failure ends its own section only."""
    for name, end in ends.items():
        suite.section, suite.until = name, end
        print(f"\n{name}: {max(0.0, end - time.monotonic()):.0f} s", flush=True)
        with suite.attempt(name):
            sections[name]()


def conclude(suite: Suite, seconds: float) -> int:
    """Prints what was left out, what failed, and the targets, which are rows of the file too. Returns the exit code."""
    lines = [f"left out: {what}" for what in suite.left_out] + [f"FAILED: {what}" for what in suite.failed]
    lines += ["", f"targets: {cases.STUDY.adapters} x {cases.STUDY.rows} rows, all linears of a layer of XLM-R base"]
    suite.section, found = "targets", targets(suite.rows)
    for target in found:
        suite.write(target._asdict())
        lines.append(target.line)
    tests = suite.about["tests"]
    lines.append(f"{len(suite.rows)} rows in {suite.file}, {seconds:.0f} s; {len(suite.failed)} failures; tests {tests}")
    print("\n".join(lines))
    return 1 if suite.failed or tests.startswith("FAILED") else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all sections, the tests too")
    parser.add_argument("--only", nargs="+", choices=tuple(SHARES), default=list(SHARES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    asked = parser.parse_args(arguments)
    began = time.monotonic()
    found = versions()
    if not torch.cuda.is_available():
        print("gpu_suite: there is no CUDA GPU here", file=sys.stderr)
        return 2
    about = environment("cuda")
    print("\n".join([", ".join(f"{name} {value}" for name, value in (about | found).items() if value), *remarks(found)]))
    suite = Suite(asked.out, about | {"peft": found["peft"], "tests": "not run"})

    def tests() -> None:
        suite.about["tests"] = "FAILED: could not start"
        suite.about["tests"] = run_tests(test_command(found), suite.until - time.monotonic())
        print(f"tests {suite.about['tests']}", flush=True)

    sections = {"tests": tests, "kernels": suite.kernels, "baselines": suite.baselines, "profile": suite.profile}
    run_sections(suite, sections | {"tiles": suite.tiles}, deadlines(began, asked.minutes, asked.only))
    return conclude(suite, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
