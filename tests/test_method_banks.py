"""Prefix tuning, IA³ and fusion: values and gradients are peft's, transformers' or merged weights'; each learner is as alone."""

import copy
import math

import pytest
import torch
from test_xlmr import SMALL, close, make_batch, make_model, padded, transformers_model

from kloss.kernels import StepDropout, make_segments, reference, row_keys
from kloss.kernels.dropout import Dropout
from kloss.models import AdapterBank, XLMRConfig
from kloss.models.methods import METHODS, FusionBank, IA3Bank, MethodBank, PrefixBank, prefixed_attention

SIZE = 3
LENGTHS, WHOSE = [4, 6, 1, 9, 5, 3], [1, -1, 0, 1, 0, 1]


def donors_of(config, seed=0):
    """Finished adapters: random ones, of two ranks."""
    bank = AdapterBank(config, SIZE, [2, 4, 4], alpha=[2.0, 8.0, 4.0])
    generator = torch.Generator().manual_seed(seed)
    for g, rank in enumerate(bank.ranks.tolist()):
        for tensor in bank._peft_tensors(g, rank).values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return bank


def bank_of(kind, config=SMALL, learners=2, seed=0, drawn=False):
    """A bank of which each row is random, or as drawn."""
    bank = kind(config, list(range(learners)), SIZE)
    if not drawn:
        bank.param.add_(torch.randn(bank.param.shape, generator=torch.Generator().manual_seed(seed)) * 0.2)
    if isinstance(bank, FusionBank):
        for g in range(learners):
            bank.give_(g, donors_of(config, (g + g // 2) % 2))
    return bank


def leaves(bank, g):
    """Row g's slots in fp64, for an oracle."""
    return {name: bank.view(bank.param, name)[g].double().clone().requires_grad_() for name in bank.slots}


def merged(model, bank, g, row):
    """The model's parameters in fp64 with IA³ or a fusion merged into them, as functions of a row's slots."""
    parameters = {name: p.detach().double() for name, p in model.named_parameters()}
    for layer in range(model.config.num_hidden_layers):
        at, width = f"layers.{layer}.", model.config.hidden_size
        if isinstance(bank, IA3Bank):
            factor = torch.cat([torch.ones(width, dtype=torch.double), 1 + row[f"{layer}.key_value"]])
            parameters[at + "qkv.weight"] = parameters[at + "qkv.weight"] * factor[:, None]
            parameters[at + "qkv.bias"] = parameters[at + "qkv.bias"] * factor
            parameters[at + "down.weight"] = parameters[at + "down.weight"] * (1 + row[f"{layer}.inner"])
        else:
            donors = bank.donors[int(bank.given[g])]
            for m, (name, slices) in (
                (m, kind) for m in range(SIZE) for kind in (("qkv", 3), ("out", 1), ("up", 1), ("down", 1))
            ):
                a, b = (donors.view(donors.param, f"{layer}.{name}.{kind}")[m].double() for kind in "ab")
                update = torch.cat([y @ x for x, y in zip(a.chunk(slices), b.chunk(slices), strict=True)])
                gate = 1 / SIZE + row[f"{layer}.gates"][m]
                parameters[at + name + ".weight"] = parameters[at + name + ".weight"] + gate * donors.scaling[m].double() * update
    parameters |= {f"classifier.{kind}": row[f"head.{kind}"] for kind in ("weight", "bias")}
    return parameters


def with_prefix(model, row, ids):
    """transformers' XLM-R in fp64 with a row's keys and values as past ones, and its head; logits [n, C]."""
    from transformers import DynamicCache

    theirs, (heads, width) = transformers_model(model).double(), (model.config.num_attention_heads, model.config.hidden_size)
    cache = DynamicCache()
    for layer in range(model.config.num_hidden_layers):
        keys, values = (
            row[f"{layer}.{kind}"].view(1, SIZE, heads, width // heads).transpose(1, 2) for kind in ("keys", "values")
        )
        cache.update(keys, values, layer)
    positions = torch.arange(len(ids))[None] + model.config.first_position
    seen = torch.ones(1, SIZE + len(ids), dtype=torch.long)
    hidden = theirs.roberta(ids[None], attention_mask=seen, position_ids=positions, past_key_values=cache).last_hidden_state[0]
    return hidden @ row["head.weight"].T + row["head.bias"]


def oracle(model, bank, g, row, ids):
    """Logits of one sequence in fp64."""
    if isinstance(bank, PrefixBank):
        return with_prefix(model, row, ids)
    offsets = torch.tensor([0, len(ids)], dtype=torch.int32)
    return torch.func.functional_call(copy.deepcopy(model).double(), merged(model, bank, g, row), (ids, offsets))


@pytest.mark.parametrize("kind", METHODS.values())
@pytest.mark.parametrize("drawn", [True, False])
def test_values_and_gradients_are_an_oracles(kind, drawn):
    """transformers' with past keys and values, or weights with the method merged into them, sequence by sequence in fp64."""
    model = make_model().freeze_backbone()
    bank = bank_of(kind, drawn=drawn)
    ids, offsets = make_batch(LENGTHS, SMALL.vocab_size)
    logits = model(torch.cat([ids, ids[:2]]), offsets, make_segments(offsets, torch.tensor(WHOSE), 2, rows=len(ids) + 2), bank)
    d_logits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(5))
    d_logits[len(ids) :] = 0
    logits.backward(d_logits)
    rows = [leaves(bank, g) for g in range(2)]
    for g, start, end in zip(WHOSE, offsets.tolist(), offsets.tolist()[1:], strict=False):
        if g < 0:
            wanted = model(ids[start:end], torch.tensor([0, end - start], dtype=torch.int32))
        else:
            wanted = oracle(model, bank, g, rows[g], ids[start:end])
            wanted.backward(d_logits[start:end].double())
        close(logits[start:end].detach().double(), wanted.detach().double(), 100, f"logits of {start}:{end}")
    for g, row in enumerate(rows):
        for name, leaf in row.items():
            close(bank.view(bank.grad, name)[g].double(), leaf.grad, 200, f"{name} of {g}")


@pytest.mark.parametrize("kind", METHODS.values())
def test_it_begins_where_its_method_does(kind):
    model = make_model()
    bank = bank_of(kind, drawn=True)
    ids, offsets = make_batch([7], 60)
    alone = model.encode(ids, offsets, make_segments(offsets, torch.tensor([0]), 2), bank)
    if kind is IA3Bank:
        torch.testing.assert_close(alone, model.encode(ids, offsets))
    assert bank.view(bank.param, "head.weight").std() == pytest.approx(SMALL.initializer_range, rel=0.3)
    assert not torch.equal(bank.param[0], bank.param[1]) and not bank.view(bank.param, "head.bias").any()
    again = bank_of(kind, drawn=True)
    assert torch.equal(again.param, bank.param)


def test_ia3_is_pefts(tmp_path):
    """peft's own layers, on transformers' model with the same weights."""
    peft = pytest.importorskip("peft")
    model, bank = make_model(), bank_of(IA3Bank, learners=1)
    names = r".*(attention\.self\.(key|value)|layer\.\d+\.output\.dense)"
    config = peft.IA3Config(target_modules=names, feedforward_modules=r".*layer\.\d+\.output\.dense", task_type="TOKEN_CLS")
    theirs = peft.get_peft_model(transformers_model(model), config)
    vectors = {name: p for name, p in theirs.named_parameters() if "ia3_l" in name}
    assert len(vectors) == 3 * SMALL.num_hidden_layers
    row = {name: bank.view(bank.param, name)[0] for name in bank.slots}
    for name, vector in vectors.items():
        layer = name.split(".layer.")[1].split(".")[0]
        key, value = row[f"{layer}.key_value"].chunk(2)
        own = key if ".key." in name else value if ".value." in name else row[f"{layer}.inner"]
        vector.data.copy_(1 + own.view(vector.shape))
    ids, offsets = make_batch([7, 12, 3], 60)
    inputs = padded(ids, offsets)
    hidden = theirs.base_model.model.roberta(**inputs).last_hidden_state[inputs["attention_mask"].bool()]
    mine = model.encode(ids, offsets, make_segments(offsets, torch.zeros(3, dtype=torch.int32), 1), bank)
    close(mine.detach(), hidden.detach(), 60, "hidden states")
    assert bank.trainable(0) == sum(v.numel() for v in vectors.values()) + sum(
        row[f"head.{kind}"].numel() for kind in ("weight", "bias")
    )


def test_a_prefix_has_as_many_weights_as_pefts():
    peft = pytest.importorskip("peft")
    bank = bank_of(PrefixBank, learners=1)
    config = peft.PrefixTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=SIZE)
    theirs = peft.get_peft_model(transformers_model(make_model()), config)
    (embedding,) = (p for name, p in theirs.named_parameters() if "prompt_encoder" in name)
    assert bank.trainable(0, ("[0-9]*",)) == embedding.numel() == 2 * SMALL.num_hidden_layers * SIZE * SMALL.hidden_size


def test_attention_with_an_empty_prefix_is_attention_and_dropout_drops_prefixes_too():
    lengths, heads, generator = [4, 1, 7], 2, torch.Generator().manual_seed(0)
    qkv = torch.randn(12, 3 * 16, generator=generator)
    offsets = torch.tensor([0, 4, 5, 12], dtype=torch.int32)
    keys = row_keys(torch.full((3,), 4), torch.arange(3), offsets)
    for p in (0.0, 0.4):
        dropout = Dropout(torch.tensor([p]), torch.tensor([7]), keys, 3) if p else None
        mine = prefixed_attention(qkv, lengths, heads, None, dropout)
        close(mine, reference.packed_attention(qkv, offsets, heads, dropout=dropout), 30, f"p = {p}")
    prefix = torch.zeros(2, 16), torch.eye(2, 16)  # all keys are 0, and the values say which was kept
    kept = prefixed_attention(torch.zeros(12, 48), lengths, heads, prefix, dropout)
    scale = 1 / (1 - round(0.4 * 65536) / 65536)
    for values, n in zip(kept[:, :2].tolist(), [4] * 4 + [1] + [7] * 7, strict=True):
        assert all(v == 0 or math.isclose(v, scale / (n + 2), rel_tol=1e-5) for v in values)
    assert 0 < (kept[:, :2] == 0).float().mean() < 1


def dropped(model, bank, parts, p=0.3):
    """Logits of each learner in a training batch of (learner, ids), by sequence."""
    offsets = torch.tensor([0, *torch.tensor([len(ids) for _, ids in parts]).cumsum(0).tolist()], dtype=torch.int32)
    adapter = torch.tensor([g for g, _ in parts], dtype=torch.int32)
    number = torch.tensor([sum(h == g for h, _ in parts[:i]) for i, (g, _) in enumerate(parts)])
    segments = make_segments(offsets, adapter, bank.adapters)
    keys = row_keys(torch.full((len(parts),), 4), number, offsets)
    chance = torch.full((bank.adapters,), p)
    dropout = StepDropout(chance, chance, None, torch.arange(bank.adapters), keys, segments.row_adapter, model.num_sites)
    bank.zero_grad()
    logits = model(torch.cat([ids for _, ids in parts]), offsets, segments, bank, dropout=dropout)
    logits.square().sum().backward()
    return logits.detach().split([len(ids) for _, ids in parts])


@pytest.mark.parametrize("kind", METHODS.values())
def test_a_row_among_others_is_the_row_alone_to_the_bit(kind):
    """Values and gradients, with dropout, beside a learner of NaN, in two orders."""
    sizes = XLMRConfig(**vars(SMALL) | {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4})
    model = make_model(sizes).freeze_backbone()
    bank = bank_of(kind, sizes, learners=3)
    bank.param[2] = torch.nan
    parts = [(g, make_batch([n], 60, n)[0]) for g, n in zip([0, 1, 0, 2, 1, 0, 2], [5, 9, 3, 4, 8, 12, 1], strict=True)]
    mixed, grads = dropped(model, bank, parts), bank.grad.clone()
    order = [3, 1, 0, 4, 2, 6, 5]  # each learner's own in the same order
    shuffled = dropped(model, bank, [parts[i] for i in order])
    for i, logits in zip(order, shuffled, strict=True):
        assert parts[i][0] == 2 or torch.equal(logits, mixed[i])
    assert torch.equal(bank.grad[:2], grads[:2]) and grads[:2].isfinite().all()
    for g in (0, 1):
        own = [i for i, part in enumerate(parts) if part[0] == g]
        for i, logits in zip(own, dropped(model, bank, [parts[i] for i in own]), strict=True):
            assert torch.equal(mixed[i], logits) and logits.isfinite().all()
        assert torch.equal(bank.grad[g], grads[g]) and not bank.grad[1 - g].any()


@pytest.mark.parametrize("kind", METHODS.values())
def test_spans_and_copies_are_the_rows(kind):
    bank = bank_of(kind, learners=4)
    assert isinstance(bank, MethodBank)
    model, (ids, offsets) = make_model().freeze_backbone(), make_batch([5, 6], 60)
    adapter = torch.tensor([0, 1], dtype=torch.int32)
    segments = make_segments(offsets, adapter, 2)
    wanted = model(ids, offsets, make_segments(offsets, adapter + 2, 4), bank)
    span = bank.fresh(2, 4)
    logits = model(ids, offsets, segments, span)
    assert torch.equal(logits, wanted)
    logits.sum().backward()
    assert bank.grad[2:].any(1).all() and not bank.grad[:2].any()
    assert torch.equal(model(ids, offsets, segments, bank.select([2, 3])), wanted)
    other = bank_of(kind, learners=4, seed=9)
    other.donors = getattr(bank, "donors", [])
    other.copy_rows_([0, 1], bank.select([2, 3]))
    assert torch.equal(model(ids, offsets, segments, other.span(0, 2)), wanted)
