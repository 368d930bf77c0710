"""A run's threads, the memory it keeps, and what it says of a machine that is slow."""

import subprocess
import sys

import pytest
import torch

from kloss import machine
from kloss.machine import default_threads, memory_of_host, on_threads, remarks


@pytest.mark.parametrize(
    ("quota", "count"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 2), ("1000 100000", 1), ("6400000 100000", 8), ("odd", 8)],
)
def test_a_containers_quota_limits_the_threads(tmp_path, monkeypatch, quota, count):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    file = tmp_path / "cpu.max"
    assert default_threads(file) == 8, "no quota"
    file.write_text(quota + "\n")
    assert default_threads(file) == count


def test_threads_are_set_for_a_block_only():
    before = torch.get_num_threads()
    with pytest.raises(KeyError), on_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with on_threads(before):
            assert torch.get_num_threads() == before
        raise KeyError
    assert torch.get_num_threads() == before
    with on_threads(0):
        assert torch.get_num_threads() == default_threads()


def test_what_makes_a_run_slow_is_said_once(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1.9, 0, 0))
    monkeypatch.setattr(machine, "built", lambda: True)
    assert remarks(cpu) == []
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (2.5, 0, 0))
    (line,) = remarks(cpu)
    assert "load 2.5" in line and "--threads 1 may be faster than 2" in line
    monkeypatch.setattr(machine, "built", lambda: False)
    assert "C++ kernels are not built" in remarks(cpu)[0] and len(remarks(cpu)) == 2
    assert remarks(torch.device("cuda", 0)) == []


FAULTS = """
import resource, torch
from kloss.machine import keep_memory
if {keep}:
    keep_memory()
def step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.empty(40 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print([step() for _ in range(6)][-1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_once_used_stays():
    """Once the heap is as large as needed, large tensors fault no page in; else each one of 40 MB faults in its 10,240."""
    faults = [
        int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], check=True, capture_output=True).stdout)
        for keep in (False, True)
    ]
    assert faults[0] > 10_000 and faults[1] < 100, faults


def test_memory_is_what_the_control_groups_allow(tmp_path, monkeypatch):
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 20}  # 4 GiB
    monkeypatch.setattr(machine.os, "sysconf", pages.__getitem__)
    groups, own = tmp_path / "cgroup", tmp_path / "own"
    assert memory_of_host(groups, own) == 4 << 30
    own.write_text("0::/outer/inner\n")
    (groups / "outer" / "inner").mkdir(parents=True)
    assert memory_of_host(groups, own) == 4 << 30
    for name, text, expected in (("outer/inner", "max", 4 << 30), ("outer", str(1 << 30), 1 << 30), (".", str(1 << 29), 1 << 29)):
        (groups / name / "memory.max").write_text(text + "\n")
        assert memory_of_host(groups, own) == expected
    (groups / "memory.max").write_text(str(1 << 40))
    assert memory_of_host(groups, own) == 1 << 30
