"""Shared by tests: the one assertion for kernels, and problems for the multi-adapter linear."""

import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from kloss.kernels import Dropout, Segments, make_segments, reference, row_keys

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Triton's interpreter multiplies bf16 blocks wrongly, so bf16 is for GPUs.
PLACES = [
    ("cpu", torch.float32),
    ("cpu", torch.float16),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
]


def assert_no_worse(result: Tensor, reference: Tensor, oracle: Tensor, group: Tensor | None = None, *, floor: float = 1) -> None:
    """Norm-wise error of each group at most twice that of plain torch in the same dtype, plus `floor` of that dtype's eps.

    result: the op's output.
    reference: the reference's in the same dtype, which is plain torch in that dtype.
    oracle: the reference's in fp64.
    group: int, a bound for each value; its entries belong to the first dimension. None: each entry is a group.
    floor: above 1 for random calls only; among a thousand, plain torch is nearly exact in some by chance.
    NaN never passes.
    """
    assert result.shape == reference.shape == oracle.shape, (result.shape, reference.shape, oracle.shape)
    assert result.dtype == reference.dtype, (result.dtype, reference.dtype)
    group = torch.arange(result.shape[0]) if group is None else group.long().cpu()
    oracle = oracle.double().cpu().flatten(1) if oracle.dim() > 1 else oracle.double().cpu()[:, None]

    def norms(values: Tensor) -> Tensor:
        squares = values.double().cpu().reshape(oracle.shape).square().sum(1)
        return torch.zeros(int(group.max()) + 1, dtype=torch.double).index_add(0, group, squares).sqrt()

    error, plain = (norms(values.double().cpu().reshape(oracle.shape) - oracle) for values in (result, reference))
    size = norms(oracle)
    good = error <= 2 * plain + floor * torch.finfo(result.dtype).eps * size
    worst = (~good).nonzero()[:5, 0].tolist()
    assert good.all(), [(g, f"{error[g]:.2e}", f"plain {plain[g]:.2e}", f"norm {size[g]:.2e}") for g in worst]


def fuzz_examples(cases: int) -> int:
    """Return how many cases a fuzzer tries: `cases`, or KLOSS_FUZZ times as many."""
    return cases * int(os.environ.get("KLOSS_FUZZ", 1))


class Problem(NamedTuple):
    """Arguments of `multi_lora_linear`, the gradient of its output, and each row's group: its adapter, or G for base rows."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    segments: Segments
    keywords: dict
    dy: Tensor
    group: Tensor


def problem(
    lengths, adapter, *, adapters, k=20, n=24, rank=8, slices=1, ranks=None, p=0.0, behind=0, bias=True,
    dtype=torch.float32, device="cpu", seed=0,
) -> Problem:  # fmt: skip
    """A random problem; its values depend on `seed`. lengths, adapter: per sequence. behind: rows behind the last offset."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rows = int(cu_seqlens[-1])
    adapter = torch.tensor(adapter, dtype=torch.int32)
    segments = make_segments(cu_seqlens.to(device), adapter.to(device), adapters)
    scaling = (torch.rand(adapters, generator=generator) + 0.5).to(device)
    keywords = {"slices": slices, "ranks": None if ranks is None else torch.tensor(ranks, device=device)}
    if p:
        # Each sequence's key counts within its learner, as the packer's does.
        within = torch.tensor([int((adapter[:s] == adapter[s]).sum()) for s in range(len(lengths))])
        keys = row_keys(torch.full((len(lengths),), 5), within, cu_seqlens).to(device)
        chances = torch.full((adapters,), p, device=device)
        keywords["dropout"] = Dropout(chances, (torch.arange(adapters) * 7 + 3).to(device), keys, 3)
    group = torch.cat([segments.row_adapter.cpu(), torch.full((behind,), -1, dtype=torch.int32)])
    return Problem(
        normal(rows + behind, k), normal(n, k, scale=k**-0.5), normal(n) if bias else None,
        normal(adapters, slices * rank, k, scale=k**-0.5), normal(adapters, n, rank, scale=rank**-0.5), scaling,
        segments, keywords, normal(rows + behind, n), torch.where(group < 0, adapters, group),
    )  # fmt: skip


