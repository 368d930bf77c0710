"""A learner: one adapter (or a whole model), its hyper-parameters, and its experiences."""

from dataclasses import dataclass

from .rules import Rule

Scores = dict[int, dict[str, list[int]]]  # experiences completed -> locale -> [true positives, predicted, gold]


@dataclass(frozen=True)
class Learner:
    """Everything that decides what is learned. Equal learners learn the same, so they are trained once."""

    experiences: tuple[tuple[str, ...], ...]  # the locales of each, in training order
    rank: int | None  # None: full fine-tuning
    alpha: float  # LoRA's scaling is alpha / rank
    lr: float
    seed: int
    epochs: int
    batch_size: int
    warmup: int = 0  # steps of linear warm-up
    lora_dropout: float = 0.0  # of the adapters' inputs
    dropout: float = 0.0  # of hidden states and attention
    weight_decay: float = 0.01
    max_norm: float = 1.0  # gradient-norm clip
    head_lr: float | None = None  # of the head; None: lr
    # Of a fork: the learner whose row it begins with, and how many experiences that one had completed. None: a new row.
    start: "tuple[Learner, int] | None" = None
    rule: Rule | None = None  # between gradient and update; of an adapter

    def __post_init__(self) -> None:
        if self.rule is not None and self.rank is None:
            raise ValueError(f"{self.rule} works on adapters, and this learner trains the whole model")

    @property
    def name(self) -> str:
        locales = [locale for experience in self.experiences for locale in experience]
        first, shape = locales[0], f"{len(self.experiences)}x{len(self.experiences[0])}"
        languages = first if len(locales) == 1 else f"{shape} from {first}"
        weights = "all weights" if self.rank is None else f"r={self.rank}"
        languages += "" if self.start is None else f" behind {self.start[0].name.split(', ')[0]}"
        rule = "" if self.rule is None else f", {type(self.rule).__name__} {self.rule.number:g}"
        return f"{languages}, {weights}, lr={self.lr:g}{rule}, seed {self.seed}"
