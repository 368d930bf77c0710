"""Adapters on any model: peft's numbers and files, whose row is whose, and what a block of `use_adapters` reaches."""

import copy
import json
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_no_worse
from peft import LoraConfig, PeftModel, get_peft_model
from pretend import GPU, pretended_gpu
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, XLMRobertaConfig, XLMRobertaForTokenClassification

import kloss
from kloss.errors import UserError
from kloss.models.attach import MultiAdapterLinear, load_peft, save_peft

LABELS = torch.tensor([[1, 2, -1, 3, 0], [4, -1, -1, 1, 1], [0, 0, 0, 1, -1], [-1, 4, -1, -1, -1], [2, 1, 2, 1, 2]])
LABELS[LABELS < 0] = -100
IDS = torch.tensor([[0, 7, 9, 11, 2], [0, 5, 8, 30, 2], [0, 41, 3, 2, 1], [0, 9, 9, 2, 1], [0, 12, 6, 7, 2]])
MASK = (IDS != 1).long()
MIXED = [2, 0, -1, 2, 1]
RANKS, ALPHAS = [3, 1, 4], [6.0, 2.0, 3.0]


def xlmr():
    torch.manual_seed(0)
    # Larger weights than a fresh model has, so that a wrong adapter shows in the logits. No dropout but the adapters'.
    config = XLMRobertaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, num_labels=5,
        max_position_embeddings=40, initializer_range=0.2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return XLMRobertaForTokenClassification(config).eval()


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
        max_position_embeddings=40, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


MODELS = pytest.mark.parametrize("make", [xlmr, llama])


def layers(model) -> dict[str, MultiAdapterLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, MultiAdapterLinear)}


def randomised(model, seed=1):
    """The model, its adapters' B random as well, tails of low ranks left at zero."""
    generator = torch.Generator().manual_seed(seed)
    for layer in layers(model).values():
        drawn = torch.randn(layer.lora_b.shape, generator=generator) * 0.2
        for g, rank in enumerate(layer.shared.ranks):
            drawn[g, :, rank:] = 0
        layer.lora_b.data.copy_(drawn)
    return model


def attached(make, **options):
    return randomised(kloss.attach(make(), **{"adapters": 3, "rank": RANKS, "alpha": ALPHAS} | options))


def logits(model, ids=IDS, mask=MASK, **more):
    return model(input_ids=ids, attention_mask=mask, **more).logits


class Tiny(nn.Module):
    """One linear whose adapters' product is drop(x) itself: W = 0, A = B = 1."""

    def __init__(self, width=64, **options):
        super().__init__()
        self.first, self.second = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.extra = nn.LayerNorm(width)
        kloss.attach(self, adapters=3, rank=width, targets="first", **options)
        for tensor in (self.first.weight, self.first.lora_a, self.first.lora_b):
            tensor.data.zero_()
        for tensor in (self.first.lora_a, self.first.lora_b):
            tensor.data += torch.eye(width)

    def forward(self, x):
        return self.first(x)


@MODELS
def test_a_mixed_batch_equals_peft_and_so_do_each_adapters_gradients(make, tmp_path):
    base, ours = make(), attached(make)
    for g in range(3):
        save_peft(ours, tmp_path / str(g), g)
    theirs = PeftModel.from_pretrained(base, tmp_path / "0", adapter_name="0", is_trainable=True)
    for g in "12":
        theirs.load_adapter(tmp_path / g, adapter_name=g, is_trainable=True)
    with torch.no_grad():
        wanted = logits(theirs.eval(), adapter_names=["2", "0", "__base__", "2", "1"])
    with kloss.use_adapters(ours, MIXED):
        got = logits(ours)
        direction = torch.randn(got.shape, generator=torch.Generator().manual_seed(2)) / got[0].numel() ** 0.5
        (got * direction).sum().backward()
    torch.testing.assert_close(got, wanted)
    assert (got - logits(make())).abs().amax((1, 2))[torch.tensor(MIXED) >= 0].min() > 0.1
    for g in range(3):
        rows = torch.tensor(MIXED) == g
        theirs.set_adapter(str(g))
        theirs.zero_grad()
        (logits(theirs, IDS[rows], MASK[rows]) * direction[rows]).sum().backward()
        for name, layer in layers(ours).items():
            peers = theirs.base_model.model.get_submodule(name)
            for mine, other in (
                (layer.lora_a.grad[g, : RANKS[g]], peers.lora_A),
                (layer.lora_b.grad[g, :, : RANKS[g]], peers.lora_B),
            ):
                torch.testing.assert_close(mine, other[str(g)].weight.grad, msg=lambda m, name=name, g=g: f"{name} {g}: {m}")
            assert not layer.lora_a.grad[g, RANKS[g] :].any() and not layer.lora_b.grad[g, :, RANKS[g] :].any()