LEAVES = ("x", "weight", "bias", "lora_a", "lora_b")


def outputs(op, case: Problem, dtype=None, grads=LEAVES, **more) -> dict[str, Tensor]:
    """y and the gradients of the tensors named in `grads`, in `dtype` (None: as they are)."""
    tensors = {}
    for name in LEAVES:
        tensor = getattr(case, name)
        if tensor is not None:
            tensors[name] = tensor.detach().to(dtype or tensor.dtype).requires_grad_(name in grads)
    y = op(
        tensors["x"], tensors["weight"], tensors.get("bias"), tensors["lora_a"], tensors["lora_b"], case.scaling,
        case.segments, **case.keywords, **more,
    )  # fmt: skip
    if grads:
        y.backward(case.dy.to(y.dtype))
    leaves = {name: tensor for name, tensor in tensors.items() if name in grads}  # without adapters lora_a has no gradient
    return {"y": y.detach(), **{name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in leaves.items()}}


def on_cpu(case: Problem) -> Problem:
    """The same problem for the reference."""
    moved = [t.cpu() if isinstance(t, Tensor) else t for t in case]
    keywords = dict(case.keywords)
    if keywords.get("ranks") is not None:
        keywords["ranks"] = keywords["ranks"].cpu()
    if "dropout" in keywords:
        keywords["dropout"] = Dropout(*(t.cpu() if isinstance(t, Tensor) else t for t in keywords["dropout"]))
    segments = make_segments(case.segments.cu_seqlens.cpu(), case.segments.adapter.cpu(), case.segments.num_adapters)
    return Problem(*moved)._replace(segments=segments, keywords=keywords)


def assert_as_good(op, case: Problem, **more) -> None:
    """y and every gradient of a multi-adapter linear: `assert_no_worse` than the reference, adapter by adapter."""
    got, plain = outputs(op, case, **more), outputs(reference.multi_lora_linear, on_cpu(case))
    oracle = outputs(reference.multi_lora_linear, on_cpu(case), torch.float64)
    assert got.keys() == plain.keys()
    for name in got:
        whole = torch.zeros(got[name].shape[0])
        group = {"y": case.group, "x": case.group, "weight": whole, "bias": whole}.get(name)
        assert_no_worse(got[name].cpu(), plain[name], oracle[name], group)


def sub_problem(case, sequences, device):
    """The problem with only these sequences, in this order, with their keys and values; and their rows of x."""
    cu, adapter = case.segments.cu_seqlens.tolist(), case.segments.adapter
    rows = torch.cat([torch.arange(cu[s], cu[s + 1]) for s in sequences]).to(device)
    lengths = torch.tensor([0, *(cu[s + 1] - cu[s] for s in sequences)]).cumsum(0).to(torch.int32)
    keywords = dict(case.keywords)
    keywords["dropout"] = case.keywords["dropout"]._replace(row_key=case.keywords["dropout"].row_key[rows])
    adapter = adapter[torch.tensor(sequences, device=device)]
    part = make_segments(lengths.to(device), adapter, case.segments.num_adapters)
    return case._replace(x=case.x[rows], dy=case.dy[rows], segments=part, keywords=keywords), rows


def only_adapter(case, g):
    """The problem in a bank that holds nothing but adapter g."""
    dropout = case.keywords["dropout"]
    own = {**case.keywords, "dropout": dropout._replace(p=dropout.p[g : g + 1], seed=dropout.seed[g : g + 1])}
    part = make_segments(case.segments.cu_seqlens, torch.zeros_like(case.segments.adapter), 1)
    values = {name: getattr(case, name)[g : g + 1] for name in ("lora_a", "lora_b", "scaling")}
    return case._replace(segments=part, keywords=own, **values)


