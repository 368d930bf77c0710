"""What the multi-adapter linear refuses, before any backend."""

import pytest
import torch
from helpers import problem

from kloss.kernels import multi_lora_linear


def bad_problem(name, change):
    """A call with one argument changed: by a function of the tensor, or to a value."""
    case = problem([5], [0], adapters=2, k=32, n=96, slices=3, ranks=[3, 8], p=0.5)
    given = dict(zip(("x", "weight", "bias", "lora_a", "lora_b", "scaling", "segments"), case[:7], strict=True)) | case.keywords
    if name.startswith("dropout."):
        field = name.removeprefix("dropout.")
        return given | {"dropout": case.keywords["dropout"]._replace(**{field: change(getattr(case.keywords["dropout"], field))})}
    return given | {name: change(given[name]) if callable(change) else change}


FAULTS = {
    "weight dtype": ("weight", torch.Tensor.half, "one dtype"),
    "bias dtype": ("bias", torch.Tensor.half, "one dtype"),
    "x dtype": ("x", torch.Tensor.int, "one dtype"),
    "x without K": ("x", lambda x: x[:, :0], "must be at least 1"),
    "x of one dimension": ("x", lambda x: x[0], r"x \[T, K\]"),
    "x with too few rows": ("x", lambda x: x[:3], "x has 3 rows, the segments cover 5"),
    "weight": ("weight", lambda w: w[:, :9], r"^weight has shape \(96, 9\), expected \(96, 32\)"),
    "no outputs": ("weight", lambda w: w[:0], "must be at least 1"),
    "bias": ("bias", lambda b: b[:9], "^bias has shape"),
    "lora_a": ("lora_a", lambda a: a[:, :-1], "^lora_a has shape"),
    "lora_b": ("lora_b", lambda b: b[:, :3], "^lora_b has shape"),
    "adapters": ("lora_b", lambda b: b[:1], "^lora_b has shape"),
    "rank 0": ("lora_b", lambda b: b[..., :0], "must be at least 1"),
    "integer lora_a": ("lora_a", torch.Tensor.int, "expected float lora_a"),
    "scaling": ("scaling", lambda s: s[:1], "^scaling has shape"),
    "scaling dtype": ("scaling", torch.Tensor.double, "scaling in float32"),
    "slices 0": ("slices", 0, "0 slices"),
    "slices -3": ("slices", -3, "-3 slices"),
    "slices that do not divide": ("slices", 5, "96 outputs do not divide into 5 slices"),
    "number of ranks": ("ranks", lambda r: r[:1], "^ranks has shape"),
    "rank below 1": ("ranks", lambda r: r - 3, r"ranks must lie in 1..8, .*got 0..5"),
    "rank above R": ("ranks", lambda r: r + 1, r"ranks must lie in 1..8, .*got 4..9"),
    "float ranks": ("ranks", torch.Tensor.float, "integer dtype"),
    "row_key": ("dropout.row_key", lambda keys: keys[:2], "row_key has 2 entries, the rows are 5"),
    "p": ("dropout.p", lambda p: p[:1], r"^dropout.p has shape \(1,\), expected \(2,\)"),
    "seed": ("dropout.seed", lambda seed: seed[:1], "^dropout.seed has shape"),
    "p dtype": ("dropout.p", torch.Tensor.double, "^dropout.p is of torch.float64"),
    "p of 1": ("dropout.p", lambda p: p * 2, r"^dropout.p\[0\] is 1.0, expected a number in \[0, 1\)"),
    "p below 0": ("dropout.p", torch.Tensor.neg, r"^dropout.p\[0\] is -0.5, expected a number in \[0, 1\)"),
    "p not a number": ("dropout.p", lambda p: p * torch.nan, r"^dropout.p\[0\] is nan, expected a number in \[0, 1\)"),
    "seed dtype": ("dropout.seed", torch.Tensor.float, "^dropout.seed is of torch.float32"),
    "row_key dtype": ("dropout.row_key", torch.Tensor.int, "^dropout.row_key is of torch.int32"),
    "complex lora_a": ("lora_a", torch.Tensor.cfloat, "expected float lora_a"),
    "no backend": ("backend", "", "triton, hopper, csrc, torch or None, got ''"),
    "device": ("lora_b", lambda b: b.to("meta"), "lora_b is on meta, x on cpu"),
    "backend": ("backend", "cuda", "triton, hopper, csrc, torch or None, got 'cuda'"),
}


@pytest.mark.parametrize("backend", ["triton", "csrc", "torch", None])
@pytest.mark.parametrize(("name", "change", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_named(name, change, message, backend):
    """Before any backend, so all refuse the same calls in the same words."""
    with pytest.raises(ValueError, match=message):
        multi_lora_linear(**{"backend": backend} | bad_problem(name, change))


def test_triton_without_a_gpu_and_its_interpreter_is_refused(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="^backend 'triton' needs a GPU, or Triton's interpreter .*; got x on cpu"):
        multi_lora_linear(**bad_problem("backend", "triton"))


def test_a_backend_refuses_what_it_cannot_compute():
    case = problem([5], [0], adapters=1, k=20, n=24)
    tensors = case.x, case.weight, case.bias, case.lora_a, case.lora_b
    for backend, dtype, message in (("csrc", torch.float32, "multiples of 32; got torch.float32 on cpu, K 20, N 24, slices 1"),
                                    ("triton", torch.float64, "fp64"), ("csrc", torch.float64, "no fp64")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            multi_lora_linear(*(t.to(dtype) for t in tensors), case.scaling, case.segments, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "csrc", "torch"])
def test_vectors_with_gaps_are_their_values(backend):
    case = problem([5, 3, 4], [0, 1, 2], adapters=3, k=32, n=32, ranks=[3, 8, 5], p=0.5)
    keywords, dropout = case.keywords, case.keywords["dropout"]

    def gaps(vector):
        return torch.stack([vector, vector - 1], 1)[:, 0]

    spread = dropout._replace(p=gaps(dropout.p), seed=gaps(dropout.seed), row_key=gaps(dropout.row_key))
    wanted, got = (
        multi_lora_linear(*case[:5], scaling, case.segments, backend=backend, ranks=ranks, dropout=keys)
        for scaling, ranks, keys in (
            (case.scaling, keywords["ranks"], dropout),
            (gaps(case.scaling), gaps(keywords["ranks"]), spread),
        )
    )
    assert torch.equal(wanted, got)
