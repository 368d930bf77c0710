"""The command of the GPU suite: shares of the time, the tests it starts, its exit code."""

import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from suite_parts import written

from bench import cases, compiled, gpu_suite, kernels, timing
from bench.kernels import Shape
from kloss.kernels import lora_tiles, tuned


def test_every_section_has_its_share_and_what_earlier_ones_left():
    ends = gpu_suite.deadlines(100.0, 9.0, list(gpu_suite.SHARES))
    assert list(ends) == ["tests", "first", "steps", "kernels", "baselines", "decisions"]
    assert sum(gpu_suite.SHARES.values()) == pytest.approx(1)
    assert list(ends.values())[-1] == pytest.approx(100 + 540)
    for (name, end), (_, begin) in zip(list(ends.items())[1:], ends.items(), strict=False):
        assert end - begin == pytest.approx(540 * gpu_suite.SHARES[name])
    assert all(first < second for first, second in pairwise(ends.values()))
    some = gpu_suite.deadlines(0.0, 1.0, ["kernels", "steps"])
    assert list(some) == ["steps", "kernels"] and some == pytest.approx({"steps": 30.0, "kernels": 60.0})


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
def test_the_outcome_of_the_tests(code, seconds, outcome, tmp_path):
    assert gpu_suite.run_tests([sys.executable, "-c", code], seconds, tmp_path / "log") == outcome


def test_tests_that_take_too_long_end_with_all_their_processes(tmp_path):
    pid = tmp_path / "pid"
    code = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
