"""How a call is timed: quantiles of the GPU's own time between two events, over inputs that no cache holds."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from .problems import Problem

L2_BYTES = 64 << 20  # more than any chip so far has: an H200 has 60 MB
SLEEP_CYCLES, QUEUED_US = 4_000_000, 1900  # the GPU sleeps 2 ms at 1.98 GHz; so long a call's launches may take on the host
MOST, LEAST, WARM = 400, 10, 3  # measurements of a call; those not counted


class Taken(NamedTuple):
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
        """Whether the GPU ran dry while the host was still launching, so that the time is the host's."""
        return self.host > QUEUED_US


Clock = Callable[[Callable[[], object]], Taken]


def gpu_clock(call: Callable[[], object]) -> Taken:
    """Times a call between two events; a sleep on the GPU first, so that launches are queued, not waited for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    began = time.perf_counter()
    start.record()
    call()
    end.record()
    host = time.perf_counter() - began
    end.synchronize()
    return Taken(1e3 * start.elapsed_time(end), 1e6 * host)


def measure(calls: list[Callable[[], object]], clock: Clock, seconds: float) -> Times:
    """Quantiles over calls taken in turn, for that many seconds, but at least 10 and at most 400 measurements."""
    for index in range(WARM):
        clock(calls[index % len(calls)])
    taken: list[Taken] = []
    until = time.monotonic() + seconds
    while len(taken) < LEAST or (time.monotonic() < until and len(taken) < MOST):
        taken.append(clock(calls[len(taken) % len(calls)]))
    gpu, host = (sorted(values) for values in zip(*taken, strict=True))
    at = [min(len(taken) - 1, int(len(taken) * part)) for part in (0.2, 0.5, 0.8)]
    return Times(*(gpu[place] for place in at), host[at[1]])


def rotation(make: Callable[[int], Problem]) -> list[Problem]:
    """As many problems as fill twice the L2 cache, at least two. make: from a seed."""
    first = make(0)
    return [first, *(make(seed) for seed in range(1, max(2, -(-2 * L2_BYTES // first.bytes))))]
