"""Weights as others save them: shards, several files in one folder, odd tensors; and names that only the hub may know."""

import json
import os
import socket
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_xlmr import edit_config, make_model, same, transformers_model

from kloss.cl.tokenizer import tokenizer_folder
from kloss.errors import UserError
from kloss.models import XLMRForTokenClassification

load = XLMRForTokenClassification.from_pretrained


@pytest.fixture
def sharded(tmp_path):
    """A folder of shards that transformers wrote, and the model in it."""
    model = make_model()
    transformers_model(model).save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3 and not (tmp_path / "model.safetensors").exists()
    return tmp_path, model


def as_bins(folder):
    """The shards as torch.save writes them."""
    for file in folder.glob("model-*.safetensors"):
        torch.save(load_file(file), folder / f"pytorch_{file.stem}.bin")
        file.unlink()
    index = folder / "model.safetensors.index.json"
    text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
    (folder / "pytorch_model.bin.index.json").write_text(text)
    index.unlink()


def edit_index(folder, change):
    path = next(folder.glob("*.index.json"))
    stored = json.loads(path.read_text())
    change(stored["weight_map"])
    path.write_text(json.dumps(stored))


def stale(folder, name):
    """A weight file of an older model, of zeros."""
    state = {key: torch.zeros_like(t) for key, t in transformers_model(make_model()).state_dict().items()}
    save_file(state, folder / name) if name.endswith("safetensors") else torch.save(state, folder / name)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_are_read_whole(sharded, kind):
    folder, model = sharded
    if kind == "bin":
        as_bins(folder)
    same(load(folder), model)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_missing_shard_is_named_and_a_stale_file_beside_it_is_not_read(sharded, kind):
    folder, _ = sharded
    if kind == "bin":
        as_bins(folder)
    shard = sorted(folder.glob("*-of-*"))[1]
    shard.unlink()
    stale(folder, "pytorch_model.bin" if kind == "safetensors" else "adapter_model.bin")
    with pytest.raises(UserError, match=f"names the shard '{shard.name}', which is missing"):
        load(folder)


ORDER = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@pytest.mark.parametrize("first", range(3))
def test_the_file_that_counts_is_the_one_that_transformers_takes(sharded, first):
    """Of the four kinds, those from `first` on are there; only the first has the model, the others are zeros."""
    from transformers import XLMRobertaForTokenClassification

    folder, model = sharded
    if first >= 2:
        for file in folder.glob("model*"):
            file.unlink()
    if first != 1:
        whole = transformers_model(model).state_dict()
        save_file(whole, folder / ORDER[0]) if first == 0 else torch.save(whole, folder / ORDER[2])
    if first == 0:
        edit_index(folder, lambda files: files.clear())
    if first < 2:
        stale(folder, ORDER[2])
    (folder / ORDER[3]).write_text('{"weight_map": {}}')
    same(load(folder), model)
    theirs = XLMRobertaForTokenClassification.from_pretrained(folder)
    assert torch.equal(theirs.classifier.weight, model.classifier.weight)


def empty(path):
    path.write_bytes(b"")


def folder_of_that_name(path):
    path.unlink()
    path.mkdir()


def broken_link(path):
    path.unlink()
    path.symlink_to("nowhere")


@pytest.mark.parametrize("damage", [empty, folder_of_that_name, broken_link])
@pytest.mark.parametrize("name", ORDER[:3])
def test_a_broken_file_is_an_error_whatever_lies_beside_it(sharded, name, damage):
    folder, _ = sharded
    if name != ORDER[1]:
        (folder / ORDER[1]).unlink()
        stale(folder, name)
    damage(folder / name)
    for other in ORDER[ORDER.index(name) + 1 : 3]:
        if not other.endswith("json"):
            stale(folder, other)
    with pytest.raises(UserError, match=name) as error:
        load(folder)
    assert "\n" not in str(error.value)


def outside(folder, path):
    """A shard's tensors under a path that an index must not name."""
    edit_index(folder, lambda files: files.update({name: path for name in files}))


