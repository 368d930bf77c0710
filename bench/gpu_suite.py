"""Everything a GPU has to show, in one command: tests, first timings, whole steps, linears, other libraries, decisions, targets.

    python -m bench.gpu_suite [--minutes 9] [--only tests first steps kernels baselines decisions] [--out bench/results]

Needs torch, triton and numpy; other absent packages are named first. Sections run in order of worth. One starts no case after
its share of the minutes; time that it leaves goes to the next. Times of kernels are the GPU's alone, by events, over inputs that
no cache holds; a whole step's is the wall's. Every row is one JSON line, written as it is measured and only for an op whose
check passed in this process. Triton's kernels are compiled by processes beside the tests.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from kloss.kernels import tuned

from . import cases, compiled, kernels
from .cases import Batch, Linear
from .kernels import NOISE, NOW, Decision, Shape, Suite, changed
from .profiled import STEPS, step_targets, targets
from .timing import ROOT, environment

SHARES = {"tests": 0.30, "first": 0.16, "steps": 0.14, "kernels": 0.14, "baselines": 0.12, "decisions": 0.14}
LAST_LINES = 40  # of the tests' output that are printed
LAST_WORDS = 10.0  # seconds that tests which take too long have to report
WORKERS = 8  # processes of the tests, and as many that compile: most of the tests' time is Triton compiling too


def entries(op: str, *changes: dict[str, int]) -> dict[str, dict[str, object]]:
    """Candidates for an op's entry in the table of launches: the fields that change."""
    words = {", ".join(f"{field}={value}" for field, value in change.items()): change for change in changes}
    return {label: {f"tuned.TABLE {op}": change} for label, change in words.items()}


def values(setting: str, *others: object) -> dict[str, dict[str, object]]:
    """Candidates for a constant."""
    return {str(other): {setting: other} for other in others}


