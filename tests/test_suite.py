"""The GPU suite's sections, with a clock that counts and the kernels in the interpreter."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import triton
from suite_parts import BATCH, PLAIN, SMALL, TOY, events, small_problem, written

import kloss.kernels as kloss_kernels
from bench import baselines, cases, kernels, profiled, timing, whole_step
from bench.kernels import Decision, Shape
from bench.timing import Times
from kloss.kernels import lora_shrink, lora_tiles, segments, tuned


def test_kernels_write_a_row_per_case_with_the_ratio_of_the_same_run(suite):
    suite.section = "kernels"
    suite.kernels(batches=(cases.Batch(1, 8), BATCH, cases.Batch(1, 3)), ranks=(4,), linears=(SMALL,))
    rows = written(suite)
    shapes = [("2 x 4", "chosen"), ("2 x 4", "exact"), ("2 x 4", "forward only"), ("1 x 8", "chosen")]
    shapes += [("1 x 3", form) for form in ("chosen", "exact", "forward only")]
    assert [row["case"] for row in rows] == [f"small, {batch} rows, r=4, {form}" for batch, form in shapes]
    needed = {"commit", "versions", "device", "tests", "p20", "p50", "p80", "host", "host_bound", "dtype"}
    for row in rows:
        assert needed <= row.keys() and row["section"] == "kernels"
        assert row["ratio"] == row["p50"] / row["baseline_p50"] and row["p20"] < row["p50"] < row["p80"]
        assert row["baseline"] == ("base forward alone" if row["form"] == "forward only" else "base alone")
    least = {work.name: work.seconds * 1e6 for work in cases.lora_work(SMALL, BATCH, 4)}
    assert rows[0]["ceiling_share"] == pytest.approx(sum(least.values()) / rows[0]["p50"])
    assert rows[2]["ceiling_share"] == pytest.approx((least["S"] + least["y"]) / rows[2]["p50"])


def test_what_the_targets_need_is_measured_first():
    plan = list(kernels.kernel_plan(cases.BATCHES, cases.STUDY_RANKS, cases.XLMR_BASE))
    assert [(batch, rank) for linear, batch, rank, _ in plan[::4]][:7] == [
        (cases.STUDY, 32), (cases.STUDY, 256), (cases.Batch(1, 19_968), 32), (cases.Batch(8, 2496), 32),
        (cases.Batch(256, 78), 32), (cases.Batch(1024, 19), 32), (cases.STUDY, 64),
    ]  # fmt: skip
    assert len(plan) == len(set(plan)) == 29 and plan[-1][1] == cases.Batch(1, 384)
    assert {forms for _, batch, _, forms in plan if batch == cases.STUDY} == {("chosen", "exact", "forward only")}
    assert all({linear for linear, *_ in plan[at : at + 4]} == set(cases.XLMR_BASE) for at in range(0, 28, 4))


@pytest.mark.parametrize(("part", "name"), list(enumerate(("y", "dx", "dA", "dB"))))
def test_nothing_is_timed_after_a_failed_check(suite, monkeypatch, part, name):
    honest = cases.forward_backward

    def wrong(problem, **options):
        call = honest(problem, **options)
        is_reference = "op" in options
        return call if is_reference else lambda: tuple(1.01 * t if i == part else t for i, t in enumerate(call()))

    monkeypatch.setattr(cases, "forward_backward", wrong)
    suite.section = "kernels"
    suite.kernels(batches=(), ranks=(4,), linears=(SMALL,))
    assert not suite.rows and not suite.file.exists()
    assert suite.failed[0].startswith(f"kernels: small, 2 x 4 rows, r=4: AssertionError: {name} at small, r=4, chosen")


@pytest.mark.parametrize("name", ["kernels", "baselines", "step", "peft's step", "linear decision", "other decision"])
def test_no_section_writes_a_row_of_an_op_that_failed_its_check(suite, monkeypatch, name):
    def check(*shape, **more):
        raise AssertionError("dx is off")

    for home, checked in ((cases, "check"), (cases, "check_part"), (whole_step, "check_step"), (whole_step, "assert_no_worse")):
        monkeypatch.setattr(home, checked, check)
    library = baselines.Baseline("a", "a", cases.forward_backward, cases.forward_backward)
    monkeypatch.setattr(baselines, "baselines", lambda: ([library], []))
    size, other = profiled.StepSize(3, 4, 2), STEP._replace(timed="add_norm", shapes=())
    {
        "kernels": partial(suite.kernels, ranks=(4,), linears=(PLAIN,), batches=()),
        "baselines": partial(suite.baselines, ranks=(4,), linears=(PLAIN,)),
        "step": partial(suite.steps, [size], lambda call: events(("shrink_kernel", 1.0)), lambda call: Counter()),
        "peft's step": partial(suite.peft_step, size),
        "linear decision": partial(suite.decide, STEP, (PLAIN,)),
        "other decision": partial(suite.decide, other),
    }[name]()
    assert not suite.rows and suite.failed and all("dx is off" in failure for failure in suite.failed)


def test_one_adapter_that_is_wrong_fails_the_check(monkeypatch):
    honest = cases.forward_backward

    def wrong(problem, exact=False, **options):
        def call():
            results = honest(problem, exact=exact, **options)()
            results[0][4 if exact else 0 : 8 if exact else 0] += 1e-4
            return results

        return call

    monkeypatch.setattr(cases, "forward_backward", wrong)
    with pytest.raises(AssertionError, match="y at small, r=4, exact: adapter 1"):
        cases.check(SMALL, BATCH, 4, device="cpu", dtype=torch.float32)


def test_a_wrong_or_missing_value_in_inference_fails_the_check(monkeypatch):
    honest = cases.forward_only

    def wrong(problem, **options):
        rows = torch.tensor([] if "op" in options else [5], dtype=torch.long)
        return lambda: honest(problem, **options)().index_fill(0, rows, torch.nan)

    monkeypatch.setattr(cases, "forward_only", wrong)
    with pytest.raises(AssertionError, match="y at plain, r=4, forward only: adapter 1"):
        cases.check(PLAIN, BATCH, 4, device="cpu", dtype=torch.float32)


def test_inference_has_no_gradients_and_no_dropout():
    problem = small_problem()
    y = cases.forward_only(problem._replace(lora_a=problem.lora_a.clone().requires_grad_()))()
    without = cases.forward_backward(problem._replace(dropout=None))()[0]
    assert not y.requires_grad and torch.equal(y, without) and not torch.equal(y, cases.forward_backward(problem)()[0])


def test_each_form_has_its_own_floor():
    problem = small_problem()
    y, dx = kernels.FORMS["chosen"].floor(problem)()
    torch.testing.assert_close(y, F.linear(problem.x, problem.weight, problem.bias))
    torch.testing.assert_close(dx, problem.dy @ problem.weight)
    assert torch.equal(kernels.FORMS["forward only"].floor(problem)(), y)
    assert kernels.FORMS["exact"].floor is kernels.FORMS["chosen"].floor


def test_a_ratio_with_the_hosts_time_on_either_side_is_marked(suite, capsys):
    quick, slow = Times(1, 2, 3, 1), Times(1, 4, 5, timing.QUEUED_US + 1)
    sides = (quick, quick), (quick, slow), (slow, quick)
    for times, floor in sides:
        suite.write_times("case", times, baseline="other", floor=floor)
    marked = suite.rows
    assert [row["host_bound"] for row in marked] == [False, True, True] and marked[2]["ratio"] == 2
    assert [line.endswith("launch-bound") for line in capsys.readouterr().out.splitlines()] == [False, True, True]


def test_a_case_that_passed_is_not_checked_again(suite, monkeypatch):
    seen = []
    monkeypatch.setattr(cases, "check", lambda *case, **more: seen.append(case))
    for rank in (4, 4, 8):
        suite.check(SMALL, BATCH, rank)
    assert seen == [(SMALL, BATCH, 4), (SMALL, BATCH, 8)]


def test_a_spent_budget_is_said(suite):
    suite.until, suite.section = 0, "kernels"
    suite.kernels(batches=(BATCH,), ranks=(4,), linears=(SMALL,))
    assert suite.left_out == ["kernels: small, 2 x 4 rows, r=4"] and not suite.rows


STEP = Decision("lora_tiles.SUM_STEP", "", "linear", (Shape(0, 4),), {str(n): {"lora_tiles.SUM_STEP": n} for n in (1, 9)})


def test_settings_change_and_come_back():
    before, wide = dict(tuned.TABLE), dict(tuned.WIDE)
    settings = {"tuned.TABLE shrink": {"BK": 32}, "tuned.WIDE reduce": 7, "lora_tiles.SUM_STEP": 9, "segments.CHUNK": 512}
    with kernels.changed(settings, 0):
        assert tuned.launch("shrink", 0, torch.bfloat16) == tuned.DEFAULT["shrink", "half"]._replace(BK=32)
        assert tuned.launch("shrink", 80, torch.bfloat16) == tuned.DEFAULT["shrink", "half"]
        assert wide | {"reduce": 7} == tuned.WIDE and (lora_tiles.SUM_STEP, segments.CHUNK) == (9, 512)
    assert (before, wide) == (tuned.TABLE, tuned.WIDE) and (lora_tiles.SUM_STEP, segments.CHUNK) == (8, 1024)
    with pytest.raises(AttributeError), kernels.changed({"tuned.NOTHING": 1}, 0):
        pass


def test_a_decision_is_checked_and_timed_under_its_settings(suite, monkeypatch):
    """Also what is set now, which each candidate is compared with in the same run."""
    seen = []

    def check(linear, batch, rank, *, forms, **where):
        seen.append((linear.name, batch, rank, forms, lora_tiles.SUM_STEP))

    monkeypatch.setattr(cases, "check", check)
    shapes = Shape(1, 4), Shape(0, 8, cases.Batch(1, 3))
    suite.section = "first"
    suite.decide(STEP._replace(shapes=shapes), (SMALL, PLAIN))
    where = ("plain", BATCH, 4, ("chosen",)), ("small", cases.Batch(1, 3), 8, ("chosen",))
    assert seen == [(*case, value) for case in where for value in (8, 1, 9)]
    rows = written(suite)
    assert [(row["rank"], row["candidate"]) for row in rows] == [(r, label) for r in (4, 8) for label in ("now", "1", "9")]
    assert all(row["decision"] == STEP.name and row["now"] == "8" and row["section"] == "first" for row in rows)
    assert [row["baseline_p50"] for row in rows] == [rows[0]["p50"]] * 3 + [rows[3]["p50"]] * 3 and not suite.failed


def test_a_candidate_that_the_chip_refuses_is_left_out_and_a_wrong_one_fails(suite, monkeypatch):
    def check(*shape, **more):
        if lora_tiles.SUM_STEP == 1:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        assert lora_tiles.SUM_STEP != 9, "dx is off"

    monkeypatch.setattr(cases, "check", check)
    suite.decide(STEP, (PLAIN,))
    assert "shared memory" in suite.left_out[0] and "dx is off" in suite.failed[0] and lora_tiles.SUM_STEP == 8
    assert [row["candidate"] for row in suite.rows] == ["now"]


def test_without_a_time_of_what_is_set_now_no_candidate_is_timed(suite, monkeypatch):
    def check(*shape, **more):
        assert lora_tiles.SUM_STEP != 8, "y is off"

    monkeypatch.setattr(cases, "check", check)
    suite.decide(STEP, (PLAIN,))
    assert not suite.rows and len(suite.failed) == 1


@pytest.mark.parametrize(("timed", "launches"), [("fused", 2), ("expand", 2), ("shrink", 2), ("reduce", 2)])
def test_a_kernel_is_timed_by_itself(suite, monkeypatch, timed, launches):
    """With the arguments of the pass that it is taken from, and without the other kernels."""
    kernel, exact = kernels.ALONE[timed]
    problem = small_problem()
    pass_of = cases.forward_backward(problem, exact=exact)
    module = lora_shrink if timed == "shrink" else lora_tiles
    real, call, seen = getattr(module, kernel), kernels.alone(pass_of, kernel), []
    assert getattr(module, kernel) is real, "the recorder is gone"
    honest = type(real).__getitem__
    monkeypatch.setattr(type(real), "__getitem__", lambda self, grid: seen.append(self) or honest(self, grid))
    again = kernels.alone(pass_of, kernel)
    assert len(seen) > launches
    seen.clear()
    assert len(call()) == len(again()) == launches and not seen, "the launches are made already"
    with pytest.raises(ValueError, match="no sum_kernel was launched"):
        kernels.alone(pass_of, "sum_kernel")


@pytest.mark.parametrize("op", cases.PARTS)
def test_the_other_ops_are_checked_and_timed(suite, monkeypatch, op):
    monkeypatch.setattr(whole_step, "massive_lengths", lambda count, generator: torch.tensor([3, 17, 1]).repeat(count // 32))
    suite.decide(Decision("add_norm_triton.BLOCK", "", op, (), {"64": {"add_norm_triton.BLOCK": 64}}))
    assert [(row["candidate"], row["now"]) for row in suite.rows] == [("now", "2048"), ("64", "2048")] and not suite.failed
    name = {"attention": "packed_attention", "add_norm": "add_norm", "loss": "token_loss"}[op]
    honest = getattr(kloss_kernels, name)

    def wrong(*arguments, **more):
        result = honest(*arguments, **more)
        return (1.01 * result[0], result[1]) if op == "loss" else 1.01 * result

    monkeypatch.setattr(kloss_kernels, name, wrong)
    with pytest.raises(AssertionError, match=f"y at {op}: adapter 0 is off"):
        cases.check_part(op, TOY, device="cpu", dtype=torch.float32)


def test_the_vendors_products_are_timed_first(suite):
    suite.section = "first"
    suite.vendor((SMALL, PLAIN))
    assert [(row["linear"], row["form"]) for row in written(suite)] == [("small", "alone"), ("small", "on top, beta = 1")]
    problem = small_problem()
    call = cases.base_on_top(problem)
    call()
    y, dx = call()
    torch.testing.assert_close(y, 2 * problem.x @ problem.weight.t())
    torch.testing.assert_close(dx, 2 * problem.dy @ problem.weight)


def test_pefts_step_is_a_row_with_the_ratio(suite, monkeypatch, capsys):
    size, given = profiled.StepSize(3, 4, 2), []
    monkeypatch.setattr(whole_step, "beside_peft", lambda config, **more: given.append((config, more)) or (2e3, 90e3, 2))
    suite.section = "baselines"
    suite.peft_step(size)
    row = written(suite)[0]
    assert (row["library"], row["p50"], row["baseline_p50"], row["ratio"], row["timed_adapters"]) == (
        "peft whole step", 90e3, 2e3, 45.0, 2,
    )  # fmt: skip
    assert given == [(TOY, {**size._asdict(), "device": "cpu", "dtype": torch.float32})]
    assert "peft's whole step: 90 ms, ours 2.0 ms: 45.0 x" in capsys.readouterr().out
    suite.until = 0
    suite.peft_step(size)
    assert suite.left_out == ["baselines: peft's whole step"]
