"""torch.set_default_dtype changes nothing: every float tensor of kloss is made with a dtype."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import ToyCorpus, toy_model

import kloss
from kloss.cl.backbone import _masked_language_modelling
from kloss.cl.learner import Learner
from kloss.cl.train import Cohort
from kloss.kernels import lora_linear
from kloss.models import AdapterBank, XLMRForTokenClassification
from kloss.pace import timed_here
from kloss.presets import demo

FP32 = torch.float32
LEARNER = Learner(
    experiences=(("aa",), ("bb",)), rank=4, alpha=8.0, lr=1e-2, dropout=0.1, lora_dropout=0.1, epochs=1, batch_size=8, seed=1
)


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Made(TorchDispatchMode):
    """Collects the dtypes of all tensors that operators return."""

    def __init__(self):
        super().__init__()
        self.dtypes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.dtypes |= {leaf.dtype for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)}
        return out


def normal(*shape):
    return torch.randn(shape, dtype=FP32, generator=torch.Generator().manual_seed(0))


def model_path(folder):
    """Made, with another head, written, read."""
    model = toy_model()
    model.draw_head_(3)
    model.save_pretrained(folder)
    with pytest.warns(UserWarning, match="a new head is drawn"):
        other = XLMRForTokenClassification.from_pretrained(folder, num_labels=3)
    read = XLMRForTokenClassification.from_pretrained(folder)
    return [*model.state_dict().values(), *other.state_dict().values(), *read.state_dict().values()]


def training_path(folder):
    """Adapters and a whole model trained and scored: pack, dropout, forward, loss, backward, AdamW."""
    made = []
    for learners in ([LEARNER, replace(LEARNER, rank=2, seed=2)], [replace(LEARNER, rank=None, lora_dropout=0.0)]):
        corpus = ToyCorpus(sentences=6)
        cohort = Cohort(toy_model(), corpus, learners, [{0: corpus.locales, 2: corpus.locales} for _ in learners])
        cohort.train()
        made += [*cohort.bank.state().values(), cohort.scores]
    return made


def bank_path(folder):
    """An adapter in peft's files, there and back."""
    bank = AdapterBank(toy_model(), 2, [2, 4], alpha=[1.0, 3.0], dtype=torch.float16)
    bank.save_peft(folder, 1)
    bank.load_peft(folder, 0)
    return [bank.param, bank.work, bank.scaling, bank.grad, bank.moments]


def attach_path(folder):
    model = torch.nn.Sequential(torch.nn.Linear(32, 64, dtype=FP32), torch.nn.GELU(), torch.nn.Linear(64, 20, dtype=FP32))
    for parameter in model.parameters():
        parameter.data = normal(*parameter.shape)
    kloss.attach(model, 3, rank=[1, 2, 4], dropout=0.2, targets=("0", "2"))
    for module in (model[0], model[2]):
        module.lora_b.data = normal(*module.lora_b.shape)
    x = normal(4, 5, 32).requires_grad_()
    with kloss.use_adapters(model, [2, 0, -1, 1]):
        y = model(x)
        y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def linear_path(folder):
    """The same linear on csrc's widths and others, in both base products."""
    made = []
    for width in (32, 20):
        for exact in (False, True):
            x, a, b = (normal(*shape).requires_grad_() for shape in ((7, width), (4, width), (width, 4)))
            y = lora_linear(x, normal(width, width), normal(width), a, b, 0.3, exact=exact)
            y.sum().backward()
            made += [y.detach(), x.grad, a.grad, b.grad]
    return made


def warm_up_path(folder):
    model, text, special = toy_model(), ToyCorpus().sentences("aa", "train"), torch.tensor([0, 2])
    config = replace(demo(), pretrain_steps=3, pretrain_batch=4)
    _masked_language_modelling(model, text, special, 4, config, lambda *message: None)
    return list(model.state_dict().values())


def estimate_path(folder):
    """Its seconds are measured, so only the dtypes count."""
    assert timed_here(toy_model().config).token > 0
    return []


PATHS = [model_path, training_path, bank_path, attach_path, linear_path, warm_up_path, estimate_path]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.__name__)
def test_the_default_dtype_changes_no_bit(path, tmp_path):
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        (tmp_path / str(dtype)).mkdir()
        with default_dtype(dtype), Made() as made:
            results[dtype] = path(tmp_path / str(dtype))
        assert torch.bfloat16 not in made.dtypes
    wanted = results.pop(torch.float32)
    for dtype, got in results.items():
        for i, (one, other) in enumerate(zip(wanted, got, strict=True)):
            if isinstance(one, torch.Tensor):
                assert one.dtype == other.dtype and torch.equal(one, other), (dtype, i)
            else:
                assert one == other, (dtype, i)
