"""Seeds of initialisation, data and dropout by themselves; one seed means all three, to the bit."""

from dataclasses import replace

import pytest
import torch
from test_train import BASE, cohort_of, weights
from torch import nn
from toy import ToyCorpus

import kloss
from kloss.cl.stream import Stream
from kloss.cl.study import plan
from kloss.config import Config
from kloss.errors import UserError

LEARNER = replace(BASE, lora_dropout=0.3, dropout=0.1)
X = torch.randn(4, 3, 16, generator=torch.Generator().manual_seed(0))


def attached(**options):
    torch.manual_seed(0)
    model = kloss.attach(nn.Sequential(nn.Linear(16, 16)), 2, 4, dropout=0.5, **options).train()
    with torch.no_grad():
        model[0].lora_b.fill_(0.1)
    return model


def outputs(model):
    with kloss.use_adapters(model, [0, 1, 1, 0], step=3):
        return model(X)


def test_attach_with_one_seed_is_attach_with_it_twice():
    alone, twice = attached(seed=7), attached(seed=7, dropout_seed=7)
    assert torch.equal(alone[0].lora_a, twice[0].lora_a) and torch.equal(outputs(alone), outputs(twice))


def test_another_dropout_seed_draws_the_same_adapters():
    one, other = attached(seed=7), attached(seed=7, dropout_seed=8)
    assert torch.equal(one[0].lora_a, other[0].lora_a) and not torch.equal(outputs(one), outputs(other))
    assert torch.equal(outputs(one.eval()), outputs(other.eval()))
    for model in (one, other):
        kloss.adapters.add(model, "new", dropout=0.5)
    assert torch.equal(one[0].lora_a[2], other[0].lora_a[2])
    before = other[0].lora_a.clone()
    kloss.adapters.reset(other, 1)
    assert torch.equal(other[0].lora_a, before)


def test_another_seed_keeps_the_dropout():
    one, other = attached(seed=7, dropout_seed=9), attached(seed=8, dropout_seed=9)
    assert not torch.equal(one[0].lora_a, other[0].lora_a)
    with torch.no_grad():
        other[0].lora_a.copy_(one[0].lora_a)
    assert torch.equal(outputs(one), outputs(other))


def test_a_state_dict_carries_both():
    one, other = attached(seed=7, dropout_seed=9), attached()
    other.load_state_dict(one.state_dict())
    assert torch.equal(outputs(one), outputs(other))
    for model in (one, other):
        kloss.adapters.add(model, "new", dropout=0.5)
        kloss.adapters.fork(model, 1, "copy")
    assert torch.equal(outputs(one), outputs(other)) and torch.equal(one[0].lora_a, other[0].lora_a)
    shared = [model[0].shared for model in (one, other)]
    assert shared[0].dropout_seeds == shared[1].dropout_seeds and len({*shared[0].dropout_seeds}) == 4


@pytest.mark.parametrize("seed", [1.0, "1", 1 << 63])
def test_dropout_seeds_that_are_none(seed):
    with pytest.raises(UserError, match="dropout_seed must be a whole number in"):
        attached(dropout_seed=seed)


def trained(corpus, **changes):
    cohort = cohort_of([replace(LEARNER, **changes)], corpus)
    first = weights(cohort, 0)
    cohort.train()
    return first, weights(cohort, 0)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_each_seed_of_a_learner_moves_its_own():
    corpus = ToyCorpus()
    first, after = trained(corpus)
    explicit = trained(corpus, init_seed=LEARNER.seed, dropout_seed=LEARNER.seed)
    assert same(first, explicit[0]) and same(after, explicit[1])
    for name, drawn_alike in (("dropout_seed", True), ("init_seed", False)):
        other = trained(corpus, **{name: 5})
        assert same(first, other[0]) is drawn_alike and not same(after, other[1])
    data = trained(corpus, seed=5, init_seed=LEARNER.seed, dropout_seed=LEARNER.seed)
    assert same(first, data[0]) and not same(after, data[1])
    nothing_dropped = {"lora_dropout": 0.0, "dropout": 0.0}
    assert same(trained(corpus, **nothing_dropped)[1], trained(corpus, dropout_seed=5, **nothing_dropped)[1])
    batches = [Stream.of(corpus, replace(LEARNER, **changes)) for changes in ({}, {"init_seed": 5, "dropout_seed": 6})]
    one, other = (stream.next() for stream in batches)
    assert one.indices.tolist() == other.indices.tolist()


def test_a_study_s_repetitions_share_what_is_given():
    plain, given = (plan(Config(strategies=("shared",), seeds=3, **own), ("de-DE", "fr-FR")) for own in ({}, {"init_seed": 9}))
    assert [learner.seeds for learner in plain.learners] == [(0, 0), (1, 1), (2, 2)]
    assert [learner.seeds for learner in given.learners] == [(9, 0), (9, 1), (9, 2)]
    assert [learner.seed for learner in given.learners] == [0, 1, 2]


def test_seeds_are_of_a_run_s_identity_once_they_are_given():
    assert not {"init_seed", "dropout_seed"} & Config().identity().keys()
    assert Config(init_seed=0).identity()["init_seed"] == 0 and Config(dropout_seed=4).identity()["dropout_seed"] == 4
    with pytest.raises(UserError, match="--dropout-seed must lie between 0 and"):
        Config(dropout_seed=-1).checked()
