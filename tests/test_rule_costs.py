"""What --dry-run and the check of memory count of rules: sentences with gradients of their own, and what is noted."""

from dataclasses import replace

import pytest
from toy import ToyCorpus, toy_model

from kloss import estimate, run
from kloss.cl import step
from kloss.cl.backbone import tiny_config
from kloss.cl.experiments import with_experiments
from kloss.cl.learner import Learner
from kloss.cl.rule_costs import rule_memory, rule_work
from kloss.cl.rules import RULES
from kloss.cl.stream import Stream
from kloss.cl.study import plan
from kloss.cl.train import Cohort
from kloss.config import Config
from kloss.errors import UserError
from kloss.estimate import Machine, describe
from kloss.models import AdapterBank
from kloss.pace import Pace

CORPUS = ToyCorpus()


class PlannedCorpus(ToyCorpus):
    name, max_length = "toy", 64


@pytest.mark.parametrize("number", [0.3, 1.0])
@pytest.mark.parametrize("name", sorted(RULES))
def test_the_plan_counts_what_rules_compute(name, number, monkeypatch):
    """Every sentence of every backward, of the batches and of what rules take gradients of besides."""
    epochs = 12 if RULES[name].replays else 2  # of many draws the mean is what the plan says
    learner = Learner((("aa",), ("bb",), ("aa", "bb")), 6, 4.0, 1e-3, 0, epochs, 4, rule=RULES[name](number))
    seen, original = [], step._backward

    def counted(model, bank, settings, first, last, batch):
        seen.append(batch.tokens)
        return original(model, bank, settings, first, last, batch)

    monkeypatch.setattr(step, "_backward", counted)
    Cohort(toy_model(), CORPUS, [learner], [{}]).train()
    stream, besides = Stream.of(CORPUS, learner), rule_work(CORPUS, learner)
    assert len(seen) == stream.steps() + besides.passes
    assert sum(seen) == pytest.approx(stream.tokens() + besides.tokens, rel=0.02 if RULES[name].replays else 0)
    assert (besides.tokens > 0) == (name in ("ewc", "a-gem")) and rule_work(CORPUS, replace(learner, rule=None)) == (0, 0)


def test_the_plan_says_what_rules_take(monkeypatch):
    config = Config(strategies=("shared",), experiments=("remedies",), remedies=("a-gem=0.5", "ewc=1"), max_learners=1)
    config = replace(config, rank=(64,), tiny_layers=1, tiny_hidden=512, epochs=1, batch_size=2)
    corpus = PlannedCorpus()
    study = with_experiments(config, plan(config, corpus.locales))
    plain, agem, ewc = study.learners
    timed = []
    monkeypatch.setattr(estimate, "timed_here", lambda sizes: Pace(step=1e6, token=1.0, scored=0.0, whole=0.0, source=""))
    monkeypatch.setattr(estimate, "_duration", lambda seconds: timed.append(seconds) or "")
    lines = dict(describe(config, corpus, study, Machine(1, "cpu", 8 << 30)))
    works = [rule_work(corpus, learner) for learner in study.learners]
    steps = sum(Stream.of(corpus, learner).steps() for learner in study.learners)
    tokens = Stream.of(corpus, plain).tokens()
    with_lora = 1 + 6 * 64 * 18 * 512 / (2 * 4 * 12 * 512**2)  # FLOPs of rank 64 beside those of the frozen products, twice
    steps, tokens_of_rules = steps + works[1].passes + works[2].passes, works[1].tokens + works[2].tokens
    assert divmod(timed[0], 1e6) == (steps, with_lora * (3 * tokens + tokens_of_rules))
    width = AdapterBank.width_of(tiny_config(config, corpus), 64)
    for number, learner, work in zip((1, 2, 3), study.learners, works, strict=True):
        line = lines[f"cohort {number}"]
        assert f"{tokens + work.tokens} tokens" in line and (f"{work.tokens} of them for rules" in line) == (number > 1)
        of_rule = 4 * width * {0: 0, 1: 1, 2: 2}[number - 1]  # A-GEM's reference gradient; EWC's anchor and information
        assert rule_memory([learner], width, 4) == of_rule
    most = (16 * width + 8 * width) / 2**20  # of EWC
    assert f"weights, gradients and moments {most:.0f} MiB" in lines["memory"] and most > 10
    assert (plain.rule, agem.rule.number, ewc.rule.number) == (None, 0.5, 1.0)


def test_the_plan_says_what_blocks_take(monkeypatch):
    """O-LoRA over three languages has three times the rank, and beside its row a mask and a copy."""
    config = Config(strategies=("shared",), experiments=("remedies",), remedies=("olora=1",), rank=(64,), epochs=1, batch_size=2)
    config, corpus, timed = replace(config, tiny_layers=1, tiny_hidden=512), PlannedCorpus(), []
    study = with_experiments(config, plan(config, corpus.locales))
    monkeypatch.setattr(estimate, "timed_here", lambda sizes: Pace(step=0.0, token=1.0, scored=0.0, whole=0.0, source=""))
    monkeypatch.setattr(estimate, "_duration", lambda seconds: timed.append(seconds) or "")
    lines = dict(describe(config, corpus, study, Machine(1, "cpu", 8 << 30)))
    tokens, lora = Stream.of(corpus, study.learners[0]).tokens(), 6 * 64 * 18 * 512 / (2 * 4 * 12 * 512**2)
    assert timed == [pytest.approx(tokens * (1 + lora) + tokens * (1 + 3 * lora))] and lora > 0.1
    sizes = tiny_config(config, corpus)
    width, narrow = AdapterBank.width_of(sizes, 192), AdapterBank.width_of(sizes, 64)
    assert f"weights, gradients and moments {(16 + 5) * width / 2**20:.0f} MiB" in lines["memory"] and width > 2.5 * narrow
    assert rule_memory(study.learners, width, 4) == 5 * width


def test_memory_counts_what_rules_note():
    config = Config(strategies=("shared",), experiments=("remedies",), remedies=("ewc=1",), rank=(64,), max_learners=2)
    config, corpus = replace(config, tiny_layers=1, tiny_hidden=32), PlannedCorpus()
    study = with_experiments(config, plan(config, corpus.locales))
    width = AdapterBank.width_of(tiny_config(config, corpus), 64)
    needed = 2 * 16 * width + 2 * 4 * width  # two adapters, one with an anchor and its information
    run.check_memory(config, corpus, study, Machine(1, "cpu", needed))
    with pytest.raises(UserError, match="a cohort of 2 adapters of rank 64 .*, with what rules note,"):
        run.check_memory(config, corpus, study, Machine(1, "cpu", needed - 1))
