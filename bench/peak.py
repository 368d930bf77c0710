"""How much memory a call takes at its most, beyond what was there before it.

On a GPU torch's allocator says so. On a CPU under Linux it is the growth of what the process has in memory: the kernel keeps its
high-water mark, which is reset before the call. That counts what C++ kernels take for themselves too, which a TorchDispatchMode
would not see. Blocks of 64 KiB and more are mapped one by one, and what is free is given back first, so that no call lives on
what an earlier one left; later timings of the process suffer from it, so `crossover` has another one for this. Elsewhere nothing
is measured. A kernel may keep its scratch for the next call, so the first one of a size counts.
"""

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5)
M_MMAP_THRESHOLD, THRESHOLD = -3, 1 << 16  # malloc.h


def peak(call: Callable[[], object], device: str) -> int | None:
    """Bytes; None where they cannot be known. call: not made before."""
    return _on_gpu(call) if device == "cuda" else _on_linux(call) if _is_linux() else None


def _on_gpu(call: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _is_linux() -> bool:
    return REFERENCES.exists() and hasattr(ctypes.CDLL(None), "malloc_trim")


def _on_linux(call: Callable[[], object]) -> int:
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, THRESHOLD)
    gc.collect()
    libc.malloc_trim(0)
    REFERENCES.write_text(RESET_PEAK, encoding="ascii")
    before = _kilobytes("VmRSS")
    call()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    return int(re.findall(rf"{name}:\s+(\d+) kB", STATUS.read_text(encoding="ascii"))[0])
