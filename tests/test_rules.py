"""Rules between gradient and update: each does what its paper says, to its own learner, and survives a stop bit for bit."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend import GPU, pretended_gpu
from test_graphs import LAYERS, learner
from test_train import BASE, SIX, Stop, cohort_of, weights
from toy import ToyCorpus, toy_model

from kloss.cl import step, train
from kloss.cl.learner import Experience, Learner
from kloss.cl.packing import Part, pack
from kloss.cl.rules import AGEM, EWC, L2, RULES, OLoRA, Rule, total
from kloss.cl.step import StepSettings, squared_gradients
from kloss.cl.stream import Stream, StreamBatch
from kloss.errors import UserError
from kloss.models import AdapterBank

CORPUS = ToyCorpus()
THREE = replace(BASE, experiences=(("aa",), ("bb",), ("cc",)), rank=6, lora_dropout=0.2, dropout=0.1)
NUMBERS = {"l2": 3.0, "ewc": 3.0, "a-gem": 0.5, "olora": 2.0}
RULED = [replace(THREE, rule=RULES[name](number)) for name, number in NUMBERS.items()]


def bits(tensor):
    return tensor.view(torch.int32)


def test_every_rule_is_tried():
    assert NUMBERS.keys() == RULES.keys()


@pytest.mark.parametrize("pass_tokens", [8192, 40])
def test_learners_beside_rules_are_untouched_and_ruled_ones_are_as_alone(pass_tokens):
    others = [replace(one, rank=6) for one in (SIX[0], SIX[2], SIX[5])]
    plain, ruled = (cohort_of(some, CORPUS, exact=True, pass_tokens=pass_tokens) for some in (others, [*RULED, *others]))
    plain.train()
    ruled.train()
    assert (
        torch.equal(bits(plain.bank.param), bits(ruled.bank.param[len(RULED) :])) and plain.scores == ruled.scores[len(RULED) :]
    )
    unruled = cohort_of([THREE], CORPUS, exact=True)
    unruled.train()
    for g, one in enumerate(RULED):
        alone = cohort_of([one], CORPUS, exact=True)
        alone.train()
        assert torch.equal(bits(alone.bank.param[0]), bits(ruled.bank.param[g])) and alone.scores[0] == ruled.scores[g]
        assert not torch.equal(alone.bank.param, unruled.bank.param)


def test_a_larger_rank_beside_it_changes_no_rule():
    """A row then has a tail of zeros."""
    together = cohort_of([*(replace(one, rank=3) for one in RULED), replace(THREE, rank=8)], CORPUS)
    together.train()
    for g, one in enumerate(RULED):
        alone = cohort_of([replace(one, rank=3)], CORPUS)
        alone.train()
        for (name, got), wanted in zip(weights(together, g).items(), weights(alone, 0).values(), strict=True):
            assert (got - wanted).norm() <= 2e-5 * wanted.norm(), f"{one.rule}, {name}"


@pytest.mark.parametrize("name", RULES)
def test_the_first_experience_is_as_without_a_rule(name):
    one = replace(THREE, experiences=THREE.experiences[:1])
    plain, ruled = (cohort_of([each], CORPUS) for each in (one, replace(one, rule=RULES[name](NUMBERS[name]))))
    plain.train()
    ruled.train()
    assert torch.equal(bits(plain.bank.param), bits(ruled.bank.param))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("rounds", [1, 6, 7, 13])
def test_a_resumed_learner_is_the_one_never_stopped(name, rounds):
    """Six batches are an experience."""
    one = replace(THREE, rule=RULES[name](NUMBERS[name]))
    whole, stopped, resumed, left = cohort_of([one], CORPUS), cohort_of([one], CORPUS), cohort_of([one], CORPUS), [rounds]
    whole.train()

    def stop(cohort, loss):
        left[0] -= 1
        if not left[0]:
            raise Stop

    with pytest.raises(Stop):
        stopped.train(stop)
    tensors, state = stopped.state()
    assert {*tensors} == {"param", "exp_avg", "exp_avg_sq", "steps", *(f"{part} of 0" for part in RULES[name].state)}
    if rounds >= 6:
        assert all(tensors[f"{part} of 0"].count_nonzero() for part in RULES[name].state)
    resumed.load_state({key: tensor.clone() for key, tensor in tensors.items()}, state)
    resumed.train()
    assert torch.equal(bits(resumed.bank.param), bits(whole.bank.param)) and resumed.scores == whole.scores
    for part in RULES[name].state:
        assert torch.equal(bits(resumed.noted[0][part]), bits(whole.noted[0][part]))
        with pytest.raises(UserError, match=f"{part} of 0 is torch.float64"):
            resumed.load_state(tensors | {f"{part} of 0": tensors[f"{part} of 0"].double()}, state)
    with pytest.raises(UserError, match="its tensors are"):
        cohort_of([replace(one, rule=None if RULES[name].state else L2(1.0))], CORPUS).load_state(tensors, state)


@pytest.mark.parametrize("threads", [1, 2])
def test_figures_do_not_depend_on_threads(threads, request):
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    torch.set_num_threads(threads)
    values = torch.randn(100_001, generator=torch.Generator().manual_seed(0))
    assert total(values).item() == pytest.approx(values.double().sum().item(), abs=1e-3)
    torch.set_num_threads(1)
    wanted = total(values)
    torch.set_num_threads(threads)
    assert torch.equal(total(values), wanted)


def test_on_a_gpu_the_host_waits_for_no_rule(monkeypatch):
    """As on a CPU, with A-GEM's second gradient replayed from a graph."""
    corpus = ToyCorpus(("aa", "bb"), sentences=2)
    learners = [learner(g, rule=RULES[name](NUMBERS[name]), lora_dropout=0.0) for g, name in enumerate(RULES)]
    learners = [replace(one, experiences=(("aa",), ("bb",)), epochs=2, batch_size=2) for one in learners]
    learners[0] = replace(learners[0], trains=("*.b", "head.*"))
    learners[1] = replace(learners[1], experiences=(Experience(("aa",)), Experience(("bb",), rate=0.5)))

    def trained(device, after=lambda cohort, loss: None):
        cohort = train.Cohort(toy_model(**LAYERS).to(device), corpus, learners, [{}] * len(learners))
        cohort.train(after)
        return cohort.bank.param.cpu()

    keys, waits, buckets = [], [], Counter()

    def noted(graphs, key, function, batch):
        keys.append(key)
        buckets[key, batch.bucket] += 1
        return call(graphs, key, function, batch)

    call = train.Graphs.__call__
    monkeypatch.setattr(train.Graphs, "__call__", noted)
    wanted = trained("cpu")
    keys.clear()
    buckets.clear()
    with pretended_gpu(monkeypatch) as gpu:

        def after(cohort, loss):
            waits.append([*gpu.waits])
            gpu.waits.clear()

        param = trained(GPU, after)
    assert waits[2] == [("aten._to_copy", "train.py:advance")], "within the second experience"
    assert keys.count(("memory", 2)) == 2
    captured = {key for (key, _), times in buckets.items() if times > 1}
    assert captured == {(0, len(RULES)), ("memory", 2)}, "all rows, A-GEM's memory"
    assert gpu.captures == sum(times > 1 for times in buckets.values())
    assert (param - wanted).norm() < 1e-5 * wanted.norm()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_penalties_are_the_gradients_of_what_they_say():
    param, anchor, fisher, grad = (normal(50, seed=seed) for seed in range(4))
    for rule, state, weight in ((L2(0.3), {"anchor": anchor}, 1.0), (EWC(0.3), {"anchor": anchor, "fisher": fisher}, fisher)):
        leaf = param.double().requires_grad_()
        (0.3 / 2 * (weight * (leaf - anchor.double()).square()).sum()).backward()
        changed = grad.clone()
        rule.adjust(changed, param, state, None)
        torch.testing.assert_close(changed.double(), grad + leaf.grad, rtol=1e-5, atol=1e-6)
        half = grad.bfloat16()
        rule.adjust(half, param, state, None)
        torch.testing.assert_close(half.double(), grad.bfloat16() + leaf.grad, rtol=2**-8, atol=1e-6)


