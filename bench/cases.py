"""The cases that are compiled, timed and estimated: linears of XLM-R and its other ops, batches, their work, data and checks."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kloss import kernels
from kloss.kernels import Dropout, Segments, attention_lists, make_segments, multi_lora_linear, reference
from kloss.models import XLMRConfig

PEAK_FLOPS, PEAK_BYTES = 788e12, 4.3e12  # an H200, measured: bf16 products of random data; a copy, read and written
DROPOUT = 0.1
triton_linear = partial(multi_lora_linear, backend="triton")


def chosen_linear(x: Tensor, *rest: Any, **keywords: Any) -> Tensor:
    """What a call gets on a GPU; on a CPU Triton's kernels in the interpreter."""
    return multi_lora_linear(x, *rest, backend=None if x.is_cuda else "triton", **keywords)


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

    @property
    def comparable(self) -> bool:
        """Whether it has the study's number of rows within 5 %, so that their costs per row compare."""
        return abs(self.total - STUDY.total) <= 0.05 * STUDY.total


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


def step_work(config: XLMRConfig, tokens: int, adapters: int, rank: int, parameters: int, size: int = 2) -> dict[str, float]:
    """Seconds at the roofline of the parts of a step, as `profiled.PARTS` names them. parameters: of all adapters' bank.

    Linears as in `lora_work`; of all else the bytes that must move, for AdamW 28 a parameter: its moments are fp32, gradient
    and copy have 16 bits.
    """
    width, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    linears = (Linear("qkv", width, 3 * width, 3), Linear("out", width, width), Linear("up", width, inner))
    linears += (Linear("down", inner, width),)
    batch = Batch(adapters, tokens // adapters)
    lora = [work for linear in linears for work in lora_work(linear, batch, rank, size)]
    row = size * tokens * width / PEAK_BYTES  # seconds to move [T, H] once
    pairs = {part: sum(work.seconds for work in lora if work.name in part.split(", ")) for part in ("S, dS", "y, dx", "dA, dB")}
    return {
        **{part: layers * seconds for part, seconds in pairs.items()},
        "attention": layers * (4 + 7) * row,  # qkv, out; qkv, dout, dqkv
        "add_norm": layers * 2 * (3 + 5) * row,  # x, residual, y; dy, x, residual, dx, dresidual
        "GELU": layers * (2 + 3) * row * inner / width,
        "embeddings": 2 * row,
        "AdamW": 28 * parameters / PEAK_BYTES,
    }


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
    """Arguments of `multi_lora_linear`, and dy, on one device. Rows are sorted by adapter."""

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
    def counts(self) -> list[int]:
        """The rows of each adapter."""
        return self.segments.cu_seqlens.diff().tolist()

    @property
    def bytes(self) -> int:
        """Size of the large tensors."""
        return sum(t.numel() * t.element_size() for t in (self.x, self.dy, self.weight, self.lora_a, self.lora_b))


def make_problem(
    linear: Linear,
    batch: Batch,
    rank: int,
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    counts: Sequence[int] | None = None,
) -> Problem:
    """Random data of a linear and a batch, rows sorted by adapter as the packer leaves them.

    counts: the rows of each adapter, batch.total together; None: equally many.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape, std=1.0):
        return (torch.randn(*shape, device=device, generator=generator) * std).to(dtype)

    _, k, n, slices = linear
    adapters, t = batch.adapters, batch.total
    ends = accumulate([batch.rows] * adapters if counts is None else counts, initial=0)
    cu_seqlens = torch.tensor([*ends], dtype=torch.int32, device=device)
    segments = make_segments(cu_seqlens, torch.arange(adapters, dtype=torch.int32, device=device), adapters, rows=t)
    segments = segments._replace(sorted=True)
    ones = torch.ones(adapters, device=device)
    dropout = Dropout(ones * DROPOUT, torch.arange(adapters, device=device), torch.arange(t, device=device), 3)
    return Problem(
        normal(t, k), normal(n, k, std=k**-0.5), normal(n), normal(adapters, slices * rank, k, std=k**-0.5),
        normal(adapters, n, rank, std=rank**-0.5), ones, segments, dropout, normal(t, n), slices,
    )  # fmt: skip


def forward_backward(problem: Problem, *, exact: bool = False, op: Callable = chosen_linear) -> Callable[[], tuple[Tensor, ...]]:
    """A call of the multi-adapter linear that returns y and the gradients of x, A and B."""
    _, weight, bias, _, _, scaling, segments, dropout, dy, slices = problem
    x, lora_a, lora_b = leaves = [t.detach().requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]

    def call() -> tuple[Tensor, ...]:
        y = op(x, weight, bias, lora_a, lora_b, scaling, segments, slices=slices, dropout=dropout, exact=exact)
        return y, *torch.autograd.grad(y, leaves, dy)

    return call


def forward_only(problem: Problem, *, op: Callable = chosen_linear) -> Callable[[], Tensor]:
    """A call for inference that returns y, without gradients and without dropout."""
    x, weight, bias, lora_a, lora_b, scaling, segments, _, _, slices = problem
    return torch.no_grad()(lambda: op(x, weight, bias, lora_a, lora_b, scaling, segments, slices=slices))


def base_alone(problem: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    """The floor: the frozen base product and its dx, by the vendor."""
    return lambda: (torch.addmm(problem.bias, problem.x, problem.weight.t()), problem.dy @ problem.weight)


def base_on_top(problem: Problem) -> Callable[[], tuple[Tensor, Tensor]]:
    """The same products, added to what is there: what the vendor does where the LoRA term comes first."""
    y, dx = (torch.zeros_like(side) for side in (problem.dy, problem.x))
    return lambda: (y.addmm_(problem.x, problem.weight.t()), dx.addmm_(problem.dy, problem.weight))


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


@lru_cache(maxsize=64)
def expected(
    linear: Linear, batch: Batch, rank: int, device: str, dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor]:
    """What the reference says of a problem in dtype and in fp64: y, dx, dA, dB of both; y of inference of both."""
    problem = make_problem(linear, batch, rank, device=device, dtype=dtype)
    sides = [on_cpu(problem, kind) for kind in (dtype, torch.float64)]
    both = (forward_backward(side, op=reference.multi_lora_linear)() for side in sides)
    return *both, *(forward_only(side, op=reference.multi_lora_linear)() for side in sides)


ALL_FORMS = ("chosen", "exact", "forward only")


def check(linear: Linear, batch: Batch, rank: int, *, device: str, dtype: torch.dtype, forms: Sequence[str] = ALL_FORMS) -> None:
    """Check forms of the op at this linear, with at most 4 adapters and 1100 rows of each.

    y and all gradients may be off from fp64 at most twice as far as plain torch, by the norm of each adapter's share.
    Raises AssertionError before anything of that shape is timed.
    """
    few = Batch(min(4, batch.adapters), min(batch.rows, 1100))
    plain, truth, plain_y, true_y = expected(linear, few, rank, device, dtype)
    problem = make_problem(
        linear, few, rank, device=device, dtype=dtype
    )  # anew: lists follow from settings that may have changed
    for form in forms:
        where = f"{linear.name}, r={rank}, {form}"
        if form == "forward only":
            compare(("y",), where, [forward_only(problem)()], [plain_y], [true_y], few.adapters)
        else:
            ours = forward_backward(problem, exact=form == "exact")()
            compare(("y", "dx", "dA", "dB"), where, ours, plain, truth, few.adapters)


def compare(
    names: Sequence[str], where: str, ours: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], groups: int = 1
) -> None:
    """Raise AssertionError for a result that is further from `truth` than twice plain torch and eps, by the norm of each group.

    plain: in our dtype. truth: in fp64. groups: equal parts of the first dimension.
    """
    for name, *values in zip(names, ours, plain, truth, strict=True):
        result, same, right = (value.detach().cpu().double().reshape(groups, -1) for value in values)
        size = right.norm(dim=1)
        error, allowed = ((value - right).norm(dim=1) for value in (result, same))
        allowed = 2 * allowed + torch.finfo(values[0].dtype).eps * size
        g = int((error / allowed).argmax())  # the first NaN, where there is one
        assert error[g] <= allowed[g], (
            f"{name} at {where}: adapter {g} is off by {error[g] / size[g]:.1e}, allowed {allowed[g] / size[g]:.1e}"
        )


class Part(NamedTuple):
    """A call of an op of the encoder beside its linears. run: of `kernels` or `reference`, on the leaves. dy: of its output."""

    run: Callable[..., Tensor]
    leaves: tuple[Tensor, ...]
    dy: Tensor

    def forward_backward(self, home: Any = kernels, dtype: torch.dtype | None = None) -> Callable[[], tuple[Tensor, ...]]:
        """A call that returns the output and the gradients of the leaves. dtype: None leaves the leaves' own."""
        leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in self.leaves]

        def call() -> tuple[Tensor, ...]:
            y = self.run(home, *leaves)
            return y, *torch.autograd.grad(y, leaves, self.dy.to(y.dtype))

        return call


