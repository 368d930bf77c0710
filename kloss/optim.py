"""AdamW that trains each adapter as if it were alone.

    optimizer = kloss.optim.AdapterAdamW(model, lr=[1e-3, 3e-4, ...], weight_decay=0.01, max_norm=1.0)

It is a torch.optim.Optimizer with a parameter group for each adapter, so schedulers of torch take a list of schedules.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .kernels.adamw import LARGEST
from .models.rows import Rows
from .models.settings import one_each
from .models.stacked import StackedRows

Rate = float | Callable[[int], float]
MOMENTS = ("exp_avg", "exp_avg_sq", "steps")
NOT_SAVED = ("params", "schedule")
COPIED = ("rows", "betas", "eps", "norms", "skipped")


class AdapterAdamW(torch.optim.Optimizer):
    """AdamW with rate, decay, clipping and step of each adapter, whose update depends on its own gradients alone.

    model: a model after `kloss.attach`, or an `AdapterBank`. Only adapters are trained, which must be fp32: a head that you train
        beside them wants an optimiser of its own.
    lr: at least 0, or a schedule: a function from the updates that the adapter had to its rate.
    betas, eps: as in torch's AdamW, for all adapters.
    weight_decay: at least 0.
    max_norm: above 0; gradients of an adapter whose norm is larger are clipped to it. inf: never.

    lr, weight_decay and max_norm are one for all or one for each adapter, and entries of the adapter's parameter group.
    An adapter whose gradients are all zero or None had no rows. It is left to the bit: weights, moments, step. So is one whose
    gradients are not finite: a warning names it, and `skipped` does until the next step. `norms`, fp32 [G], are the norms of the
    last step, before clipping. torch's GradScaler has one scale for all: where one adapter overflows, it skips the step of all.
    Raises UserError for a model without adapters, adapters that are not fp32, and numbers out of range.
    Source: Loshchilov and Hutter 2017, arXiv 1711.05101, by `kernels.adapter_adamw_`.
    """

    def __init__(
        self,
        model: nn.Module | Rows,
        lr: Rate | Sequence[Rate] = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Sequence[float] = 0.01,
        max_norm: float | Sequence[float] = math.inf,
    ):
        if not all(0 <= beta < 1 for beta in betas) or not 0 < eps <= LARGEST:
            raise UserError(f"betas must be two numbers in [0, 1) and eps a finite one above 0, got {betas!r} and {eps!r}")
        self.rows = model if isinstance(model, Rows) else StackedRows(model)
        adapters, self.betas, self.eps = self.rows.adapters, betas, eps
        self.norms, self.skipped = torch.zeros(adapters), list[str]()
        rates: list[Any] = [lr] * adapters if callable(lr) or isinstance(lr, Real) else list(lr)  # type: ignore[arg-type]
        first = [rate(0) if callable(rate) else rate for rate in rates]
        at_least_0 = "a finite number of at least 0", lambda number: 0 <= number <= LARGEST
        settings = {
            "name": self.rows.names,
            "lr": one_each("lr", first, adapters, *at_least_0),
            "weight_decay": one_each("weight_decay", weight_decay, adapters, *at_least_0),
            "max_norm": one_each("max_norm", max_norm, adapters, "above 0", lambda number: number > 0),
            "schedule": [rate if callable(rate) else None for rate in rates],
        }
        groups = [dict(zip(settings, values, strict=True)) for values in zip(*settings.values(), strict=True)]
        # Each tensor holds all adapters, and torch wants it in one group.
        super().__init__([{"params": [] if g else self.rows.parameters} | group for g, group in enumerate(groups)], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update each adapter that has gradients. Returns the closure's result, or None.

        Raises ValueError for an entry of a parameter group that is out of range; then no adapter has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.follow()
        rows, active = self.rows, self.rows.collect()
        if any(group["schedule"] is not None for group in self.param_groups):  # else nobody waits for a GPU
            for group, is_active, steps in zip(self.param_groups, active.tolist(), rows.steps.tolist(), strict=True):
                if is_active and group["schedule"] is not None:
                    group["lr"] = group["schedule"](steps)
        lr, weight_decay, max_norm = (
            torch.tensor([group[key] for group in self.param_groups], dtype=torch.float32, device=rows.param.device)
            for key in ("lr", "weight_decay", "max_norm")
        )
        norms = rows.adamw_(lr, weight_decay=weight_decay, max_norm=max_norm, active=active, betas=self.betas, eps=self.eps)
        rows.spread(active)
        self.norms = norms.cpu()
        self.skipped = [name for name, norm in zip(rows.names, self.norms.tolist(), strict=True) if not math.isfinite(norm)]
        if self.skipped:
            which = f"adapter {self.skipped[0]} has" if len(self.skipped) == 1 else f"adapters {', '.join(self.skipped)} have"
            warnings.warn(f"{which} gradients that are not finite: weights and moments stay as they were", stacklevel=2)
        return loss

    def follow(self) -> None:
        """Follow adapters that came, went or began anew (`kloss.adapters`, `load_peft`), and a model that moved to a device.

        Each step does this by itself.

        A new adapter gets the settings of the first, a fork those of its source; they can be changed in its parameter group.
        """
        rows = self.rows.follow()
        if rows is not None:
            groups = [{**self.param_groups[max(row, 0)], "params": []} for row in rows]
            groups[0]["params"] = self.rows.parameters
            self.param_groups[:] = groups
        for group, name in zip(self.param_groups, self.rows.names, strict=True):
            group["name"] = name

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.rows.zero_grad()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy has: the adapters too, so copy a model and its optimiser in one call."""
        own = vars(self)
        return super().__getstate__() | {name: own[name] for name in COPIED}

    def state_dict(self) -> dict[str, Any]:
        """The adapters' moments and steps, in rows, with their names; and their parameter groups, without schedules."""
        self.follow()
        state = {name: getattr(self.rows, name) for name in MOMENTS}
        state |= {"names": [*self.rows.names], "layout": self.rows.layout, "betas": self.betas, "eps": self.eps}
        groups = [{key: value for key, value in group.items() if key not in NOT_SAVED} for group in self.param_groups]
        return {"state": state, "param_groups": groups}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`. Adapters are known by their names, and may stand in another order.

        Raises UserError, with nothing changed, for a state of another optimiser, other adapters or other layers.
        """
        self.follow()
        state, groups = state_dict["state"], state_dict["param_groups"]
        if not {*MOMENTS, "names", "layout"} <= state.keys():
            raise UserError("this state is not of an AdapterAdamW")
        names, own = state["names"], self.rows.names
        if {*names} != {*own}:
            raise UserError(f"this state is of adapters {', '.join(names)}, the model has {', '.join(own)}")
        if state["layout"] != self.rows.layout:
            raise UserError("this state is of other layers, or of adapters of another largest rank")
        order = torch.tensor([names.index(name) for name in own])
        for name in MOMENTS:
            getattr(self.rows, name).copy_(state[name][order.to(state[name].device)])
        self.betas, self.eps = tuple(state["betas"]), state["eps"]
        for group, i in zip(self.param_groups, order.tolist(), strict=True):
            group.update({key: value for key, value in groups[i].items() if key not in NOT_SAVED})