AT_32, AT_64, AT_256 = ((Shape(0, rank), Shape(2, rank)) for rank in (32, 64, 256))  # q, k, v and feed-forward up
LONE = (Shape(0, 32, Batch(1, 384)), Shape(3, 32, Batch(1, 384)))  # q, k, v and feed-forward down
CHUNKED = (Shape(0, 32, Batch(8, 2496)), Shape(0, 256, Batch(8, 2496)))  # adapters with several chunks
MODULES = "segments", "lora_shrink", "lora_tiles", "adapter_linear_triton"
TALL: dict[str, object] = {f"{module}.SHORT_TILE": 128 for module in MODULES}
TALL |= {"tuned.TABLE shrink": {"num_warps": 8}, "tuned.TABLE expand": {"num_warps": 8}}  # with 4 they spill
# Every choice that waits for hardware, in order of worth. FIRST are those on which most depends. A loop that loads rows by their
# order is pipelined from three stages on.
FIRST = (
    Decision("tuned.TABLE gathered reduce", "tile of dA and dB, r=32", "reduce", AT_32 + LONE[1:],
             entries("gathered reduce", dict(num_stages=3), dict(BC=32), dict(BC=128), dict(BK=32), dict(num_warps=2))),
    Decision("tuned.TABLE shrink", "tile of S and dS, r=32", "shrink", AT_32[1:] + LONE[1:],
             entries("shrink", dict(num_stages=4), dict(num_stages=5), dict(BK=128), dict(BK=128, num_stages=4),
                     dict(BK=128, num_warps=8))),
    Decision("tuned.TABLE expand", "tile of the LoRA term without the base product, r=32", "expand", AT_32,
             entries("expand", dict(BC=64), dict(BC=64, num_warps=2), dict(BC=256))),
    Decision("tuned.TABLE gathered wide reduce", "tile of dA and dB, r=256", "reduce", AT_256,
             entries("gathered wide reduce", dict(num_stages=3), dict(BC=64), dict(BR=128))),
    Decision("tuned.TABLE wide shrink", "tile of S and dS, r=256", "shrink", AT_256,
             entries("wide shrink", dict(BK=32, num_stages=4), dict(num_warps=8))),
    Decision("tuned.WIDE reduce", "ranks of all slices above which dA and dB have the wide tile", "reduce", AT_64,
             values("tuned.WIDE reduce", 32, 256)),
)  # fmt: skip
LATER = (
    Decision("lora_hopper.LEAST", "outputs below which the vendor has the base product on Hopper", "chosen",
             (*AT_32, *LONE, Shape(0, 32, Batch(8, 384)), *AT_256), values("lora_hopper.LEAST", 0, 1 << 60)),
    Decision("attention_triton.CLASSES", "tiles of short sequences", "attention", (),
             {"(32, 64)": {"attention_triton.CLASSES half": (32, 64)}, "(64,)": {"attention_triton.CLASSES half": (64,)}}),
    Decision("add_norm_triton.BLOCK", "elements of a block of add_norm, of the embeddings and of dropout", "add_norm", (),
             values("add_norm_triton.BLOCK", 1024, 4096, 8192)),
    Decision("tuned.TABLE fused", "tile of the base product with the LoRA term, r=32", "fused", AT_32,
             entries("fused", dict(BC=256, BR=16), dict(num_stages=4))),
    Decision("token_loss_triton.BLOCK", "logits of a block", "loss", (), values("token_loss_triton.BLOCK", 1024, 4096)),
    Decision("lora_tiles.SUM_STEP", "programs of a sum that finds nothing to add", "sum", AT_32 + AT_256,
             values("lora_tiles.SUM_STEP", 1, 52)),
    Decision("segments.CHUNK", "rows of a chunk of dA and dB; csrc/shared/lists.h has it too", "reduce", CHUNKED,
             values("segments.CHUNK", 512, 2048, 4096)),
    Decision("segments.SHORT_TILE", "rows of a tile of S, dS and the LoRA term; csrc/shared/lists.h has it too", "linear",
             AT_32 + AT_256, {"128": TALL}),
)  # fmt: skip
DECISIONS = FIRST + LATER


def decision_line(decision: Decision, rows: Sequence[dict]) -> str:
    """A decision in a line: what is set now, and the fastest candidate if that is faster by more than NOISE.

    rows: of `Suite.decide`. Times are summed over the shapes; a candidate without all of them does not count.
    """
    own = [row for row in rows if row.get("decision") == decision.name and "candidate" in row]
    times: dict[str, list[float]] = {}
    for row in own:
        times.setdefault(row["candidate"], []).append(row["p50"])
    totals = {label: sum(us) for label, us in times.items() if len(us) == max(1, len(decision.shapes))}
    if NOW not in totals:
        return f"{decision.name}: not timed"
    now, text = totals.pop(NOW), f"{decision.name}: {own[0]['now']} now"
    if totals:
        best = min(totals, key=lambda label: totals[label])
        gain = now / totals[best] - 1
        if gain > NOISE:
            text += f", {best} faster by {gain:.0%}"
        else:
            text += (
                f", {best} the same" if totals[best] <= now * (1 + NOISE) else f", {best} slower by {totals[best] / now - 1:.0%}"
            )
    missing = [label for label in decision.candidates if label not in totals]
    return text + (f"; not timed: {' | '.join(missing)}" if missing else "")


def decide(suite: Suite, decisions: Iterable[Decision]) -> None:
    """Time decisions; print and write a line for each."""
    for decision in decisions:
        with suite.attempt(decision.name):
            suite.decide(decision)
        line = decision_line(decision, suite.rows)
        print(line, flush=True)
        suite.write({"case": "decision", "decision": decision.name, "decides": decision.decides, "line": line})


