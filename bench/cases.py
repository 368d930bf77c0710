"""The cases that are compiled, timed and estimated: linears of XLM-R, batches of a study, their work, their data."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from kloss.kernels import Dropout, Segments, make_segments, multi_lora_linear, reference

PEAK_FLOPS, PEAK_BYTES = 788e12, 4.3e12  # an H200, measured: bf16 products of random data; a copy, read and written
DROPOUT = 0.1
triton_linear = partial(multi_lora_linear, backend="triton")


class Linear(NamedTuple):
    """A linear layer of the model. k, n: inputs, outputs. slices: products fused into one."""

    name: str
    k: int
    n: int
    slices: int = 1


XLMR_BASE = (
    Linear("q, k, v", 768, 2304, 3),
    Linear("attention output", 768, 768),
    Linear("feed-forward up", 768, 3072),
    Linear("feed-forward down", 3072, 768),
)
WIDTHS = (768, 1024, 2304, 3072, 4096)
RANKS = (8, 16, 32, 64, 128, 256)
STUDY_RANKS = (32, 64, 256)


class Batch(NamedTuple):
    """Shape of a packed batch. rows: of each adapter."""

    adapters: int
    rows: int

    @property
    def total(self) -> int:
        return self.adapters * self.rows


STUDY = Batch(52, 384)
BATCHES = (Batch(1, 19_968), Batch(8, 2496), STUDY, Batch(256, 78), Batch(1024, 19), Batch(1, 384))


class KernelWork(NamedTuple):
    """The least work of one kernel: FLOPs, and bytes of all tensors moved once."""

    name: str
    flops: float
    bytes: float

    @property
    def seconds(self) -> float:
        """Time at the roofline."""
        return max(self.flops / PEAK_FLOPS, self.bytes / PEAK_BYTES)


def base_work(linear: Linear, rows: int, size: int = 2) -> list[KernelWork]:
    """The frozen base products alone, forward and dx: the floor. size: bytes of an element."""
    flops = 2.0 * rows * linear.k * linear.n
    moved = size * (rows * (linear.k + linear.n) + linear.k * linear.n)
    return [KernelWork("base forward", flops, moved), KernelWork("base dx", flops, moved)]


def lora_work(linear: Linear, batch: Batch, rank: int, size: int = 2) -> list[KernelWork]:
    """The kernels of a fused forward and backward with dropout. size: bytes of an element."""
    t, (_, k, n, slices) = batch.total, linear
    sr = slices * rank
    a, b = size * batch.adapters * sr * k, size * batch.adapters * n * rank
    s, x, y, w = size * t * sr, size * t * k, size * t * n, size * k * n
    flops_a, flops_b, flops_w = 2.0 * t * k * sr, 2.0 * t * n * rank, 2.0 * t * k * n
    return [
        KernelWork("S", flops_a, x + a + s), KernelWork("y", flops_w + flops_b, x + w + s + b + y),
        KernelWork("dS", flops_b, y + b + s), KernelWork("dx", flops_w + flops_a, y + w + s + a + x),
        KernelWork("dA", flops_a, x + s + a), KernelWork("dB", flops_b, y + s + b),
    ]  # fmt: skip


def roofline() -> list[dict]:
    """Estimates for all linears of a layer of XLM-R base at the study's batch, for each rank.

    Each kernel's FLOPs, bytes and time; then their sum as a ratio to the base products alone, in sequence and overlapped.
    """
    rows = []
    for rank in STUDY_RANKS:
        work = [item for linear in XLMR_BASE for item in lora_work(linear, STUDY, rank)]
        floor = sum(item.seconds for linear in XLMR_BASE for item in base_work(linear, STUDY.total))
        for name in dict.fromkeys(item.name for item in work):
            same = [item for item in work if item.name == name]
            rows.append({
                "rank": rank, "kernel": name, "gflop": sum(item.flops for item in same) / 1e9,
                "mbytes": sum(item.bytes for item in same) / 1e6, "us": sum(item.seconds for item in same) * 1e6,
            })  # fmt: skip
        total = sum(item.seconds for item in work)
        # Where memory-bound kernels run beside compute-bound ones, the larger of both sums is left.
        compute, memory = sum(item.flops for item in work) / PEAK_FLOPS, sum(item.bytes for item in work) / PEAK_BYTES
        ratios = {"ratio_to_base_alone": total / floor, "ratio_overlapped": max(compute, memory) / floor}
        rows.append({"rank": rank, "kernel": "all", "us": total * 1e6, **ratios})
    return rows


class Problem(NamedTuple):
    """Arguments of `multi_lora_linear`, and dy, on one device. Every adapter has equally many rows."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    segments: Segments
    dropout: Dropout | None
    dy: Tensor
    slices: int

    @property
    def bytes(self) -> int:
        """Size of the large tensors."""
        return sum(t.numel() * t.element_size() for t in (self.x, self.dy, self.weight, self.lora_a, self.lora_b))


