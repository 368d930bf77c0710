"""What --dry-run says of memory is what a pass keeps."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy import ToyCorpus

from bench.whole_step import make_step
from kloss.cl.languages import LOCALES
from kloss.cl.learner import Learner
from kloss.cl.shares import alone, cohorts_of
from kloss.cl.study import Study, plan
from kloss.config import Config
from kloss.errors import UserError
from kloss.estimate import FULL, Machine, _sizes, describe, kept_per_token, plan_for, with_pass_tokens
from kloss.kernels.cpu_library import built
from kloss.models import BASE, TINY, AdapterBank, XLMRForTokenClassification
from kloss.pace import Pace, measured, seconds, timed_here


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
    assert _sizes(Config(backbone=str(tmp_path)), corpus) == replace(sizes, num_labels=3)
    assert _sizes(Config(backbone="some/one"), corpus) is None


def test_passes_fill_a_gpus_memory_and_no_more():
    """Kept tensors, weights and moments fit; more memory holds more tokens; a given number stays."""
    config = Config(pass_tokens=0, dtype="bf16", rank=(32,))
    sizes = replace(BASE, num_labels=111)
    study = plan(config, LOCALES)
    state = len(study.learners) * AdapterBank.width_of(sizes, 32) * 16
    kept = sum(kept_per_token(sizes, 32, 2).values())

    def tokens(config, free, device="cuda"):
        study = plan(config, LOCALES)
        return with_pass_tokens(config, study, alone(config, study), sizes, Machine(1, device, free)).pass_tokens

    chosen = [tokens(config, free) for free in (20 << 30, 80 << 30, 141 << 30)]
    for number, free in zip(chosen, (20 << 30, 80 << 30, 141 << 30), strict=True):
        assert 0.59 * (free - state) < number * kept < 0.61 * (free - state)
    assert 1024 < chosen[0] < chosen[1] < chosen[2]
    assert tokens(config, 1 << 20) == 1024
    assert tokens(config, 80 << 30, "cpu") == Config.pass_tokens
    assert tokens(replace(config, pass_tokens=7), 80 << 30) == 7
    assert tokens(replace(config, strategies=("vanilla",)), 20 << 30) > 1024
    single, number = replace(config, dtype="fp32"), len(study.learners) * AdapterBank.width_of(sizes, 32)
    state_single, kept_single = number * 16, sum(kept_per_token(sizes, 32, 4).values())  # the master copy is the working copy
    assert tokens(single, 80 << 30) == int(0.6 * ((80 << 30) - state_single) / kept_single)


def test_cohorts_fit_the_memory_and_hold_like_ranks():
    """128 learners of rank 4 and as many of rank 32 in a memory for some tens of the larger ones."""
    sizes = replace(BASE, num_labels=111)
    config = Config(rank=(32, 4), strategies=("non-shared",), seeds=2, dtype="bf16")
    study, corpus = plan(config, LOCALES), ToyCorpus()
    memory = 12 << 30
    cohorts = cohorts_of(plan_for(config, corpus, study, sizes, Machine(1, "cuda", memory)))
    assert sorted(g for members, _ in cohorts for g in members) == list(range(len(study.learners)))
    for members, rank in cohorts:
        assert rank == max(study.learners[g].rank for g in members)
        assert len(members) * AdapterBank.width_of(sizes, rank) * 16 <= FULL * memory
    assert {4, 32} == {rank for _, rank in cohorts} and len(cohorts) < 12
    most = plan_for(replace(config, max_learners=100), corpus, study, sizes, Machine(1, "cuda", memory))
    assert [len(members) for members, _ in cohorts_of(most)] == [100, 100, 8]
    exact = cohorts_of(plan_for(replace(config, exact=True), corpus, study, sizes, Machine(1, "cuda", memory)))
    assert {rank for _, rank in exact} == {32}


def test_time_of_a_cohort_counts_passes_and_tokens():
    """The last of two learners trains alone; a round of more tokens than a pass holds takes several."""
    pace = Pace(step=1.0, token=0.01, scored=0.0, whole=3.0, source="")
    assert seconds(pace, [10, 30], [1000, 3000], 8192, whole=False) == pytest.approx(30 + 40)
    assert seconds(pace, [10, 30], [1000, 3000], 150, whole=False) == pytest.approx(10 * 2 + 20 + 40)
    assert seconds(pace, [10], [1000], 150, whole=True) == pytest.approx(10 * 4 + 15)
    here = timed_here(replace(BASE, num_labels=111))
    assert 0 < here.scored < here.token and here.step > 0


@pytest.mark.parametrize(("gpu", "one", "at_32", "at_256"), [("h100", 3.3, 28.8, 61.6), ("h200", 3.3, 25.7, 52.1)])
def test_a_gpu_s_pace_gives_the_steps_that_were_measured_on_it(gpu, one, at_32, at_256):
    r32, r144, r256 = (measured(gpu, BASE, rank) for rank in (32, 144, 256))
    batches = [19_480 / 52] * 52
    assert seconds(r32, [1] * 52, batches, 1 << 20, whole=False) == pytest.approx(at_32 / 1000, rel=0.01)
    assert seconds(r256, [1] * 52, batches, 1 << 20, whole=False) == pytest.approx(at_256 / 1000, rel=0.02)
    assert seconds(r32, [1], [333], 1 << 20, whole=False) == pytest.approx(one / 1000, rel=0.01)
    assert r144.token == pytest.approx((r32.token + r256.token) / 2) and gpu.upper() in r32.source


def test_the_plan_of_a_job_says_how_long_it_idles():
    """Two processes, one learner ten times as long as the other two: one process waits."""
    config, corpus = Config(), ToyCorpus()
    learner = Learner(experiences=(("aa",),), rank=4, alpha=4.0, lr=1e-3, seed=0, epochs=2, batch_size=4)
    study = Study([], [replace(learner, epochs=20), replace(learner, seed=1), replace(learner, seed=2)], [{}, {}, {}])
    text = dict(describe(config, corpus, study, Machine(2, "cuda", 80 << 30, "h100")))
    assert text["processes"].startswith("2: each 1 to 2 learners, ")
    assert "2 H100" in text["time"] and "idle for 4" in text["time"] and "measured on an H100" in text["time"]
    assert "idle" not in dict(describe(config, corpus, study, Machine(1, "cuda", 80 << 30, "h100")))["time"]
    with pytest.raises(UserError, match="--plan-for must be a number of GPUs"):
        Machine.named("8xtpu")
    assert Machine.named("8xh200") == Machine(8, "cuda", 139 << 30, "h200")


PEAK = """
import re, sys
from kloss import run
from kloss.cl import runner
from kloss.console import Silent
from kloss.estimate import Machine, describe

def peak():  # not getrusage's, which has that of the process before exec too
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024

config, before, make = run.parse(sys.argv[1:]).checked(), [], runner._Job._cohort
runner._Job._cohort = lambda *arguments: before.append(peak()) or make(*arguments)
account = dict(describe(config, *run.prepare(config, Silent()), Machine(1, "cpu", 20 << 30)))["memory"]
run.run(config, Silent())
print(re.search(r"about (\\d+) MiB", account)[1], peak() - before[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_the_account_of_memory_is_what_a_run_takes(tmp_path):
    flags = ["--languages", "en-US", "de-DE", "ja-JP", "--limit", "16", "--eval-limit", "4", "--epochs", "1", "--seeds", "4"]
    flags += ["--strategies", "non-shared", "--rank", "256", "--pretrain-steps", "1", "--experiments", "--out", f"{tmp_path}/run"]
    command = [sys.executable, "-c", PEAK, *flags, "--cache", f"{tmp_path}/cache"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    account, taken = map(float, done.stdout.split())
    assert account > 400 and 0.8 < taken / account < 1.25, (account, taken)