@pytest.mark.parametrize("rslora", [False, True])
def test_files_of_peft_load(rslora, tmp_path):
    settings = dict(r=2, lora_alpha=5, target_modules=["query", "output.dense"], use_rslora=rslora, init_lora_weights=False)
    theirs = get_peft_model(xlmr(), LoraConfig(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    ours = attached(xlmr)
    with kloss.use_adapters(ours, [0] * 5):
        before = logits(ours)
    load_peft(ours, tmp_path, 1)
    with kloss.use_adapters(ours, [1] * 5):
        torch.testing.assert_close(logits(ours), logits(theirs))
    with kloss.use_adapters(ours, [0] * 5):
        assert torch.equal(logits(ours), before), "another adapter was touched"
    save_peft(ours, tmp_path / "again", 1)
    again = PeftModel.from_pretrained(xlmr(), tmp_path / "again").eval()
    torch.testing.assert_close(logits(again), logits(theirs))


def test_a_saved_adapter_names_its_layers_and_no_others(tmp_path):
    ours = attached(xlmr, targets="layer.0.output.dense")
    save_peft(ours, tmp_path, 0)
    theirs = PeftModel.from_pretrained(xlmr(), tmp_path)
    assert theirs.targeted_module_names == list(layers(ours)) == ["roberta.encoder.layer.0.output.dense"]


def test_a_file_that_does_not_fit_changes_nothing(tmp_path):
    ours = attached(xlmr)
    good, name = tmp_path / "good", "base_model.model.roberta.encoder.layer.0.attention.self.query.lora_A.weight"
    save_peft(ours, good, 1)
    from kloss.files import read_tensors, write_json, write_tensors

    config, tensors = json.loads((good / "adapter_config.json").read_text()), read_tensors(good / "adapter_model.safetensors")
    before = copy.deepcopy(ours.state_dict())

    def refused(match, config=config, tensors=tensors, g=2):
        write_json(tmp_path / "bad/adapter_config.json", config)
        write_tensors(tmp_path / "bad/adapter_model.safetensors", tensors)
        with pytest.raises(UserError, match=match):
            load_peft(ours, tmp_path / "bad", g)
        assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
        assert layers(ours).popitem()[1].shared.ranks == RANKS

    refused("rank 1 to 4 is needed, got LORA 5", config | {"r": 5})
    refused("LORA adapter", config | {"peft_type": "IA3"})
    refused("use_dora is not supported", config | {"use_dora": True})
    refused("lora_alpha must be a number", config | {"lora_alpha": "8"})
    refused("classifier.weight .* has no place", tensors=tensors | {"base_model.model.classifier.weight": torch.ones(5, 32)})
    refused(r"query.lora_A.weight \(2, 32\) has no place", tensors=tensors | {name: torch.ones(2, 32)})
    refused("only one of lora_A and lora_B", tensors={n: t for n, t in tensors.items() if n != name})
    refused("no adapter 3, the model has 0 to 2", g=3)
    with pytest.raises(UserError, match="no adapter -1"):
        save_peft(ours, tmp_path, -1)
    with kloss.use_adapters(ours, MIXED), pytest.raises(UserError, match="outside use_adapters"):
        load_peft(ours, good, 0)
    (tmp_path / "bad/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        load_peft(ours, tmp_path / "bad", 0)


@MODELS
def test_the_base_model_stays_what_it_was(make):
    base, ours = make(), make()
    parameters = dict(ours.named_parameters())
    assert kloss.attach(ours, adapters=2, rank=3) is ours
    after = dict(ours.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    trained = {name for name, parameter in after.items() if parameter.requires_grad}
    assert trained == after.keys() - parameters.keys() == {f"{n}.lora_{k}" for n in layers(ours) for k in "ab"}
    assert all(torch.equal(ours.state_dict()[name], value) for name, value in base.state_dict().items())
    wanted = logits(base)
    assert not any(module.training for module in ours.modules())
    with kloss.use_adapters(ours, [0, 1, 1, 0, -1]):
        torch.testing.assert_close(logits(ours), wanted)  # B is zero
    randomised(ours)
    assert torch.equal(logits(ours), wanted)
    with kloss.use_adapters(ours, [-1, 1, -1, 0, -1]):
        got = logits(ours)
    torch.testing.assert_close(got[[0, 2, 4]], wanted[[0, 2, 4]])
    assert (got - wanted).abs().amax((1, 2))[[1, 3]].min() > 0.1


@MODELS
def test_neighbours_do_not_matter(make):
    ours, rows = attached(make), torch.tensor([0, 3])
    with kloss.use_adapters(ours, MIXED):
        together = logits(ours)
        together[rows].sum().backward()
    grads = {name: (layer.lora_a.grad[2].clone(), layer.lora_b.grad[2].clone()) for name, layer in layers(ours).items()}
    with kloss.use_adapters(ours, torch.tensor([2, 2])):
        torch.testing.assert_close(logits(ours, IDS[rows], MASK[rows]), together[rows])
    ours.zero_grad()
    for layer in layers(ours).values():
        layer.lora_a.data[:2], layer.lora_b.data[:2] = float("nan"), float("inf")
    with kloss.use_adapters(ours, MIXED):
        sick = logits(ours)
        sick.sum().backward()
    assert not sick[[1, 4]].isfinite().any()
    assert torch.equal(sick[[0, 2, 3]], together[[0, 2, 3]])
    for name, layer in layers(ours).items():
        assert torch.equal(layer.lora_a.grad[2], grads[name][0]) and torch.equal(layer.lora_b.grad[2], grads[name][1]), name
        assert grads[name][1].any()


@pytest.mark.parametrize("shape", [(4, 32), (4, 3, 32), (4, 2, 3, 32), (4, 0, 32)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inputs_of_any_shape_and_dtype(shape, dtype):
    torch.manual_seed(0)
    model = randomised(kloss.attach(nn.Sequential(nn.Linear(32, 64)).to(dtype), 3, RANKS, alpha=ALPHAS))
    layer, ids = model[0], [2, -1, 0, 2]
    assert layer.lora_a.dtype == layer.lora_b.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    x = torch.randn(*reversed(shape)).to(dtype).permute(*reversed(range(len(shape)))).requires_grad_()  # not contiguous
    with kloss.use_adapters(model, ids):
        y = model(x)

    def plain(dtype):
        rows = []
        for row, g in zip(x.detach().to(dtype), ids, strict=True):
            a, b, weight, bias = (
                t.detach().to(dtype)
                for t in (layer.lora_a[g, : RANKS[g]], layer.lora_b[g, :, : RANKS[g]], layer.weight, layer.bias)
            )
            update = F.linear(F.linear(row, a), b) * (ALPHAS[g] / RANKS[g]) if g >= 0 else 0
            rows.append(F.linear(row, weight, bias) + update)
        return torch.stack(rows)

    layer.lora_a.data[0, RANKS[0] :], layer.lora_b.data[0, :, RANKS[0] :] = float("nan"), float("nan")  # nobody reads the tails
    with kloss.use_adapters(model, ids):
        assert torch.equal(model(x), y)
    assert_no_worse(y.detach(), plain(dtype), plain(torch.float64))
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.weight.grad is None and layer.lora_a.grad.dtype == layer.lora_a.dtype


def test_autocast_computes_in_its_dtype():
    ours = attached(lambda: nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 5)))
    rounded, x, ids = copy.deepcopy(ours).to(torch.bfloat16), torch.randn(4, 3, 32), [2, -1, 0, 2]
    with kloss.use_adapters(ours, ids), torch.autocast("cpu", torch.bfloat16):
        y = ours(x)
        y.float().square().sum().backward()
    with kloss.use_adapters(rounded, ids):
        wanted = rounded(x.to(torch.bfloat16))
    wanted.float().square().sum().backward()
    assert torch.equal(y, wanted) and y.dtype == torch.bfloat16
    for mine, other in zip(ours, rounded, strict=True):
        assert mine.lora_a.grad.dtype == torch.float32
        for name in ("lora_a", "lora_b"):
            torch.testing.assert_close(getattr(mine, name).grad.to(torch.bfloat16), getattr(other, name).grad)


def test_an_adapter_is_the_same_whoever_it_is_drawn_with():
    solo, wide = (layers(kloss.attach(xlmr(), n, ranks, seed=5)) for n, ranks in ((2, 3), (4, [2, 3, 8, 3])))
    few = layers(kloss.attach(xlmr(), 4, 8, ["key", "value"], seed=5))
    other = layers(kloss.attach(xlmr(), 2, 3, seed=6))
    drawn = []
    for name, layer in solo.items():
        inputs = layer.in_features
        assert torch.equal(layer.lora_a[1], wide[name].lora_a[1, :3]) and not wide[name].lora_a[1, 3:].any()
        assert torch.equal(layer.lora_a[0, :2], wide[name].lora_a[0, :2]) and not wide[name].lora_a[0, 2:].any()
        assert not layer.lora_b.any() and not torch.equal(layer.lora_a, other[name].lora_a)
        assert name not in few or torch.equal(few[name].lora_a[:2, :3], layer.lora_a)
        drawn += [*(wide[name].lora_a[2] * inputs**0.5)[:, :32].unbind(), *(layer.lora_a[0] * inputs**0.5)[:, :32].unbind()]
    values = torch.stack(drawn)
    assert len(few) == 4 and values.abs().max() <= 1 and values.abs().max() > 0.99
    assert abs(values.mean()) < 0.03 and abs(values.var() - 1 / 3) < 0.02
    alike = torch.corrcoef(values) - torch.eye(len(values))
    assert alike.abs().max() < 0.8, "two rows of A, of an adapter or a layer, are the same"


def masks(model, ids, x=None, **more):
    """Which inputs stay, for x of ones [B, 4, 64]; a kept one is enlarged."""
    with kloss.use_adapters(model, ids, **more):
        y = model(torch.ones(len(ids), 4, 64) if x is None else x)
    keep = y != 0
    assert torch.equal(y, torch.where(keep, torch.tensor(2.0), 0.0))
    return keep


def test_dropout_is_a_function_of_its_keys():
    model = Tiny(dropout=[0.5, 0.5, 0.0], seed=3).train()
    first = masks(model, [0, 1, 1, 0], step=5)
    assert 0.4 < first.float().mean() < 0.6
    assert torch.equal(masks(model, [1, 0, 0, 1], step=5), first[[1, 0, 3, 2]])  # by its number among its adapter's rows
    assert torch.equal(masks(model, [1], step=5), first[1:2]) and torch.equal(masks(model, [0, 0], step=5), first[[0, 3]])
    rows = [*first[0], *first[1], *first[2], *masks(model, [0], step=6)[0], *masks(Tiny(dropout=0.5).train(), [0], step=5)[0]]
    assert len({tuple(row.tolist()) for row in rows}) == 20, "another position, row, adapter, step or seed drops alike"
    with kloss.use_adapters(model, [2, -1]):
        y = model(torch.ones(2, 4, 64))
    assert torch.equal(y[0], torch.ones(4, 64)) and not y[1].any()  # p = 0; base only
    with kloss.use_adapters(model.eval(), [0, 1]):
        assert torch.equal(model(torch.ones(2, 4, 64)), torch.ones(2, 4, 64))


def test_each_layer_drops_in_its_own_way():
    model = kloss.attach(nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(2)), 1, 64, dropout=0.5)
    for layer in model:
        for tensor, value in ((layer.weight, torch.zeros(64, 64)), (layer.lora_a, torch.eye(64)), (layer.lora_b, torch.eye(64))):
            tensor.data.copy_(value)
    with kloss.use_adapters(model, [0]):
        one, other = (layer(torch.ones(1, 64)) for layer in model)
    assert one.count_nonzero() and not torch.equal(one, other)


def test_steps_count_up_while_training():
    model = Tiny(dropout=0.5).train()
    at = [masks(model, [0], step=step) for step in range(6)]
    assert torch.equal(masks(model, [0]), masks(model, [0], step=6))
    model = Tiny(dropout=0.5).train()
    assert all(torch.equal(masks(model, [0]), at[step]) for step in (0, 1))
    with kloss.use_adapters(model.eval(), [0]):
        pass  # an evaluation takes no step
    assert torch.equal(masks(model.train(), [0]), at[2])
    assert torch.equal(masks(model, [0], step=4), at[4]) and torch.equal(masks(model, [0]), at[5])
    with kloss.use_adapters(model, [0], step=3):
        once, twice = model(torch.ones(1, 4, 64)), model(torch.ones(1, 4, 64))
    assert torch.equal(once, twice) and torch.equal(once[0] != 0, at[3][0])


@MODELS
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_computes_the_same_again(make, reentrant):
    grads = []
    for checkpointed in (False, True):
        model = attached(make, dropout=0.3).train()
        model.enable_input_require_grads()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with kloss.use_adapters(model, MIXED, step=7):
            logits(model).sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert grads[0].keys() == grads[1].keys() and all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
    assert all(grad.any() for name, grad in grads[0].items() if name.endswith("lora_a"))


def test_segments_are_made_once_and_shared(monkeypatch):
    ours, calls = attached(xlmr), []
    module = sys.modules["kloss.models.blocks"]
    make_segments = module.make_segments
    monkeypatch.setattr(module, "make_segments", lambda *a, **k: calls.append(a) or make_segments(*a, **k))
    with kloss.use_adapters(ours, MIXED):
        logits(ours), logits(ours)
        assert len(calls) == 1
        logits(ours, IDS[:, :3], MASK[:, :3])
        assert len(calls) == 2
    with kloss.use_adapters(ours, MIXED):
        logits(ours)
        assert len(calls) == 3


def test_blocks_nest_and_end_with_what_was_before():
    ours, other = attached(xlmr), randomised(kloss.attach(xlmr(), 2, 2), seed=3)
    base, alone = logits(ours), []
    for ids in ([0] * 5, [1] * 5):
        with kloss.use_adapters(ours, ids):
            alone.append(logits(ours))
    with kloss.use_adapters(ours, [0] * 5):
        assert not torch.autograd.is_multithreading_enabled()  # a GPU's backward stays in this thread, whose passes are known
        with pytest.raises(KeyError), kloss.use_adapters(ours, [1] * 5):
            assert torch.equal(logits(ours), alone[1])
            raise KeyError
        assert torch.equal(logits(ours), alone[0])
        assert torch.equal(logits(other), base), "another model is in no block"
        with kloss.use_adapters(other, [1] * 5):
            assert torch.equal(logits(ours), alone[0]) and not torch.equal(logits(other), base)
        assert torch.equal(logits(other), base)
    assert torch.equal(logits(ours), base) and torch.autograd.is_multithreading_enabled() is True


def test_threads_do_not_mix():
    ours, results = attached(xlmr), {}
    wanted = [with_ids(ours, [g] * 5, IDS, MASK).logits for g in (-1, 0, 1)]
    meet = threading.Barrier(3, timeout=30)

    def work(name, ids):
        with kloss.use_adapters(ours, ids):
            meet.wait()
            results[name] = logits(ours).detach()
            meet.wait()

    threads = [threading.Thread(target=work, args=(i, [i - 1] * 5)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[i], wanted[i]) for i in range(3))


def test_copies_have_adapters_of_their_own():
    ours = attached(xlmr)
    with kloss.use_adapters(ours, MIXED):
        wanted = logits(ours)
        copied, pickled = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
        assert torch.equal(logits(copied), logits(xlmr())), "a copy is in no block"
        for layer in layers(ours).values():
            layer.lora_b.data.zero_()
        for model in (copied, pickled):
            with kloss.use_adapters(model, MIXED):
                assert torch.equal(logits(model), wanted)


def test_training_goes_on_after_inference_mode_in_the_same_block():
    ours = attached(xlmr, dropout=0.1).train()
    with kloss.use_adapters(ours, MIXED):
        with torch.inference_mode():
            wanted = logits(ours)
        got = logits(ours)
        got.sum().backward()
    assert torch.equal(got, wanted)


def test_a_layer_in_two_places_is_one_layer():
    linear = nn.Linear(32, 32)
    model = randomised(kloss.attach(nn.Sequential(linear, nn.ReLU(), linear), 2, 2))
    assert model[0] is model[2] and isinstance(model[0], MultiAdapterLinear)


def test_targets_are_those_of_peft():
    # With the task TOKEN_CLS peft fails on all-linear, for it adapts the head that it also saves whole.
    for make, more in ((xlmr, {"exclude_modules": ["classifier"]}), (llama, {"task_type": "CAUSAL_LM"})):
        for targets in ("all-linear", ["value"], ["query", "attention.output.dense"], ["down_proj", "q_proj"]):
            config = LoraConfig(target_modules=targets, **more)
            try:
                theirs = get_peft_model(make(), config).targeted_module_names
            except ValueError:
                with pytest.raises(UserError, match="targets"):
                    kloss.attach(make(), 1, 1, targets)
                continue
            assert list(layers(kloss.attach(make(), 1, 1, targets))) == theirs, targets
    plain = nn.ModuleDict(
        {"value": nn.Linear(4, 4), "other_value": nn.Linear(4, 4), "x": nn.ModuleDict({"value": nn.Linear(4, 4)})}
    )
    assert list(layers(kloss.attach(copy.deepcopy(plain), 1, 1, "value"))) == ["value", "x.value"]
    assert len(layers(kloss.attach(plain, 1, 1))) == 3


def test_mistakes_in_attach_change_nothing():
    model, hooked = xlmr(), xlmr()
    hooked.roberta.encoder.layer[1].output.dense.register_forward_hook(lambda *_: None)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1)
    for given, options, match in (
        (model, dict(adapters=0), "adapters must be a whole number of at least 1 or a list of different names, got 0"),
        (model, dict(adapters=["a", "b", "a"]), "list of different names, got .'a', 'b', 'a'"),
        (model, dict(adapters="abc"), "list of different names, got 'abc'"),
        (model, dict(rank=0), "rank must be a whole number of at least 1, .*; got 0"),
        (model, dict(rank=2.5), "rank must be a whole number"),
        (model, dict(adapters=3, rank=[1, 2]), r"one for each of the 3 adapters; got \[1, 2\]"),
        (model, dict(adapters=3, alpha=[1.0, 2.0]), r"alpha must be .* got \[1.0, 2.0\]"),
        (model, dict(adapters=1, alpha=float("nan")), "alpha must be a finite number"),
        (model, dict(dropout=1.0), r"dropout must be in \[0, 1\)"),
        (model, dict(targets="queri"), "'queri'; allowed: all-linear, or ends of names such as classifier, dense, key, query"),
        (model, dict(targets=("query", "valu")), "'valu'"),
        (model, dict(targets=()), "choose no nn.Linear"),
        (model, dict(targets="LayerNorm"), "is a LayerNorm, only nn.Linear"),
        (nn.Sequential(nn.ReLU()), {}, "choose no nn.Linear"),
        (nn.Linear(4, 4), {}, "choose no nn.Linear"),
        (hooked, {}, r"layer.1.output.dense has hooks"),
        (encoder, dict(targets="out_proj"), "out_proj is in a MultiheadAttention, which takes its weight"),
    ):
        with pytest.raises(UserError, match=match):
            kloss.attach(given, **options)
        assert not layers(given) and all(p.requires_grad for p in given.parameters()), match
    kloss.attach(model, 1, 1)
    with pytest.raises(UserError, match="has adapters already"):
        kloss.attach(nn.ModuleList([model]), 1, 1)


def test_mistakes_in_a_block():
    ours = attached(xlmr)
    for ids in ([0, 3], [-2, 0], [0.0, 1.0], [[0, 1]], [], torch.tensor([True, False])):
        with pytest.raises(UserError, match=r"one whole number in \[-1, 3\)"), kloss.use_adapters(ours, ids):
            pass
    for ids in ("x", ["0", None], None, {0, 1}, [[0], [1, 0]], [1 << 70], np.array(["0", "1"]), np.array([2**64 - 1] * 2)):
        with pytest.raises(UserError, match=r"one whole number in \[-1, 3\)"), kloss.use_adapters(ours, ids):
            pass
    for kind in (np.uint16, np.uint32, np.uint64, np.int8):
        with kloss.use_adapters(ours, np.array([0, 2, 1], dtype=kind)) as ids:
            assert ids == [0, 2, 1]
    with pytest.raises(UserError, match=r"step must be .* got -1"), kloss.use_adapters(ours, MIXED, step=-1):
        pass
    for model in (xlmr(), nn.ModuleList([ours, attached(xlmr)])):
        with pytest.raises(UserError, match="a model that kloss.attach was called on"), kloss.use_adapters(model, MIXED):
            pass
    with kloss.use_adapters(ours, [0, 1]), pytest.raises(ValueError, match=r"layer.0.attention.self.query: .*\[5, 5, 32\]"):
        logits(ours)
    layer = ours.roberta.encoder.layer[0].attention.self.query
    with kloss.use_adapters(ours, [0]), pytest.raises(ValueError, match="query: the input is torch.float64"):
        layer(torch.ones(1, 32).double())
    with kloss.use_adapters(ours, [0, 1] * 16), pytest.raises(ValueError, match="query: the input has shape"):
        layer(torch.ones(32))
    long = Tiny(dropout=0.5)
    with kloss.use_adapters(long, [0]), pytest.raises(UserError, match="dropout takes 65536 positions"):
        long(torch.ones(1, 65537, 64))
    assert torch.equal(logits(ours), logits(xlmr()))


def test_numbers_of_numpy_are_saved_as_numbers():
    numbers = dict(rank=np.array([2, 4]), alpha=np.float32(3), dropout=np.array([0.25, 0.5], np.float32), seed=np.int64(3))
    model = kloss.attach(nn.Sequential(nn.Linear(8, 8)), 2, **numbers, dropout_seed=np.int32(5))
    with kloss.use_adapters(model, [0], step=np.int64(7)):
        pass
    other = kloss.attach(nn.Sequential(nn.Linear(8, 8)), 2, 4)
    other.load_state_dict(model.state_dict())
    shared = other[0].shared
    assert (shared.ranks, shared.alphas, shared.chances) == ([2, 4], [3.0, 3.0], [0.25, 0.5])
    assert (shared.seed, shared.dropout_seed, shared.step) == (3, 5, 8)


@pytest.mark.parametrize("width", [24, 32])
@pytest.mark.parametrize("shape", [(2,), (2, 4), (2, 3, 4)])
def test_outputs_may_be_written_to(shape, width):
    """As by nn.ReLU(inplace=True)."""
    model, x = randomised(kloss.attach(nn.Sequential(nn.Linear(width, width)), 3, 2)), torch.ones(*shape, width)
    with kloss.use_adapters(model, [0, 2]):
        wanted, y = model(x).relu(), model(x).relu_()
    y.sum().backward()
    assert torch.equal(y, wanted) and model[0].lora_b.grad.any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
@pytest.mark.parametrize("ids", [[2, -1, 0, 2], [1] * 3], ids=["mixed", "one adapter, another first dimension"])
def test_a_pretended_gpu_runs_triton_and_waits_only_once_a_batch(ids, monkeypatch):
    def run(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 8))
        model = randomised(kloss.attach(model, 3, RANKS, alpha=ALPHAS, dropout=0.5)).to(device)
        x = torch.randn(4, 3, 16).to(device)
        with kloss.use_adapters(model, ids):
            model[0](x)
            before = len(gpu.waits) if device == GPU else 0
            y = model(x)
            y.sum().backward()
            waits = gpu.waits[before:] if device == GPU else []
        return y.detach().cpu(), model[0].lora_a.grad.cpu(), waits

    wanted = run("cpu")
    with pretended_gpu(monkeypatch) as gpu:
        got = run(GPU)
    assert "kloss.multi_lora" in gpu.calls and not got[2]
    torch.testing.assert_close(got[:2], wanted[:2])


def test_importing_kloss_does_not_import_torch():
    program = "import sys, kloss; assert 'torch' not in sys.modules; from kloss import attach, use_adapters; attach.__name__"
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])
    with pytest.raises(AttributeError, match="no attribute 'attack'"):
        kloss.attack  # noqa: B018


