"""Everything a GPU has to show, in one command: tests, timings, baselines, where the time goes, better tiles, the targets.

    python -m bench.gpu_suite [--minutes 9] [--only tests kernels baselines profile tiles] [--out bench/results]

Needs torch, triton and numpy; other absent packages are named first. Times are of the GPU alone, by events. Inputs rotate
through more memory than the L2 cache holds, so none starts warm. Every row is one JSON line, written only for an op whose check
passed in this process. A section starts no case after its share of the minutes; time that it leaves goes to the next.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import cases
from .kernels import Suite, targets
from .timing import ROOT, environment

SHARES = {"tests": 0.35, "kernels": 0.25, "baselines": 0.15, "profile": 0.15, "tiles": 0.10}
WORKERS = 8  # processes of the tests: most of their time is Triton compiling


def deadlines(began: float, minutes: float, sections: Sequence[str]) -> dict[str, float]:
    """The latest end of each section, in the order they run: together they have all the minutes, in proportion."""
    shares = {name: share for name, share in SHARES.items() if name in sections}
    ends, end = {}, began
    for name, share in shares.items():
        end += 60 * minutes * share / sum(shares.values())
        ends[name] = end
    return ends


def run_sections(suite: Suite, sections: dict[str, Callable[[], None]], ends: dict[str, float]) -> None:
    """Run the sections that have a deadline, in its order; a failure ends its own section only."""
    for name, end in ends.items():
        suite.section, suite.until = name, end
        print(f"\n{name}: {max(0.0, end - time.monotonic()):.0f} s", flush=True)
        with suite.attempt(name):
            sections[name]()


def conclude(suite: Suite, seconds: float) -> int:
    """Print what was left out, what failed, and the targets, which are rows of the file too. Returns the exit code."""
    lines = [f"left out: {case}" for case in suite.left_out] + [f"FAILED: {failure}" for failure in suite.failed]
    lines += ["", f"targets: {cases.STUDY.adapters} x {cases.STUDY.rows} rows, all linears of a layer of XLM-R base"]
    suite.section, answers = "targets", targets(suite.rows)
    for target in answers:
        suite.write(target._asdict())
        lines.append(target.line)
    tests = suite.about["tests"]
    lines.append(f"{len(suite.rows)} rows in {suite.file}, {seconds:.0f} s; {len(suite.failed)} failures; tests {tests}")
    print("\n".join(lines))
    return 1 if suite.failed or tests.startswith("FAILED") else 0


def pytest_command(parallel: bool) -> list[str]:
    """The tests that need a GPU, without the project's options for pytest: these name plugins that may be absent."""
    options = ["-q", "-o", "addopts=-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", "gpu"]
    return [sys.executable, "-m", "pytest", *options, *(["-n", str(WORKERS)] if parallel else []), "tests"]


def run_tests(command: Sequence[str], seconds: float) -> str:
    """Run a command and kill all its processes after that many seconds. Returns "passed", or "FAILED" and the reason."""
    threads = {"OMP_NUM_THREADS": "2"}  # of each of the tests' processes
    process = subprocess.Popen(command, cwd=ROOT, process_group=0, env=os.environ | threads)
    try:
        code = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        return f"FAILED: not finished after {seconds:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return "passed" if code == 0 else f"FAILED: exit code {code}"


def main(arguments: list[str] | None = None) -> int:
    """Run the sections and print the targets; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all sections, the tests too")
    parser.add_argument("--only", nargs="+", choices=tuple(SHARES), default=list(SHARES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if not torch.cuda.is_available():
        print("gpu_suite: there is no CUDA GPU here", file=sys.stderr)
        return 2
    about = environment("cuda")
    installed = about["versions"]
    print(about, "absent: " + (", ".join(name for name in installed if not installed[name]) or "nothing"), sep="\n")
    suite = Suite(options.out, about | {"tests": "not run"})

    def tests() -> None:
        suite.about["tests"] = "FAILED: could not start"
        suite.about["tests"] = run_tests(pytest_command(bool(installed["pytest-xdist"])), suite.until - time.monotonic())
        print(f"tests {suite.about['tests']}", flush=True)

    sections = {"tests": tests, "kernels": suite.kernels, "baselines": suite.baselines, "profile": suite.profile}
    run_sections(suite, sections | {"tiles": suite.tiles}, deadlines(began, options.minutes, options.only))
    return conclude(suite, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
