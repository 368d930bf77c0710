"""What the GPU suite finds where it runs: commit, versions, what is absent; and the tests that need a GPU, run there."""

import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("numpy", "triton", "peft", "transformers", "pytest", "hypothesis", "pytest-xdist")
WITHOUT = {
    "peft": "its baselines are left out",
    "transformers": "peft cannot be imported without it, its baselines are left out",
    "pytest": "the tests cannot run",
    "hypothesis": "some tests cannot run",
    "pytest-xdist": "the tests run one after another, which may take longer than their share of the time",
}
WORKERS = 8  # processes of the tests: most of their time is Triton compiling
NEEDS_GPU = re.compile(r"\bmark\.gpu\b|\b(DEVICES|PLACES)\b")


def environment(device: str) -> dict:
    """Commit and whether the tree differs from it (None outside a clone), versions and device, for every row."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    changed = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "--short", "HEAD"), "dirty": None if changed is None else bool(changed),
        "torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }  # fmt: skip


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """Installed versions, None for what is absent. Nothing is imported."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in packages}


def remarks(found: dict[str, str | None]) -> list[str]:
    """A line for each package that is absent, and one where Triton's interpreter and numpy do not fit."""
    lines = [f"absent: {name}: {loss}" for name, loss in WITHOUT.items() if found.get(name) is None]

    def first_two(name: str) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", found.get(name) or "0.0")[:2])

    if first_two("triton") < (3, 7) and first_two("numpy") >= (2, 4):
        pair = f"triton {found['triton']} with numpy {found['numpy']}"
        lines.append(f"{pair}: Triton's interpreter cannot run, so neither can its tests; on a GPU they are not needed")
    return lines


def test_command(found: dict[str, str | None], folder: Path = ROOT / "tests") -> list[str]:
    """The tests marked gpu, of the files that have any: others may import what a GPU machine lacks.

    The project's own options for pytest are left off, since they name plugins.
    """
    files = [path for path in sorted(folder.glob("test_*.py")) if NEEDS_GPU.search(path.read_text(encoding="utf-8"))]
    together = ["-n", str(WORKERS)] if found.get("pytest-xdist") else []
    options = ["-q", "-o", "addopts=-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors", "-m", "gpu"]
    return [sys.executable, "-m", "pytest", *options, *together, *map(str, files)]


def run_tests(command: Sequence[str], seconds: float) -> str:
    """Runs a command in a process group of its own, which ends after that many seconds. Returns "passed", or "FAILED" and why."""
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
