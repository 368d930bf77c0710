"""What configures a run: one frozen dataclass. A preset (`presets.py`) returns one, a flag overrides it, nothing else does."""

import math
import os
from dataclasses import Field, dataclass, field, fields, replace
from typing import Annotated, Any, Literal, get_args

from tyro.conf import arg

from .errors import UserError
from .files import shown, user_path

StrategyName = Literal["non-shared", "shared", "partial", "lora-multi", "vanilla", "multi", "mono"]
ExperimentName = Literal[
    "where", "damage", "merge", "order", "pairs", "rates", "ranks", "weights", "remedies", "methods", "savings", "scripts",
    "tokenizer", "mechanism", "parts",
]  # fmt: skip
_NOT_IDENTITY = {"identity": False}  # marks a setting that changes no figure
# Marks one that older run folders do not name: they have its default or, if they ask its experiment "of", the one "before".
_LATER = {"later": True}
_REMEDIES = ("replay=0.2", "a-gem=0.2", "l2=0.03", "ewc=0.01", "lr-adjust=0.7")
LIMITS = {  # numbers -> their least and most value; what fp32 or int64 cannot hold lies outside
    "rank tiny_layers seeds orders": (1, 10_000),
    "tiny_hidden": (1, 4096),  # estimating the time of wider layers takes minutes
    "epochs batch_size pretrain_batch limit eval_limit": (1, 1_000_000_000),
    "pass_tokens": (0, 1_000_000_000),
    "max_length": (3, 1_000_000),  # room for <s>, a subword and </s>
    "vocabulary": (7, 1_000_000),  # five special tokens and two characters
    "score_every warmup pretrain_steps max_learners checkpoint_seconds": (0, 1_000_000_000),
    "threads": (0, 1024),
    "seed init_seed dropout_seed": (0, 2**62),
    "dropout lora_dropout": (0, 0.999),
    "overlap relatedness": (0, 1),
    "lr full_lr": (1e-30, 1e30),
    "head_lr alpha weight_decay": (0, 1e30),
    "max_norm": (1e-30, float("inf")),
}
MOST_MATRICES = 10_000  # score matrices of a study; each takes about a millisecond to plan


# The comment behind a field, or above it, is its text in --help; a class's docstring is its section's.
@dataclass(frozen=True)
class DataConfig:
    """Utterances, tokenizer and backbone."""

    data: str = "synthetic"  # `synthetic`, a folder of MASSIVE's jsonl files, a .tar.gz or .tar.xz of them, or a hub id
    tokenizer: str | None = None  # folder or hub name; None: the backbone's or, for `tiny`, one trained on the data
    # A folder in transformers' format, a hub name, or `tiny`: a small XLM-R warmed up on the training text.
    backbone: str = "tiny"
    languages: tuple[str, ...] = ()  # locales such as en-US; none given: all in the data
    limit: int | None = None  # training utterances per language, at even distances
    eval_limit: int | None = None  # utterances per language that are scored, at even distances
    # What is scored: choose settings on `dev`, and look at `test` once, with what was chosen.
    eval_split: Literal["dev", "test"] = field(default="test", metadata=_LATER)
    # Score learners within their experiences too, after every so many steps: `curves` of scores.json. 0: only at their ends.
    score_every: int = field(default=0, metadata=_LATER)
    # Keep the counts of each slot type too: slots.csv of the run folder, with a line for each slot of each score.
    slot_counts: bool = field(default=False, metadata=_LATER)
    max_length: int = 128  # subwords of an utterance, with `<s>` and `</s>`; longer ones are cut, counted and reported


