"""What configures a run: one frozen dataclass. A preset (`presets.py`) returns one, a flag overrides it, nothing else does."""

from dataclasses import dataclass

from .errors import UserError


@dataclass(frozen=True)
class Config:
    """A study: which languages, which strategies, and how they are trained."""

    data: str = "synthetic"
    """The utterances: `synthetic`, a folder of MASSIVE's jsonl files, a .tar.gz or .tar.xz of them, or a hub id."""
    tokenizer: str | None = None
    """Folder or hub name of a tokenizer. None: the backbone's; for `tiny` one is trained on the data."""
    backbone: str = "tiny"
    """A folder in transformers' format, a hub name, or `tiny`: a small XLM-R warmed up on the data's training text."""
    languages: tuple[str, ...] = ()
    """Locales such as en-US; none named means all that the data holds."""
    limit: int | None = None
    """Training utterances of each language: so many, at even distances."""
    eval_limit: int | None = None
    """Test utterances of each language: so many, at even distances."""
    max_length: int = 128
    """Subwords of an utterance, `<s>` and `</s>` included; longer ones are cut, counted and reported."""

    strategies: tuple[str, ...] = ("non-shared", "shared")
    """Any of non-shared, shared, partial, lora-multi, vanilla, multi, mono."""
    groups: str = "script"
    """What partially shared adapters are shared by: script, family, or a JSON file that maps locale to group."""
    orders: int = 1
    """Random orders of the languages; Order 1 is the first."""
    order: tuple[str, ...] = ()
    """An order of your own in the place of Order 1; it holds every language once."""
    seeds: int = 1
    """Repetitions with another draw of adapters, batches and dropout."""
    seed: int = 0
    """The first seed; also that of the orders, of the synthetic corpus and of the tiny backbone."""

    rank: tuple[int, ...] = (8,)
    """LoRA ranks; each is a set of learners of its own."""
    alpha: float | None = None
    """LoRA's alpha; the scaling is alpha / rank. None: the rank, so the scaling is 1."""
    lr: tuple[float, ...] = (3e-3,)
    """Learning rates of LoRA; each is a set of learners of its own."""
    full_lr: float = 5e-4
    """Learning rate where the whole model is trained."""
    epochs: int = 8
    """Passes over each experience."""
    batch_size: int = 16
    """Utterances in a batch of each learner."""
    warmup: int = 20
    """Steps of linear warm-up of the learning rate, then it is constant."""
    dropout: float = 0.1
    """XLM-R's own dropout: hidden states and attention."""
    lora_dropout: float = 0.1
    """Dropout of the adapters' inputs."""
    weight_decay: float = 0.01
    """Of AdamW, decoupled."""
    max_norm: float = 1.0
    """Each learner's gradient norm is clipped to this."""

    tiny_layers: int = 4
    """Layers of the tiny backbone."""
    tiny_hidden: int = 128
    """Width of the tiny backbone."""
    pretrain_steps: int = 400
    """Masked-language-modelling steps of the tiny backbone."""
    pretrain_batch: int = 128
    """Utterances in each of them."""
    overlap: float = 0.15
    """Synthetic corpus: share of the surface vocabulary that locales have in common, 0 to 1."""
    relatedness: float = 0.6
    """Synthetic corpus: how alike the languages of one family are, 0 to 1."""

    dtype: str = "fp32"
    """fp32, bf16 or fp16: backbone and activations. Master weights and moments are always fp32."""
    device: str = "auto"
    """auto, cpu or cuda."""
    exact: bool = False
    """A learner's figures are the same to the bit whichever learners advance beside it, if the largest rank among them is the
    same; slower. Else they are equal to rounding. Shown on a CPU; on a GPU only the adapted linears promise it yet."""
    together: int = 0
    """At most so many LoRA learners advance together; 0: all."""
    pass_tokens: int = 8192
    """Tokens of one packed pass, about; a learner's batch is never split."""
    out: str = ""
    """Run folder. Default: runs/ and the preset's name. A run that stopped is taken up where it was."""
    cache: str = ""
    """Where tokenised corpora and tiny backbones are kept. Default: $XDG_CACHE_HOME/kloss or ~/.cache/kloss."""
    checkpoint_seconds: float = 60.0
    """Time between checkpoints."""
    preset: str = "demo"
    """Which settings the other flags override: demo, paper or first-five."""
    dry_run: bool = False
    """Print the plan (learners, steps, tokens, memory, time) and stop."""

    def checked(self) -> "Config":
        """The configuration itself. Raises UserError for the first value that makes no sense."""
        if not self.rank or min(self.rank) < 1:
            raise UserError(f"--rank must be 1 or more, got {', '.join(map(str, self.rank)) or 'none'}")
        positive = (
            "epochs",
            "batch_size",
            "seeds",
            "orders",
            "max_length",
            "tiny_layers",
            "tiny_hidden",
            "pretrain_batch",
            "pass_tokens",
        )
        for name in (*positive, "limit", "eval_limit"):
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
        if min(self.weight_decay, self.warmup, self.pretrain_steps, self.together) < 0:
            raise UserError("--weight-decay, --warmup, --pretrain-steps and --together must be 0 or more")
        if self.dtype not in ("fp32", "bf16", "fp16"):
            raise UserError(f"--dtype must be fp32, bf16 or fp16, got {self.dtype}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise UserError(f"--device must be auto, cpu or cuda, got {self.device}")
        if self.max_length < 3:
            raise UserError(f"--max-length must leave room for <s>, a subword and </s>, got {self.max_length}")
        return self
