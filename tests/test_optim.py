"""AdapterAdamW against torch.optim.AdamW, one adapter at a time; what is idle, sick, scheduled, saved."""

import copy
import io

import numpy as np
import pytest
import torch
from pretend import GPU, pretended_gpu
from test_attach import IDS, LABELS, MASK, attached, layers, logits, randomised, xlmr
from torch import nn
from toy import toy_model

import kloss
from kloss.errors import UserError
from kloss.models import AdapterBank
from kloss.models.rows import nonzero
from kloss.optim import AdapterAdamW

RATES, DECAYS, NORMS = [1e-2, 3e-3, 0.1], [0.1, 0.0, 0.5], [0.05, float("inf"), 100.0]
ROWS = [[0, 2, 2, 0, -1], [1, 1, 2, 2, 2], [2, 0, 1, 0, 2], [0, 0, 0, 0, 0], [-1, 2, 2, 1, -1]]


def factors(model) -> dict[str, nn.Parameter]:
    return {f"{name}.{kind}": getattr(layer, kind) for name, layer in layers(model).items() for kind in ("lora_a", "lora_b")}


def rows_of(model, optimizer, g) -> list[torch.Tensor]:
    """All that is known of an adapter: weights, moments, steps."""
    state = optimizer.state_dict()["state"]
    moments = [state[name][g].clone() for name in ("exp_avg", "exp_avg_sq", "steps")]
    return [f[g].detach().clone() for f in factors(model).values()] + moments


def backward(model, ids):
    with kloss.use_adapters(model, ids) as numbers:
        out = logits(model)
    kloss.adapter_losses(out, LABELS, numbers).sum().backward()


def trained(optimizer, model, batches=ROWS):
    for ids in batches:
        backward(model, ids)
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_each_adapter_is_trained_as_torchs_adamw_trains_it_alone():
    ours = attached(xlmr)
    start = {name: f.detach().clone() for name, f in factors(ours).items()}
    trained(AdapterAdamW(ours, RATES, weight_decay=DECAYS, max_norm=NORMS, betas=(0.8, 0.99), eps=1e-6), ours)
    for g, (rank, alpha) in enumerate(zip([3, 1, 4], [6.0, 2.0, 3.0], strict=True)):
        alone = kloss.attach(xlmr(), 1, rank, alpha=alpha)
        for name, f in factors(alone).items():
            f.data[0] = start[name][g, :rank] if name.endswith("a") else start[name][g, :, :rank]
        theirs = torch.optim.AdamW(factors(alone).values(), RATES[g], (0.8, 0.99), 1e-6, DECAYS[g])
        clipped = 0
        for ids in ROWS:
            rows = torch.tensor(ids) == g
            if rows.any():
                with kloss.use_adapters(alone, [0]):
                    alone(input_ids=IDS[rows], attention_mask=MASK[rows], labels=LABELS[rows]).loss.backward()
                clipped += nn.utils.clip_grad_norm_(factors(alone).values(), NORMS[g]) > NORMS[g]
                theirs.step()
                theirs.zero_grad()
        assert clipped == (3 if g == 0 else 0)
        for name, f in factors(alone).items():
            mine = factors(ours)[name][g]
            mine = mine[:rank] if name.endswith("a") else mine[:, :rank]
            torch.testing.assert_close(mine, f[0], rtol=2e-4, atol=2e-5, msg=lambda m, name=name, g=g: f"{g} {name}: {m}")
            assert (mine - (start[name][g, :rank] if name.endswith("a") else start[name][g, :, :rank])).abs().max() > 1e-3


def test_an_adapter_without_gradients_is_left_to_the_bit():
    model = attached(xlmr)
    optimizer = AdapterAdamW(model, 0.1, weight_decay=0.5)
    trained(optimizer, model, [[0, 1, 2, 0, 1]])
    before = [rows_of(model, optimizer, g) for g in range(3)]
    trained(optimizer, model, [[2, -1, 0, 0, 2], [0] * 5])
    after = [rows_of(model, optimizer, g) for g in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(after[1], before[1], strict=True))
    assert [int(rows[-1]) for rows in after] == [3, 1, 2] and not torch.equal(after[2][1], before[2][1])
    optimizer.step()  # all gradients are None
    assert all(torch.equal(a, b) for g in range(3) for a, b in zip(rows_of(model, optimizer, g), after[g], strict=True))


