"""The feed-forward part as one function: values, gradients, isolation, who takes it."""

from functools import partial

import pytest
import torch
from helpers import PLACES, Problem, assert_no_worse, on_cpu, problem, sub_problem

import kloss.kernels as kernels
from kloss.kernels import feed_forward, lora_hopper, lora_shrink, lora_tiles, reference
from kloss.kernels.feed_forward import LoraLinear, multi_lora_feed_forward
from kloss.kernels.segments import with_work

CASES = {
    "several": dict(lengths=[70, 30, 5, 0], adapter=[0, 1, 1, 2], adapters=3, rank=16),
    "rows without an adapter": dict(lengths=[40, 7, 66], adapter=[0, 1, -1], adapters=2, rank=16),
    "rows behind": dict(lengths=[40, 7], adapter=[1, 0], adapters=2, rank=8, behind=5),
    "no order": dict(lengths=[9, 30, 9, 70], adapter=[1, 0, 1, 0], adapters=2, rank=8),
    "mixed ranks": dict(lengths=[9, 30, 66], adapter=[0, 1, 2], adapters=3, rank=32, ranks=[32, 3, 16]),
    "many ranks": dict(lengths=[9, 30, 70], adapter=[0, 1, 0], adapters=2, rank=160),
    "nobody": dict(lengths=[20], adapter=[-1], adapters=1, rank=8),
}
INNER, WIDTH = 40, 24


def two(dtype=torch.float32, device="cpu", inner=INNER, width=WIDTH, **shape) -> tuple[Problem, Problem]:
    make = partial(problem, dtype=dtype, device=device, **shape)
    return make(k=width, n=inner), make(k=inner, n=width, seed=1)


def outputs(op, up: Problem, down: Problem, dtype=None, weights=False) -> dict[str, torch.Tensor]:
    """y and the gradients of x and of the factors, and of the weights if asked; of the reference if op is None."""
    leaves = {"x": up.x}
    for name, case in (("up", up), ("down", down)):
        leaves |= {f"{name}.{field}": getattr(case, field) for field in ("weight", "bias", "lora_a", "lora_b")}
    leaves = {name: tensor.detach().clone().to(dtype or tensor.dtype) for name, tensor in leaves.items()}
    for name, tensor in leaves.items():
        tensor.requires_grad_(weights or name.endswith(("x", "lora_a", "lora_b")))
    linears = [[leaves[f"{name}.{field}"] for field in ("weight", "bias", "lora_a", "lora_b")] for name in ("up", "down")]
    if op is None:
        middle = reference.gelu(reference.multi_lora_linear(leaves["x"], *linears[0], up.scaling, up.segments, **up.keywords))
        y = reference.multi_lora_linear(middle, *linears[1], down.scaling, up.segments, **down.keywords)
    else:
        layers = [LoraLinear(*linear, case.keywords.get("dropout")) for linear, case in zip(linears, (up, down), strict=True)]
        y = op(leaves["x"], *layers, up.scaling, up.segments, ranks=up.keywords["ranks"])
    y.backward(down.dy.to(y.dtype))
    return {"y": y.detach(), **{name: _gradient(tensor) for name, tensor in leaves.items() if tensor.requires_grad}}


