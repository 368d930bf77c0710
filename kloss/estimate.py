"""What a run will take: its learners, steps and tokens, and estimates of memory and time."""

import math
import time

import torch

from .cl.backbone import tiny_config
from .cl.corpus import Corpus
from .cl.runner import cohorts_of
from .cl.strategies import STRATEGIES
from .cl.stream import Stream
from .cl.study import Study
from .config import Config
from .models import AdapterBank, XLMRConfig

CALLS = 1200  # host cost of one layer per step, in units of one tiny `add`; measured 4 ms / 3.4 µs


def describe(config: Config, corpus: Corpus, study: Study) -> list[tuple[str, str]]:
    """Return the plan of a run as (heading, text) lines."""
    utterances = sum(corpus.sentences(locale, "train").number for locale in corpus.locales)
    tokens = [Stream.of(corpus, learner).tokens() for learner in study.learners]
    locales = [locale for table in study.to_score for row in table.values() for locale in row]
    scored = sum(len(corpus.sentences(locale, "test").input_ids) for locale in locales)
    languages, labels = len(corpus.locales), len(corpus.labels)
    lines = [
        ("corpus", f"{corpus.name}: {languages} languages, {utterances} training utterances, {labels} labels"),
        ("strategies", ", ".join(STRATEGIES[name].name for name in config.strategies)),
        ("trials", f"{len(study.trials)} score matrices from {len(study.learners)} learners, each trained once"),
    ]
    if math.isinf(config.max_norm):
        lines.append(("gradient clipping", "off (--max-norm inf)"))
    backbone = tiny_config(config, corpus) if config.backbone == "tiny" else None
    rounds = 0
    for number, members in enumerate(cohorts_of(study, config.max_learners), 1):
        learners = [study.learners[g] for g in members]
        steps = max(Stream.of(corpus, learner).steps() for learner in learners)
        rounds += steps
        memory, ranks = "", [learner.rank for learner in learners if learner.rank is not None]
        if backbone is not None and ranks:
            mib = len(members) * AdapterBank.width_of(backbone, max(ranks)) * 16 / 2**20
            memory = f", {mib:.0f} MiB of weights, gradients and moments"
        total = sum(tokens[g] for g in members)
        lines.append((f"cohort {number}", f"{len(members)} learners, {steps} rounds, {total} tokens{memory}"))
    lines.append(("scoring", f"{scored} tokens"))
    lines.append(("threads", f"{torch.get_num_threads()} (--threads)"))
    if backbone is not None:
        seconds = estimated_seconds(backbone, rounds, sum(tokens), scored)
        lines.append(("time", f"about {seconds / 60:.1f} minutes on this machine after the backbone's warm-up (an estimate)"))
    return lines


def estimated_seconds(backbone: XLMRConfig, rounds: int, trained: int, scored: int) -> float:
    """Estimate a run's time: 2 × matmul FLOPs / measured FLOP/s + host overhead per layer and round.

    The factor 2 covers all work on tokens other than matmuls.
    trained, scored: number of tokens, at 4 FLOPs per weight (forward and backward) and 2 (forward).
    """
    width, inner, layers = backbone.hidden_size, backbone.intermediate_size, backbone.num_hidden_layers
    x, weight, small = (torch.randn(rows, width, dtype=torch.float32) for rows in (4096, inner, 1))
    started = time.perf_counter()
    for _ in range(10):
        x @ weight.t()
    multiplied = time.perf_counter()
    for _ in range(CALLS):
        small + small
    overhead = time.perf_counter() - multiplied
    speed = 10 * 2 * x.numel() * inner / (multiplied - started)
    weights = layers * (4 * width * width + 2 * width * inner)
    return 2 * (trained * 4 + scored * 2) * weights / speed + rounds * layers * overhead
