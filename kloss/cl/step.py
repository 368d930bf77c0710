"""One training step of all learners of a bank: what the trainer runs and what the benchmarks time."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import StepDropout, token_loss
from ..models import Rows, XLMRForTokenClassification
from .graphs import Graphs
from .learner import Learner
from .packing import PackedBatch


class StepSettings(NamedTuple):
    """What a step needs to know of each learner of a bank.

    All are [G], on the model's device, fp32 where not said otherwise.
    dropout, lora_dropout: None where nobody drops.
    seeds: int64.
    peak_lr, head_lr, warmup: fp64, the rates after the warm-up, of all and of the heads, and the steps of that.
        head_lr: None where heads have the rate of all else.
    """

    dropout: Tensor | None
    lora_dropout: Tensor | None
    seeds: Tensor
    peak_lr: Tensor
    head_lr: Tensor | None
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
        heads = [learner.lr if learner.head_lr is None else learner.head_lr for learner in learners]
        own = heads != [learner.lr for learner in learners]
        head = torch.tensor(heads, dtype=torch.float64, device=device) if own else None
        return cls(dropout("dropout"), dropout("lora_dropout"), seeds, peak, head, warmup, decay, norm)

    def lr(self, steps: Tensor) -> tuple[Tensor, Tensor | None]:
        """Learning rates of each learner's next update, fp32 [G], and of its head: lr min(1, (step + 1) / warmup).

        steps: int64 [G], the updates so far.
        """
        share = ((steps + 1) / self.warmup.clamp(min=1)).clamp(max=1)
        return (self.peak_lr * share).float(), None if self.head_lr is None else (self.head_lr * share).float()


def train_step(
    model: XLMRForTokenClassification,
    bank: Rows,
    settings: StepSettings,
    batches: Iterable[PackedBatch],
    *,
    graphs: Graphs | None = None,
    active: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Update the rows of the bank once: forward and backward for each batch, then AdamW for all rows.

    settings: of the bank's rows.
    batches: on the host; each holds the sequences of the next `num_adapters` rows, together they cover the bank.
    graphs: those of this model, bank and settings; None: none are captured.
    active: bool [G], the rows to update; None: all.
    Returns the losses and the gradient norms before clipping, fp32 [G]. A row with a norm that is not finite is not updated.
    """
    graphs = Graphs(bank.param.device, enabled=False) if graphs is None else graphs
    losses, first = [], 0
    for batch in batches:
        last = first + batch.num_adapters
        losses.append(graphs((first, last), partial(_backward, model, bank, settings, first, last), batch))
        first = last
    lr, head_lr = settings.lr(bank.steps)
    norms = bank.adamw_(lr, weight_decay=settings.weight_decay, max_norm=settings.max_norm, active=active, head_lr=head_lr)
    return torch.cat(losses), norms


def _backward(
    model: XLMRForTokenClassification, bank: Rows, settings: StepSettings, first: int, last: int, batch: PackedBatch
) -> Tensor:
    """Set the gradients of rows first..last-1. Returns their losses, fp32."""
    rows, dtype = bank.fresh(first, last), model.classifier.weight.dtype
    hidden, lora = (None if p is None else p[first:last] for p in (settings.dropout, settings.lora_dropout))
    drops = hidden is not None or lora is not None
    lists, dropout = batch.lists(dtype, bank.steps[first:last] if drops else None), None
    if lists.row_key is not None:
        keys = settings.seeds[first:last], lists.row_key, lists.segments.row_adapter
        dropout = StepDropout(hidden, hidden, lora, *keys, model.num_sites)
    logits = model(batch.input_ids, batch.cu_seqlens, bank=rows, dropout=dropout, lists=lists)
    loss, _ = token_loss(logits, batch.labels, lists.segments)
    loss.sum().backward()
    return loss.detach()
