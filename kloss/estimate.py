"""What a run will take: who trains what, and estimates of memory and time."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from .cl.backbone import DTYPES, tiny_config
from .cl.banks import row_of
from .cl.corpus import Corpus
from .cl.learner import ALL, Learner
from .cl.resume import score_every
from .cl.rule_costs import RuleWork, rule_memory, rule_work
from .cl.shares import Limits, Stage, cohorts_of, costs_of, stages
from .cl.strategies import STRATEGIES
from .cl.stream import Stream
from .cl.study import Study
from .config import Config
from .errors import UserError
from .files import read_json, shown, user_path
from .machine import memory_of_host
from .models import AdapterBank, XLMRConfig, XLMRForTokenClassification
from .models.architecture import from_config
from .pace import GPUS, lora_beside, measured, seconds, timed_here

# Share of the memory that a cohort of adapters may fill. When half of it have ended, the rest are copied into another bank.
FULL = 0.4


class Machine(NamedTuple):
    """What trains a study.

    processes: each with a device of its own.
    memory: of one device, in bytes.
    gpu: the key in GPUS of one whose pace is known; "": another one, or a CPU.
    """

    processes: int
    device: str  # cuda or cpu
    memory: int
    gpu: str = ""

    @classmethod
    def of(cls, device: torch.device, processes: int = 1) -> "Machine":
        """This one."""
        on_gpu = device.type == "cuda"
        memory = torch.cuda.get_device_properties(device).total_memory if on_gpu else memory_of_host()
        return cls(processes, device.type, memory)

    @classmethod
    def named(cls, name: str) -> "Machine":
        """That of --plan-for, such as 8xh200. Raises UserError for another form."""
        match = re.fullmatch(rf"([1-9]\d{{0,4}})x({'|'.join(GPUS)})", name)
        if match is None:
            kinds = ", ".join(GPUS)
            raise UserError(f"--plan-for must be a number of GPUs and one of {kinds}, such as 8xh200; got {shown(name)}")
        return cls(int(match[1]), "cuda", GPUS[match[2]] << 30, match[2])


def plan_for(config: Config, corpus: Corpus, study: Study, sizes: XLMRConfig | None, machine: Machine) -> list[Stage]:
    """Return which process trains what, in cohorts that fit the memory. sizes: of the backbone; None: not known."""
    item = DTYPES[config.dtype].itemsize
    each = _state_bytes(item)

    def fit(learner: Learner, rank: int) -> int:
        assert sizes is not None
        return int(FULL * machine.memory / (each * row_of(sizes, learner, rank)))

    limits = Limits(config.max_learners, Limits().fit if sizes is None else fit, config.exact)
    costs = costs_of(study, corpus, machine.device) if machine.processes > 1 else ()
    return stages(study, limits, costs, machine.processes)


def _state_bytes(itemsize: int) -> int:
    """Bytes of a trained weight: master and moments in fp32, gradient, and the working copy where that is another."""
    return 12 + itemsize * (2 if itemsize < 4 else 1)


def describe(config: Config, corpus: Corpus, study: Study, machine: Machine) -> list[tuple[str, str]]:
    """Return the plan of a run as (heading, text) lines."""
    utterances = sum(corpus.sentences(locale, "train").number for locale in corpus.locales)
    work = _work(config, corpus, study)
    languages, labels = len(corpus.locales), len(corpus.labels)
    lines = [
        ("corpus", f"{corpus.name}: {languages} languages, {utterances} training utterances, {labels} labels"),
        ("strategies", ", ".join(STRATEGIES[name].name for name in config.strategies)),
        ("trials", f"{len(study.trials)} score matrices from {len(study.learners)} learners, each trained once"),
    ]
    if math.isinf(config.max_norm):
        lines.append(("gradient clipping", "off (--max-norm inf)"))
    backbone = _sizes(config, corpus)
    plan = plan_for(config, corpus, study, backbone, machine)
    lines += _who(study, plan, work, backbone)
    lines.append(("scoring", f"{sum(work.scored)} tokens"))
    chosen = with_pass_tokens(config, study, plan, backbone, machine)
    if chosen != config:
        lines.append(("a pass", f"{chosen.pass_tokens} tokens, by the device's memory (--pass-tokens 0)"))
        config = chosen
    if backbone is not None:
        lines += _memory(config, corpus, study, plan, backbone)
    if machine.device == "cpu":
        lines.append(("threads", f"{torch.get_num_threads()} (--threads)"))
    if backbone is not None and not (machine.device == "cuda" and not machine.gpu):
        lines.append(("time", _time(config, study, plan, work, backbone, machine)))
    return lines


class _Work(NamedTuple):
    """Of each learner."""

    steps: list[int]
    tokens: list[int]
    scored: list[int]  # tokens
    rules: list[RuleWork]


def _work(config: Config, corpus: Corpus, study: Study) -> _Work:
    tokenizers, every_one = {learner.tokenizer for learner in study.learners}, corpus.locales
    sizes = {
        name: {locale: len(corpus.under(name).sentences(locale, config.eval_split).input_ids) for locale in every_one}
        for name in tokenizers
    }
    work = _Work([], [], [], [])
    for learner, table, every in zip(study.learners, study.to_score, score_every(config, study), strict=True):
        stream = Stream.of(corpus, learner)
        within = [locale for i in stream.marks(every).values() for locale in table.get(i + 1, ())]
        ends = [locale for row in table.values() for locale in row]
        work.steps.append(stream.steps())
        work.tokens.append(stream.tokens())
        work.rules.append(rule_work(corpus, learner))
        work.scored.append(sum(sizes[learner.tokenizer][locale] for locale in (*ends, *within)))
    return work


def _who(study: Study, plan: Sequence[Stage], work: _Work, backbone: XLMRConfig | None) -> list[tuple[str, str]]:
    """Lines for who trains what: a few cohorts one by one, many by process."""
    processes = len(plan[0].shares)
    shares = [[cohort for stage in plan for cohort in stage.shares[p].cohorts] for p in range(processes)]
    if processes == 1 and len(shares[0]) <= 8:
        lines = []
        for number, members in enumerate(shares[0], 1):
            besides, rounds = sum(work.rules[g].tokens for g in members), max(work.steps[g] for g in members)
            total = sum(work.tokens[g] for g in members) + besides
            of_rules = f" ({besides} of them for rules)" if besides else ""
            lines.append((f"cohort {number}", f"{len(members)} learners, {rounds} rounds, {total} tokens{of_rules}"))
        return lines

    def span(values: Sequence[int]) -> str:
        least, most = f"{min(values):,}", f"{max(values):,}"
        return least if least == most else f"{least} to {most}"

    learners = [sum(map(len, share)) for share in shares]
    tokens = [sum(work.tokens[g] for members in share for g in members) for share in shares]
    adapters = [len(cohort) for share in shares for cohort in share if study.learners[cohort[0]].rank is not None]
    models = sum(learner.rank is None for learner in study.learners)
    text = f"{processes:,}: each {span(learners)} learners, {span(tokens)} tokens"
    kinds = [f"at most {max(adapters):,} adapters together"] if adapters else []
    kinds += [f"{models:,} whole models, one at a time in each process"] if models else []
    return [("processes", text), ("cohorts", "; ".join(kinds))]


def _time(config: Config, study: Study, plan: Sequence[Stage], work: _Work, sizes: XLMRConfig, machine: Machine) -> str:
    """How long the job takes, by simulation of its processes, who wait for each other where forks begin."""
    ranks = [learner.rank for learner in study.learners if learner.rank is not None]
    here = timed_here(sizes) if not machine.gpu else None

    def of_cohort(members: Sequence[int]) -> float:
        rank = study.learners[members[0]].rank
        pace = here or measured(machine.gpu, sizes, rank or 32)
        steps, tokens = [work.steps[g] for g in members], [work.tokens[g] for g in members]
        if here and rank:
            pace = here._replace(token=here.token * (1 + lora_beside(sizes, rank)))
        trained = seconds(pace, steps, tokens, config.pass_tokens or Config.pass_tokens, whole=rank is None)
        of_rules = sum(pace.token * work.rules[g].tokens + pace.step * work.rules[g].passes for g in members)
        return trained + of_rules + pace.scored * sum(work.scored[g] for g in members)

    whole, busy, since = 0.0, 0.0, [0.0] * machine.processes
    for stage in plan:
        if stage.forks:
            whole, since = whole + max(since), [0.0] * machine.processes
        for process, share in enumerate(stage.shares):
            own = sum(map(of_cohort, share.cohorts))
            since[process], busy = since[process] + own, busy + own
    whole += max(since)
    source = (here or measured(machine.gpu, sizes, max(ranks, default=32))).source
    after = " after the backbone's warm-up" if config.backbone == "tiny" else ""
    name = f"{machine.processes:,} {machine.gpu.upper()}" if machine.gpu else "this machine"
    idle = 1 - busy / (whole * machine.processes) if whole else 0.0
    idle_text = f", which are idle for {idle:.0%} of it" if machine.processes > 1 else ""
    return f"about {_duration(whole)} on {name}{idle_text}{after} (an estimate from {source})"


def _duration(whole: float) -> str:
    if whole < 7200:
        return f"{whole / 60:.1f} minutes"
    return f"{whole / 3600:.1f} hours" if whole < 2 * 86400 else f"{whole / 86400:.1f} days"


def _sizes(config: Config, corpus: Corpus) -> XLMRConfig | None:
    """Return the backbone's sizes; None for one on the hub, which a plan does not load."""
    if config.backbone == "tiny":
        return tiny_config(config, corpus)
    file = user_path(config.backbone, "--backbone") / "config.json"
    return replace(from_config(read_json(file), config.backbone), num_labels=len(corpus.labels)) if file.is_file() else None


