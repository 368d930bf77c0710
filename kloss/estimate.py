"""What a run will take: its learners, steps and tokens, and estimates of memory and time."""

import math
import time
from dataclasses import replace

import torch

from .cl.backbone import DTYPES, tiny_config
from .cl.corpus import Corpus
from .cl.runner import cohorts_of, score_every
from .cl.strategies import STRATEGIES
from .cl.stream import Stream
from .cl.study import Study
from .config import Config
from .files import read_json, user_path
from .models import AdapterBank, XLMRConfig, XLMRForTokenClassification
from .models.architecture import from_config

CALLS = 1200  # host cost of one layer per step, in units of one tiny `add`; measured 4 ms / 3.4 µs


def describe(config: Config, corpus: Corpus, study: Study, on_gpu: int | None = None) -> list[tuple[str, str]]:
    """Return the plan of a run as (heading, text) lines. on_gpu: bytes of memory that a GPU has; None: on a CPU."""
    utterances = sum(corpus.sentences(locale, "train").number for locale in corpus.locales)
    tokens = [Stream.of(corpus, learner).tokens() for learner in study.learners]
    scored = 0
    for learner, table, every in zip(study.learners, study.to_score, score_every(config, study), strict=True):
        own, marks = corpus.under(learner.tokenizer), Stream.of(corpus, learner).marks(every)
        locales = [locale for row in table.values() for locale in row]
        locales += [locale for i in marks.values() for locale in table.get(i + 1, ())]
        scored += sum(len(own.sentences(locale, config.eval_split).input_ids) for locale in locales)
    languages, labels = len(corpus.locales), len(corpus.labels)
    lines = [
        ("corpus", f"{corpus.name}: {languages} languages, {utterances} training utterances, {labels} labels"),
        ("strategies", ", ".join(STRATEGIES[name].name for name in config.strategies)),
        ("trials", f"{len(study.trials)} score matrices from {len(study.learners)} learners, each trained once"),
    ]
    if math.isinf(config.max_norm):
        lines.append(("gradient clipping", "off (--max-norm inf)"))
    backbone = _sizes(config, corpus)
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
    chosen = with_pass_tokens(config, study, backbone, on_gpu)
    if chosen != config:
        lines.append(("a pass", f"{chosen.pass_tokens} tokens, by the device's memory (--pass-tokens 0)"))
        config = chosen
    if backbone is not None and config.pass_tokens:
        lines.append(("kept for backward", _kept(config, corpus, study, backbone)))
    lines.append(("threads", f"{torch.get_num_threads()} (--threads)"))
    if backbone is not None:
        seconds = estimated_seconds(backbone, rounds, sum(tokens), scored)
        after = " after the backbone's warm-up" if config.backbone == "tiny" else ""
        lines.append(("time", f"about {seconds / 60:.1f} minutes on this machine{after} (an estimate)"))
    return lines


def _sizes(config: Config, corpus: Corpus) -> XLMRConfig | None:
    """Return the backbone's sizes; None for one on the hub, which a plan does not load."""
    if config.backbone == "tiny":
        return tiny_config(config, corpus)
    file = user_path(config.backbone, "--backbone") / "config.json"
    return replace(from_config(read_json(file), config.backbone), num_labels=len(corpus.labels)) if file.is_file() else None


def kept_per_token(sizes: XLMRConfig, rank: int, itemsize: int) -> dict[str, int]:
    """Return the bytes that a pass keeps of each token until its backward, by tensor, with csrc's kernels and dropout.

    rank: R of the bank, whose adapters are on all linear layers; 0: none.
    itemsize: bytes of an element in the model's dtype.
    """
    width, inner, layers = sizes.hidden_size, sizes.intermediate_size, sizes.num_hidden_layers
    elements = {
        "feed-forward, before and after GELU": 2 * layers * inner,
        "q, k, v": 3 * layers * width,
        "inputs of layers and feed-forwards": (2 * layers + 1) * width,
        "outputs of attention": layers * width,
        "what norms normalise": 2 * layers * width,
        "LoRA's A x": 6 * layers * rank,  # q, k, v, out, up, down
        "logits": sizes.num_labels,
    }
    sites, statistics = 7 * layers + 2, 16 * layers + 8  # two numbers of each norm and of the loss
    lists = 8 + 4 + 8 + 8  # order, adapter, label, dropout's limits
    others = {"keys, statistics, lists": 8 * sites + statistics + lists}
    return {name: count * itemsize for name, count in elements.items()} | others


def with_pass_tokens(config: Config, study: Study, sizes: XLMRConfig | None, memory: int | None) -> Config:
    """Return the configuration with a number for pass_tokens 0.

    sizes: of the backbone; None: not known, which leaves it.
    memory: bytes that a GPU has; None: on a CPU. Three fifths of what weights, gradients and moments leave are filled with what
        passes keep for backward. Not what is free at the moment: a run that goes on must cut the same passes.
    """
    if config.pass_tokens or sizes is None:
        return config
    if memory is None:
        return replace(config, pass_tokens=Config.pass_tokens)
    item, rooms = DTYPES[config.dtype].itemsize, []
    for members in cohorts_of(study, config.max_learners):
        ranks = [rank for rank in (study.learners[g].rank for g in members) if rank is not None]
        width = AdapterBank.width_of(sizes, max(ranks)) if ranks else sum(p.numel() for p in _parameters(sizes))
        state = len(members) * width * (12 + 2 * item)  # master and moments in fp32, working copy and gradient
        kept = sum(kept_per_token(sizes, max(ranks, default=0), item).values())
        rooms.append(0.6 * (memory - state) / kept)
    return replace(config, pass_tokens=max(1024, int(min(rooms))))


def _parameters(sizes: XLMRConfig) -> list[torch.nn.Parameter]:
    """Return the parameters of a model, without memory."""
    with torch.device("meta"):
        return list(XLMRForTokenClassification(sizes).parameters())


def _kept(config: Config, corpus: Corpus, study: Study, backbone: XLMRConfig) -> str:
    """Return what the largest pass keeps for backward, in words."""
    passes = []
    for members in cohorts_of(study, config.max_learners):
        learners = [study.learners[g] for g in members]
        batches = [Stream.of(corpus, learner).batch_tokens() for learner in learners]
        rank = max(learner.rank or 0 for learner in learners)
        tokens = max(*batches, min(sum(batches), config.pass_tokens))
        kept = kept_per_token(backbone, rank, DTYPES[config.dtype].itemsize)
        passes.append((tokens * sum(kept.values()), tokens, kept))
    total, tokens, kept = max(passes, key=lambda item: item[0])
    most = sorted(kept, key=lambda name: -kept[name])[:3]
    parts = ", ".join(f"{name} {kept[name] / sum(kept.values()):.0%}" for name in most)
    each = sum(kept.values()) / 1024
    return f"about {total / 2**20:.0f} MiB in the largest pass: {tokens:.0f} tokens of {each:.1f} KiB ({parts})"


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
