"""The logic of the GPU suite, with a clock that counts and the kernels in Triton's interpreter."""

import json

import pytest
import torch

from bench import cases, gpu_suite
from kloss.kernels import tuned

SMALL = cases.Linear("small", 16, 32, 2)
PLAIN = cases.Linear("plain", 16, 16)
BATCH = cases.Batch(2, 4)


class Clock:
    """Runs each call once per function that it sees, and says 10, 20, 30, ... microseconds."""

    def __init__(self):
        self.time, self.seen = 0, set()

    def __call__(self, call):
        if call not in self.seen:
            self.seen.add(call)
            call()
        self.time += 10
        return float(self.time)


@pytest.fixture
def suite(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_suite, "L2_BYTES", 1)
    monkeypatch.setattr(cases, "STUDY", BATCH)
    return gpu_suite.Suite(tmp_path, minutes=5, clock=Clock(), device="cpu", seconds=0, dtype=torch.float32)


def written(suite):
    return [json.loads(line) for line in suite.file.read_text().splitlines()]


def test_quantiles_and_rotation():
    order = []
    calls = [lambda i=i: order.append(i) for i in range(3)]
    times = iter(range(100))

    def clock(call):
        call()
        return float(next(times))

    assert gpu_suite.measure(calls, clock, seconds=0) == (5.0, 8.0, 11.0)
    assert order == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0], "inputs rotate, the first three are not counted"


def test_inputs_fill_twice_the_cache(monkeypatch):
    one = gpu_suite.make_problem(PLAIN, BATCH, 4, device="cpu", dtype=torch.float32)
    monkeypatch.setattr(gpu_suite, "L2_BYTES", 3 * one.bytes)
    made = gpu_suite.rotation(lambda seed: one)
    assert len(made) == 6
    monkeypatch.setattr(gpu_suite, "L2_BYTES", 1)
    assert len(gpu_suite.rotation(lambda seed: one)) == 2


def test_kernels_write_a_row_per_case_with_the_ratio_of_the_same_run(suite, capsys):
    suite.kernels(batches=(BATCH, cases.Batch(1, 8)), ranks=(4,), linears=(SMALL,))
    rows = written(suite)
    assert [row["case"] for row in rows] == [
        f"small, {batch} rows, r=4, {how}" for batch in ("2 x 4", "1 x 8") for how in ("chosen", "exact")
    ]
    needed = {"commit", "torch", "triton", "device", "p20", "p50", "p80", "baseline", "ratio", "ceiling_share", "dtype"}
    for row in rows:
        assert needed <= row.keys()
        assert row["ratio"] == row["p50"] / row["baseline_p50"] and row["p20"] < row["p50"] < row["p80"]
    assert "all linears measured at the study's batch, r=4" in capsys.readouterr().out


def test_nothing_is_timed_after_a_failed_check(suite, monkeypatch):
    honest = gpu_suite.together

    def wrong(one, **more):
        call = honest(one, **more)
        return lambda: tuple(1.01 * t for t in call())

    monkeypatch.setattr(gpu_suite, "together", wrong)
    with pytest.raises(AssertionError, match="dx at small, r=4"):
        suite.kernels(batches=(), ranks=(4,), linears=(SMALL,))
    assert not suite.file.exists()


def test_a_spent_budget_is_said(suite):
    suite.deadline = 0
    suite.kernels(batches=(BATCH,), ranks=(4,), linears=(SMALL,))
    assert suite.left_out == ["small, 2 x 4 rows, r=4"] and not suite.rows


def test_peft_baselines_compute_the_same_layer(suite):
    """Both peft paths run, and the mixed batch gives what our op gives with peft's weights and no dropout."""
    pytest.importorskip("peft")
    one = gpu_suite.make_problem(PLAIN, BATCH, 4, device="cpu", dtype=torch.float32)
    theirs = gpu_suite._PeftLinear(one)
    theirs.sequential()
    with torch.no_grad():
        for g in range(2):
            theirs.layer.lora_B[str(g)].weight.normal_()
    y = theirs.mixed().flatten(0, 1)
    weights = [torch.stack([getattr(theirs.layer, f"lora_{ab}")[str(g)].weight for g in range(2)]) for ab in "AB"]
    base = theirs.layer.base_layer
    with torch.no_grad():
        ours = gpu_suite.multi_lora_linear(one.x, base.weight, base.bias, *weights, one.scaling, one.segments)
    torch.testing.assert_close(ours, y)


def test_tiles_try_candidates_and_put_the_table_back(suite, monkeypatch):
    before = dict(tuned.TABLE)
    with gpu_suite.table_entry("shrink", 0, {"BK": 32}):
        assert tuned.launch("shrink", 0, torch.bfloat16).BK == 32
        assert tuned.launch("shrink", 80, torch.bfloat16) == tuned.DEFAULT["shrink", "half"]
    assert before == tuned.TABLE
    tried = []
    monkeypatch.setattr(gpu_suite, "CANDIDATES", {"shrink": [{"BK": 16}, {"BK": 128}], "fused": [{"BC": 16}]})
    monkeypatch.setattr(gpu_suite, "check", lambda *shape, **more: tried.append(dict(tuned.TABLE)))
    suite.tiles(batch=BATCH, linears=(PLAIN,), rank=4)
    assert before == tuned.TABLE
    assert [one["shrink", 0, "half"].BK for one in tried[:2]] == [16, 128] and tried[2]["fused", 0, "half"].BC == 16
    assert len(written(suite)) == 3 and all(row["baseline"] == "the table's" for row in written(suite))


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize("arch", [0, 70, 89, 120])
def test_an_unknown_gpu_gets_the_defaults(arch):
    for op, bucket in tuned.DEFAULT:
        dtype = torch.float32 if bucket == "single" else torch.bfloat16
        assert tuned.launch(op, arch, dtype) == tuned.DEFAULT[op, bucket]
