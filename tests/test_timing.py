"""Quantiles, rotation of inputs, launch-bound times, and what is said of the machine."""

from suite_parts import PLAIN, small_problem

from bench import timing
from bench.timing import Sample, Times


def test_quantiles_and_rotation():
    order = []
    calls = [lambda i=i: order.append(i) for i in range(3)]
    times = iter(range(100))

    def clock(call):
        call()
        at = next(times)
        return Sample(float(at), 100.0 - at)

    assert timing.measure(calls, clock, seconds=0) == (5.0, 8.0, 11.0, 93.0)
    assert order == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0], "inputs rotate, the first three are not counted"


def test_a_host_slower_than_the_sleep_is_named():
    assert not Times(1, 1, 1, timing.QUEUED_US).host_bound and Times(1, 1, 1, timing.QUEUED_US + 1).host_bound


def test_inputs_fill_twice_the_cache(monkeypatch):
    problem = small_problem(PLAIN, 4)
    monkeypatch.setattr(timing, "L2_BYTES", 3 * problem.bytes)
    assert len(timing.rotation(lambda seed: problem)) == 6
    monkeypatch.setattr(timing, "L2_BYTES", 1)
    assert len(timing.rotation(lambda seed: problem)) == 2
