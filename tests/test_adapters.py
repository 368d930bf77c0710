"""Adapters come and go: what stays is left to the bit, what is new has no trace of what was there, files hold all of them."""

import copy
import io
import json

import pytest
import torch
from peft import PeftModel
from test_attach import ALPHAS, IDS, LABELS, MASK, RANKS, attached, layers, llama, logits, randomised, with_ids, xlmr
from test_optim import factors, trained
from torch import nn
from torch.utils.checkpoint import checkpoint

import kloss
from kloss import adapters
from kloss.errors import UserError
from kloss.models.attach import load_peft, save_peft
from kloss.optim import AdapterAdamW

NAMES = ["en", "fr", "sw"]


def named(make=xlmr, **options):
    return attached(make, **{"adapters": [*NAMES]} | options)


def with_optimizer(steps=2, **options):
    """A model, an optimiser, some steps with all adapters."""
    model = named(**options).train()
    optimizer = AdapterAdamW(model, [1e-2, 3e-3, 2e-2], weight_decay=0.1)
    trained(optimizer, model, [["fr", "en", "sw", "fr", "sw"]] * steps)
    return model, optimizer


def everything(model, optimizer, name) -> list:
    """All that is known of an adapter."""
    shared, state = next(iter(layers(model).values())).shared, optimizer.state_dict()
    g, i = shared.names.index(name), state["state"]["names"].index(name)
    numbers = [getattr(shared, key)[g] for key in ("ranks", "alphas", "scaling", "chances", "seeds")]
    moments = [state["state"][key][i].clone() for key in ("exp_avg", "exp_avg_sq", "steps")]
    group = {k: v for k, v in state["param_groups"][i].items() if k != "name"}
    return [f[g].detach().clone() for f in factors(model).values()] + moments, numbers, group


def assert_same(got, wanted):
    assert got[1:] == wanted[1:] and len(got[0]) == len(wanted[0])
    assert all(torch.equal(a, b) for a, b in zip(got[0], wanted[0], strict=True))


def test_removing_an_adapter_leaves_the_others_to_the_bit():
    model, optimizer = with_optimizer()
    before = {name: everything(model, optimizer, name) for name in NAMES}
    with torch.no_grad():
        wanted = with_ids(model, ["sw", "en", -1, "sw", "en"], IDS, MASK).logits
    adapters.remove(model, "fr")
    for name in ("en", "sw"):
        assert_same(everything(model, optimizer, name), before[name])
    assert torch.equal(with_ids(model, [1, 0, -1, 1, 0], IDS, MASK).logits, wanted)
    with pytest.raises(UserError, match="there is no adapter fr; there are en, sw"):
        with_ids(model, ["fr"] * 5, IDS, MASK)
    trained(optimizer, model, [["sw"] * 5])
    assert_same(everything(model, optimizer, "en"), before["en"])
    assert int(everything(model, optimizer, "sw")[0][-1]) == 3 and [g["name"] for g in optimizer.param_groups] == ["en", "sw"]
    adapters.remove(model, 1)
    with pytest.raises(UserError, match="the last adapter, en"):
        adapters.remove(model, "en")


def test_a_new_adapter_has_no_trace_of_what_was_there():
    model, optimizer = with_optimizer()
    before = {name: everything(model, optimizer, name) for name in NAMES}
    adapters.remove(model, "fr")
    assert adapters.add(model, "fr", rank=2, alpha=5.0, dropout=0.25) == 2
    (*weights, exp_avg, exp_avg_sq, steps), numbers, group = everything(model, optimizer, "fr")
    assert not exp_avg.any() and not exp_avg_sq.any() and int(steps) == 0
    assert numbers[:4] == [2, 5.0, 2.5, 0.25] and group == before["en"][2]
    for name, weight in zip(factors(model), weights, strict=True):
        if name.endswith("a"):
            inputs = weight.shape[1]
            assert not weight[2:].any() and weight[:2].abs().max() <= inputs**-0.5 and weight[:2].std() > 0.4 * inputs**-0.5
            old = [before[n][0][[*factors(model)].index(name)] for n in NAMES]
            assert not any(torch.equal(weight[0], other[0]) for other in old), "the draw of an adapter that was there"
        else:
            assert not weight.any()
    for name in ("en", "sw"):
        assert_same(everything(model, optimizer, name), before[name])
    trained(optimizer, model, [["fr"] * 5])
    for name in ("en", "sw"):
        assert_same(everything(model, optimizer, name), before[name])
    assert int(everything(model, optimizer, "fr")[0][-1]) == 1