# What a layer's input is: batch first, or something else.


class Turned(nn.Module):
    """A layer that takes time first, in a model that takes the batch first."""

    def __init__(self, **more):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        for name, module in more.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.inner(x.transpose(0, 1)).transpose(0, 1)


def with_ids(model, ids, *inputs):
    with torch.no_grad(), kloss.use_adapters(model, ids):
        return model(*inputs)


@pytest.mark.parametrize("shape", [(32,), (7, 32), (6, 32), (1, 16, 32), (0, 32), (2, 3, 0, 32), (3, 2, 5, 32)])
def test_rows_of_one_adapter_may_have_any_shape(shape):
    model = randomised(kloss.attach(nn.Sequential(nn.Linear(32, 64)), 3, RANKS, alpha=ALPHAS, dropout=0.5)).eval()
    layer, x = model[0], torch.randn(shape)
    for g in range(3):
        update = F.linear(F.linear(x, layer.lora_a[g]), layer.lora_b[g]) * (ALPHAS[g] / RANKS[g])
        torch.testing.assert_close(with_ids(model, [g] * 6, x), F.linear(x, layer.weight, layer.bias) + update)
        assert with_ids(model.train(), [g] * 6, x).shape == (*shape[:-1], 64)  # with dropout
        model.eval()
    torch.testing.assert_close(with_ids(model, [-1] * 6, x), F.linear(x, layer.weight, layer.bias))
    if shape[0] != 6:
        with pytest.raises(ValueError, match="0: the input has shape .* or one id for all rows"):
            with_ids(model, [0, 1] * 3, x)


