"""Model folders with odd configurations, tensors, files, indices and pickles: they load, or one line says why not."""

import json
import pickle
import tempfile
import warnings
from functools import cache
from pathlib import Path

import torch
from helpers import fuzz_examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from kloss.models import XLMRConfig, XLMRForTokenClassification
from kloss.models.architecture import COMPUTED, DEFAULTS, HARMLESS, MODELS

SIZES = dict(
    vocab_size=12, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, max_position_embeddings=10,
    type_vocab_size=2, num_labels=3,
)  # fmt: skip
MARK = Path(tempfile.gettempdir()) / "kloss-fuzz-unpickled"


class Evil:
    """Leaves a mark when it is unpickled."""

    def __reduce__(self):
        return open, (str(MARK), "w")


@cache
def model_of(kind):
    """config.json and tensors of a small model that loads."""
    with tempfile.TemporaryDirectory() as folder:
        XLMRForTokenClassification.random(XLMRConfig(**SIZES, model_type=kind)).save_pretrained(folder)
        from safetensors.torch import load_file

        return json.loads((Path(folder) / "config.json").read_text()), load_file(Path(folder) / "model.safetensors")


NUMBERS = st.sampled_from(
    [0, 1, -1, -5, 3, 7, 10**9, 2**31, 2**63, 10**19, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")]
)
LEAVES = NUMBERS | st.none() | st.booleans() | st.sampled_from(["", "gelu", "relu", "8", "\0", "\ud800", "x" * 5000, "../x"])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2))
KEYS = st.sampled_from(sorted({*DEFAULTS, *COMPUTED, *HARMLESS}))
FLOATS = ("float16", "bfloat16", "float64")
DTYPES = st.sampled_from([*FLOATS, "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "int64", "bool", "complex64"])


@st.composite
def configs(draw, config):
    config = dict(config)
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.booleans()):
            config[draw(KEYS)] = draw(VALUES)
        else:
            config.pop(draw(st.sampled_from(sorted(config))), None)
    return config


@st.composite
def tensors(draw, state):
    """Some tensors renamed, left out, of another shape or dtype, with NaN or infinity, or added."""
    whole, state = state, dict(state)
    for _ in range(draw(st.integers(1, 2))):
        name = draw(st.sampled_from(sorted(name for name in whole if state.get(name) is whole[name])))
        tensor = state[name]
        match draw(st.integers(0, 7)):
            case 0:
                state[draw(st.sampled_from(["", "x", f"model.{name}", name.upper(), "\n" + name]))] = state.pop(name)
            case 1:
                del state[name]
            case 2:
                state[name] = tensor[None] if draw(st.booleans()) else tensor.flatten()
            case 3:
                state[name] = tensor[: draw(st.integers(0, len(tensor)))].clone()
            case 4:
                state[name] = torch.tensor(draw(st.sampled_from([0.0, float("nan")])))
            case 5:
                state[name] = tensor.to(getattr(torch, draw(DTYPES)))
            case 6:
                state[name] = tensor.clone()
                bad = draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, 0.0]))
                state[name].view(-1)[draw(st.integers(0, tensor.numel() - 1))] = bad
            case 7:
                state[draw(st.sampled_from(["classifier.dense.weight", name.replace(".0.", ".1."), "lm_head.bias"]))] = (
                    tensor.clone()
                )
    return state


PICKLED = {
    "list": lambda state: list(state.values()),
    "lists": lambda state: {name: tensor.float().tolist() for name, tensor in state.items()},
    "numbers": lambda state: dict(enumerate(state.values())),
    "within": lambda state: {"state_dict": state, "epoch": 3},
    "number": lambda state: 7,
    "None": lambda state: None,
    "evil": lambda state: state | {"extra": Evil()},
    "evil alone": lambda state: Evil(),
    "expanded": lambda state: {name: tensor.float().flatten()[0].expand(tensor.shape) for name, tensor in state.items()},
    "parameters": lambda state: {name: torch.nn.Parameter(tensor.float()) for name, tensor in state.items()},
    "meta": lambda state: {name: tensor.to("meta") for name, tensor in state.items()},
    "sparse": lambda state: {name: tensor.float().to_sparse() for name, tensor in state.items()},
    "as it is": lambda state: state,
}  # fmt: skip