def test_a_new_adapter_trains_as_if_it_had_been_there_from_the_start():
    late, early = (kloss.attach(xlmr(), names, 4) for names in (["en"], ["en", "fr"]))
    optimizers = [AdapterAdamW(model, 1e-2) for model in (late, early)]
    for model, optimizer in zip((late, early), optimizers, strict=True):
        trained(optimizer, model, [["en"] * 5])
    adapters.add(late, "fr")
    for name, f in factors(early).items():
        assert torch.equal(factors(late)[name][1], f[1])  # drawn alike, from the seed and its number
    for model, optimizer in zip((late, early), optimizers, strict=True):
        trained(optimizer, model, [["en", "fr", "fr", "en", "fr"]] * 2)
    for name in ("en", "fr"):
        assert_same(everything(late, optimizers[0], name), everything(early, optimizers[1], name))


def test_a_fork_begins_where_its_source_is_and_goes_its_own_way():
    model, optimizer = with_optimizer()
    before = {name: everything(model, optimizer, name) for name in NAMES}
    assert adapters.fork(model, "fr", "fr-CA") == 3
    fork = everything(model, optimizer, "fr-CA")
    assert fork[1][:4] == before["fr"][1][:4] and fork[1][4] != before["fr"][1][4]  # a dropout of its own
    assert fork[2] == before["fr"][2] and all(torch.equal(a, b) for a, b in zip(fork[0], before["fr"][0], strict=True))
    trained(optimizer, model, [["fr-CA"] * 5])
    for name in NAMES:
        assert_same(everything(model, optimizer, name), before[name])
    grown = everything(model, optimizer, "fr-CA")
    trained(optimizer, model, [["fr"] * 5])
    assert_same(everything(model, optimizer, "fr-CA"), grown)
    source = everything(model, optimizer, "fr")
    assert all(torch.equal(a, b) for a, b in zip(source[0], grown[0], strict=True)), "both made the same step"
    # A fork whose source is gone before the next step, and a fork of a fork.
    adapters.fork(model, "fr", "a")
    adapters.fork(model, "a", "b")
    adapters.remove(model, "fr")
    adapters.remove(model, "a")
    of_a_fork = everything(model, optimizer, "b")
    assert all(torch.equal(a, b) for a, b in zip(of_a_fork[0], source[0], strict=True)) and of_a_fork[2] == source[2]
    adapters.fork(model, "b", "c")
    adapters.reset(model, "c")
    *_, exp_avg, exp_avg_sq, steps = everything(model, optimizer, "c")[0]
    assert not exp_avg.any() and not exp_avg_sq.any() and int(steps) == 0
    assert everything(model, optimizer, "c")[2] == source[2]


def test_reset_and_load_start_an_adapter_anew(tmp_path):
    start = named()
    save_peft(start, tmp_path, 1)
    for renew in (lambda model: adapters.reset(model, "fr"), lambda model: load_peft(model, tmp_path, "fr")):
        model, optimizer = with_optimizer()
        before = {name: everything(model, optimizer, name) for name in NAMES}
        renew(model)
        (*weights, exp_avg, exp_avg_sq, steps), numbers, group = everything(model, optimizer, "fr")
        assert not exp_avg.any() and not exp_avg_sq.any() and int(steps) == 0
        assert numbers == before["fr"][1] and group == before["fr"][2]
        fresh = kloss.attach(xlmr(), [*NAMES], RANKS, alpha=ALPHAS) if "reset" in renew.__code__.co_names else start
        assert all(torch.equal(w, f[1]) for w, f in zip(weights, factors(fresh).values(), strict=True))
        for name in ("en", "sw"):
            assert_same(everything(model, optimizer, name), before[name])


