"""Models of many architectures: adapters trained in mixed batches are what peft makes of each alone. docs/models.md has them."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import assert_no_worse
from peft import LoraConfig, PeftModel, get_peft_model
from pretend import GPU, pretended_gpu
from test_attach import layers, randomised, time_first_models, with_ids
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from zoo import ZOO, Batch, labels_of, logits_of, padded_left

import kloss
from kloss.errors import UserError
from kloss.models.targets import READ_PAST

IDS = [1, 0, -1, 1, 0, 1]  # of a batch, whose length is another
RANKS, ALPHAS = [3, 2], [6.0, 2.0]
STEPS = 3
CHANCE = 16  # of some sixty runs; in some peft's fp32 is nearly exact
ADAMW = dict(lr=1e-2, weight_decay=0.01, eps=1e-3)  # eps: a gradient that is nothing but rounding must not become a whole step
pytestmark = pytest.mark.filterwarnings("ignore:all-linear leaves", "ignore:fan_in_fan_out is set to False")


def flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def factors(model: nn.Module, g: int) -> list[Tensor]:
    """A and B of adapter g, layer by layer, without the tails of its rank."""
    pairs = [(layer.lora_a[g, : RANKS[g]], layer.lora_b[g, :, : RANKS[g]]) for layer in layers(model).values()]
    return [factor for pair in pairs for factor in pair]


def batches(name: str, dtype: torch.dtype) -> list[tuple[Batch, Tensor | None]]:
    """A batch for each step, with labels."""
    torch.manual_seed(1)
    given = [ZOO[name].batch(len(IDS)) for _ in range(STEPS)]
    labels = [labels_of(ZOO[name].task, batch) for batch in given]
    given = [{key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()} for batch in given]
    return list(zip(given, labels, strict=True))


def rows_of(g: int | None, batch: Batch, labels: Tensor | None) -> tuple[Batch, Tensor | None]:
    """The rows of an adapter, or all."""
    rows = torch.tensor([g in (None, owner) for owner in IDS])
    return {key: value[rows] for key, value in batch.items()}, None if labels is None else labels[rows]


def base_of(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return ZOO[name].make().to(dtype).train()


def attached(name: str, dtype: torch.dtype) -> nn.Module:
    return randomised(kloss.attach(base_of(name, dtype), 2, RANKS, ZOO[name].targets, alpha=ALPHAS))


def trained(name: str, dtype: torch.dtype) -> list[tuple[list[float], Tensor]]:
    """Losses of each adapter and its weights at the end, both trained by kloss: in mixed batches, if the model takes these."""
    case, model, losses = ZOO[name], attached(name, dtype), []
    if dtype == torch.float32:
        optimizer = kloss.optim.AdapterAdamW(model, **ADAMW)
    else:  # each adapter has rows in each batch, so that one step of all is a step of each
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    for batch, labels in batches(name, dtype):
        loss = torch.zeros(2, dtype=dtype)
        for owner in range(2) if case.alone else [None]:
            part, wanted = rows_of(owner, batch, labels)
            ids = IDS if owner is None else [owner] * IDS.count(owner)
            with kloss.use_adapters(model, ids):
                logits = logits_of(case.task, model, part)
            parts = kloss.adapter_losses(logits, wanted, ids, shift=case.task == "next")
            loss = loss + F.pad(parts, (0, 2 - len(parts)))
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
        losses.append(loss.tolist())
    return [([loss[g] for loss in losses], flat(factors(model, g))) for g in range(2)]


def trained_by_peft(name: str, dtype: torch.dtype, g: int) -> tuple[list[float], Tensor]:
    """Adapter g from the same beginning, by peft, alone on its rows."""
    case, ours, losses = ZOO[name], attached(name, dtype), []
    names = [*layers(ours)]
    model = get_peft_model(base_of(name, dtype), LoraConfig(r=RANKS[g], lora_alpha=ALPHAS[g], target_modules=names)).train()
    assert model.targeted_module_names == names
    peers = [model.base_model.model.get_submodule(name) for name in names]
    weights = [factor["default"].weight for peer in peers for factor in (peer.lora_A, peer.lora_B)]
    for weight, start in zip(weights, factors(ours, g), strict=True):
        weight.data.copy_(start)
    optimizer = torch.optim.AdamW(weights, **ADAMW)
    for batch, labels in batches(name, dtype):
        part, wanted = rows_of(g, batch, labels)
        logits = logits_of(case.task, model, part)
        if case.task == "next":
            logits, wanted = logits[:, :-1], wanted[:, 1:]
        loss = logits.mean() if wanted is None else F.cross_entropy(logits.to(dtype).flatten(0, -2), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        for weight in weights:  # of an expert that no token reached; kloss's gradients are of all layers
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, flat(weights)


@pytest.mark.parametrize("name", ZOO)
def test_adapters_train_as_peft_trains_each_alone(name):
    """In fp64 to rounding, in fp32 as near to peft's fp64 as peft's fp32 is."""
    single, double = trained(name, torch.float32), trained(name, torch.float64)
    start = attached(name, torch.float64)
    bound = 1e-6 if ZOO[name].fp32 else 1e-9
    for g in range(2):
        losses, weights = trained_by_peft(name, torch.float64, g)
        way = (weights - flat(factors(start, g))).norm()
        assert way > 0.1 and (double[g][1] - weights).norm() < bound * way
        assert double[g][0] == pytest.approx(losses, rel=bound)
        plain_losses, plain = trained_by_peft(name, torch.float32, g)
        assert_no_worse(single[g][1], plain, weights, torch.zeros(len(weights)), floor=CHANCE)
        oracle = torch.tensor(losses, dtype=torch.float64)
        assert_no_worse(torch.tensor(single[g][0]), torch.tensor(plain_losses), oracle, torch.zeros(STEPS), floor=CHANCE)


WAYS = [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}]
WRITERS = [name for name, case in ZOO.items() if case.task in ("next", "decode") and not case.alone]


def writer(name: str) -> tuple[nn.Module, Batch]:
    """A model in fp64 with adapters that matter, and prompts of several lengths, padded at the left."""
    case, model = ZOO[name], attached(name, torch.float64).eval()
    for layer in layers(model).values():
        layer.lora_b.data *= 4
    torch.manual_seed(2)
    batch = padded_left(len(IDS)) if case.task == "next" else case.batch(len(IDS))
    batch.pop("decoder_input_ids", None)
    return model, {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def written(model: nn.Module, batch: Batch, ids: list[int], way: dict) -> Tensor:
    with kloss.use_adapters(model, ids):
        return model.generate(**batch, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=1, **way)[:, -5:]


def one_row(batch: Batch, row: int) -> Batch:
    """A row without its padding."""
    part = {key: value[row : row + 1] for key, value in batch.items()}
    if "attention_mask" not in part:
        return part
    return {key: value[:, part["attention_mask"][0] == 1] for key, value in part.items()}


@pytest.mark.parametrize("name", WRITERS)
def test_generate_writes_for_each_row_what_its_adapter_writes_alone(name):
    model, batch = writer(name)
    for way in WAYS[:2] if name == "Whisper" else WAYS:
        mixed = written(model, batch, IDS, way)
        assert torch.equal(mixed, torch.cat([written(model, one_row(batch, row), [g], way) for row, g in enumerate(IDS)])), way
        assert not torch.equal(mixed, written(model, batch, [-1] * len(IDS), way)), way


def test_whisper_repeats_rows_before_its_encoder_so_ids_are_repeated_by_hand():
    model, batch = writer("Whisper")
    with pytest.raises(ValueError, match=r"encoder.layers.0.self_attn.q_proj: the input has shape \[12, 12, 32\]"):
        written(model, batch, IDS, WAYS[2])
    mixed = written(model, batch, [g for g in IDS for _ in range(2)], WAYS[2])
    alone = [written(model, one_row(batch, row), [g, g], WAYS[2]) for row, g in enumerate(IDS)]
    assert torch.equal(mixed, torch.cat(alone))


# Linear layers of other classes.


class Named(nn.Linear):
    """A subclass that computes as nn.Linear does."""


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Buffered(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("scale", torch.ones(()))


def test_a_linear_of_another_class_is_adapted_or_named():
    torch.manual_seed(0)
    model = nn.ModuleDict({"named": Named(8, 8), "plain": nn.Linear(8, 8), "doubled": Doubled(8, 8), "buffered": Buffered(8, 8)})
    with pytest.warns(
        UserWarning, match="leaves these as they are: doubled is a Doubled, which .*; buffered is a Buffered"
    ) as record:
        kloss.attach(model, 2, 2)
    assert record[0].filename == __file__ and [*layers(model)] == ["named", "plain"]
    x = torch.randn(4, 8)
    randomised(model)
    layer = model["named"]
    update = x @ layer.lora_a[1].T @ layer.lora_b[1].T
    torch.testing.assert_close(with_ids(layer, [1] * 4, x), F.linear(x, layer.weight, layer.bias) + update)
    kloss.adapters.detach(model)
    assert [type(module) for module in model.values()] == [Named, nn.Linear, Doubled, Buffered]
    assert type(model["named"].weight) is nn.Parameter and not model["named"]._forward_hooks
    for targets, match in (
        ("doubled", "doubled is a Doubled, which computes in another way than nn.Linear; allowed: all-linear, .* named"),
    ):
        with pytest.raises(UserError, match=match):
            kloss.attach(model, 2, 2, targets)
    with pytest.raises(
        UserError, match="choose no nn.Linear of this model: 0 .and 1 more. is a Doubled, which computes in another"
    ):
        kloss.attach(nn.Sequential(Doubled(8, 8), Doubled(8, 8)), 2, 2)


@pytest.mark.parametrize("name", ["GPT-2", "Falcon"])
def test_layers_of_transformers_come_back_as_they_were(name):
    base, model = base_of(name, torch.float32), attached(name, torch.float32)
    (batch, _), *_ = batches(name, torch.float32)
    given = dict(base.named_modules())
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in base.state_dict().items())
    wanted = logits_of("next", base, batch)
    torch.testing.assert_close(logits_of("next", model, batch), wanted)
    with kloss.use_adapters(model, [1] * len(IDS)):
        adapted = logits_of("next", model, batch)
    assert (adapted - wanted).abs().max() > 0.1
    merged = kloss.adapters.detach(copy.deepcopy(model), 1)
    torch.testing.assert_close(logits_of("next", merged, batch), adapted)
    plain = kloss.adapters.detach(model)
    assert torch.equal(logits_of("next", plain, batch), wanted)
    for model in (merged, plain):
        assert all(type(module) is type(given[name]) for name, module in model.named_modules())
        assert model.state_dict().keys() == base.state_dict().keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
def test_a_pretended_gpu_computes_a_conv1d(monkeypatch):
    def run(device):
        torch.manual_seed(0)
        model = randomised(kloss.attach(nn.Sequential(Conv1D(32, 16)), 2, RANKS, alpha=ALPHAS)).to(device)
        x = torch.randn(3, 4, 16).to(device).requires_grad_()
        with kloss.use_adapters(model, [1, -1, 0]):
            model(x).square().sum().backward()
        return [tensor.grad.cpu() for tensor in (x, model[0].lora_a, model[0].lora_b)]

    wanted = run("cpu")
    with pretended_gpu(monkeypatch) as gpu:
        got = run(GPU)
    assert "kloss.multi_lora" in gpu.calls
    torch.testing.assert_close(got, wanted)


def test_gpt2s_adapters_are_peft_s_own(tmp_path):
    theirs = get_peft_model(
        base_of("GPT-2", torch.float32), LoraConfig(r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False)
    )
    theirs.save_pretrained(tmp_path / "theirs")
    (batch, _), *_ = batches("GPT-2", torch.float32)
    ours = kloss.attach(base_of("GPT-2", torch.float32), 2, 4, ("c_attn", "c_fc"))
    kloss.models.attach.load_peft(ours, tmp_path / "theirs", 1)
    with kloss.use_adapters(ours, [1] * len(IDS)):
        wanted = logits_of("next", ours, batch)
    torch.testing.assert_close(wanted, logits_of("next", theirs, batch))
    kloss.models.attach.save_peft(ours, tmp_path / "ours", 1)
    again = PeftModel.from_pretrained(base_of("GPT-2", torch.float32), tmp_path / "ours")
    torch.testing.assert_close(logits_of("next", again, batch), wanted)


def test_torchs_encoder_calls_its_layers_in_evaluation_too():
    """Without gradients it would take the weights of its linears, which hold no adapter."""
    model, base = attached("nn.TransformerEncoder", torch.float32), base_of("nn.TransformerEncoder", torch.float32).eval()
    (batch, _), *_ = batches("nn.TransformerEncoder", torch.float32)
    with kloss.use_adapters(model, IDS):
        wanted = model(**batch)
    for each in (model.eval(), copy.deepcopy(model)):
        got = with_ids(each, IDS, batch["src"])
        torch.testing.assert_close(got, wanted)
        assert (got - base(**batch)).abs().amax((1, 2))[[0, 1, 3, 4, 5]].min() > 0.05
    with torch.no_grad():
        torch.testing.assert_close(model(**batch), base(**batch))


def test_linears_whose_weights_others_take_stay_as_they_are():
    inherited = nn.ModuleDict({"attention": type("OwnAttention", (nn.MultiheadAttention,), {})(8, 2), "linear": nn.Linear(8, 8)})
    assert [*layers(kloss.attach(inherited, 2, 2))] == ["linear"]
    assert {name.rpartition(".")[2] for name in layers(kloss.attach(base_of("Mamba", torch.float32), 2, 2))} == {"in_proj"}


def test_the_list_of_those_who_take_weights_is_transformers_own():
    """Each of them is there, and reads these weights."""
    sources = "\n".join(path.read_text() for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"))
    classes = dict(re.findall(r"^class (\w+)\(.*?\):\n(.*?)(?=^\S)", sources, re.DOTALL | re.MULTILINE))
    for kind, names in READ_PAST.items():
        for name in names:
            assert kind == "MultiheadAttention" or re.search(rf"self\.{name}\.weight", classes[kind]), (kind, name)


# What cannot work is refused, in the words of the page.


def targets_of(name: str, *targets: str):
    return lambda: kloss.attach(base_of(name, torch.float32), 2, 2, *targets)


def mixed_batch_of(name: str):
    def run():
        (batch, _), *_ = batches(name, torch.float32)
        model = attached(name, torch.float32)
        with kloss.use_adapters(model, IDS):
            logits_of(ZOO[name].task, model, batch)

    return run


def encoder_of_torch(length: int, nested: bool = False):
    def run():
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=nested)
        model = kloss.attach(nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested), 2, 2).eval()
        padding = torch.arange(length) >= torch.tensor([[length], [1]]) if nested else None
        with torch.no_grad(), kloss.use_adapters(model, [0, 1]):
            model(torch.randn(2, length, 8) if nested else torch.randn(length, 2, 8), src_key_padding_mask=padding)

    return run


def xlnet():
    model, ids = time_first_models()["XLNet"]
    with_ids(kloss.attach(model, 4, 2), [0, 1, 2, 3], ids)


REFUSED = {
    "experts in one tensor, by their name": targets_of("Mixtral", "experts"),
    "or by the tensor's": targets_of("Mixtral", "gate_up_proj"),
    "or among all linear layers": targets_of("Mixtral"),
    "Mamba's linears within its kernels": targets_of("Mamba", "dt_proj"),
    "or among all linear layers of Mamba": targets_of("Mamba"),
    "torch's attention": targets_of("nn.TransformerEncoder", "out_proj"),
    "or among all linear layers of torch's encoder": targets_of("nn.TransformerEncoder"),
    "an nn.Linear with a forward of its own, as quantised ones": lambda: kloss.attach(nn.Sequential(Doubled(8, 8)), 2, 2, "0"),
    "another layer": targets_of("Llama", "embed_tokens"),
    "a mixed batch: relative positions of DeBERTa-v2": mixed_batch_of("DeBERTa-v2, its relative positions too"),
    "a mixed batch: the shared expert of Qwen2-MoE": mixed_batch_of("Qwen2-MoE, its shared expert too"),
    "a mixed batch: linear experts": mixed_batch_of("Switch Transformers, its linear experts too"),
    "a mixed batch: time before batch": encoder_of_torch(5),
    "the same, as long as the batch": encoder_of_torch(2),
    "the same, in a model known for it": xlnet,
    "nested tensors of torch's encoder": encoder_of_torch(5, nested=True),
}
PAGE = (Path(__file__).resolve().parents[1] / "docs/models.md").read_text(encoding="utf-8")


def table(title: str) -> list[list[str]]:
    """The rows of the page's table below a title."""
    lines = PAGE.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_in_the_words_of_the_page(what):
    (words,) = [cells[1].strip("`") for cells in table("Refused") if cells[0] == what]
    said = None
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            REFUSED[what]()
        except ValueError as error:  # UserError is one
            said = str(error)
    if said is None:
        (said,) = [str(warning.message) for warning in warned if "all-linear" in str(warning.message)]
    assert said == words or words.endswith(" …") and said.startswith(words.removesuffix(" …")), said


def test_the_page_shows_what_is_tried_and_no_more():
    assert [cells[0] for cells in table("Refused")] == [*REFUSED]
    tried = table("Tried")
    assert [cells[0] for cells in tried] == [*ZOO]
    for name, adapted, training, generate in tried:
        case = ZOO[name]
        assert adapted == ("all linear" if case.targets == "all-linear" else ", ".join(case.targets)), name
        assert training == ("one adapter a batch" if case.alone else "mixed"), name
        assert generate == ("same" if name in WRITERS else ""), name
