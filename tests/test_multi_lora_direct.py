"""Eager layers on a CPU, whose linear is one autograd function: to the bit what the operator computes."""

import pytest
import torch
from helpers import outputs, problem
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

import kloss
from kloss import kernels
from kloss.kernels import multi_lora_cpu, multi_lora_direct

pytestmark = pytest.mark.skipif(not multi_lora_cpu.built(), reason="csrc is not built")

IDS, WIDTH = [2, -1, 0, 2], 64
KINDS = {
    "linear": lambda: nn.Linear(WIDTH, 96),
    "without bias": lambda: nn.Linear(WIDTH, 96, bias=False),
    "Conv1D": lambda: Conv1D(96, WIDTH),
}


class Watch(TorchDispatchMode):
    """Somebody who looks at operators, and wants to see those of kloss."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.fixture
def served(monkeypatch):
    """How many layers were computed directly."""
    calls, linear = [], multi_lora_direct.linear
    monkeypatch.setattr(multi_lora_direct, "linear", lambda *args, **rest: (calls.append(1), linear(*args, **rest))[1])
    return calls


def adapted(kind="linear", **settings):
    """A linear with four adapters, A and B random."""
    torch.manual_seed(0)
    model = kloss.attach(nn.Sequential(KINDS[kind]()), 4, **{"rank": 8, **settings}).train()
    model[0].lora_b.data.normal_()
    for g, rank in enumerate(model[0].shared.ranks):
        model[0].lora_b.data[g, :, rank:] = 0
    return model


def results(model, x, dy, ids=IDS, step=3):
    """y, dx and the gradients of A and B."""
    x = x.detach().requires_grad_(x.requires_grad)
    with kloss.use_adapters(model, ids, step=step):
        y = model(x)
    wanted = [x] if x.requires_grad else []
    return [y.detach(), *torch.autograd.grad(y, [*wanted, model[0].lora_a, model[0].lora_b], dy)]


@pytest.mark.parametrize("shape", [(4, WIDTH), (4, 5, WIDTH), (4, 3, 2, WIDTH)], ids=str)
@pytest.mark.parametrize("settings", [{}, {"rank": [8, 3, 1, 5]}, {"rank": 17, "dropout": [0.5, 0.0, 0.1, 0.3]}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_has_the_bits_of_the_operator(kind, settings, shape, served, monkeypatch):
    model = adapted(kind, **settings)
    x, dy = torch.randn(shape).requires_grad_(), torch.randn(*shape[:-1], 96)
    for given, gradient in (
        (x, dy),
        (x.detach(), dy),
        (x, dy[..., :1].expand_as(dy)),
        (x, dy.transpose(0, -2).reshape(dy.shape)),
    ):
        served.clear()
        got = results(model, given, gradient)
        assert served == [1]
        with monkeypatch.context() as patched:
            patched.setattr(multi_lora_direct, "serves", lambda *_: False)
            wanted = results(model, given, gradient)
        assert served == [1] and len(got) == 3 + given.requires_grad
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
        assert got[-1][2].any() and not got[-1][3].any() and not got[-2][1].any(), "adapters of the batch, and no others"


@pytest.mark.parametrize(
    "more", [{}, {"bias": False, "dtype": torch.float16}, {"ranks": [8, 1, 5]}, {"p": 0.4, "behind": 2}], ids=str
)
@pytest.mark.parametrize("slices", [1, 3])
def test_the_public_function_has_the_bits_of_the_operator(slices, more, served):
    """It computes directly unless a backend is asked for, which is an operator's."""
    case = problem([5, 0, 7, 3, 300], [2, 1, -1, 0, 2], adapters=3, k=64, n=96, slices=slices, **more)
    got = outputs(kernels.multi_lora_linear, case)
    assert served == [1]
    wanted = outputs(kernels.multi_lora_linear, case, backend="csrc")
    assert served == [1] and all(torch.equal(got[name], wanted[name]) for name in wanted)
    exact = outputs(kernels.multi_lora_linear, case, exact=True)
    assert served == [1] and exact.keys() == got.keys() and got["y"].dtype == case.x.dtype