def assert_company_does_not_matter(op, **shape) -> None:
    """Learner 1 in six companies; its rows of y and dx and its gradients never change a bit."""
    sequences = [4, 20, 7, 50, 9, 1, 2], [0, 1, 2, 1, 3, 1, -1]
    case = problem(*sequences, adapters=5, p=0.5, **shape)
    device = case.x.device
    sick = case._replace(x=case.x.clone(), lora_a=case.lora_a.clone(), lora_b=case.lora_b.clone(), dy=case.dy.clone())
    others = (case.group != 1).to(device)
    sick.x[others], sick.dy[others] = float("nan"), float("inf")
    sick.lora_a[[0, 2, 3]] = sick.lora_b[[0, 2, 3]] = float("nan")
    companies = {
        "together": (case, range(7)),
        "alone": (case, [1, 3, 5]),
        "shuffled": (case, [6, 4, 1, 2, 0, 3, 5]),
        "beside NaN": (sick, range(7)),
        "with one neighbour": (case, [1, 3, 2, 5]),
        "in a bank of its own": (case, [1, 3, 5]),
    }
    wanted = None
    for name, (source, sequences) in companies.items():
        part, rows = sub_problem(source, list(sequences), device)
        index = 1
        if name == "in a bank of its own":
            part, index = only_adapter(part, 1), 0
        got = outputs(op, part, grads=("x", "lora_a", "lora_b"), exact=True)
        mine = (case.group.to(device)[rows] == 1).nonzero()[:, 0]
        mine = mine[rows[mine].argsort()]
        bits = got["y"][mine], got["x"][mine], got["lora_a"][index], got["lora_b"][index]
        assert all(one.isfinite().all() for one in bits), name
        wanted = wanted or bits
        assert all(torch.equal(one, other) for one, other in zip(bits, wanted, strict=True)), name


def batches(k: list[int], n: list[int]):
    """A hypothesis strategy for keywords of `problem`: any lengths, owners, ranks, slices. k, n: widths, n of one slice."""

    @st.composite
    def draw_batch(draw):
        adapters, rank, slices = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 8, 17])), draw(st.sampled_from([1, 1, 3]))
        length = st.one_of(st.integers(0, 3), st.sampled_from([64, 65]))
        sequences = draw(st.lists(st.tuples(length, st.integers(-1, adapters - 1)), min_size=1, max_size=5))
        ranks = draw(st.none() | st.lists(st.integers(1, rank), min_size=adapters, max_size=adapters))
        return dict(
            lengths=[length for length, _ in sequences], adapter=[owner for _, owner in sequences], adapters=adapters,
            k=draw(st.sampled_from(k)), n=slices * draw(st.sampled_from(n)), rank=rank, slices=slices, ranks=ranks, p=0.5,
            behind=draw(st.integers(0, 2)), seed=draw(st.integers(0, 99)),
        )  # fmt: skip

    return draw_batch()


def assert_each_adapter_is_alone(op, case: Problem) -> None:
    """Each adapter's rows of y and dx and its gradients are, to the bit, those of a batch with its sequences only; an adapter
    without rows gets zero gradients; all other rows get the base model's value."""
    together = outputs(op, case, grads=("x", "lora_a", "lora_b"), exact=True)
    device = case.x.device
    for g in range(case.segments.num_adapters):
        sequences = [s for s, owner in enumerate(case.segments.adapter.tolist()) if owner == g]
        part, rows = sub_problem(case, sequences, device) if sequences else (None, torch.empty(0))
        if not rows.numel():
            assert not together["lora_a"][g].count_nonzero() and not together["lora_b"][g].count_nonzero(), g
            continue
        alone = outputs(op, part, grads=("x", "lora_a", "lora_b"), exact=True)
        pairs = (together["y"][rows], alone["y"]), (together["x"][rows], alone["x"])
        pairs += tuple((together[name][g], alone[name][g]) for name in ("lora_a", "lora_b"))
        assert all(torch.equal(one, other) and one.isfinite().all() for one, other in pairs), g
    free = (case.group == case.segments.num_adapters).to(device)
    torch.testing.assert_close(together["y"][free], torch.nn.functional.linear(case.x[free], case.weight, case.bias))
    torch.testing.assert_close(together["x"][free], case.dy[free] @ case.weight)