def test_fishers_are_scaled_to_a_mean_of_one_and_fade():
    state = {name: torch.zeros(64) for name in EWC.state}
    squares = [normal(64, seed=seed).square() * 1e-6 for seed in range(2)]
    for each in squares:
        EWC(1.0).learned(normal(64, seed=5), state, lambda count, each=each: each)
    wanted = 0.95 * squares[0] / squares[0].mean() + squares[1] / squares[1].mean()
    torch.testing.assert_close(state["fisher"], wanted)
    assert torch.equal(state["anchor"], normal(64, seed=5))
    EWC(1.0).learned(normal(64), state, lambda count: torch.zeros(64))
    assert state["fisher"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gem_projects_only_what_conflicts(dtype):
    grad, reference = normal(2000).to(dtype), normal(2000, seed=1).to(dtype)
    for sign in (1, -1):
        towards = sign * reference * torch.sign(grad.float().dot(reference.float())).to(dtype)
        changed = grad.clone()
        AGEM(0.1).adjust(changed, grad, {}, towards)
        if sign > 0:
            assert torch.equal(changed, grad)
        else:
            angle = torch.nn.functional.cosine_similarity(changed.double(), towards.double(), 0)
            assert abs(angle) < (1e-6 if dtype == torch.float32 else 1e-3) < 0.02 < (changed - grad).norm() / grad.norm() * 2
    unchanged = grad.clone()
    AGEM(0.1).adjust(unchanged, grad, {}, torch.zeros_like(grad))
    assert torch.equal(unchanged, grad)


def test_what_is_replayed_comes_from_a_share_of_earlier_locales():
    stream = Stream(CORPUS, [["aa"], ["bb"], ["cc"]], epochs=3, batch_size=4, seed=0)
    seen = set()
    while not stream.finished:
        if stream.experience == 2:
            pool, indices, _ = stream.replayed(0.25)
            assert pool.number == 6 and len(indices) == 4
            wanted = [CORPUS.sentences(locale, "train").take(np.array([0, 4, 8])) for locale in ("aa", "bb")]
            assert np.array_equal(pool.input_ids, np.concatenate([part.input_ids for part in wanted]))
            again = Stream(CORPUS, stream.experiences, epochs=3, batch_size=4, seed=0)
            again.seek(stream.counters())
            assert np.array_equal(again.replayed(0.25)[1], indices)
            seen.add(tuple(indices))
        stream.next()
    assert len(seen) == 9, "each step draws anew"


def test_the_reference_is_the_gradient_of_what_is_replayed(monkeypatch):
    seen = []

    class Noting(Rule):
        replays = True

        def adjust(self, grad, param, state, reference):
            seen.append((param.clone(), reference.clone()))

    two = replace(THREE, experiences=(("aa",), ("bb",)), rule=Noting(0.5))
    cohort = cohort_of([replace(THREE, rank=2), two], CORPUS)
    cohort.train()
    assert len(seen) == 6
    stream = Stream.of(CORPUS, two)
    stream.seek([1, 0, 0])
    for param, reference in seen:
        pool, indices, _ = stream.replayed(0.5)
        bank, model = AdapterBank(toy_model(), 1, 6, alpha=4.0), cohort.model
        bank.param[0] = param
        step._backward(model, bank, StepSettings.of([BASE], torch.device("cpu")), 0, 1, pack([Part(pool, indices, 0)], 1))
        torch.testing.assert_close(reference, bank.grad[0], rtol=1e-4, atol=1e-6)
        stream.next()


def test_squares_are_those_of_single_sentences():
    sentences = CORPUS.sentences("aa", "train")
    model, settings = toy_model().freeze_backbone(), StepSettings.of([THREE, THREE], torch.device("cpu"))
    bank = AdapterBank(model, 2, 4)
    bank.param.add_(normal(*bank.param.shape) * 0.02)
    indices = np.array([0, 1, 2, 3, 4, 5, 6, 7, 9, 11])
    wanted = torch.zeros(bank.param.shape[1])
    for i in indices:
        single = bank.select([1])
        step._backward(model, single, settings.without_dropout(), 0, 1, pack([Part(sentences, np.array([i]), 0)], 1))
        wanted += single.grad[0].square() / len(indices)
    grad = bank.grad.clone()
    got = squared_gradients(model, bank, settings, 1, StreamBatch(sentences, indices, False))
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-9)
    assert torch.equal(bank.grad, grad)