@pytest.mark.parametrize("path", ["../other/model.safetensors", "/other/model.safetensors", "sub/../../other/model.safetensors"])
def test_a_shard_outside_the_folder_is_not_read(sharded, path):
    folder, model = sharded
    other = folder.parent / "other"
    other.mkdir(exist_ok=True)
    stale(other, "model.safetensors")
    outside(folder, path.replace("/other", str(other)) if path.startswith("/") else path)
    with pytest.raises(UserError, match="outside the folder"):
        load(folder)


INDEX_FAULTS = {
    "no map": lambda folder: (folder / ORDER[1]).write_text("{}"),
    "a list": lambda folder: (folder / ORDER[1]).write_text('{"weight_map": ["a"]}'),
    "an empty map": lambda folder: edit_index(folder, dict.clear),
    "a number": lambda folder: edit_index(folder, lambda files: files.update({next(iter(files)): 3})),
    "no JSON": lambda folder: (folder / ORDER[1]).write_text("["),
    "deep": lambda folder: (folder / ORDER[1]).write_text("[" * 100_000),
    "a name with NUL": lambda folder: outside(folder, "a\0b"),
    "a long name": lambda folder: outside(folder, "a" * 5000 + ".safetensors"),
    "itself": lambda folder: outside(folder, ORDER[1]),
    "the config": lambda folder: outside(folder, "config.json"),
    "the folder": lambda folder: outside(folder, "."),
    "another shard": lambda folder: outside(folder, sorted(folder.glob("model-*"))[0].name),
    "a tensor too many": lambda folder: edit_index(folder, lambda files: files.update(x=files[next(iter(files))])),
    "a tensor too few": lambda folder: edit_index(folder, lambda files: files.pop("roberta.encoder.layer.1.output.dense.bias")),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS.values(), ids=INDEX_FAULTS)
