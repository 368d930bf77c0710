"""BERT and RoBERTa as backbones against transformers: values, positions, names of tensors, and every field of config.json."""

import json
import warnings
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_xlmr import close, edit_config, make_batch

from kloss.cl.backbone import tiny_config
from kloss.config import Config
from kloss.errors import UserError
from kloss.kernels import make_segments
from kloss.models import AdapterBank, XLMRConfig, XLMRForTokenClassification
from kloss.models.architecture import COMPUTED, DEFAULTS, DEFAULTS_OF, HARMLESS, MODELS

NAMES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
SIZES = dict(
    vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=34, num_labels=5, type_vocab_size=2,
)  # fmt: skip


def config_class(kind):
    return getattr(transformers, f"{NAMES[kind]}Config")


def theirs_of(kind, task="ForTokenClassification", **options):
    """A model of transformers in evaluation; biases and LayerNorms are random too, so that a swapped one shows."""
    generator = torch.Generator().manual_seed(0)
    model = getattr(transformers, f"{NAMES[kind]}{task}")(config_class(kind)(**SIZES | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return model


def their_states(theirs, ids, offsets):
    """Outputs at the real positions, packed, from a padded batch."""
    parts = [ids[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(part) for part in parts], batch_first=True)
    pad = theirs.config.pad_token_id
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=0 if pad is None else pad)
    with torch.no_grad():
        return theirs(input_ids=padded, attention_mask=mask)[0][mask.bool()]


def assert_same(kind, ours, theirs, call=None):
    longest = ours.config.max_length
    ids, offsets = make_batch([7, 1, longest, 12, 9], 60)
    with torch.no_grad():
        mine = (call or ours)(ids, offsets)
    close(mine, their_states(theirs, ids, offsets), 60, kind)
    with pytest.raises(ValueError, match=f"{longest + 1} tokens, the model takes {longest}"):
        ours(*make_batch([3, longest + 1], 60))


OPTIONS = {
    "as usual": {},
    "another epsilon": {"layer_norm_eps": 1e-2},
    "another padding token": {"pad_token_id": 3},
    "one token type": {"type_vocab_size": 1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", NAMES)
def test_logits_are_those_of_transformers(tmp_path, kind, options):
    theirs = theirs_of(kind, **options)
    theirs.save_pretrained(tmp_path)
    ours = XLMRForTokenClassification.from_pretrained(tmp_path)
    wanted = 34 if kind == "bert" else 34 - theirs.config.pad_token_id - 1
    assert ours.config.max_length == wanted and ours.config.layer_norm_eps == theirs.config.layer_norm_eps
    assert_same(kind, ours, theirs)


def test_a_bert_without_a_padding_token(tmp_path):
    theirs = theirs_of("bert", pad_token_id=None)
    theirs.save_pretrained(tmp_path)
    assert_same("bert", XLMRForTokenClassification.from_pretrained(tmp_path), theirs)


@pytest.mark.parametrize("task", ["Model", "ForMaskedLM", "ForPreTraining"])
def test_a_checkpoint_of_another_task_gives_its_encoder(tmp_path, task):
    """Without a prefix, with a pooler, or with an output layer; then with buffers and LayerNorms named as in 2018."""
    theirs = theirs_of("bert", task)
    theirs.save_pretrained(tmp_path)
    encoder = theirs if task == "Model" else theirs.bert
    ours = XLMRForTokenClassification.from_pretrained(tmp_path, num_labels=3)
    assert_same("bert", ours, encoder, ours.encode)
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): t for name, t in theirs.state_dict().items()}
    state = {name.replace("LayerNorm.bias", "LayerNorm.beta"): t for name, t in state.items()}
    state["bert.embeddings.position_ids" if task != "Model" else "embeddings.position_ids"] = torch.arange(34)[None]
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    old = XLMRForTokenClassification.from_pretrained(tmp_path, num_labels=3)
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(old.parameters(), ours.parameters(), strict=True))


@pytest.mark.parametrize("kind", NAMES)
def test_transformers_loads_what_we_save_of_each_kind(tmp_path, kind):
    sizes = SIZES | {"pad_token_id": 3, "layer_norm_eps": 1e-3, "model_type": kind}
    ours = XLMRForTokenClassification.random(XLMRConfig(**sizes | {"initializer_range": 0.3}))
    ours.save_pretrained(tmp_path)
    loader = transformers.AutoModelForTokenClassification
    theirs, report = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == MODELS[kind][1]
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same(kind, ours, theirs.eval())


