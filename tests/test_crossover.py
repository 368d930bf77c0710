"""The tables of where kloss wins and loses: what they measure, check and say."""

import json

import pytest
import torch

from bench import crossover, libraries, peak, tables
from bench.baselines import HubLinear, PeftLinear
from bench.cases import Batch, Linear, make_problem

SMALL = ["--device", "cpu", "--dtype", "fp32", "--width", "64", "--rank", "8", "--minutes", "0"]
TIMED = ["training", "inference", "skew", "shapes"]
PEFT = {"peft", "peft without set_adapter", "peft, a mixed batch"}


@pytest.fixture
def small(monkeypatch):
    """Cells that take no time."""
    monkeypatch.setattr(crossover, "SKEWED", (Batch(6, 16),))
    monkeypatch.setattr(crossover, "SHAPED", Batch(2, 4))
    monkeypatch.setattr(crossover, "AT_PEAK", Batch(3, 40))
    monkeypatch.setattr(crossover, "WIDTHS", (32, 48))
    monkeypatch.setattr(crossover, "RANKS", (2, 4))


def problem_of(adapters, rows, counts=None):
    problem = make_problem(Linear("square", 32, 32), Batch(adapters, rows), 4, device="cpu", dtype=torch.float32, counts=counts)
    return problem._replace(dropout=None)


def test_all_tables_but_the_compiled_one(tmp_path, capsys, small):
    rows = crossover.main([*SMALL, "--tables", *TIMED, "--adapters", "1", "3", "--rows", "2", "5", "--out", str(tmp_path)])
    cells = [(row["table"], row["adapters"], row["rows"]) for row in rows]
    assert cells[:6] == [("training", g, n) for g in (1, 3) for n in (2, 5)] + [("inference", g, 2) for g in (1, 3)]
    assert [(row["skewed"], row["width"], row["rank"]) for row in rows[6:]] == [
        (False, 64, 8), (True, 64, 8), *((False, width, rank) for width in (32, 48) for rank in (2, 4))
    ]  # fmt: skip
    written = [json.loads(line) for line in (tmp_path / "crossover.jsonl").read_text().splitlines()]
    assert written == rows and all(row["rounds"] == crossover.LEAST_ROUNDS and row["commit"] for row in rows)
    absent = libraries.why_absent("cpu")
    for row in rows:
        own = libraries.INFERENCE if row["table"] == "inference" else libraries.TRAINING
        assert {"kloss", *row["ratio"]} == {*row["seconds"]} == own.keys() - absent.keys() and min(row["seconds"].values()) > 0
    text = capsys.readouterr().out
    assert "without torch, grouped_mm: torch has it for GPUs" in text
    assert "peft, time / kloss's" in text and "peft, a mixed batch: " in text and "the base alone: " not in text
    assert "6 adapters, 16 rows of each on average" in text and "width  rank:" in text
    assert (tmp_path / "crossover-cpu.png").stat().st_size > 10_000


def test_memory_is_measured_in_a_process_of_its_own(small):
    cells = crossover.cells_of("memory", crossover.parse(SMALL))
    kept = {"kloss": libraries.TRAINING["kloss"]}
    rows = crossover.peaks(cells, "cpu", torch.float32, libraries.TRAINING.keys() - kept.keys())
    if not peak._is_linux():
        assert rows == []
        return
    assert [(row["direction"], *row["bytes"]) for row in rows] == [("training", "kloss"), ("inference", "kloss")]
    assert "kloss" in "".join(tables.printed("memory", rows))


@pytest.mark.skipif(not peak._is_linux(), reason="of Linux")
def test_peak_is_what_is_held_at_once():
    size = 16 << 20

    def one_after_the_other():
        first = torch.ones(size)
        del first
        return torch.ones(size)

    def both():
        first = torch.ones(size)
        return first, first + 1

    kept = torch.ones(size)
    for call, wanted in ((one_after_the_other, 1), (both, 2), (lambda: kept.add_(1), 0)):
        got = peak.peak(call, "cpu") / (4 * size)
        assert abs(got - wanted) < 0.04, (wanted, got)


@pytest.mark.parametrize("table", ["TRAINING", "INFERENCE"])
def test_a_wrong_result_is_not_timed(monkeypatch, table):
    honest = getattr(libraries, table)["kloss"]

    def wrong(problem):
        return honest.make(problem._replace(scaling=problem.scaling * 1.01))

    def broken(problem):
        raise RuntimeError("no such layout\nand more")

    absent = libraries.why_absent("cpu")
    assert libraries.check(8, 64, "cpu", torch.float32, absent) == {}
    monkeypatch.setitem(getattr(libraries, table), "other", honest._replace(make=wrong))
    monkeypatch.setitem(getattr(libraries, table), "broken", honest._replace(make=broken))
    failed = libraries.check(8, 64, "cpu", torch.float32, absent)
    assert failed.keys() == {"other", "broken"} and failed["broken"] == "fails: no such layout"
    assert failed["other"].startswith("is off by [0.0")
    monkeypatch.setitem(getattr(libraries, table), "kloss", honest._replace(make=wrong))
    with pytest.raises(AssertionError, match="kloss is off by"):
        libraries.check(8, 64, "cpu", torch.float32, absent)


