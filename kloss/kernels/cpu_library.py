"""The operators of csrc on a CPU: kloss/_C.*.so, built by g++ or another compiler of C++."""

from functools import cache
from pathlib import Path

import torch


@cache
def built() -> bool:
    """Whether this kloss was built with its C++ kernels; loads them. Raises OSError where they exist and do not load."""
    files = sorted(Path(__file__).parents[1].glob("_C.*.so"))
    if files:
        torch.ops.load_library(files[0])
    return bool(files)
