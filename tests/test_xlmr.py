"""The model against transformers' XLM-R: values, gradients, files; and what dropout may depend on."""

import json
import warnings

import pytest
import torch
from torch import Tensor

from kloss.errors import UserError
from kloss.kernels import StepDropout, make_segments, row_keys
from kloss.models import BASE, AdapterBank, XLMRConfig, XLMRForTokenClassification
from kloss.models.convert import to_transformers

SMALL = XLMRConfig(
    vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40,
    max_position_embeddings=34, num_labels=5,
)  # fmt: skip


def make_model(config: XLMRConfig = SMALL, seed: int = 0, deviation: float = 0.2) -> XLMRForTokenClassification:
    """Random weights, biases and LayerNorms among them, so that a swapped one shows."""
    model = XLMRForTokenClassification.random(config, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=deviation)
    return model


def transformers_model(model: XLMRForTokenClassification, **options):
    from transformers import XLMRobertaConfig, XLMRobertaForTokenClassification

    config = XLMRobertaConfig(**vars(model.config), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options)
    theirs = XLMRobertaForTokenClassification(config)
    theirs.load_state_dict(to_transformers(model.state_dict(), config.num_hidden_layers))
    return theirs


def make_batch(lengths: list[int], vocabulary: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return torch.randint(4, vocabulary, (sum(lengths),), generator=generator), offsets


def padded(ids: Tensor, offsets: Tensor) -> dict[str, Tensor]:
    parts = [ids[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=1)
    return {"input_ids": ids, "attention_mask": (ids != 1).long()}


def their_logits(theirs, ids: Tensor, offsets: Tensor) -> Tensor:
    """Logits of the real positions, packed."""
    inputs = padded(ids, offsets)
    return theirs(**inputs).logits[inputs["attention_mask"].bool()]


def close(mine: Tensor, wanted: Tensor, factor: float, name: str) -> None:
    """Norm-wise, within `factor` roundings of fp32."""
    error = (mine - wanted).norm() / wanted.norm().clamp(min=1e-20)
    assert error <= factor * torch.finfo(torch.float32).eps, f"{name}: relative error {float(error):.2e}"


def compare(model, theirs, lengths: list[int], factor: float) -> None:
    ids, offsets = make_batch(lengths, model.config.vocab_size)
    mine, wanted = model(ids, offsets), their_logits(theirs, ids, offsets)
    close(mine.detach(), wanted.detach(), factor, "logits")
    d_logits = torch.randn(mine.shape, generator=torch.Generator().manual_seed(5))
    mine.backward(d_logits)
    wanted.backward(d_logits)
    gradients = to_transformers({name: p.grad for name, p in model.named_parameters()}, model.config.num_hidden_layers)
    named = dict(theirs.named_parameters())
    assert gradients.keys() == named.keys()
    for name, gradient in gradients.items():
        if ".key.bias" in name:
            # Softmax does not see a shift of all keys: the gradient is 0 but for rounding.
            assert gradient.norm() <= factor * 1e-6 * gradients[name.replace("key", "query")].norm()
            continue
        close(gradient, named[name].grad, factor, name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_small_equals_transformers(attention):
    model = make_model()
    compare(model, transformers_model(model, attn_implementation=attention), [7, 1, 32, 12, 9, 1, 20], 60)


def test_base_size_equals_transformers():
    """12 layers, 768 wide; the vocabulary alone is cut, since it only makes the embedding longer."""
    model = make_model(XLMRConfig(**vars(BASE) | {"vocab_size": 2000, "num_labels": 9}), deviation=0.01)
    compare(model, transformers_model(model), [12, 512, 1, 97], 200)


def test_odd_order_and_empty_sequences_and_rows_behind():
    model = make_model()
    ids, offsets = make_batch([4, 0, 9, 0, 2], 60)
    logits = model(torch.cat([ids, torch.tensor([3, 3])]), offsets)
    _, kept = make_batch([4, 9, 2], 60)
    torch.testing.assert_close(logits[:15], model(ids, kept))
    assert torch.isfinite(logits).all()


def test_a_sequence_too_long_is_an_error():
    model = make_model()
    for length in (32, 33):
        ids, offsets = make_batch([3, length], 60)
        if length == 32:
            assert model(ids, offsets).shape == (35, 5)
        else:
            with pytest.raises(ValueError, match="33 tokens, the model takes 32"):
                model(ids, offsets)


def test_a_bank_needs_segments():
    model = make_model()
    for call in (model, model.encode):
        with pytest.raises(ValueError, match="segments"):
            call(*make_batch([3], 60), bank=AdapterBank(SMALL, 1, 2))


def test_all_parameters_learn_until_the_backbone_is_frozen():
    model = make_model()
    ids, offsets = make_batch([5, 9], 60)
    model(ids, offsets).square().sum().backward()
    assert all(p.requires_grad and p.grad.any() for p in model.parameters())
    assert model.freeze_backbone() is model
    assert not model(ids, offsets).requires_grad


def test_a_sequence_uses_its_learners_adapter_and_head_or_the_models_own():
    model = make_model()
    bank = AdapterBank(SMALL, 2, 3)
    for name in bank.slots:
        bank.view(bank.param, name).add_(torch.randn(bank.slots[name].shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    ids, offsets = make_batch([4, 6, 5], 60)
    segments = make_segments(offsets, torch.tensor([1, -1, 0], dtype=torch.int32), 2)
    mixed = model(torch.cat([ids, ids[:2]]), offsets, segments, bank)
    own = model(ids, offsets)
    torch.testing.assert_close(mixed[4:10], own[4:10])
    for place, g in ((slice(0, 4), 1), (slice(10, 15), 0)):
        alone = torch.tensor([0, place.stop - place.start], dtype=torch.int32)
        solo = model(ids[place], alone, make_segments(alone, torch.zeros(1, dtype=torch.int32), 1), bank.select([g]))
        torch.testing.assert_close(mixed[place], solo)
        assert not torch.allclose(mixed[place], own[place], atol=0.1)


def dropped_logits(model, bank, parts: list[tuple[int, int, Tensor]], p: float = 0.3, step: int = 4) -> dict[int, Tensor]:
    """Logits of each learner in a training batch of (learner, number within its batch, ids)."""
    offsets = torch.tensor([0, *torch.tensor([len(ids) for *_, ids in parts]).cumsum(0).tolist()], dtype=torch.int32)
    adapter = torch.tensor([g for g, *_ in parts], dtype=torch.int32)
    segments = make_segments(offsets, adapter, bank.adapters)
    keys = row_keys(torch.full((len(parts),), step), torch.tensor([number for _, number, _ in parts]), offsets)
    chance, seeds = torch.full((bank.adapters,), p), 100 + torch.arange(bank.adapters)
    dropout = StepDropout(chance, chance, chance, seeds, keys, segments.row_adapter, model.num_sites)
    logits = model(torch.cat([ids for *_, ids in parts]), offsets, segments, bank, dropout=dropout)
    return {g: logits[segments.row_adapter == g].detach() for g in set(adapter.tolist())}


def test_dropout_of_a_learner_does_not_depend_on_the_others():
    model, bank = make_model(), AdapterBank(SMALL, 3, 3)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        for target in bank.targets:
            bank.view(bank.param, f"{layer}.{target}.b").normal_(0, 0.3, generator=generator)
    parts = [
        (g, i, make_batch([n], 60, seed=n)[0])
        for g, lengths in enumerate([(4, 9), (20,), (7, 3, 1)])
        for i, n in enumerate(lengths)
    ]
    together = dropped_logits(model, bank, parts)
    shuffled = dropped_logits(model, bank, [parts[i] for i in (3, 0, 2, 4, 1, 5)])
    for g in range(3):
        alone = dropped_logits(model, bank, [part for part in parts if part[0] == g])[g]
        torch.testing.assert_close(together[g], alone)
        torch.testing.assert_close(shuffled[g], alone)
        assert not torch.allclose(alone, dropped_logits(model, bank, parts, step=5)[g], atol=0.1)
        assert not torch.allclose(alone, dropped_logits(model, bank, parts, p=0.0)[g], atol=0.1)


def test_every_site_draws_its_own_mask_and_each_kind_can_be_left_out():
    model, bank = make_model(), AdapterBank(SMALL, 1, 3)
    seen = []

    class Spy(StepDropout):
        def at(self, kind, site):
            seen.append((kind, site))
            return super().at(kind, site)

    ids, offsets = make_batch([6], 60)
    segments = make_segments(offsets, torch.zeros(1, dtype=torch.int32), 1)
    chance = torch.tensor([0.5])
    spy = Spy(chance, None, chance, torch.tensor([1]), row_keys(torch.zeros(1).long(), torch.zeros(1).long(), offsets),
              segments.row_adapter, model.num_sites)  # fmt: skip
    model(ids, offsets, segments, bank, dropout=spy)
    sites = [site for _, site in seen]
    assert sorted(sites) == list(range(model.num_sites)) and model.num_sites == 2 * 7 + 2
    assert [kind for kind, _ in seen].count("lora") == 8 and spy.at("attention", 1) is None


# Files


def test_transformers_loads_what_we_save(tmp_path):
    from transformers import XLMRobertaForTokenClassification

    model = make_model()
    model.save_pretrained(tmp_path)
    theirs, report = XLMRobertaForTokenClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and theirs.config.num_labels == 5
    ids, offsets = make_batch([7, 1, 12], 60)
    torch.testing.assert_close(model(ids, offsets), their_logits(theirs.eval(), ids, offsets), rtol=1e-4, atol=1e-4)


@pytest.fixture
def saved(tmp_path):
    """A folder that transformers wrote, and the model in it."""
    model = make_model()
    transformers_model(model).save_pretrained(tmp_path)
    return tmp_path, model


def same(one, other) -> None:
    assert one.config == other.config
    for (name, mine), (_, wanted) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(mine, wanted), name


def test_we_load_what_transformers_saves(saved):
    folder, model = saved
    same(XLMRForTokenClassification.from_pretrained(folder), model)
    half = XLMRForTokenClassification.from_pretrained(str(folder), num_labels=5, dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and p.requires_grad for p in half.parameters())


def test_only_the_words_that_are_asked_for_are_kept(saved, tmp_path):
    """The same logits and gradients, a smaller table, and an error for any other word."""
    folder, _ = saved
    whole = XLMRForTokenClassification.from_pretrained(folder)
    ids, cu = torch.tensor([0, 7, 5, 2, 0, 9, 2]), torch.tensor([0, 4, 7], dtype=torch.int32)
    words = torch.tensor([9, 0, 2, 5, 7, whole.config.vocab_size + 3])
    few = XLMRForTokenClassification.from_pretrained(folder, words=words)
    assert few.word_embeddings.weight.shape == (5, whole.config.hidden_size) and few.config == whole.config
    assert few.num_parameters == whole.num_parameters == sum(p.numel() for p in whole.parameters())
    logits = [model(ids, cu) for model in (whole, few)]
    assert torch.equal(*logits)
    for each in logits:
        each.square().sum().backward()
    assert torch.equal(whole.word_embeddings.weight.grad[words[:5]], few.word_embeddings.weight.grad)
    with pytest.raises(ValueError, match="got -1"):
        few(torch.tensor([0, 8, 5, 2, 0, 9, 2]), cu)
    with pytest.raises(ValueError, match="kept 5 of"):
        few.save_pretrained(tmp_path / "few")


def as_bin(folder, change=lambda state: state) -> None:
    from safetensors.torch import load_file

    torch.save(change(load_file(folder / "model.safetensors")), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def test_we_load_a_bin_of_tensors(saved):
    folder, model = saved
    as_bin(folder)
    same(XLMRForTokenClassification.from_pretrained(folder), model)


def test_we_load_names_without_prefix_and_old_norm_names(saved):
    folder, model = saved

    def bare(state):
        names = {n: n.removeprefix("roberta.") for n in state if n.startswith("roberta.")}
        return {new.replace("LayerNorm.weight", "LayerNorm.gamma"): state[old] for old, new in names.items()}

    as_bin(folder, bare)
    loaded = XLMRForTokenClassification.from_pretrained(folder, num_labels=5)
    head = loaded.classifier.weight
    assert 0 < head.std() < 0.1 and not torch.equal(head, model.classifier.weight)
    loaded.classifier = model.classifier
    same(loaded, model)


def test_we_load_what_a_masked_language_model_saved(tmp_path):
    """The checkpoint on the hub is one: its output layer is left out, its encoder is ours."""
    from transformers import XLMRobertaConfig, XLMRobertaForMaskedLM

    theirs = XLMRobertaForMaskedLM(XLMRobertaConfig(**vars(SMALL)))
    theirs.save_pretrained(tmp_path)
    model = XLMRForTokenClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(model.word_embeddings.weight, theirs.roberta.embeddings.word_embeddings.weight)
    assert model.config.num_labels == 3 and model.classifier.weight.shape == (3, 24)


def test_a_head_of_another_width_is_replaced_with_a_warning(saved):
    folder, model = saved
    with pytest.warns(UserWarning, match="head of 5 labels, not 7"):
        loaded = XLMRForTokenClassification.from_pretrained(folder, num_labels=7)
    assert loaded.classifier.weight.shape == (7, 24) and loaded.config.num_labels == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        XLMRForTokenClassification.from_pretrained(folder, num_labels=5)
    ids, offsets = make_batch([4], 60)
    torch.testing.assert_close(loaded.encode(ids, offsets), model.encode(ids, offsets))


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def cut_bin(folder):
    as_bin(folder)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-1000])


def without_norm(state):
    state.pop("roberta.encoder.layer.1.output.LayerNorm.bias")
    return state


FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{,"), "JSON"),
    "config is a list": (lambda f: (f / "config.json").write_text("[1]"), "JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "safetensors cut short": (cut, "damaged or cut short"),
    "bin cut short": (cut_bin, "damaged, cut short or holds code"),
    "bin is text": (lambda f: (as_bin(f), (f / "pytorch_model.bin").write_text("hello")), "damaged"),
    "bin is empty": (lambda f: (as_bin(f), (f / "pytorch_model.bin").write_bytes(b"")), "damaged"),
    "missing tensor": (lambda f: as_bin(f, without_norm), "layer.1.output.LayerNorm.bias"),
    "fewer layers than configured": (lambda f: edit_config(f, num_hidden_layers=3), "layer.2"),
    "another width than configured": (lambda f: edit_config(f, intermediate_size=44), "has shape"),
    "another model": (lambda f: edit_config(f, model_type="gpt2"), "'gpt2' model"),
    "heads do not divide": (lambda f: edit_config(f, num_attention_heads=5), "5 heads"),
    "relative positions": (lambda f: edit_config(f, position_embedding_type="relative_key"), "relative_key"),
    "another activation": (lambda f: edit_config(f, hidden_act="relu"), "relu"),
    "a width that is text": (lambda f: edit_config(f, hidden_size="wide"), "hidden_size"),
}


@pytest.mark.parametrize("fault,words", FAULTS.values(), ids=FAULTS)
def test_a_bad_checkpoint_is_the_users_mistake(saved, fault, words):
    folder, _ = saved
    fault(folder)
    with pytest.raises(UserError, match=words) as error:
        XLMRForTokenClassification.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_code_in_a_bin_is_not_run(saved):
    folder, _ = saved
    as_bin(folder, lambda state: state | {"extra": Evil(folder / "owned")})
    with pytest.raises(UserError, match="holds code"):
        XLMRForTokenClassification.from_pretrained(folder)
    assert not (folder / "owned").exists()


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c"])
def test_a_missing_folder_is_not_looked_up_on_the_hub(name):
    with pytest.raises(UserError, match="is not a folder"):
        XLMRForTokenClassification.from_pretrained(name)


def test_saving_over_a_checkpoint_replaces_it_whole(tmp_path):
    make_model().save_pretrained(tmp_path)
    other = make_model(seed=9)
    other.save_pretrained(tmp_path)
    same(XLMRForTokenClassification.from_pretrained(tmp_path), other)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_the_head_is_drawn_from_its_seed_in_any_dtype():
    """In fp32 on the CPU, so that the numbers are the same for every dtype and device."""
    model = make_model()
    before = model.layers[0].up.weight.clone()
    model.draw_head_(3)
    wanted = torch.empty(5, 24).normal_(0, SMALL.initializer_range, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model.classifier.weight, wanted) and not model.classifier.bias.any()
    assert torch.equal(model.layers[0].up.weight, before)
    half = make_model().bfloat16()
    half.draw_head_(3)
    assert torch.equal(half.classifier.weight, wanted.bfloat16()) and half.classifier.weight.requires_grad
    model.draw_head_(4)
    assert not torch.equal(model.classifier.weight, wanted)


def test_sizes_of_the_presets():
    with torch.device("meta"):
        counted = sum(p.numel() for p in XLMRForTokenClassification(BASE).parameters())
    assert counted - 2 * 769 == 277_453_056  # transformers' XLMRobertaModel without its pooler


def test_random_weights_depend_on_the_seed_alone():
    one, two = (XLMRForTokenClassification.random(SMALL, 3) for _ in range(2))
    same(one, two)
    assert not torch.equal(one.layers[0].up.weight, XLMRForTokenClassification.random(SMALL, 4).layers[0].up.weight)
    assert abs(float(one.word_embeddings.weight.detach().std()) - SMALL.initializer_range) < 2e-3
