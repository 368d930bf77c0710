"""The table of where kloss wins and loses: what it measures, checks and says."""

import json

import pytest
import torch

from bench import crossover
from bench.cases import Batch, Linear, make_problem

SMALL = ["--device", "cpu", "--dtype", "fp32", "--width", "64", "--rank", "8", "--minutes", "0"]


def test_a_small_table(tmp_path, capsys):
    pytest.importorskip("peft")
    rows = crossover.main([*SMALL, "--adapters", "1", "3", "--rows", "2", "5", "--out", str(tmp_path)])
    assert [(row["adapters"], row["rows"]) for row in rows] == [(1, 2), (1, 5), (3, 2), (3, 5)]
    written = [json.loads(line) for line in (tmp_path / "crossover.jsonl").read_text().splitlines()]
    assert written == rows and all(row["rounds"] == crossover.LEAST_ROUNDS and row["commit"] for row in rows)
    for row in rows:
        assert (
            row["ratio"].keys()
            == row["seconds"].keys() - {"kloss"}
            == crossover.LIBRARIES.keys() - {"kloss", "torch, grouped_mm"}
        )
    text = capsys.readouterr().out
    assert "peft, time / kloss's" in text and "peft without set_adapter: " in text and "the base alone: " not in text
    assert (tmp_path / "crossover-cpu.png").stat().st_size > 10_000


def test_a_wrong_result_is_not_timed(monkeypatch):
    honest = crossover.LIBRARIES["kloss"]
    monkeypatch.setitem(crossover.LIBRARIES, "kloss", lambda problem: honest(problem._replace(scaling=problem.scaling * 1.01)))
    with pytest.raises(AssertionError, match="kloss is off by"):
        crossover.check(Linear("square", 64, 64), 8, "cpu", torch.float32)


def test_peft_is_scaled_to_all_adapters(monkeypatch):
    """A clock that moves on by a second at each look: every call takes one, of peft for two adapters of six."""
    pytest.importorskip("peft")
    ticks = iter(range(10_000))
    monkeypatch.setattr(crossover.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(crossover, "MOST_PEFT", 2)
    problem = make_problem(Linear("square", 32, 32), Batch(6, 2), 4, device="cpu", dtype=torch.float32)
    names = "kloss", "peft", "peft without set_adapter"
    times = crossover.measure(problem, {name: crossover.LIBRARIES[name] for name in names}, 0)
    assert times == {"kloss": [1, 1, 1], "peft": [3, 3, 3], "peft without set_adapter": [3, 3, 3]}


def test_an_adapter_put_in_its_place_gives_what_set_adapter_gives():
    pytest.importorskip("peft")
    problem = make_problem(Linear("square", 32, 32), Batch(3, 4), 4, device="cpu", dtype=torch.float32)
    switched, placed = (crossover.PeftLinear(problem, 0.0, switched=way).results() for way in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(switched, placed, strict=True))


def test_what_is_said_of_wins_and_losses():
    rows = [{"adapters": g, "rows": n, "ratio": {"peft": ratio}} for g, n, ratio in ((1, 1, 0.8), (1, 4, 1.2), (9, 1, 5.0))]
    assert crossover.crossover(rows, "peft") == "peft: faster than kloss in 1 of 3 cells (adapters x rows): 1 x 1 (0.80)"
    assert crossover.crossover(rows[1:], "peft") == "peft: kloss is faster in all 2 cells"
    lines = crossover.grid([1, 9], [1, 4], {(row["adapters"], row["rows"]): row["ratio"]["peft"] for row in rows})
    assert [line.split() for line in lines[1:]] == [["1", "0.80", "1.20"], ["9", "5.00"]]
