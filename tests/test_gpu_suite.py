"""The logic of the GPU suite, with a clock that counts, profiles made up, and the kernels in Triton's interpreter."""

import json
import subprocess
import sys
import time
import warnings
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import triton
from torch.autograd import DeviceType

from bench import baselines, cases, gpu_suite, problems, profiled, surroundings, targets, timing, training_step, whole_step
from bench import suite as sections
from bench.profiled import Event
from bench.timing import Taken, Times
from kloss.kernels import tuned
from kloss.models import XLMRConfig

SMALL = cases.Linear("small", 16, 32, 2)
PLAIN = cases.Linear("plain", 16, 16)
BATCH = cases.Batch(2, 4)
TOY = XLMRConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=5
)  # fmt: skip


class Clock:
    """Runs each call once per function that it sees, and says 10, 20, 30, ... microseconds; a tenth of it on the host."""

    def __init__(self):
        self.time, self.seen = 0, set()

    def __call__(self, call):
        if call not in self.seen:
            self.seen.add(call)
            call()
        self.time += 10
        return Taken(float(self.time), self.time / 10)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "L2_BYTES", 1)
    monkeypatch.setattr(cases, "STUDY", BATCH)
    monkeypatch.setattr(targets, "BOUNDS", {4: 1.5})
    monkeypatch.setattr(targets, "FLAT_RANK", 4)
    about = {**surroundings.environment("cpu"), "tests": "passed"}
    return sections.Suite(tmp_path, about, clock=Clock(), device="cpu", seconds=0, dtype=torch.float32)


def written(suite):
    return [json.loads(line) for line in suite.file.read_text().splitlines()]


def small_problem(linear=SMALL, rank=16):
    return problems.make_problem(linear, BATCH, rank, device="cpu", dtype=torch.float32)


# Timing


def test_quantiles_and_rotation():
    order = []
    calls = [lambda i=i: order.append(i) for i in range(3)]
    times = iter(range(100))

    def clock(call):
        call()
        at = next(times)
        return Taken(float(at), 100.0 - at)

    assert timing.measure(calls, clock, seconds=0) == (5.0, 8.0, 11.0, 93.0)
    assert order == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0], "inputs rotate, the first three are not counted"


def test_a_host_slower_than_the_sleep_is_named():
    assert not Times(1, 1, 1, timing.QUEUED_US).host_bound and Times(1, 1, 1, timing.QUEUED_US + 1).host_bound


def test_inputs_fill_twice_the_cache(monkeypatch):
    one = small_problem(PLAIN, 4)
    monkeypatch.setattr(timing, "L2_BYTES", 3 * one.bytes)
    assert len(timing.rotation(lambda seed: one)) == 6
    monkeypatch.setattr(timing, "L2_BYTES", 1)
    assert len(timing.rotation(lambda seed: one)) == 2


# The section kernels


def test_kernels_write_a_row_per_case_with_the_ratio_of_the_same_run(suite, capsys):
    suite.section = "kernels"
    suite.kernels(batches=(cases.Batch(1, 8), BATCH, cases.Batch(1, 3)), ranks=(4,), linears=(SMALL,))
    rows = written(suite)
    shapes = [("2 x 4", "chosen"), ("2 x 4", "exact"), ("2 x 4", "forward only"), ("1 x 8", "chosen")]
    shapes += [("1 x 3", how) for how in ("chosen", "exact", "forward only")]
    assert [row["case"] for row in rows] == [f"small, {batch} rows, r=4, {how}" for batch, how in shapes]
    needed = {"commit", "torch", "triton", "device", "tests", "p20", "p50", "p80", "host", "host_bound", "dtype", "fused"}
    for row in rows:
        assert needed <= row.keys() and row["section"] == "kernels"
        assert row["ratio"] == row["p50"] / row["baseline_p50"] and row["p20"] < row["p50"] < row["p80"]
        assert row["baseline"] == ("base forward alone" if row["kind"] == "forward only" else "base alone")
    least = {one.name: one.seconds * 1e6 for one in cases.lora_work(SMALL, BATCH, 4)}
    assert rows[0]["ceiling_share"] == pytest.approx(sum(least.values()) / rows[0]["p50"])
    assert rows[2]["ceiling_share"] == pytest.approx((least["S"] + least["y"]) / rows[2]["p50"])
    assert rows[1]["fused"] == [True, True] and rows[0]["fused"] == [False, False]
    one, two = (1e3 * row["p50"] / 8 for row in (rows[3], rows[0]))
    assert f"1: {one:.1f}, 2: {two:.1f}; farthest from one adapter: {two / one - 1:+.1%} at 2" in capsys.readouterr().out


