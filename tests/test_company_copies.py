"""Copies of a model with adapters and of its optimiser: deepcopy, pickle, torch.save. They go on as the originals do."""

import copy
import io
import pickle

import pytest
import torch
from test_attach import attached, llama, xlmr
from test_optim import NORMS, RATES, ROWS, factors, trained
from toy import toy_model

import kloss
from kloss.kernels import make_segments
from kloss.models import AdapterBank
from kloss.optim import AdapterAdamW


def saved(both):
    buffer = io.BytesIO()
    torch.save(both, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


WAYS = pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both)), saved], ids=["copy", "pickle", "save"]
)


def everything(model, optimizer):
    moments = [optimizer.rows.exp_avg, optimizer.rows.exp_avg_sq, optimizer.rows.steps, optimizer.norms]
    return [f.detach().clone() for f in factors(model).values()] + [moment.clone() for moment in moments]


@WAYS
@pytest.mark.parametrize("make", [xlmr, llama])
def test_a_copy_of_both_goes_on_to_the_same_bits(way, make):
    model = attached(make, dropout=0.3).train()
    optimizer = AdapterAdamW(model, RATES, max_norm=NORMS, weight_decay=0.3, betas=(0.8, 0.99), eps=1e-6)
    trained(optimizer, model, ROWS[:2])
    twin, twins = way((model, optimizer))
    before = everything(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(everything(twin, twins), before, strict=True))
    assert twins.param_groups[0]["params"][0] is next(iter(factors(twin).values()))
    trained(twins, twin, ROWS[2:])
    after = everything(twin, twins)
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), before, strict=True))
    trained(optimizer, model, ROWS[2:])
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), after, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(after[:-1], before[:-1], strict=True))
    kloss.adapters.remove(twin, "1")
    twins.step()
    assert len(twins.norms) == 2 and len(optimizer.norms) == 3


@WAYS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_of_a_bank_learns_as_the_original_does(way, dtype):
    model = toy_model().to(dtype).freeze_backbone()
    segments = make_segments(*(torch.tensor(each, dtype=torch.int32) for each in ([0, 5, 9], [0, 2])), 3)

    def losses(bank):
        optimizer, found = AdapterAdamW(bank, RATES), []
        for _ in range(4):
            loss = model(torch.arange(9), torch.tensor([0, 5, 9], dtype=torch.int32), segments, bank).float().square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    bank = AdapterBank(model, adapters=3, rank=[4, 2, 4], dtype=dtype)
    twin = way(bank)
    assert (twin.work is twin.param) == (dtype == torch.float32)
    wanted = losses(twin)
    assert bank.steps.tolist() == [0, 0, 0] and twin.steps.tolist() == [4, 0, 4] and len({*wanted}) == 4
    assert losses(bank) == wanted


@WAYS
def test_an_optimiser_of_a_bank_is_copied_with_it(way):
    bank = AdapterBank(toy_model(), adapters=3, rank=4)
    optimizer = AdapterAdamW(bank, RATES)
    bank.grad.normal_(generator=torch.Generator().manual_seed(0))
    optimizer.step()
    twin, twins = way((bank, optimizer))
    assert twins.rows is twin and twins.param_groups[0]["params"][0] is twin.param
    before = bank.param.clone()
    twins.step()
    assert torch.equal(bank.param, before) and not torch.equal(twin.param, before)
    optimizer.step()
    assert torch.equal(bank.param, twin.param) and torch.equal(bank.exp_avg_sq, twin.exp_avg_sq)
