"""Time of the multi-adapter linear beside peft and plain torch: `pytest tests/test_benchmarks.py --benchmark-only`.

Each table is one case on one device; the number in brackets is the time as a multiple of the fastest library's.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from helpers import DEVICES, assert_no_worse
from torch import Tensor

from bench.baselines import PeftLinear, torch_loop
from bench.cases import DROPOUT, Batch, Linear, Problem, forward_backward, forward_only, make_problem
from kloss.kernels import multi_lora_linear

CASES = {
    "52 adapters x 8 rows, 128 to 128, r=8": (Linear("attention output", 128, 128), Batch(52, 8), 8),
    "8 adapters x 48 rows, 768 to 3 x 768, r=32": (Linear("q, k, v", 768, 2304, 3), Batch(8, 48), 32),
}
DIRECTIONS = ("forward + backward", "forward")


def problem_of(case: str, device: str, dtype: torch.dtype = torch.float32) -> Problem:
    return make_problem(*CASES[case], device=device, dtype=dtype)


def kloss_calls(problem: Problem) -> tuple[Callable, Callable]:
    return forward_backward(problem, op=multi_lora_linear), forward_only(problem, op=multi_lora_linear)


def peft_calls(problem: Problem) -> tuple[Callable, Callable]:
    """One adapter at a time, as peft trains."""
    training, inference = PeftLinear(problem, DROPOUT if problem.dropout else 0.0), PeftLinear(problem, 0.0)

    @torch.no_grad()
    def forward():
        return torch.cat([torch.cat(inference.outputs(g, x), 1) for g, x in enumerate(inference.inputs)])

    return training.in_turn, forward


LIBRARIES = {"kloss": kloss_calls, "peft": peft_calls, "torch": torch_loop}


@cache
def check(library: str, case: str, device: str) -> None:
    """Hold y and all gradients, without dropout, to twice plain torch's error, once in a process and before any timing."""
    problem = problem_of(case, device)._replace(dropout=None)
    exact = problem._replace(**{name: t.double() for name, t in problem._asdict().items() if isinstance(t, Tensor)})
    both, forward = LIBRARIES[library](problem)
    results = PeftLinear(problem, 0.0).in_turn_results() if library == "peft" else both()
    plain, oracle, adapter = torch_loop(problem)[0](), torch_loop(exact)[0](), problem.segments.row_adapter
    rows = adapter, adapter, None, None, adapter
    for *values, group in zip((*results, forward()), (*plain, plain[0]), (*oracle, oracle[0]), rows, strict=True):
        assert_no_worse(*(value.detach() for value in values), group)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_the_libraries_compute_the_same(library, case, device):
    pytest.importorskip(library)
    check(library, case, device)


@pytest.mark.parametrize("library", LIBRARIES)  # varies fastest, so that slow drifts of the machine hit all
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("device", DEVICES)
def test_time(benchmark, library, direction, case, device):
    pytest.importorskip(library)
    check(library, case, device)
    torch.use_deterministic_algorithms(False)  # no poisoned memory while the clock runs
    call = LIBRARIES[library](problem_of(case, device))[DIRECTIONS.index(direction)]
    benchmark.group, benchmark.name = f"{device}, {case}, {direction}", library
    benchmark(call if device == "cpu" else lambda: (call(), torch.cuda.synchronize()))