def test_what_the_targets_need_is_measured_first():
    plan = list(sections.kernel_plan(cases.BATCHES, cases.STUDY_RANKS, cases.XLMR_BASE))
    assert [(batch, rank) for linear, batch, rank, _ in plan[::4]][:7] == [
        (cases.STUDY, 32), (cases.STUDY, 256), (cases.Batch(1, 19_968), 32), (cases.Batch(8, 2496), 32),
        (cases.Batch(256, 78), 32), (cases.Batch(1024, 19), 32), (cases.STUDY, 64),
    ]  # fmt: skip
    assert len(plan) == len(set(plan)) == 29 and plan[-1][1] == cases.Batch(1, 384)
    assert {kinds for _, batch, _, kinds in plan if batch == cases.STUDY} == {("chosen", "exact", "forward only")}
    assert all({linear for linear, *_ in plan[at : at + 4]} == set(cases.XLMR_BASE) for at in range(0, 28, 4))


@pytest.mark.parametrize(("part", "name"), list(enumerate(("y", "dx", "dA", "dB"))))
def test_nothing_is_timed_after_a_failed_check(suite, monkeypatch, part, name):
    honest = problems.together

    def wrong(one, **more):
        call = honest(one, **more)
        return lambda: tuple(1.01 * t if i == part else t for i, t in enumerate(call()))

    monkeypatch.setattr(problems, "together", wrong)
    suite.section = "kernels"
    suite.kernels(batches=(), ranks=(4,), linears=(SMALL,))
    assert not suite.rows and not suite.file.exists()
    assert suite.failed[0].startswith(f"kernels: small, 2 x 4 rows, r=4: AssertionError: {name} at small, r=4, chosen")


@pytest.mark.parametrize("name", ["kernels", "baselines", "profile", "training step", "tiles"])
def test_no_section_writes_a_row_of_an_op_that_failed_its_check(suite, monkeypatch, name):
    def check(*shape, **more):
        raise AssertionError("dx is off")

    def record(call):
        return events(("shrink_kernel", 1.0))

    monkeypatch.setattr(sections, "check", check)
    toy = training_step.make_step(TOY, 3, 4, 2, device="cpu", dtype=torch.float32)
    monkeypatch.setattr(training_step, "check_step", check)
    monkeypatch.setattr(training_step, "make_step", lambda **sizes: toy)
    monkeypatch.setattr(sections, "others", lambda: ([baselines.Other("a", "a", problems.together, problems.together)], []))
    monkeypatch.setattr(sections, "PASSES", 1)
    with suite.attempt(name):
        {
            "kernels": partial(suite.kernels, ranks=(4,), linears=(PLAIN,), batches=()),
            "baselines": partial(suite.baselines, ranks=(4,), linears=(PLAIN,)),
            "profile": partial(suite.profile, ranks=(4,), linears=(PLAIN,), record=record),
            "training step": partial(suite.training_step, record, Counter, config=TOY, adapters=3, rank=4, utterances=2),
            "tiles": partial(suite.tiles, linears=(PLAIN,), rank=4),
        }[name]()
    assert not suite.rows and suite.failed and all("dx is off" in failure for failure in suite.failed)


def test_one_adapter_that_is_wrong_fails_the_check(monkeypatch):
    honest = problems.together

    def wrong(one, exact=False):
        def call():
            results = honest(one, exact=exact)()
            results[0][4 if exact else 0 : 8 if exact else 0] += 1e-4
            return results

        return call

    monkeypatch.setattr(problems, "together", wrong)
    with pytest.raises(AssertionError, match="y at small, r=4, exact: adapter 1"):
        problems.check(SMALL, BATCH, 4, device="cpu", dtype=torch.float32)


def test_a_wrong_or_missing_value_in_inference_fails_the_check(monkeypatch):
    honest = problems.forward_only
    monkeypatch.setattr(problems, "forward_only", lambda one: lambda: honest(one)().index_fill(0, torch.tensor([5]), torch.nan))
    with pytest.raises(AssertionError, match="y at plain, r=4, forward only: adapter 1"):
        problems.check(PLAIN, BATCH, 4, device="cpu", dtype=torch.float32)


def test_inference_has_no_gradients_and_no_dropout():
    one = small_problem()
    y = problems.forward_only(one._replace(lora_a=one.lora_a.clone().requires_grad_()))()
    without = problems.together(one._replace(dropout=None))()[0]
    assert not y.requires_grad and torch.equal(y, without) and not torch.equal(y, problems.together(one)()[0])


def test_each_kind_has_its_own_floor():
    one = small_problem()
    y, dx = sections.KINDS["chosen"].floor(one)()
    torch.testing.assert_close(y, F.linear(one.x, one.weight, one.bias))
    torch.testing.assert_close(dx, one.dy @ one.weight)
    assert torch.equal(sections.KINDS["forward only"].floor(one)(), y)
    assert sections.KINDS["exact"].floor is sections.KINDS["chosen"].floor