def with_gradients(model, seed):
    """The model with random gradients: those of an adapter depend on the seed and its name alone."""
    for g, name in enumerate(model[0].shared.names):
        generator = torch.Generator().manual_seed(hash(("seed", seed, int(name))) % (1 << 32))
        for f in factors(model).values():
            f.grad = torch.zeros_like(f) if f.grad is None else f.grad
            f.grad[g] = torch.randn(f.shape[1:], generator=generator)
    return model


def linears(names, **options):
    torch.manual_seed(0)
    model = kloss.attach(nn.Sequential(nn.Linear(24, 40), nn.Linear(40, 8)), names, 4, **options)
    for g, name in enumerate(names):
        for f in factors(model).values():
            f.data[g] = torch.randn(f.shape[1:], generator=torch.Generator().manual_seed(int(name)))
    return model


def test_an_adapter_has_the_same_bits_among_others_and_alone():
    bits = []
    for names, sick in ((["1"], ()), (["0", "1", "2", "3"], ()), (["1", "0", "2"], (1, 2))):
        model = linears(names)
        optimizer = AdapterAdamW(model, [0.1 if n == "1" else 0.3 for n in names], max_norm=1.0)
        for seed in range(3):
            with_gradients(model, seed)
            for g in sick:
                model[0].lora_a.grad[g, 0, 0] = float("nan")
            if sick:
                with pytest.warns(UserWarning, match="adapters 0, 2 "):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
        bits.append(rows_of(model, optimizer, names.index("1")))
    assert all(torch.equal(a, b) for other in bits[1:] for a, b in zip(bits[0], other, strict=True))


def test_a_sick_adapter_is_named_and_left_as_it_is():
    model = with_gradients(linears(["4", "5", "6"]), 0)
    optimizer = AdapterAdamW(model, 0.1)
    optimizer.step()
    assert optimizer.skipped == [] and optimizer.norms.min() > 0
    before = rows_of(model, optimizer, 1)
    with_gradients(model, 1)[1].lora_b.grad[1, 2, 3] = float("inf")
    with pytest.warns(UserWarning, match="adapter 5 has gradients that are not finite: .* stay as they were"):
        optimizer.step()
    assert optimizer.skipped == ["5"] and optimizer.norms.isfinite().tolist() == [True, False, True]
    assert all(torch.equal(a, b) for a, b in zip(rows_of(model, optimizer, 1), before, strict=True))
    assert int(rows_of(model, optimizer, 2)[-1]) == 2


def test_rates_have_schedules_of_torch_or_of_the_adapters_own_steps():
    model = linears(["0", "1"])
    optimizer = AdapterAdamW(model, [0.1, 0.2])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1.0, lambda step: 1 / (step + 1)])
    seen = []
    for seed in range(3):
        with_gradients(model, seed)
        optimizer.step()
        seen.append([group["lr"] for group in optimizer.param_groups])
        scheduler.step()
    assert seen == [[0.1, 0.2], [0.1, 0.1], [0.1, pytest.approx(0.2 / 3)]]
    # The schedule of an adapter's own updates, whatever the others do.
    asked = []
    own = AdapterAdamW(model, [lambda step: asked.append(step) or 0.1 / (step + 1), 0.3])
    for seed in range(4):
        with_gradients(model, seed)
        if seed == 1:
            for f in factors(model).values():
                f.grad[0] = 0
        own.step()
    assert asked == [0, 0, 1, 2] and [group["lr"] for group in own.param_groups] == [pytest.approx(0.1 / 3), 0.3]
    saved = {"name": "0", "lr": pytest.approx(0.1 / 3), "weight_decay": 0.01, "max_norm": float("inf")}
    assert own.state_dict()["param_groups"][0] == saved


