"""Experiment methods: learners of other methods train as alone and stop as they go on; its analysis finds what was planted."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from pretend import GPU, pretended_gpu
from test_run import SMALL, interrupted, one_line_error
from test_train import BASE, SIX, Stop, cohort_of
from toy import ToyCorpus

from kloss.cl.experiments import methods, with_experiments
from kloss.cl.learner import Learner
from kloss.cl.results import METHODS as CHOICES
from kloss.cl.rules import L2
from kloss.cl.shares import Limits, cohorts_of, depth, stages
from kloss.cl.states import KeptRow
from kloss.cl.study import plan as study_of
from kloss.cl.train import _Team
from kloss.config import Config
from kloss.models import AdapterBank
from kloss.models.methods import METHODS
from kloss.run import main, without_effect

LOCALES = ("en-US", "de-DE", "ja-JP")
CORPUS = ToyCorpus()
THREE = replace(BASE, experiences=(("aa",), ("bb",), ("cc",)), dropout=0.1, weight_decay=0.1)
FIRST = [replace(THREE, rank=2), replace(THREE, lr=3e-3, seed=2, batch_size=5), replace(SIX[2], rank=3)]


def of_method(method, learners=FIRST):
    return [replace(methods.changed(learner, method, learner.lr), rank=3) for learner in learners]


def trained(learners, **options):
    """A cohort after training; donors are trained first."""
    cohort = cohort_of(learners, CORPUS, **options)
    give(cohort)
    cohort.train()
    return cohort


def give(cohort):
    for g, learner in enumerate(cohort.learners):
        if learner.donors:
            donors = trained([donor for donor, _ in learner.donors])
            cohort.begin(g, [KeptRow(row, donors.bank.rank) for row in donors.bank.param])


def of_size(method):
    """FIRST by a method, in one bank: a fusion's have equally many donors."""
    return of_method(method, FIRST if method != "fusion" else [*FIRST[:2], replace(FIRST[0], seed=5, epochs=1)])


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("pass_tokens", [8192, 40])
def test_together_equals_alone_to_the_bit(method, pass_tokens):
    learners = of_size(method)
    together = trained(learners, pass_tokens=pass_tokens, exact=True)
    for g, learner in enumerate(learners):
        alone = trained([learner], exact=True)
        assert torch.equal(together.bank.param[g], alone.bank.param[0]) and together.scores[g] == alone.scores[0]
        assert not together.failed and int(together.steps[g]) == int(alone.steps[0])


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("rounds", [1, 8])
def test_resumed_equals_never_stopped(method, rounds):
    learners = [*of_size(method), replace(of_method(method, FIRST[:1])[0], lr=1e38, seed=3)]  # one diverges
    whole, left = trained(learners), [rounds]

    def stop(cohort, loss):
        left[0] -= 1
        if not left[0]:
            raise Stop

    stopped = cohort_of(learners, CORPUS)
    give(stopped)
    with pytest.raises(Stop):
        stopped.train(stop)
    tensors, state = stopped.state()
    resumed = cohort_of(learners, CORPUS)
    give(resumed)
    resumed.load_state({name: tensor.clone() for name, tensor in tensors.items()}, state)
    resumed.train()
    assert resumed.scores == whole.scores and resumed.failed == whole.failed and whole.failed.keys() == {3}
    for one, other in ((resumed.bank.param, whole.bank.param), (resumed.bank.exp_avg_sq, whole.bank.exp_avg_sq)):
        assert torch.equal(one.view(torch.int32), other.view(torch.int32))


@pytest.mark.parametrize("method", methods.METHODS)
def test_it_learns_and_leaves_backbone_and_donors_as_they_are(method):
    (learner,) = of_method(method, [replace(THREE, experiences=(("aa",),), dropout=0.0, epochs=20, lr=3e-2, weight_decay=0.0)])
    cohort = cohort_of([learner], CORPUS)
    give(cohort)
    before = [p.clone() for p in cohort.model.parameters()]
    donors = [bank.param.clone() for bank in getattr(cohort.bank, "donors", [])]
    drawn, losses = cohort.bank.param.clone(), []
    cohort.train(lambda cohort, loss: losses.append(loss))
    assert np.mean(losses[-3:]) < 0.7 * np.mean(losses[:3])
    for name in cohort.bank.slots:
        assert not torch.equal(cohort.bank.view(cohort.bank.param, name), cohort.bank.view(drawn, name)), name
    assert all(torch.equal(p, was) for p, was in zip(cohort.model.parameters(), before, strict=True))
    assert all(torch.equal(bank.param, was) for bank, was in zip(getattr(cohort.bank, "donors", []), donors, strict=True))


