"""One training step of all learners of a bank: what the trainer runs and what the benchmarks time."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels import StepDropout, token_loss
from ..kernels.lora_torch import on_one_thread
from ..models import AdapterBank, Rows, XLMRForTokenClassification
from ..models.slots import SlotRows
from .graphs import Graphs
from .learner import ALL, Learner
from .packing import PackedBatch, Part, pack
from .rules import Rule
from .stream import StreamBatch

COPIES = 8  # of a row, that take a sentence each


class Frozen(NamedTuple):
    """Columns of rows first..last-1 that no step changes. mask: bool [P]."""

    first: int
    last: int
    mask: Tensor


class StepSettings(NamedTuple):
    """What a step needs to know of each learner of a bank.

    All are [G], on the model's device, fp32 where not said otherwise.
    dropout, lora_dropout: None where nobody drops.
    seeds: int64, of dropout.
    peak_lr, head_lr, warmup: fp64, the rates after the warm-up, of all and of the heads, and the steps of that.
        head_lr: None where heads have the rate of all else.
    frozen: what does not train.
    """

    dropout: Tensor | None
    lora_dropout: Tensor | None
    seeds: Tensor
    peak_lr: Tensor
    head_lr: Tensor | None
    warmup: Tensor
    weight_decay: Tensor
    max_norm: Tensor
    frozen: tuple[Frozen, ...] = ()

    @classmethod
    def of(
        cls, learners: Sequence[Learner], device: torch.device, *, exact: bool = False, bank: Rows | None = None
    ) -> "StepSettings":
        """The settings of some learners. exact: as in AdapterBank. bank: theirs, where a part of some does not train."""

        def column(name: str, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor([getattr(learner, name) for learner in learners], dtype=dtype, device=device)

        def dropout(name: str) -> Tensor | None:
            # With `exact`, pass p = 0 rather than None: the two code paths sum in different orders.
            return column(name) if exact or any(getattr(learner, name) for learner in learners) else None

        peak, warmup = column("lr", torch.float64), column("warmup", torch.float64)
        decay, norm = column("weight_decay"), column("max_norm")
        seeds = torch.tensor([learner.seeds[1] for learner in learners], device=device)
        heads = [learner.lr if learner.head_lr is None else learner.head_lr for learner in learners]
        own = heads != [learner.lr for learner in learners]
        head = torch.tensor(heads, dtype=torch.float64, device=device) if own else None
        frozen = frozen_columns(learners, bank, [0] * len(learners))
        return cls(dropout("dropout"), dropout("lora_dropout"), seeds, peak, head, warmup, decay, norm, frozen)

    def without_dropout(self) -> "StepSettings":
        return self._replace(dropout=None, lora_dropout=None)

    def lr(self, steps: Tensor, rate: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Learning rates of each learner's next update, fp32 [G], and of its head: lr rate min(1, (step + 1) / warmup).

        steps: int64 [G], the updates so far.
        rate: fp64 [G], of the present experience; None: 1.
        """
        share = ((steps + 1) / self.warmup.clamp(min=1)).clamp(max=1)
        share = share if rate is None else share * rate
        return (self.peak_lr * share).float(), None if self.head_lr is None else (self.head_lr * share).float()


def frozen_columns(learners: Sequence[Learner], bank: Rows | None, experiences: Sequence[int]) -> tuple[Frozen, ...]:
    """What of the learners' rows does not train in these experiences of theirs, neighbours of one kind together."""
    frozen, first = [], 0
    parts = [(learner.trains, learner.ranks_of(i)) for learner, i in zip(learners, experiences, strict=True)]
    for (trains, ranks), group in groupby(parts):
        last = first + len(list(group))
        if ranks is not None:
            assert isinstance(bank, AdapterBank)
            frozen.append(Frozen(first, last, ~bank.columns(trains, ranks)))
        elif trains != ALL:
            assert isinstance(bank, SlotRows)
            frozen.append(Frozen(first, last, ~bank.columns(trains)))
        first = last
    return tuple(frozen)


class Ruled(NamedTuple):
    """A row whose rule changes its gradient in a step.

    memory: the replayed sentences of its reference gradient, if it has one.
    ranks: those that train; None: all.
    """

    row: int
    rule: Rule
    state: Mapping[str, Tensor]
    memory: PackedBatch | None
    ranks: slice | None


