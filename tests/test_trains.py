"""Parts of adapters that do not train stay as they are, to the bit, and nothing else changes."""

import json
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import pytest
import torch
from test_run import SMALL, one_line_error
from test_train import BASE, SIX, cohort_of, weights
from toy import ToyCorpus, toy_model

from kloss.cl.learner import Learner
from kloss.cl.packing import Part, pack
from kloss.cl.rules import RULES
from kloss.cl.step import StepSettings, train_step
from kloss.errors import UserError
from kloss.models import AdapterBank
from kloss.run import main

CORPUS = ToyCorpus()
DECAYED = replace(BASE, weight_decay=0.3, dropout=0.1, lora_dropout=0.2)
PATTERNS = [("*.b", "head.*"), ("*.a", "*.b"), ("head.*",), ("1.*",), ("*.qkv.*", "head.bias")]
CPU = torch.device("cpu")


def moved(cohort, g=0):
    """The slots of which some weight is not as drawn."""
    learner = cohort.learners[g]
    drawn = AdapterBank(cohort.model, 1, learner.rank, seeds=[learner.seed])
    before = {name: drawn.view(drawn.param, name)[0] for name in drawn.slots}
    now = {name: value.reshape(before[name].shape) for name, value in weights(cohort, g).items()}
    return {name for name in now if not torch.equal(now[name].view(torch.int32), before[name].view(torch.int32))}


@pytest.mark.parametrize("trains", PATTERNS)
def test_what_does_not_train_stays_to_the_bit(trains):
    cohort = cohort_of([replace(DECAYED, trains=trains), replace(DECAYED, seed=2)], CORPUS)
    cohort.train()
    names = set(cohort.bank.slots)
    assert moved(cohort) == {name for name in names if any(fnmatchcase(name, pattern) for pattern in trains)}
    assert moved(cohort, 1) == names
    plain = cohort_of([replace(DECAYED, seed=2)], CORPUS)
    plain.train()
    assert int(cohort.steps[0]) == int(plain.steps[0]) == 12


@pytest.mark.parametrize("name", RULES)
def test_no_rule_moves_it(name):
    cohort = cohort_of([replace(DECAYED, trains=("1.*", "head.*"), rule=RULES[name](0.9))], CORPUS)
    cohort.train()
    assert moved(cohort) == {name for name in cohort.bank.slots if not name.startswith("0.")}
    assert not cohort.bank.exp_avg[0][cohort.bank.columns(["0.*"])].any()


def test_a_frozen_head_is_a_head_of_rate_0_where_nothing_is_clipped():
    frozen, slow = (replace(DECAYED, max_norm=float("inf"), **how) for how in ({"trains": ("*.a", "*.b")}, {"head_lr": 0.0}))
    one, other = cohort_of([frozen], CORPUS), cohort_of([slow], CORPUS)
    one.train()
    other.train()
    assert torch.equal(one.bank.param.view(torch.int32), other.bank.param.view(torch.int32))


def test_norms_are_of_what_trains():
    model, learners = toy_model().freeze_backbone(), [BASE, replace(BASE, trains=("*.b",)), replace(BASE, trains=("*.b",))]
    bank = AdapterBank(model, 3, 4)
    sentences = CORPUS.sentences("aa", "train")
    batch = pack([Part(sentences, np.arange(4) + g, g) for g in range(3)], 3)
    plain = StepSettings.of(learners, CPU, bank=bank)._replace(frozen=())
    other = bank.select([0, 1, 2])
    train_step(model, other, plain, [batch])
    norms = train_step(model, bank, StepSettings.of(learners, CPU, bank=bank), [batch])[1]
    mask = bank.columns(["*.b"])
    assert float(norms[0]) == pytest.approx(float(other.grad[0].norm()), rel=1e-5)
    for g in (1, 2):
        assert float(norms[g]) == pytest.approx(float(other.grad[g][mask].norm()), rel=1e-5)
        assert norms[g] < 0.9 * other.grad[g].norm()
        assert not bank.grad[g][~mask].any() and not bank.exp_avg[g][~mask].any()