def test_a_bad_index_is_the_users_mistake(sharded, fault):
    folder, _ = sharded
    fault(folder)
    with pytest.raises(UserError) as error:
        load(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


# Tensors


def with_tensor(change, name="roberta.encoder.layer.1.output.dense.weight"):
    def fault(state):
        state[name] = change(state[name])

    return fault


def set_first(value):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[0] = value
        return tensor

    return change


TENSOR_FAULTS = {
    "NaN": (with_tensor(set_first(float("nan"))), "1.output.dense.weight has NaN or infinite"),
    "-inf": (with_tensor(set_first(float("-inf"))), "1.output.dense.weight has NaN or infinite"),
    "beyond fp32": (with_tensor(lambda t: t.double() * 1e300), "NaN or infinite values in float32"),
    "float8": (with_tensor(lambda t: t.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    "int8": (with_tensor(lambda t: t.to(torch.int8)), "int8"),
    "complex": (with_tensor(lambda t: t.to(torch.complex64)), "complex64"),
    "transposed": (with_tensor(lambda t: t.T.contiguous()), "has shape"),
    "q of another width": (with_tensor(lambda t: t[:5], "roberta.encoder.layer.0.attention.self.query.weight"), "query.weight"),
    "a head without bias": (lambda state: state.pop("classifier.bias"), "classifier.bias"),
    "a head of one dimension": (with_tensor(lambda t: t[0], "classifier.weight"), "classifier.weight has shape"),
    "a head of nothing": (with_tensor(lambda t: t[:0], "classifier.weight"), "classifier.weight has shape"),
    "a layer more": (
        lambda state: state.update({"roberta.encoder.layer.2.output.dense.bias": torch.zeros(24)}), "more than the 2 layers"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault,words", TENSOR_FAULTS.values(), ids=TENSOR_FAULTS)
def test_tensors_that_are_no_weights_are_named(tmp_path, fault, words):
    state = transformers_model(make_model()).state_dict()
    transformers_model(make_model()).save_pretrained(tmp_path)
    fault(state)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=words):
        load(tmp_path)


def test_weights_must_be_finite_in_the_dtype_of_the_model(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.layers[0].up.weight[0, 0] = 7e4
    model.save_pretrained(tmp_path)
    assert load(tmp_path).layers[0].up.weight[0, 0] == 7e4
    with pytest.raises(UserError, match="layer.0.intermediate.dense.weight has NaN or infinite values in float16"):
        load(tmp_path, dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_float_types_load(tmp_path, dtype):
    model = make_model().to(dtype)
    model.save_pretrained(tmp_path)
    assert all(
        torch.equal(mine, theirs.float()) for mine, theirs in zip(load(tmp_path).parameters(), model.parameters(), strict=True)
    )


BINS = {
    "a list": [torch.zeros(3)],
    "a tensor": torch.zeros(3),
    "a number": 7,
    "numbers as names": {1: torch.zeros(3)},
    "lists as tensors": {"roberta.embeddings.word_embeddings.weight": [1.0]},
    "a state within": {"state_dict": {}},
    "a view of one number": {"roberta.embeddings.word_embeddings.weight": torch.zeros(1).expand(60, 24)},
    "no memory": {"roberta.embeddings.word_embeddings.weight": torch.empty(60, 24, device="meta")},
    "sparse": {"roberta.embeddings.word_embeddings.weight": torch.eye(60, 24).to_sparse()},
    "nothing": {},
}


@pytest.mark.parametrize("content", BINS.values(), ids=BINS)
def test_a_bin_of_something_else_is_the_users_mistake(tmp_path, content):
    transformers_model(make_model()).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("labels", [0, -1])
def test_a_head_of_no_labels_is_refused(tmp_path, labels):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"num_labels must be at least 1, got {labels}"):
        load(tmp_path, num_labels=labels)


def test_a_config_of_other_labels_than_the_head_takes_the_heads(tmp_path):
    make_model().save_pretrained(tmp_path)
    edit_config(tmp_path, id2label={"0": "a"}, num_labels=0)
    assert load(tmp_path).config.num_labels == 5


# The hub


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No name is known and no address answers; the hub's cache is empty."""
    import huggingface_hub.constants as constants

    asked = []

    def refuse(*arguments, **keywords):
        asked.append(arguments)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return asked


def ask_for_a_tokenizer(name, cache):
    return tokenizer_folder(name, cache, "", list)


def ask_for_a_backbone(name, cache):
    return load(name)


@pytest.mark.parametrize("ask", [ask_for_a_tokenizer, ask_for_a_backbone])
def test_a_hub_name_without_a_network_says_so_at_once(no_network, tmp_path, ask):
    began = time.monotonic()
    with pytest.raises(
        UserError, match=r"some/name is no local folder, and the hub did not give it \(.*give a local folder"
    ) as error:
        ask("some/name", tmp_path)
    assert "\n" not in str(error.value) and len(no_network) <= 2
    assert time.monotonic() - began < 2  # transformers asks 12 times, for 48 seconds


def test_a_hub_data_set_without_a_network_says_so_at_once(no_network, tmp_path):
    from kloss.cl.corpus import load_corpus

    began = time.monotonic()
    with pytest.raises(UserError, match=r"the hub did not give some/name \(.*HF_HUB_OFFLINE=1") as error:
        load_corpus("some/name", cache=tmp_path)
    assert "\n" not in str(error.value) and len(no_network) <= 2
    assert time.monotonic() - began < 5  # `datasets` asks for 47 seconds; importing it takes one or two


def in_the_hubs_cache(hub, name, source):
    """The files of a folder as a download of the hub leaves them."""
    folder = hub / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    for file in source.iterdir():
        os.symlink(file, snapshot / file.name)


def test_what_was_downloaded_before_is_found_without_a_network(no_network, tmp_path):
    from kloss.cl.tokenizer import hash_tokenizer, train_tokenizer

    model = make_model()
    (tmp_path / "model").mkdir()
    model.save_pretrained(tmp_path / "model")
    train_tokenizer(["go home", "stop it now"] * 9, tmp_path / "model", vocab_size=60)
    in_the_hubs_cache(tmp_path / "hub", "some/name", tmp_path / "model")
    same(load("some/name"), model)
    folder = tokenizer_folder("some/name", tmp_path, "", list)
    assert folder == tokenizer_folder("some/name", tmp_path, "", list) and hash_tokenizer(folder) in folder.name