class PackedStep(NamedTuple):
    """What a step needs of the streams."""

    batches: list[PackedBatch]  # one a pass
    ended: list[int]  # the rows whose experience ends with it
    due: dict[int, int]  # row that is scored behind it, within its experience -> steps of its learner
    ruled: list[Ruled]  # the rows whose rule applies
    rate: Tensor | None  # fp64 [rows], of the present experiences; None: all are 1


def train_step(
    model: XLMRForTokenClassification,
    bank: Rows,
    settings: StepSettings,
    batches: Iterable[PackedBatch],
    *,
    graphs: Graphs | None = None,
    active: Tensor | None = None,
    ruled: Sequence[Ruled] = (),
    rate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Update the rows of the bank once: forward and backward for each batch, then AdamW for all rows.

    settings: of the bank's rows.
    batches: on the host; each holds the sequences of the next `num_adapters` rows, together they cover the bank.
    graphs: those of this model, bank and settings; None: none are captured.
    active: bool [G], the rows to update; None: all.
    ruled: the rows with rules that apply.
    rate: as in `StepSettings.lr`.
    Returns the losses and the gradient norms before clipping, fp32 [G]. A row with a norm that is not finite is not updated.
    """
    graphs = Graphs(bank.param.device, enabled=False) if graphs is None else graphs
    references: dict[int, Tensor] = {}
    for row, _, _, memory, _ in ruled:
        if memory is not None:
            graphs(("memory", row), partial(_backward, model, bank, settings.without_dropout(), row, row + 1), memory)
            _freeze(bank, settings)
            references[row] = bank.grad[row].clone()  # the passes below set it anew
    losses, first = [], 0
    for batch in batches:
        last = first + batch.num_adapters
        losses.append(graphs((first, last), partial(_backward, model, bank, settings, first, last), batch))
        first = last
    for row, rule, _, _, ranks in ruled:
        if ranks is not None:
            _adjust_a(bank, row, rule, ranks)
    _freeze(bank, settings)
    for row, rule, state, _, ranks in ruled:
        if ranks is None:
            rule.adjust(bank.grad[row], bank.param[row], state, references.get(row))
    lr, head_lr = settings.lr(bank.steps, rate)
    before = [bank.param[first:last].clone() for first, last, _ in settings.frozen]
    norms = bank.adamw_(lr, weight_decay=settings.weight_decay, max_norm=settings.max_norm, active=active, head_lr=head_lr)
    for (first, last, mask), kept in zip(settings.frozen, before, strict=True):
        param = bank.param[first:last]
        param.copy_(torch.where(mask, kept, param))  # weight decay moves what has no gradient
        bank.refresh(slice(first, last))
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


def _adjust_a(bank: Rows, row: int, rule: Rule, ranks: slice) -> None:
    """Have a rule with blocks change the gradient of a row."""
    assert isinstance(bank, AdapterBank)
    with on_one_thread(bank.exact):
        for name in bank.slots:
            if name.endswith(".a"):
                rule.adjust_a(bank.a_of(bank.grad, row, name), bank.a_of(bank.param, row, name), ranks)


def _freeze(bank: Rows, settings: StepSettings) -> None:
    """Zero the gradients of what does not train."""
    for first, last, mask in settings.frozen:
        bank.grad[first:last].masked_fill_(mask, 0)


def squared_gradients(
    model: XLMRForTokenClassification, bank: Rows, settings: StepSettings, row: int, sentences: StreamBatch
) -> Tensor:
    """Mean over sentences of the square of each one's gradient in a row of the bank, without dropout. Returns fp32 [P].

    Copies of the row have a sentence each, so one packed pass gives the gradients of several.
    """
    copies, (pool, indices, _) = bank.select([row] * COPIES), sentences
    total = torch.zeros_like(bank.param[row])
    for start in range(0, len(indices), COPIES):
        some = indices[start : start + COPIES]
        batch = pack([Part(pool, some[i : i + 1], i) for i in range(len(some))], COPIES).to(total.device)
        _backward(model, copies, settings.without_dropout(), 0, COPIES, batch)
        for grad in copies.grad.float():
            total += grad.square()
    return total / len(indices)