def test_a_fusion_is_of_its_own_donors():
    learners = of_size("fusion")
    cohort = cohort_of(learners, CORPUS)
    give(cohort)
    for g, learner in enumerate(learners):
        wanted = trained([donor for donor, _ in learner.donors]).bank
        given = cohort.bank.donors[int(cohort.bank.given[g])]
        assert torch.equal(given.param, wanted.param) and torch.equal(given.scaling, wanted.scaling)


def test_decay_pulls_factors_and_gates_to_their_start():
    """Of a learner that has no gradient but for decay: rows hold differences from the start."""
    for method in ("ia3", "fusion"):
        (learner,) = of_method(method, [replace(THREE, weight_decay=0.5, lr=0.1)])
        cohort = cohort_of([learner], CORPUS)
        bank = cohort.bank
        bank.param.fill_(1.0)
        bank.adamw_(torch.tensor([0.1]), weight_decay=torch.tensor([0.5]), max_norm=torch.tensor([1.0]))
        assert torch.allclose(bank.param, torch.tensor(0.95))


def test_rules_work_on_them_too():
    plain = trained(of_method("ia3", [THREE]))
    ruled = trained(of_method("ia3", [replace(THREE, rule=L2(3.0))]))
    assert not torch.equal(plain.bank.param, ruled.bank.param) and not ruled.failed


def test_what_a_learner_of_a_method_cannot_be():
    for wrong in ({"rank": None}, {"start": (BASE, 1)}):
        with pytest.raises(ValueError, match="a learner of ia3 has a rank, and begins anew"):
            replace(BASE, method="ia3", **wrong)


