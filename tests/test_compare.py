"""`python -m kloss.report`: reports made anew, runs compared in pairs."""

import json
import subprocess
import sys

import numpy as np
import pytest
from test_report import FIVE, fake_run, fake_scores, write_run

from kloss.report.__main__ import main

THREE = FIVE[:3]


def run_of(folder, shift=0.0, seeds=(0, 1, 2), orders=(THREE,), labels=(("shared", 8), ("non-shared", 8)), **config):
    """A run folder whose SHARED falls by `shift` times the seed more on all languages but the last."""
    runs = []
    for strategy, rank in labels:
        for n, order in enumerate(orders):
            for seed in seeds:
                R = np.tril(np.full((4, 3), 0.5 + 0.01 * seed), -1)
                R[-1, :2] -= 0.2 + (shift * seed if strategy == "shared" else 0)
                if strategy == "non-shared":
                    R[-1] = R[-2] = np.diagonal(R[1:])
                label = f"{strategy.upper()} LoRA r={rank}"
                run = fake_run(strategy, order, order_name=f"Order {n + 1}", seed=seed, label=label, R=R)
                runs.append(run | {"rank": rank})
    write_run(folder, fake_scores(THREE, runs=runs))
    (folder / "config.json").write_text(json.dumps({"corpus": "abc", "dtype": "fp32", "seeds": len(seeds)} | config))
    return folder


def lines_of(capsys, *folders):
    assert main([str(folder) for folder in folders]) == 0
    return capsys.readouterr().out.splitlines()


def test_the_same_seeds_are_paired(tmp_path, capsys):
    a, b = run_of(tmp_path / "a"), run_of(tmp_path / "b", shift=0.04, seeds=(1, 2, 3), dtype="bf16")
    (b / "report.html").write_text("old")
    lines = lines_of(capsys, a, b)
    assert lines[:2] == [f"report: {a}/report.html", f"report: {b}/report.html"] and (b / "report.html").read_text() != "old"
    assert lines[3] == f"{b} minus {a}, paired by order and seed; 95 % intervals, t: Student's"
    assert lines[4] == "settings: dtype fp32 → bf16"
    # Seeds 1 and 2 are in both: CBT falls by 0.04 and 0.08, F1 by 2/3 of it.
    shared, non_shared = (line.replace("\xa0", " ") for line in lines[5:7])
    assert shared == (
        "SHARED LoRA r=8: F1 0.382 → 0.342: −0.040 (−0.209 to 0.129, t 1), 2 pairs; CBT −0.060 (−0.314 to 0.194, t 1)"
    )
    assert non_shared == "NON-SHARED LoRA r=8: F1 0.515 → 0.515: 0.000 (no interval), 2 pairs"
    assert len(lines) == 7
    assert lines_of(capsys, a, a)[4] == "settings: the same" and "Not the same utterances" not in "".join(lines)


def test_what_is_not_of_one_order_and_seed_is_no_pair(tmp_path, capsys):
    """SHARED's last row depends on the order; NON-SHARED's does not."""
    a, b = run_of(tmp_path / "a", seeds=(0,)), run_of(tmp_path / "b", seeds=(0,), orders=(THREE[::-1],), corpus="other")
    lines = lines_of(capsys, a, b)
    assert lines[5] == "Not the same utterances or languages: a difference is of these too, and intervals do not know it."
    assert lines[6] == "SHARED LoRA r=8: F1 0.367 → 0.367; no two runs of one order and seed, so no difference"
    assert lines[7] == "NON-SHARED LoRA r=8: F1 0.500 → 0.500: 0.000 (one value, no interval), 1 pair"


def test_another_rank_is_the_other_of_its_strategy(tmp_path, capsys):
    a, b = run_of(tmp_path / "a", labels=(("shared", 8), ("non-shared", 8))), run_of(tmp_path / "b", labels=(("shared", 16),))
    lines = lines_of(capsys, a, b)
    assert lines[5].startswith("SHARED LoRA r=8 → SHARED LoRA r=16: F1 ") and "3 pairs" in lines[5]
    assert lines[6] == f"only in {a}: NON-SHARED LoRA r=8"
    several = run_of(tmp_path / "c", labels=(("shared", 16), ("shared", 32)))
    lines = lines_of(capsys, a, several)
    assert lines[-1] == "no strategy is in both: there is nothing to pair"
    assert f"only in {several}: SHARED LoRA r=16; SHARED LoRA r=32" in lines


def test_runs_that_diverged_are_in_no_pair(tmp_path, capsys):
    a, b = run_of(tmp_path / "a", seeds=(0, 1)), run_of(tmp_path / "b", seeds=(0, 1))
    scores = json.loads((b / "scores.json").read_text())
    for run in scores["runs"]:
        run["diverged"] = "loss nan" if run["seed"] or run["strategy"] == "non-shared" else None
    (b / "scores.json").write_text(json.dumps(scores))
    lines = lines_of(capsys, a, b)
    assert "1 pair;" in lines[5] and lines[6:] == [f"only in {a}: NON-SHARED LoRA r=8", f"only in {b}: NON-SHARED LoRA r=8"]


@pytest.mark.parametrize("name", ["", "nobody", "a\0b"])
def test_a_folder_that_is_none(tmp_path, capsys, name):
    assert main([str(tmp_path / name) if name == "nobody" else name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kloss: ") and error.count("\n") == 1


def test_as_a_command_without_torch(tmp_path):
    a = run_of(tmp_path / "a")
    command = (
        "import sys, kloss.report.__main__ as m; code = m.main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", command, str(a), str(a)], check=True, capture_output=True)
    result = subprocess.run([sys.executable, "-m", "kloss.report", str(a)], check=True, capture_output=True, text=True)
    assert result.stdout == f"report: {a}/report.html\n"
