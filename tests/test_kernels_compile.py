"""The kernels compile for every architecture without a GPU; `python -m bench.compiled` compiles all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cases, compiled
from bench.compiled import BLOCK_SHARED, Launch, Resources, faults

# Triton decides when it is imported whether it interprets; these need the compiler, so they have a process of their own.
PROGRAM = """
import json, sys
from bench.compiled import compile_launch, faults, launches_of
rows = []
for arch, variant, kernel in json.loads(sys.argv[1]):
    for launch in launches_of(arch, **variant).values():
        if launch.kernel == kernel:
            used = compile_launch(launch, arch)
            rows.append([arch, kernel, used.registers, used.spills, list(used.tensor_core), faults(launch, arch, used)])
            break
print(json.dumps(rows))
"""
QKV = dict(k=768, n=2304, rank=32, slices=3, exact=True)
KERNELS = [
    *((90, QKV, kernel) for kernel in ("shrink_kernel", "expand_kernel", "reduce_kernel", "sum_kernel")),
    (80, QKV, "shrink_kernel"),
    (100, QKV, "expand_kernel"),
]
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@pytest.fixture(scope="module")
def resources():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(KERNELS)], cwd=Path(__file__).parents[1], env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_faults_and_tensor_cores_in_every_product(resources):
    assert len(resources) == len(KERNELS)
    for arch, kernel, registers, spills, instructions, wrong in resources:
        assert not wrong and 0 < registers <= 255
        assert spills == 0 or arch != 90
        assert instructions == ([] if kernel == "sum_kernel" else [INSTRUCTION[arch]]), (arch, kernel)


def test_the_report_fails_for_spills_shared_memory_and_missing_tensor_cores():
    launch = Launch("shrink_kernel", {"x_ptr": torch.empty(0, dtype=torch.bfloat16)})
    good = Resources(128, 0, 1000, {"wgmma.mma_async": 4}, 4, 2)
    assert faults(launch, 90, good) == []
    assert "spills" in faults(launch, 90, good._replace(spills=8))[0]
    assert "shared" in faults(launch, 80, good._replace(shared=BLOCK_SHARED[80] + 1))[0]
    assert "tensor core" in faults(launch, 90, good._replace(tensor_core={}))[0]


def test_the_report_covers_the_sizes_that_are_promised():
    covered = {(v["k"], v["n"], v["rank"]) for v in compiled.variants() if "slices" not in v}
    assert {(k, n, r) for k in cases.WIDTHS for n in cases.WIDTHS for r in cases.RANKS} <= covered


def test_estimates_add_up():
    """The floor at the study's batch by hand: the base products of a layer, forward and dx, all bound by arithmetic."""
    rows, weights = 19_968, 7_077_888
    floor = sum(work.seconds for linear in cases.XLMR_BASE for work in cases.base_work(linear, rows))
    assert floor == pytest.approx(2 * 2 * rows * weights / 788e12, rel=1e-12)
    for rank, ratio, beside in ((32, 1.40, 1.094), (64, 1.48, 1.1875), (256, 1.97, 1.75)):  # beside: FLOPs alone, 1 + 3 r / 1024
        row = next(row for row in compiled.roofline() if row["rank"] == rank and row["kernel"] == "all")
        assert row["ratio_to_base_alone"] == pytest.approx(ratio, abs=0.005)
        assert row["ratio_overlapped"] == pytest.approx(beside, abs=0.0005)