def check_patterns(config: Config, corpus: Corpus, study: Study) -> None:
    """Raise UserError for a pattern that is used and matches no part of an adapter, unless the backbone is still on the hub."""
    used = {"--trains": config.trains} if any(learner.trains != ALL for learner in study.learners) else {}
    used |= {"--shared-parts": config.shared_parts} if any(learner.takes != ALL for learner in study.learners) else {}
    sizes = _sizes(config, corpus) if used else None
    if sizes is None:
        return
    for flag, patterns in used.items():
        try:
            AdapterBank.check_patterns(sizes, patterns)
        except UserError as error:
            raise UserError(f"{flag}: {error}") from error


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


def with_pass_tokens(config: Config, study: Study, plan: Sequence[Stage], sizes: XLMRConfig | None, machine: Machine) -> Config:
    """Return the configuration with a number for pass_tokens 0.

    sizes: of the backbone; None: not known, which leaves it.
    On a GPU three fifths of what weights, gradients and moments leave of its memory are filled with what passes keep for
    backward. Not what is free at the moment: a run that goes on must cut the same passes.
    """
    if config.pass_tokens or sizes is None:
        return config
    if machine.device == "cpu":
        return replace(config, pass_tokens=Config.pass_tokens)
    item, rooms = DTYPES[config.dtype].itemsize, []
    for members, rank in cohorts_of(plan):
        learners = [study.learners[g] for g in members]
        width = row_of(sizes, learners[0], rank) if rank else sum(p.numel() for p in _parameters(sizes))
        state = len(members) * width * _state_bytes(item)
        kept = sum(kept_per_token(sizes, _kept_rank(learners, rank), item).values())
        rooms.append(0.6 * (machine.memory - state) / kept)
    return replace(config, pass_tokens=max(1024, int(min(rooms))))