@dataclass(frozen=True)
class StudyConfig:
    """What is compared, over which orders and seeds."""

    strategies: tuple[StrategyName, ...] = ("non-shared", "shared")  # how languages share learners
    # Questions beyond the score matrices: `where` in a learner its knowledge is lost, what `damage` each language does to each
    # other one, `pairs` of languages that give and receive, what is left when adapters `merge`, languages or their `order`, what
    # `rates` and `ranks` keep, whether SHARED lacks `weights`, which `remedies` help, whether other `methods` than LoRA forget as
    # it does, what relearning saves (`savings`), whether common `scripts` help, what a `tokenizer` balanced by script changes,
    # what goes with forgetting (`mechanism`), whether `parts` of an adapter are enough to share.
    experiments: tuple[ExperimentName, ...] = field(default=(), metadata=_LATER)
    pinned: tuple[str, ...] = field(default=("zh-CN", "ja-JP", "th-TH"), metadata=_LATER)  # of experiment `order`
    # Of experiment `remedies`: replay, a-gem, each with a share of earlier utterances; l2, ewc, olora with a strength; lr-adjust
    # with a factor. Several strengths of one may be given; the defaults are the demo's, chosen on dev.
    remedies: tuple[str, ...] = field(default=(*_REMEDIES, "olora=30"), metadata=_LATER | {"of": "remedies", "before": _REMEDIES})
    # Of experiment `methods`: prefix (tuning), ia3, fusion (of adapters that have learned a language each), each with a learning
    # rate; the head keeps LoRA's. Several rates of one may be given; the defaults are the demo's, chosen on dev.
    methods: tuple[str, ...] = field(default=("prefix=0.03", "ia3=0.1", "fusion=0.03"), metadata=_LATER)
    # Of experiment `parts`: what all languages share of an adapter, each pattern by itself; names of parts as in --trains.
    shared_parts: tuple[str, ...] = field(default=("*.a", "*.b", "[0-1].*", "[2-3].*"), metadata=_LATER)
    groups: str = "script"  # language groups of `partial`: script, family, or a JSON file that maps locale to group
    orders: int = 1  # number of random language orders, Order 1 first
    order: tuple[str, ...] = ()  # replaces Order 1; holds every language once
    seeds: int = 1  # repetitions, each with its own draw of adapters, batches and dropout
    seed: int = 0  # the first seed; also seeds the orders, the synthetic corpus and the tiny backbone
    # The seed that adapters and heads are drawn from in all repetitions, which then differ in batches and dropout alone, and so
    # do intervals over them. None: the repetition's.
    init_seed: int | None = field(default=None, metadata=_LATER)
    dropout_seed: int | None = field(default=None, metadata=_LATER)  # that of dropout, likewise


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA adapters, and how they or whole models are trained."""

    rank: tuple[int, ...] = (8,)  # LoRA ranks; each trains its own learners
    alpha: float | None = None  # LoRA's scaling is alpha / rank; None: alpha is the rank
    lr: tuple[float, ...] = (3e-3,)  # learning rates of LoRA; each trains its own learners
    # Folder of a run that was scored on dev: the best of its ranks and rates, for all strategies, replaces --rank and --lr.
    select: str = field(default="", metadata=_NOT_IDENTITY)
    # Learning rate of all heads, with every --lr and --full-lr. None: that of all else. 0: they stay as drawn.
    head_lr: float | None = field(default=None, metadata=_LATER)
    # Parts of adapters that train, as patterns of their names 0.qkv.a, 0.qkv.b, …, head.weight, head.bias; the others stay as
    # drawn. `*.b head.*` freezes A, `[0-3].* head.*` trains the lowest four layers. Quote them.
    trains: tuple[str, ...] = field(default=("*",), metadata=_LATER)
    full_lr: float = 5e-4  # learning rate of full fine-tuning
    epochs: int = 8  # passes over each experience
    batch_size: int = 16  # utterances per batch and learner
    warmup: int = 20  # steps of linear learning-rate warm-up; constant after that
    dropout: float = 0.1  # XLM-R's dropout of hidden states and attention
    lora_dropout: float = 0.1  # dropout of the adapters' inputs
    weight_decay: float = 0.01  # AdamW's decoupled weight decay
    max_norm: float = 1.0  # gradient-norm clip, per learner; inf: none


@dataclass(frozen=True)
class TinyConfig:
    """Backbone `tiny`: sizes and masked-language-modelling warm-up."""

    tiny_layers: int = 4  # number of layers
    tiny_hidden: int = 128  # width
    pretrain_steps: int = 400  # warm-up steps
    pretrain_batch: int = 128  # utterances per warm-up step
    vocabulary: int = field(default=6000, metadata=_LATER)  # most entries of a tokenizer that is trained on the data


@dataclass(frozen=True)
class SyntheticConfig:
    """Data `synthetic`: how alike the languages are."""

    overlap: float = 0.15  # share of the surface vocabulary common to all locales, 0 to 1
    relatedness: float = 0.6  # similarity of languages within a family, 0 to 1


@dataclass(frozen=True)
class MachineConfig:
    """Precision, memory, files."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"  # backbone and activations; master weights and moments are always fp32
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=_NOT_IDENTITY)  # auto: a GPU if there is one
    # Same bits whichever learners train alongside, given the same largest rank. Slower.
    exact: bool = False
    # Most LoRA learners per cohort, 0: as many as fit the memory. `--together` is its old name.
    max_learners: Annotated[int, arg(aliases=("--together",))] = 0
    # Approximate tokens per packed pass; a learner's batch is never split. 0: what a GPU's memory holds, 8192 on a CPU.
    pass_tokens: int = 8192
    # Threads on a CPU. 0: as many as OMP_NUM_THREADS says, else a core each, within a container's quota.
    threads: int = field(default=0, metadata=_NOT_IDENTITY)
    # Run folder. Default: runs/ and the preset's name. The same command continues a run that stopped.
    out: str = field(default="", metadata=_NOT_IDENTITY)
    # Folder of tokenised corpora and tiny backbones. Default: $XDG_CACHE_HOME/kloss or ~/.cache/kloss.
    cache: str = field(default="", metadata=_NOT_IDENTITY)
    # Write each LoRA adapter at its end as peft does, into the run folder's `adapters`.
    save_adapters: bool = field(default=False, metadata=_NOT_IDENTITY)
    # Write each learner's loss and F1 into the run folder's `tensorboard`, for `tensorboard --logdir`; wants that package.
    tensorboard: bool = field(default=False, metadata=_NOT_IDENTITY)
    checkpoint_seconds: float = field(default=60.0, metadata=_NOT_IDENTITY)  # time between checkpoints
    # Settings that the other flags override.
    preset: Literal["demo", "paper", "first-five", "damage"] = field(default="demo", metadata=_NOT_IDENTITY)
    # Print the plan (learners, steps, tokens, memory, time) and stop.
    dry_run: bool = field(default=False, metadata=_NOT_IDENTITY)
    # GPUs that the plan is for, such as 8xh200. Default: the processes and the device that would run it.
    plan_for: str = field(default="", metadata=_NOT_IDENTITY)


