"""The adapters of a model after `attach` as rows, so that they share the bank's optimiser."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..errors import UserError
from .attach import whole_layers
from .rows import Rows, nonzero
from .slots import aligned


class StackedRows(Rows):
    """Adapter g is row g. The model's own weights and gradients are stacked by layer, [G, ...]; a step copies the rows it needs.

    Only factors that require gradients are there. Raises UserError where one is not fp32 or is sharded over processes, or where
    there is none.
    """

    def __init__(self, model: nn.Module):
        self._layers, width = whole_layers(model), 0
        self.slots: dict[tuple[int, str], slice] = {}  # (layer's number, factor's name): its columns
        for i, layer in enumerate(self._layers):
            for kind in ("lora_a", "lora_b"):
                factor = getattr(layer, kind)
                if factor.requires_grad:
                    self.slots[i, kind] = slice(width, width + factor[0].numel())
                    width = aligned(width + factor[0].numel())
        if not self.slots:
            raise UserError("no adapter of this model requires gradients")
        self._check_dtypes()
        super().__init__(self._layers[0].lora_a.new_zeros(len(self.names), width, requires_grad=False))
        self._births = [*self._layers[0].shared.births]
        self._weights, self._grads = self._stacked(self.param), self._stacked(self.grad)

    def __setstate__(self, state: dict) -> None:
        """A copy's parts are of its own matrices, which pickle does not see."""
        vars(self).update(state)
        self._weights, self._grads = self._stacked(self.param), self._stacked(self.grad)

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
        self._weights, self._grads = self._stacked(self.param), self._stacked(self.grad)
        return slots

    def zero_grad(self) -> None:
        """Forget the model's gradients."""
        for factor in self.parameters:
            factor.grad = None

    def collect(self) -> Tensor:
        """Copy weights and gradients of the rows whose gradients are not all zero or None. Returns which these are, bool [G].

        Raises UserError where a factor is not fp32 any more.
        """
        self._check_dtypes()
        factors = self.parameters
        grads = [factor.new_zeros(()).expand(factor.shape) if factor.grad is None else factor.grad for factor in factors]
        torch._foreach_copy_(self._grads, grads)
        active = nonzero(self.grad)
        self._move(active, self._weights, factors)
        return active

    def spread(self, rows: Tensor) -> None:
        """Copy the weights of these rows back."""
        self._move(rows, self.parameters, self._weights)

    def _check_dtypes(self) -> None:
        for i, kind in self.slots:
            if (dtype := getattr(self._layers[i], kind).dtype) != torch.float32:
                raise UserError(f"{self._layers[i].name}.{kind} is {dtype}, adapters are trained in float32")

    def _stacked(self, matrix: Tensor) -> list[Tensor]:
        """Each factor's part of a matrix [G, P], in the factor's shape."""
        return [matrix[:, slot].unflatten(1, factor.shape[1:]) for factor, slot in self._factors()]

    @torch.no_grad()
    def _move(self, rows: Tensor, to: list[Tensor], source: list[Tensor]) -> None:
        """Copy the weights of these rows, bool [G], from the model, or back."""
        if bool(rows.all()):
            torch._foreach_copy_(to, source)
            return
        index = rows.nonzero()[:, 0]
        for a, b in zip(to, source, strict=True):
            a[index.to(a.device)] = b[index.to(b.device)].to(a.device)
