"""Learners that advance together are the learners trained alone; resumed training is the training that never stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from toy import ToyCorpus, toy_model

from kloss.cl import step as training_step
from kloss.cl import train
from kloss.cl.learner import Experience, Learner
from kloss.cl.train import Cohort
from kloss.errors import UserError
from kloss.kernels import row_keys
from kloss.models import rows

BASE = Learner(experiences=(("aa",), ("bb",)), rank=4, alpha=4.0, lr=1e-2, seed=1, epochs=2, batch_size=4, warmup=3)
SIX = (
    replace(BASE, rank=8, alpha=16.0, lora_dropout=0.3, dropout=0.1),
    replace(BASE, lr=3e-3, seed=2, batch_size=5, max_norm=0.1),
    replace(BASE, experiences=(("cc",),), rank=2, alpha=2.0, epochs=1),  # ends early
    replace(BASE, lr=1e38, seed=3),  # its weights are huge after one step, its loss is NaN in the second
    replace(BASE, experiences=(("aa", "bb", "cc"),), rank=1, alpha=1.0, dropout=0.2, weight_decay=0.1),
    replace(BASE, experiences=(("bb",), ("cc",), ("aa",)), lora_dropout=0.5, batch_size=3),
)


def cohort_of(learners, corpus, sizes=None, device="cpu", **options):
    wanted = [{i: corpus.locales for i in range(len(learner.experiences) + 1)} for learner in learners]
    return Cohort(toy_model(**(sizes or {})).to(device), corpus, learners, wanted, **options)


def weights(cohort, g):
    """Tensors of a learner at its own rank, whatever the bank's."""
    bank, rank = cohort.bank, int(cohort.bank.ranks[g])
    found = {}
    for name in bank.slots:
        tensor = bank.view(bank.param, name)[g]
        if name.endswith(".a"):
            tensor = tensor.view(-1, bank.rank, tensor.shape[-1])[:, :rank]
        elif name.endswith(".b"):
            tensor = tensor[:, :rank]
        found[name] = tensor.clone()
    return found


@pytest.mark.parametrize("pass_tokens", [8192, 40])
def test_together_equals_alone(pass_tokens):
    corpus = ToyCorpus()
    together = cohort_of(SIX, corpus, pass_tokens=pass_tokens)
    together.train()
    for g, learner in enumerate(SIX):
        alone = cohort_of([learner], corpus)
        alone.train()
        assert int(together.steps[g]) == int(alone.steps[0])
        if g == 3:
            assert "diverged at step 2" in together.failed[g] and together.failed[g] == alone.failed[0]
            continue
        assert together.scores[g] == alone.scores[0]
        for (name, one), other in zip(weights(together, g).items(), weights(alone, 0).values(), strict=True):
            error = (one - other).norm() / other.norm().clamp(min=1e-30)
            assert error < 2e-5, f"learner {g}, {name}: {error:.1e}"  # some dozens of AdamW steps on fp32 rounding
    assert set(together.failed) == {3}


@pytest.fixture
def threads(request):
    """torch on so many threads, whatever the tests' process was given."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(("hidden", "inner"), [(72, 200), (96, 192)], ids=["reference", "csrc"])
def test_exact_is_together_alone_and_reordered_to_the_bit(hidden, inner, threads):
    corpus = ToyCorpus()
    learners = [replace(learner, rank=4) for learner in SIX]
    # The toy's own products are too small for BLAS to sum otherwise.
    sizes = {"hidden_size": hidden, "intermediate_size": inner}
    together, reordered = (cohort_of(some, corpus, sizes, exact=True) for some in (learners, learners[::-1]))
    together.train()
    reordered.train()
    for g, learner in enumerate(learners):
        if g == 3:
            continue
        alone = cohort_of([learner], corpus, sizes, exact=True)
        alone.train()
        assert torch.equal(together.bank.param[g], alone.bank.param[0]), f"learner {g} alone"
        assert torch.equal(together.bank.param[g], reordered.bank.param[len(learners) - 1 - g]), f"learner {g} reordered"


def test_training_goes_through_the_kernels_where_they_are(monkeypatch):
    """As on a GPU, in Triton's interpreter: the same training to rounding, and each learner alone to the bit."""
    from kloss.kernels import multi_lora

    corpus, sizes = ToyCorpus(("aa",), sentences=6), {"num_hidden_layers": 1}
    learners = [replace(SIX[0], experiences=(("aa",),), epochs=1), replace(SIX[1], experiences=(("aa",),), epochs=1, rank=8)]
    plain = cohort_of(learners, corpus, sizes)
    plain.train()
    calls = []

    def fastest(x, *_):
        calls.append(tuple(x.shape))
        return "triton"

    monkeypatch.setattr(multi_lora, "_fastest", fastest)
    together = cohort_of(learners, corpus, sizes, exact=True)
    together.train()
    assert len(calls) >= 4 * 2, "four linears in each of two rounds"
    assert (together.bank.param - plain.bank.param).norm() < 1e-5 * plain.bank.param.norm()
    for g, learner in enumerate(learners):
        alone = cohort_of([learner], corpus, sizes, exact=True)
        alone.train()
        assert torch.equal(together.bank.param[g], alone.bank.param[0]), f"learner {g}"


