"""The GPU suite's baselines do the same work as ours, and are timed against it."""

import pytest
import torch
import torch.nn.functional as F
from suite_parts import PLAIN, SMALL, small_problem, written

from bench import baselines, cases, timing


def test_grouped_mm_does_the_same_work(monkeypatch):
    """Against ours without dropout, and against autograd of the plain composition with dropout."""
    problem = small_problem()
    problem = problem._replace(scaling=torch.tensor([0.5, 2.0]))
    y, dx, d_a, *d_b = baselines.grouped_mm(problem, p=0.0)()
    ours = cases.forward_backward(problem._replace(dropout=None))()
    for got, right in zip((y, dx, d_a, torch.cat(d_b, 1)), ours, strict=True):
        torch.testing.assert_close(got, right)
    keep = torch.rand_like(problem.x) > 0.5
    monkeypatch.setattr(torch, "native_dropout", lambda x, p, train: (x * keep / (1 - p), keep))
    y, dx, d_a, *d_b = baselines.grouped_mm(problem, p=0.5)()
    leaves = x, a, b = [t.detach().requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]
    outputs = []
    for g in range(2):
        rows = slice(4 * g, 4 * g + 4)
        s = (x * keep * 2)[rows] @ a[g].t() * problem.scaling[g]
        delta = torch.cat([s[:, :16] @ b[g, :16].t(), s[:, 16:] @ b[g, 16:].t()], 1)
        outputs.append(F.linear(x[rows], problem.weight, problem.bias) + delta)
    plain = torch.cat(outputs)
    for got, right in zip(
        (y, dx, d_a, torch.cat(d_b, 1)), (plain, *torch.autograd.grad(plain, leaves, problem.dy)), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(got, right)


def test_peft_does_the_same_work():
    """q, k and v are as many linears on one input; training one adapter at a time, and inference of the mixed batch."""
    pytest.importorskip("peft")
    problem = small_problem(rank=4)
    theirs = baselines.PeftLinear(problem, p=0.0)
    ours = cases.forward_backward(problem._replace(dropout=None))()
    for g in range(2):
        outputs, (dx, *weights) = theirs.adapter(g)
        y, rows = torch.cat(outputs, 1), slice(4 * g, 4 * g + 4)
        got = y, dx, torch.cat(weights[:2]), torch.cat(weights[2:])
        for mine, right in zip(got, (ours[0][rows], ours[1][rows], ours[2][g], ours[3][g]), strict=True):
            torch.testing.assert_close(mine, right)
    mixed = torch.cat([part.flatten(0, 1) for part in theirs.mixed()], 1)
    torch.testing.assert_close(mixed, cases.forward_only(problem)())
    trained = baselines.PeftLinear(problem)
    assert all(layer.training and layer.lora_dropout["1"].p == cases.DROPOUT for layer in trained.layers)


def test_peft_takes_every_adapter_in_turn(monkeypatch):
    pytest.importorskip("peft")
    theirs, seen = baselines.PeftLinear(small_problem(rank=4)), []
    monkeypatch.setattr(theirs, "adapter", lambda g: seen.append(g))
    theirs.in_turn()
    assert seen == [0, 1]


def test_baselines_write_how_many_times_slower_each_is(suite, monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(baselines, "captured", lambda call: call)
    suite.section = "baselines"
    suite.baselines(ranks=(16,), linears=(SMALL, PLAIN))
    rows = written(suite)
    named = [(row["library"], row["linear"]) for row in rows]
    names = ("grouped_mm", "peft in turn", "peft captured", "peft mixed")
    assert named == [(name, linear) for name in names for linear in ("small", "plain")] and not suite.failed
    assert all(row["baseline"] == "kloss" and row["ratio"] == row["p50"] / row["baseline_p50"] > 1 for row in rows)


@pytest.mark.parametrize("absent", ["peft", "transformers"])
def test_baselines_without_peft(suite, monkeypatch, absent):
    def version(name):
        if name == absent:
            raise timing.metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(timing.metadata, "version", version)
    suite.baselines(ranks=(16,), linears=(PLAIN,))
    assert [row["library"] for row in suite.rows] == ["grouped_mm"] and "peft or transformers" in suite.left_out[0]


def test_a_baseline_is_timed_against_ours(suite, monkeypatch):
    made = []

    def maker(name):
        return lambda problem: made.append(name) or (lambda: None)

    monkeypatch.setattr(baselines, "baselines", lambda: ([baselines.Baseline("a", "a", maker("theirs"), maker("ours"))], []))
    suite.baselines(ranks=(4,), linears=(PLAIN,))
    assert made == ["ours", "ours", "theirs", "theirs"] and suite.rows[0]["p50"] > suite.rows[0]["baseline_p50"]


def test_a_baseline_that_fails_leaves_the_next_its_turn(suite, monkeypatch, capsys):
    def broken(problem):
        raise RuntimeError("no such layout\nand more")

    works = cases.forward_backward
    libraries = [baselines.Baseline(name, name, make, works) for name, make in (("a", broken), ("b", works))]
    monkeypatch.setattr(baselines, "baselines", lambda: (libraries, []))
    suite.section = "baselines"
    suite.baselines(ranks=(4,), linears=(PLAIN,))
    assert suite.failed == ["baselines: plain, 2 x 4 rows, r=4: a: RuntimeError: no such layout"]
    assert [row["library"] for row in suite.rows] == ["b"] and "FAILED baselines" in capsys.readouterr().out