PARTS = ("attention", "add_norm", "loss")


def make_part(
    op: str, config: XLMRConfig, lengths: Tensor, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> Part:
    """Random data of an op of PARTS: the same on every device. lengths: int64 [S], one learner for every 32 sequences."""
    generator, width = torch.Generator().manual_seed(seed), config.hidden_size

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device, torch.int32)
    T, learner = int(lengths.sum()), torch.arange(len(lengths), dtype=torch.int32) // 32
    adapters = int(learner[-1]) + 1
    segments = make_segments(cu_seqlens, learner.to(device), adapters, rows=T)
    labels = torch.randint(0, config.num_labels, (T,), generator=generator).to(device)
    p, numbers = torch.full((adapters,), DROPOUT, device=device), torch.arange(T, device=device)
    dropout = Dropout(p, numbers[:adapters], numbers, 3, segments.row_adapter)
    if op == "attention":
        qkv, heads = normal(T, 3 * width), config.num_attention_heads
        lists = attention_lists(cu_seqlens, qkv)

        def attend(home: Any, qkv: Tensor) -> Tensor:
            own = {"lists": lists} if home is kernels else {}
            return home.packed_attention(qkv, cu_seqlens, heads, dropout=dropout, **own)

        return Part(attend, (qkv,), normal(T, width))
    if op == "add_norm":
        weight, bias = normal(width), normal(width)
        return Part(
            lambda home, x, y: home.add_norm(x, y, weight.to(x.dtype), bias.to(x.dtype), 1e-5, dropout=dropout),
            (normal(T, width), normal(T, width)), normal(T, width),
        )  # fmt: skip
    assert op == "loss", op
    return Part(lambda home, x: home.token_loss(x, labels, segments)[0], (normal(T, config.num_labels),), normal(adapters))


def check_part(op: str, config: XLMRConfig, *, device: str, dtype: torch.dtype) -> None:
    """Check an op of PARTS, with sequences of every class of attention. Raises AssertionError."""
    lengths = torch.tensor([3, 16, 17, 33, 64, 65, 97, 12])
    part, plain = (make_part(op, config, lengths, device=where, dtype=dtype) for where in (device, "cpu"))
    sides = part.forward_backward(), *(plain.forward_backward(reference, kind) for kind in (dtype, torch.float64))
    compare(("y", "dx", "dresidual")[: 1 + len(part.leaves)], op, *(side() for side in sides))
