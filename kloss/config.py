"""What configures a run: one frozen dataclass. A preset (`presets.py`) returns one, a flag overrides it, nothing else does."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Literal, get_args

from tyro.conf import arg

from .errors import UserError

StrategyName = Literal["non-shared", "shared", "partial", "lora-multi", "vanilla", "multi", "mono"]
_NOT_IDENTITY = {"identity": False}  # marks a setting that changes no figure


@dataclass(frozen=True)
class DataConfig:
    """Utterances, tokenizer and backbone."""

    data: str = "synthetic"
    """`synthetic`, a folder of MASSIVE's jsonl files, a .tar.gz or .tar.xz of them, or a hub id."""
    tokenizer: str | None = None
    """Folder or hub name. None: the backbone's; for `tiny`, one trained on the data."""
    backbone: str = "tiny"
    """A folder in transformers' format, a hub name, or `tiny`: a small XLM-R warmed up on the training text."""
    languages: tuple[str, ...] = ()
    """Locales such as en-US. None given: all in the data."""
    limit: int | None = None
    """Training utterances per language, taken at even distances."""
    eval_limit: int | None = None
    """Test utterances per language, taken at even distances."""
    max_length: int = 128
    """Subwords of an utterance, with `<s>` and `</s>`. Longer utterances are cut, counted and reported."""


@dataclass(frozen=True)
class StudyConfig:
    """What is compared, over which orders and seeds."""

    strategies: tuple[StrategyName, ...] = ("non-shared", "shared")
    """How languages share adapters."""
    groups: str = "script"
    """Language groups of `partial`: script, family, or a JSON file that maps locale to group."""
    orders: int = 1
    """Number of random language orders, Order 1 first."""
    order: tuple[str, ...] = ()
    """Replaces Order 1; holds every language once."""
    seeds: int = 1
    """Repetitions, each with its own draw of adapters, batches and dropout."""
    seed: int = 0
    """First seed; also seeds the orders, the synthetic corpus and the tiny backbone."""


@dataclass(frozen=True)
class AdapterConfig:
    """LoRA adapters and how they, or whole models, are trained."""

    rank: tuple[int, ...] = (8,)
    """LoRA ranks; each trains its own learners."""
    alpha: float | None = None
    """LoRA's alpha; the scaling is alpha / rank. None: alpha is the rank."""
    lr: tuple[float, ...] = (3e-3,)
    """Learning rates of LoRA; each trains its own learners."""
    full_lr: float = 5e-4
    """Learning rate of full fine-tuning."""
    epochs: int = 8
    """Passes over each experience."""
    batch_size: int = 16
    """Utterances per batch and learner."""
    warmup: int = 20
    """Steps of linear learning-rate warm-up; constant after that."""
    dropout: float = 0.1
    """XLM-R's dropout of hidden states and attention."""
    lora_dropout: float = 0.1
    """Dropout of the adapters' inputs."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_norm: float = 1.0
    """Gradient-norm clip, per learner."""


@dataclass(frozen=True)
class TinyConfig:
    """Backbone `tiny`: sizes and masked-language-modelling warm-up."""

    tiny_layers: int = 4
    """Layers."""
    tiny_hidden: int = 128
    """Width."""
    pretrain_steps: int = 400
    """Warm-up steps."""
    pretrain_batch: int = 128
    """Utterances per warm-up step."""


@dataclass(frozen=True)
class SyntheticConfig:
    """Data `synthetic`: how alike the languages are."""

    overlap: float = 0.15
    """Share of the surface vocabulary common to all locales, 0 to 1."""
    relatedness: float = 0.6
    """Similarity of languages within a family, 0 to 1."""


@dataclass(frozen=True)
class MachineConfig:
    """Precision, memory, files."""

    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Backbone and activations. Master weights and moments are always fp32."""
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata=_NOT_IDENTITY)
    """Where to train; auto takes a GPU if there is one."""
    exact: bool = False
    """Same bits whichever learners train alongside, given the same largest rank; slower. On a GPU only adapted linears so far."""
    max_learners: Annotated[int, arg(aliases=("--together",))] = 0
    """Limit on LoRA learners per cohort, 0 for none. `--together` is its old name."""
    pass_tokens: int = 8192
    """Approximate tokens per packed pass; a learner's batch is never split."""
    out: str = field(default="", metadata=_NOT_IDENTITY)
    """Run folder. Default: runs/ and the preset's name. The same command continues a run that stopped."""
    cache: str = field(default="", metadata=_NOT_IDENTITY)
    """Folder of tokenised corpora and tiny backbones. Default: $XDG_CACHE_HOME/kloss or ~/.cache/kloss."""
    checkpoint_seconds: float = field(default=60.0, metadata=_NOT_IDENTITY)
    """Time between checkpoints."""
    preset: Literal["demo", "paper", "first-five"] = field(default="demo", metadata=_NOT_IDENTITY)
    """Settings that the other flags override."""
    dry_run: bool = field(default=False, metadata=_NOT_IDENTITY)
    """Print the plan (learners, steps, tokens, memory, time) and stop."""


@dataclass(frozen=True)
class Config(MachineConfig, SyntheticConfig, TinyConfig, AdapterConfig, StudyConfig, DataConfig):
    """A study: which languages, which strategies, and how they are trained.

    The bases, from last to first, are the sections of --help: a dataclass takes the fields of its last base first.
    """

    def identity(self) -> dict[str, object]:
        """Return the settings that decide the figures; a run folder belongs to one such set."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("identity", True)}

    def checked(self) -> "Config":
        """Return the configuration itself. Raises UserError for the first value that makes no sense."""
        if not self.strategies:
            raise UserError(f"--strategies needs at least one of {', '.join(get_args(StrategyName))}")
        if not self.rank or min(self.rank) < 1:
            raise UserError(f"--rank must be 1 or more, got {', '.join(map(str, self.rank)) or 'none'}")
        counts = "epochs batch_size seeds orders max_length tiny_layers tiny_hidden pretrain_batch pass_tokens limit eval_limit"
        for name in counts.split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        for name in ("dropout", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} must lie in [0, 1), got {getattr(self, name)}")
        for name in ("overlap", "relatedness"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name} must lie in [0, 1], got {getattr(self, name)}")
        if min((*self.lr, self.full_lr, self.max_norm)) <= 0 or not self.lr:
            raise UserError("--lr, --full-lr and --max-norm must be above 0")
        if min(self.weight_decay, self.warmup, self.pretrain_steps, self.max_learners) < 0:
            raise UserError("--weight-decay, --warmup, --pretrain-steps and --max-learners must be 0 or more")
        if self.max_length < 3:
            raise UserError(f"--max-length must leave room for <s>, a subword and </s>, got {self.max_length}")
        return self