def test_dropout_is_keyed_by_seed_step_and_sequence_of_each_learner(monkeypatch):
    seen = []

    class Recorded(training_step.StepDropout):
        def __init__(self, *keys):
            seen.append(keys[:-1])
            super().__init__(*keys)

    monkeypatch.setattr(training_step, "StepDropout", Recorded)
    learners = [replace(SIX[0], experiences=(("aa",),)), replace(SIX[4], experiences=(("bb",),), seed=9)]
    cohort = cohort_of(learners, ToyCorpus())
    cohort.train()
    assert len(seen) == int(cohort.steps.max()) == 6
    for step, (hidden, attention, lora, seed, keys, adapter) in enumerate(seen):
        torch.testing.assert_close(hidden, torch.tensor([0.1, 0.2]))
        assert torch.equal(attention, hidden) and lora.tolist() == [pytest.approx(0.3), 0] and seed.tolist() == [1, 9]
        for g, locale in enumerate(("aa", "bb")):
            sentences = cohort.corpus.sentences(locale, "train")
            stream = train.Stream.of(cohort.corpus, learners[g])
            for _ in range(step + 1):
                _, index, _ = stream.next()
            lengths = torch.from_numpy(np.diff(sentences.offsets)[index])
            ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
            wanted = row_keys(torch.full((len(index),), step), torch.arange(len(index)), ends)
            assert torch.equal(keys[adapter == g], wanted)


def test_optimiser_gets_each_learners_own_settings(monkeypatch):
    seen = []

    def recorded(*args, **keywords):
        seen.append((args[5].tolist(), {name: getattr(value, "tolist", lambda v=value: v)() for name, value in keywords.items()}))
        return adamw(*args, **keywords)

    adamw = rows.adapter_adamw_
    monkeypatch.setattr(rows, "adapter_adamw_", recorded)
    learners = [replace(BASE, weight_decay=0.25, max_norm=0.5), replace(BASE, alpha=6.0, lr=0.5, warmup=0, max_norm=2.0)]
    cohort = cohort_of(learners, ToyCorpus())
    assert cohort.bank.scaling.tolist() == [1.0, 1.5]
    cohort.train()
    rates = torch.tensor([lr for lr, _ in seen])
    assert torch.allclose(rates[:4, 0], 1e-2 * torch.tensor([1 / 3, 2 / 3, 1, 1])) and rates[:, 1].unique().tolist() == [0.5]
    for _, given in seen:
        assert given["weight_decay"] == [0.25, pytest.approx(0.01)] and given["max_norm"] == [0.5, 2.0]
        assert given["betas"] == (0.9, 0.999) and given["eps"] == 1e-8 and given["active"] == [True, True]


def test_an_experience_that_ends_in_nan_is_not_scored():
    cohort = cohort_of([replace(SIX[3], experiences=(("aa",), ("bb",)), batch_size=6, epochs=1)], ToyCorpus())
    cohort.train()
    assert "diverged at step 2" in cohort.failed[0] and list(cohort.scores[0]) == [0]


def test_training_learns_and_moves_only_the_learner():
    corpus = ToyCorpus(("aa",), sentences=40)
    learner = replace(BASE, experiences=(("aa",),), rank=8, alpha=8.0, epochs=30, lr=2e-2)
    cohort = cohort_of([learner], corpus)
    cohort.to_score = [{0: ("aa",), 1: ("aa",)}]
    before = {name: p.clone() for name, p in cohort.model.state_dict().items()}
    cohort.train()
    hits = {i: cohort.scores[0][i]["aa"] for i in (0, 1)}
    assert hits[1][0] > 0.8 * hits[1][2] > 2 * hits[0][0]
    assert all(torch.equal(before[name], p) for name, p in cohort.model.state_dict().items())


