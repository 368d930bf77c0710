"""The bank that a cohort's learners are rows of."""

from collections.abc import Sequence

from ..models import AdapterBank, FlatModel, Rows, XLMRConfig, XLMRForTokenClassification
from ..models.methods import METHODS
from ..models.slots import row_width
from .learner import Learner


def bank_of(model: XLMRForTokenClassification, learners: Sequence[Learner], largest: int = 0, *, exact: bool = False) -> Rows:
    """Return the bank of learners of one kind, or of one that trains the whole model, which it readies for them.

    largest, exact: as in AdapterBank.
    """
    if learners[0].rank is None:
        assert len(learners) == 1, "models are trained one at a time"
        model.draw_head_(learners[0].seeds[0])
        return FlatModel(model)
    model.freeze_backbone()
    method, size = learners[0].kind
    if method == "lora":
        return lora_bank(model, learners, largest, exact=exact)
    assert all(learner.kind == (method, size) for learner in learners)
    weight = model.classifier.weight
    return METHODS[method](model, [learner.seeds[0] for learner in learners], size, dtype=weight.dtype, device=weight.device)


def lora_bank(model: XLMRForTokenClassification, learners: Sequence[Learner], largest: int = 0, *, exact: bool) -> AdapterBank:
    """Return the bank of learners of LoRA."""
    weight = model.classifier.weight
    return AdapterBank(
        model,
        len(learners),
        [learner.rank or 0 for learner in learners],
        alpha=[learner.alpha for learner in learners],
        seeds=[learner.seeds[0] for learner in learners],
        dtype=weight.dtype,
        device=weight.device,
        exact=exact,
        largest=largest,
    )


def row_of(sizes: XLMRConfig, learner: Learner, rank: int) -> int:
    """P of a bank of learners of this one's kind. sizes: of the backbone. rank: the largest of the bank's adapters."""
    method, size = learner.kind
    return AdapterBank.width_of(sizes, rank) if method == "lora" else row_width(METHODS[method].slots_of(sizes, size))
