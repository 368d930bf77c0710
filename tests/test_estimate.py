"""What --dry-run says of memory is what a pass keeps."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy import ToyCorpus, toy_model

from bench.whole_step import make_step
from kloss import estimate, run
from kloss.cl import step
from kloss.cl.backbone import tiny_config
from kloss.cl.experiments import with_experiments
from kloss.cl.languages import LOCALES
from kloss.cl.learner import Learner
from kloss.cl.rules import RULES
from kloss.cl.stream import Stream
from kloss.cl.study import plan
from kloss.cl.train import Cohort
from kloss.config import Config
from kloss.errors import UserError
from kloss.estimate import backbone_sizes, describe, kept_per_token, rule_memory, rule_work, with_pass_tokens
from kloss.kernels.cpu_library import built
from kloss.models import BASE, TINY, AdapterBank, XLMRForTokenClassification

CORPUS = ToyCorpus()


class PlannedCorpus(ToyCorpus):
    name, max_length = "toy", 64


@pytest.mark.skipif(not built(), reason="csrc is not built")
@pytest.mark.parametrize("rank", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_backward_keeps_of_a_token_is_what_the_plan_says(rank, dtype):
    if dtype == torch.bfloat16 and not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        pytest.skip("this processor computes bf16 in fp32")
    widths = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 2, "num_hidden_layers": 3}
    sizes = replace(TINY, **widths, vocab_size=50, num_labels=7)
    made = make_step(sizes, 3, rank, 4, dropout=0.1, dtype=dtype)
    tokens = len(made.sentences.input_ids)
    lasting = {t.untyped_storage().data_ptr() for t in (*made.model.parameters(), made.bank.param, made.bank.work)}
    kept = {}

    def keep(tensor):
        if tensor._base is not None and tensor._base.shape[1:] == tensor.shape == (tokens,):
            kept[tensor._base.data_ptr()] = tensor._base  # a site's keys keep those of all sites
        elif tensor.shape and tensor.shape[0] == tokens and tensor.untyped_storage().data_ptr() not in lasting:
            kept[tensor.data_ptr()] = tensor  # alive, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made.run()
    bytes_per_token = sum(tensor.nbytes for tensor in kept.values()) / tokens
    held = 2  # LoRA's thresholds, which a layer does not save but hold
    assert bytes_per_token + held == sum(kept_per_token(sizes, rank, dtype.itemsize).values())


def test_sizes_of_a_backbone_in_a_folder_are_read(tmp_path):
    sizes = replace(TINY, vocab_size=50, hidden_size=64, intermediate_size=256)
    corpus = SimpleNamespace(labels=("O", "B-x", "I-x"))
    XLMRForTokenClassification.random(sizes).save_pretrained(tmp_path)
    assert backbone_sizes(Config(backbone=str(tmp_path)), corpus) == replace(sizes, num_labels=3)
    assert backbone_sizes(Config(backbone="some/one"), corpus) is None


def test_passes_fill_a_gpus_memory_and_no_more():
    """Kept tensors, weights and moments fit; more memory holds more tokens; a given number stays."""
    config = Config(pass_tokens=0, dtype="bf16", rank=(32,))
    sizes = replace(BASE, num_labels=111)
    study = plan(config, LOCALES)
    state = len(study.learners) * AdapterBank.width_of(sizes, 32) * 16
    kept = sum(kept_per_token(sizes, 32, 2).values())
    chosen = [with_pass_tokens(config, study, sizes, free).pass_tokens for free in (20 << 30, 80 << 30, 141 << 30)]
    for tokens, free in zip(chosen, (20 << 30, 80 << 30, 141 << 30), strict=True):
        assert 0.59 * (free - state) < tokens * kept < 0.61 * (free - state)
    assert 1024 < chosen[0] < chosen[1] < chosen[2]
    assert with_pass_tokens(config, study, sizes, 1 << 20).pass_tokens == 1024
    assert with_pass_tokens(config, study, sizes, None).pass_tokens == Config.pass_tokens
    assert with_pass_tokens(replace(config, pass_tokens=7), study, sizes, 80 << 30).pass_tokens == 7
    whole = replace(config, strategies=("vanilla",))
    assert with_pass_tokens(whole, plan(whole, LOCALES), sizes, 20 << 30).pass_tokens > 1024


@pytest.mark.parametrize("number", [0.3, 1.0])
@pytest.mark.parametrize("name", sorted(RULES))
def test_the_plan_counts_what_rules_compute(name, number, monkeypatch):
    """Every sentence of every backward, of the batches and of what rules take gradients of besides."""
    epochs = 12 if RULES[name].replays else 2  # of many draws the mean is what the plan says
    learner = Learner((("aa",), ("bb",), ("aa", "bb")), 4, 4.0, 1e-3, 0, epochs, 4, rule=RULES[name](number))
    seen, original = [], step._backward

    def counted(model, bank, settings, first, last, batch):
        seen.append(batch.tokens)
        return original(model, bank, settings, first, last, batch)

    monkeypatch.setattr(step, "_backward", counted)
    Cohort(toy_model(), CORPUS, [learner], [{}]).train()
    stream, besides = Stream.of(CORPUS, learner), rule_work(CORPUS, learner)
    assert len(seen) == stream.steps() + besides.passes
    assert sum(seen) == pytest.approx(stream.tokens() + besides.tokens, rel=0.02 if RULES[name].replays else 0)
    assert (besides.tokens > 0) == (name != "l2") and rule_work(CORPUS, replace(learner, rule=None)) == (0, 0)


def test_the_plan_says_what_rules_take(monkeypatch):
    config = Config(strategies=("shared",), experiments=("remedies",), remedies=("a-gem=0.5", "ewc=1"), max_learners=1)
    config = replace(config, rank=(2,), tiny_layers=1, tiny_hidden=32, epochs=1, batch_size=2)
    corpus = PlannedCorpus()
    study = with_experiments(config, plan(config, corpus.locales))
    plain, agem, ewc = study.learners
    timed = []
    monkeypatch.setattr(estimate, "estimated_seconds", lambda *arguments: timed.append(arguments[1:]) or 60.0)
    lines = dict(describe(config, corpus, study))
    works = [rule_work(corpus, learner) for learner in study.learners]
    steps = sum(Stream.of(corpus, learner).steps() for learner in study.learners)
    tokens = Stream.of(corpus, plain).tokens()
    assert timed[0][:2] == (steps + works[1].passes + works[2].passes, 3 * tokens + works[1].tokens + works[2].tokens)
    width = AdapterBank.width_of(tiny_config(config, corpus), 2)
    for number, learner, work in zip((1, 2, 3), study.learners, works, strict=True):
        line = lines[f"cohort {number}"]
        assert f"{tokens + work.tokens} tokens" in line and (f"{work.tokens} of them for rules" in line) == (number > 1)
        of_rule = 4 * width * {0: 0, 1: 1, 2: 2}[number - 1]  # A-GEM's reference gradient; EWC's anchor and information
        assert rule_memory([learner], width, 4) == of_rule
        assert f"{(16 * width + of_rule) / 2**20:.0f} MiB" in line
    assert (plain.rule, agem.rule.number, ewc.rule.number) == (None, 0.5, 1.0)


def test_memory_counts_what_rules_note(monkeypatch):
    config = Config(strategies=("shared",), experiments=("remedies",), remedies=("ewc=1",), rank=(64,))
    config, corpus = replace(config, tiny_layers=1, tiny_hidden=32), PlannedCorpus()
    study = with_experiments(config, plan(config, corpus.locales))
    width = AdapterBank.width_of(tiny_config(config, corpus), 64)
    needed = 2 * 16 * width + 2 * 4 * width  # two adapters, one with an anchor and its information
    monkeypatch.setattr(run, "gpu_memory", lambda device: needed)
    run.check_memory(config, corpus, study, torch.device("cpu"))
    monkeypatch.setattr(run, "gpu_memory", lambda device: needed - 1)
    with pytest.raises(UserError, match="a cohort of 2 adapters of rank 64 .*, with what rules note,"):
        run.check_memory(config, corpus, study, torch.device("cpu"))
