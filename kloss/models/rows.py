"""Weights of several learners as the rows of a matrix, each row with all that its optimiser knows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import Dropout, Segments, adapter_adamw_
from ..kernels.shared_ops import huge_pages

BETAS, EPS = (0.9, 0.999), 1e-8
STATE = ("param", "exp_avg", "exp_avg_sq", "steps")


class Rows:
    """G learners, one a row of P weights. This class adapts no layer of a model; `AdapterBank` does.

    param: fp32 [G, P], the master copy.
    work: [G, P], the copy that the model computes with, in its dtype; `param` itself where that is fp32.
    grad: [G, P] in work's dtype.
    exp_avg, exp_avg_sq: fp32 [G, P], AdamW's moments; allocated when first used.
    steps: int64 [G], the updates that each row had.
    """

    scaling: Tensor  # of banks with adapters
    ranks_if_mixed: Tensor | None = None
    head_start: int | None = None  # the column where the heads begin, behind all else; None: no head of a rate of its own
    exact = False
    capturable = True  # whether passes with it read nothing back from a GPU, so that a CUDA graph can hold them

    def __init__(
        self,
        param: Tensor,
        work: Tensor | None = None,
        grad: Tensor | None = None,
        steps: Tensor | None = None,
        moments: Tensor | None = None,
    ):
        self.param, self.work = param, param if work is None else work
        self.grad = huge_pages(torch.empty_like(self.work)).zero_() if grad is None else grad
        self.steps = param.new_zeros(param.shape[0], dtype=torch.long) if steps is None else steps
        self._moments = moments  # fp32 [2, G, P]

    @property
    def adapters(self) -> int:
        return self.param.shape[0]

    @property
    def moments(self) -> Tensor:
        """exp_avg and exp_avg_sq as fp32 [2, G, P]."""
        if self._moments is None:
            self._moments = huge_pages(self.param.new_empty(2, *self.param.shape)).zero_()
        return self._moments

    @property
    def exp_avg(self) -> Tensor:
        return self.moments[0]

    @property
    def exp_avg_sq(self) -> Tensor:
        return self.moments[1]

    @property
    def head(self) -> tuple[Tensor, Tensor] | None:
        """The heads' weights and biases; None: the model's own head is used."""
        return None

    def adapters_of(self, layer: int, name: str) -> tuple[Tensor, Tensor] | None:
        """lora_a and lora_b of a layer's linear; None where it carries no adapters."""
        return None

    def gradients_of(self, layer: int, name: str) -> tuple[Tensor, Tensor] | None:
        """Where backward writes the gradients of `adapters_of`; None: it adds them to `grad`."""
        return None

    def linear(self, layer: int, name: str, x: Tensor, base: nn.Linear, segments: Segments) -> Tensor | None:
        """A layer's whole linear, where rows are of a method other than LoRA."""
        return None

    def attention(
        self, layer: int, qkv: Tensor, cu_seqlens: Tensor, heads: int, segments: Segments, dropout: Dropout | None
    ) -> Tensor | None:
        """A layer's attention, likewise."""
        return None

    def trainable(self, g: int, patterns: Sequence[str] = ("*",)) -> int:
        """Number of weights that row g trains; patterns of slots have a meaning for adapters alone."""
        return self.param.shape[1]

    def zero_grad(self) -> None:
        """Zero the gradients of all rows."""
        self.grad.zero_()

    @property
    def names(self) -> list[str]:
        """What the rows are called."""
        return [str(g) for g in range(self.adapters)]

    @property
    def layout(self) -> dict[str, list[int]]:
        """What a row holds, by name: its first column, then its shape."""
        return {"row": [0, self.param.shape[1]]}

    @property
    def parameters(self) -> list[Tensor]:
        """The tensors that hold the weights."""
        return [self.param]

    def follow(self) -> list[int] | None:
        """The rows of before that these are now; None: they stay."""
        return None

    def collect(self) -> Tensor:
        """Get ready for `adamw_`. Returns bool [G], the rows with a gradient that is not zero."""
        return nonzero(self.grad)

    def spread(self, rows: Tensor) -> None:
        """Take over what `adamw_` did to these rows, bool [G]."""

    @torch.no_grad()
    def refresh(self, rows: int | slice = slice(None)) -> None:
        """Copy the master copy of some rows to the working copy."""
        if self.work is not self.param:
            self.work[rows].copy_(self.param[rows])

    def adamw_(
        self,
        lr: Tensor,
        *,
        weight_decay: Tensor,
        max_norm: Tensor,
        active: Tensor | None = None,
        head_lr: Tensor | None = None,
        betas: tuple[float, float] = BETAS,
        eps: float = EPS,
    ) -> Tensor:
        """Update all rows in place by `adapter_adamw_`, the working copy with them.

        lr, weight_decay, max_norm: fp32 [G], on param's device.
        active: bool [G], the rows to update; None: all.
        head_lr: of the heads, fp32 [G], where rows have `head_start`; None: as all else.
        Returns the gradient norms before clipping, fp32 [G].
        """
        active = torch.ones_like(self.steps, dtype=torch.bool) if active is None else active
        return adapter_adamw_(
            self.param, self.grad, self.exp_avg, self.exp_avg_sq, self.steps, lr,
            betas=betas, eps=eps, weight_decay=weight_decay, max_norm=max_norm, active=active,
            work=None if self.work is self.param else self.work,
            tail=None if head_lr is None else self.head_start, tail_lr=None if self.head_start is None else head_lr,
        )  # fmt: skip

    def span(self, start: int, end: int) -> "Rows":
        """Rows start..end-1, sharing this one's memory."""
        assert (start, end) == (0, self.adapters), "a whole model is one row"
        return self

    def fresh(self, start: int, end: int) -> "Rows":
        """`span` for one backward pass through the whole model, which sets the gradients of its rows: nothing need be zeroed."""
        self.span(start, end).zero_grad()
        return self.span(start, end)

    def select(self, rows: Sequence[int]) -> "Rows":
        """Copies of some rows with their optimiser's state, in the given order."""
        return Rows(*self._copies(rows))

    def _copies(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, None, Tensor, Tensor | None]:
        """The arguments of `Rows` for copies of some rows."""
        index = torch.as_tensor(rows, dtype=torch.long)
        param = self.param[index]
        work = param if self.work is self.param else param.to(self.work.dtype)
        return param, work, None, self.steps[index], None if self._moments is None else self._moments[:, index]

    @torch.no_grad()
    def copy_rows_(self, rows: Sequence[int], source: "Rows") -> None:
        """Overwrite some rows, their optimiser's state included, with all rows of `source`; the inverse of `select`."""
        index = torch.as_tensor(rows, dtype=torch.long)
        on_device = index.to(self.param.device)
        self.param[on_device], self.steps[on_device] = source.param, source.steps
        self.moments[:, on_device] = source.moments
        for row in rows:
            self.refresh(row)

    def reset_state_(self, g: int) -> None:
        """Forget what the optimiser knows of row g."""
        self.steps[g] = 0
        if self._moments is not None:
            self._moments[:, g] = 0

    def state(self) -> dict[str, Tensor]:
        """Everything that decides how training goes on, by the names in STATE. The tensors share this one's memory."""
        return {name: getattr(self, name) for name in STATE}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`. Raises UserError, with nothing changed, for tensors of another name, shape or dtype."""
        overwrite(self.state(), tensors)
        self.refresh()


@torch.no_grad()
def overwrite(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into `own`. Raises UserError, with nothing changed, for tensors of another name, shape or dtype."""
    if tensors.keys() != own.keys():
        raise UserError(f"its tensors are {', '.join(sorted(tensors)) or 'none'}, not {', '.join(own)}")
    for name, tensor in own.items():
        given, needed = ((x.dtype, list(x.shape)) for x in (tensors[name], tensor))
        if given != needed:  # copy_ would broadcast and convert
            raise UserError(f"{name} is {given[0]} of shape {given[1]}, not {needed[0]} of shape {needed[1]}")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


def nonzero(grad: Tensor) -> Tensor:
    """Which rows of [G, ...] hold another number than zero, NaN included: bool [G]."""
    grad = grad.flatten(1)
    return (grad.amin(1) != 0) | (grad.amax(1) != 0)  # aminmax takes ten times as long
