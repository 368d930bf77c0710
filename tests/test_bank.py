"""The bank: one adapter is one row, whatever else the bank holds; files that peft and kloss exchange."""

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from kloss.errors import UserError
from kloss.kernels import make_segments, multi_lora_cpu, token_loss
from kloss.models import AdapterBank, FlatModel, XLMRConfig, XLMRForTokenClassification
from kloss.models.convert import to_transformers

CONFIG = XLMRConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=40,
    max_position_embeddings=40, num_labels=5,
)  # fmt: skip
TARGETS = ("qkv", "out", "up", "down")
IDS = torch.tensor([0, 7, 9, 2, 0, 11, 4, 30, 2, 0, 8, 2])
OFFSETS = torch.tensor([0, 4, 9, 12], dtype=torch.int32)


def make_model(**changes) -> XLMRForTokenClassification:
    # Larger weights than XLM-R starts with, so that a wrong adapter shows in the logits.
    return XLMRForTokenClassification.random(XLMRConfig(**vars(CONFIG) | {"initializer_range": 0.2} | changes))


def make_bank(adapters=3, rank=4, seed=0, config=CONFIG, **options) -> AdapterBank:
    """A bank whose B and bias are random as well, rank tails left at zero."""
    bank = AdapterBank(config, adapters, rank, **options)
    generator = torch.Generator().manual_seed(seed)
    for name in bank.slots:
        if not name.endswith(".a"):
            view = bank.view(bank.param, name)
            drawn = torch.randn(view.shape, generator=generator) * 0.3
            if name.endswith(".b"):
                drawn = torch.where(torch.arange(bank.rank) < bank.ranks[:, None, None], drawn, 0.0)
            view.copy_(drawn)
    bank.refresh()
    return bank


def logits_of(model, bank: AdapterBank, g: int) -> Tensor:
    adapter = torch.full((3,), g, dtype=torch.int32)
    return model(IDS, OFFSETS, make_segments(OFFSETS, adapter, bank.adapters), bank).detach()


def live_mask(bank: AdapterBank, g: int) -> Tensor:
    """Columns of row g that the adapter uses, neither rank tail nor gap between slots: bool [P]."""
    marks = torch.zeros_like(bank.param, dtype=torch.bool)
    for name, slot in bank.slots.items():
        view = bank.view(marks, name)[g]
        view[:] = True
        if name.endswith(".a"):
            view.view(-1, bank.rank, slot.shape[1])[:, int(bank.ranks[g]) :] = False
        elif name.endswith(".b"):
            view[:, int(bank.ranks[g]) :] = False
    return marks[g]


def test_views_write_through_and_cover_the_row():
    bank = AdapterBank(CONFIG, 2, 3)
    assert bank.view(bank.param, "0.qkv.a").shape == (2, 9, 16) and bank.view(bank.param, "1.up.b").shape == (2, 40, 3)
    marks = torch.zeros_like(bank.param)
    for name in bank.slots:
        bank.view(marks, name).add_(1)
    assert marks.max() == 1 and bank.param.is_contiguous()
    bank.view(bank.param, "1.down.a")[1, 2, 5] = 42
    assert (bank.param == 42).nonzero()[:, 0].tolist() == [1]
    a, _ = bank.adapters_of(1, "down")
    assert a[1, 2, 5] == 42 and bank.head[0].shape == (2, 5, 16)


def test_init_depends_on_seed_and_rank_alone():
    solo = AdapterBank(CONFIG, 1, 4, seeds=[9])
    wide = AdapterBank(CONFIG, 3, [8, 4, 4], seeds=[9, 9, 10])
    for name in solo.slots:
        mine, other = solo.view(solo.param, name)[0], wide.view(wide.param, name)[1]
        if name.endswith(".a"):
            mine, other = mine.view(-1, 4, mine.shape[-1]), other.view(-1, 8, other.shape[-1])
            assert not other[:, 4:].any()
            other = other[:, :4]
            assert mine.abs().max() <= mine.shape[-1] ** -0.5 and mine.std() > 0.5 * mine.shape[-1] ** -0.5
        elif name.endswith(".b"):
            assert not mine.any() and not other.any()
            continue
        assert torch.equal(mine, other), name
    assert not torch.equal(wide.param[1], wide.param[2])


