"""Adapter folders as nobody should write them: they load, or one line says why not and nothing has changed."""

import json
import shutil
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from helpers import fuzz_examples
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

import kloss
from kloss.models import AdapterBank, XLMRConfig
from kloss.models.attach import load_peft

CONFIG = XLMRConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
    max_position_embeddings=20, num_labels=3,
)  # fmt: skip
NUMBERS = [0, 1, -1, 2, 3, 4, 5, 0.5, 1e300, 1e-300, float("nan"), float("inf"), 2**31, 10**30, 10**400]
OTHERS = [
    None,
    True,
    False,
    "",
    "none",
    "all",
    "pissa",
    "LORA",
    "lora",
    "\0",
    "query",
    [],
    {},
    [1],
    ["classifier"],
    {"a": {}},
    [[]],
]
SETTINGS = sorted({field.name for field in fields(LoraConfig)} | {"merge_weights", "enable_lora", "later", "\udcff", ""})
TEXTS = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"r": 1' + b"0" * 5000 + b"}", b'{"a":' * 3000, b"{}" + b"}" * 9, b'{"r":NaN}']
DTYPES = [
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.uint8,
    torch.bool, torch.complex64,
]  # fmt: skip
RESHAPES = {
    "transposed": lambda t: t.mT.contiguous() if t.dim() > 1 else t[None],
    "flat": lambda t: t.flatten(),
    "scalar": lambda t: t.flatten()[0].clone(),
    "empty": lambda t: t[:0].clone(),
    "a row less": lambda t: t[:-1].clone(),
    "a column more": lambda t: torch.cat([t, t[..., :1]], -1),
    "one dimension more": lambda t: t[None],
    "sparse": lambda t: t.to_sparse(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "on meta": lambda t: t.to("meta"),
    "endless": lambda t: t.flatten()[:1].expand(1 << 40),
    "a parameter": lambda t: nn.Parameter(t),
    "a list": lambda t: t.tolist(),
}
RENAMES = {
    "compiled": lambda n: n.replace("roberta.", "_orig_mod.roberta.", 1),
    "in DDP": lambda n: "module." + n,
    "twice base_model": lambda n: "base_model.model." + n,
    "cut": lambda n: n[:-7],
    "another layer": lambda n: n.replace("layer.0", "layer.1"),
    "A for B": lambda n: n.replace("lora_A", "lora_B") if "lora_A" in n else n.replace("lora_B", "lora_A"),
    "adapter's name": lambda n: n.replace(".weight", ".default.weight"),
    "empty": lambda n: "",
    "dots": lambda n: "..." + n + ".",
}

scalar = st.sampled_from(NUMBERS + OTHERS)
edit = st.one_of(
    st.tuples(st.just("set"), st.sampled_from(SETTINGS), scalar | st.lists(scalar, max_size=2)),
    st.tuples(st.just("set"), st.sampled_from(["r", "lora_alpha", "use_rslora", "init_lora_weights", "modules_to_save"]), scalar),
    st.tuples(st.just("unset"), st.sampled_from(["r", "lora_alpha", "peft_type", "bias", "modules_to_save"])),
    st.tuples(st.just("rename"), st.integers(0, 99), st.sampled_from([*RENAMES])),
    st.tuples(st.just("rename all"), st.just(0), st.sampled_from([*RENAMES])),
    st.tuples(st.just("reshape"), st.integers(0, 99), st.sampled_from([*RESHAPES])),
    st.tuples(st.just("dtype"), st.integers(0, 99), st.sampled_from(DTYPES)),
    st.tuples(st.just("value"), st.integers(0, 99), st.sampled_from([float("nan"), float("inf"), -3e38, 0.0])),
    st.tuples(st.just("drop"), st.integers(0, 99)),
    st.tuples(st.just("drop all"), st.sampled_from(["lora_A", "lora_", "classifier", "query", ""])),
)
damage = st.one_of(
    st.tuples(st.just("cut"), st.floats(0, 1)),
    st.tuples(st.just("flip"), st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255)), min_size=1, max_size=8)),
    st.tuples(st.just("noise"), st.binary(max_size=60)),
    st.tuples(st.just("text"), st.sampled_from(TEXTS)),
    st.tuples(st.just("gone"), st.none()),
    st.tuples(st.just("folder"), st.none()),
)
NAMES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
cases = st.tuples(
    st.lists(edit, max_size=2), st.booleans(), st.lists(st.tuples(st.sampled_from(NAMES), damage), max_size=1) | st.just([])
)