def test_a_name_is_all_that_a_new_name_changes():
    model, optimizer = with_optimizer()
    before = everything(model, optimizer, "fr")
    adapters.rename(model, "fr", "fr-FR")
    assert_same(everything(model, optimizer, "fr-FR"), before)
    assert [group["name"] for group in optimizer.param_groups] == ["en", "fr-FR", "sw"]


def test_gradients_stay_with_their_adapters():
    model = named()
    with kloss.use_adapters(model, ["en", "fr", "sw", "sw", "fr"]):
        logits(model).square().sum().backward()
    wanted = {name: f.grad.clone() for name, f in factors(model).items()}
    adapters.fork(model, "sw", "x")
    adapters.remove(model, "en")
    for name, f in factors(model).items():
        assert torch.equal(f.grad[:2], wanted[name][1:]) and not f.grad[2].any()


@pytest.mark.parametrize("width", [8, 32])
def test_adapters_change_while_a_loss_of_before_is_kept(width):
    """As the variable of a training loop keeps it, and with it what adds up gradients."""
    model = randomised(kloss.attach(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)), ["a", "b"], 2))
    optimizer, x = AdapterAdamW(model, lr=1e-2), torch.ones(2, width)

    def step():
        optimizer.zero_grad()
        with kloss.use_adapters(model, ["b", "b"]):
            loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    loss = step()
    changes = [
        lambda: adapters.add(model, "c"),
        lambda: adapters.fork(model, "b", "d"),
        lambda: adapters.remove(model, "a"),
    ]
    for change in changes:
        change()
        before, loss = loss, step()
        assert loss < before
    assert optimizer.rows.steps.tolist() == [4, 0, 2]