def launched_by(linears: Sequence[Linear]) -> Iterator[tuple[Mapping[str, object], dict]]:
    """What the suite launches in Triton, first things first: settings, and a variant of `compiled.launches_of`."""

    def linear(index: int, rank: int, **more: bool) -> dict:
        _, k, n, slices = linears[index]
        return dict(k=k, n=n, slices=slices, rank=rank, **more)

    def decided(decision: Decision) -> Iterator[tuple[Mapping[str, object], dict]]:
        exact = kernels.ALONE.get(decision.timed, ("", False))[1]
        own = [linear(shape.linear, shape.rank, exact=exact) for shape in decision.shapes]
        own = own or [variant for variant in compiled.variants() if variant.get("op") == decision.timed]
        yield from product(({}, *decision.candidates.values()), own)

    ways: tuple[dict[str, bool], ...] = {}, {"exact": True}, {"dropout": False}, {"hopper": True}
    yield from chain.from_iterable(map(decided, FIRST))
    yield from (({}, variant) for variant in compiled.variants() if "op" in variant)
    yield from (({}, linear(i, rank, **way)) for rank, i, way in product(cases.STUDY_RANKS, range(len(linears)), ways))
    yield from chain.from_iterable(map(decided, LATER))


Job = tuple[int, Mapping[str, object], dict, str]


def compile_jobs(arch: int, linears: Sequence[Linear] = cases.XLMR_BASE) -> list[Job]:
    """Every kernel of `launched_by` once: architecture, settings, variant, identity of the launch."""
    jobs: dict[str, Job] = {}
    for settings, variant in launched_by(linears):
        with changed(settings, arch):
            for identity in compiled.launches_of(arch, **variant):
                jobs.setdefault(identity, (arch, settings, variant, identity))
    return list(jobs.values())


def compile_job(job: Job) -> list[str]:
    """Compile a kernel into Triton's cache. Returns its faults in a line, or nothing."""
    arch, settings, variant, identity = job
    with changed(settings, arch):
        launch = compiled.launches_of(arch, **variant)[identity]
    try:
        faults = compiled.faults(launch, arch, compiled.compile_launch(launch, arch))
    except kernels.REFUSED as error:
        faults = [str(error)]
    return [f"{compiled.kernel_name(launch)}, {settings or 'as set'}: {', '.join(faults)}"] if faults else []


def compile_all(arch: int, workers: int) -> int:
    """Fill Triton's cache with what the suite launches, and print the faults. Returns how many kernels have some."""
    jobs = compile_jobs(arch)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        faults = list(chain.from_iterable(pool.map(compile_job, jobs)))
    print(*faults, f"sm_{arch}: {len(jobs)} kernels of the suite, {len(faults)} with faults", sep="\n")
    return len(faults)


@contextmanager
def beside(command: Sequence[str]) -> Iterator[subprocess.Popen]:
    """Within it a command runs in the background, at low priority; then all its processes are killed."""
    process = subprocess.Popen(command, cwd=ROOT, process_group=0, preexec_fn=partial(os.nice, 10), stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        _kill(process)


@contextmanager
def halted(process: subprocess.Popen | None) -> Iterator[None]:
    """Within it the processes of `beside` stand still: what is timed by the wall needs the host."""
    if process is None or process.poll() is not None:
        yield
        return
    os.killpg(process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGCONT)


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
    """Print what was left out, what failed, the decisions, and the targets, which are rows of the file too; the exit code."""
    lines = [f"left out: {case}" for case in suite.left_out] + [f"FAILED: {failure}" for failure in suite.failed]
    lines += ["", "decisions:", *(row["line"] for row in suite.rows if row.get("case") == "decision")]
    lines += ["", f"targets; linears: {cases.STUDY.adapters} x {cases.STUDY.rows} rows, all of a layer of XLM-R base"]
    suite.section, answers = "targets", step_targets(suite.rows, suite.about["device"]) + targets(suite.rows)
    for target in answers:
        suite.write(target._asdict())
        lines.append(target.line)
    tests = suite.about["tests"]
    lines.append(f"{len(suite.rows)} rows in {suite.file}, {seconds:.0f} s; {len(suite.failed)} failures; tests {tests}")
    print("\n".join(lines))
    return 1 if suite.failed or tests.startswith("FAILED") else 0


def files_for_a_gpu() -> list[str]:
    """The files with tests that a GPU runs: those that use the mark, or the places that `tests/helpers.py` marks."""
    marked = re.compile(r"\bmark\.gpu\b|\b(PLACES|DEVICES)\b")
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if marked.search(file.read_text(encoding="utf-8"))]