def _kept_rank(learners: Sequence[Learner], rank: int | None) -> int:
    """Of how many ranks a pass of a bank of this rank keeps A x: a fusion has those of all its donors."""
    return (rank or 0) * max(1, *(len(learner.donors) for learner in learners))


def _parameters(sizes: XLMRConfig) -> list[torch.nn.Parameter]:
    """Return the parameters of a model, without memory."""
    with torch.device("meta"):
        return list(XLMRForTokenClassification(sizes).parameters())


def _memory(config: Config, corpus: Corpus, study: Study, plan: Sequence[Stage], sizes: XLMRConfig) -> list[tuple[str, str]]:
    """Lines for what a process's device holds at most: weights and their optimiser, and what a pass keeps for backward."""
    item = DTYPES[config.dtype].itemsize
    used = replace(sizes, vocab_size=min(sizes.vocab_size, len(corpus.words())))  # of the embeddings
    frozen = sum(p.numel() for p in _parameters(used)) * item
    found = []
    for members, rank in cohorts_of(plan):
        learners = [study.learners[g] for g in members]
        batches = [Stream.of(corpus, learner).batch_tokens() for learner in learners]
        tokens = max(*batches, min(sum(batches), config.pass_tokens or Config.pass_tokens))
        kept = kept_per_token(sizes, _kept_rank(learners, rank), item)
        width = row_of(sizes, learners[0], rank) if rank else frozen // item
        state = len(members) * width * _state_bytes(item) - (0 if rank else frozen)  # a whole model's working copy is the model
        state += rule_memory(learners, width, item)
        found.append((state + tokens * sum(kept.values()), state, tokens, kept, len(members)))
    total, state, tokens, kept, size = max(found, key=lambda item: item[0])
    most = sorted(kept, key=lambda name: -kept[name])[:3]
    parts = ", ".join(f"{name} {kept[name] / sum(kept.values()):.0%}" for name in most)
    each = sum(kept.values()) / 1024
    parts_of = f"the model {_size(frozen)}, weights, gradients and moments {_size(state)}, a pass {_size(total - state)}"
    return [
        ("memory", f"about {_size(frozen + total)} with the largest cohort ({size:,} learners): {parts_of}"),
        ("kept for backward", f"{tokens:.0f} tokens of {each:.1f} KiB in the largest pass ({parts})"),
    ]


def _size(count: float) -> str:
    if count < 10 * 2**20:
        return f"{count / 2**20:.1f} MiB"
    return f"{count / 2**20:.0f} MiB" if count < 10 * 2**30 else f"{count / 2**30:.0f} GiB"
