"""Shared by the tests of bench: small shapes, a clock that counts, and a GPU suite on the CPU made of them."""

import json

import torch

from bench import cases, kernels, profiled, timing
from bench.profiled import Event
from bench.timing import Sample
from kloss.models import XLMRConfig

SMALL = cases.Linear("small", 16, 32, 2)
PLAIN = cases.Linear("plain", 16, 16)
BATCH = cases.Batch(2, 4)
TOY = XLMRConfig(
    vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=5
)  # fmt: skip


class Clock:
    """Runs each function once; its samples are 10, 20, 30, ... microseconds, and a tenth of that on the host."""

    def __init__(self):
        self.time, self.seen = 0, set()

    def __call__(self, call):
        if call not in self.seen:
            self.seen.add(call)
            call()
        self.time += 10
        return Sample(float(self.time), self.time / 10)


def small_suite(tmp_path, monkeypatch):
    """A suite that writes into tmp_path, with the small shapes instead of the study's."""
    monkeypatch.setattr(timing, "L2_BYTES", 1)
    monkeypatch.setattr(cases, "STUDY", BATCH)
    monkeypatch.setattr(profiled, "BOUNDS", {4: 1.5})
    monkeypatch.setattr(profiled, "FLAT_RANK", 4)
    monkeypatch.setattr(kernels, "BASE", TOY)
    about = {**timing.environment("cpu"), "tests": "passed"}
    return kernels.Suite(tmp_path, about, clock=Clock(), device="cpu", seconds=0, dtype=torch.float32)


def written(suite):
    """The rows of the suite's file."""
    return [json.loads(line) for line in suite.file.read_text().splitlines()]


def small_problem(linear=SMALL, rank=16):
    """A problem of the small batch on the CPU."""
    return cases.make_problem(linear, BATCH, rank, device="cpu", dtype=torch.float32)


def events(*named, start=0.0):
    """Events of the GPU one after another."""
    events = []
    for name, us in named:
        events.append(Event(name, True, start, us))
        start += us
    return events