def test_a_run_that_was_saved_goes_on_to_the_same_bits():
    straight, stopped = attached(xlmr), attached(xlmr)
    settings = dict(lr=RATES, weight_decay=DECAYS, max_norm=NORMS)
    trained(AdapterAdamW(straight, **settings), straight)
    optimizer, file = AdapterAdamW(stopped, **settings), io.BytesIO()
    trained(optimizer, stopped, ROWS[:2])
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer.state_dict()}, file)
    trained(optimizer, stopped, ROWS[2:4])  # what is saved must not change with it
    file.seek(0)
    saved, again = torch.load(file, weights_only=True), attached(xlmr)
    again.load_state_dict(saved["model"])
    optimizer = AdapterAdamW(again, 1.0)
    optimizer.load_state_dict(saved["optimizer"])
    trained(optimizer, again, ROWS[2:])
    assert all(torch.equal(f, factors(straight)[name]) for name, f in factors(again).items())


def test_a_state_dict_follows_the_adapters_by_name():
    one, other = (linears(names) for names in (["0", "1", "2"], ["2", "0", "1"]))
    first, second = AdapterAdamW(one, [0.1, 0.2, 0.3]), AdapterAdamW(other, 1.0)
    with_gradients(one, 0)
    first.step()
    for name, f in factors(one).items():
        factors(other)[name].data.copy_(f.data[[2, 0, 1]])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["lr"] for group in second.param_groups] == [0.3, 0.1, 0.2]
    for optimizer, model in ((first, one), (second, other)):
        with_gradients(model, 1)
        optimizer.step()
    for g in range(3):
        wanted, got = rows_of(one, first, g), rows_of(other, second, [1, 2, 0][g])
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_state_dict_of_another_model_changes_nothing():
    model = with_gradients(linears(["0", "1"]), 0)
    optimizer = AdapterAdamW(model, 0.1)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    for other, match in (
        (AdapterAdamW(linears(["0", "7"]), 0.1).state_dict(), "adapters 0, 7, .* has 0, 1"),
        (AdapterAdamW(kloss.attach(nn.Sequential(nn.Linear(24, 40)), 2, 4), 0.1).state_dict(), "other layers"),
        (torch.optim.AdamW(model.parameters()).state_dict(), "not of an AdapterAdamW"),
    ):
        with pytest.raises(UserError, match=match):
            optimizer.load_state_dict(other)
        after = optimizer.state_dict()
        assert after["param_groups"] == before["param_groups"]
        assert all(torch.equal(after["state"][n], before["state"][n]) for n in ("exp_avg", "exp_avg_sq", "steps"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bank_is_trained_by_its_own_adamw(dtype):
    model = toy_model()
    banks = [AdapterBank(model, 3, [2, 4, 4], dtype=dtype) for _ in range(2)]
    optimizer, each = AdapterAdamW(banks[0], RATES, weight_decay=DECAYS, max_norm=[0.5, 1.0, 2.0]), torch.tensor
    for step in range(3):
        for bank in banks:
            bank.grad.copy_(torch.randn(bank.grad.shape, generator=torch.Generator().manual_seed(step)))
            bank.grad[step] = 0
        optimizer.step()
        active = torch.arange(3) != step
        banks[1].adamw_(each(RATES), weight_decay=each(DECAYS), max_norm=each([0.5, 1.0, 2.0]), active=active)
        optimizer.zero_grad()
        assert not banks[0].grad.any()
    assert all(torch.equal(tensor, banks[1].state()[name]) for name, tensor in banks[0].state().items())
    assert torch.equal(banks[0].work, banks[1].work) and banks[0].steps.tolist() == [2, 2, 2]
    again = AdapterAdamW(AdapterBank(model, 3, [2, 4, 4], dtype=dtype), 1.0)
    again.load_state_dict(optimizer.state_dict())
    assert torch.equal(again.rows.moments, banks[0].moments) and [group["lr"] for group in again.param_groups] == RATES


def test_mistakes():
    model = linears(["0", "1"])
    for settings, match in (
        (dict(lr=[0.1]), r"lr must be .*, one for all or one for each of the 2 adapters; got \[0.1\]"),
        (dict(lr=-1.0), "lr must be a finite number of at least 0"),
        (dict(lr=0.1, weight_decay=float("nan")), "weight_decay must be"),
        (dict(lr=0.1, max_norm=0.0), "max_norm must be above 0"),
        (dict(lr=0.1, betas=(1.0, 0.9)), "betas"),
        (dict(lr=0.1, eps=0.0), "eps"),
    ):
        with pytest.raises(UserError, match=match):
            AdapterAdamW(model, **settings)
    with pytest.raises(UserError, match="a model that kloss.attach was called on"):
        AdapterAdamW(nn.Linear(2, 2), 0.1)
    with pytest.raises(UserError, match="0.lora_a is torch.bfloat16, .* in float32"):
        AdapterAdamW(linears(["0"]).to(torch.bfloat16), 0.1)
    optimizer = AdapterAdamW(with_gradients(model, 0), 0.1)
    before = copy.deepcopy(model.state_dict())
    optimizer.param_groups[1]["lr"] = float("nan")
    with pytest.raises(ValueError, match="lr"):
        optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_model_that_became_bf16_is_refused():
    """A step of 1e-3 would be lost in its rounding."""
    model = randomised(kloss.attach(nn.Sequential(nn.Linear(8, 8)), 2, 2))
    optimizer = AdapterAdamW(model, 1e-3)
    model.bfloat16()
    with kloss.use_adapters(model, [0, 1]):
        model(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
    with pytest.raises(UserError, match="0.lora_a is torch.bfloat16, adapters are trained in float32"):
        optimizer.step()


def test_rates_of_numpy_are_read_back():
    model = kloss.attach(nn.Sequential(nn.Linear(8, 8)), 2, 2)
    saved = io.BytesIO()
    torch.save(AdapterAdamW(model, np.geomspace(1e-4, 1e-3, 2), weight_decay=np.float32(0.5)).state_dict(), saved)
    groups = torch.load(io.BytesIO(saved.getvalue()))["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-3]) and groups[1]["weight_decay"] == 0.5


def test_frozen_factors_are_left_alone():
    model = linears(["0", "1"])
    model[0].lora_a.requires_grad_(False)
    before = model[0].lora_a.clone()
    optimizer = AdapterAdamW(with_gradients(model, 0), 0.1, weight_decay=0.5)
    model[0].lora_a.grad = None
    optimizer.step()
    assert torch.equal(model[0].lora_a, before) and optimizer.state_dict()["state"]["steps"].tolist() == [1, 1]


def test_gradients_of_several_batches_add_up():
    whole, parts = attached(xlmr), attached(xlmr)
    optimizers = [AdapterAdamW(model, RATES, max_norm=NORMS) for model in (whole, parts)]
    backward(whole, [0, 0, 1, 1, 2])
    for rows, ids in ((slice(0, 2), [0, 0]), (slice(2, 4), [1, 1]), (slice(4, 5), [2])):
        with kloss.use_adapters(parts, ids):
            out = logits(parts, IDS[rows], MASK[rows])
        kloss.adapter_losses(out, LABELS[rows], ids).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    for name, f in factors(whole).items():
        torch.testing.assert_close(factors(parts)[name], f, rtol=1e-3, atol=1e-4)


def test_copies_of_a_model_have_optimisers_of_their_own():
    model = randomised(linears(["0", "1"]))
    copied = copy.deepcopy(model)
    AdapterAdamW(with_gradients(copied, 0), 0.1).step()
    assert not torch.equal(copied[0].lora_a, model[0].lora_a) and model[0].lora_a.grad is None


def test_a_row_with_any_gradient_is_active():
    rows = torch.zeros(6, 3, 2)
    rows[1, 2, 1], rows[2, 0, 0], rows[3, 1, 1], rows[4, 1, 0] = -1.0, 1e-45, float("nan"), float("inf")
    assert nonzero(rows).tolist() == [False, True, True, True, True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
def test_a_model_that_moves_to_a_gpu_takes_its_optimiser_along(monkeypatch):
    def stepped(model, optimizer, seed, device="cpu"):
        with_gradients(model, seed)
        if device == GPU:
            model = model.to(GPU)
        optimizer.step()
        return model

    models = [linears(["0", "1", "2"]) for _ in range(2)]
    optimizers = [AdapterAdamW(model, [0.1, 0.2, 0.3], max_norm=1.0) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        stepped(model, optimizer, 0)
    stepped(models[0], optimizers[0], 1)
    with pretended_gpu(monkeypatch):
        stepped(models[1], optimizers[1], 1, GPU)
        assert optimizers[1].rows.param.device == GPU and optimizers[1].rows.moments.device == GPU
        moved = {name: f.detach().cpu() for name, f in factors(models[1]).items()}
    for name, f in factors(models[0]).items():
        torch.testing.assert_close(moved[name], f.detach())
