"""Shared by tests: the one assertion for kernels, and problems for the multi-adapter linear."""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from kloss.kernels import Dropout, Segments, make_segments, row_keys

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# Triton's interpreter multiplies bf16 blocks wrongly, so bf16 is for GPUs.
PLACES = [
    ("cpu", torch.float32),
    ("cpu", torch.float16),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
]


def assert_no_worse(result: Tensor, reference: Tensor, oracle: Tensor, group: Tensor | None = None) -> None:
    """Norm-wise error of each group at most twice that of plain torch in the same dtype, plus eps of that
    dtype.

    result, reference: the op's and the reference's output in one dtype. oracle: the reference's in fp64.
    group: int of the first dimension, one bound for each value; None: each entry of the first dimension is a
    group. NaN never passes.
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
    good = error <= 2 * plain + torch.finfo(result.dtype).eps * size
    worst = (~good).nonzero()[:5, 0].tolist()
    assert good.all(), [(g, f"{error[g]:.2e}", f"plain {plain[g]:.2e}", f"norm {size[g]:.2e}") for g in worst]


class Problem(NamedTuple):
    """Arguments of `multi_lora_linear`, the gradient of its output, and the group of each row (G: base model
    only).
    """

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
    """A random problem. lengths, adapter: of each sequence. behind: rows behind the last offset. The values
    depend on `seed`.
    """
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
    """y and the gradients of the tensors named in `grads`, in `dtype` (None: as they are), on the case's
    device.
    """
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
    return {"y": y.detach(), **{name: tensor.grad for name, tensor in tensors.items() if tensor.grad is not None}}


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