def test_a_ratio_with_the_hosts_time_on_either_side_is_marked(suite, capsys):
    quick, slow = Times(1, 2, 3, 1), Times(1, 4, 5, timing.QUEUED_US + 1)
    sides = (quick, quick), (quick, slow), (slow, quick)
    marked = [suite.row("case", times, baseline="other", floor=floor) for times, floor in sides]
    assert [row["host_bound"] for row in marked] == [False, True, True] and marked[2]["ratio"] == 2
    assert [line.endswith("waits for the host") for line in capsys.readouterr().out.splitlines()] == [False, True, True]


def test_a_case_that_passed_is_not_checked_again(suite, monkeypatch):
    seen = []
    monkeypatch.setattr(sections, "check", lambda *case, **more: seen.append(case))
    for rank in (4, 4, 8):
        suite.check(SMALL, BATCH, rank)
    assert seen == [(SMALL, BATCH, 4), (SMALL, BATCH, 8)]


def test_a_spent_budget_is_said(suite):
    suite.until, suite.section = 0, "kernels"
    suite.kernels(batches=(BATCH,), ranks=(4,), linears=(SMALL,))
    assert suite.left_out == ["kernels: small, 2 x 4 rows, r=4"] and not suite.rows


# The section baselines


def test_grouped_mm_does_the_same_work(monkeypatch):
    """Against ours without dropout, and against autograd of the plain composition with dropout."""
    one = small_problem()
    one = one._replace(scaling=torch.tensor([0.5, 2.0]))
    y, dx, d_a, *d_b = baselines.grouped_mm(one, p=0.0)()
    wanted = problems.together(one._replace(dropout=None))()
    for got, right in zip((y, dx, d_a, torch.cat(d_b, 1)), wanted, strict=True):
        torch.testing.assert_close(got, right)
    keep = torch.rand_like(one.x) > 0.5
    monkeypatch.setattr(torch, "native_dropout", lambda x, p, train: (x * keep / (1 - p), keep))
    y, dx, d_a, *d_b = baselines.grouped_mm(one, p=0.5)()
    leaves = x, a, b = [t.detach().requires_grad_() for t in (one.x, one.lora_a, one.lora_b)]
    parts = []
    for g in range(2):
        rows = slice(4 * g, 4 * g + 4)
        s = (x * keep * 2)[rows] @ a[g].t() * one.scaling[g]
        delta = torch.cat([s[:, :16] @ b[g, :16].t(), s[:, 16:] @ b[g, 16:].t()], 1)
        parts.append(F.linear(x[rows], one.weight, one.bias) + delta)
    plain = torch.cat(parts)
    for got, right in zip(
        (y, dx, d_a, torch.cat(d_b, 1)), (plain, *torch.autograd.grad(plain, leaves, one.dy)), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(got, right)


def test_peft_does_the_same_work():
    """q, k and v are as many linears on one input; training one adapter at a time, and inference of the mixed batch."""
    pytest.importorskip("peft")
    one = small_problem(rank=4)
    theirs = baselines.Peft(one, p=0.0)
    wanted = problems.together(one._replace(dropout=None))()
    for g in range(2):
        outputs, (dx, *weights) = theirs.adapter(g)
        y, rows = torch.cat(outputs, 1), slice(4 * g, 4 * g + 4)
        got = y, dx, torch.cat(weights[:2]), torch.cat(weights[2:])
        for mine, right in zip(got, (wanted[0][rows], wanted[1][rows], wanted[2][g], wanted[3][g]), strict=True):
            torch.testing.assert_close(mine, right)
    mixed = torch.cat([part.flatten(0, 1) for part in theirs.mixed()], 1)
    torch.testing.assert_close(mixed, problems.forward_only(one)())
    trained = baselines.Peft(one)
    assert all(layer.training and layer.lora_dropout["1"].p == problems.DROPOUT for layer in trained.layers)


def test_peft_takes_every_adapter_in_turn(monkeypatch):
    pytest.importorskip("peft")
    theirs, seen = baselines.Peft(small_problem(rank=4)), []
    monkeypatch.setattr(theirs, "adapter", lambda g: seen.append(g))
    theirs.in_turn()
    assert seen == [0, 1]


def test_baselines_write_how_many_times_slower_each_is(suite, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(baselines, "captured", lambda call: call)
    suite.section = "baselines"
    suite.baselines(ranks=(16,), linears=(SMALL, PLAIN))
    rows = written(suite)
    named = [(row["other"], row["linear"]) for row in rows]
    names = ("grouped_mm", "peft in turn", "peft captured", "peft mixed")
    assert named == [(name, linear) for name in names for linear in ("small", "plain")] and not suite.failed
    assert all(row["baseline"] == "kloss" and row["ratio"] == row["p50"] / row["baseline_p50"] > 1 for row in rows)


@pytest.mark.parametrize("absent", ["peft", "transformers"])
def test_baselines_without_peft(suite, monkeypatch, absent):
    def version(name):
        if name == absent:
            raise baselines.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(baselines.metadata, "version", version)
    suite.baselines(ranks=(16,), linears=(PLAIN,))
    assert [row["other"] for row in suite.rows] == ["grouped_mm"] and "peft or transformers" in suite.left_out[0]


def test_a_baseline_is_timed_against_ours(suite, monkeypatch):
    made = []

    def maker(name):
        return lambda one: made.append(name) or (lambda: None)

    monkeypatch.setattr(sections, "others", lambda: ([baselines.Other("a", "a", maker("theirs"), maker("ours"))], []))
    suite.baselines(ranks=(4,), linears=(PLAIN,))
    assert made == ["ours", "ours", "theirs", "theirs"] and suite.rows[0]["p50"] > suite.rows[0]["baseline_p50"]


def test_a_baseline_that_fails_leaves_the_next_its_turn(suite, monkeypatch, capsys):
    def broken(one):
        raise RuntimeError("no such layout\nand more")

    others = [baselines.Other(name, name, make, problems.together) for name, make in (("a", broken), ("b", problems.together))]
    monkeypatch.setattr(sections, "others", lambda: (others, []))
    suite.section = "baselines"
    suite.baselines(ranks=(4,), linears=(PLAIN,))
    assert suite.failed == ["baselines: plain, 2 x 4 rows, r=4: a: RuntimeError: no such layout"]
    assert [row["other"] for row in suite.rows] == ["b"] and "FAILED baselines" in capsys.readouterr().out


# The section profile


def test_kernels_are_matched_to_the_work_they_do():
    products = ["shrink_kernel", "gemm", "splitk", "expand_kernel", "copy"]
    whole = [*products, *products, "reduce_kernel", "sum_kernel", "reduce_kernel", "sum_kernel"]
    entries = ["S", "y", "y", "y", None, "dS", "dx", "dx", "dx", None, "dA", "dA", "dB", "dB"]
    assert profiled.assign(["fill", *whole, *whole]) == [None, *entries, *entries]
    fused = ["shrink_kernel", "expand_kernel", "shrink_kernel", "expand_kernel", "reduce_kernel", "reduce_kernel"]
    assert profiled.assign(fused * 2) == ["S", "y", "dS", "dx", "dA", "dB"] * 2
    forward = ["shrink_kernel", "expand_kernel"]
    assert profiled.assign([*forward, "add", "sum_kernel"]) == ["S", "y", None, None]


def events(*named, start=0.0):
    """Events of the GPU one after another."""
    found = []
    for name, us in named:
        found.append(Event(name, True, start, us))
        start += us
    return found


WORK = [cases.Work("S", 0, 4.3e6), cases.Work("y", 0, 8.6e6)]  # 1 and 2 microseconds at the ceiling


def test_rows_of_a_profile():
    one_pass = [("shrink_kernel", 2.0), ("gemm", 6.0), ("expand_kernel", 2.0), ("fill", 10.0)]
    host = [Event("cudaLaunchKernel", False, 0, 5.0)]
    one_pass.append(("reduce_kernel", 0.0))  # behind a reduction the next shrink begins a pass, not backward
    rows = profiled.kernel_rows(host + events(*one_pass, *one_pass), 2, WORK)
    by_name = {row["kernel"]: row for row in rows}
    assert [row["kernel"] for row in rows][:2] == ["fill", "gemm"], "longest first"
    gemm, shrink = by_name["gemm"], by_name["shrink_kernel"]
    assert (gemm["work"], gemm["us_per_call"], gemm["calls_per_pass"], gemm["us_per_pass"]) == ("y", 6.0, 1.0, 6.0)
    assert gemm["share"] == 12 / 40 and shrink["ceiling_share"] == pytest.approx(0.5)
    assert gemm["ceiling_share"] == by_name["expand_kernel"]["ceiling_share"] == pytest.approx(2 / 8)
    assert by_name["fill"]["work"] is None and by_name["fill"]["ceiling_share"] is None
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    with pytest.raises(ValueError, match="saw no kernel on the GPU"):
        profiled.kernel_rows(host, 1, WORK)


def test_a_kernel_that_works_twice_in_a_pass_has_two_rows():
    rows = profiled.kernel_rows(events(("shrink_kernel", 1.0), ("expand_kernel", 1.0), ("shrink_kernel", 3.0)), 1, WORK)
    assert {(row["work"], row["kernel"]): row["us_per_call"] for row in rows} == {
        ("S", "shrink_kernel"): 1.0, ("y", "expand_kernel"): 1.0, ("dS", "shrink_kernel"): 3.0,
    }  # fmt: skip


def test_the_table_of_work_adds_linears_and_kernels():
    rows = profiled.kernel_rows(events(("shrink_kernel", 2.0), ("gemm", 6.0), ("expand_kernel", 2.0), ("fill", 10.0)), 1, WORK)
    header, s, y, other, total = profiled.work_table({"one": (rows, WORK), "two": (rows, WORK)})
    assert header.split() == ["work", "one", "two", "all"]
    assert s.split() == ["S", "2.0", "50%", "2.0", "50%", "4.0", "50%"]
    assert y.split() == ["y", "8.0", "25%", "8.0", "25%", "16.0", "25%"]
    assert other.split() == ["other", "10.0", "10.0", "20.0"]
    assert total.split() == ["all", "20.0", "15%", "20.0", "15%", "40.0", "15%"]


def function_event(name, device, start, end, annotation=False):
    times = SimpleNamespace(start=start, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=device, time_range=times, is_user_annotation=annotation)


def test_events_of_a_profile():
    found = profiled.events_of([
        function_event("shrink_kernel", DeviceType.CUDA, 7.0, 9.5),
        function_event("cudaLaunchKernel", DeviceType.CPU, 1.0, 3.0),
        function_event("aten::mm", DeviceType.CPU, 0.0, 3.0),
        function_event("step", DeviceType.CUDA, 0.0, 99.0, annotation=True),
    ])  # fmt: skip
    assert found == [Event("cudaLaunchKernel", False, 1.0, 2.0), Event("shrink_kernel", True, 7.0, 2.5)]


def test_torch_gives_events_of_this_shape():
    """The attributes that `events_of` reads are those of a profile of the torch that is installed."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        torch.ones(3).sum()
    seen = profiler.events()
    assert seen and profiled.events_of(seen) == []
    assert {"device_type", "time_range", "is_user_annotation"} <= set(dir(seen[0])) and seen[0].time_range.elapsed_us() >= 0


STEP = [
    *events(("gemm", 30.0), ("add", 5.0), ("gemm", 10.0), ("Memcpy DtoH (Device -> Pageable)", 1.0)),
    *events(("Memcpy HtoD (Pageable -> Device)", 2.0), ("Memset (Device)", 2.0), start=48.0),
    *(Event(name, False, 0.0, 1.0) for name in ("cudaLaunchKernel", "cuLaunchKernelEx", "cudaLaunchKernelExC")),
    *(Event(name, False, 0.0, 1.0) for name in ("cudaMemcpyAsync", "cudaStreamSynchronize", "cudaStreamSynchronize")),
    Event("cudaDeviceSynchronize", False, 0.0, 1.0),
]


def test_the_summary_of_a_step():
    found = profiled.summary(STEP, wall_us=200.0)
    assert found == {
        "wall_us": 200.0, "gpu_us": 50.0, "gpu_share": 0.25, "kernels": 3, "launches": 3,
        "waits": {"cudaStreamSynchronize": 2}, "device_to_host": 1, "host_to_device": 1,
    }  # fmt: skip
    top = profiled.top_kernels(STEP, count=2)
    assert top == [
        {"kernel": "gemm", "us": 40.0, "calls": 2, "share": 0.8}, {"kernel": "add", "us": 5.0, "calls": 1, "share": 0.1},
    ]  # fmt: skip
    lines = profiled.summary_lines(found, top)
    assert lines[0] == "wall 0.20 ms, GPU 0.05 ms (25%): 0.15 ms of launches and waits"
    assert lines[1] == "3 kernels, 3 launches; waits of the host for the GPU: 2 cudaStreamSynchronize"
    assert lines[2] == "copies: 1 to the host, 1 from it" and "gemm" in lines[3] and len(lines) == 5


def test_a_profile_without_calls_of_cuda_counts_none():
    found = profiled.summary(events(("gemm", 1.0)), wall_us=2.0)
    assert found["waits"] is None and found["launches"] is None
    assert "no call of CUDA on the host" in profiled.summary_lines(found, [])[1]


def test_waits_are_counted_by_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another thing", stacklevel=1)

    line = call.__code__.co_firstlineno + 2
    assert profiled.waits_by_line(call) == {f"tests/test_gpu_suite.py:{line}": 3} and modes == ["warn", "default"]


def test_profile_writes_a_row_per_kernel_and_then_the_step(suite, monkeypatch, capsys):
    monkeypatch.setattr(suite, "training_step", lambda record: suite.write({"case": "training step"}))
    monkeypatch.setattr(sections, "PASSES", 2)
    calls = []

    def record(call):
        calls.append(call())
        return events(("shrink_kernel", 2.0), ("expand_kernel", 2.0))

    suite.section = "profile"
    suite.profile(ranks=(4,), linears=(SMALL, PLAIN), record=record)
    rows = written(suite)
    assert [(row.get("linear"), row.get("kernel")) for row in rows] == [
        ("small", "shrink_kernel"), ("small", "expand_kernel"), ("plain", "shrink_kernel"), ("plain", "expand_kernel"),
        (None, None),
    ]  # fmt: skip
    assert len(calls) == 2 and rows[0]["calls_per_pass"] == 1 / sections.PASSES
    assert "share of the ceiling, 2 x 4 rows, r=4\nwork" in capsys.readouterr().out and not suite.failed


def test_a_whole_step_is_profiled(suite, capsys):
    suite.training_step(
        record=lambda call: (call(), STEP)[1], waits=lambda call: Counter(here=2), config=TOY, adapters=3, rank=4, utterances=2
    )
    first, *rest = written(suite)
    assert first["gpu_us"] == 50.0 and first["wall_us"] > 0 and first["waits_by_line"] == {"here": 2}
    assert first["adapters"] == 3 and first["tokens"] > 0 and len(rest) == 5
    assert "2 waits at here" in capsys.readouterr().out


def test_the_profiled_step_is_that_of_whole_step():
    """To the bit, with dropout; and it changes every adapter."""
    step, batch = training_step.make_step(TOY, 3, 4, 2, device="cpu", dtype=torch.float32)
    other, _ = training_step.make_step(TOY, 3, 4, 2, device="cpu", dtype=torch.float32)
    before, kloss = step.bank.param.clone(), whole_step.Kloss(other.model, other.bank, other.p)
    for _ in range(2):
        losses = step.step(batch)
        kloss.step(batch)
    assert torch.equal(step.bank.param, kloss.bank.param)
    assert (step.bank.param != before).any(1).all() and losses.shape == (3,) and losses.isfinite().all()


def test_a_wrong_step_fails_its_check(monkeypatch):
    training_step.check_step(TOY, 4, device="cpu", dtype=torch.float32)
    honest, calls = training_step.token_loss, []

    def wrong(*arguments):
        calls.append(1)
        loss, count = honest(*arguments)
        return loss * (1.001 if len(calls) == 2 else 1), count

    monkeypatch.setattr(training_step, "token_loss", wrong)
    with pytest.raises(AssertionError, match="training step are off"):
        training_step.check_step(TOY, 4, device="cpu", dtype=torch.float32)


# The section tiles


def test_tiles_try_candidates_and_put_the_table_back(suite, monkeypatch):
    before = dict(tuned.TABLE)
    with sections.table_entry("shrink", 0, {"BK": 32}):
        assert tuned.launch("shrink", 0, torch.bfloat16).BK == 32
        assert tuned.launch("shrink", 80, torch.bfloat16) == tuned.DEFAULT["shrink", "half"]
    assert before == tuned.TABLE
    tried = []
    monkeypatch.setattr(sections, "CANDIDATES", {"shrink": [{"BK": 16}, {"BK": 128}], "fused": [{"BC": 16}]})
    monkeypatch.setattr(sections, "check", lambda *shape, **more: tried.append(dict(tuned.TABLE)))
    suite.tiles(batch=BATCH, linears=(PLAIN,), rank=4)
    assert before == tuned.TABLE and tried[0] == before, "what is to be replaced is checked too"
    assert [one["shrink", 0, "half"].BK for one in tried[1:3]] == [16, 128] and tried[3]["fused", 0, "half"].BC == 16
    assert len(written(suite)) == 3 and all(row["baseline"] == "the table's" for row in written(suite))


def test_a_tile_that_the_chip_refuses_is_left_out_and_a_wrong_one_fails(suite, monkeypatch):
    before = dict(tuned.TABLE)

    def check(*shape, **more):
        changed = tuned.TABLE.get(("shrink", 0, "half"))
        if changed and changed.BK == 16:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        assert not changed or changed.BK != 32, "dx is off"

    monkeypatch.setattr(sections, "CANDIDATES", {"shrink": [{"BK": 16}, {"BK": 32}, {"BK": 128}]})
    monkeypatch.setattr(sections, "check", check)
    suite.tiles(linears=(PLAIN,), rank=4)
    assert "shared memory" in suite.left_out[0] and "dx is off" in suite.failed[0]
    assert [row["BK"] for row in suite.rows] == [128] and before == tuned.TABLE


# The targets


def measured(linear, p50, base, batch=BATCH, **more):
    row = {"section": "kernels", "kind": "chosen", "rank": 4, "linear": linear, "p50": p50, "baseline_p50": base}
    return {**row, "host_bound": False, **batch._asdict(), **more}


LINEARS = (SMALL, PLAIN)


def answers(rows, batches=(BATCH,)):
    return {target.what: target for target in targets.targets(rows, LINEARS, batches)}


def test_targets_sum_over_the_linears(suite):
    rows = [measured("small", 20.0, 10.0), measured("plain", 10.0, 10.0), measured("plain", 99.0, 1.0, kind="exact")]
    target = answers(rows)["forward + backward, r=4: at most 1.5 x the base products alone"]
    assert target.measured == "1.50 x" and target.met is True and target.line.endswith("1.50 x yes")
    slower = answers([measured("small", 20.1, 10.0), *rows[1:]])
    assert slower[target.what].met is False and slower[target.what].line.endswith("NO")
    part = answers(rows[:1])[target.what]
    assert (part.measured, part.met) == ("not measured (1 of 2 linears)", None) and part.line.endswith("linears)")


def test_targets_against_other_libraries(suite):
    rows = [
        measured(linear, 30.0, ours, section="baselines", other=other, kind=None, host_bound=other != "grouped_mm")
        for other, ours in (("grouped_mm", 15.0), ("peft in turn", 3.1)) for linear in ("small", "plain")
    ]  # fmt: skip
    found = answers(rows)
    assert found["at least 2 x as fast as grouped_mm, r=4"][1:] == ("2.00 x", True)
    assert found["at least 10 x as fast as peft in turn, r=4"][1:] == ("9.68 x, the host's launches", False)


def test_the_cost_per_row_is_set_beside_one_adapters(suite):
    batches = (cases.Batch(1, 8), BATCH, cases.Batch(8, 1), cases.Batch(1, 3))
    costs = {1: 8.0, 2: 8.4, 8: 7.1}
    each = zip(batches, (*costs.values(), 1.0), strict=True)
    rows = [measured(name, us, 1.0, batch) for batch, us in each for name in ("small", "plain")]
    per_row = targets.costs(rows, LINEARS, batches)
    assert per_row == pytest.approx({adapters: 2e3 * us / 8 for adapters, us in costs.items()}), "3 rows are not comparable"
    assert targets.flatness(per_row) == (8, pytest.approx(7.1 / 8 - 1))
    assert targets.flatness_line(per_row).endswith("1: 2000.0, 2: 2100.0, 8: 1775.0; farthest from one adapter: -11.3% at 8")
    what = "cost per row of 1, 2, 8 adapters flat within 10%, r=4"
    assert answers(rows, batches)[what][1:] == ("-11.3% at 8 adapters", False)
    flat = [row | {"p50": 8.0} if row["adapters"] == 8 else row for row in rows]
    assert answers(flat, batches)[what][1:] == ("+5.0% at 2 adapters", True)
    part = answers([row for row in rows if (row["adapters"], row["linear"]) != (8, "plain")], batches)[what]
    assert part[1:] == ("not measured (1, 2 of them)", None)
    assert targets.flatness({2: 1.0}) is None and targets.flatness({1: 1.0}) is None
    assert targets.flatness_line({}).endswith("not measured")


def test_the_studys_batches_are_comparable():
    assert [batch.adapters for batch in cases.BATCHES if targets.comparable(batch)] == [1, 8, 52, 256, 1024]


# The command


def test_every_section_has_its_share_and_what_earlier_ones_left():
    ends = gpu_suite.deadlines(100.0, 9.0, list(gpu_suite.SHARES))
    assert list(ends) == ["tests", "kernels", "baselines", "profile", "tiles"] and sum(gpu_suite.SHARES.values()) == 1
    assert list(ends.values())[-1] == pytest.approx(100 + 540)
    for (name, end), (_, begin) in zip(list(ends.items())[1:], ends.items(), strict=False):
        assert end - begin == pytest.approx(540 * gpu_suite.SHARES[name])
    assert all(first < second for first, second in pairwise(ends.values()))
    some = gpu_suite.deadlines(0.0, 1.0, ["tiles", "profile"])
    assert list(some) == ["profile", "tiles"] and some == pytest.approx({"profile": 36.0, "tiles": 60.0})


def test_a_slow_section_does_not_starve_the_next(suite):
    now, seen = time.monotonic(), []

    def section(name):
        def run():
            seen.append((name, suite.section, suite.late(f"case of {name}")))
            raise RuntimeError(f"{name} broke")

        return run

    gpu_suite.run_sections(suite, {"b": section("b"), "a": section("a")}, {"a": now - 1, "b": now + 60})
    assert seen == [("a", "a", True), ("b", "b", False)]
    assert suite.left_out == ["a: case of a"] and suite.failed == [f"{n}: {n}: RuntimeError: {n} broke" for n in "ab"]


@pytest.mark.parametrize(
    ("code", "seconds", "outcome"),
    [("", 60, "passed"), ("raise SystemExit(3)", 60, "FAILED: exit code 3"), ("", 0, "FAILED: not finished after 0 s")],
)
def test_the_outcome_of_the_tests(code, seconds, outcome):
    assert surroundings.run_tests([sys.executable, "-c", code], seconds) == outcome


def test_tests_that_take_too_long_end_with_all_their_processes(tmp_path):
    pid = tmp_path / "pid"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(pid)!r}, "w").write(str(child.pid))
time.sleep(100)"""
    assert surroundings.run_tests([sys.executable, "-c", code], 2.0) == "FAILED: not finished after 2 s"
    state, until = Path(f"/proc/{pid.read_text()}/stat"), time.monotonic() + 10

    def lives() -> bool:
        try:
            return state.read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    while lives():
        assert time.monotonic() < until, "a child of the tests lives on"
        time.sleep(0.05)


def test_only_files_with_tests_for_a_gpu_are_collected(tmp_path):
    marked = {"test_a.py": "@pytest.mark" + ".gpu", "test_b.py": "import os", "test_c.py": "from helpers import DEVIC" + "ES"}
    for name, text in {**marked, "helpers.py": "PLAC" + "ES = []"}.items():
        (tmp_path / name).write_text(text)
    command = surroundings.test_command({"pytest-xdist": None}, tmp_path)
    assert command[-2:] == [str(tmp_path / "test_a.py"), str(tmp_path / "test_c.py")] and "-n" not in command
    at_once = surroundings.test_command({"pytest-xdist": "3.8"}, tmp_path)
    assert at_once[at_once.index("-n") + 1] == str(surroundings.WORKERS)
    assert at_once[at_once.index("-o") + 1] == "addopts=-ra", "the project's options name plugins that may be absent"
    names = [path.rsplit("/", 1)[-1] for path in surroundings.test_command({})]
    assert "test_multi_lora.py" in names and "test_corpus.py" not in names


def test_what_is_absent_is_said_in_a_line_each():
    full = dict.fromkeys(surroundings.PACKAGES, "9.0") | {"numpy": "2.4.0", "triton": "3.7.0"}
    assert surroundings.remarks(full) == []
    lines = surroundings.remarks(full | {"peft": None, "transformers": None})
    assert len(lines) == 2 and lines[0].startswith("absent: peft") and lines[1].startswith("absent: transformers")
    old = surroundings.remarks(full | {"triton": "3.6.0"})
    assert len(old) == 1 and "triton 3.6.0 with numpy 2.4.0" in old[0] and "not needed" in old[0]
    assert surroundings.remarks(full | {"triton": "3.6.0", "numpy": "2.3.5"}) == []
    assert surroundings.versions(["pytest", "no-such-package"]) == {"pytest": pytest.__version__, "no-such-package": None}


def test_a_machine_without_git_has_no_commit(monkeypatch):
    def absent(*command, **more):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    about = surroundings.environment("cpu")
    assert about["commit"] is None and about["dirty"] is None and about["device"] == "cpu"


def test_nothing_needs_datasets():
    code = "import sys; sys.modules['datasets'] = None; import bench.gpu_suite, bench.baselines"
    subprocess.run([sys.executable, "-c", code], cwd=surroundings.ROOT, check=True)


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "breaks", "code"), [("passed", False, 0), ("FAILED: not finished after 1 s", False, 1), ("passed", True, 1)]
)
def test_the_command_runs_the_sections_and_ends_with_the_targets(suite, monkeypatch, capsys, outcome, breaks, code):
    done = []

    def section(name):
        def run():
            done.append((name, suite.about["tests"]))
            assert not breaks or name != "profile", "a kernel is wrong"

        return run

    for name in ("kernels", "baselines", "profile", "tiles"):
        monkeypatch.setattr(suite, name, section(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_suite, "environment", lambda device: {})
    monkeypatch.setattr(gpu_suite, "Suite", lambda out, about: (suite.about.update(about), suite)[1])
    given = []
    monkeypatch.setattr(gpu_suite, "run_tests", lambda command, seconds: (given.append(seconds), outcome)[1])
    assert gpu_suite.main(["--minutes", "2"]) == code
    assert done == [(name, outcome) for name in ("kernels", "baselines", "profile", "tiles")]
    assert given[0] == pytest.approx(120 * gpu_suite.SHARES["tests"], abs=5)
    out = capsys.readouterr().out
    assert "forward + backward, r=4: at most 1.5 x the base products alone" in out and "not measured (0 of 4 linears)" in out
    assert out.splitlines()[-1].endswith(f"{int(breaks)} failures; tests {outcome}")
    assert ("FAILED: profile: profile: AssertionError: a kernel is wrong" in out) == breaks
    assert {row["section"] for row in written(suite)} == {"targets"}


@pytest.mark.parametrize("arch", [0, 70, 89, 120])
def test_an_unknown_gpu_gets_the_defaults(arch):
    for op, bucket in tuned.DEFAULT:
        dtype = torch.float32 if bucket == "single" else torch.bfloat16
        assert tuned.launch(op, arch, dtype) == tuned.DEFAULT[op, bucket]