def test_what_is_noted_is_of_the_experience_that_ended():
    cohort, seen = cohort_of([replace(THREE, rule=EWC(0.0))], CORPUS), []
    cohort.train(lambda cohort, loss: seen.append([part.clone() for part in cohort.noted[0].values()]))
    assert not any(part.any() for part in seen[4]), "the first experience has six batches"
    for at, locale in ((5, "aa"), (11, "bb")):
        anchor, fisher = seen[at]
        bank = AdapterBank(cohort.model, 1, 6, alpha=4.0)
        bank.param[0] = anchor
        sentences = StreamBatch(CORPUS.sentences(locale, "train"), np.arange(12), False)
        squares = squared_gradients(cohort.model, bank, StepSettings.of([THREE], torch.device("cpu")), 0, sentences)
        torch.testing.assert_close(fisher - (0.95 * seen[at - 1][1]), squares / squares[squares > 0].mean(), rtol=1e-3, atol=1e-3)
    assert torch.equal(seen[-1][0], seen[11][0]), "nothing is noted at the end"


def test_a_rule_holds_what_it_should():
    """A strong pull keeps the row where it was after the first language; without one it moves on."""
    moved = {}
    for rule in (None, L2(1e4), EWC(1e4)):
        first, both = (
            cohort_of([replace(BASE, experiences=some, rule=rule)], CORPUS) for some in ((("aa",),), (("aa",), ("bb",)))
        )
        first.train()
        both.train()
        moved[rule] = float((first.bank.param - both.bank.param).norm())
    assert moved[L2(1e4)] < 0.5 * moved[None] and moved[EWC(1e4)] < moved[None]


