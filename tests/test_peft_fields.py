"""What peft's files may say: every setting of its LoraConfig, which of several files counts, whose names they hold."""

import json
from dataclasses import MISSING, fields

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import kloss
from kloss.errors import UserError
from kloss.files import read_tensors
from kloss.models.attach import load_peft, save_peft
from kloss.models.peft_files import DEFAULT_ONLY, HARMLESS, HONOURED

X = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))


def attached(rank=8):
    return kloss.attach(net(), 2, rank, "0")


def made_by_peft(folder, base=net, **options):
    """A random adapter of peft on the first layer, saved; peft's model."""
    theirs = get_peft_model(base(), LoraConfig(**{"r": 4, "target_modules": ["0"]} | options)).eval()
    generator = torch.Generator().manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if ".lora_" in name:
            parameter.data.normal_(0, 0.3, generator=generator)
    theirs.save_pretrained(folder)
    return theirs


def outputs(model):
    with kloss.use_adapters(model, [1] * 3):
        return model(X)


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_table_knows_every_field_of_peft_and_its_default():
    default = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(LoraConfig)}
    assert not HONOURED & HARMLESS and not (HONOURED | HARMLESS) & DEFAULT_ONLY.keys()
    assert default.keys() - HONOURED - HARMLESS - DEFAULT_ONLY.keys() == set(), "a setting of peft that nobody has judged"
    assert (HONOURED | HARMLESS | DEFAULT_ONLY.keys()) - default.keys() == {"merge_weights"}, "of peft's first versions"
    assert {name: default[name] for name in DEFAULT_ONLY} == DEFAULT_ONLY


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_adapters_that_changed_their_base_are_refused(init, tmp_path):
    theirs, base = made_by_peft(tmp_path, init_lora_weights=init), net()
    assert (theirs.base_model.model[0].weight - base[0].weight).abs().max() > 0.01, "peft left the base as it was"
    ours = attached()
    with pytest.raises(UserError, match=f"{tmp_path}: init_lora_weights '{init}' .*path_initial_model_for_weight_conversion"):
        load_peft(ours, tmp_path, 1)
    assert torch.equal(outputs(ours), base(X))


def test_one_that_peft_converted_loads(tmp_path):
    theirs = get_peft_model(net(), LoraConfig(r=4, target_modules=["0"], init_lora_weights="pissa"))
    theirs.save_pretrained(tmp_path / "first")
    theirs.base_model.model[0].lora_B["default"].weight.data.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    load_peft(ours := attached(), tmp_path / "plain", 1)
    torch.testing.assert_close(outputs(ours), theirs(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "Olora", "something new", "", 3, ["pissa"]])
def test_inits_known_or_unknown_that_may_change_the_base_are_refused(init, tmp_path):
    made_by_peft(tmp_path)
    edit(tmp_path, init_lora_weights=init)
    with pytest.raises(UserError, match="init_lora_weights"):
        load_peft(attached(), tmp_path, 1)


@pytest.mark.parametrize(
    "options",
    [{"init_lora_weights": init} for init in (True, False, "gaussian", "orthogonal", "mica", "eva")]
    + [{"lora_dropout": 0.1}, {"fan_in_fan_out": True}, {"corda_config": {}}, {"eva_config": {}}, {"lora_ga_config": {}}]
    + [{"target_parameters": ["0.weight"], "target_modules": []}, {"target_modules": None, "r": 3}, {"use_rslora": True}]
    + [{"exclude_modules": ["2"], "target_modules": ["0", "2"]}, {"qalora_group_size": 4}, {"lora_alpha": 16.5}],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`eva_config`", "ignore:`corda_config`", "ignore:fan_in_fan_out")
def test_settings_without_effect_on_a_loaded_adapter_load(options, tmp_path):
    if options.get("target_modules", 0) is None:  # a list in other words
        options = options | {"target_modules": "0"}
    theirs = made_by_peft(tmp_path, **options)
    load_peft(ours := attached(), tmp_path, 1)
    torch.testing.assert_close(outputs(ours), theirs(X), rtol=1e-4, atol=1e-5)
    assert (outputs(ours) - net()(X)).abs().max() > 0.05


OTHERS = {
    "bias": "all", "use_dora": True, "lora_bias": True, "rank_pattern": {"0": 2}, "alpha_pattern": {"0": 2},
    "megatron_config": {"a": 1}, "trainable_token_indices": [1], "alora_invocation_tokens": [1], "monteclora_config": {},
    "use_bdlora": {}, "arrow_config": {}, "kasa_config": {}, "velora_config": {}, "use_qalora": True,
    "layer_replication": [[0, 1]], "ensure_weight_tying": True, "a_setting_of_the_future": 1, "enable_lora": [True, False],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), OTHERS.items(), ids=OTHERS)