def test_an_adapter_that_is_loaded_between_forward_and_backward_is_refused(tmp_path):
    """Its gradients would be of weights that its outputs were not computed with."""
    model = named()
    save_peft(model, tmp_path, 1)
    with kloss.use_adapters(model, [0] * 5):
        loss = logits(model).square().sum()
    load_peft(model, tmp_path, 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_graph_of_before_is_refused():
    model, x = named(lambda: nn.Sequential(nn.Linear(8, 8)), targets="0"), torch.randn(3, 2, 8, requires_grad=True)
    for reentrant in (False, True):
        with kloss.use_adapters(model, ["sw", "fr", "sw"]):
            y = checkpoint(model, x, use_reentrant=reentrant).sum()
        adapters.remove(model, "en")
        with pytest.raises(UserError, match="computed again"):
            y.backward()
        adapters.add(model, "en")


def test_a_folder_holds_all_adapters_and_peft_loads_each(tmp_path):
    model = named(llama)
    adapters.save(model, tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == NAMES
    theirs = PeftModel.from_pretrained(llama(), tmp_path / "all" / "en", adapter_name="en")
    for name in NAMES[1:]:
        theirs.load_adapter(tmp_path / "all" / name, adapter_name=name)
    with torch.no_grad():
        wanted = logits(theirs.eval(), adapter_names=["sw", "en", "__base__", "fr", "en"])
    other = kloss.attach(llama(), ["sw", "more", "fr", "en"], 4)
    kept = [f[1].detach().clone() for f in factors(other).values()]
    adapters.load(other, tmp_path / "all")
    torch.testing.assert_close(with_ids(other, ["sw", "en", -1, "fr", "en"], IDS, MASK).logits, wanted)
    assert all(torch.equal(f[1], old) for f, old in zip(factors(other).values(), kept, strict=True))


def test_a_folder_that_does_not_fit_changes_nothing(tmp_path):
    model = named()
    adapters.save(model, tmp_path)
    (tmp_path / "sw" / "adapter_model.safetensors").write_bytes(b"")
    other = kloss.attach(xlmr(), [*NAMES], 4)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(UserError, match="sw.* is damaged"):
        adapters.load(other, tmp_path)
    (tmp_path / "sw" / "adapter_config.json").unlink()
    few = kloss.attach(xlmr(), ["en"], 4)
    with pytest.raises(UserError, match="fr: .* no adapter of that name; there are en"):
        adapters.load(few, tmp_path)
    with pytest.raises(UserError, match="no folder of an adapter"):
        adapters.load(other, tmp_path / "en")
    with pytest.raises(UserError, match="does not exist"):
        adapters.load(other, tmp_path / "none")
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    for name in ("a/b", "..", "x" * 300):
        odd = kloss.attach(xlmr(), ["en", name], 4)
        with pytest.raises(UserError, match="cannot be the name of a folder"):
            adapters.save(odd, tmp_path / "odd")
        assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_detach_leaves_a_plain_model_with_one_adapter_or_none_in_it(dtype):
    def make():
        return llama().to(dtype)

    base, model = make(), randomised(kloss.attach(make(), [*NAMES], RANKS, alpha=ALPHAS))
    wanted = with_ids(model, ["fr"] * 5, IDS, MASK).logits
    merged, bare = (adapters.detach(copy.deepcopy(model), *adapter) for adapter in (["fr"], []))
    for plain in (merged, bare):
        assert not layers(plain) and {*plain.state_dict()} == {*base.state_dict()}
        assert not plain._forward_hooks and not plain._forward_pre_hooks
        assert type(plain.model.layers[0].self_attn.q_proj) is nn.Linear
    assert torch.equal(logits(bare), logits(base))
    tolerance = dict(rtol=0.1, atol=0.1) if dtype == torch.bfloat16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(merged), wanted, **tolerance)
    assert (wanted - logits(base)).abs().max() > 0.5
    assert torch.equal(with_ids(model, ["fr"] * 5, IDS, MASK).logits, wanted)
    kloss.attach(merged, 1, 1)


def test_detach_keeps_ties_of_weights_that_it_does_not_change():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(6, 8), "head": nn.Linear(8, 6, bias=False)})
    model["head"].weight = model["embed"].weight
    randomised(kloss.attach(model, 1, 2, alpha=8.0))
    before = model["embed"].weight.detach().clone()
    adapters.detach(model, 0)
    assert torch.equal(model["embed"].weight, before) and (model["head"].weight - before).abs().max() > 0.1


def test_a_state_dict_holds_ranks_and_all_else():
    one = attached(xlmr, adapters=[*NAMES], dropout=[0.0, 0.5, 0.25], seed=7).train()
    adapters.remove(one, "fr")
    adapters.add(one, "fr", rank=1, dropout=0.5)
    with kloss.use_adapters(one, ["en"] * 5, step=41):
        pass
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = kloss.attach(xlmr(), 3, 4).train()
    other.load_state_dict(saved)
    for ids in (["sw", "fr", "en", -1, "fr"], ["fr"] * 5):
        assert torch.equal(with_ids(other, ids, IDS, MASK).logits, with_ids(one, ids, IDS, MASK).logits)  # dropout too
    adapters.reset(one, "fr")
    adapters.reset(other, "fr")
    adapters.add(one, "x")
    adapters.add(other, "x")
    assert all(torch.equal(f, factors(one)[name]) for name, f in factors(other).items())


