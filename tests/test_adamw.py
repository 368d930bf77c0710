"""adapter_adamw_ against torch.optim.AdamW with clipping, row by row."""

import pytest
import torch
from torch import Tensor

import kloss.kernels as kernels
from kloss.kernels import reference

BETAS, EPS = (0.9, 0.999), 1e-8


class Rows:
    """A bank of random rows with every row's own hyper-parameters and optimiser state."""

    def __init__(
        self, op=kernels.adapter_adamw_, dtype=torch.float32, width=37, rates=(1e-3, 3e-2, 1e-4, 0.5),
        decays=(0.01, 0.0, 0.3, 0.1), clips=(1.0, 0.5, torch.inf, 2.0),
    ):  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        self.op = op
        self.param = torch.randn(len(rates), width, generator=generator).to(dtype)
        self.moments = torch.zeros_like(self.param), torch.zeros_like(self.param)
        self.step = torch.zeros(len(rates), dtype=torch.long)
        self.rates, self.decays, self.clips = torch.tensor(rates), torch.tensor(decays), torch.tensor(clips)

    def update(self, grad: Tensor, active: Tensor) -> Tensor:
        return self.op(
            self.param, grad, *self.moments, self.step, self.rates,
            betas=BETAS, eps=EPS, weight_decay=self.decays, max_norm=self.clips, active=active,
        )  # fmt: skip

    def state(self, g: int) -> list[Tensor]:
        return [tensor[g].clone() for tensor in (self.param, *self.moments, self.step)]


