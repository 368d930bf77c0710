"""A learner: one adapter (or a whole model), its hyper-parameters, and its experiences."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from .rules import Rule

Table = dict[str, list[int]]  # locale -> [true positives, predicted, gold]
Scores = dict[int, Table]  # by experiences completed, or updates made

ALL = ("*",)  # every slot of an adapter
BALANCED = "balanced"  # the name of a tokenizer that is trained on text balanced by script


@dataclass(frozen=True)
class Experience:
    """What a learner trains on between two scores; a plain sequence of locales stands for one without more.

    locales: whose training sentences are pooled.
    weights: the share of each locale's sentences that take part, in (0, 1]; empty: all do.
    limit: the most sentences of each locale, before weights; None: no limit. Fewer are taken at even distances.
    epochs: passes over the pool; None: as many as the learner makes.
    rate: multiplies the learner's rates.
    Raises ValueError for values out of range.
    """

    locales: tuple[str, ...]
    weights: tuple[float, ...] = ()
    limit: int | None = None
    epochs: int | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        if not self.locales or self.weights and len(self.weights) != len(self.locales):
            raise ValueError(f"an experience needs locales, and a weight for each or none; got {self.locales}, {self.weights}")
        if not all(0 < weight <= 1 for weight in self.weights) or not 0 <= self.rate < math.inf:
            raise ValueError(f"weights must lie in (0, 1], a rate in [0, inf); got {self.weights}, {self.rate}")
        if min(self.limit or 1, self.epochs or 1) < 1 or 0 in (self.limit, self.epochs):
            raise ValueError(f"limit and epochs must be 1 or more; got {self.limit}, {self.epochs}")

    @classmethod
    def of(cls, locales: "Experience | Sequence[str]") -> "Experience":
        return locales if isinstance(locales, Experience) else cls(tuple(locales))

    def counts(self, sentences: Sequence[int]) -> list[int]:
        """How many sentences of each locale take part, of so many that it has."""
        weights = self.weights or (1.0,) * len(self.locales)
        return [math.ceil(w * min(n, self.limit or n)) for w, n in zip(weights, sentences, strict=True)]


@dataclass(frozen=True)
class Learner:
    """Everything that decides what is learned. Equal learners learn the same, so they are trained once."""

    experiences: tuple[Experience, ...]  # in training order; made of plain locales where these are given
    rank: int | None  # None: full fine-tuning. Of prefix tuning: how many keys and values it has in a layer
    alpha: float  # LoRA's scaling is alpha / rank
    lr: float
    seed: int  # of its batches
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
    takes: tuple[str, ...] = ALL  # patterns of the slots that a fork takes from there; the others are of its own draw
    rule: Rule | None = None  # between gradient and update; of an adapter
    trains: tuple[str, ...] = ALL  # patterns of the slots of an adapter that train; the others stay as they are, to the bit
    method: str = "lora"  # or one of `models.methods`
    # Of a fusion: the learners whose adapters it is made of, and how many experiences these had completed.
    donors: "tuple[tuple[Learner, int], ...]" = ()
    init_seed: int | None = None  # of its draw; None: seed
    dropout_seed: int | None = None  # None: seed
    tokenizer: str = ""  # of its utterances and backbone, a name in `Corpus.others`; "": the study's

    def __post_init__(self) -> None:
        object.__setattr__(self, "experiences", tuple(map(Experience.of, self.experiences)))
        if self.rule is not None and self.rank is None:
            raise ValueError(f"{self.rule} works on adapters, and this learner trains the whole model")
        if self.trains != ALL and self.rank is None:
            raise ValueError(f"slots {self.trains} are those of an adapter, and this learner trains the whole model")
        if self.rule is not None and self.rule.blocks and (self.method != "lora" or (self.rank or 0) % len(self.experiences)):
            raise ValueError(
                f"{self.rule} divides LoRA's rank by {len(self.experiences)} experiences, and the rank is {self.rank}"
            )
        if self.method != "lora" and (self.rank is None or self.start is not None):
            raise ValueError(f"a learner of {self.method} has a rank, and begins anew")

    @property
    def seeds(self) -> tuple[int, int]:
        """Those of its draw and of dropout."""
        init, dropout = (self.seed if own is None else own for own in (self.init_seed, self.dropout_seed))
        return init, dropout

    @property
    def parents(self) -> "tuple[tuple[Learner, int], ...]":
        """The states that it begins with."""
        return self.donors if self.start is None else (self.start,)

    @property
    def kind(self) -> tuple[str, int]:
        """Its method, and of one other than LoRA the size. Learners of a bank have the same."""
        return self.method, 0 if self.method == "lora" else len(self.donors) or self.rank or 0

    def ranks_of(self, experience: int) -> slice | None:
        """The ranks that train in an experience, counted from 0; None: all. Behind the last one those of the last."""
        if self.rule is None or not self.rule.blocks:
            return None
        size = (self.rank or 0) // len(self.experiences)
        first = size * min(experience, len(self.experiences) - 1)
        return slice(first, first + size)

    @property
    def name(self) -> str:
        locales = [locale for experience in self.experiences for locale in experience.locales]
        first, shape = locales[0], f"{len(self.experiences)}x{len(self.experiences[0].locales)}"
        languages = first if len(locales) == 1 else f"{shape} from {first}"
        weights = "all weights" if self.rank is None else f"r={self.rank}" if self.method == "lora" else self.method
        languages += "" if self.start is None else f" behind {self.start[0].name.split(', ')[0]}"
        rule = "" if self.rule is None else f", {type(self.rule).__name__} {self.rule.number:g}"
        tokenizer = self.tokenizer and f", {self.tokenizer} tokenizer"
        return f"{languages}, {weights}, lr={self.lr:g}{rule}{tokenizer}, seed {self.seed}"


def folder_name(g: int, learner: Learner) -> str:
    """What the folder of a study's learner g is called."""
    return re.sub(r"[^\w.=]+", "-", f"{g} {learner.name}")