@dataclass(frozen=True)
class Config(MachineConfig, SyntheticConfig, TinyConfig, AdapterConfig, StudyConfig, DataConfig):
    """A study: which languages, which strategies, and how they are trained.

    The bases, from last to first, are the sections of --help: a dataclass takes the fields of its last base first.
    """

    def identity(self) -> dict[str, object]:
        """Return the settings that decide the figures, as JSON; a run folder belongs to one such set."""
        settings = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.metadata.get("identity", True) and not (f.metadata.get("later") and getattr(self, f.name) == self._unnamed(f))
        }
        return {name: "inf" if value == float("inf") else value for name, value in settings.items()}  # JSON has no inf

    def _unnamed(self, setting: Field) -> object:
        """The value of a later setting in run folders that do not name it."""
        return setting.metadata["before"] if setting.metadata.get("of") in self.experiments else setting.default

    def checked(self) -> "Config":
        """Return the configuration, `~` of its paths expanded. Raises UserError for the first value that makes no sense.

        `data` and `tokenizer` keep their `~`, as they stand in the config.json of older runs; their readers expand it.
        """
        if not self.strategies:
            raise UserError(f"--strategies needs at least one of {', '.join(get_args(StrategyName))}")
        for names, (least, most) in LIMITS.items():
            for name in names.split():
                flag, values = f"--{name.replace('_', '-')}", getattr(self, name)
                if values == ():
                    raise UserError(f"{flag} needs at least one value")
                for value in values if isinstance(values, tuple) else (values,):
                    if value is not None and not least <= value <= most:  # not: NaN compares false
                        raise UserError(f"{flag} must lie between {least:,} and {most:,}, got {shown(value)}")
        if not self.trains:
            raise UserError("--trains needs at least one pattern")
        for name in ("strategies", "rank", "lr"):
            values = [f"{value:g}" if name == "lr" else value for value in getattr(self, name)]  # a rate as reports name it
            twice = [value for n, value in enumerate(values) if value in values[:n]]
            if twice:
                raise UserError(f"--{name} names {shown(twice[0])} twice: equal learners are trained once, and count once")
        matrices = math.prod((len(self.strategies), len(self.rank), len(self.lr), self.orders, self.seeds))
        if matrices > MOST_MATRICES:
            raise UserError(
                f"{matrices:,} score matrices (strategies x ranks x rates x orders x seeds) are more than the "
                f"{MOST_MATRICES:,} of a study; lower --orders or --seeds"
            )
        return replace(self, **self._paths())

    def _paths(self) -> dict[str, Any]:
        """Return the paths that replace those with `~`. Raises UserError for one that can name nothing, see `user_path`."""
        paths: dict[str, Any] = {}
        for name in ("data", "tokenizer", "backbone", "groups", "select", "out", "cache"):
            given = getattr(self, name)
            if given != getattr(Config, name):  # a default is a word, or "" for a default folder
                path = user_path(given, f"--{name}")
                if given.startswith("~") and name not in ("data", "tokenizer"):
                    paths[name] = str(path)
        user_path(self.cache or os.environ.get("XDG_CACHE_HOME") or "~/.cache", "--cache")
        return paths
