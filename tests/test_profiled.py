"""From events of a profile to rows and tables, and the section profile of the GPU suite."""

import re
import warnings
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from suite_parts import TOY, events, written
from torch.autograd import DeviceType

from bench import cases, compiled, profiled, timing, whole_step
from bench.profiled import Event
from kloss.cl import step as trainer
from kloss.cl import train
from kloss.models import XLMRConfig

KERNELS = {
    "S, dS": ["shrink_kernel"],
    "y, dx": ["expand_kernel", "sm90_xmma_gemm_bf16", "nvjet_tst_128x256", "void cutlass::Kernel2<x>", "splitKreduce_kernel"],
    "dA, dB": ["reduce_kernel", "sum_kernel"],
    "attention": ["attend_kernel", "attend_backward_kernel", "attend_long_kernel", "attend_dq_kernel", "attend_dkv_kernel"],
    "add_norm": ["add_norm_kernel", "add_norm_backward_kernel", "dropout_kernel"],
    "embeddings": ["embed_kernel", "embed_backward_kernel"],
    "heads, loss": ["adapter_linear_kernel", "bias_gradient_kernel", "token_loss_rows_kernel", "token_loss_backward_kernel"],
    "AdamW": ["void (anonymous namespace)::squares_kernel<float>(AdamW)", "(anonymous namespace)::finish_kernel(AdamW)",
              "void (anonymous namespace)::update_kernel<c10::BFloat16, 4>(AdamW)"],
    "lists, keys": ["keys_kernel", "limits_kernel", "(anonymous namespace)::phases_kernel(Lists)",
                    "(anonymous namespace)::entries_kernel(Lists)"],
    "GELU": ["void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&)::x>"],
    "copies, fills": ["Memcpy DtoH (Device -> Pageable)", "Memset (Device)"],
    "rest": ["void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "fill", "at::native::radix_sort"],
}  # fmt: skip


def test_every_kernel_of_kloss_belongs_to_a_part():
    assert {name: part for part, names in KERNELS.items() for name in names} == {
        name: profiled.part_of(name) for names in KERNELS.values() for name in names
    }
    assert all(profiled.part_of(kernel) != "rest" for kernel in compiled.KERNELS)
    sources = "".join(path.read_text() for path in (timing.ROOT / "csrc/cuda").glob("*.cu"))
    in_steps = set(re.findall(r"\b(\w+_kernel)\(const __grid", sources)) - {"spans_kernel"}  # spans: evaluation
    assert in_steps and all(profiled.part_of(f"(anonymous namespace)::{kernel}(X)") != "rest" for kernel in in_steps)


def test_the_parts_of_a_step():
    host = [Event("cudaLaunchKernel", False, 0, 5.0)]
    step = events(("shrink_kernel", 2.0), ("gemm", 6.0), ("expand_kernel", 2.0), ("fill", 10.0), ("shrink_kernel", 5.0))
    parts = profiled.step_parts(host + step, {"S, dS": 3.5e-6, "y, dx": 6e-6, "AdamW": 1.0})
    assert parts == [
        {"part": "rest", "us": 10.0, "share": 0.4, "kernels": 1, "ceiling_share": None},
        {"part": "y, dx", "us": 8.0, "share": 0.32, "kernels": 2, "ceiling_share": pytest.approx(0.75)},
        {"part": "S, dS", "us": 7.0, "share": 0.28, "kernels": 2, "ceiling_share": pytest.approx(0.5)},
    ]
    header, rest, products, _ = profiled.parts_lines(parts)
    assert header.split() == ["part", "µs", "share", "kernels", "of", "the", "ceiling"]
    assert rest.split() == ["rest", "10.0", "40%", "1"] and products.split() == ["y,", "dx", "8.0", "32%", "2", "75%"]
    with pytest.raises(ValueError, match="saw no kernel on the GPU"):
        profiled.step_parts(host, {})


def test_the_least_work_of_a_step():
    """By hand, XLM-R base, 52 learners of 384 rows, r=32: 31 MB a matrix [T, H]."""
    config, row = XLMRConfig(vocab_size=1000, num_labels=111), 2 * 19_968 * 768 / 4.3e12
    least = cases.step_work(config, 19_968, 52, 32, parameters=10**9)
    linears = [work for linear in cases.XLMR_BASE for work in cases.lora_work(linear, cases.STUDY, 32)]
    assert sum(least[part] for part in ("S, dS", "y, dx", "dA, dB")) == pytest.approx(12 * sum(w.seconds for w in linears))
    moved = {"attention": 12 * 11, "add_norm": 12 * 16, "GELU": 12 * 20, "embeddings": 2}
    assert {part: least[part] / row for part in moved} == pytest.approx(moved)
    assert least["AdamW"] == pytest.approx(28e9 / 4.3e12) and set(least) - set(moved) <= set(profiled.PARTS)


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


SIZE = profiled.StepSize(3, 4, 2)


def test_a_whole_step_is_timed_and_profiled(suite, capsys):
    suite.section = "steps"
    suite.steps([SIZE], record=lambda call: (call(), STEP)[1], waits=lambda call: Counter(here=2))
    timed, profile, *rest = written(suite)
    assert timed["case"] == "whole step" and timed["way"] == "eager" and 0 < timed["p20"] <= timed["p50"] <= timed["p80"]
    assert profile["gpu_us"] == 50.0 and profile["wall_us"] == timed["p50"] and profile["waits_by_line"] == {"here": 2}
    assert SIZE._asdict().items() <= timed.items() and timed["tokens"] > 0 and timed["layers"] == 1
    parts = {row["part"]: row["us"] for row in rest if row["case"] == "part of a step"}
    assert parts == {"y, dx": 40.0, "rest": 5.0, "copies, fills": 5.0}
    assert sum(row["case"] == "kernel of a step" for row in rest) == 5 and len(rest) == 8 and not suite.failed
    out = capsys.readouterr().out
    assert "whole step, 3 x 2 utterances, r=4, eager" in out and "2 waits at here" in out and "y, dx                  40.0" in out


def test_every_way_to_run_a_step_has_its_turn(suite, monkeypatch):
    """One that breaks, such as a capture, does not take the next one's."""

    def broken():
        raise RuntimeError("no capture")

    monkeypatch.setattr(whole_step, "ways_of_a_step", lambda step: {"captured": broken, "eager": step.run})
    suite.section = "steps"
    suite.steps([SIZE], record=lambda call: STEP, waits=lambda call: Counter())
    assert {row["way"] for row in suite.rows} == {"eager"}
    assert suite.failed == ["steps: whole step, 3 x 2 utterances, r=4, captured: RuntimeError: no capture"]


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

        def counted(*args, name=name, function=function, **more):
            calls.update([name])
            return function(*args, **more)

        monkeypatch.setattr(whole_step, name, counted)
    suite.steps([SIZE], lambda call: (call(), STEP)[1], lambda call: Counter())
    assert calls["pack"] == calls["train_step"] == 3 + 10 + 1, "the check's three, the timed, the profiled"
    step, before = made[-1], toy_step().bank.param
    assert (step.bank.param != before).any(1).all() and step.bank.steps.tolist() == [11, 11, 11]


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