def test_a_new_adapter_changes_nothing():
    model, bank = make_model(), AdapterBank(CONFIG, 1, 4)
    head = bank.view(bank.param, "head.weight")
    head[0] = model.classifier.weight.detach()
    torch.testing.assert_close(logits_of(model, bank, 0), model(IDS, OFFSETS).detach())


def test_a_rank_is_the_same_adapter_in_a_wider_bank():
    model, solo = make_model(), make_bank(1, 2)
    wide = AdapterBank(CONFIG, 3, [5, 2, 1])
    for name in solo.slots:
        mine, place = solo.view(solo.param, name)[0], wide.view(wide.param, name)[1]
        if name.endswith(".a"):
            place.view(-1, 5, place.shape[-1])[:, :2] = mine.view(-1, 2, mine.shape[-1])
        elif name.endswith(".b"):
            place[:, :2] = mine
        else:
            place.copy_(mine)
    torch.testing.assert_close(logits_of(model, wide, 1), logits_of(model, solo, 0))


def train_step(model, bank, labels, segments, rate=0.05):
    bank.zero_grad()
    loss, _ = token_loss(model(IDS, OFFSETS, segments, bank), labels, segments)
    loss.sum().backward()
    each = torch.full((bank.adapters,), rate)
    bank.adamw_(each, weight_decay=each, max_norm=each * 20)
    return loss.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rank_tails_stay_zero_and_losses_fall(dtype):
    model = make_model().freeze_backbone().to(dtype)
    bank = AdapterBank(CONFIG, 3, [1, 5, 3], dtype=dtype)
    labels = torch.arange(12) % 5
    segments = make_segments(OFFSETS, torch.tensor([2, 0, 1], dtype=torch.int32), 3)
    losses = [train_step(model, bank, labels, segments) for _ in range(10)]
    assert (losses[-1] < losses[0]).all() and bank.steps.tolist() == [10, 10, 10]
    for g in range(3):
        live = live_mask(bank, g)
        assert int(live.sum()) == bank.trainable(g)
        for matrix in (bank.param, bank.work, bank.grad, bank.exp_avg, bank.exp_avg_sq):
            assert not matrix[g, ~live].any()
        assert (bank.param[g, live] != 0).float().mean() > 0.99