@pytest.mark.parametrize("kind", NAMES)
def test_peft_loads_an_adapter_of_each_kind(tmp_path, kind):
    from peft import PeftModel

    theirs = theirs_of(kind)
    theirs.save_pretrained(tmp_path / "base")
    ours = XLMRForTokenClassification.from_pretrained(tmp_path / "base")
    bank = AdapterBank(ours, 2, 4)
    for name in bank.slots:
        bank.view(bank.param, name).add_(torch.randn(bank.slots[name].shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    bank.refresh()
    bank.save_peft(tmp_path / "adapter", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of adapters that find no place
        adapted = PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    ids, offsets = make_batch([7, 3, 12], 60)
    with torch.no_grad():
        mine = ours(ids, offsets, make_segments(offsets, torch.ones(3, dtype=torch.int32), 2), bank)
    close(mine, their_states(adapted, ids, offsets), 60, kind)
    other = AdapterBank(ours, 1, 4)
    other.load_peft(tmp_path / "adapter", 0)
    assert torch.equal(other.param[0], bank.param[1])


@pytest.mark.parametrize("pad", [0, 1, 7])
def test_a_tiny_backbone_has_as_many_positions_whatever_the_padding_token(pad):
    corpus = SimpleNamespace(max_length=512, vocab_size=60, labels=("O",), pad_id=pad)
    sizes = tiny_config(Config(), corpus)
    assert sizes.max_length == 512 and sizes.first_position == pad + 1 and sizes.max_position_embeddings == 513 + pad


# config.json


@pytest.mark.parametrize("kind", NAMES)
def test_a_size_that_a_config_leaves_out_is_transformers_default(tmp_path, kind):
    assert DEFAULTS.keys() == {field.name for field in fields(XLMRConfig)} - {"num_labels", "model_type"}
    theirs = config_class(kind)()
    for name, value in (DEFAULTS | DEFAULTS_OF[kind]).items():
        assert getattr(theirs, name) == value, name
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 1, "intermediate_size": 40}
    ours = XLMRForTokenClassification.random(XLMRConfig(**sizes, max_position_embeddings=512, type_vocab_size=2, model_type=kind))
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"model_type": kind}))
    config = XLMRForTokenClassification.from_pretrained(tmp_path).config
    assert config.layer_norm_eps == theirs.layer_norm_eps == 1e-12 and config.first_position == (0 if kind == "bert" else 2)


@pytest.mark.parametrize("kind", NAMES)
def test_every_field_of_transformers_is_a_size_or_computed_or_harmless(kind):
    """A field that a new transformers has is read up and put into one of the tables."""
    theirs = config_class(kind)
    names = {field.name for field in fields(theirs)} | theirs().to_dict().keys() | theirs(num_labels=3).to_dict().keys()
    unknown = names - DEFAULTS.keys() - COMPUTED.keys() - HARMLESS
    assert not unknown
    assert not COMPUTED.keys() & HARMLESS and not DEFAULTS.keys() & (COMPUTED.keys() | HARMLESS)


ODD = dict(
    hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5, classifier_dropout=0.5, use_cache=False, tie_word_embeddings=False,
    bos_token_id=7, eos_token_id=8, chunk_size_feed_forward=1, output_hidden_states=True, output_attentions=True,
    return_dict=False, tie_last_hidden_states=False, id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2},
    problem_type="regression", architectures=["Other"], transformers_version="4.0.0", _name_or_path="elsewhere",
    name_or_path="elsewhere", num_labels=3, dtype="float16", torch_dtype="float16", model_type="other",
)  # fmt: skip


@pytest.mark.parametrize("kind", NAMES)
def test_a_harmless_field_changes_no_hidden_state_of_transformers(kind):
    assert ODD.keys() == HARMLESS
    plain = theirs_of(kind, "Model")
    ids, offsets = make_batch([6, 6], 60)
    wanted = their_states(plain, ids, offsets)
    for name, value in ODD.items():
        other = getattr(transformers, f"{NAMES[kind]}Model")(config_class(kind)(**SIZES | {name: value})).eval()
        other.load_state_dict(plain.state_dict())
        torch.testing.assert_close(their_states(other, ids, offsets), wanted, rtol=1e-5, atol=1e-5, msg=name)


REFUSED = dict(
    hidden_act="gelu_new", is_decoder=True, add_cross_attention=True, is_encoder_decoder=True, per_layer_config={"0": {}},
    position_embedding_type="relative_key", pruned_heads={"0": [1]}, embedding_size=12, auto_map={"AutoModel": "other.Model"},
    quantization_config={"quant_method": "bitsandbytes"},
)  # fmt: skip


def test_a_config_of_another_function_is_refused_by_its_field_and_value(tmp_path):
    theirs_of("bert").save_pretrained(tmp_path)
    assert REFUSED.keys() == COMPUTED.keys()
    for name, value in REFUSED.items():
        edit_config(tmp_path, **{name: value})
        with pytest.raises(UserError) as error:
            XLMRForTokenClassification.from_pretrained(tmp_path)
        assert f"{name} is {value!r}" in str(error.value)
        edit_config(tmp_path, **{name: 24 if name == "embedding_size" else COMPUTED[name]}, unheard_of=3)
        XLMRForTokenClassification.from_pretrained(tmp_path)


BAD_SIZES = {name: [-5, 10**9, 10**19, 1e400, "7", True, [2], {"a": [{}]}] for name in DEFAULTS}
BAD_SIZES |= {name: [*BAD_SIZES[name], None, float("nan"), 0] for name in ("hidden_size", "num_attention_heads")}
for name in ("layer_norm_eps", "initializer_range"):
    BAD_SIZES[name] = [-5, 1e400, 10**400, 1e308, float("nan"), "7", True, None]  # no shape depends on it


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_a_size_that_the_tensors_do_not_have_is_refused_before_anything_is_allocated(tmp_path, kind, monkeypatch):
    theirs_of(kind).save_pretrained(tmp_path)
    right = (tmp_path / "config.json").read_text()

    def allocate(*arguments):
        raise AssertionError("a model was made")

    monkeypatch.setattr(XLMRForTokenClassification, "random", allocate)
    for name, values in BAD_SIZES.items():
        for value in values:
            if kind == "bert" and name == "pad_token_id" and type(value) is int and value > 0:
                continue  # BERT's positions do not depend on it
            (tmp_path / "config.json").write_text(right)
            edit_config(tmp_path, **{name: value})
            words = f"{name} must be|has shape .* config.json says|has no tensor|divide|no position is left"
            with pytest.raises(UserError, match=words) as error:
                XLMRForTokenClassification.from_pretrained(tmp_path)
            assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