def test_other_settings_are_refused_by_name(name, value, tmp_path):
    made_by_peft(tmp_path)
    edit(tmp_path, **{name: value})
    ours = attached()
    with pytest.raises(UserError, match=f"{name} is not supported.*given"):
        load_peft(ours, tmp_path, 1)
    assert torch.equal(outputs(ours), net()(X))


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_alpha", v) for v in (float("inf"), float("nan"), True, "8", None, 10**400, 1e39)]
    + [("r", v) for v in (True, 4.0, 0, -1, 10**30, None)]
    + [("use_rslora", v) for v in ("false", 1.0, [])]
    + [("modules_to_save", v) for v in (3, [1], {"a": 1})],
)
def test_numbers_that_are_none(name, value, tmp_path):
    made_by_peft(tmp_path)
    edit(tmp_path, **{name: value})
    with pytest.raises(UserError, match=f"{tmp_path}.*(rank|{name})"):
        load_peft(attached(), tmp_path, 1)


def test_a_config_of_peft_s_first_versions_loads(tmp_path):
    theirs = made_by_peft(tmp_path, lora_alpha=6)
    old = {
        "base_model_name_or_path": None, "bias": "none", "enable_lora": None, "fan_in_fan_out": False, "inference_mode": True,
        "lora_alpha": 6, "lora_dropout": 0.0, "merge_weights": False, "modules_to_save": None, "peft_type": "LORA", "r": 4,
        "target_modules": ["0"], "task_type": None,
    }  # fmt: skip
    assert len(old) == 13
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    load_peft(ours := attached(), tmp_path, 1)
    torch.testing.assert_close(outputs(ours), theirs(X))


def test_adapter_model_bin_is_read_where_there_is_no_safetensors(tmp_path):
    theirs = made_by_peft(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = read_tensors(file)
    torch.save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, tmp_path / "adapter_model.bin")
    load_peft(ours := attached(), tmp_path, 1)  # safetensors counts, as in peft
    torch.testing.assert_close(outputs(ours), theirs(X))
    again = PeftModel.from_pretrained(net(), tmp_path)
    torch.testing.assert_close(again(X), theirs(X))
    file.unlink()
    load_peft(ours, tmp_path, 1)
    assert torch.equal(outputs(ours), net()(X))
    theirs.save_pretrained(tmp_path / "by peft", safe_serialization=False)
    assert (tmp_path / "by peft/adapter_model.bin").exists()
    load_peft(ours, tmp_path / "by peft", 1)
    torch.testing.assert_close(outputs(ours), theirs(X))
    torch.save({name: nn.Parameter(tensor) for name, tensor in tensors.items()}, tmp_path / "adapter_model.bin")
    load_peft(ours, tmp_path, 1)
    torch.testing.assert_close(outputs(ours), theirs(X))
    outputs(ours).sum().backward()
    assert ours[0].lora_a.is_leaf and ours[0].lora_a.grad.any()


class Evil:
    def __reduce__(self):
        return open, ("owned", "w")


SPARSE = {
    "base_model.model.0.lora_A.weight": torch.ones(4, 32).to_sparse(),
    "base_model.model.0.lora_B.weight": torch.ones(32, 4),
}


@pytest.mark.parametrize("content", [Evil(), [1, 2], {1: torch.ones(2)}, {"a": [1.0]}, SPARSE, None])
def test_a_bin_that_holds_no_tensors_is_refused(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made_by_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin|is torch.sparse_coo"):
        load_peft(attached(), tmp_path, 1)
    assert not (tmp_path / "owned").exists()


def test_a_root_of_several_adapters_names_them(tmp_path):
    theirs = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]), adapter_name="english")
    theirs.add_adapter("welsh", LoraConfig(r=2, target_modules=["0"]))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path} .*adapter_config.json.* english, welsh"):
        load_peft(attached(), tmp_path, 1)
    load_peft(attached(), tmp_path / "welsh", 1)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="adapter_config.json does not exist"):
        load_peft(attached(), tmp_path / "nothing", 1)
    (tmp_path / "english/adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors nor adapter_model.bin is there"):
        load_peft(attached(), tmp_path / "english", 1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_numbers_that_are_not_finite_in_fp32_are_refused_by_name(value, tmp_path):
    made_by_peft(tmp_path)
    tensors = {name: tensor.double() for name, tensor in read_tensors(tmp_path / "adapter_model.safetensors").items()}
    tensors["base_model.model.0.lora_B.weight"][5, 2] = value
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="0.lora_B.weight .*not finite"):
        load_peft(attached(), tmp_path, 1)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_tensors_that_are_not_floats_are_refused(dtype, tmp_path):
    made_by_peft(tmp_path)
    tensors = {name: tensor.to(dtype) for name, tensor in read_tensors(tmp_path / "adapter_model.safetensors").items()}
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match=f"0.lora_A.weight .*{dtype}"):
        load_peft(attached(), tmp_path, 1)


def test_a_file_without_any_adapter_is_refused(tmp_path):
    made_by_peft(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="no lora_A"):
        load_peft(attached(), tmp_path, 1)


def compiled():
    return torch.compile(net(), backend="eager")


def checkpointed():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = net()
    model[0] = checkpoint_wrapper(model[0])
    return model


class Block(nn.Module):
    """A layer compiled within a model."""

    def __init__(self):
        super().__init__()
        self.inner = compiled()

    def forward(self, x):
        return self.inner(x)