def test_neighbours_keep_every_bit_in_any_passes():
    learners = [replace(one, rank=4) for one in (SIX[0], SIX[1], SIX[4], SIX[5])]
    b_alone = ("*.b", "head.*")
    some = [replace(one, trains=b_alone) if g in (1, 2) else one for g, one in enumerate(learners)]
    plain, mixed = (cohort_of(each, CORPUS, exact=True) for each in (learners, some))
    cut = cohort_of(some, CORPUS, exact=True, pass_tokens=40)
    for cohort in (plain, mixed, cut):
        cohort.train()
    for g in (0, 3):
        assert torch.equal(plain.bank.param[g], mixed.bank.param[g])
    assert torch.equal(mixed.bank.param, cut.bank.param) and not torch.equal(plain.bank.param[1], mixed.bank.param[1])
    for g in (1, 2):
        alone = cohort_of([some[g]], CORPUS, exact=True)
        alone.train()
        assert torch.equal(alone.bank.param[0], mixed.bank.param[g])


def test_the_working_copy_stays_too():
    model = toy_model().to(torch.bfloat16).freeze_backbone()
    bank = AdapterBank(model, 1, 4, dtype=torch.bfloat16)
    mask, before = ~bank.columns(["*.b", "head.*"]), bank.work.clone()
    batch = pack([Part(CORPUS.sentences("aa", "train"), np.arange(4), 0)], 1)
    settings = StepSettings.of([replace(DECAYED, lr=0.1, warmup=0, trains=("*.b", "head.*"))], CPU, bank=bank)
    train_step(model, bank, settings, [batch])
    assert torch.equal(bank.work, bank.param.to(torch.bfloat16))
    assert torch.equal(bank.work[0][mask], before[0][mask]) and not torch.equal(bank.work, before)


def test_patterns():
    bank = AdapterBank(toy_model(), 1, 4)
    assert bank.matching(["head.*", "0.qkv.?"]) == ["0.qkv.a", "0.qkv.b", "head.weight", "head.bias"]
    assert int(bank.columns(["head.bias"]).sum()) == bank.trainable(0, ["head.bias"]) == 5
    assert bank.trainable(0, ["*.a"]) + bank.trainable(0, ["*.b"]) + bank.trainable(0, ["head.*"]) == bank.trainable(0)
    with pytest.raises(UserError, match=r"'2\.\*' matches no part of an adapter; they are 0.qkv.a to 1.down.b, and head.weight"):
        bank.columns(["*.b", "2.*"])
    with pytest.raises(ValueError, match="those of an adapter"):
        Learner((("aa",),), None, 1.0, 1e-3, 0, 1, 4, trains=("head.*",))


def test_from_the_command_line(tmp_path, capsys):
    arguments = [*SMALL, "--cache", str(tmp_path / "cache"), "--strategies", "non-shared", "vanilla", "--epochs", "1"]
    assert main([*arguments, "--out", str(tmp_path / "all")]) == 0
    assert main([*arguments, "--out", str(tmp_path / "b"), "--trains", "*.b", "head.*"]) == 0
    whole, some = (json.loads((tmp_path / name / "scores.json").read_text())["runs"] for name in ("all", "b"))
    width, inner = 32, 128
    a = 2 * (3 * width + width + width + inner)  # rank 2: q, k and v, out, up, down
    assert whole[0]["trainable_parameters"] - some[0]["trainable_parameters"] == 3 * a
    assert whole[1] == some[1], "whole models train as before"
    for more in ([], ["--dry-run"]):
        line = one_line_error([*arguments, "--out", str(tmp_path / "c"), "--trains", "*.b", "B", *more], capsys)
        assert "--trains: 'B' matches no part of an adapter; they are 0.qkv.a to 0.down.b, and head.weight, head.bias" in line
        assert not (tmp_path / "c").exists(), "it began the run"
    assert "--trains needs at least one" in one_line_error([*arguments, "--out", str(tmp_path / "d"), "--trains"], capsys)
