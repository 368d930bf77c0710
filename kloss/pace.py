"""How long training takes: by products timed on this machine, or by steps that were measured on a GPU once."""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .models import BASE, XLMRConfig

CALLS = 1200  # host cost of one layer per step, in units of one tiny `add`; measured 4 ms / 3.4 µs
GPUS = {"h100": 78, "h200": 139}  # GiB of memory
# Seconds of a step of XLM-R base in bf16, 32 utterances an adapter (bench/LOG.md, 2026-11-26): one adapter, 333 tokens;
# 52 of r=32, 19,480 tokens; 52 of r=256.
STEPS = {"h100": (3.3e-3, 28.8e-3, 61.6e-3), "h200": (3.3e-3, 25.7e-3, 52.1e-3)}


class Pace(NamedTuple):
    """Seconds.

    step: of a pass, whatever it holds.
    token: of a token trained by an adapter.
    scored: of a token scored.
    whole: of a step of a whole model, beside `step`; its tokens take half as long again, as its weights have gradients.
    source: where these come from.
    """

    step: float
    token: float
    scored: float
    whole: float
    source: str


def timed_here(sizes: XLMRConfig) -> Pace:
    """From a product and a small call timed on this machine's CPU, and 4 FLOPs per weight and trained token, 2 per scored one.

    A factor of 2 covers all work on tokens other than products.
    """
    width, inner = sizes.hidden_size, sizes.intermediate_size
    x, weight, small = (torch.randn(rows, width, dtype=torch.float32) for rows in (4096, inner, 1))
    started = time.perf_counter()
    for _ in range(10):
        x @ weight.t()
    multiplied = time.perf_counter()
    for _ in range(CALLS):
        small + small
    overhead = time.perf_counter() - multiplied
    flops = 10 * 2 * x.numel() * inner / (multiplied - started)
    scored = 2 * 2 * _weights(sizes) / flops
    return Pace(sizes.num_hidden_layers * overhead, 2 * scored, scored, 0.0, "products timed here")


def lora_beside(sizes: XLMRConfig, rank: int) -> float:
    """What LoRA adds to the products of `timed_here`, as a share of a trained token: 6 FLOPs per weight of its own."""
    own = sizes.num_hidden_layers * rank * (10 * sizes.hidden_size + 2 * sizes.intermediate_size)
    return 6 * own / (2 * 4 * _weights(sizes))


def measured(gpu: str, sizes: XLMRConfig, rank: int) -> Pace:
    """From whole steps of XLM-R base in bf16 on one such GPU: `STEPS`; between their ranks by interpolation.

    Other sizes are taken in proportion to layers (a step) and weights (a token), scoring as a third of training, and the update
    of a whole model as 26 bytes a weight at 2.5 TB/s: none of this was measured.
    """
    (one, at_32, at_256), tokens, all_tokens = STEPS[gpu], 333, 19_480
    slope = [(many - one) / (all_tokens - tokens) for many in (at_32, at_256)]
    token = slope[0] + (slope[1] - slope[0]) * min(max(rank - 32, 0), 224) / 224
    layers, weights = sizes.num_hidden_layers / BASE.num_hidden_layers, _weights(sizes) / _weights(BASE)
    whole = 26 * (_weights(sizes) + sizes.vocab_size * sizes.hidden_size) / 2.5e12
    step = layers * (one - tokens * slope[0])
    return Pace(step, weights * token, weights * token / 3, whole, f"steps of base size measured on an {gpu.upper()}")


def _weights(sizes: XLMRConfig) -> int:
    """In the linear layers of the encoder."""
    width, inner = sizes.hidden_size, sizes.intermediate_size
    return sizes.num_hidden_layers * (4 * width * width + 2 * width * inner)


def seconds(pace: Pace, steps: Sequence[int], tokens: Sequence[int], pass_tokens: int, *, whole: bool) -> float:
    """Time that a cohort trains.

    steps, tokens: of each learner. They advance together, a batch of each a step, and the shorter ones end earlier.
    whole: the cohort is one learner that trains the whole model.
    """
    if whole:
        return steps[0] * (pace.step + pace.whole) + 1.5 * pace.token * tokens[0]
    total, before, batch = pace.token * sum(tokens), 0, sum(t / n for n, t in zip(steps, tokens, strict=True))
    for number, count in sorted(zip(steps, tokens, strict=True)):
        total += (number - before) * math.ceil(batch / pass_tokens) * pace.step if number > before else 0
        before, batch = number, batch - count / number
    return total
