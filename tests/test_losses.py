"""Each adapter's loss in a mixed batch: its value, and gradients as if it were alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from test_attach import IDS, LABELS, MASK, MIXED, MODELS, attached, layers, llama, logits

import kloss
from kloss.errors import UserError


def alone(model, g, shift):
    rows = torch.tensor(MIXED) == g
    with kloss.use_adapters(model, [g] * int(rows.sum())):
        out = model(input_ids=IDS[rows], attention_mask=MASK[rows], labels=LABELS[rows])
    assert out.loss.dim() == 0 and shift == ("Llama" in type(model).__name__)
    return out.loss


@MODELS
def test_each_adapters_gradients_are_those_it_has_alone(make):
    together, apart, shift = attached(make), attached(make), make is llama
    with kloss.use_adapters(together, MIXED):
        losses = kloss.adapter_losses(logits(together), LABELS, MIXED, shift=shift)
    assert losses.shape == (3,) and losses.dtype == torch.float32
    losses.sum().backward()
    for g in range(3):
        loss = alone(apart, g, shift)
        torch.testing.assert_close(losses[g], loss)
        loss.backward()
    for name, layer in layers(together).items():
        for factor in ("lora_a", "lora_b"):
            torch.testing.assert_close(getattr(layer, factor).grad, getattr(layers(apart)[name], factor).grad, msg=name)
    assert any(layer.lora_a.grad[2].abs().max() > 1e-4 for layer in layers(together).values())


def test_losses_of_ones_own_and_what_does_not_count():
    values = torch.tensor([[1.0, 3.0], [10.0, 20.0], [5.0, 7.0], [0.0, 2.0]])
    assert kloss.adapter_losses(values, None, [3, -1, 0, 3]).tolist() == [6.0, 0.0, 0.0, 1.5]
    assert kloss.adapter_losses(values[:, 0], None, [1, 1, 0, -1]).tolist() == [5.0, 5.5]
    none = kloss.adapter_losses(torch.zeros(2, 3), torch.tensor([-100, 2]), [0, 1])
    assert none.tolist() == [0.0, F.cross_entropy(torch.zeros(1, 3), torch.tensor([2])).item()]


def test_the_nan_of_one_adapter_stays_its_own():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    labels, ids = torch.tensor([[0, 1, -100]] * 4), [0, 1, 0, -1]
    healthy, sick = x.clone().requires_grad_(), x.clone()
    sick[[1, 3]] = float("nan")
    sick.requires_grad_()
    wanted, got = (kloss.adapter_losses(logits, labels, ids) for logits in (healthy, sick))
    assert torch.equal(got[0], wanted[0]) and got[1].isnan()
    wanted.sum().backward()
    got.sum().backward()
    assert torch.equal(sick.grad[[0, 2]], healthy.grad[[0, 2]]) and healthy.grad[0].any() and not healthy.grad[3].any()


def test_an_adapters_gradient_has_the_same_bits_whoever_is_beside_it():
    x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(0))
    labels, bits = torch.tensor([[0, 1, 2]] * 5), []
    for rows, ids in (([0, 2], [1, 1]), (range(5), [1, 0, 1, 2, -1]), ([3, 0, 2], [0, 1, 1])):
        logits = copy.deepcopy(x)[[*rows]].requires_grad_()
        kloss.adapter_losses(logits, labels[: len(ids)], ids, shift=True).sum().backward()
        bits.append(logits.grad[torch.tensor(ids) == 1])
    assert all(torch.equal(got, bits[0]) for got in bits) and bits[0].any()


@pytest.mark.parametrize(
    ("logits", "labels", "ids", "match"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), [0], "one whole number of at least -1 for each of .2. rows, got .0."),
        (torch.zeros(2, 3), torch.tensor([0, 1]), [0, -2], "at least -1"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), [0.0, 1.0], "whole number"),
        (torch.zeros(2, 3), torch.tensor([0, 1]), ["a", "b"], "whole number"),
        (torch.zeros(2, 4, 3), torch.tensor([0, 1]), [0, 1], r"labels must be .*int64 \[2\] and \[2, 4, 3\]"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), [0, 1], "labels must be whole numbers"),
    ],
)
def test_tensors_that_do_not_fit(logits, labels, ids, match):
    with pytest.raises(UserError, match=match):
        kloss.adapter_losses(logits, labels, ids)