def test_one_adapter_of_a_model_whose_layers_meet_other_shapes():
    from transformers import DebertaV2Config, DebertaV2Model

    def make():
        torch.manual_seed(0)
        sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
        more = dict(relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8)
        return DebertaV2Model(DebertaV2Config(**sizes, **more, initializer_range=0.2, pooler_hidden_size=32)).eval()

    theirs = get_peft_model(make(), LoraConfig(r=2, target_modules=["query_proj", "dense"], init_lora_weights=False)).eval()
    ours = kloss.attach(make(), 2, 2, ("query_proj", "dense"))
    for name, layer in layers(ours).items():
        peer = theirs.base_model.model.get_submodule(name)
        layer.lora_a.data[1], layer.lora_b.data[1] = peer.lora_A["default"].weight.data, peer.lora_B["default"].weight.data * 4
    wanted = theirs(IDS, MASK).last_hidden_state
    torch.testing.assert_close(with_ids(ours, [1] * 5, IDS, MASK).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)
    assert (wanted - make()(IDS, MASK).last_hidden_state).abs().max() > 0.1
    with pytest.raises(ValueError, match="query_proj: the input has shape"):
        with_ids(ours, [0, 1, 1, 0, -1], IDS, MASK)


def time_first_models():
    from transformers import FSMTConfig, FSMTModel, LongformerConfig, LongformerModel, XLNetConfig, XLNetModel

    sizes = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    longformer = LongformerConfig(**sizes, attention_window=4, max_position_embeddings=40, pad_token_id=1)
    torch.manual_seed(0)
    fsmt = FSMTConfig(
        src_vocab_size=50, tgt_vocab_size=50, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, langs=["en", "de"],
    )  # fmt: skip
    ids = torch.randint(5, 50, (4, 4))
    return {
        "XLNet": (XLNetModel(XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=2, d_inner=64)), ids),
        "FSMT": (FSMTModel(fsmt), ids),
        "Longformer": (LongformerModel(longformer), ids),
        "a decoder of torch": (Decoder(), torch.randn(4, 4, 8)),
        "beside an LSTM": (Turned(lstm=nn.LSTM(8, 8)), torch.randn(4, 4, 8)),
    }


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16)

    def forward(self, x):
        return self.layer(x.transpose(0, 1), x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("name", ["XLNet", "FSMT", "Longformer", "a decoder of torch", "beside an LSTM"])
def test_models_known_to_take_time_first_take_one_adapter_at_a_time(name):
    model, x = time_first_models()[name]
    model = randomised(kloss.attach(model.eval(), 4, 4))

    def states(model, ids):
        out = with_ids(model, ids, x) if ids else model(x)
        return out if isinstance(out, torch.Tensor) else out.last_hidden_state

    with pytest.raises(ValueError, match="may have time before batch, .*: use one id for all rows"):
        states(model, [0, 1, 2, 3])
    merged = copy.deepcopy(model)
    for layer in layers(merged).values():
        layer.weight.data += (layer.lora_b[1] @ layer.lora_a[1]).data
    torch.testing.assert_close(states(model, [1] * 4), states(merged, None), rtol=1e-4, atol=1e-5)
    assert (states(model, [1] * 4) - states(model, None)).abs().max() > 1e-3


def test_a_layer_that_was_seen_to_take_time_first_is_refused_at_the_length_of_the_batch():
    model, square, long = randomised(kloss.attach(Turned(), 4, 4)), torch.randn(4, 4, 8), torch.randn(4, 6, 8)
    with_ids(model, [1] * 4, long)
    with pytest.raises(ValueError, match="inner: the input has shape .* time before batch"):
        with_ids(model, [0, 1, 2, 3], square)
    model = randomised(kloss.attach(Turned(), 4, 4))
    for x in (long, square):  # the second would be computed, with the wrong adapters
        with pytest.raises(ValueError, match="inner: the input has shape"):
            with_ids(model, [0, 1, 2, 3], x)


def test_a_layer_that_was_seen_to_take_the_batch_first_stays_so():
    model = randomised(kloss.attach(nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8)), 4, 4))
    layer, square = model[0], torch.randn(4, 4, 8)
    with kloss.use_adapters(model, [0, 1, 2, 3]):
        with pytest.raises(ValueError, match="time before batch"):
            layer(square)
        layer(torch.randn(4, 6, 8))
        layer(square)
    for plain in (nn.Linear(8, 8), nn.Linear(8, 8)):
        model = randomised(kloss.attach(nn.Sequential(plain), 4, 4))
        with_ids(model, [1] * 4, torch.randn(8, 4, 8))  # beams: a multiple of the batch says nothing
        with_ids(model, [1], torch.randn(7, 1, 8))
        assert with_ids(model, [0, 1, 2, 3], square).shape == square.shape