@pytest.mark.parametrize(
    ("op", "dtype", "norm_tolerance", "tolerance"),
    [(kernels.adapter_adamw_, torch.float32, 1e-6, 2e-6), (reference.adapter_adamw_, torch.float64, 1e-12, 1e-12)],
    ids=["runs", "reference"],
)
def test_100_steps_equal_torch_adamw_with_clipping(op, dtype, norm_tolerance, tolerance):
    rows = Rows(op, dtype)
    theirs = [torch.nn.Parameter(row.clone()) for row in rows.param]
    optimizers = [
        torch.optim.AdamW([p], lr=float(rows.rates[g]), betas=BETAS, eps=EPS, weight_decay=float(rows.decays[g]))
        for g, p in enumerate(theirs)
    ]
    generator = torch.Generator().manual_seed(1)
    clipped = torch.zeros(4, dtype=torch.long)
    for step in range(100):
        # Gradients from far above to far below the clip norms; rows take part in different steps.
        grad = torch.randn(rows.param.shape, generator=generator, dtype=dtype) * 10 ** float(
            torch.randint(-4, 2, (), generator=generator)
        )
        active = torch.tensor([True, step % 2 == 0, step % 7 != 3, step > 40])
        norms = rows.update(grad, active)
        for g in range(4):
            if not active[g]:
                assert norms[g] == 0
                continue
            theirs[g].grad = grad[g].clone()
            norm = torch.nn.utils.clip_grad_norm_([theirs[g]], float(rows.clips[g]))
            torch.testing.assert_close(norms[g], norm, rtol=norm_tolerance, atol=0)
            clipped[g] += bool(norm > rows.clips[g])
            optimizers[g].step()
    assert rows.step.tolist() == [100, 50, 86, 59]
    assert clipped[2] == 0 and all(0 < clipped[g] < rows.step[g] for g in (0, 1, 3)), clipped
    for g, wanted in enumerate(theirs):
        state = optimizers[g].state[wanted]
        for mine, other in zip(rows.state(g), (wanted.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=False):
            assert (mine - other).norm() <= tolerance * other.norm(), g


@pytest.mark.parametrize("op", [kernels.adapter_adamw_, reference.adapter_adamw_], ids=["runs", "reference"])
def test_an_idle_row_is_untouched_to_the_bit(op):
    rows = Rows(op)
    generator = torch.Generator().manual_seed(2)
    everyone = torch.ones(4, dtype=torch.bool)
    rows.update(torch.randn(rows.param.shape, generator=generator), everyone)
    before = rows.state(1), rows.state(2)
    norms = rows.update(torch.randn(rows.param.shape, generator=generator), torch.tensor([True, False, True, True]))
    assert norms[1] == 0 and (norms[[0, 2, 3]] > 0).all() and rows.step.tolist() == [2, 1, 2, 2]
    assert all(torch.equal(a, b) for a, b in zip(rows.state(1), before[0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(rows.state(2), before[1], strict=True))


@pytest.mark.parametrize("op", [kernels.adapter_adamw_, reference.adapter_adamw_], ids=["runs", "reference"])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_a_gradient_that_is_not_finite_is_untouched_and_reported(poison, op):
    rows, alone = Rows(op), Rows(op)
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(rows.param.shape, generator=generator)
    everyone = torch.ones(4, dtype=torch.bool)
    for one in (rows, alone):
        one.update(grad, everyone)
    before = rows.state(2)
    sick = grad.clone()
    sick[2, 5] = poison
    norms = rows.update(sick, everyone)
    wanted = alone.update(grad, everyone)
    assert not torch.isfinite(norms[2]) and torch.equal(norms[[0, 1, 3]], wanted[[0, 1, 3]])
    assert all(torch.equal(a, b) for a, b in zip(rows.state(2), before, strict=True)) and rows.step.tolist() == [2, 2, 1, 2]
    for g in (0, 1, 3):
        assert all(torch.equal(a, b) for a, b in zip(rows.state(g), alone.state(g), strict=True))


def test_a_row_equals_itself_among_other_rows():
    generator = torch.Generator().manual_seed(4)
    together, alone = Rows(), Rows()
    for _ in range(5):
        grad = torch.randn(together.param.shape, generator=generator)
        together.update(grad, torch.ones(4, dtype=torch.bool))
        alone.update(grad, torch.tensor([False, False, True, False]))
    assert all(torch.equal(a, b) for a, b in zip(together.state(2), alone.state(2), strict=True))


def test_gradients_that_are_one_row():
    """As those of a sum over adapters: expanded, so no row has an address of its own."""
    one, everyone = torch.randn(1, 37, generator=torch.Generator().manual_seed(2)), torch.ones(4, dtype=torch.bool)
    expanded, whole = Rows(), Rows()
    assert torch.equal(expanded.update(one.expand(4, 37), everyone), whole.update(one.repeat(4, 1), everyone))
    assert torch.equal(expanded.param, whole.param)


def test_low_precision_gradients_and_strided_rows():
    rows, wanted = Rows(), Rows()
    grad = torch.randn(rows.param.shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    wide = torch.zeros(4, 80, dtype=torch.bfloat16)
    wide[:, 3:40] = grad
    everyone = torch.ones(4, dtype=torch.bool)
    rows.param = torch.cat([rows.param, torch.ones(4, 9)], 1)[:, :37]
    norms = rows.update(wide[:, 3:40], everyone)
    assert torch.equal(norms, wanted.update(grad.float(), everyone)) and norms.dtype == torch.float32
    assert torch.equal(rows.param, wanted.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("library", [True, False], ids=["csrc", "plain torch"])
def test_work_gets_the_weights_of_rows_that_move(dtype, library, monkeypatch):
    if not library:
        monkeypatch.setattr(kernels.adamw.shared_ops, "runs_on", lambda device: False)
    rows, generator = Rows(), torch.Generator().manual_seed(1)
    grad = torch.randn(rows.param.shape, generator=generator).to(dtype)
    grad[2, 5] = float("inf")
    work = torch.full((4, 40), 7.0, dtype=dtype)[:, :37]
    settings = dict(betas=BETAS, eps=EPS, weight_decay=rows.decays, max_norm=rows.clips)
    active = torch.tensor([True, False, True, True])
    rows.op(rows.param, grad, *rows.moments, rows.step, rows.rates, **settings, active=active, work=work)
    assert rows.step.tolist() == [1, 0, 0, 1]
    assert torch.equal(work[[0, 3]], rows.param[[0, 3]].to(dtype)) and (work[1:3] == 7).all()
    assert (work.as_strided((4, 40), (40, 1))[:, 37:] == 7).all()
    before = rows.param.clone()
    for wrong in (rows.param, work[:3], work.double(), work.t().contiguous().t()):
        with pytest.raises(ValueError, match="work|must not be one tensor"):
            rows.op(rows.param, grad, *rows.moments, rows.step, rows.rates, **settings, active=active, work=wrong)
    assert torch.equal(rows.param, before)