def test_a_state_dict_of_before_does_not_confuse_adapters_that_came_since():
    model, optimizer = with_optimizer()
    saved = copy.deepcopy(model.state_dict())
    adapters.remove(model, "en")
    adapters.add(model, "nl", rank=3)
    trained(optimizer, model, [["nl"] * 5])
    model.load_state_dict(saved)  # whose adapters were made earlier
    adapters.add(model, "x")
    *_, exp_avg, exp_avg_sq, steps = everything(model, optimizer, "x")[0]
    assert not exp_avg.any() and not exp_avg_sq.any() and int(steps) == 0


def test_a_state_dict_without_them_is_refused():
    model = attached(xlmr)
    saved = {name: tensor for name, tensor in model.state_dict().items() if "extra_state" not in name}
    assert len(saved) < len(model.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*_extra_state"):
        attached(xlmr).load_state_dict(saved)
    one = next(name for name in model.state_dict() if "extra_state" in name)
    good = json.loads(bytes(model.state_dict()[one].tolist()))
    changed = {"names": [["a"], ["a", "a", "b"], "abc"], "ranks": [[1, 2, 5], [1, 2], None, 0], "chances": [[1.0, 0, 0]]}
    changed |= {"seeds": [[1, 2, "3"]], "step": [None], "alphas": [[float("nan"), 1, 1]]}
    bads = [json.dumps(good | {name: value}).encode() for name, values in changed.items() for value in values]
    for bad in (b"", b"[]", b"{}", b'{"names": ["a"]}', b"\xff", *bads):
        other = attached(xlmr)
        with pytest.raises(UserError, match="query: .*settings|adapters must be"):
            other.load_state_dict(model.state_dict() | {one: torch.frombuffer(bytearray(bad or b" "), dtype=torch.uint8)})
        assert layers(other).popitem()[1].shared.ranks == RANKS
    with kloss.use_adapters(model, [0]), pytest.raises(UserError, match="outside use_adapters"):
        model.load_state_dict(attached(xlmr, seed=1).state_dict())


def test_mistakes():
    model = named()
    before = copy.deepcopy(model.state_dict())
    for mistake, match in (
        (lambda: adapters.add(model, "fr"), "there is an adapter fr already"),
        (lambda: adapters.add(model, ""), "name must be"),
        (lambda: adapters.add(model, "x", rank=5), r"rank must be a whole number in 1..4, .* got 5"),
        (lambda: adapters.add(model, "x", alpha=float("nan")), "alpha must be"),
        (lambda: adapters.add(model, "x", dropout=1.0), "dropout must be"),
        (lambda: adapters.fork(model, "nl", "x"), "there is no adapter nl; there are en, fr, sw"),
        (lambda: adapters.fork(model, 3, "x"), "there is no adapter 3, the model has 0 to 2"),
        (lambda: adapters.rename(model, "en", "fr"), "there is an adapter fr already"),
        (lambda: adapters.remove(model, -1), "there is no adapter -1"),
        (lambda: adapters.reset(model, True), "there is no adapter True"),
        (lambda: adapters.detach(model, "nl"), "there is no adapter nl"),
        (lambda: adapters.detach(xlmr()), "a model that kloss.attach was called on"),
    ):
        with pytest.raises(UserError, match=match):
            mistake()
    with kloss.use_adapters(model, ["en"]):
        for inside in (adapters.remove, adapters.reset, adapters.detach):
            with pytest.raises(UserError, match="outside use_adapters"):
                inside(model, "en")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_training_goes_on_after_all_of_it():
    model, optimizer = with_optimizer(dropout=0.1)
    adapters.remove(model, "en")
    adapters.fork(model, "sw", "sw-KE")
    adapters.add(model, "nl", rank=1)
    losses = []
    for _ in range(12):
        with kloss.use_adapters(model, ids := [3, 2, 1, 0, 3]):
            out = logits(model)
        losses.append(kloss.adapter_losses(out, LABELS, ids))
        losses[-1].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (losses[-1] < losses[0]).all() and optimizer.rows.steps.tolist() == [14, 14, 14, 12]