open({str(pid)!r}, "w").write(str(child.pid))
print("one PASSED", flush=True)
time.sleep(100)"""
    log = tmp_path / "log"
    assert gpu_suite.run_tests([sys.executable, "-c", code], 2.0, log) == "FAILED: not finished after 2 s"
    assert log.read_text().startswith("one PASSED\n") and "KeyboardInterrupt" in log.read_text(), "what had ended is known"
    state, until = Path(f"/proc/{pid.read_text()}/stat"), time.monotonic() + 10

    def lives() -> bool:
        try:
            return state.read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    while lives():
        assert time.monotonic() < until, "a child of the tests lives on"
        time.sleep(0.05)


def test_what_runs_beside_ends_with_its_block(monkeypatch):
    started, honest = [], subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **more: started.append(honest(*command, **more)) or started[-1])
    with pytest.raises(KeyError), gpu_suite.beside([sys.executable, "-c", "import time; time.sleep(100)"]):
        assert started[0].poll() is None
        raise KeyError("the suite broke")
    assert started[0].returncode == -signal.SIGKILL


def test_what_runs_beside_stands_still_where_the_wall_is_timed():
    def wait_for(state: str) -> None:
        until = time.monotonic() + 10
        while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != state:
            assert time.monotonic() < until
            time.sleep(0.01)

    with gpu_suite.beside([sys.executable, "-c", "while True: pass"]) as process:
        with pytest.raises(KeyError), gpu_suite.halted(process):
            wait_for("T")
            raise KeyError("the section broke")
        wait_for("R")
    with gpu_suite.halted(process), gpu_suite.halted(None):
        assert process.returncode == -signal.SIGKILL


def test_only_tests_for_a_gpu_run():
    command = gpu_suite.pytest_command(parallel=False)
    assert command[command.index("-m", 3) + 1 :] == ["gpu", *gpu_suite.files_for_a_gpu()] and "-n" not in command
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


def test_the_files_with_tests_for_a_gpu_are_those_that_have_some(request):
    """Of the files that this session collected: all of them where the whole suite runs."""
    collected = {item.path.name for item in request.session.items}
    marked = {item.path.name for item in request.session.items if item.get_closest_marker("gpu")}
    named = {Path(file).name for file in gpu_suite.files_for_a_gpu()}
    assert marked <= named and {"test_multi_lora.py", "test_triton_ops.py", "test_shared_bodies.py"} <= named
    assert len(named) < 12 and (named & collected == marked or collected - named == set())


@pytest.mark.parametrize(
    ("outcome", "breaks", "code"), [("passed", False, 0), ("FAILED: not finished after 1 s", False, 1), ("passed", True, 1)]
)
def test_the_command_runs_the_sections_in_order_of_worth_and_ends_with_the_targets(
    suite, monkeypatch, capsys, outcome, breaks, code
):
    done = []

    def part(name):
        def run(*arguments):
            done.append((name, suite.section, suite.about["tests"]))
            assert not breaks or name != "steps", "a kernel is wrong"

        return run

    for name in ("vendor", "steps", "kernels", "peft_step", "baselines"):
        monkeypatch.setattr(suite, name, part(name))
    monkeypatch.setattr(suite, "decide", lambda decision: part("first" if decision in gpu_suite.FIRST else "later")())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    installed = {"torch": "2", "peft": None, "pytest-xdist": None}
    monkeypatch.setattr(gpu_suite, "environment", lambda device: {"versions": installed, "device": "NVIDIA H200"})
    monkeypatch.setattr(gpu_suite, "Suite", lambda out, about: (suite.about.update(about), suite)[1])
    monkeypatch.setattr(gpu_suite.tuned, "arch_of", lambda device: 90)
    started, given = [], []

    def tests(command, seconds, log):
        given.append(seconds)
        log.write_text("".join(f"test {i} PASSED\n" for i in range(50)))
        return outcome

    monkeypatch.setattr(gpu_suite, "beside", lambda command: started.append(command) or nullcontext())
    monkeypatch.setattr(gpu_suite, "run_tests", tests)
    assert gpu_suite.main(["--minutes", "2"]) == code
    first, later = len(gpu_suite.FIRST) * ["first"], len(gpu_suite.LATER) * ["later"]
    assert [name for name, *_ in done] == ["vendor", *first, "steps", "kernels", "peft_step", "baselines", *later]
    assert {section for _, section, _ in done} == set(gpu_suite.SHARES) - {"tests"}
    assert {tests for *_, tests in done} == {outcome} and started[0][-2:] == ["--compile", "90"]
    assert given[0] == pytest.approx(120 * gpu_suite.SHARES["tests"], abs=5)
    out = capsys.readouterr().out
    assert "test 9 " not in out and "test 10 PASSED" in out and "test 49 PASSED" in out
    assert "absent: peft, pytest-xdist\n" in out and "tests marked for a GPU in tests/test_fuzz" not in out
    assert f"tests marked for a GPU in {' '.join(gpu_suite.files_for_a_gpu())}\n" in out
    assert "forward + backward, r=4: at most 1.5 x the base products alone" in out and "not measured (0 of 4 linears)" in out
    assert "whole step, 52 x 32 utterances, r=32: at most 18 ms on an H200 or 21 ms on an H100" in out
    assert out.count("tuned.TABLE shrink: not timed") == 2, "when it is decided, and at the end"
    assert out.splitlines()[-1].endswith(f"{int(breaks)} failures; tests {outcome}")
    assert ("FAILED: steps: steps: AssertionError: a kernel is wrong" in out) == breaks
    assert {row["section"] for row in written(suite)} == {"first", "decisions", "targets"}


def decided(name="tuned.TABLE shrink", **times):
    """Rows of a decision: candidate -> its times at the shapes."""
    return [
        {"decision": name, "candidate": label, "now": "BK=64", "p50": us} for label, each in times.items() for us in each
    ] + [{"decision": "another", "candidate": label, "now": "7", "p50": 0.1} for label in times]  # fmt: skip


TWO = gpu_suite.FIRST[1]._replace(candidates={"a": {}, "b": {}, "c": {}}, shapes=(Shape(0, 1), Shape(1, 1)))


@pytest.mark.parametrize(
    ("times", "end"),
    [
        (dict(now=[60, 47], a=[70, 30], b=[20, 100], c=[60, 47]), "BK=64 now, a faster by 7%"),
        (dict(now=[50, 50], a=[70, 40], b=[60, 60], c=[60, 61]), "BK=64 now, a slower by 10%"),
        (dict(now=[50, 50], a=[50, 50.5], b=[60, 60], c=[49.9, 49.9]), "BK=64 now, c the same"),
        (dict(now=[50, 50], a=[1], b=[60, 60]), "BK=64 now, b slower by 20%; not timed: a | c"),
        (dict(now=[50, 50]), "BK=64 now; not timed: a | b | c"),
        (dict(now=[50], a=[1, 1], b=[1, 1], c=[1, 1]), "not timed"),
    ],
)
def test_a_decision_names_the_fastest_over_all_shapes(times, end):
    assert gpu_suite.decision_line(TWO, decided(**times)) == f"tuned.TABLE shrink: {end}"


def test_a_decision_is_printed_and_written_once_it_is_made(suite, monkeypatch, capsys):
    """A failure ends its own decision only."""
    monkeypatch.setattr(suite, "decide", lambda decision: suite.rows.extend(decided(decision.name, now=[2, 2], b=[1, 2])))
    broken = TWO._replace(name="broken")
    honest = suite.decide
    monkeypatch.setattr(suite, "decide", lambda decision: honest(decision) if decision is not broken else 1 / 0)
    gpu_suite.decide(suite, [broken, TWO._replace(decides="who multiplies")])
    last, line = written(suite)[-1], "tuned.TABLE shrink: BK=64 now, b faster by 33%; not timed: a | c"
    assert last["line"] == line and last["decides"] == "who multiplies" and line in capsys.readouterr().out
    assert [row["line"] for row in written(suite)] == ["broken: not timed", line] and "ZeroDivisionError" in suite.failed[0]


def launched(decision, settings, arch):
    """What the launchers of a decision's shapes ask for: kernels, grids' lists and all numbers."""
    requests = []
    for shape in decision.shapes or (Shape(0, 0),):
        with pytest.MonkeyPatch.context() as patch, kernels.changed(settings, arch):
            patch.setattr(cases, "STUDY", shape.batch or cases.STUDY)
            linear = cases.XLMR_BASE[shape.linear]
            exact = kernels.ALONE.get(decision.timed, ("", False))[1]
            sizes = dict(k=linear.k, n=linear.n, slices=linear.slices, rank=shape.rank, exact=exact)
            variant = next((v for v in compiled.variants() if v.get("op") == decision.timed), sizes)
            for launch in compiled.all_launches(arch, **variant):
                kernel = kernels.ALONE.get(decision.timed, (launch.kernel,))[0]
                numbers = {k: tuple(v.shape) if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
                requests += [(launch.kernel, numbers)] * (kernel == launch.kernel)
    return requests


IN_TRITON = [decision for decision in gpu_suite.DECISIONS if decision.timed != "chosen"]  # others choose who computes


@pytest.mark.parametrize("decision", IN_TRITON, ids=lambda decision: decision.name)
def test_every_candidate_changes_what_is_launched_on_an_h100(decision):
    """So none is the same as what is set now, or as another one."""
    now = launched(decision, {}, 90)
    others = [launched(decision, settings, 90) for settings in decision.candidates.values()]
    assert now and all(other != now for other in others) and all(a != b for i, a in enumerate(others) for b in others[:i])


def test_decisions_have_names_of_their_own_and_say_what_is_set():
    assert len({decision.name for decision in gpu_suite.DECISIONS}) == len(gpu_suite.DECISIONS)
    for decision in gpu_suite.DECISIONS:
        assert kernels.set_now(decision, 90) not in decision.candidates and decision.decides
    (steps,) = (decision for decision in gpu_suite.DECISIONS if decision.name == "lora_tiles.SUM_STEP")
    assert kernels.set_now(steps, 90) == str(lora_tiles.SUM_STEP)
    changes = gpu_suite.entries("fused", dict(BC=256), dict(num_stages=4, BC=64))
    assert kernels.set_now(gpu_suite.FIRST[0]._replace(candidates=changes), 80) == "BC=128, num_stages=2"


@pytest.mark.parametrize("arch", [0, 70, 89, 120])
def test_an_unknown_gpu_gets_the_defaults(arch):
    for op, bucket in tuned.DEFAULT:
        dtype = torch.float32 if bucket == "single" else torch.bfloat16
        assert tuned.launch(op, arch, dtype) == tuned.DEFAULT[op, bucket]
