"""How a call is timed, and where: quantiles of the GPU's time over inputs that no cache holds; commit, versions, device."""

import platform
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import torch

from kloss.cl.rundir import commit

from .cases import Problem

ROOT = Path(__file__).resolve().parents[1]
L2_BYTES = 64 << 20  # more than any chip so far has: an H200 has 60 MB
SLEEP_CYCLES, QUEUED_US = 4_000_000, 1900  # the GPU sleeps 2 ms at 1.98 GHz; launches within QUEUED_US are all queued by then
MOST, LEAST, WARM = 400, 10, 3  # measurements of a call; those not counted
PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "adapters", "pytest", "hypothesis", "pytest-xdist")


class Sample(NamedTuple):
    """Microseconds of one call: on the GPU, and on the host until its last launch was queued."""

    gpu: float
    host: float


class Times(NamedTuple):
    """Quantiles of one call's time on the GPU, and the median on the host, in microseconds."""

    p20: float
    p50: float
    p80: float
    host: float

    @property
    def host_bound(self) -> bool:
        """Whether the call is launch-bound: the GPU ran dry, so that the time is the host's."""
        return self.host > QUEUED_US


Clock = Callable[[Callable[[], object]], Sample]


def gpu_clock(call: Callable[[], object]) -> Sample:
    """Time a call between two events. The GPU sleeps first, so that launches are queued and not waited for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    began = time.perf_counter()
    start.record()
    call()
    end.record()
    host = time.perf_counter() - began
    end.synchronize()
    return Sample(1e3 * start.elapsed_time(end), 1e6 * host)


def measure(calls: list[Callable[[], object]], clock: Clock, seconds: float) -> Times:
    """Quantiles over calls made in turn, for that many seconds, but at least LEAST and at most MOST measurements."""
    for index in range(WARM):
        clock(calls[index % len(calls)])
    samples: list[Sample] = []
    until = time.monotonic() + seconds
    while len(samples) < LEAST or (time.monotonic() < until and len(samples) < MOST):
        samples.append(clock(calls[len(samples) % len(calls)]))
    gpu, host = (sorted(values) for values in zip(*samples, strict=True))
    p20, p50, p80 = (min(len(samples) - 1, int(len(samples) * share)) for share in (0.2, 0.5, 0.8))
    return Times(gpu[p20], gpu[p50], gpu[p80], host[p50])


def rotation(make: Callable[[int], Problem]) -> list[Problem]:
    """As many problems as fill twice the L2 cache, at least two. make: from a seed."""
    first = make(0)
    return [first, *(make(seed) for seed in range(1, max(2, -(-2 * L2_BYTES // first.bytes))))]


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Installed versions, None for what is absent. Nothing is imported."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in packages}


def environment(device: str) -> dict:
    """What every row holds: time, commit, versions and device."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/proc/cpuinfo")
        lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"time": now, **commit(), "versions": {"python": platform.python_version(), **versions()}, "device": name}
