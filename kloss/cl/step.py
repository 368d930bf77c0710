"""One training step of all learners of a bank: what the trainer runs and what the benchmarks time."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import row_keys, token_loss
from ..models import Rows, StepDropout, XLMRForTokenClassification
from .learner import Learner
from .packing import PackedBatch


class StepSettings(NamedTuple):
    """What a step needs to know of each learner of a bank.

    learners: one per row of the bank.
    dropout, lora_dropout: fp32 [G] on the model's device, or None where nobody drops.
    seeds: int64 [G] on the model's device.
    weight_decay, max_norm: fp32 [G] on the host.
    """

    learners: Sequence[Learner]
    dropout: Tensor | None
    lora_dropout: Tensor | None
    seeds: Tensor
    weight_decay: Tensor
    max_norm: Tensor

    @classmethod
    def of(cls, learners: Sequence[Learner], device: torch.device, *, exact: bool = False) -> "StepSettings":
        """The settings of some learners. exact: as in AdapterBank."""

        def column(name: str) -> Tensor:
            return torch.tensor([getattr(learner, name) for learner in learners], dtype=torch.float32)

        def dropout(name: str) -> Tensor | None:
            # With `exact`, pass p = 0 rather than None: the two code paths sum in different orders.
            p = column(name)
            return p.to(device) if exact or bool(p.any()) else None

        seeds = torch.tensor([learner.seed for learner in learners], device=device)
        return cls(learners, dropout("dropout"), dropout("lora_dropout"), seeds, column("weight_decay"), column("max_norm"))

    def lr(self, steps: Tensor) -> Tensor:
        """Learning rate of each learner's next update, fp32 [G]. steps: int64 [G], the updates so far."""
        rates = [learner.rate(step) for learner, step in zip(self.learners, steps.tolist(), strict=True)]
        return torch.tensor(rates, dtype=torch.float32)


def train_step(
    model: XLMRForTokenClassification, bank: Rows, settings: StepSettings, batches: Iterable[PackedBatch]
) -> tuple[Tensor, Tensor]:
    """Update every row of the bank once: forward and backward for each batch, then AdamW for all rows.

    settings: of the bank's rows.
    batches: each holds the sequences of the next `segments.num_adapters` rows; together they cover the bank.
    Returns the losses and the gradient norms before clipping, fp32 [G]. A row with a norm that is not finite is not updated.
    """
    bank.zero_grad()
    losses, first = [], 0
    for batch in batches:
        last = first + batch.segments.num_adapters
        dropout = _dropout(settings, bank.steps, first, last, batch)
        logits = model(batch.input_ids, batch.cu_seqlens, batch.segments, bank.span(first, last), dropout=dropout)
        loss, _ = token_loss(logits, batch.labels, batch.segments)
        loss.sum().backward()
        losses.append(loss.detach())
        first = last
    norms = bank.adamw_(settings.lr(bank.steps), weight_decay=settings.weight_decay, max_norm=settings.max_norm)
    return torch.cat(losses), norms


def _dropout(settings: StepSettings, steps: Tensor, first: int, last: int, batch: PackedBatch) -> StepDropout:
    """Dropout's keys for a batch of rows first..last-1."""
    step = steps[first:last].to(batch.input_ids.device)[batch.segments.adapter.long()]
    keys = row_keys(step, batch.sequence, batch.cu_seqlens, rows=batch.input_ids.numel())
    hidden, lora = (None if p is None else p[first:last] for p in (settings.dropout, settings.lora_dropout))
    return StepDropout(hidden, hidden, lora, settings.seeds[first:last], keys, batch.segments.row_adapter)
