"""The targets as functions of the measured rows."""

import pytest
from suite_parts import BATCH, PLAIN, SMALL

from bench import cases, profiled
from bench.profiled import StepSize


def measured(linear, p50, base, batch=BATCH, **more):
    row = {"section": "kernels", "form": "chosen", "rank": 4, "linear": linear, "p50": p50, "baseline_p50": base}
    return {**row, "host_bound": False, **batch._asdict(), **more}


LINEARS = (SMALL, PLAIN)


def answers(rows, batches=(BATCH,)):
    return {target.goal: target for target in profiled.targets(rows, LINEARS, batches)}


def test_targets_sum_over_the_linears(suite):
    rows = [measured("small", 20.0, 10.0), measured("plain", 10.0, 10.0), measured("plain", 99.0, 1.0, form="exact")]
    target = answers(rows)["forward + backward, r=4: at most 1.5 x the base products alone"]
    assert target.measured == "1.50 x" and target.met is True and target.line.endswith("1.50 x yes, 0% to spare")
    slower = answers([measured("small", 23.0, 10.0), *rows[1:]])
    assert slower[target.goal].met is False and slower[target.goal].line.endswith("1.65 x NO, 10% off")
    part = answers(rows[:1])[target.goal]
    assert (part.measured, part.met) == ("not measured (1 of 2 linears)", None) and part.line.endswith("linears)")


def test_targets_against_other_libraries(suite):
    rows = [
        measured(linear, 30.0, ours, section="baselines", library=library, form=None, host_bound=library != "grouped_mm")
        for library, ours in (("grouped_mm", 15.0), ("peft in turn", 3.1)) for linear in ("small", "plain")
    ]  # fmt: skip
    targets = answers(rows)
    assert targets["at least 2 x as fast as grouped_mm, r=4"][1:] == ("2.00 x", True, 1.0)
    slow = targets["at least 10 x as fast as peft in turn, r=4"]
    assert slow[1:3] == ("9.68 x, launch-bound", False) and slow.line.endswith("NO, 3% off")


def test_the_cost_per_row_is_set_beside_one_adapters(suite):
    batches = (cases.Batch(1, 8), BATCH, cases.Batch(8, 1), cases.Batch(1, 3))
    costs = {1: 8.0, 2: 8.4, 8: 7.1}
    each = zip(batches, (*costs.values(), 1.0), strict=True)
    rows = [measured(name, us, 1.0, batch) for batch, us in each for name in ("small", "plain")]
    per_row = profiled.costs(rows, LINEARS, batches)
    assert per_row == pytest.approx({adapters: 2e3 * us / 8 for adapters, us in costs.items()}), "3 rows are not comparable"
    assert profiled.flatness(per_row) == (8, pytest.approx(7.1 / 8 - 1))
    goal = "cost per row of 1, 2, 8 adapters flat within 10%, r=4"
    assert answers(rows, batches)[goal][1:] == ("-11.3% at 8 adapters; ns: 1: 2000.0, 2: 2100.0, 8: 1775.0", False, None)
    flat = [row | {"p50": 8.0} if row["adapters"] == 8 else row for row in rows]
    assert answers(flat, batches)[goal][1:] == ("+5.0% at 2 adapters; ns: 1: 2000.0, 2: 2100.0, 8: 2000.0", True, None)
    part = answers([row for row in rows if (row["adapters"], row["linear"]) != (8, "plain")], batches)[goal]
    assert part[1:] == ("not measured (1, 2 of them)", None, None)
    assert profiled.flatness({2: 1.0}) is None and profiled.flatness({1: 1.0}) is None


def test_the_studys_batches_are_comparable():
    assert [batch.adapters for batch in cases.BATCHES if batch.comparable] == [1, 8, 52, 256, 1024]


def step_row(size, p50, way="eager"):
    return {"case": "whole step", **size._asdict(), "way": way, "p50": p50}


def test_whole_steps_against_what_this_gpu_is_to_do():
    """The fastest way counts; a bound for another GPU is no answer."""
    many, lone, wide = profiled.STEPS
    assert (many, lone, wide) == (StepSize(52, 32, 32), StepSize(1, 32, 32), StepSize(52, 256, 32))
    rows = [step_row(many, 27e3), step_row(many, 20e3, "replayed"), step_row(many, 22e3, "replayed, too"), step_row(lone, 1.2e3)]
    rows += [{"case": "profile of a step", **many._asdict(), "p50": 1.0}, {"library": "peft whole step", "ratio": 62.5}]
    first, second, third, peft = profiled.step_targets(rows, "NVIDIA H200")
    assert first[1:] == ("20.00 ms replayed", False, 20 / 18) and first.line.endswith("20.00 ms replayed NO, 11% off")
    assert second[1:] == ("1.20 ms eager", True, 1.2 / 1.5) and second.line.endswith("yes, 20% to spare")
    assert third[1:] == ("not measured", None, None) and third.line.endswith("not measured")
    assert peft[1:] == ("62.5 x", True, 50 / 62.5)
    first, second, *_, peft = profiled.step_targets(rows[:4], "NVIDIA H100 80GB HBM3")
    assert first.met is True and first.distance == 20 / 21 and "18 ms on an H200 or 21 ms on an H100" in first.goal
    assert second[1:] == ("1.20 ms eager; no bound for this GPU", None, None)
    assert peft[1:] == ("not measured", None, None)