def test_whole_model_learns():
    corpus = ToyCorpus(("aa",), sentences=40)
    learner = replace(BASE, experiences=(("aa",),), rank=None, alpha=1.0, epochs=30, lr=3e-3)
    cohort = Cohort(toy_model(), corpus, [learner], [{0: ("aa",), 1: ("aa",)}])
    cohort.train()
    assert cohort.scores[0][1]["aa"][0] > 0.8 * cohort.scores[0][1]["aa"][2]
    assert cohort.bank.trainable(0) == sum(p.numel() for p in cohort.model.parameters())


class Stop(Exception):
    pass


@pytest.mark.parametrize("rounds", [1, 3, 4, 7, 13])
def test_resumed_equals_never_stopped(rounds):
    corpus = ToyCorpus()
    learners = [SIX[0], SIX[2], SIX[3], SIX[5]]
    whole = cohort_of(learners, corpus)
    whole.train()
    stopped, left = cohort_of(learners, corpus), [rounds]

    def stop(cohort, loss):
        left[0] -= 1
        if not left[0]:
            raise Stop

    with pytest.raises(Stop):
        stopped.train(stop)
    tensors, state = stopped.state()
    resumed = cohort_of(learners, corpus)
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, state)
    resumed.train()
    assert resumed.scores == whole.scores and resumed.failed == whole.failed and resumed.tokens == whole.tokens
    for one, other in ((resumed.bank.param, whole.bank.param), (resumed.bank.exp_avg_sq, whole.bank.exp_avg_sq)):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))  # bits, since the diverged learner holds NaN


EVERY = (2, 0, 2, 3)  # the third diverges in its second step


@pytest.mark.parametrize("rounds", [1, 3, 7, 13])
def test_scores_within_experiences_are_those_of_a_learner_stopped_there(rounds):
    """They change no training, are of each learner's own steps, and survive a stop."""
    learners, corpus = [SIX[0], SIX[2], SIX[3], SIX[5]], ToyCorpus()
    plain, traced, stopped, resumed = (cohort_of(learners, corpus, score_every=each) for each in ((), EVERY, EVERY, EVERY))
    plain.train()
    params = {}

    def note(cohort, loss):
        for g, every in enumerate(EVERY):
            step = cohort.streams[g].step
            if every and step in cohort.curves[g] and (g, step) not in params:
                params[g, step] = cohort._team.bank.param[cohort._team.learners.index(g)].clone()

    traced.train(note)
    assert torch.equal(plain.bank.param.view(torch.int32), traced.bank.param.view(torch.int32)) and plain.scores == traced.scores
    assert [list(curve) for curve in traced.curves] == [[2, 4, 8, 10], [], [], [3, 6, 11, 14, 19, 22]]
    for (g, step), param in params.items():
        alone = cohort_of([learners[g]], corpus)
        alone.bank.load_row_(0, param, traced.bank.rank)
        alone._score(alone.bank, [0], [0])
        counts = alone.scores[0][0]
        assert traced.curves[g][step] == counts and len(counts) == 3
    assert "curves" not in plain.state()[1]
    left = [rounds]

    def stop(cohort, loss):
        left[0] -= 1
        if not left[0]:
            raise Stop

    with pytest.raises(Stop):
        stopped.train(stop)
    tensors, state = stopped.state()
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(state)))
    resumed.train()
    assert resumed.curves == traced.curves and resumed.scores == traced.scores
    if rounds >= 3:
        lost = state | {"curves": [{}, *state["curves"][1:]]}
        with pytest.raises(UserError, match="learner 0 has not the scores"):
            cohort_of(learners, corpus, score_every=EVERY).load_state(tensors, lost)


def test_an_experience_has_a_rate_of_its_own():
    """The rate multiplies those of head and all else, beside a learner without; 0: nothing moves."""
    corpus = ToyCorpus()
    half = replace(BASE, lr=5e-3, head_lr=2e-2, warmup=2)
    slow = replace(half, lr=1e-2, head_lr=4e-2, experiences=(Experience(("aa",), rate=0.5), Experience(("bb",), rate=0.5)))
    plain, rated = cohort_of([BASE, half], corpus), cohort_of([BASE, slow], corpus)
    plain.train()
    rated.train()
    assert torch.equal(plain.bank.param, rated.bank.param) and plain.scores == rated.scores
    frozen = replace(BASE, experiences=(Experience(("aa",)), Experience(("bb",), rate=0.0, epochs=1)))
    first, both = cohort_of([replace(BASE, experiences=(("aa",),))], corpus), cohort_of([frozen], corpus)
    first.train()
    both.train()
    assert torch.equal(first.bank.param, both.bank.param) and int(both.steps[0]) == 6 + 3