def plain_block():
    block = Block()
    block.inner = net()
    return block


@pytest.mark.parametrize(
    ("wrapped", "plain", "target"),
    [(compiled, net, "0"), (Block, plain_block, "inner.0"), (lambda: nn.DataParallel(net()), net, "0"), (checkpointed, net, "0")],
    ids=["compiled", "a compiled block", "DataParallel", "a checkpointed layer"],
)
def test_wrappers_are_in_no_name(wrapped, plain, target, tmp_path):
    model = wrapped()
    model(X)  # what torch compiled before must not go on
    ours, other = kloss.attach(model, 2, 4, target), kloss.attach(plain(), 2, 4, target)
    one, two = (next(m for m in model.modules() if hasattr(m, "lora_a")) for model in (ours, other))
    assert one.name == two.name == target and torch.equal(one.lora_a, two.lora_a)
    one.lora_b.data.normal_()
    save_peft(ours, tmp_path, 1)
    assert not [n for n in read_tensors(tmp_path / "adapter_model.safetensors") if "_orig_mod" in n or "module" in n]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == [target]
    load_peft(other, tmp_path, 1)
    torch.testing.assert_close(outputs(other), outputs(ours))
    assert (outputs(ours) - plain()(X)).abs().max() > 0.1
    torch.testing.assert_close(PeftModel.from_pretrained(plain(), tmp_path)(X), outputs(ours))


@pytest.mark.parametrize("wrapped", [compiled, lambda: nn.DataParallel(net())], ids=["compiled", "DataParallel"])
def test_files_of_wrapped_models_load(wrapped, tmp_path):
    target = "_orig_mod.0" if wrapped is compiled else "module.0"
    theirs = made_by_peft(tmp_path, wrapped, target_modules=[target])
    assert all(target in name for name in read_tensors(tmp_path / "adapter_model.safetensors"))
    load_peft(ours := attached(), tmp_path, 1)
    torch.testing.assert_close(outputs(ours), theirs(X))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_names_before_peft_s_own_are_left_out(prefix, tmp_path):
    theirs = made_by_peft(tmp_path)
    tensors = read_tensors(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "adapter_model.bin")
    load_peft(ours := attached(), tmp_path, 1)
    torch.testing.assert_close(outputs(ours), theirs(X))
    torch.save(tensors | {prefix + name: tensor for name, tensor in tensors.items()}, tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="lora_A.weight .*twice"):
        load_peft(ours, tmp_path, 1)


def test_adapters_in_a_module_saved_whole_are_not_dropped_with_it(tmp_path):
    theirs = made_by_peft(tmp_path)
    edit(tmp_path, modules_to_save=["model"])  # is in every name
    load_peft(ours := attached(), tmp_path, 1, head="ignore")
    torch.testing.assert_close(outputs(ours), theirs(X))


def test_a_layer_of_the_model_s_own_called_module_keeps_its_name(tmp_path):
    model = kloss.attach(nn.ModuleDict({"module": net()}), 1, 2, "0")
    assert model["module"][0].name == "module.0"
    model["module"][0].lora_b.data.normal_()
    save_peft(model, tmp_path, 0)
    assert "base_model.model.module.0.lora_A.weight" in read_tensors(tmp_path / "adapter_model.safetensors")
    again = kloss.attach(nn.ModuleDict({"module": net()}), 1, 2, "0")
    load_peft(again, tmp_path, 0)
    assert torch.equal(again["module"][0].lora_b, model["module"][0].lora_b)


@pytest.mark.parametrize("alpha", [2, 2.0, 10, 20, 0, -3, 16.5, 0.1, 1 << 100])
def test_alpha_is_saved_as_it_was_given(alpha, tmp_path):
    save_peft(kloss.attach(net(), 2, [7, 3], "0", alpha=alpha), tmp_path, 1)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())["lora_alpha"]
    assert saved == alpha and type(saved) is (float if alpha in (16.5, 0.1) else int)
    load_peft(other := attached(), tmp_path, 0)
    save_peft(other, tmp_path / "again", 0)
    assert json.loads((tmp_path / "again/adapter_config.json").read_text())["lora_alpha"] == alpha


def test_target_modules_are_names_unless_these_say_more(tmp_path):
    def named(model):
        save_peft(model, tmp_path, 0)
        return json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]

    assert named(kloss.attach(net(), 1, 2)) == ["0", "2"]
    tree = {"a": nn.ModuleDict({"x": nn.Linear(4, 4)}), "b": nn.ModuleDict({"x": nn.Linear(4, 4), "y": nn.Linear(4, 4)})}
    assert named(kloss.attach(nn.ModuleDict(tree), 1, 2, ("a.x", "y"))) == ["a.x", "y"]

    class Headed(nn.ModuleDict):
        def get_output_embeddings(self):
            return self["b"]["x"]

    tree = {"a": nn.ModuleDict({"x": nn.Linear(4, 4)}), "b": nn.ModuleDict({"x": nn.Linear(4, 4)})}
    assert named(kloss.attach(Headed(tree), 1, 2)) == r"a\.x"  # the name x would take the head as well
