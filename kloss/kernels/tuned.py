"""Launch configurations of all kernels: one table, keyed by (op, architecture, dtype bucket).

The entries for sm_90 are the fastest that an H100 has shown (`python -m bench.gpu_suite`; rows in bench/results), the others
follow resource reports of ahead-of-time compilation (`python -m bench.compiled`). An architecture without an entry gets DEFAULT,
whose shared memory fits every chip since sm_80.
"""

from typing import NamedTuple

import torch


class Launch(NamedTuple):
    """Tile sizes and resources of a launch. BK: step of the contraction. BC: columns of the output tile. BR: step of the rank."""

    BK: int
    BC: int
    BR: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int | bool]:
        """What a launch passes to Triton beside its kernel's arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, **FUSION}


# Products and sums are fused, whatever a version's default: it decides bits.
FUSION = {"enable_fp_fusion": True}


OPS = ("shrink", "fused", "expand", "reduce")
# Buckets: "half" (fp16, bf16: tensor cores) and "single" (fp32, exact products, no tensor cores).
DEFAULT = {
    ("shrink", "half"): Launch(BK=64, BC=128, BR=64, num_warps=4, num_stages=3),
    ("shrink", "single"): Launch(BK=16, BC=64, BR=32, num_warps=4, num_stages=2),
    ("fused", "half"): Launch(BK=64, BC=128, BR=64, num_warps=8, num_stages=2),
    ("fused", "single"): Launch(BK=16, BC=64, BR=16, num_warps=8, num_stages=2),
    ("expand", "half"): Launch(BK=64, BC=128, BR=64, num_warps=4, num_stages=2),
    ("expand", "single"): Launch(BK=16, BC=64, BR=16, num_warps=4, num_stages=2),
    ("reduce", "half"): Launch(BK=64, BC=128, BR=64, num_warps=4, num_stages=2),
    ("reduce", "single"): Launch(BK=32, BC=64, BR=32, num_warps=4, num_stages=2),
    # For rows of odd widths, which are loaded element by element: larger tiles would not fit the registers.
    **{(f"odd {op}", "half"): Launch(BK=32, BC=64, BR=32, num_warps=8, num_stages=2) for op in OPS},
    ("odd shrink", "single"): Launch(BK=16, BC=32, BR=32, num_warps=4, num_stages=2),
    ("odd fused", "single"): Launch(BK=16, BC=32, BR=16, num_warps=8, num_stages=1),
    ("odd expand", "single"): Launch(BK=16, BC=32, BR=16, num_warps=8, num_stages=1),
}

# "wide" entries serve more ranks (of all slices) than WIDE says: x is then read, and its mask drawn, once and not per block.
WIDE = {"shrink": 128, "reduce": 128}
TABLE: dict[tuple[str, int, str], Launch] = {
    ("fused", 80, "half"): Launch(BK=64, BC=128, BR=32, num_warps=8, num_stages=2),
    ("reduce", 80, "half"): Launch(BK=64, BC=64, BR=64, num_warps=4, num_stages=2),
    ("fused", 90, "half"): Launch(BK=64, BC=128, BR=64, num_warps=8, num_stages=3),  # BC=256 is 25 % faster, but spills at rank 8
    ("reduce", 90, "half"): Launch(BK=64, BC=64, BR=128, num_warps=4, num_stages=3),
    ("wide reduce", 90, "half"): Launch(BK=64, BC=128, BR=256, num_warps=8, num_stages=3),
    # "gathered" ones load rows by an order that is loaded too. Such a loop is pipelined deeper.
    ("gathered reduce", 90, "half"): Launch(BK=64, BC=64, BR=128, num_warps=4, num_stages=5),
    ("gathered wide reduce", 90, "half"): Launch(BK=64, BC=128, BR=256, num_warps=8, num_stages=5),
}


def launch(
    op: str,
    arch: int,
    dtype: torch.dtype,
    columns: int | None = None,
    ranks: int = 0,
    widths: tuple[int, ...] = (),
    gathered: bool = False,
) -> Launch:
    """The configuration of an op on an architecture.

    arch: 80, 90, 100, or 0 for unknown.
    columns: of the output; BC is no wider than they need.
    ranks: of all slices together; they choose "wide" entries, and BR is no wider than they need.
    widths: of the matrices that the kernel moves; one that is no multiple of 8 chooses "odd" entries.
    gathered: whether rows are loaded by an order; "gathered" entries are for that.
    """
    kind, names = bucket(dtype), [op]
    if any(width % 8 for width in widths):
        names.insert(0, f"odd {op}")
    elif ranks > WIDE.get(op, ranks):
        names.insert(0, f"wide {op}")
    names = [f"gathered {name}" for name in names if gathered] + names
    configs = (TABLE.get((name, arch, kind)) or DEFAULT.get((name, kind)) for name in names)
    config = next(config for config in configs if config)
    config = config if columns is None else config._replace(BC=min(config.BC, power_of_two(columns)))
    return config._replace(BR=min(config.BR, power_of_two(ranks))) if ranks else config


def bucket(dtype: torch.dtype) -> str:
    """The table's name for a dtype."""
    return "single" if dtype == torch.float32 else "half"


def span(rank: int) -> int:
    """Chunks of rows that one program of a reduction adds up: with many ranks a part-sum moves as many bytes as its rows."""
    return 4 if rank > 64 else 1


def arch_of(device: torch.device) -> int:
    """80, 90, 100, ... of a CUDA device; 0 for anything else."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size` and 16, the smallest side of a tensor-core product."""
    return max(16, 1 << (size - 1).bit_length())