def pytest_command(parallel: bool) -> list[str]:
    """The tests that need a GPU, without the project's options for pytest: these name plugins that may be absent."""
    options = ["-v", "-o", "addopts=-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", "gpu"]
    return [sys.executable, "-m", "pytest", *options, *(["-n", str(WORKERS)] if parallel else []), *files_for_a_gpu()]


def run_tests(command: Sequence[str], seconds: float, log: Path) -> str:
    """Run a command; after that many seconds interrupt it, then kill all its processes. Returns "passed", or "FAILED" and why.

    log: the file that gets its output, a line for each test as it ends, so that those of a killed command are known.
    """
    threads = {"OMP_NUM_THREADS": "2"}  # of each of the tests' processes
    with log.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, process_group=0, env=os.environ | threads, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        code = process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then tells of the failures so far
        with suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS)
        return f"FAILED: not finished after {seconds:.0f} s"
    finally:
        _kill(process)
    return "passed" if code == 0 else f"FAILED: exit code {code}"


def main(arguments: list[str] | None = None) -> int:
    """Run the sections and print the targets; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_suite", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="for all sections, the tests too")
    parser.add_argument("--only", nargs="+", choices=tuple(SHARES), default=list(SHARES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument(
        "--compile",
        type=int,
        choices=compiled.ARCHITECTURES,
        help="only compile what it launches; needs no GPU",
    )
    options = parser.parse_args(arguments)
    began = time.monotonic()
    if options.compile is not None:
        return 1 if compile_all(options.compile, min(WORKERS, os.cpu_count() or 1)) else 0
    if not torch.cuda.is_available():
        print("gpu_suite: there is no CUDA GPU here", file=sys.stderr)
        return 2
    about = environment("cuda")
    installed = about["versions"]
    print(about, "absent: " + (", ".join(name for name in installed if not installed[name]) or "nothing"), sep="\n")
    suite = Suite(options.out, about | {"tests": "not run"})

    def tests() -> None:
        suite.about["tests"] = "FAILED: could not start"
        command = pytest_command(bool(installed["pytest-xdist"]))
        print("tests marked for a GPU in", *files_for_a_gpu(), flush=True)
        log = suite.file.with_suffix(".tests.txt")
        suite.about["tests"] = run_tests(command, suite.until - time.monotonic(), log)
        print(
            *log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:],
            f"tests {suite.about['tests']}: {log}",
            sep="\n",
        )

    def first() -> None:
        suite.vendor()
        decide(suite, FIRST)

    arch = tuned.arch_of(torch.device("cuda"))
    ahead = beside([sys.executable, "-m", "bench.gpu_suite", "--compile", str(arch)])
    with ahead if arch in compiled.ARCHITECTURES else nullcontext() as compiler:

        def steps() -> None:
            with halted(compiler):
                suite.steps(STEPS)

        def against_others() -> None:
            with halted(compiler):
                suite.peft_step(STEPS[0])
            suite.baselines()

        sections: dict[str, Callable[[], Any]] = {
            "tests": tests, "first": first, "steps": steps, "kernels": suite.kernels,
            "baselines": against_others, "decisions": partial(decide, suite, LATER),
        }  # fmt: skip
        run_sections(suite, sections, deadlines(began, options.minutes, options.only))
    return conclude(suite, time.monotonic() - began)


if __name__ == "__main__":
    sys.exit(main())
