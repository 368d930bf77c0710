"""The operators of csrc on a CPU: kloss/_C.*.so, built by g++ or another compiler of C++."""

from functools import cache
from pathlib import Path

import torch

# One of each source file.
OPERATORS = ("cpu_lora_", "cpu_attention", "cpu_add_norm", "cpu_adapter_linear", "adamw_")


@cache
def built() -> bool:
    """Whether this kloss was built with its C++ kernels; loads them.

    Raises OSError where they exist and do not load, ImportError where they are those of another kloss.
    """
    files = sorted(Path(__file__).parents[1].glob("_C.*.so"))
    if files:
        torch.ops.load_library(files[0])
        if missing := [name for name in OPERATORS if not hasattr(torch.ops.kloss, name)]:
            advice = "pip install --no-build-isolation -e ., or python setup.py build_ext --inplace"
            raise ImportError(
                f"{files[0]} was built from another version of csrc, without {missing[0]}; build it again: {advice}"
            )
    return bool(files)
