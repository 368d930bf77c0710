"""The command of the GPU suite: shares of the time, the tests it starts, its exit code."""

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from suite_parts import written

from bench import gpu_suite, timing
from kloss.kernels import tuned


def test_every_section_has_its_share_and_what_earlier_ones_left():
    ends = gpu_suite.deadlines(100.0, 9.0, list(gpu_suite.SHARES))
    assert list(ends) == ["tests", "kernels", "baselines", "profile", "tiles"] and sum(gpu_suite.SHARES.values()) == 1
    assert list(ends.values())[-1] == pytest.approx(100 + 540)
    for (name, end), (_, begin) in zip(list(ends.items())[1:], ends.items(), strict=False):
        assert end - begin == pytest.approx(540 * gpu_suite.SHARES[name])
    assert all(first < second for first, second in pairwise(ends.values()))
    some = gpu_suite.deadlines(0.0, 1.0, ["tiles", "profile"])
    assert list(some) == ["profile", "tiles"] and some == pytest.approx({"profile": 36.0, "tiles": 60.0})


def test_a_slow_section_does_not_starve_the_next(suite):
    now, seen = time.monotonic(), []

    def section(name):
        def run():
            seen.append((name, suite.section, suite.late(f"case of {name}")))
            raise RuntimeError(f"{name} broke")

        return run

    gpu_suite.run_sections(suite, {"b": section("b"), "a": section("a")}, {"a": now - 1, "b": now + 60})
    assert seen == [("a", "a", True), ("b", "b", False)]
    assert suite.left_out == ["a: case of a"] and suite.failed == [f"{n}: {n}: RuntimeError: {n} broke" for n in "ab"]


@pytest.mark.parametrize(
    ("code", "seconds", "outcome"),
    [("", 60, "passed"), ("raise SystemExit(3)", 60, "FAILED: exit code 3"), ("", 0, "FAILED: not finished after 0 s")],
)
def test_the_outcome_of_the_tests(code, seconds, outcome):
    assert gpu_suite.run_tests([sys.executable, "-c", code], seconds) == outcome


def test_tests_that_take_too_long_end_with_all_their_processes(tmp_path):
    pid = tmp_path / "pid"
    code = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(pid)!r}, "w").write(str(child.pid))
time.sleep(100)"""
    assert gpu_suite.run_tests([sys.executable, "-c", code], 2.0) == "FAILED: not finished after 2 s"
    state, until = Path(f"/proc/{pid.read_text()}/stat"), time.monotonic() + 10

    def lives() -> bool:
        try:
            return state.read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    while lives():
        assert time.monotonic() < until, "a child of the tests lives on"
        time.sleep(0.05)


def test_only_tests_for_a_gpu_run():
    command = gpu_suite.pytest_command(parallel=False)
    assert command[command.index("-m", 3) + 1 :] == ["gpu", "tests"] and "-n" not in command
    assert command[command.index("-o") + 1] == "addopts=-ra", "the project's options name plugins that may be absent"
    parallel = gpu_suite.pytest_command(parallel=True)
    assert parallel[parallel.index("-n") + 1] == str(gpu_suite.WORKERS)


def test_what_is_absent_has_no_version():
    assert timing.versions(["pytest", "no-such-package"]) == {"pytest": pytest.__version__, "no-such-package": None}


def test_a_machine_without_git_has_no_commit(monkeypatch):
    def absent(*command, **more):
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    about = timing.environment("cpu")
    assert about["commit"] is None and about["dirty"] is None and "threads" in about["device"]


def test_nothing_needs_datasets():
    code = "import sys; sys.modules['datasets'] = None; import bench.gpu_suite, bench.baselines"
    subprocess.run([sys.executable, "-c", code], cwd=timing.ROOT, check=True)


def test_without_a_gpu_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert "no CUDA GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("outcome", "breaks", "code"), [("passed", False, 0), ("FAILED: not finished after 1 s", False, 1), ("passed", True, 1)]
)
def test_the_command_runs_the_sections_and_ends_with_the_targets(suite, monkeypatch, capsys, outcome, breaks, code):
    done = []

    def section(name):
        def run():
            done.append((name, suite.about["tests"]))
            assert not breaks or name != "profile", "a kernel is wrong"

        return run

    for name in ("kernels", "baselines", "profile", "tiles"):
        monkeypatch.setattr(suite, name, section(name))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    installed = {"torch": "2", "peft": None, "pytest-xdist": None}
    monkeypatch.setattr(gpu_suite, "environment", lambda device: {"versions": installed})
    monkeypatch.setattr(gpu_suite, "Suite", lambda out, about: (suite.about.update(about), suite)[1])
    given = []
    monkeypatch.setattr(gpu_suite, "run_tests", lambda command, seconds: (given.append(seconds), outcome)[1])
    assert gpu_suite.main(["--minutes", "2"]) == code
    assert done == [(name, outcome) for name in ("kernels", "baselines", "profile", "tiles")]
    assert given[0] == pytest.approx(120 * gpu_suite.SHARES["tests"], abs=5)
    out = capsys.readouterr().out
    assert "absent: peft, pytest-xdist\n" in out
    assert "forward + backward, r=4: at most 1.5 x the base products alone" in out and "not measured (0 of 4 linears)" in out
    assert out.splitlines()[-1].endswith(f"{int(breaks)} failures; tests {outcome}")
    assert ("FAILED: profile: profile: AssertionError: a kernel is wrong" in out) == breaks
    assert {row["section"] for row in written(suite)} == {"targets"}


@pytest.mark.parametrize("arch", [0, 70, 89, 120])
def test_an_unknown_gpu_gets_the_defaults(arch):
    for op, bucket in tuned.DEFAULT:
        dtype = torch.float32 if bucket == "single" else torch.bfloat16
        assert tuned.launch(op, arch, dtype) == tuned.DEFAULT[op, bucket]