def make_problem(
    linear: Linear, batch: Batch, rank: int, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Problem:
    """Random data of a linear and a batch, rows sorted by adapter as the packer leaves them."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, device=device, generator=generator) * std).to(dtype)

    _, k, n, slices = linear
    adapters, t = batch.adapters, batch.total
    cu_seqlens = torch.arange(adapters + 1, dtype=torch.int32, device=device) * batch.rows
    segments = make_segments(cu_seqlens, torch.arange(adapters, dtype=torch.int32, device=device), adapters, rows=t)
    ones = torch.ones(adapters, device=device)
    dropout = Dropout(ones * DROPOUT, torch.arange(adapters, device=device), torch.arange(t, device=device), 3)
    return Problem(
        normal(t, k), normal(n, k, std=k**-0.5), normal(n), normal(adapters, slices * rank, k, std=k**-0.5),
        normal(adapters, n, rank, std=rank**-0.5), ones, segments, dropout, normal(t, n), slices,
    )  # fmt: skip


def forward_backward(problem: Problem, *, exact: bool = False, op: Callable = triton_linear) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the multi-adapter linear that returns y and the gradients of x, A and B."""
    _, weight, bias, _, _, scaling, segments, dropout, dy, slices = problem
    x, lora_a, lora_b = leaves = [t.detach().requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]

    def call() -> tuple[Tensor, ...]:
        y = op(x, weight, bias, lora_a, lora_b, scaling, segments, slices=slices, dropout=dropout, exact=exact)
        return y, *torch.autograd.grad(y, leaves, dy)

    return call


def forward_only(problem: Problem, *, op: Callable = triton_linear) -> Callable[[], Tensor]:
    """A call for inference that returns y, without gradients and without dropout."""
    x, weight, bias, lora_a, lora_b, scaling, segments, _, _, slices = problem
    return torch.no_grad()(lambda: op(x, weight, bias, lora_a, lora_b, scaling, segments, slices=slices))


def base_alone(problem: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    """The floor: the frozen base product and its dx, by the vendor."""
    return lambda: (torch.addmm(problem.bias, problem.x, problem.weight.t()), problem.dy @ problem.weight)


def base_forward(problem: Problem) -> Callable[[], Tensor]:
    """The floor of inference: the base product alone, by the vendor."""
    return lambda: torch.addmm(problem.bias, problem.x, problem.weight.t())


def on_cpu(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same problem on the CPU with its tensors in another dtype; scaling and dropout keep theirs."""
    floats = {name: getattr(problem, name).cpu().to(dtype) for name in ("x", "weight", "bias", "lora_a", "lora_b", "dy")}
    segments, masks = problem.segments, problem.dropout
    segments = make_segments(segments.cu_seqlens.cpu(), segments.adapter.cpu(), segments.num_adapters)
    if masks is not None:
        masks = Dropout(masks.p.cpu(), masks.seed.cpu(), masks.row_key.cpu(), masks.site)
    return problem._replace(**floats, scaling=problem.scaling.cpu(), segments=segments, dropout=masks)


def check(linear: Linear, batch: Batch, rank: int, *, device: str, dtype: torch.dtype) -> None:
    """Check every timed form of the op at this linear, with at most 4 adapters and 1100 rows of each.

    y and all gradients may be off from fp64 at most twice as far as plain torch, by the norm of each adapter's share.
    Raises AssertionError before anything of that shape is timed.
    """
    few = Batch(min(4, batch.adapters), min(batch.rows, 1100))
    problem = make_problem(linear, few, rank, device=device, dtype=dtype)
    plain, exact = (on_cpu(problem, kind) for kind in (dtype, torch.float64))

    def compare(form: str, ours: tuple[Tensor, ...], same: tuple[Tensor, ...], fp64: tuple[Tensor, ...]) -> None:
        for name, *values in zip(("y", "dx", "dA", "dB"), ours, same, fp64, strict=False):
            result, plain, truth = (value.detach().cpu().double().reshape(few.adapters, -1) for value in values)
            size = truth.norm(dim=1)
            error, allowed = ((value - truth).norm(dim=1) for value in (result, plain))
            allowed = 2 * allowed + torch.finfo(dtype).eps * size
            g = int((error / allowed).argmax())  # the first NaN, where there is one
            assert error[g] <= allowed[g], (
                f"{name} at {linear.name}, r={rank}, {form}: adapter {g} is off by {error[g] / size[g]:.1e}, "
                f"allowed {allowed[g] / size[g]:.1e}"
            )

    same, fp64 = (forward_backward(side, op=reference.multi_lora_linear)() for side in (plain, exact))
    compare("chosen", forward_backward(problem)(), same, fp64)
    compare("exact", forward_backward(problem, exact=True)(), same, fp64)
    same, fp64 = (forward_only(side, op=reference.multi_lora_linear)() for side in (plain, exact))
    compare("forward only", (forward_only(problem)(),), (same,), (fp64,))