def test_only_plain_layers_that_nobody_watches(served):
    model, x, dy = adapted(), torch.randn(4, 5, WIDTH), torch.randn(4, 5, 96)
    wanted = results(model, x, dy)
    assert served == [1]
    with Watch():
        got = results(model, x, dy)
    assert served == [1] and all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert results(model, x, dy.bfloat16())[0].dtype == torch.bfloat16
    results(model, torch.randn(4, 5, 2 * WIDTH)[..., :WIDTH], dy)  # BLAS may sum in another order for other strides
    results(model.double(), x.double(), dy.double())
    assert served == [1]
    model.float()
    with kloss.use_adapters(model, IDS), torch.no_grad():
        assert torch.equal(model(x), wanted[0]) and served == [1, 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_layer_that_trains_has_the_bits_of_the_operator(kind, served, monkeypatch):
    model, x, dy = adapted(kind).requires_grad_(), torch.randn(4, 5, WIDTH), torch.randn(4, 5, 96)
    gradients = []
    for serves in (multi_lora_direct.serves, lambda *_: False):
        monkeypatch.setattr(multi_lora_direct, "serves", serves)
        with kloss.use_adapters(model, IDS, step=3):
            y = model(x)
        gradients.append(torch.autograd.grad(y, [*model.parameters()], dy))
    assert served == [1] and len(gradients[0]) == 3 + (kind != "without bias")
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_backward_under_autocast_has_the_same_bits():
    model, x, dy = adapted(), torch.randn(4, 5, WIDTH).requires_grad_(), torch.randn(4, 5, 96)
    with kloss.use_adapters(model, IDS, step=3):
        y = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, [x, model[0].lora_a, model[0].lora_b], dy)
    assert all(torch.equal(a, b) for a, b in zip(got, results(model, x, dy)[1:], strict=True))


def test_a_second_derivative_is_an_error():
    model, x = adapted(), torch.randn(4, 5, WIDTH).requires_grad_()
    with kloss.use_adapters(model, IDS):
        y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_only_wanted_gradients_are_computed():
    model, x = adapted(), torch.randn(4, 5, WIDTH)
    whole = results(model, x, torch.ones(4, 5, 96))
    for frozen, other, i in (("lora_a", "lora_b", 2), ("lora_b", "lora_a", 1)):
        getattr(model[0], frozen).requires_grad_(False)
        with kloss.use_adapters(model, IDS, step=3):
            model(x).sum().backward()
        assert getattr(model[0], frozen).grad is None and torch.equal(getattr(model[0], other).grad, whole[i])
        getattr(model[0], frozen).requires_grad_()
        model.zero_grad()


@pytest.mark.parametrize("rank", [1, 5, 8, 16, 17], ids=lambda rank: f"rank {rank}")
@pytest.mark.parametrize("drops", [False, True], ids=["whole", "dropout"])
def test_many_small_adapters_have_the_bits_that_they_have_beside_a_large_one(rank, drops):
    """Twenty small ones are a job each in backward; beside one of 300 rows they are not."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [g * 3 % 40 for g in range(20)] + [300]
    small, rows = sum(sizes[:-1]), sum(sizes)
    x, dy = (torch.randn(rows, width, generator=generator) for width in (64, 1056))
    a, b = torch.randn(21, rank, 64, generator=generator), torch.randn(21, 1056, rank, generator=generator)
    weight, ends = torch.randn(1056, 64, generator=generator), torch.tensor([0, *sizes]).cumsum(0).int()
    p, seed = torch.full((21,), 0.25 * drops), torch.arange(21)
    results = []
    for adapters, T in ((20, small), (21, rows)):
        segments = kernels.make_segments(ends[: adapters + 1], torch.arange(adapters), adapters)
        leaves = [t.clone().requires_grad_() for t in (x[:T], a[:adapters], b[:adapters])]
        dropout = kernels.Dropout(p[:adapters], seed[:adapters], torch.arange(T), 0) if drops else None
        y = kernels.multi_lora_linear(
            leaves[0], weight, None, *leaves[1:], torch.ones(adapters), segments, dropout=dropout, exact=True, backend="csrc"
        )
        dx, d_a, d_b = torch.autograd.grad(y, leaves, dy[:T])
        results.append([y[:small], dx[:small], d_a[:20], d_b[:20]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][2][1:].any(-1).any(-1).sum() == 19 and not results[0][2][0].any()
