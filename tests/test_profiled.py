"""From events of a profile to rows and tables, and the section profile of the GPU suite."""

import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from suite_parts import PLAIN, SMALL, TOY, events, written
from torch.autograd import DeviceType

from bench import cases, kernels, profiled, whole_step
from bench.profiled import Event
from kloss.cl import step as trainer
from kloss.cl import train


def test_kernels_are_matched_to_the_work_they_do():
    products = ["shrink_kernel", "gemm", "splitk", "expand_kernel", "copy"]
    whole = [*products, *products, "reduce_kernel", "sum_kernel", "reduce_kernel", "sum_kernel"]
    entries = ["S", "y", "y", "y", None, "dS", "dx", "dx", "dx", None, "dA", "dA", "dB", "dB"]
    assert profiled.assign(["fill", *whole, *whole]) == [None, *entries, *entries]
    fused = ["shrink_kernel", "expand_kernel", "shrink_kernel", "expand_kernel", "reduce_kernel", "reduce_kernel"]
    assert profiled.assign(fused * 2) == ["S", "y", "dS", "dx", "dA", "dB"] * 2
    forward = ["shrink_kernel", "expand_kernel"]
    assert profiled.assign([*forward, "add", "sum_kernel"]) == ["S", "y", None, None]


WORK = [cases.KernelWork("S", 0, 4.3e6), cases.KernelWork("y", 0, 8.6e6)]  # 1 and 2 microseconds at the ceiling


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
    listed = profiled.events_of([
        function_event("shrink_kernel", DeviceType.CUDA, 7.0, 9.5),
        function_event("cudaLaunchKernel", DeviceType.CPU, 1.0, 3.0),
        function_event("aten::mm", DeviceType.CPU, 0.0, 3.0),
        function_event("step", DeviceType.CUDA, 0.0, 99.0, annotation=True),
    ])  # fmt: skip
    assert listed == [Event("cudaLaunchKernel", False, 1.0, 2.0), Event("shrink_kernel", True, 7.0, 2.5)]


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
    summary = profiled.summary(STEP, wall_us=200.0)
    assert summary == {
        "wall_us": 200.0, "gpu_us": 50.0, "gpu_share": 0.25, "kernels": 3, "launches": 3,
        "waits": {"cudaStreamSynchronize": 2}, "device_to_host": 1, "host_to_device": 1,
    }  # fmt: skip
    top = profiled.top_kernels(STEP, count=2)
    assert top == [
        {"kernel": "gemm", "us": 40.0, "calls": 2, "share": 0.8}, {"kernel": "add", "us": 5.0, "calls": 1, "share": 0.1},
    ]  # fmt: skip
    lines = profiled.summary_lines(summary, top)
    assert lines[0] == "wall 0.20 ms, GPU 0.05 ms (25%): 0.15 ms of launches and waits"
    assert lines[1] == "3 kernels, 3 launches; waits of the host for the GPU: 2 cudaStreamSynchronize"
    assert lines[2] == "copies: 1 to the host, 1 from it" and "gemm" in lines[3] and len(lines) == 5


def test_a_profile_without_calls_of_cuda_counts_none():
    summary = profiled.summary(events(("gemm", 1.0)), wall_us=2.0)
    assert summary["waits"] is None and summary["launches"] is None
    assert "no call of CUDA on the host" in profiled.summary_lines(summary, [])[1]


def test_waits_are_counted_by_line(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def call():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another thing", stacklevel=1)

    line = call.__code__.co_firstlineno + 2
    assert profiled.waits_by_line(call) == {f"tests/test_profiled.py:{line}": 3} and modes == ["warn", "default"]


def test_profile_writes_a_row_per_kernel_and_then_the_step(suite, monkeypatch, capsys):
    monkeypatch.setattr(suite, "training_step", lambda record: suite.write({"case": "training step"}))
    monkeypatch.setattr(kernels, "PASSES", 2)
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
    assert len(calls) == 2 and rows[0]["calls_per_pass"] == 1 / kernels.PASSES
    assert "share of the ceiling, 2 x 4 rows, r=4\nwork" in capsys.readouterr().out and not suite.failed


def test_a_whole_step_is_profiled(suite, capsys):
    suite.training_step(
        record=lambda call: (call(), STEP)[1], waits=lambda call: Counter(here=2), config=TOY, adapters=3, rank=4, utterances=2
    )
    first, *rest = written(suite)
    assert first["gpu_us"] == 50.0 and first["wall_us"] > 0 and first["waits_by_line"] == {"here": 2}
    assert first["adapters"] == 3 and first["tokens"] > 0 and len(rest) == 5
    assert "2 waits at here" in capsys.readouterr().out


def toy_step():
    """A step of three adapters with dropout."""
    return whole_step.make_step(TOY, 3, 4, 2, dropout=0.1, dtype=torch.float32)


def test_the_profiled_step_is_that_of_whole_step(suite, monkeypatch):
    """And both are the trainer's, packing included; it changes every adapter."""
    assert (whole_step.train_step, whole_step.pack) == (train.train_step, train.pack)
    made, calls = [], Counter()
    honest = whole_step.make_step
    monkeypatch.setattr(whole_step, "make_step", lambda *sizes, **more: made.append(honest(*sizes, **more)) or made[-1])
    for name in ("pack", "train_step"):
        function = getattr(whole_step, name)
        monkeypatch.setattr(whole_step, name, lambda *args, name=name, function=function: calls.update([name]) or function(*args))
    suite.training_step(lambda call: (call(), STEP)[1], lambda call: Counter(), config=TOY, adapters=3, rank=4, utterances=2)
    assert calls["pack"] == calls["train_step"] == 3 + 8 + 1, "the check's three, the timed, the profiled"
    step, before = made[-1], toy_step().bank.param
    assert (step.bank.param != before).any(1).all() and step.bank.steps.tolist() == [9, 9, 9]


def test_a_step_with_dropout_is_the_same_step_again():
    first, second = toy_step(), toy_step()
    for _ in range(2):
        (losses, norms), again = first.run(), second.run()
        assert torch.equal(losses, again[0]) and torch.equal(norms, again[1])
    assert torch.equal(first.bank.param, second.bank.param) and losses.shape == norms.shape == (3,)


def test_a_wrong_step_fails_its_check(monkeypatch):
    whole_step.check_step(TOY, 4, device="cpu", dtype=torch.float32)
    honest, calls = trainer.token_loss, []

    def wrong(*arguments):
        calls.append(1)
        loss, count = honest(*arguments)
        return loss * (1.001 if len(calls) == 2 else 1), count

    monkeypatch.setattr(trainer, "token_loss", wrong)
    with pytest.raises(AssertionError, match="losses and gradient norms are off"):
        whole_step.check_step(TOY, 4, device="cpu", dtype=torch.float32)
