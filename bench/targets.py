"""The targets beside what was measured: functions of the suite's rows."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from . import cases

BOUNDS = {32: 1.15, 256: 1.8}  # rank -> times the frozen base products alone
FASTER = {"grouped_mm": 2.0, "peft in turn": 10.0}  # baseline -> times as fast
FLAT_RANK, FLAT = 32, 0.10


class Target(NamedTuple):
    """One target. met: None where it was not measured, and `measured` then says what is missing."""

    what: str
    measured: str
    met: bool | None

    @property
    def line(self) -> str:
        answer = {None: "", True: "yes", False: "NO"}[self.met]
        return f"{self.what:72} {self.measured} {answer}".rstrip()


def comparable(batch: cases.Batch) -> bool:
    """Whether a batch has about as many rows in all as the study's, so that its cost per row can be set beside it."""
    return abs(batch.total - cases.STUDY.total) <= 0.05 * cases.STUDY.total


class Layer(NamedTuple):
    """Sums over the linears of a layer: how many were measured, p50 in microseconds, the baseline's, whether any of them is the
    time of the host's launches.
    """

    linears: int
    p50: float
    baseline: float
    host_bound: bool


def layer_of(rows: Sequence[dict], linears: Sequence[cases.Linear], /, **fields) -> Layer:
    """Of the rows with these fields, the sums over a layer."""
    found = {row["linear"]: row for row in rows if all(row.get(name) == value for name, value in fields.items())}
    measured = [found[linear.name] for linear in linears if linear.name in found]
    p50, baseline = (sum(row[name] for row in measured) for name in ("p50", "baseline_p50"))
    return Layer(len(measured), p50, baseline, any(row["host_bound"] for row in measured))


def costs(rows: Sequence[dict], linears: Sequence[cases.Linear], batches: Sequence[cases.Batch]) -> dict[int, float]:
    """Adapters -> nanoseconds a row of a layer, forward and backward, for the comparable batches that were measured whole."""
    found = {}
    for batch in sorted(filter(comparable, batches)):
        fields = {"section": "kernels", "kind": "chosen", "rank": FLAT_RANK, **batch._asdict()}
        layer = layer_of(rows, linears, **fields)
        if layer.linears == len(linears):
            found[batch.adapters] = 1e3 * layer.p50 / batch.total
    return found


def flatness(per_row: dict[int, float]) -> tuple[int, float] | None:
    """The number of adapters whose cost per row is farthest from one adapter's, and how far, signed; None without both."""
    if 1 not in per_row or len(per_row) < 2:
        return None
    away = {adapters: ns / per_row[1] - 1 for adapters, ns in per_row.items() if adapters != 1}
    return max(away.items(), key=lambda item: abs(item[1]))


def flatness_line(per_row: dict[int, float]) -> str:
    """Cost per row for each number of adapters, and the largest deviation from one adapter's."""
    each = ", ".join(f"{adapters}: {ns:.1f}" for adapters, ns in per_row.items()) or "not measured"
    worst = flatness(per_row)
    tail = "" if worst is None else f"; farthest from one adapter: {worst[1]:+.1%} at {worst[0]}"
    return f"cost per row by adapters, r={FLAT_RANK}, ns for a layer, forward + backward: {each}{tail}"


def targets(
    rows: Sequence[dict], linears: Sequence[cases.Linear] = cases.XLMR_BASE, batches: Sequence[cases.Batch] = cases.BATCHES
) -> list[Target]:
    """All targets, in the issue's order; what was not measured whole is not measured."""
    study, found = cases.STUDY._asdict(), []

    def add(what: str, met: Callable[[float], bool], **fields) -> None:
        layer = layer_of(rows, linears, **fields, **study)
        if layer.linears < len(linears):
            found.append(Target(what, f"not measured ({layer.linears} of {len(linears)} linears)", None))
        else:
            ratio = layer.p50 / layer.baseline
            found.append(Target(what, f"{ratio:.2f} x" + ", the host's launches" * layer.host_bound, met(ratio)))

    for rank, bound in BOUNDS.items():
        what = f"forward + backward, r={rank}: at most {bound} x the base products alone"
        add(what, lambda ratio, bound=bound: ratio <= bound, section="kernels", kind="chosen", rank=rank)
    for name, times in FASTER.items():
        for rank in BOUNDS:
            what = f"at least {times:g} x as fast as {name}, r={rank}"
            add(what, lambda ratio, times=times: ratio >= times, section="baselines", other=name, rank=rank)
    wanted = [batch.adapters for batch in sorted(filter(comparable, batches))]
    per_row = costs(rows, linears, batches)
    worst = flatness(per_row)
    what = f"cost per row of {', '.join(map(str, wanted))} adapters flat within {FLAT:.0%}, r={FLAT_RANK}"
    if worst is None or [*per_row] != wanted:
        found.append(Target(what, f"not measured ({', '.join(map(str, per_row)) or 'none'} of them)", None))
    else:
        found.append(Target(what, f"{worst[1]:+.1%} at {worst[0]} adapters", abs(worst[1]) <= FLAT))
    return found