def test_only_what_is_wanted_is_scored():
    corpus = ToyCorpus()
    cohort = Cohort(toy_model(), corpus, [BASE], [{0: ["cc"], 2: ["aa", "bb"]}])
    cohort.train()
    assert {i: list(row) for i, row in cohort.scores[0].items()} == {0: ["cc"], 1: [], 2: ["aa", "bb"]}


def test_rates_rise_in_the_warm_up_and_stay():
    learners = [replace(BASE, lr=0.3, warmup=3), replace(BASE, lr=0.1, warmup=0)]
    settings = training_step.StepSettings.of(learners, torch.device("cpu"))
    rates = [settings.lr(torch.tensor([step, step]))[0].tolist() for step in (0, 1, 2, 3, 9)]
    first = [0.3 * min(1.0, (step + 1) / 3) for step in (0, 1, 2, 3, 9)]
    assert rates == torch.tensor([[rate, 0.1] for rate in first], dtype=torch.float32).tolist() and settings.head_lr is None
    settings = training_step.StepSettings.of([replace(learners[0], head_lr=3.0), learners[1]], torch.device("cpu"))
    lr, head_lr = settings.lr(torch.tensor([0, 0]))
    assert head_lr.tolist() == pytest.approx([1.0, 0.1]) and lr.tolist() == pytest.approx([0.1, 0.1])


def test_a_head_has_a_rate_of_its_own():
    """With a rate of 0 for all else only the heads move, and a head that has its adapter's own rate changes no bit."""
    corpus = ToyCorpus()

    def trained(**rates):
        cohort = Cohort(toy_model(), corpus, [replace(BASE, **rates)], [{}])
        before = cohort.bank.param.clone()
        cohort.train()
        return before, cohort.bank.param, cohort.bank.head_start

    before, after, start = trained(lr=0.0, head_lr=0.1)
    assert torch.equal(before[:, :start], after[:, :start]) and not torch.equal(before[:, start:], after[:, start:])
    assert torch.equal(trained(lr=0.1)[1], trained(lr=0.1, head_lr=0.1)[1])
    model = toy_model()
    names = [name for name, _ in model.named_parameters()]
    cohort = Cohort(model, corpus, [replace(BASE, rank=None, lr=0.0, head_lr=0.1)], [{}])
    whole, start = cohort.bank.param.clone(), cohort.bank.head_start
    head = model.classifier.weight.numel() + model.classifier.bias.numel()
    assert names[-2:] == ["classifier.weight", "classifier.bias"] and whole.shape[1] - start == head
    cohort.train()
    assert torch.equal(whole[:, :start], cohort.bank.param[:, :start])
    assert not torch.equal(whole[:, start:], cohort.bank.param[:, start:])
    before, after, start = trained(lr=0.1, head_lr=0.0)
    assert not torch.equal(before[:, :start], after[:, :start]) and torch.equal(before[:, start:], after[:, start:])


def test_counts_of_slot_types_are_of_the_scores():
    corpus = ToyCorpus()
    cohort, plain = (cohort_of([BASE], corpus, slot_counts=kept) for kept in (True, False))
    for each in (cohort, plain):
        each.train()
    assert cohort.scores == plain.scores and "slots" not in plain.state()[1] and not plain.slots[0][2]
    tensors, state = cohort.state()
    resumed = cohort_of([BASE], corpus, slot_counts=True)
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(state)))
    assert resumed.slots == cohort.slots and len(cohort.slots[0]) == 3
    (own,) = state["slots"]
    for damaged in (
        [{"0": own["0"]}],
        [own | {"2": {locale: own["2"][locale] for locale in ("aa", "bb")}}],
        [own | {"2": own["2"] | {"aa": own["2"]["aa"][:3]}}],
        [own | {"2": own["2"] | {"aa": [count + 1 for count in own["2"]["aa"]]}}],
        [own | {"2": own["2"] | {"aa": [own["2"]["aa"][i] + (-99, 0, 0, 99, 0, 0)[i] for i in range(6)]}}],
    ):
        with pytest.raises(UserError, match="counts of slot types that are not those of its scores"):
            resumed.load_state(tensors, state | {"slots": damaged})
    with pytest.raises(UserError, match="counts of slot types"):
        resumed.load_state(tensors, plain.state()[1])
    for damaged in ([], [own, own]):
        with pytest.raises(UserError, match="it is not of 1 learners"):
            resumed.load_state(tensors, state | {"slots": damaged})
