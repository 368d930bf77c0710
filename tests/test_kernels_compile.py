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
from bench.compiled import binary_of, compile_launch, faults, launches_of, more_variants
rows = []
for arch, variant, kernel in json.loads(sys.argv[1]):
    for launch in launches_of(arch, **variant).values():
        if launch.kernel == kernel:
            used = compile_launch(launch, arch)
            wrong = faults(launch, arch, used)
            asserts = "__assertfail" in binary_of(launch, arch).asm["ptx"]
            rows.append([arch, kernel, used.registers, used.spills, used.copies, list(used.tensor_core), wrong, asserts])
            break
every = [launch for variant in more_variants() for launch in launches_of(90, **variant).values()]
unsaid = {launch.kernel for launch in every if launch.arguments.get("enable_fp_fusion") is not True}
print(json.dumps([rows, len(every), sorted(unsaid)]))
"""
SUITE = """
import json
import torch
from unittest import mock
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler
from triton.runtime import driver
from bench import cases, compiled, gpu_suite

steps = tuple(decision for decision in gpu_suite.DECISIONS if decision.name == "lora_tiles.SUM_STEP")
gpu_suite.FIRST, gpu_suite.LATER, cases.STUDY_RANKS = steps, (), (32,)
jobs = gpu_suite.compile_jobs(90, cases.XLMR_BASE[:1] * 3)
sums = [job for job in jobs if "'sum_kernel'" in job[3]]
faults = [gpu_suite.compile_job(job) for job in sums]

class Driver:  # of an H100 that is not there
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

class Asked(Exception):
    pass

def asked(source, target=None, options=None, **more):
    options = compiler.make_backend(target).parse_options(dict(options or {}, **source.parse_options()))
    raise Asked(source.hash() + options.hash())

driver.set_active(Driver())
differing = []
for arch, settings, variant, identity in jobs:
    with gpu_suite.changed(settings, arch):
        launch = compiled.launches_of(arch, **variant)[identity]
    kernel, keys = compiled.KERNELS[launch.kernel], []
    given = {k: torch.empty(64, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
    with mock.patch.object(compiled.triton, "compile", asked), mock.patch("triton.compiler.compile", asked):
        for ask in (lambda: compiled.binary_of(launch, arch), lambda: kernel.run(grid=(1,), warmup=True, **given)):
            try:
                ask()
            except Asked as key:
                keys.append(str(key))
    if len(keys) != 2 or keys[0] != keys[1]:
        differing.append(launch.kernel)
print(json.dumps([[job[3] for job in jobs], [job[1] for job in sums], faults, differing]))
"""
QKV = dict(k=768, n=2304, rank=32, slices=3, exact=True)
LINEAR = ("shrink_kernel", "expand_kernel", "reduce_kernel")
KERNELS = [
    *((90, QKV, kernel) for kernel in LINEAR),
    *((90, QKV | dict(mixed=True), kernel) for kernel in LINEAR),
    (90, QKV | dict(rank=256), "shrink_kernel"),
    (90, QKV | dict(rank=256), "reduce_kernel"),
    (90, dict(k=41, n=23, rank=1), "expand_kernel"),
    (90, dict(op="attention", heads=12, width=64), "attend_backward_kernel"),
    (80, QKV, "shrink_kernel"),
    (100, QKV, "expand_kernel"),
    (90, QKV, "sum_kernel"),
    (90, dict(op="add_norm", width=768), "add_norm_backward_kernel"),
    (90, dict(op="embed", width=768), "embed_backward_kernel"),
    (90, dict(op="loss"), "token_loss_kernel"),
]
MULTIPLY = 12  # so many of them
INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


def with_the_compiler(program, *arguments):
    """What a program prints in a process where Triton compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def compiled_kernels():
    return with_the_compiler(PROGRAM, json.dumps(KERNELS))


@pytest.fixture(scope="module")
def resources(compiled_kernels):
    return compiled_kernels[0]


def test_no_faults_and_tensor_cores_in_every_product(resources):
    assert len(resources) == len(KERNELS)
    for index, (arch, kernel, registers, spills, _, instructions, wrong, _) in enumerate(resources):
        assert not wrong and 0 < registers <= 255
        assert spills == 0 or arch != 90
        if kernel == "attend_backward_kernel":  # the products of several heads have no wgmma
            assert sorted(instructions) == ["mma.sync", "wgmma.mma_async"]
        else:
            assert instructions == ([INSTRUCTION[arch]] if index < MULTIPLY else []), (arch, kernel)


def test_mixed_ranks_keep_the_loads_of_16_bytes(resources):
    """A mask by the exact rank splits them: 16 loads of 2 bytes in the kernel for y, and 48 copies of 4 bytes."""
    copies = [row[4] for row in resources]
    assert copies[:3] == copies[3:6] and all(copies[:6])


def test_only_a_lookup_by_ids_asserts(resources):
    assert {kernel for _, kernel, *_, asserts in resources if asserts} == {"embed_backward_kernel"}


def test_the_suite_compiles_ahead_what_it_launches():
    """Under the very keys of Triton's cache that a launch asks for, or it would compile everything again."""
    identities, settings, faults, differing = with_the_compiler(SUITE)
    assert len(identities) == len(set(identities)) > 15 and not differing
    assert {} in settings and {"lora_tiles.SUM_STEP": 1} in settings and not any(faults)
    kernels = "".join(identities)
    assert all(f"'{kernel}_kernel'" in kernels for kernel in ("shrink", "expand", "attend", "embed", "token_loss_backward"))


def test_the_report_fails_for_spills_shared_memory_and_missing_tensor_cores():
    launch = Launch("shrink_kernel", {"x_ptr": torch.empty(0, dtype=torch.bfloat16)})
    good = Resources(128, 0, 1000, {"wgmma.mma_async": 4}, 8, 4, 2)
    assert faults(launch, 90, good) == []
    assert "spills" in faults(launch, 90, good._replace(spills=8))[0]
    assert "shared" in faults(launch, 80, good._replace(shared=BLOCK_SHARED[80] + 1))[0]
    assert "tensor core" in faults(launch, 90, good._replace(tensor_core={}))[0]


def test_every_launch_says_whether_products_and_sums_are_fused(compiled_kernels):
    _, launches, unsaid = compiled_kernels
    assert launches > 100 and unsaid == []


def test_the_report_covers_the_sizes_that_are_promised():
    covered = {(v["k"], v["n"], v["rank"]) for v in compiled.more_variants() if "k" in v and "slices" not in v}
    assert {(k, n, r) for k in cases.WIDTHS for n in cases.WIDTHS for r in cases.RANKS} <= covered


def test_estimates_add_up():
    """The floor at the study's batch by hand: the base products of a layer, forward and dx, all bound by arithmetic."""
    rows, weights = 19_968, 7_077_888
    floor = sum(work.seconds for linear in cases.XLMR_BASE for work in cases.base_work(linear, rows))
    assert floor == pytest.approx(2 * 2 * rows * weights / 788e12, rel=1e-12)
    for rank, ratio, beside in ((32, 1.39, 1.094), (64, 1.46, 1.1875), (256, 1.89, 1.75)):  # beside: FLOPs alone, 1 + 3 r / 1024
        row = next(row for row in cases.roofline() if row["rank"] == rank and row["kernel"] == "all")
        assert row["ratio_to_base_alone"] == pytest.approx(ratio, abs=0.005)
        assert row["ratio_overlapped"] == pytest.approx(beside, abs=0.0005)
