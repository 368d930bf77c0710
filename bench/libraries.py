"""The libraries that `bench.crossover` times. One more is a function of a `cases.Problem` that gives a call, and a line here."""

import shutil
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kloss.kernels import multi_lora_linear

from .baselines import HubLinear, PeftLinear, grouped_mm, torch_loop
from .cases import (
    DROPOUT,
    Batch,
    Linear,
    Problem,
    base_alone,
    base_forward,
    forward_backward,
    forward_only,
    make_problem,
)  # fmt: skip
from .timing import versions

MOST_PEFT, MOST_HUB = 32, 256  # adapters: adding more takes too long, a minute for peft's 1024
Make = Callable[[Problem], Callable[[], Any]]


class Library(NamedTuple):
    """A library for one direction.

    make: the call that is timed.
    results: a call that returns what kloss's does, for the check; None: `make`'s does.
    most: adapters; of more that many are timed, and their time is scaled. None: any number.
    packages: that it needs besides torch.
    """

    make: Make
    results: Make | None = None
    most: int | None = None
    packages: tuple[str, ...] = ()


def _p(problem: Problem) -> float:
    return DROPOUT if problem.dropout else 0.0


def _linear(kind: Callable[[Problem, float], Any], package: str, most: int, timed: str, results: str | None = None) -> Library:
    """A library by methods of a linear: of a PeftLinear or a HubLinear."""

    def made(name: str) -> Make:
        return lambda problem: getattr(kind(problem, _p(problem)), name)

    return Library(made(timed), made(results) if results else None, most, (package, "transformers"))


_hub = partial(_linear, HubLinear, "adapters", MOST_HUB)
_peft = partial(_linear, PeftLinear, "peft", MOST_PEFT)
_placed = partial(_linear, partial(PeftLinear, switched=False), "peft", MOST_PEFT)  # without set_adapter
KLOSS, GROUPED, FLOOR = "kloss", "torch, grouped_mm", "the base alone"  # no library: what is left without adapters
TRAINING: dict[str, Library] = {
    KLOSS: Library(partial(forward_backward, op=multi_lora_linear)),
    "peft": _peft("in_turn", "in_turn_results"),
    "peft without set_adapter": _placed("in_turn", "in_turn_results"),
    "peft, a mixed batch": _placed("mixed_training", "mixed_results"),
    "AdapterHub, a mixed batch": _hub("training", "results"),
    "torch, a loop": Library(lambda problem: torch_loop(problem)[0]),
    GROUPED: Library(lambda problem: grouped_mm(problem, _p(problem))),
    FLOOR: Library(base_alone),
}
INFERENCE: dict[str, Library] = {
    KLOSS: Library(partial(forward_only, op=multi_lora_linear)),
    "peft, a mixed batch": _peft("mixed"),
    "AdapterHub, a mixed batch": _hub("inference"),
    "torch, a loop": Library(lambda problem: torch_loop(problem)[1]),
    FLOOR: Library(base_forward),
}
COMPILED: dict[str, Library] = {  # checks itself, since each shape takes half a minute to compile
    KLOSS: INFERENCE[KLOSS],
    "peft, a mixed batch": INFERENCE["peft, a mixed batch"],
    "peft, a mixed batch, compiled": Library(
        lambda problem: PeftLinear(problem, 0.0).mixed_compiled(), packages=("peft", "transformers")
    ),
}


def why_absent(device: str) -> dict[str, str]:
    """Libraries that do not run here, and why, each in a line."""
    found = versions(("peft", "transformers", "adapters"))
    reasons: dict[str, str] = {}
    for name, library in (TRAINING | INFERENCE | COMPILED).items():
        missing = [package for package in library.packages if not found[package]]
        if missing:
            reasons[name] = f"{' and '.join(missing)} not installed"
        elif reason := next(filter(None, map(_fails, library.packages)), None):
            reasons[name] = f"{reason} (transformers {found['transformers']})"
    if device == "cpu":
        reasons[GROUPED] = "torch has it for GPUs"
    if device == "cpu" and shutil.which("g++") is None:
        reasons["peft, a mixed batch, compiled"] = "torch.compile needs g++"
    return reasons


def _fails(package: str) -> str | None:
    """Why a package does not import; None: it does."""
    try:
        import_module(package)
    except ImportError as error:
        return f"{package} {versions([package])[package]} does not import: {str(error).split(' (')[0]}"
    return None


def check(rank: int, width: int, device: str, dtype: torch.dtype, absent: dict[str, str]) -> dict[str, str]:
    """Hold all results, without dropout and for rows in unequal numbers, to twice the error of plain torch.

    Returns what is not to be timed: libraries that are further off or fail, and how. Raises AssertionError where kloss is off.
    """
    problem = make_problem(Linear("square", width, width), Batch(3, 5), rank, device=device, dtype=dtype, counts=(6, 3, 6))
    problem, failed = problem._replace(dropout=None), dict[str, str]()
    exact = problem._replace(**{name: t.double() for name, t in problem._asdict().items() if isinstance(t, Tensor)})
    for libraries, direction in ((TRAINING, 0), (INFERENCE, 1)):
        plain, oracle = (_tensors(torch_loop(side)[direction]()) for side in (problem, exact))
        allowed = [2 * error + torch.finfo(dtype).eps for error in _errors(plain, oracle)]
        for name in libraries.keys() - absent.keys() - {FLOOR}:
            if reason := _wrong(libraries[name], problem, oracle, allowed):
                assert name != KLOSS, f"kloss {reason}"
                failed[name] = reason
    return failed


def _wrong(library: Library, problem: Problem, oracle: list[Tensor], allowed: list[float]) -> str | None:
    """What is wrong with a library's results; None: nothing."""
    try:
        errors = _errors(_tensors((library.results or library.make)(problem)()), oracle)
    except RuntimeError as error:  # torch's, of a shape or a device that a library cannot do
        return f"fails: {str(error).splitlines()[0]}"
    wrong = [error for error, most in zip(errors, allowed, strict=True) if not error <= most]
    return f"is off by {wrong}; allowed is {allowed}" if wrong else None


def _tensors(results: Tensor | tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else [*results]


def _errors(results: list[Tensor], oracle: list[Tensor]) -> list[float]:
    """How far each is off, as a share of its norm."""
    pairs = zip(results, oracle, strict=True)
    return [((a.double().reshape(b.shape) - b).norm() / b.norm()).item() for a, b in pairs]