def test_tokens_that_a_router_chose_take_one_adapter_at_a_time():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(8, 2), nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):  # [4, 2, 8]: each expert gets the four tokens of one position
            return torch.stack([expert(x[:, i]) for i, expert in enumerate(self.experts)], 1)

    model = randomised(kloss.attach(Block(), 4, 4, "experts.0"))
    x = torch.randn(4, 2, 8)
    with pytest.raises(ValueError, match=r"experts.0: .*\[4, 8\], the tokens that a router chose: use one id"):
        with_ids(model, [0, 1, 2, 3], x)
    assert not torch.equal(with_ids(model, [1] * 4, x), with_ids(model, [2] * 4, x))


# Models that others have changed.


def test_a_model_with_adapters_of_another_library_is_refused():
    theirs = get_peft_model(xlmr(), LoraConfig(r=2, target_modules=["query"], init_lora_weights=False))
    wanted = logits(theirs.eval())

    class LoRAParametrisation(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = nn.Parameter(torch.ones(1, 8)), nn.Parameter(torch.ones(8, 1))

        def forward(self, weight):
            return weight + self.lora_B @ self.lora_A

    from torch.nn.utils import parametrize

    minimal = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parametrize.register_parametrization(minimal[0], "weight", LoRAParametrisation())
    inside = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    parametrize.register_parametrization(inside[0], "weight", nn.Linear(8, 8))
    hub = type("LoRALinear", (nn.Linear,), {"__module__": "adapters.methods.lora"})
    for model, match in (
        (theirs, "has peft adapters .itself: PeftModel.; merge them .*merge_and_unload"),
        (theirs.base_model.model, "has peft adapters"),
        (nn.Sequential(hub(8, 8), nn.Linear(8, 8)), "has adapters adapters .0: LoRALinear"),
        (minimal, "LoRA adapters of its own .0.parametrizations.weight.0: LoRAParametrisation"),
        (inside, "0.parametrizations.weight.0 belongs to a parametrisation"),
    ):
        before = [p.requires_grad for p in model.parameters()]
        with pytest.raises(UserError, match=match):
            kloss.attach(model, 2, 4)
        assert not layers(model) and [p.requires_grad for p in model.parameters()] == before
    merged = kloss.attach(theirs.merge_and_unload(), 2, 2, "query")
    torch.testing.assert_close(logits(merged), wanted)


def test_wrappers_that_would_not_see_the_adapters_are_refused():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel

    from kloss.models.targets import PARAMETER_WRAPPERS

    kinds = nn.parallel.DistributedDataParallel, FullyShardedDataParallel, FSDPModule
    assert {kind.__name__ for kind in kinds} == PARAMETER_WRAPPERS
    wrapper = type("DistributedDataParallel", (nn.Sequential,), {})
    with pytest.raises(UserError, match="the model is in a DistributedDataParallel, .* attach first"):
        kloss.attach(wrapper(nn.Linear(8, 8)), 1, 1)
    with pytest.raises(UserError, match="^0 is compiled by itself.* attach first"):
        kloss.attach(nn.Sequential(torch.compile(nn.Linear(8, 8), backend="eager")), 1, 1)


def test_the_output_head_of_a_wrapped_model_stays_out_of_all_linear():
    plain = layers(kloss.attach(xlmr(), 1, 1)).keys()
    for wrapped in (torch.compile(xlmr(), backend="eager"), nn.DataParallel(xlmr())):
        assert {layer.name for layer in layers(kloss.attach(wrapped, 1, 1)).values()} == plain


@pytest.mark.parametrize("task", ["TOKEN_CLS", "SEQ_CLS"])
def test_an_adapter_with_a_head_loads_without_it(task, tmp_path):
    theirs = get_peft_model(xlmr(), LoraConfig(task_type=task, r=2, target_modules=["query"], init_lora_weights=False)).eval()
    theirs.save_pretrained(tmp_path)
    ours = kloss.attach(xlmr(), 2, 4, "query")
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(UserError, match=r'classifier.* has no place .* modules_to_save \(classifier, score\); head="ignore"'):
        load_peft(ours, tmp_path, 1)
    with pytest.raises(UserError, match="head must be 'error' or 'ignore', got 'drop'"):
        load_peft(ours, tmp_path, 1, head="drop")
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    load_peft(ours, tmp_path, 1, head="ignore")
    with kloss.use_adapters(ours, [1] * 5):
        torch.testing.assert_close(logits(ours), logits(theirs))  # whose head is still the base model's
    assert torch.equal(ours.classifier.weight, before["classifier.weight"])


@pytest.mark.parametrize(
    "options",
    [
        {"rank": True},
        {"alpha": True},
        {"alpha": [1.0, True]},
        {"alpha": 10**40},
        {"adapters": True},
        {"seed": 1 << 64},
        {"seed": 0.5},
    ],
    ids=str,
)
def test_numbers_that_are_none(options):
    with pytest.raises(UserError, match=f"{[*options][0]} must be"):
        kloss.attach(xlmr(), **{"adapters": 2} | options)