@st.composite
def bins(draw, path, state):
    """A .bin: torch's zip or its older form, a raw pickle, with tensors or something else."""
    content = PICKLED[draw(st.sampled_from(sorted(PICKLED)))](state)
    form = draw(st.integers(0, 2))
    if form == 2:
        path.write_bytes(pickle.dumps(content, protocol=draw(st.integers(0, 5))))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == 0)


@st.composite
def weights(draw, folder, state):
    """Weight files of one of four kinds; indices may name files that are odd."""
    kind = draw(st.sampled_from(["safetensors", "shards", "bin", "bin", "bin shards"]))
    if kind == "safetensors":
        return save_file(state, folder / "model.safetensors")
    if kind == "bin":
        return draw(bins(folder / "pytorch_model.bin", state))
    stem, end = ("model", "safetensors") if kind == "shards" else ("pytorch_model", "bin")
    names = sorted(state)
    cut = draw(st.integers(0, len(names)))
    files = {}
    for number, part in enumerate((names[:cut], names[cut:])):
        path = folder / f"{stem}-{number}.{end}"
        shard = {name: state[name] for name in part}
        save_file(shard, path) if kind == "shards" else torch.save(shard, path)
        files |= dict.fromkeys(part, path.name)
    if draw(st.booleans()):
        odd = VALUES | st.sampled_from(["config.json", ".", "..", f"{stem}.{end}.index.json", f"{stem}-0.{end}", "a/b"])
        files[draw(st.sampled_from([*names, "other"]))] = draw(odd)
    index = {"metadata": {}, "weight_map": files} if draw(st.integers(0, 5)) else draw(VALUES)
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))


@st.composite
def damages(draw, folder):
    """A file cut, with bytes changed, of noise, empty, or a folder of its name."""
    path = draw(st.sampled_from(sorted(folder.iterdir())))
    data = bytearray(path.read_bytes())
    match draw(st.integers(0, 4)):
        case 0:
            path.write_bytes(data[: draw(st.integers(0, len(data)))])
        case 1:
            for _ in range(draw(st.integers(1, 4))):
                at = min(draw(st.integers(0, 300) | st.integers(0, len(data))), max(0, len(data) - 1))
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            path.write_bytes(data)
        case 2:
            path.write_bytes(draw(st.binary(max_size=99)))
        case 3:
            path.write_text(draw(st.sampled_from(["", "[" * 5000, "{}", "[1]", '{"weight_map": 3}', '"\\ud800"', "\0" * 99])))
        case 4:
            path.unlink()
            path.mkdir()


@settings(
    max_examples=fuzz_examples(250), derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)  # fmt: skip
@given(st.data())
def test_a_model_folder_loads_or_is_the_users_mistake(data):
    MARK.unlink(missing_ok=True)
    config, state = model_of(data.draw(st.sampled_from(sorted(MODELS))))
    spoilt = data.draw(st.sets(st.sampled_from(["config", "tensors", "file"]), max_size=2))
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a head of another width, and torch's of sparse and quantised tensors
        folder = Path(name)
        (folder / "config.json").write_text(json.dumps(data.draw(configs(config)) if "config" in spoilt else config))
        data.draw(weights(folder, data.draw(tensors(state)) if "tensors" in spoilt else state))
        if "file" in spoilt:
            data.draw(damages(folder))
        try:
            model = XLMRForTokenClassification.from_pretrained(folder, data.draw(st.sampled_from([None, 3, 4])))
        except ValueError as error:
            assert "\n" not in str(error) and 0 < len(str(error)) < 2000, error
        else:
            assert all(parameter.isfinite().all() for parameter in model.parameters())
            assert model(torch.tensor([4, 5, 6]), torch.tensor([0, 3], dtype=torch.int32)).shape == (3, model.config.num_labels)
    assert not MARK.exists()
