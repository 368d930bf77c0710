"""One training step of all learners of a bank: what the trainer runs and what the benchmarks time."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import StepDropout, row_keys, token_loss
from ..models import Rows, XLMRForTokenClassification
from .learner import Learner
from .packing import PackedBatch


class StepSettings(NamedTuple):
    """What a step needs to know of each learner of a bank.

    All are [G], on the model's device, fp32 where not said otherwise.
    dropout, lora_dropout: None where nobody drops.
    seeds: int64.
    peak_lr, warmup: fp64, the rate after the warm-up and the steps of that.
    """

    dropout: Tensor | None
    lora_dropout: Tensor | None
    seeds: Tensor
    peak_lr: Tensor
    warmup: Tensor
    weight_decay: Tensor
    max_norm: Tensor

    @classmethod
    def of(cls, learners: Sequence[Learner], device: torch.device, *, exact: bool = False) -> "StepSettings":
        """The settings of some learners. exact: as in AdapterBank."""

        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(learner, name) for learner in learners], dtype=dtype, device=device)

        def dropout(name: str) -> Tensor | None:
            # With `exact`, pass p = 0 rather than None: the two code paths sum in different orders.
            return column(name) if exact or any(getattr(learner, name) for learner in learners) else None

        peak, warmup = column("lr", torch.float64), column("warmup", torch.float64)
        decay, norm, seeds = column("weight_decay"), column("max_norm"), column("seed", torch.int64)
        return cls(dropout("dropout"), dropout("lora_dropout"), seeds, peak, warmup, decay, norm)

    def lr(self, steps: Tensor) -> Tensor:
        """Learning rate of each learner's next update, fp32 [G]: lr min(1, (step + 1) / warmup), lr without a warm-up.

        steps: int64 [G], the updates so far.
        """
        return (self.peak_lr * ((steps + 1) / self.warmup.clamp(min=1)).clamp(max=1)).float()


def train_step(
    model: XLMRForTokenClassification, bank: Rows, settings: StepSettings, batches: Iterable[PackedBatch]
) -> tuple[Tensor, Tensor]:
    """Update every row of the bank once: forward and backward for each batch, then AdamW for all rows.

    settings: of the bank's rows.
    batches: each holds the sequences of the next `segments.num_adapters` rows; together they cover the bank.
    Returns the losses and the gradient norms before clipping, fp32 [G]. A row with a norm that is not finite is not updated.
    """
    losses, first = [], 0
    for batch in batches:
        last = first + batch.segments.num_adapters
        dropout = _dropout(settings, bank.steps, first, last, batch, model.num_sites)
        logits = model(batch.input_ids, batch.cu_seqlens, batch.segments, bank.fresh(first, last), dropout=dropout)
        loss, _ = token_loss(logits, batch.labels, batch.segments)
        loss.sum().backward()
        losses.append(loss.detach())
        first = last
    norms = bank.adamw_(settings.lr(bank.steps), weight_decay=settings.weight_decay, max_norm=settings.max_norm)
    return torch.cat(losses), norms


def _dropout(settings: StepSettings, steps: Tensor, first: int, last: int, batch: PackedBatch, num_sites: int) -> StepDropout:
    """Dropout's keys for a batch of rows first..last-1."""
    step = steps[first:last][batch.segments.adapter.long()]
    keys = row_keys(step, batch.sequence, batch.cu_seqlens, rows=batch.input_ids.numel())
    hidden, lora = (None if p is None else p[first:last] for p in (settings.dropout, settings.lora_dropout))
    return StepDropout(hidden, hidden, lora, settings.seeds[first:last], keys, batch.segments.row_adapter, num_sites)
