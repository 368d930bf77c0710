"""Shared by the tests of the GPU suite: small shapes, a clock that counts, and a suite on the CPU made of them."""

import json

import torch

from bench import cases, problems, surroundings, targets, timing
from bench import suite as sections
from bench.profiled import Event
from bench.timing import Taken
from kloss.models import XLMRConfig

SMALL = cases.Linear("small", 16, 32, 2)
PLAIN = cases.Linear("plain", 16, 16)
BATCH = cases.Batch(2, 4)
TOY = XLMRConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=5
)  # fmt: skip


class Clock:
    """Runs each call once per function that it sees, and says 10, 20, 30, ... microseconds; a tenth of it on the host."""

    def __init__(self):
        self.time, self.seen = 0, set()

    def __call__(self, call):
        if call not in self.seen:
            self.seen.add(call)
            call()
        self.time += 10
        return Taken(float(self.time), self.time / 10)


def small_suite(tmp_path, monkeypatch):
    """A suite that writes into tmp_path, with the small shapes in the place of the study's."""
    monkeypatch.setattr(timing, "L2_BYTES", 1)
    monkeypatch.setattr(cases, "STUDY", BATCH)
    monkeypatch.setattr(targets, "BOUNDS", {4: 1.5})
    monkeypatch.setattr(targets, "FLAT_RANK", 4)
    about = {**surroundings.environment("cpu"), "tests": "passed"}
    return sections.Suite(tmp_path, about, clock=Clock(), device="cpu", seconds=0, dtype=torch.float32)


def written(suite):
    return [json.loads(line) for line in suite.file.read_text().splitlines()]


def small_problem(linear=SMALL, rank=16):
    return problems.make_problem(linear, BATCH, rank, device="cpu", dtype=torch.float32)


def events(*named, start=0.0):
    """Events of the GPU one after another."""
    found = []
    for name, us in named:
        found.append(Event(name, True, start, us))
        start += us
    return found