def test_contributings_rule_is_one():
    """It trains, differs from none, and survives a stop."""
    text = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(class \w+\(Rule\).*?)```", text, re.DOTALL)
    names: dict = {"Rule": Rule}
    exec(code, names)
    one = replace(THREE, rule=names["Fade"](2.0))
    plain, whole, stopped, resumed = (cohort_of([each], CORPUS) for each in (replace(one, rule=None), one, one, one))
    states = []
    plain.train()
    whole.train()
    stopped.train(lambda cohort, loss: states.append(({k: v.clone() for k, v in cohort.state()[0].items()}, cohort.state()[1])))
    resumed.load_state(*states[13])
    resumed.train()
    assert torch.equal(resumed.bank.param, whole.bank.param) and not torch.equal(plain.bank.param, whole.bank.param)
    assert whole.noted[0]["ended"].unique().tolist() == [2]


def test_a_rule_is_for_adapters():
    with pytest.raises(ValueError, match=r"L2\(number=1.0\) works on adapters"):
        Learner((("aa",),), None, 1.0, 1e-3, 0, 1, 4, rule=L2(1.0))
    assert replace(BASE, rule=L2(0.5)).name.endswith("lr=0.01, L2 0.5, seed 1") and replace(BASE, rule=L2(0.5)) != BASE


def a_of(cohort, param, ranks):
    """A of each linear in a row [P], at some ranks: [slices, ranks, K]."""
    bank = cohort.bank
    return {name: bank.a_of(param[None], 0, name)[:, ranks] for name in bank.slots if name.endswith(".a")}


@pytest.mark.parametrize("ranks", [slice(2, 4), slice(4, 6)])
def test_o_loras_penalty_is_what_it_says(ranks):
    a, grad = normal(3, 6, 20), normal(3, 6, 20, seed=1)
    leaf = a.double().requires_grad_()
    penalty = sum(
        0.7 * (leaf[part, first : first + 2] @ leaf[part, ranks].T).square().sum()
        for part in range(3)
        for first in range(0, ranks.start, 2)
    )
    penalty.backward()
    wanted = torch.zeros_like(leaf)
    wanted[:, ranks] = leaf.grad[:, ranks]  # earlier blocks are constants
    changed = grad.clone()
    OLoRA(0.7).adjust_a(changed, a, ranks)
    torch.testing.assert_close(changed.double(), grad + wanted, rtol=1e-5, atol=1e-5)
    assert not torch.equal(changed[:, ranks], grad[:, ranks])
    half = grad.bfloat16()
    OLoRA(0.7).adjust_a(half, a, ranks)
    torch.testing.assert_close(half.double(), grad.bfloat16() + wanted, rtol=2**-8, atol=1e-3)


def test_o_loras_blocks_are_orthogonal_where_it_is_strong():
    """The largest cosine between rows of the last block and of those before it."""
    overlap = {}
    for number in (1e-30, 1e3):
        one = replace(THREE, rule=OLoRA(number), epochs=60, lr=2e-3, lora_dropout=0.0, dropout=0.0)
        cohort = cohort_of([one], CORPUS)
        cohort.train()
        own, earlier = (a_of(cohort, cohort.bank.param[0], ranks) for ranks in (slice(4, 6), slice(0, 4)))
        cosines = [
            torch.nn.functional.normalize(own[name], dim=2) @ torch.nn.functional.normalize(earlier[name], dim=2).mT
            for name in own
        ]
        overlap[number] = max(float(cosine.abs().max()) for cosine in cosines)
    assert overlap[1e3] < 0.01 < 0.3 < overlap[1e-30]


def test_o_loras_other_blocks_stay_to_the_bit():
    """At each step all but the head and the block of the experience is as it was, with decay and whatever parts train."""
    for trains in (("*",), ("*.b", "0.*", "head.*")):
        one = replace(THREE, rule=OLoRA(2.0), weight_decay=0.3, trains=trains)
        cohort, rows = cohort_of([replace(THREE, seed=5), one], CORPUS), []
        before = cohort.bank.param[1].clone()
        cohort.train(lambda cohort, loss, rows=rows: rows.append(cohort._team.bank.param[1].clone()))
        assert len(rows) == 18, "six batches are an experience"
        for at, row in enumerate(rows):
            first = 2 * (at // 6)
            may = cohort.bank.columns(trains, slice(first, first + 2))
            changed = row.view(torch.int32) != before.view(torch.int32)
            assert not changed[~may].any() and changed[cohort.bank.columns(["0.*.a"], slice(first, first + 2))].any()
            before = row
        norm = {name: float(b[:, 4:].norm()) for name, b in weights(cohort, 1).items() if name.endswith(".b")}
        assert all(norm.values()), "the last block has learned"


def test_o_loras_blocks_begin_with_the_moments_of_those_before():
    cohort, seen = cohort_of([replace(THREE, rule=OLoRA(2.0))], CORPUS), []
    cohort.train(lambda cohort, loss: seen.append(cohort._team.bank.exp_avg_sq[0].clone()))
    bank = cohort.bank
    blocks = [slice(first, first + 2) for first in (0, 2, 4)]
    for name in bank.slots:
        if name.endswith(".a"):
            early, late = ([bank.a_of(row[None], 0, name)[:, ranks] for ranks in blocks] for row in seen[4:6])
        elif name.endswith(".b"):
            early, late = ([bank.view(row[None], name)[0][:, ranks] for ranks in blocks] for row in seen[4:6])
        else:
            continue
        assert early[0].any() and not early[1].any() and torch.equal(late[0], late[1]) and not late[2].any()


def test_o_lora_divides_a_rank():
    with pytest.raises(ValueError, match="divides LoRA's rank by 3 experiences, and the rank is 8"):
        replace(THREE, rank=8, rule=OLoRA(1.0))
    with pytest.raises(ValueError, match="divides LoRA's rank"):
        replace(THREE, method="ia3", rule=OLoRA(1.0))
    assert [replace(THREE, rule=OLoRA(1.0)).ranks_of(i) for i in range(4)] == [slice(0, 2), slice(2, 4), *[slice(4, 6)] * 2]
    assert THREE.ranks_of(1) is None
