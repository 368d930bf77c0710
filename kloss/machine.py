"""What a run asks of the machine: how many threads it computes on, and that memory once used stays with it."""

import contextlib
import ctypes
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from .kernels.cpu_library import built

GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: microseconds of processor time, or max, and the period that they are for
MMAP_THRESHOLD, TRIM_THRESHOLD = (-3, 1 << 30), (-1, (1 << 31) - 1)  # of glibc's mallopt: parameter, bytes


def default_threads(quota: Path = QUOTA) -> int:
    """Threads for a run that names none: torch's count, but no more than a container may use at once.

    torch counts the physical cores that the process may run on, or takes OMP_NUM_THREADS. A thread above the quota only waits,
    and those that wait for it spin. The load of other programs does not count: the same command would have other bits each day.
    """
    threads = torch.get_num_threads()
    try:
        allowed, period = quota.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return threads
    return threads if allowed == "max" else max(1, min(threads, math.ceil(int(allowed) / int(period))))


def memory_of_host(groups: Path = GROUPS, own: Path = OWN_GROUP) -> int:
    """Bytes of memory that this process may use: the machine's, or what a container or another control group allows."""
    least = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        name = own.read_text(encoding="ascii").rpartition("::")[2].strip().strip("/")
    except (OSError, UnicodeDecodeError):
        name = ""
    for folder in (groups / name, *(groups / name).parents):
        with contextlib.suppress(OSError, ValueError):  # the root has none, nor has one without a limit a number
            least = min(least, int((folder / "memory.max").read_text(encoding="ascii")))
        if folder == groups:
            break
    return least


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Compute on `count` threads while the block runs; 0: on `default_threads`."""
    before, wanted = torch.get_num_threads(), count or default_threads()
    if wanted != before:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        if wanted != before:
            torch.set_num_threads(before)


def keep_memory() -> None:
    """Keep freed memory for the next step instead of giving it back, whose pages Linux would clear anew; glibc only."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            mallopt(*option)


def remarks(device: torch.device) -> list[str]:
    """Return a line for each thing about the machine that makes a run slow and that its user can change."""
    if device.type != "cpu":
        return []
    lines, threads, cores = [], torch.get_num_threads(), os.cpu_count() or 1
    if not built():
        lines.append("the C++ kernels are not built: plain torch does their work, about half as fast (see README)")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads > 1 and load + threads > 2 * cores:  # the preparation of this run is itself a load of one
        lines.append(f"other programs are using the {cores} cores (load {load:.1f}): --threads 1 may be faster than {threads}")
    return lines