def test_gradients_land_in_the_bank_as_on_plain_tensors():
    model, bank = make_model(), make_bank(3, [4, 2, 3])
    segments = make_segments(OFFSETS, torch.tensor([2, 0, 2], dtype=torch.int32), 3)
    labels = torch.arange(12) % 5
    model.freeze_backbone()

    class Plain:
        """The bank's views as ordinary leaves."""

        scaling, ranks_if_mixed, exact = bank.scaling, bank.ranks, False
        leaves = {name: bank.view(bank.param, name).clone().requires_grad_() for name in bank.slots}
        head = leaves["head.weight"], leaves["head.bias"]

        def adapters_of(self, layer, name):
            return self.leaves[f"{layer}.{name}.a"], self.leaves[f"{layer}.{name}.b"]

        def gradients_of(self, layer, name):
            return None

        def linear(self, *_):
            return None

        attention = linear

    for _ in range(2):  # twice: gradients add up
        token_loss(model(IDS, OFFSETS, segments, bank), labels, segments)[0].sum().backward()
    plain = Plain()
    token_loss(model(IDS, OFFSETS, segments, plain), labels, segments)[0].sum().backward()
    for name, leaf in plain.leaves.items():
        torch.testing.assert_close(bank.view(bank.grad, name), 2 * leaf.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert bank.grad[[0, 2]].any(1).all() and not bank.grad[1].any()
    bank.zero_grad()
    assert not bank.grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("library", [True, False], ids=["csrc", "plain torch"])
def test_a_fresh_span_sets_the_gradients_that_a_span_adds(dtype, library, monkeypatch):
    """Whatever the rows held, absent adapters' and the heads' too, and without a tensor of its own for a factor's gradient."""
    if not library:
        monkeypatch.setattr(multi_lora_cpu, "built", lambda: False)
    model = make_model(hidden_size=32, intermediate_size=64).freeze_backbone().to(dtype)  # widths that csrc computes
    bank = make_bank(4, [4, 2, 3, 1], config=model.config, dtype=dtype)
    segments, labels = make_segments(OFFSETS, torch.tensor([1, 1, 0], dtype=torch.int32), 3), torch.arange(12) % 5

    def backward(rows):
        token_loss(model(IDS, OFFSETS, segments, rows), labels, segments)[0].sum().backward()

    backward(bank.span(1, 4))
    expected, live = bank.grad.clone(), torch.zeros(bank.grad.shape[1], dtype=torch.bool)
    for name in bank.slots:
        bank.view(live[None], name)[:] = True
    bank.grad[:, live] = torch.nan
    for _ in range(2):
        backward(bank.fresh(1, 4))
        assert torch.equal(bank.grad[1:, live], expected[1:, live]) and bank.grad[0, live].isnan().all()
    bank.zero_grad()
    backward(bank.span(1, 4))
    assert torch.equal(bank.grad, expected)


def test_a_fresh_row_of_a_whole_model():
    model = make_model()
    row = FlatModel(model)
    for _ in range(2):
        assert row.fresh(0, 1) is row and not row.grad.any()
        model(IDS, OFFSETS).square().sum().backward()
        assert row.grad.any()


def test_span_shares_memory_and_gradients():
    model, bank = make_model(), make_bank(4, [4, 2, 3, 1])
    span = bank.span(1, 3)
    assert span.ranks.tolist() == [2, 3] and span.adapters == 2
    span.param[0, 5] = 7
    assert bank.param[1, 5] == 7
    torch.testing.assert_close(logits_of(model, span, 1), logits_of(model, bank, 2))
    segments = make_segments(OFFSETS, torch.tensor([1, 1, 1], dtype=torch.int32), 2)
    model(IDS, OFFSETS, segments, span).square().sum().backward()
    assert bank.grad.any(1).tolist() == [False, False, True, False]
    half = make_bank(4, dtype=torch.bfloat16)
    part = half.span(1, 3)
    part.param[1].fill_(3)
    part.refresh()
    assert (half.work[2] == 3).all() and not (half.work[1] == 3).all()


def test_select_copies_rows_in_order():
    model, bank = make_model(), make_bank(3, [4, 2, 3])
    before = bank.param.clone()
    chosen = bank.select([2, 0, 2])
    assert chosen.ranks.tolist() == [3, 4, 3] and torch.equal(chosen.param, before[[2, 0, 2]])
    torch.testing.assert_close(logits_of(model, chosen, 0), logits_of(model, bank, 2))
    chosen.param.zero_()
    chosen.ranks.zero_()
    chosen.scaling.zero_()
    assert torch.equal(bank.param, before) and bank.ranks.tolist() == [4, 2, 3] and bank.scaling.all()


def test_copy_row_takes_rank_and_scaling_along():
    model, bank, other = (
        make_model(),
        make_bank(3, [4, 2, 3]),
        make_bank(2, [1, 4], seed=1, alpha=[5, 6], dtype=torch.bfloat16),
    )
    before = bank.param.clone()
    bank.copy_rows_([1], other.select([0]))
    assert bank.ranks.tolist() == [4, 1, 3] and bank.scaling[1] == 5
    assert torch.equal(bank.param[1], other.param[0]) and torch.equal(bank.param[[0, 2]], before[[0, 2]])
    wanted = AdapterBank(CONFIG, 1, [4])
    wanted.copy_rows_([0], other.select([0]))
    torch.testing.assert_close(logits_of(model, bank, 1), logits_of(model, wanted, 0))
    half = make_bank(2, dtype=torch.bfloat16)
    half.copy_rows_([1], other.select([0]))
    assert torch.equal(half.work, half.param.bfloat16())
    with pytest.raises(ValueError, match="differ"):
        bank.copy_rows_([0], make_bank(1, 8))


def trained_bank() -> AdapterBank:
    """Three adapters after 1, 2 and 3 steps."""
    model, bank = make_model().freeze_backbone(), make_bank(3, [4, 2, 3])
    segments = make_segments(OFFSETS, torch.tensor([2, 0, 1], dtype=torch.int32), 3)
    for active in ([1, 1, 1], [0, 1, 1], [0, 0, 1]):
        bank.zero_grad()
        token_loss(model(IDS, OFFSETS, segments, bank), torch.arange(12) % 5, segments)[0].sum().backward()
        each = torch.full((3,), 0.05)
        bank.adamw_(each, weight_decay=each, max_norm=each * 20, active=torch.tensor(active) > 0)
    return bank


def state_of(bank, rows) -> list[Tensor]:
    return [tensor[rows].clone() for tensor in bank.state().values()]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_optimisers_state_goes_along_with_its_row():
    bank = trained_bank()
    assert bank.steps.tolist() == [1, 2, 3] and bank.exp_avg.any(1).all() and bank.exp_avg_sq.any(1).all()
    before = state_of(bank, [0, 1, 2])
    chosen = bank.select([2, 0])
    assert equal(state_of(chosen, [0, 1]), state_of(bank, [2, 0]))
    chosen.steps.zero_()
    chosen.moments.zero_()
    assert equal(state_of(bank, [0, 1, 2]), before), "select copies"
    other = make_bank(3, [4, 2, 3], seed=1)
    other.copy_rows_([2, 1], bank.select([0, 1]))
    assert equal(state_of(other, [2, 1]), state_of(bank, [0, 1])) and other.steps.tolist() == [0, 2, 1]
    assert not other.exp_avg[0].any()
    span = bank.span(1, 3)
    span.moments[1].fill_(7)
    span.steps[0] = 9
    assert (bank.exp_avg_sq[1:] == 7).all() and bank.steps.tolist() == [1, 9, 3], "a span shares memory"
    again = make_bank(3, [4, 2, 3], seed=1)
    again.load_state({name: tensor.clone() for name, tensor in bank.state().items()})
    assert equal(state_of(again, [0, 1, 2]), state_of(bank, [0, 1, 2]))


def test_a_step_in_a_bank_of_some_rows_is_the_step_in_the_whole_bank():
    bank = trained_bank()
    part = bank.select([2, 1])
    for some, rows in ((bank, [0, 1, 2]), (part, [2, 1])):
        some.grad.copy_(torch.sin(torch.arange(bank.param.numel(), dtype=torch.float32)).view(3, -1)[rows])
        each = torch.tensor([0.1, 0.2, 0.3])[rows]
        some.adamw_(each, weight_decay=each, max_norm=each)
    assert equal(state_of(part, [0, 1]), state_of(bank, [2, 1]))


def test_a_new_adapter_has_no_trace_of_the_former(tmp_path):
    bank = trained_bank()
    bank.save_peft(tmp_path, 0)
    bank.load_peft(tmp_path, 1)
    bank.init_(2, seed=5)
    assert bank.steps.tolist() == [1, 0, 0] and bank.moments.any(2).tolist() == [[True, False, False]] * 2


def test_a_whole_model_is_a_bank_of_one_row():
    model = make_model()
    bank = FlatModel(model)
    assert bank.adapters == 1 and bank.head is None and bank.adapters_of(0, "qkv") is None and bank.span(0, 1) is bank
    model(IDS, OFFSETS).square().sum().backward()
    before = state_of(bank, [0])
    copy = bank.select([0])
    bank.adamw_(torch.tensor([0.1]), weight_decay=torch.tensor([0.0]), max_norm=torch.tensor([1.0]))
    assert bank.steps.tolist() == [1] and not equal(state_of(bank, [0]), before)
    assert torch.equal(model.classifier.weight.flatten(), bank.param[0, -85:-5]), "the model's weights are the bank's"
    assert not torch.equal(model.classifier.weight.flatten(), before[0][0, -85:-5])
    bank.copy_rows_([0], copy)
    assert equal(state_of(bank, [0]), before) and torch.equal(model.classifier.weight.flatten(), before[0][0, -85:-5])


def test_refresh_of_the_working_copy():
    bank = make_bank(3, dtype=torch.bfloat16)
    assert bank.param.dtype == torch.float32 and bank.work.dtype == bank.grad.dtype == torch.bfloat16
    stale = bank.work.clone()
    bank.param.add_(1)
    bank.refresh(1)
    assert torch.equal(bank.work[1], bank.param[1].bfloat16()) and torch.equal(bank.work[[0, 2]], stale[[0, 2]])
    bank.refresh()
    assert torch.equal(bank.work, bank.param.bfloat16())
    a, _ = bank.adapters_of(0, "qkv")
    assert torch.equal(a[0], bank.view(bank.param, "0.qkv.a")[0].bfloat16())


def test_trainable_counts_what_an_adapter_trains():
    bank = AdapterBank(CONFIG, 2, [6, 2])
    for g in range(2):
        assert bank.trainable(g) == int(live_mask(bank, g).sum())
    base = AdapterBank(XLMRConfig(vocab_size=2, num_labels=111), 1, 1, head=False)
    assert base.trainable(0) == 165_888  # STUDY.md: weights per unit of rank, all linears of XLM-R base


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"rank": [1, 2]}, {"rank": -3}, {"targets": "query"}, {"targets": ["qkv", "pooler"]}]
)
def test_bad_options_are_the_users_mistake(options):
    with pytest.raises(UserError):
        AdapterBank(CONFIG, 3, **options)


