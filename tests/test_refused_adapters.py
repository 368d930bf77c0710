"""Adapters that the real peft makes and saves: each loads as peft's function, or is refused by its setting's name.

LoftQ wants bitsandbytes; tests/test_peft_fields.py has its file.
"""

import peft
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import kloss
from kloss.errors import UserError
from kloss.models.attach import load_peft

TOKENS = torch.tensor([[3, 4, 5], [6, 7, 8]])


class Net(nn.Module):
    """An embedding, two linear layers and a head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.first, self.second, self.head = (
            nn.Embedding(10, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 32),
            nn.Linear(32, 5),
        )

    def forward(self, tokens):
        return self.head(self.second(self.first(self.embed(tokens)).relu()))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 10, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes))


def saved(folder, base, config):
    """A model of peft whose adapter is random, saved."""
    theirs = get_peft_model(base, config).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    theirs.save_pretrained(folder)
    return theirs


def outputs(model):
    with torch.no_grad():
        y = model(TOKENS)
    return getattr(y, "logits", y)


def ours(base, targets):
    return kloss.attach(base, 2, 8, targets).eval()


def refused(folder, model, words, **options):
    """Loading is refused in these words, and changes nothing."""
    with kloss.use_adapters(model, [1, 1]):
        before = outputs(model)
    with pytest.raises(UserError, match=words):
        load_peft(model, folder, 1, **options)
    with kloss.use_adapters(model, [1, 1]):
        assert torch.equal(outputs(model), before)


LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"]}


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}, {"lora_dropout": 0.5}, {"layers_to_transform": None}],
    ids=str,
)
def test_plain_ones_load(options, tmp_path):
    theirs, model = saved(tmp_path, Net(), LoraConfig(**LORA | options)), ours(Net(), ["first", "second"])
    load_peft(model, tmp_path, 1)
    with kloss.use_adapters(model, [1, 1]):
        torch.testing.assert_close(outputs(model), outputs(theirs))
    assert (outputs(theirs) - outputs(Net())).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("use_dora", {"use_dora": True}),
        ("rank_pattern", {"rank_pattern": {"second": 2}}),
        ("alpha_pattern", {"alpha_pattern": {"second": 2}}),
        ("bias", {"bias": "all"}),
        ("bias", {"bias": "lora_only"}),
        ("lora_bias", {"lora_bias": True}),
        ("init_lora_weights", {"init_lora_weights": "pissa"}),
        ("init_lora_weights", {"init_lora_weights": "olora"}),
        ("trainable_token_indices", {"trainable_token_indices": {"embed": [1, 2]}}),
    ],
    ids=str,
)
def test_other_functions_are_refused_by_name(name, options, tmp_path):
    saved(tmp_path, Net(), LoraConfig(**LORA | options))
    refused(tmp_path, ours(Net(), ["first", "second"]), f"{tmp_path}: {name} .*is not supported")


def test_layers_that_come_twice_are_refused(tmp_path):
    saved(tmp_path, llama(), LoraConfig(r=4, target_modules=["q_proj"], layer_replication=[[0, 2], [1, 2]]))
    refused(tmp_path, ours(llama(), "q_proj"), f"{tmp_path}: layer_replication is not supported")


def test_adapters_that_an_invocation_switches_on_are_refused(tmp_path):
    saved(tmp_path, llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[3]))
    refused(tmp_path, ours(llama(), "q_proj"), f"{tmp_path}: alora_invocation_tokens is not supported")


def test_modules_that_were_trained_whole(tmp_path):
    theirs, model = saved(tmp_path, Net(), LoraConfig(**LORA, modules_to_save=["head"])), ours(Net(), ["first", "second"])
    refused(tmp_path, model, r"head.bias \(5,\) has no place .* modules_to_save \(head\)")
    load_peft(model, tmp_path, 1, head="ignore")
    model.head.load_state_dict(
        {n: getattr(theirs.base_model.model.head.modules_to_save["default"], n) for n in ("weight", "bias")}
    )
    with kloss.use_adapters(model, [1, 1]):
        torch.testing.assert_close(outputs(model), outputs(theirs))


def test_an_adapted_embedding_has_no_place(tmp_path):
    saved(tmp_path, Net(), LoraConfig(r=4, target_modules=["first", "embed"]))
    refused(tmp_path, ours(Net(), "first"), r"embed.lora_embedding_A \(4, 10\) has no place")


def test_a_layer_that_is_not_adapted_here_has_no_place(tmp_path):
    saved(tmp_path, Net(), LoraConfig(**LORA))
    refused(tmp_path, ours(Net(), "first"), r"second.lora_A.weight \(4, 32\) has no place")


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["first"], feedforward_modules=[]),
        peft.LoHaConfig(r=4, target_modules=["first"]),
        peft.OFTConfig(r=0, oft_block_size=4, target_modules=["first"]),
        peft.VeraConfig(r=4, target_modules=["first", "second"]),
        peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["first"]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_other_methods_are_refused_by_name(config, tmp_path):
    saved(tmp_path, Net(), config)
    kind = config.peft_type.value
    refused(tmp_path, ours(Net(), ["first", "second"]), f"{tmp_path}: a LORA adapter of rank 1 to 8 is needed, got {kind}")


def test_a_rank_above_the_largest_is_refused(tmp_path):
    saved(tmp_path, Net(), LoraConfig(**LORA | {"r": 9}))
    refused(tmp_path, ours(Net(), ["first", "second"]), "rank 1 to 8 is needed, got LORA 9")


@pytest.mark.parametrize("options", [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"second": 2}}], ids=str)
def test_one_that_peft_merged_is_a_base_to_attach_to(options, tmp_path):
    """As docs/refusals.md says."""
    theirs = saved(tmp_path, Net(), LoraConfig(**LORA | options))
    wanted = outputs(theirs)
    model = ours(theirs.merge_and_unload(), ["first", "second"])
    with kloss.use_adapters(model, [1, 1]):
        torch.testing.assert_close(outputs(model), wanted, rtol=1e-4, atol=1e-5)


def test_a_model_that_has_adapters_of_peft_is_refused():
    theirs = get_peft_model(Net(), LoraConfig(**LORA))
    with pytest.raises(UserError, match="the model has peft adapters .*merge_and_unload"):
        kloss.attach(theirs, 2, 4, ["first"])
