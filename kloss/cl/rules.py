"""Rules: what stands between a learner's gradient and its update, from its second experience on.

To add one: a subclass of Rule, and a line in RULES. A rule sees one learner's row at a time. On a GPU `adjust` is called while
the host runs ahead, so it must be tensor ops that the host does not wait for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:  # a report reads learners, and needs no torch
    from torch import Tensor

Notes = Mapping[str, "Tensor"]  # by the names of a rule's `state`
Squares = Callable[[int], "Tensor"]  # so many of an experience's sentences -> mean square of each one's gradient, fp32 [P]


def total(values: "Tensor") -> "Tensor":
    """Sum of [P] in an order that P alone fixes, on any number of threads."""
    whole = values.numel() // 1024 * 1024
    rest = values[whole:].sum()
    return rest + total(values[:whole].view(-1, 1024).sum(1)) if whole else rest


@dataclass(frozen=True)
class Rule:
    """What a rule may do. Equal rules do the same.

    number: how strongly; what it means is the rule's own.
    state: names of its tensors, fp32 [P] each, zero at first; they are in the checkpoint.
    replays: whether it needs a reference gradient; then `number` is the share of each earlier locale's sentences, at even
        distances, that it is drawn from.
    blocks: whether each experience trains ranks of its own, side by side in the adapter; those of others stay as they are. Then
        `adjust_a` is called in place of `adjust`.
    SENTENCES: how many it asks `squares` for after each experience but the last, for the plan of a run.
    """

    number: float
    state: ClassVar[tuple[str, ...]] = ()
    replays: ClassVar[bool] = False
    blocks: ClassVar[bool] = False
    SENTENCES: ClassVar[int] = 0

    def learned(self, param: "Tensor", state: Notes, squares: Squares) -> None:
        """Note, in `state`, what was learned: called at the end of each experience but the last.

        param: fp32 [P], the learner's row.
        """

    def adjust(self, grad: "Tensor", param: "Tensor", state: Notes, reference: "Tensor | None") -> None:
        """Change a gradient in place, before clipping and AdamW; called in all experiences but the first.

        grad: [P] in the model's dtype. param: fp32 [P].
        reference: [P], the gradient of a batch of replayed sentences, without dropout; None unless the rule `replays`.
        """
        raise NotImplementedError

    def adjust_a(self, grad: "Tensor", a: "Tensor", ranks: slice) -> None:
        """Likewise, of a rule with `blocks`, for the A of one linear.

        grad: [slices, R, K] in the model's dtype. a: fp32 [slices, R, K].
        ranks: those that train. Earlier experiences had those before.
        """
        raise NotImplementedError


class L2(Rule):
    """A pull to the row as it was at the end of the last experience, of n/2 the squared distance."""

    state = ("anchor",)

    def learned(self, param: "Tensor", state: Notes, squares: Squares) -> None:
        state["anchor"].copy_(param)

    def adjust(self, grad: "Tensor", param: "Tensor", state: Notes, reference: "Tensor | None") -> None:
        grad.add_((param - state["anchor"]).mul_(self.number))


class EWC(Rule):
    """L2 with each weight's own strength: its diagonal Fisher information, online (Schwarz et al. 2018, arXiv 1805.06370).

    F is the mean square of the gradients of single sentences of the experience, with their own labels, scaled to a mean of 1 over
    all weights with one; it is added to KEEP times the one before.
    """

    state = ("anchor", "fisher")
    KEEP, SENTENCES = 0.95, 64

    def learned(self, param: "Tensor", state: Notes, squares: Squares) -> None:
        fisher = squares(self.SENTENCES)
        weights = total((fisher > 0).float())  # not the zeros behind an adapter's own rank, whose number depends on others
        state["fisher"].mul_(self.KEEP).add_(fisher * (weights / total(fisher).clamp_min(1e-30)))
        state["anchor"].copy_(param)

    def adjust(self, grad: "Tensor", param: "Tensor", state: Notes, reference: "Tensor | None") -> None:
        grad.add_((param - state["anchor"]).mul_(state["fisher"]).mul_(self.number))


class AGEM(Rule):
    """A gradient that would raise the loss of replayed sentences loses that part (Chaudhry et al. 2019, arXiv 1812.00420)."""

    replays = True

    def adjust(self, grad: "Tensor", param: "Tensor", state: Notes, reference: "Tensor | None") -> None:
        assert reference is not None
        g, r = grad.float(), reference.float()
        product = total(g * r)
        grad.copy_((g - r * (product / total(r * r))).where(product < 0, g))


class OLoRA(Rule):
    """Each experience trains ranks of its own, whose A is drawn towards orthogonality to that of all earlier ones.

    The loss gains n Σ_i ‖A_i Aᵀ‖², squared entries summed over earlier experiences i and all linears (Wang et al. 2023, arXiv
    2310.14152).
    """

    blocks = True

    def adjust_a(self, grad: "Tensor", a: "Tensor", ranks: slice) -> None:
        own, earlier = a[:, ranks], a[:, : ranks.start]
        grad[:, ranks].add_((own @ earlier.transpose(1, 2) @ earlier).mul_(2 * self.number))


RULES: dict[str, type[Rule]] = {"l2": L2, "ewc": EWC, "a-gem": AGEM, "olora": OLoRA}