def _gradient(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad  # none without adapters


def assert_as_good(up: Problem, down: Problem, **more) -> None:
    """`assert_no_worse` than the two linears with gelu between them, adapter by adapter."""
    down = down._replace(scaling=up.scaling)
    got = outputs(multi_lora_feed_forward, up, down, **more)
    there = [on_cpu(case) for case in (up, down)]
    plain, oracle = outputs(None, *there, **more), outputs(None, *there, dtype=torch.float64, **more)
    for name in got:
        per_row = {"y": up.group, "x": up.group}.get(name)
        group = per_row if per_row is not None else torch.zeros(len(got[name])) if "weight" in name or "bias" in name else None
        assert_no_worse(got[name].cpu(), plain[name], oracle[name], group)


@pytest.fixture(autouse=True)
def few_rows_too(monkeypatch):
    monkeypatch.setattr(feed_forward, "LEAST", 0)


@pytest.fixture
def as_one(monkeypatch):
    """The kernels serve a CPU's tensors, in Triton's interpreter."""
    monkeypatch.setattr(feed_forward, "serves", lambda x: True)
    monkeypatch.setattr(feed_forward, "gelu", None)  # nobody calls it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name, p, dtype, as_one):
    assert_as_good(*two(dtype, p=p, **CASES[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_on_a_gpu(name, p, dtype, monkeypatch):
    """Rows in order with 16 ranks: Hopper's kernels, where there is one."""
    monkeypatch.setattr(feed_forward, "gelu", None)
    monkeypatch.setattr(lora_hopper, "LEAST", 0)
    up, down = two(dtype, "cuda", inner=512, width=256, p=p, **CASES[name])
    order = up.segments.order.cpu()
    in_order = torch.equal(order, torch.arange(len(order)))
    assert_as_good(*(case._replace(segments=case.segments._replace(sorted=in_order)) for case in (up, down)))


@pytest.mark.parametrize("device, dtype", [place for place in PLACES if torch.float32 not in getattr(place, "values", place)])
def test_every_value_is_rounded_as_gelu_is(device, dtype):
    """All values of 16 bits in -12..12: gelu and its slope have half a unit in the last place of error, and a little."""
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.abs() <= 12].to(device)
    x = torch.nn.functional.pad(x, (0, -len(x) % 64)).view(-1, 64)
    rows = len(x)
    segments = with_work(kernels.make_segments(*(torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, rows], [0])), 1))
    factor = torch.zeros(1, 16, 64, dtype=dtype, device=device)
    of_factor = lora_tiles.Factor(factor, *(factor.stride(i) for i in (0, 0, 1, 2)))
    given = x.double()
    below, density = torch.special.erfc(-given / 2**0.5) / 2, torch.exp(-(given**2) / 2) / (2 * torch.pi) ** 0.5
    exact = {"gelu": given * below, "slope": below + given * density}  # 1 + erf would lose the tail, in fp64 too
    for name, (input, before) in {"gelu": (x, None), "slope": (torch.ones_like(x), x)}.items():
        made, s = torch.empty_like(x), torch.empty(rows, 16, dtype=dtype, device=device)
        tiles = segments.work.tiles_64
        lora_shrink.shrink(input, of_factor, s, None, tiles, None, None, K=64, C=16, R=16, blocks=1, of_x=made, before=before)
        wanted, finfo = exact[name], torch.finfo(dtype)
        unit = finfo.eps * 2.0 ** wanted.abs().clamp(min=finfo.tiny).log2().floor()
        # The slope is a difference where it is about 0, so its error is that of its terms.
        slack = 0 if name == "gelu" else 1e-4 * (given * density).abs()
        slack += finfo.tiny + 2e-18 * (given < -9)  # a GPU's assembly takes numbers below the first for 0
        assert ((made.double() - wanted).abs() <= 0.51 * unit + 3e-5 * wanted.abs() + slack).all(), name


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_an_adapter_has_the_same_bits_alone(p, as_one):
    shape = dict(lengths=[70, 30, 65], adapter=[0, 1, 2], adapters=3, rank=8, p=p or 1e-9)
    up, down = two(torch.float16, **shape)
    up.lora_a[0] = torch.nan
    got = outputs(multi_lora_feed_forward, up, down)
    (up, rows), (down, _) = (sub_problem(case, [2], "cpu") for case in (up, down))
    alone = outputs(multi_lora_feed_forward, up, down)
    for name, value in alone.items():
        assert value.isfinite().all()
        assert torch.equal(got[name][rows] if name in ("x", "y") else got[name][2], value if name in ("x", "y") else value[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_exact_bits_do_not_depend_on_the_number_of_rows(dtype, monkeypatch):
    """Together there are as many rows as GELU within the kernels of S begins with, alone there are fewer."""
    monkeypatch.setattr(feed_forward, "LEAST", 100)
    monkeypatch.setattr(feed_forward, "serves", lambda x: True)
    exact = partial(multi_lora_feed_forward, exact=True)
    up, down = two(dtype, lengths=[70, 30, 65], adapter=[0, 1, 2], adapters=3, rank=8, p=0.5)
    together = outputs(exact, up, down)
    (up, rows), (down, _) = (sub_problem(case, [2], "cpu") for case in (up, down))
    for name, value in outputs(exact, up, down).items():
        own = together[name][rows] if name in ("x", "y") else together[name][2]
        assert torch.equal(own, value if name in ("x", "y") else value[2]), name


def test_gradients_written_where_they_are_wanted(as_one):
    up, down = two(**CASES["several"])
    wanted = outputs(multi_lora_feed_forward, up, down)
    layers, places = [], []
    for case, columns_apart in ((up, False), (down, True)):
        factors = [factor.clone().requires_grad_() for factor in (case.lora_a, case.lora_b)]
        # One place has no contiguous rows: the gradient is copied there.
        into = [torch.full(f.mT.shape, torch.nan).mT if columns_apart else torch.full_like(f, torch.nan) for f in factors]
        layers.append(LoraLinear(case.weight, case.bias, *factors, into=tuple(into)))
        places += into
    x = up.x.clone().requires_grad_()
    multi_lora_feed_forward(x, *layers, up.scaling, up.segments).backward(down.dy)
    assert torch.equal(x.grad, wanted["x"])
    names = "up.lora_a", "up.lora_b", "down.lora_a", "down.lora_b"
    for name, place in zip(names, places, strict=True):
        assert torch.equal(place, wanted[name]), name
    assert all(factor.grad is None for layer in layers for factor in layer[2:4])


def test_weights_that_are_trained_get_their_gradients(monkeypatch):
    """Then the two are linears of their own."""
    monkeypatch.setattr(feed_forward, "serves", lambda x: True)
    assert_as_good(*two(**CASES["several"]), weights=True)


def test_a_factor_that_was_changed_since_is_noticed(as_one):
    up, down = two(**CASES["several"])
    layers = [LoraLinear(case.weight, case.bias, case.lora_a.clone().requires_grad_(), case.lora_b) for case in (up, down)]
    y = multi_lora_feed_forward(up.x, *layers, up.scaling, up.segments)
    with torch.no_grad():
        layers[0].lora_a.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(down.dy)


def test_few_rows_are_two_linears(monkeypatch):
    monkeypatch.setattr(feed_forward, "serves", lambda x: True)
    monkeypatch.setattr(feed_forward, "LEAST", 105)
    calls, gelu = [], feed_forward.gelu
    monkeypatch.setattr(feed_forward, "gelu", lambda x: calls.append(len(x)) or gelu(x))
    for behind, alone in ((0, []), (-1, [104])):
        up, down = two(lengths=[70, 35 + behind], adapter=[0, 1], adapters=2, rank=8)
        outputs(multi_lora_feed_forward, up, down)
        assert calls == alone
