"""The runner on a pretended GPU: it takes Triton's kernels by itself, mixes no devices, and gives the scores of a CPU."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import fuzz_examples
from pretend import GPU, pretended_gpu
from test_train import SIX, cohort_of
from toy import ToyCorpus

from kloss.cl.evaluate import evaluate
from kloss.cl.train import _Team
from kloss.run import main

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real GPU")

SMALL = [
    *("--languages", "en-US", "de-DE", "--limit", "6", "--eval-limit", "4", "--epochs", "1", "--batch-size", "4", "--seeds", "1"),
    *("--tiny-layers", "1", "--tiny-hidden", "32", "--pretrain-steps", "2", "--rank", "2", "--strategies", "non-shared"),
]


def test_the_rules_of_a_device(monkeypatch):
    with pretended_gpu(monkeypatch) as gpu:
        x = torch.arange(3.0).to(GPU)
        assert (x * 2 + 1).device == GPU and gpu.waits.pop() == ("aten._to_copy", "outside kloss")
        x += 1
        assert not gpu.waits
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(3)
        with pytest.raises(AssertionError, match="a list as index"):
            x[[0, 1]]
        assert x.tolist() == [1, 2, 3] and x[x > 1].numel() == 2 and float(x[0]) == 1
        assert Counter(op for op, _ in gpu.waits) == {"aten._to_copy": 1, "aten.index": 1, "aten._local_scalar_dense": 1}


def test_a_study_takes_the_kernels_by_itself(monkeypatch, tmp_path):
    arguments = [*SMALL, "--cache", str(tmp_path / "cache")]
    assert main([*arguments, "--out", str(tmp_path / "cpu")]) == 0
    with pretended_gpu(monkeypatch) as gpu:
        assert main([*arguments, "--out", str(tmp_path / "gpu")]) == 0
    calls = Counter(gpu.calls)
    of_gelu = {way: calls[f"kloss.multi_lora{way}_of_gelu"] for way in ("", "_backward")}
    assert (calls["kloss.multi_lora_backward"], of_gelu["_backward"]) == (3 * 2, 2), "four linears in each of two rounds"
    assert (calls["kloss.multi_lora"], of_gelu[""]) == (3 * (2 + 2), 2 + 2), "and in two passes that score"
    read = {folder: json.loads((tmp_path / folder / "env.json").read_text()) for folder in ("cpu", "gpu")}
    assert read["gpu"]["device"] == "cuda (pretended)" and read["gpu"]["lora"] == "Triton"
    assert read["cpu"]["device"].startswith("cpu") and read["cpu"]["lora"] in ("csrc", "plain torch")
    assert (tmp_path / "gpu/scores.json").read_bytes() == (tmp_path / "cpu/scores.json").read_bytes()


def test_training_is_that_of_a_cpu(monkeypatch):
    """Learners of different rank and dropout, one of which ends early and leaves the others a smaller bank."""
    corpus, sizes = ToyCorpus(("aa", "bb"), sentences=6), {"num_hidden_layers": 1}
    learners = [replace(learner, experiences=(("aa",),), epochs=1) for learner in SIX[:2]]
    learners[0] = replace(learners[0], experiences=(("aa",), ("bb",)))
    plain = cohort_of(learners, corpus, sizes)
    plain.train()
    with pretended_gpu(monkeypatch) as gpu:
        there = cohort_of(learners, corpus, sizes, device=GPU)
        there.train()
        param, steps = there.bank.param.cpu(), there.steps
    assert gpu.calls and steps.tolist() == plain.steps.tolist() and len(set(plain.steps.tolist())) == 2
    assert (param - plain.bank.param).norm() < 1e-5 * plain.bank.param.norm()
    assert there.scores == plain.scores


def test_a_step_waits_once_and_runs_in_the_kernels(monkeypatch):
    """The wait is for losses and norms; packing sends one pinned buffer."""
    corpus, layers = ToyCorpus(("aa", "bb"), sentences=6), 2
    learners = [replace(learner, experiences=(("aa",),), epochs=2) for learner in SIX[:2]]
    with pretended_gpu(monkeypatch) as gpu:
        team = _Team(cohort_of(learners, corpus, {"num_hidden_layers": layers}, device=GPU), [0, 1])
        team.advance()
        gpu.waits.clear(), gpu.calls.clear()
        team.advance()
    assert gpu.waits == [("aten._to_copy", "train.py:advance")]
    each = {"multi_lora": 3, "add_norm": 2, "attention": 1}
    expected = {f"kloss.{op}{way}": layers * count for op, count in each.items() for way in ("", "_backward")}
    expected |= {f"kloss.multi_lora{way}_of_gelu": layers for way in ("", "_backward")}
    once = (
        *("adapter_linear", "adapter_linear_backward", "token_loss", "token_loss_backward", "adamw_", "embed"),
        *("work_lists_", "dropout_keys"),
    )
    # No gradient goes through the embeddings; the dropout is that of the last states.
    assert Counter(gpu.calls) == expected | {f"kloss.{op}": 1 for op in once} | {"kloss.dropout": 2, "kloss.dropout_limits": 2}


def test_steps_on_the_kernels_are_those_of_a_cpu_and_a_learner_is_alone_to_the_bit(monkeypatch):
    """Ten steps, 50 with KLOSS_FUZZ=5: in the interpreter one takes seconds."""
    steps, corpus = fuzz_examples(10), ToyCorpus(("aa", "bb"), sentences=6)
    learners = [replace(learner, experiences=(("aa",),), epochs=steps, batch_size=2, rank=4) for learner in SIX[:2]]

    def trained(learners, device):
        cohort = cohort_of(learners, corpus, {"num_hidden_layers": 1}, device=device, exact=True)
        team = _Team(cohort, list(range(len(learners))))
        return [team.advance()[0] for _ in range(steps)], cohort.bank.param.cpu()

    losses, weights = trained(learners, "cpu")
    with pretended_gpu(monkeypatch):
        there, together = trained(learners, GPU)
        _, alone = trained(learners[:1], GPU)
    assert there == pytest.approx(losses, rel=1e-5)
    assert (together - weights).norm() < 1e-5 * weights.norm()
    assert torch.equal(together[0], alone[0])


def test_scoring_waits_once(monkeypatch):
    corpus = ToyCorpus(("aa", "bb"), sentences=6)
    with pretended_gpu(monkeypatch) as gpu:
        cohort = cohort_of(SIX[:2], corpus, {"num_hidden_layers": 1}, device=GPU)
        gpu.waits.clear()
        counts = evaluate(cohort.model, cohort.bank, corpus, [(0, "aa"), (1, "bb")], pass_tokens=20)
    assert counts.shape == (2, 3) and gpu.waits == [("aten._to_copy", "evaluate.py:evaluate")], (
        "for the counts, behind all passes"
    )