def test_some_targets_and_no_head():
    model, bank = make_model(), make_bank(1, 3, targets=["out", "up"], head=False)
    assert bank.adapters_of(0, "qkv") is None and bank.head is None
    assert not torch.allclose(logits_of(model, bank, 0), model(IDS, OFFSETS).detach())


# Files. transformers and peft are the outside oracle: padded, one adapter.


def transformers_model(model):
    from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification

    theirs = XLMRobertaForTokenClassification(
        XLMRobertaConfig(**vars(model.config), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    )
    state = to_transformers(model.state_dict(), model.config.num_hidden_layers)
    theirs.load_state_dict(state, strict=False)
    return theirs.eval()


def their_logits(theirs) -> Tensor:
    parts = [IDS[a:b] for a, b in zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=1)
    with torch.no_grad():
        out = theirs(input_ids=ids, attention_mask=(ids != 1).long()).logits
    return torch.cat([row[: len(part)] for row, part in zip(out, parts, strict=True)])


def agree(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", ["all-linear", ("qkv", "down"), ("out",), ("down",)])
def test_peft_loads_what_we_save(tmp_path, targets):
    from peft import PeftModel

    model = make_model()
    bank = make_bank(2, [4, 3], targets=targets, alpha=[8, 5])
    bank.save_peft(tmp_path / "a", 1)
    theirs = PeftModel.from_pretrained(transformers_model(model), tmp_path / "a").eval()
    agree(logits_of(model, bank, 1), their_logits(theirs))
    wrapped = {n.split(".lora_A")[0] for n, _ in theirs.named_parameters() if ".lora_A" in n}
    linears = sum(3 if target == "qkv" else 1 for target in bank.targets)
    assert len(wrapped) == linears * CONFIG.num_hidden_layers
    assert not torch.allclose(logits_of(model, bank, 1), logits_of(model, bank, 0), atol=0.1)


def test_save_and_load_round_trip(tmp_path):
    bank, other = make_bank(2, [4, 3], alpha=[8, 5]), make_bank(3, 6, seed=5, dtype=torch.bfloat16)
    bank.save_peft(tmp_path, 1)
    before = other.param.clone()
    other.load_peft(tmp_path, 2)
    assert other.ranks.tolist() == [6, 6, 3] and torch.equal(other.ranks_if_mixed, other.ranks)
    assert torch.equal(other.param[:2], before[:2]) and torch.equal(other.work[2], other.param[2].bfloat16())
    torch.testing.assert_close(other.scaling, torch.tensor([1, 1, 5 / 3]))
    assert not other.param[2, ~live_mask(other, 2)].any()
    model = make_model()
    wide = make_bank(1, 6)
    wide.load_peft(tmp_path, 0)
    torch.testing.assert_close(logits_of(model, wide, 0), logits_of(model, bank, 1))


PEFT_CONFIGS = {
    "peft's default targets": {"target_modules": ["query", "value"], "r": 3, "lora_alpha": 12},
    "all linears": {"target_modules": ["query", "key", "value", "dense"], "r": 4},
    "rank-stabilised": {
        "target_modules": ["query", "key", "value", "dense"],
        "r": 4,
        "lora_alpha": 6,
        "use_rslora": True,
    },
}


def save_with_peft(folder, model, task_type="TOKEN_CLS", **options):
    """A random adapter that peft makes and saves; returns peft's model."""
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(transformers_model(model), LoraConfig(task_type=task_type, init_lora_weights=False, **options)).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(len(name)))
    theirs.save_pretrained(folder)
    return theirs


@pytest.mark.parametrize("options", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
def test_we_load_what_peft_saves(tmp_path, options):
    model, bank = make_model(), make_bank(2, 5)
    theirs = save_with_peft(tmp_path, model, **options)
    bank.load_peft(tmp_path, 1)
    agree(logits_of(model, bank, 1), their_logits(theirs))


def test_an_adapter_without_a_head_keeps_the_rows_own(tmp_path):
    model, bank = make_model(), make_bank(2, 5)
    save_with_peft(tmp_path, model, task_type=None, target_modules=["query", "value"], r=2)
    head = bank.view(bank.param, "head.weight")[1].clone()
    bank.load_peft(tmp_path, 1)
    assert torch.equal(bank.view(bank.param, "head.weight")[1], head) and bank.ranks.tolist() == [5, 2]


def spoil(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_tensors(folder, change):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def rename(tensors):
    name = next(name for name in tensors if "layer.1" in name)
    tensors[name.replace("layer.1", "layer.2")] = tensors.pop(name)


def drop_one_b(tensors):
    tensors.pop(next(name for name in tensors if "lora_B" in name))


def shorten(tensors):
    name = next(name for name in tensors if "lora_A" in name)
    tensors[name] = tensors[name][:, :-1].contiguous()


FAULTS = {
    "no config": lambda folder: (folder / "adapter_config.json").unlink(),
    "no tensors": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "config is no JSON": lambda folder: (folder / "adapter_config.json").write_text("{"),
    "config is a list": lambda folder: (folder / "adapter_config.json").write_text("[]"),
    "tensors cut short": lambda folder: cut(folder / "adapter_model.safetensors"),
    "other method": lambda folder: spoil(folder, peft_type="IA3"),
    "rank too high": lambda folder: spoil(folder, r=6),
    "rank of zero": lambda folder: spoil(folder, r=0),
    "rank is text": lambda folder: spoil(folder, r="four"),
    "rank disagrees with the tensors": lambda folder: spoil(folder, r=3),
    "DoRA": lambda folder: spoil(folder, use_dora=True),
    "ranks per module": lambda folder: spoil(folder, rank_pattern={"query": 2}),
    "biases": lambda folder: spoil(folder, lora_bias=True),
    "activated LoRA": lambda folder: spoil(folder, alora_invocation_tokens=[5]),
    "no alpha": lambda folder: spoil(folder, lora_alpha=None),
    "unknown tensor": lambda folder: spoil_tensors(folder, rename),
    "A without B": lambda folder: spoil_tensors(folder, drop_one_b),
    "wrong shape": lambda folder: spoil_tensors(folder, shorten),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_bad_adapter_is_refused_and_nothing_changes(tmp_path, fault):
    make_bank(1, 4).save_peft(tmp_path, 0)
    fault(tmp_path)
    bank = make_bank(2, [5, 2], seed=3)
    before = bank.param.clone(), bank.work.clone(), bank.ranks.clone(), bank.scaling.clone()
    with pytest.raises(UserError) as error:
        bank.load_peft(tmp_path, 1)
    assert str(tmp_path) in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip((bank.param, bank.work, bank.ranks, bank.scaling), before, strict=True))


def test_saving_over_an_adapter_that_cannot_be_written_leaves_it(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError):
        make_bank(1, 4).save_peft(tmp_path / "file", 0)
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_changed_its_base_is_refused(init, tmp_path):
    model, bank = make_model(), make_bank(2, 5)
    before = state_of(bank, [0, 1])
    save_with_peft(tmp_path, model, r=2, target_modules=["query", "value"])
    spoil(tmp_path, init_lora_weights=init)
    with pytest.raises(UserError, match=f"init_lora_weights '{init}'"):
        bank.load_peft(tmp_path, 1)
    assert equal(state_of(bank, [0, 1]), before)


@pytest.mark.parametrize(("alpha", "rank"), [(2, 4), (10, 7), (20, 6), (16.5, 3), (0, 2), (1 << 100, 3)])
def test_alpha_is_saved_as_it_was_given(alpha, rank, tmp_path):
    bank = make_bank(2, [rank, 8], alpha=alpha)

    def saved(bank, g):
        bank.save_peft(tmp_path, g)
        return json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"]

    part = bank.select([1, 0])
    assert saved(bank, 0) == saved(part, 1) == saved(bank.span(0, 1), 0) == alpha
    other = make_bank(3, 8)
    other.load_peft(tmp_path, 2)
    assert saved(other, 2) == alpha and saved(other, 0) == 8
    other.copy_rows_([0], other.select([2]))
    assert saved(other, 0) == alpha


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        (("qkv",), ["query", "key", "value"]),
        ("all-linear", ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]),
        (("up",), ["intermediate.dense"]),
        (("down",), r".*encoder\.layer\.\d+\.(output\.dense)"),
    ],
)
def test_target_modules_are_names_unless_these_say_more(targets, names, tmp_path):
    make_bank(1, 2, targets=targets).save_peft(tmp_path, 0)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == names


