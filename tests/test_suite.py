"""The GPU suite's sections kernels and tiles, with a clock that counts and the kernels in the interpreter."""

from collections import Counter
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import triton
from suite_parts import BATCH, PLAIN, SMALL, TOY, events, small_problem, written

from bench import baselines, cases, kernels, timing, whole_step
from bench.timing import Times
from kloss.kernels import tuned


def test_kernels_write_a_row_per_case_with_the_ratio_of_the_same_run(suite):
    suite.section = "kernels"
    suite.kernels(batches=(cases.Batch(1, 8), BATCH, cases.Batch(1, 3)), ranks=(4,), linears=(SMALL,))
    rows = written(suite)
    shapes = [("2 x 4", "chosen"), ("2 x 4", "exact"), ("2 x 4", "forward only"), ("1 x 8", "chosen")]
    shapes += [("1 x 3", form) for form in ("chosen", "exact", "forward only")]
    assert [row["case"] for row in rows] == [f"small, {batch} rows, r=4, {form}" for batch, form in shapes]
    needed = {"commit", "versions", "device", "tests", "p20", "p50", "p80", "host", "host_bound", "dtype", "fused"}
    for row in rows:
        assert needed <= row.keys() and row["section"] == "kernels"
        assert row["ratio"] == row["p50"] / row["baseline_p50"] and row["p20"] < row["p50"] < row["p80"]
        assert row["baseline"] == ("base forward alone" if row["form"] == "forward only" else "base alone")
    least = {work.name: work.seconds * 1e6 for work in cases.lora_work(SMALL, BATCH, 4)}
    assert rows[0]["ceiling_share"] == pytest.approx(sum(least.values()) / rows[0]["p50"])
    assert rows[2]["ceiling_share"] == pytest.approx((least["S"] + least["y"]) / rows[2]["p50"])
    assert rows[1]["fused"] == [True, True] and rows[0]["fused"] == [False, False]


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


@pytest.mark.parametrize("name", ["kernels", "baselines", "profile", "training step", "tiles"])
def test_no_section_writes_a_row_of_an_op_that_failed_its_check(suite, monkeypatch, name):
    def check(*shape, **more):
        raise AssertionError("dx is off")

    def record(call):
        return events(("shrink_kernel", 1.0))

    monkeypatch.setattr(cases, "check", check)
    monkeypatch.setattr(whole_step, "check_step", check)
    library = baselines.Baseline("a", "a", cases.forward_backward, cases.forward_backward)
    monkeypatch.setattr(baselines, "baselines", lambda: ([library], []))
    monkeypatch.setattr(kernels, "PASSES", 1)
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


def test_tiles_try_candidates_and_put_the_table_back(suite, monkeypatch):
    before = dict(tuned.TABLE)
    with kernels.table_entry("shrink", 0, {"BK": 32}):
        assert tuned.launch("shrink", 0, torch.bfloat16).BK == 32
        assert tuned.launch("shrink", 80, torch.bfloat16) == tuned.DEFAULT["shrink", "half"]
    assert before == tuned.TABLE
    tried = []
    monkeypatch.setattr(kernels, "CANDIDATES", {"shrink": [{"BK": 16}, {"BK": 128}], "fused": [{"BC": 16}]})
    monkeypatch.setattr(cases, "check", lambda *shape, **more: tried.append(dict(tuned.TABLE)))
    suite.tiles(linears=(PLAIN,), rank=4)
    assert before == tuned.TABLE and tried[0] == before, "what is to be replaced is checked too"
    assert [table["shrink", 0, "half"].BK for table in tried[1:3]] == [16, 128] and tried[3]["fused", 0, "half"].BC == 16
    assert len(written(suite)) == 3 and all(row["baseline"] == "the table's" for row in written(suite))


def test_a_tile_that_the_chip_refuses_is_left_out_and_a_wrong_one_fails(suite, monkeypatch):
    before = dict(tuned.TABLE)

    def check(*shape, **more):
        changed = tuned.TABLE.get(("shrink", 0, "half"))
        if changed and changed.BK == 16:
            raise triton.runtime.errors.OutOfResources(2, 1, "shared memory")
        assert not changed or changed.BK != 32, "dx is off"

    monkeypatch.setattr(kernels, "CANDIDATES", {"shrink": [{"BK": 16}, {"BK": 32}, {"BK": 128}]})
    monkeypatch.setattr(cases, "check", check)
    suite.tiles(linears=(PLAIN,), rank=4)
    assert "shared memory" in suite.left_out[0] and "dx is off" in suite.failed[0]
    assert [row["BK"] for row in suite.rows] == [128] and before == tuned.TABLE
