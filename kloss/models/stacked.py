"""The adapters of a model after `attach` as rows, so that they share the bank's optimiser."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attach import adapted_layers
from .bank import aligned
from .rows import Rows, nonzero


class StackedRows(Rows):
    """Adapter g is row g. The model's own weights and gradients are stacked by layer, [G, ...]; a step copies the rows it needs.

    Only factors that require gradients are there. Raises UserError where one is not fp32, or where there is none.
    """

    def __init__(self, model: nn.Module):
        self._layers, width = adapted_layers(model), 0
        self.slots: dict[tuple[int, str], slice] = {}  # (layer's number, factor's name): its columns
        for i, layer in enumerate(self._layers):
            for kind in ("lora_a", "lora_b"):
                factor = getattr(layer, kind)
                if factor.requires_grad:
                    if factor.dtype != torch.float32:
                        raise UserError(f"{layer.name}.{kind} is {factor.dtype}, adapters are trained in float32")
                    self.slots[i, kind] = slice(width, width + factor[0].numel())
                    width = aligned(width + factor[0].numel())
        if not self.slots:
            raise UserError("no adapter of this model requires gradients")
        super().__init__(self._layers[0].lora_a.new_zeros(len(self.names), width, requires_grad=False))
        self._births = [*self._layers[0].shared.births]

    @property
    def names(self) -> list[str]:
        """The adapters' names."""
        return self._layers[0].shared.names

    @property
    def layout(self) -> dict[str, list[int]]:
        """Each factor's first column, then its shape."""
        shapes = {(i, kind): getattr(self._layers[i], kind).shape[1:] for i, kind in self.slots}
        return {f"{self._layers[i].name}.{kind}": [slot.start, *shapes[i, kind]] for (i, kind), slot in self.slots.items()}

    @property
    def parameters(self) -> list[Tensor]:
        """The factors, [G, R, K] and [G, N, R]."""
        return [factor for factor, _ in self._factors()]

    def _factors(self) -> Iterator[tuple[nn.Parameter, slice]]:
        for (i, kind), slot in self.slots.items():
            yield getattr(self._layers[i], kind), slot

    def follow(self) -> list[int] | None:
        """Give each adapter its own moments and steps, after adapters came, went or began anew, or the model moved to a device.

        Returns for each adapter the row that it or what it is a copy of had, -1 for a new one; None: nothing happened.
        """
        shared, before, device = self._layers[0].shared, self._births, self._layers[0].lora_a.device
        if shared.births == before and self.param.device == device:
            return None
        keys, past, slots = [key for key, _ in before], list[int](), list[int]()
        for birth in shared.births:
            source = birth
            while source not in before and source[1] == 0 and source[0] in shared.sources:
                source = shared.sources[source[0]]
            past.append(before.index(source) if source in before else -1)
            key = birth[0]
            while key not in keys and key in shared.sources:
                key = shared.sources[key][0]
            slots.append(keys.index(key) if key in keys else -1)
        moments, steps, rows = self.moments, self.steps, torch.tensor(past, device=self.param.device)
        super().__init__(torch.zeros(len(past), self.param.shape[1], device=device))
        fresh = (rows < 0).to(device)
        self.moments.copy_(moments[:, rows.clamp(min=0)]).masked_fill_(fresh[:, None], 0)
        self.steps.copy_(steps[rows.clamp(min=0)]).masked_fill_(fresh, 0)
        self._births = [*shared.births]
        return slots

    def zero_grad(self) -> None:
        """Forget the model's gradients."""
        for factor, _ in self._factors():
            factor.grad = None

    def collect(self) -> Tensor:
        """Copy weights and gradients of the rows whose gradients are not all zero or None. Returns which these are, bool [G]."""
        active = torch.zeros_like(self.steps, dtype=torch.bool)
        for factor, _ in self._factors():
            if factor.grad is not None:
                active |= nonzero(factor.grad).to(active.device)
        rows = _index(active)
        for factor, slot in self._factors():
            self.param[rows, slot] = _rows(factor.detach(), rows).to(self.param.device)
            self.grad[rows, slot] = 0 if factor.grad is None else _rows(factor.grad, rows).to(self.param.device)
        return active

    def spread(self, rows: Tensor) -> None:
        """Copy the weights of these rows back."""
        index = _index(rows)
        for factor, slot in self._factors():
            weights = self.param[index, slot].unflatten(1, factor.shape[1:]).to(factor.device)
            factor.detach()[index if isinstance(index, slice) else index.to(factor.device)] = weights


def _index(rows: Tensor) -> slice | Tensor:
    """An index of rows, bool [G]."""
    return slice(None) if bool(rows.all()) else rows.nonzero()[:, 0]


def _rows(stacked: Tensor, rows: slice | Tensor) -> Tensor:
    """Some rows of [G, ...], flat."""
    return stacked[rows if isinstance(rows, slice) else rows.to(stacked.device)].flatten(1)