def test_learners_and_cohorts():
    some = ("prefix=0.1", "prefix=0.2", "ia3=0.1", "fusion=0.1")
    config = Config(strategies=("non-shared", "shared"), experiments=("methods",), languages=LOCALES, methods=some, orders=2)
    study = with_experiments(config, study_of(config, LOCALES))
    plain = [study.learners[trial.learners[0]] for trial in study.trials if trial.strategy == "shared"]
    alone = {g for trial in study.trials if trial.strategy == "non-shared" for g in trial.learners}
    others = study.learners[len(alone) + 2 :]
    assert len(alone) == 3 and [learner.method for learner in others] == 2 * ["prefix", "prefix", "ia3", "fusion"]
    for g, learner in enumerate(others):
        lora = plain[g // 4]
        same = ("experiences", "seed", "epochs", "batch_size", "warmup", "dropout", "weight_decay", "max_norm")
        assert all(getattr(learner, name) == getattr(lora, name) for name in same)
        assert (learner.lr, learner.head_lr) == (0.2 if g % 4 == 1 else 0.1, lora.lr)
        assert study.to_score[len(alone) + 2 + g] == {
            1: [lora.experiences[0].locales[0]],
            2: [lora.experiences[1].locales[0]],
        } | {3: [locale for experience in lora.experiences for locale in experience.locales]}
    fusions = {len(alone) + 2 + g for g, learner in enumerate(others) if learner.method == "fusion"}
    assert {g: {state.learner for state in states} for g, states in study.starts().items()} == dict.fromkeys(fusions, alone)
    assert len({study.learners[g].donors for g in fusions}) == 1, "both orders share a set of donors"
    assert all(study.kept()[g] == {1} for g in alone) and depth(study.learners[max(fusions)]) == 1
    assert [[study.learners[g].method for g in cohort] for cohort, _ in cohorts_of(stages(study, Limits()))] == [
        ["lora"] * 5, ["ia3"] * 2, ["prefix"] * 4, ["fusion"] * 2,
    ]  # fmt: skip
    assert set(methods.METHODS) == set(METHODS) and set(methods.asked(Config())) == set(Config.methods)
    without = Config(strategies=("shared",), experiments=("methods",), languages=LOCALES)
    donors = [
        learner for learner in with_experiments(without, study_of(without, LOCALES)).learners if len(learner.experiences) == 1
    ]
    assert donors == sorted((study.learners[g] for g in alone), key=lambda learner: learner.experiences[0].locales)


def test_an_old_learner_is_what_it_was():
    learner = Learner(experiences=(("aa",),), rank=2, alpha=2.0, lr=0.1, seed=0, epochs=1, batch_size=2)
    assert learner.method == "lora" and learner.parents == () and learner.name == "aa, r=2, lr=0.1, seed 0"


def entries(effects, orders=6, noise=0.0, learned=0.6, n=8, seed=0):
    """effects: method -> what it adds to the share kept and to F1 when learned, on average; LoRA keeps half."""
    draw, result = np.random.default_rng(seed), []

    def counts(f1):
        return [[round(1000 * value), 1000, 1000] for value in np.clip(f1, 0, 1)]

    for o in range(orders):
        shared = 0.05 * draw.normal()
        for weights, (method, (more, better)) in enumerate(({"LoRA": (0, 0)} | effects).items(), 1):
            own = learned + better + noise * draw.normal(size=n)
            end = own * (0.5 + shared + more) + noise * draw.normal(size=n)
            about = {
                "label": "SHARED LoRA r=8",
                "order_name": f"Order {o}",
                "seed": 0,
                "method": method,
                "weights": 1000 * weights,
            }
            about |= {"learned": counts(own), "end": counts(end), "order": [f"l{o}", *map(str, range(n - 1))]}
            result.append(about)
    return result


def ends(text):
    return [float(end) for end in text.replace("−", "-").split("(")[1].rstrip(")").split(" to ")]


def test_what_keeps_more_is_found():
    planted = {"prefix=0.1": (0.2, 0), "ia3=0.1": (-0.2, 0), "fusion=0.1": (0.2, -0.2), "fusion=0.2": (0, -0.2)}
    section = methods.analyse({}, entries(planted, noise=0.01))
    lora, prefix, ia3, fusion, _, slow = section.findings
    assert lora.startswith("SHARED LoRA r=8, LoRA: 1,000 weights, 0.60 F1 when learned, 0.3") and lora.endswith("% kept.")
    assert ": 2,000 weights, " in prefix and "% kept, +20 points against LoRA (+1" in prefix and ", −20 points" in ia3
    assert fusion.startswith("SHARED LoRA r=8, fusion=0.1: 4,000 weights, 0.40 F1 when learned")
    assert slow == "More is kept, but less was learned: fusion=0.1."
    (table,) = section.tables
    rows = {row[0]: row for row in table.rows}
    assert list(rows) == ["LoRA", *planted] and rows["LoRA"][5:] == ("", "", "")
    for method, column, value in (("prefix=0.1", 7, 0.2), ("ia3=0.1", 7, -0.2), ("ia3=0.1", 6, -0.12), ("fusion=0.1", 5, -0.2)):
        low, high = ends(rows[method][column])
        assert low < value + 0.01 and high > value - 0.01 and high - low < 0.06
    assert [list(bars.values) for bars in section.bars] == [list(rows)] * 2


def test_nothing_is_found_where_nothing_was_planted():
    false = 0
    for seed in range(100):
        (table,) = methods.analyse({}, entries({"ia3=0.1": (0, 0)}, noise=0.1, seed=seed)).tables
        low, high = ends(table.rows[1][7])
        false += not low <= 0 <= high
    assert false <= 12, "of 100 intervals of 95 %"


def test_the_share_kept_is_of_what_was_learned_but_the_last():
    about = {"order": ["a", "b", "c", "d"], "seed": 0, "method": "LoRA"}
    learned, end = ([[tp, 100, 100] for tp in each] for each in ((80, 60, 1, 40), (20, 60, 1, 40)))
    ((own, last, kept),) = methods._values([about | {"learned": learned, "end": end}])["LoRA"].values()
    assert (own, last, kept) == pytest.approx((1.81 / 4, 1.21 / 4, (0.25 + 1) / 2))


def test_what_cannot_be_said():
    floor = methods.analyse({}, entries({"ia3=0.1": (0, -0.59)})).findings
    assert floor[1].endswith("ia3=0.1: learned nothing (0.01 F1 when learned).")
    one = methods.analyse({}, entries({"ia3=0.1": (0.2, 0)}, orders=1)).findings
    assert one[1].endswith("+20 points against LoRA (one run, no interval).")
    some = entries({"ia3=0.1": (0.1, 0), "prefix=0.1": (0.2, 0)})
    section = methods.analyse({}, [entry | {"end": [None] * 8} if entry["method"] == "ia3=0.1" else entry for entry in some])
    assert section.findings[1] == "SHARED LoRA r=8, ia3=0.1: diverged." and section.tables[0].rows[1][2] == "diverged"
    section = methods.analyse({}, [entry | {"end": [None] * 8} if entry["method"] == "LoRA" else entry for entry in some])
    assert section.findings[0] == "SHARED LoRA r=8, LoRA: diverged." and section.findings[1].endswith("% kept.")
    none = methods.analyse({}, [entry | {"end": [None] * 8} for entry in some])
    assert all(line.endswith(": diverged.") for line in none.findings) and methods.analyse({}, []) is None


@pytest.mark.parametrize("text", ["prefix", "prefix=", "ia3=0", "ia3=-1", "fusion=x", "ia3=nan", "ia3=inf", "lora=1", "=1"])
def test_a_method_that_is_none(text, capsys, tmp_path):
    arguments = [*SMALL, "--strategies", "shared", "--experiments", "methods", "--out", str(tmp_path / "run")]
    line = one_line_error([*arguments, "--methods", "ia3=1", text], capsys)
    assert f"'{text}'" in line and "prefix=RATE, ia3=RATE, fusion=RATE" in line


def test_a_method_named_twice_and_without_the_experiment(capsys, tmp_path):
    arguments = [*SMALL, "--strategies", "shared", "--experiments", "methods", "--out", str(tmp_path / "run")]
    assert "--methods names ia3=1 twice" in one_line_error([*arguments, "--methods", "ia3=1", "ia3=1"], capsys)
    assert without_effect(Config(methods=("ia3=1",))) == ["--methods has no effect: no experiment is methods"]


def test_a_stopped_run_ends_as_one_that_was_not(tmp_path):
    arguments = [*SMALL, "--cache", str(tmp_path / "cache"), "--strategies", "shared", "--experiments", "methods"]
    arguments += ["--epochs", "1", "--checkpoint-seconds", "0", "--methods", "prefix=0.01", "ia3=0.01", "fusion=0.01"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    for stop, within in ((12, "ia3"), (9, "prefix"), (12, "fusion")):
        team = interrupted([*arguments, "--out", str(tmp_path / "stopped")], stop)
        assert team.cohort.learners[0].method == within
    assert main([*arguments, "--out", str(tmp_path / "stopped")]) == 0
    whole = (tmp_path / "whole" / "scores.json").read_bytes()
    assert (tmp_path / "stopped" / "scores.json").read_bytes() == whole
    scores = json.loads(whole)
    entries = scores["experiments"]["methods"]
    assert [entry["method"] for entry in entries] == ["LoRA", "prefix=0.01", "ia3=0.01", "fusion=0.01"]
    assert entries[0]["weights"] == scores["runs"][0]["trainable_parameters"] and set(CHOICES) <= set(scores["choices"])
    head = entries[1]["weights"] - 2 * 32 * methods.PREFIX
    assert [entry["weights"] - head for entry in entries[1:]] == [2 * 32 * methods.PREFIX, 2 * 32 + 128, 3]
    assert all(len(entry[part]) == 3 and None not in entry[part] for entry in entries for part in ("learned", "end"))
    assert "<h2>Is it LoRA?</h2>" in (tmp_path / "whole" / "report.html").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")
@pytest.mark.parametrize("method", methods.METHODS)
def test_on_a_gpu_they_are_those_of_a_cpu(method, monkeypatch):
    """On a pretended one, which mixes no devices; no graphs are captured."""
    corpus, sizes = ToyCorpus(("aa", "bb"), sentences=3), {"num_hidden_layers": 2}
    learners = of_method(method, [replace(THREE, experiences=(("aa",), ("bb",)), epochs=1, dropout=0.0)])
    learners += [replace(learners[0], experiences=(("bb",),), seed=4)]  # ends early
    plain = cohort_of(learners, corpus, sizes)
    rows = [plain.bank.param.new_zeros(AdapterBank.width_of(plain.model.config, 4)) + 0.01] * 2
    with pretended_gpu(monkeypatch):
        on_gpu = cohort_of(learners, corpus, sizes, device=GPU)
        for cohort in (plain, on_gpu):
            for g in range(2) if method == "fusion" else ():
                cohort.begin(g, [KeptRow(row, 4) for row in rows])
        on_gpu.train()
        graphs = _Team(on_gpu, [0, 1]).graphs
        params = on_gpu.bank.param.cpu()
    plain.train()
    assert not graphs.enabled and on_gpu.scores == plain.scores
    assert (params - plain.bank.param).norm() < 1e-5 * plain.bank.param.norm()