def test_files_of_a_compiled_model_load_into_a_bank(tmp_path):
    model, bank = make_model(), make_bank(2, 5)
    theirs = save_with_peft(tmp_path, model, target_modules=["query", "value"], r=2)
    compiled = {".encoder.": ".encoder._orig_mod.", "base_model.model.": "base_model.model.module."}

    def wrap(tensors):
        for name in list(tensors):
            wrapped = name
            for plain, other in compiled.items():
                wrapped = wrapped.replace(plain, other)
            tensors[wrapped] = tensors.pop(name)

    spoil_tensors(tmp_path, wrap)
    bank.load_peft(tmp_path, 1)
    agree(logits_of(model, bank, 1), their_logits(theirs))


def test_an_adapter_that_is_not_there(tmp_path):
    bank = make_bank(2, 4)
    for call in (bank.save_peft, bank.load_peft):
        for g in (2, -1):
            with pytest.raises(UserError, match=f"no adapter {g}, the bank has 0 to 1"):
                call(tmp_path, g)
    with pytest.raises(UserError, match="no adapter a, the bank has 0 to 1"):
        bank.save_peft(tmp_path, "a")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        *((dict(adapters=1, alpha=alpha), "alpha must be a finite number") for alpha in (math.nan, math.inf, 10**400, [1, 2])),
        *((dict(adapters=given), "adapters must be a whole number of at least 1") for given in (0, -1, True, ["a", "b"])),
        *((dict(adapters=2, rank=given), "rank must be a whole number of at least 1") for given in (0, 4.0, None, "4", [1] * 3)),
        (dict(adapters=3, seeds=[1]), "seeds must be one for each of the 3 adapters, got 1"),
        *((dict(targets=given), "unknown LoRA targets") for given in ((), ("qkv", "qkv"), "qkv", ["query"])),
    ],
)
def test_a_bank_that_cannot_be(options, match):
    with pytest.raises(UserError, match=match):
        AdapterBank(CONFIG, **options)


def test_numbers_of_numpy_make_a_bank():
    bank = AdapterBank(CONFIG, np.int64(2), np.array([4, 2]), alpha=np.float32(3))
    assert bank.ranks.tolist() == [4, 2] and bank.scaling.tolist() == [0.75, 1.5]
