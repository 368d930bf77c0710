"""A learner: one adapter (or a whole model), its hyper-parameters, and the experiences it goes through."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Learner:
    """Everything that decides what is learned. Two equal learners learn the same, so they are trained once.

    experiences: the locales of each, in training order. rank: of the LoRA adapter; None trains the whole model.
    alpha: LoRA's numerator, the scaling is alpha / rank. lr: of AdamW, after a linear warm-up over `warmup` steps.
    lora_dropout: of the adapters' inputs. dropout: XLM-R's own, hidden states and attention. max_norm: gradient-norm clip.
    """

    experiences: tuple[tuple[str, ...], ...]
    rank: int | None
    alpha: float
    lr: float
    seed: int
    epochs: int
    batch_size: int
    warmup: int = 0
    lora_dropout: float = 0.0
    dropout: float = 0.0
    weight_decay: float = 0.01
    max_norm: float = 1.0

    def rate(self, step: int) -> float:
        """Learning rate of the step-th update, counted from 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup) if self.warmup else self.lr

    @property
    def name(self) -> str:
        locales = [locale for experience in self.experiences for locale in experience]
        what = locales[0] if len(locales) == 1 else f"{len(self.experiences)}x{len(self.experiences[0])} from {locales[0]}"
        how = "all weights" if self.rank is None else f"r={self.rank}"
        return f"{what}, {how}, lr={self.lr:g}, seed {self.seed}"