def write(folder: Path, source: tuple[dict, dict], changes: list, as_bin: bool, damages: list) -> None:
    """An adapter's folder with the changes, as safetensors where these can say it."""
    config, tensors = dict(source[0]), {name: tensor.clone() for name, tensor in source[1].items()}
    for kind, key, *value in changes:
        names = [*tensors]
        name = names[key % len(names)] if isinstance(key, int) and names else None
        if kind == "set":
            config[key] = value[0]
        elif kind == "unset":
            config.pop(key, None)
        elif kind == "drop all":
            tensors = {n: t for n, t in tensors.items() if key not in n}
        elif kind == "rename all":
            tensors = {RENAMES[value[0]](n): t for n, t in tensors.items()}
        elif name is None or not isinstance(tensors[name], torch.Tensor) or tensors[name].layout is not torch.strided:
            continue
        elif kind == "rename":
            tensors[RENAMES[value[0]](name)] = tensors.pop(name)
        elif kind == "reshape" and tensors[name].dtype == torch.float32 and tensors[name].numel() in range(1, 999):
            tensors[name] = RESHAPES[value[0]](tensors[name])
        elif kind == "dtype" and tensors[name].device.type == "cpu" and tensors[name].numel() < 999:
            tensors[name] = tensors[name].to(value[0])
        elif kind == "value" and tensors[name].numel() in range(1, 999) and tensors[name].dtype == torch.float32:
            tensors[name] = tensors[name].detach().clone().index_fill_(0, torch.tensor(0), value[0])
        elif kind == "drop":
            tensors.pop(name)
    folder.mkdir()
    (folder / NAMES[0]).write_text(json.dumps(config), encoding="utf-8")
    dense = all(isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_quantized for t in tensors.values())
    if as_bin or not dense or any(t.device.type == "meta" or t.numel() > 999 for t in tensors.values()):
        torch.save(tensors, folder / NAMES[2])
    else:
        save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, folder / NAMES[1])
    for file, (kind, value) in damages:
        path = folder / file
        content = bytearray(path.read_bytes()) if path.exists() else bytearray()
        path.unlink(missing_ok=True)
        if kind == "folder":
            path.mkdir()
        elif kind == "cut":
            path.write_bytes(content[: int(value * len(content))])
        elif kind == "flip":
            for where, bits in value if content else ():
                content[int(where * len(content))] ^= bits
            path.write_bytes(content)
        elif kind != "gone":
            path.write_bytes(value)


def state(bank, model) -> dict[str, torch.Tensor]:
    """Everything that loading may change."""
    layer = model.get_submodule("roberta.encoder.layer.0.attention.self.query")
    numbers = {name: torch.tensor(getattr(layer.shared, name), dtype=torch.float64) for name in ("ranks", "alphas", "scaling")}
    of_bank = {name: getattr(bank, name) for name in ("work", "ranks", "alphas", "scaling")} | bank.state()
    return {k: v.clone() for k, v in (of_bank | model.state_dict() | {f"attached {n}": t for n, t in numbers.items()}).items()}


@pytest.mark.filterwarnings("ignore:torch.quantize", "ignore:TypedStorage")
def test_folders_that_nobody_should_write(tmp_path):
    bank = AdapterBank(CONFIG, 3, [4, 2, 3], dtype=torch.bfloat16)
    bank.param.copy_(torch.rand(bank.param.shape, generator=torch.Generator().manual_seed(0)))
    bank.refresh()
    bank.moments.fill_(1)
    bank.save_peft(tmp_path / "good", 2)
    from kloss.files import read_json, read_tensors

    source = read_json(tmp_path / "good" / NAMES[0]), read_tensors(tmp_path / "good" / NAMES[1])
    model = nn.Module()
    for name, tensor in source[1].items():
        *path, last = name.removeprefix("base_model.model.").partition(".lora_")[0].split(".")
        parent = model
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        if "lora_B" in name:
            parent.add_module(last, nn.Linear(parent.width, tensor.shape[0]))
        elif "lora_A" in name:
            parent.width = tensor.shape[1]
    kloss.attach(model, 3, [4, 2, 3])
    outcomes: Counter = Counter()

    def attempt(load, g) -> None:
        before = state(bank, model)
        try:
            load()
        except ValueError as error:
            assert str(error) and "\n" not in str(error), error
            after = state(bank, model)
            assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "a refused load changed something"
            outcomes["refused"] += 1
        else:
            after = state(bank, model)
            assert all(tensor.isfinite().all() for tensor in after.values())
            changed = {n for n, t in before.items() if not torch.equal(after[n], t)}
            others = [g_ for g_ in range(3) if g_ != g]
            assert all(torch.equal(after[n][others], before[n][others]) for n in changed), "another adapter changed"
            outcomes["loaded"] += 1

    @settings(max_examples=fuzz_examples(250), derandomize=True, database=None, deadline=None)
    @given(cases)
    def fuzz(case):
        folder = tmp_path / "case"
        shutil.rmtree(folder, ignore_errors=True)
        write(folder, source, *case)
        attempt(lambda: bank.load_peft(folder, 1), 1)
        attempt(lambda: load_peft(model, folder, 1, head="ignore"), 1)

    fuzz()
    assert outcomes["loaded"] > 0.1 * outcomes.total() and outcomes["refused"] > 0.4 * outcomes.total(), outcomes