@pytest.mark.parametrize("counts", [None, (6, 3, 6)])
def test_mixed_batches_give_what_adapters_in_turn_give(counts):
    problem = problem_of(3, 5, counts)
    right = PeftLinear(problem, 0.0).in_turn_results()
    ours = libraries.TRAINING["kloss"].make(problem)()
    sides = {"peft": PeftLinear(problem, 0.0, switched=False).mixed_results(), "kloss": ours}
    if "AdapterHub, a mixed batch" not in libraries.why_absent("cpu"):
        sides["AdapterHub"] = HubLinear(problem, 0.0).results()
    for name, values in sides.items():
        for value, wanted in zip(values, right, strict=True):
            torch.testing.assert_close(value, wanted, msg=name)


def test_a_mixed_batch_of_peft_drops_as_in_training():
    theirs = PeftLinear(problem_of(3, 4), 0.5, switched=False)
    one, other = (theirs.mixed_training()[0][0] for _ in range(2))
    assert not torch.equal(one, other)


def test_a_compiled_mixed_batch_is_checked(monkeypatch):
    """Through Dynamo alone: inductor takes half a minute."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile(module, backend="eager", **options))
    theirs = PeftLinear(problem_of(2, 3), 0.0)
    right = theirs.mixed()
    assert torch.equal(theirs.mixed_compiled()()[0], right[0])
    monkeypatch.setattr(theirs, "mixed", lambda: [right[0] * 1.01])
    with pytest.raises(AssertionError):
        theirs.mixed_compiled()


def test_peft_is_scaled_to_all_adapters(monkeypatch):
    """A clock that moves on by a second at each look: every call takes one, of peft for two adapters of six."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(crossover.time, "perf_counter", lambda: next(ticks))
    own = {name: libraries.TRAINING[name]._replace(most=2) for name in PEFT} | {"kloss": libraries.TRAINING["kloss"]}
    cell = crossover.Cell(Batch(6, 2), 32, 4)
    times = crossover.measure(crossover.calls_of(cell, own, "cpu", torch.float32), 0)
    assert times == {(cell, name): [3, 3, 3] for name in PEFT} | {(cell, "kloss"): [1, 1, 1]}


def test_an_adapter_put_in_its_place_gives_what_set_adapter_gives():
    switched, placed = (PeftLinear(problem_of(3, 4), 0.0, switched=way).in_turn_results() for way in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(switched, placed, strict=True))


@pytest.mark.parametrize("batch", [Batch(52, 16), Batch(6, 16), Batch(3, 4)])
def test_skewed_rows_are_as_many(batch):
    counts = crossover.zipf(batch)
    assert sum(counts) == batch.total and len(counts) == batch.adapters and min(counts) >= crossover.SENTENCE
    assert counts[0] == max(counts) and all(n % crossover.SENTENCE == 0 for n in counts)
    assert batch.adapters < 52 or counts[0] > 8 * batch.rows


def test_what_is_absent_says_why(monkeypatch):
    monkeypatch.setattr(libraries, "versions", lambda names: dict.fromkeys(names))
    monkeypatch.setattr(libraries.shutil, "which", lambda name: None)
    absent = libraries.why_absent("cpu")
    assert absent["AdapterHub, a mixed batch"] == "adapters and transformers not installed" and absent.keys() >= PEFT
    assert "g++" in absent["peft, a mixed batch, compiled"] and libraries.GROUPED not in libraries.why_absent("cuda")
    monkeypatch.setattr(libraries, "versions", lambda names: dict.fromkeys(names, "1.0"))

    def broken(name):
        raise ImportError(f"cannot import name 'X' from {name} (a path)")

    monkeypatch.setattr(libraries, "import_module", broken)
    reason = libraries.why_absent("cuda")["AdapterHub, a mixed batch"]
    assert reason == "adapters 1.0 does not import: cannot import name 'X' from adapters (transformers 1.0)"


def test_what_is_said_of_wins_and_losses():
    rows = [{"adapters": g, "rows": n, "ratio": {"peft": ratio}} for g, n, ratio in ((1, 1, 0.8), (1, 4, 1.2), (9, 1, 5.0))]
    assert tables.crossover(rows, "peft") == "peft: faster than kloss in 1 of 3 cells (adapters x rows): 1 x 1 (0.80)"
    assert tables.crossover(rows[1:], "peft") == "peft: kloss is faster in all 2 cells"
    lines = tables.grid({(row["adapters"], row["rows"]): row["ratio"]["peft"] for row in rows}, "adapters  rows of each: ")
    assert [line.split() for line in lines[1:]] == [["1", "0.80", "1.20"], ["9", "5.00"]]
