"""Rows that hold named tensors, their slots, each a leaf of autograd."""

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..errors import UserError
from ..kernels.shared_ops import huge_pages
from .rows import Rows

HEAD = ("head.weight", "head.bias")
ALIGNMENT = 32  # elements, 64 bytes in 16-bit types: slots and rows start there, so that a row's address never changes its bits

UNCOPIED = ("_leaves", "_spans", "_fresh", "_writes")  # of a bank's attributes


class Slot(NamedTuple):
    """A tensor's columns in its adapter's row: start:start+numel(shape)."""

    start: int
    shape: tuple[int, ...]


class SlotRows(Rows):
    """Rows of slots, the head's last where there is one.

    slots: by name.
    PER_ROW: names of attributes, [G, ...], that belong to rows beside their weights.
    """

    PER_ROW: tuple[str, ...] = ()

    def __init__(self, slots: Mapping[str, Slot], rows: int, dtype: torch.dtype, device: str | torch.device):
        """Rows of zeros. dtype: of the working copy."""
        self.slots = slots
        self.head_start = slots[HEAD[0]].start if HEAD[0] in slots else None
        param = huge_pages(torch.empty(rows, row_width(slots), dtype=torch.float32, device=device)).zero_()
        super().__init__(param, param if dtype == torch.float32 else param.to(dtype))
        self._make_leaves()

    def _make_leaves(self) -> None:
        """One autograd leaf per slot, sharing the bank's memory; a hook adds its gradient into `grad`."""
        self._spans: dict[tuple[int, int], Self] = {}
        self._leaves = {name: self.view(self.work, name).detach().requires_grad_() for name in self.slots}
        for name, leaf in self._leaves.items():
            leaf.register_post_accumulate_grad_hook(_adder(self.view(self.grad, name)))

    def __getstate__(self) -> dict:
        """What a copy has. Leaves are made anew, since no copy takes their hooks along."""
        return {name: value for name, value in vars(self).items() if name not in UNCOPIED}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._make_leaves()

    def _twin(self) -> Self:
        """A bank with all that this one has, itself not copied."""
        twin = object.__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    @property
    def layout(self) -> dict[str, list[int]]:
        """Each slot's first column, then its shape."""
        return {name: [slot.start, *slot.shape] for name, slot in self.slots.items()}

    def view(self, matrix: Tensor, name: str) -> Tensor:
        """The slot `name` of every row of a matrix [G, P], as a strided view [G, *shape]."""
        slot = self.slots[name]
        return matrix[:, slot.start : slot.start + math.prod(slot.shape)].unflatten(1, slot.shape)

    @property
    def head(self) -> tuple[Tensor, Tensor] | None:
        """The heads' weights [G, C, H] and biases [G, C]; None for a bank without heads."""
        return None if self.head_start is None else (self._leaves[HEAD[0]], self._leaves[HEAD[1]])

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """The slots whose names, such as 0.qkv.a or head.bias, match one of the patterns of `fnmatch`.

        Raises UserError for a pattern that none matches.
        """
        return matching(list(self.slots), patterns)

    def columns(self, patterns: Sequence[str]) -> Tensor:
        """Whether a column is of a slot that matches, bool [P], on param's device. Raises UserError as `matching`."""
        mask = torch.zeros(self.param.shape[1], dtype=torch.bool)
        for slot in map(self.slots.__getitem__, self.matching(patterns)):
            mask[slot.start : slot.start + math.prod(slot.shape)] = True
        return mask.to(self.param.device)

    def trainable(self, g: int, patterns: Sequence[str] = ("*",)) -> int:
        """Number of weights that row g trains in slots that match."""
        return sum(math.prod(self.slots[name].shape) for name in self.matching(patterns))

    def _like(self, rows: slice | Tensor, param: Tensor, *arguments: Tensor | None) -> Self:
        """A bank of the same layout over other rows. param, arguments: of `Rows`."""
        other = self._twin()
        for name in self.PER_ROW:
            setattr(other, name, getattr(self, name)[rows])
        Rows.__init__(other, param, *arguments)
        other._make_leaves()
        return other

    def span(self, start: int, end: int) -> Self:
        """Rows start..end-1 as a bank that shares this one's memory: gradients and optimiser's state included."""
        if (start, end) == (0, self.adapters):
            return self
        if (start, end) not in self._spans:
            rows = slice(start, end)
            work = self.work[rows]
            param = work if self.work is self.param else self.param[rows]
            self._spans[start, end] = self._like(rows, param, work, self.grad[rows], self.steps[rows], self.moments[:, rows])
        return self._spans[start, end]

    def select(self, rows: Sequence[int]) -> Self:
        """A new bank with copies of some rows and their optimiser's state, in the given order: forks, subsets."""
        return self._like(torch.as_tensor(rows, dtype=torch.long), *self._copies(rows))

    @torch.no_grad()
    def copy_rows_(self, rows: Sequence[int], source: Rows) -> None:
        """Overwrite some rows with all rows of `source`: weights, what else is theirs, optimiser's state.

        Raises ValueError for a bank of another model, targets, rank or head.
        """
        if not isinstance(source, type(self)) or source.slots != self.slots:
            raise ValueError("the banks differ in model, targets, rank or head")
        index = torch.as_tensor(rows, dtype=torch.long)
        for name in self.PER_ROW:
            own = getattr(self, name)
            own[index.to(own.device)] = getattr(source, name)
        super().copy_rows_(rows, source)


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(leaf: Tensor) -> None:
        assert leaf.grad is not None
        total.add_(leaf.grad)
        leaf.grad = None

    return add


def matching(slots: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of the slots, by name, that match one of the patterns. Raises UserError for a pattern that none matches."""
    matched = {pattern: [name for name in slots if fnmatchcase(name, pattern)] for pattern in patterns}
    for pattern, names in matched.items():
        if not names:
            first, *_, last = (name for name in slots if name not in HEAD)
            allowed = f"they are {first} to {last}, and {', '.join(HEAD)}"
            raise UserError(f"{pattern!r} matches no part of an adapter; {allowed}")
    return [name for name in slots if any(name in names for names in matched.values())]


def laid_out(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Slot]:
    """Slots side by side, each where one may start."""
    slots, start = {}, 0
    for name, shape in shapes.items():
        slots[name] = Slot(start, shape)
        start = aligned(start + math.prod(shape))
    return slots


def aligned(columns: int) -> int:
    """The next column where a slot may start."""
    return -(-columns // ALIGNMENT) * ALIGNMENT


def row_width(slots: Mapping[str, Slot]) -> int:
    """P, the length of a row of these slots."""
    last = list(slots.values())[-1]
    return aligned(last.start + math.prod(last.shape))
