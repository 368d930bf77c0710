"""All adapters of a study in one matrix: adapter g is row g.

A row holds, layer by layer, A [slices*R, K] and B [N, R] of each adapted linear, then the tagging head. Saving, forking,
loading or dropping an adapter is a row copy; the optimiser is elementwise; a gradient norm is a row reduction.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from .convert import LINEARS, QKV
from .peft_files import read_adapter, write_adapter
from .xlmr import XLMRConfig

TARGETS = ("qkv", "out", "up", "down")
ALIGNMENT = 32  # slots and rows start at multiples of this: 64 bytes in 16-bit types, so a row's address never changes its bits


class Slot(NamedTuple):
    """Where a tensor of each adapter lies in its row: columns start:start+numel(shape)."""

    start: int
    shape: tuple[int, ...]


class AdapterBank:
    """LoRA adapters of one model, with a tagging head each, as a matrix [G, P].

    model_or_config: the model or its XLMRConfig. adapters: G. rank: one for all, or one per adapter; the bank is as wide as the
    largest, and an adapter's tail stays zero. alpha: LoRA's, one or one per adapter; None means the rank, so that the scaling
    alpha / rank is 1. targets: "all-linear" or some of qkv, out, up, down. head: whether rows end in a tagging head.
    dtype: of the working copy that the model computes with; the master copy `param` is fp32. seeds: one per adapter.
    exact: the base products under the adapters are the same to the bit whoever shares the batch.
    Attributes: param fp32 [G, P]; work [G, P]; grad [G, P], where the gradients of the working copy land; ranks int64 [G];
    scaling fp32 [G]. Raises UserError for a rank below 1 or an unknown target.
    """

    def __init__(
        self,
        model_or_config,
        adapters: int = 52,
        rank: int | Sequence[int] = 32,
        targets: str | Sequence[str] = "all-linear",
        *,
        alpha: float | Sequence[float] | None = None,
        head: bool = True,
        seeds: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        exact: bool = False,
    ):
        self.config: XLMRConfig = getattr(model_or_config, "config", model_or_config)
        self.targets = TARGETS if targets == "all-linear" else tuple(targets)
        unknown = set(self.targets) - set(TARGETS)
        if unknown or isinstance(targets, str) and targets != "all-linear":
            raise UserError(f"unknown LoRA targets {targets!r}; allowed: all-linear, or some of {', '.join(TARGETS)}")
        ranks = [rank] * adapters if isinstance(rank, int) else list(rank)
        if len(ranks) != adapters or any(r < 1 for r in ranks):
            raise UserError(f"rank must be a positive number, or one for each of the {adapters} adapters; got {rank}")
        alphas = ranks if alpha is None else [alpha] * adapters if isinstance(alpha, int | float) else list(alpha)
        self.rank, self.has_head, self.exact = max(ranks), head, exact
        self.slots = _slots(self.config, self.targets, self.rank, head)
        self.ranks = torch.tensor(ranks, device=device)
        self.scaling = torch.tensor([a / r for a, r in zip(alphas, ranks, strict=True)], dtype=torch.float32, device=device)
        param = torch.zeros(adapters, _width(self.slots), device=device)
        self._bind(param, param if dtype == torch.float32 else param.to(dtype), None)
        for g in range(adapters):
            self.init_(g, seeds[g] if seeds is not None else g)

    @staticmethod
    def width_of(config: XLMRConfig, rank: int, targets: Sequence[str] = TARGETS, *, head: bool = True) -> int:
        """P, the length of a row, for a rank."""
        return _width(_slots(config, targets, rank, head))

    def _bind(self, param: Tensor, work: Tensor, grad: Tensor | None) -> None:
        self.param, self.work = param, work
        self.grad = torch.zeros_like(work) if grad is None else grad
        self.ranks_if_mixed = None if bool((self.ranks == self.rank).all()) else self.ranks
        # Leaves of their own over the same memory, each adding its gradient to its place: autograd never builds a matrix [G, P].
        self._leaves = {name: self.view(self.work, name).detach().requires_grad_() for name in self.slots}
        for name, leaf in self._leaves.items():
            leaf.register_post_accumulate_grad_hook(_adder(self.view(self.grad, name)))

    def view(self, matrix: Tensor, name: str) -> Tensor:
        """The slot `name` of every row of a matrix [G, P], as a strided view [G, *shape]."""
        slot = self.slots[name]
        return matrix[:, slot.start : slot.start + math.prod(slot.shape)].unflatten(1, slot.shape)

    @property
    def adapters(self) -> int:
        return self.param.shape[0]

    @property
    def head(self) -> tuple[Tensor, Tensor] | None:
        """The heads' weights [G, C, H] and biases [G, C]; None for a bank without heads."""
        return (self._leaves["head.weight"], self._leaves["head.bias"]) if self.has_head else None

    def adapters_of(self, layer: int, name: str) -> tuple[Tensor, Tensor] | None:
        """lora_a [G, slices*R, K] and lora_b [G, N, R] of a layer's linear; None where it carries no adapters."""
        if name not in self.targets:
            return None
        return self._leaves[f"{layer}.{name}.a"], self._leaves[f"{layer}.{name}.b"]

    @torch.no_grad()
    def init_(self, g: int, seed: int) -> None:
        """Draws adapter g anew: A uniform in ±1/√K (peft's), B zero, head normal. Depends on the seed and g's rank alone."""
        generator = torch.Generator().manual_seed(seed)
        rank = int(self.ranks[g])
        self.param[g].zero_()
        for name in self.slots:
            tensor = self.view(self.param, name)[g]
            if name.endswith(".a"):
                slices, inputs = tensor.shape[0] // self.rank, tensor.shape[1]
                drawn = torch.empty(slices, rank, inputs).uniform_(-1, 1, generator=generator) / math.sqrt(inputs)
                tensor.view(slices, self.rank, inputs)[:, :rank] = drawn
            elif name == "head.weight":
                deviation = self.config.initializer_range
                tensor.copy_(torch.empty(tensor.shape).normal_(0, deviation, generator=generator))
        self.refresh(g)

    @torch.no_grad()
    def refresh(self, g: int | None = None) -> None:
        """Copies the master copy of adapter g (None: of all) to the working copy."""
        if self.work is not self.param:
            rows = slice(None) if g is None else g
            self.work[rows].copy_(self.param[rows])

    def zero_grad(self) -> None:
        """Zeroes the gradients of all adapters."""
        self.grad.zero_()

    def trainable(self, g: int) -> int:
        """Number of weights that adapter g trains: its ranks' share of the row, and its head."""
        sizes = {name: math.prod(slot.shape) for name, slot in self.slots.items()}
        lora = sum(size for name, size in sizes.items() if not name.startswith("head"))
        return lora * int(self.ranks[g]) // self.rank + sum(sizes.values()) - lora

    def _like(self, rows, param: Tensor, work: Tensor, grad: Tensor | None) -> "AdapterBank":
        other = object.__new__(AdapterBank)
        other.config, other.targets, other.rank, other.slots = self.config, self.targets, self.rank, self.slots
        other.has_head, other.exact = self.has_head, self.exact
        other.ranks, other.scaling = self.ranks[rows], self.scaling[rows]
        other._bind(param, work, grad)
        return other

    def span(self, start: int, end: int) -> "AdapterBank":
        """Adapters start..end-1 as a bank that shares this one's memory, gradients included."""
        rows = slice(start, end)
        work = self.work[rows]
        return self._like(rows, work if self.work is self.param else self.param[rows], work, self.grad[rows])

    def select(self, rows: Sequence[int]) -> "AdapterBank":
        """A new bank that holds copies of some adapters, in the given order: forks, subsets, and what is left after a drop."""
        index = torch.as_tensor(rows, dtype=torch.long)
        param = self.param[index]
        return self._like(index, param, param if self.work is self.param else param.to(self.work.dtype), None)

    @torch.no_grad()
    def copy_row_(self, g: int, source: "AdapterBank", row: int) -> None:
        """Overwrites adapter g with adapter `row` of a bank of the same width."""
        if source.slots != self.slots:
            raise ValueError("the banks differ in model, targets, rank or head")
        self.param[g] = source.param[row]
        self.ranks[g], self.scaling[g] = source.ranks[row], source.scaling[row]
        self.ranks_if_mixed = None if bool((self.ranks == self.rank).all()) else self.ranks
        self.refresh(g)

    def _peft_tensors(self, g: int) -> dict[str, Tensor]:
        """Views into row g under peft's names, at the adapter's own rank."""
        rank, tensors = int(self.ranks[g]), {}
        for layer in range(self.config.num_hidden_layers):
            for target in self.targets:
                a, b = (self.view(self.param, f"{layer}.{target}.{kind}")[g] for kind in "ab")
                names = [f"attention.self.{part}" for part in QKV] if target == "qkv" else [LINEARS[target]]
                prefix = f"base_model.model.roberta.encoder.layer.{layer}"
                for name, a_part, b_part in zip(names, a.chunk(len(names)), b.chunk(len(names)), strict=True):
                    tensors[f"{prefix}.{name}.lora_A.weight"] = a_part[:rank]
                    tensors[f"{prefix}.{name}.lora_B.weight"] = b_part[:, :rank]
        if self.has_head:
            for kind in ("weight", "bias"):
                tensors[f"base_model.model.classifier.{kind}"] = self.view(self.param, f"head.{kind}")[g]
        return tensors

    def save_peft(self, folder: str | Path, g: int) -> None:
        """Writes adapter g as peft does: adapter_config.json and adapter_model.safetensors."""
        names = {"qkv": r"attention\.self\.(query|key|value)"} | {k: v.replace(".", r"\.") for k, v in LINEARS.items()}
        # A pattern, since the plain name output.dense would also match attention.output.dense.
        wanted = "|".join(names[target] for target in self.targets)
        write_adapter(
            folder,
            self._peft_tensors(g),
            rank=int(self.ranks[g]),
            scaling=float(self.scaling[g]),
            task_type="TOKEN_CLS",
            target_modules=rf".*encoder\.layer\.\d+\.({wanted})",
            modules_to_save=["classifier"] if self.has_head else None,
        )

    @torch.no_grad()
    def load_peft(self, folder: str | Path, g: int) -> None:
        """Overwrites adapter g with one that peft saved. Linears it does not adapt get a zero update; its head may be missing.

        Raises UserError for files that are missing or damaged, a rank above the bank's, or tensors the bank has no place for.
        """
        rank, scaling, tensors = read_adapter(folder, self.rank)
        before = self.param[g].clone(), self.ranks[g].clone()
        head = {name: tensor.clone() for name, tensor in self._peft_tensors(g).items() if ".classifier." in name}
        self.ranks[g] = rank
        self.param[g].zero_()
        places = self._peft_tensors(g)
        bad = [n for n, t in tensors.items() if n not in places or places[n].shape != t.shape]
        if bad:
            self.param[g], self.ranks[g] = before
            shape = tuple(tensors[bad[0]].shape)
            raise UserError(f"{folder}: {bad[0]} {shape} has no place in this bank ({', '.join(self.targets)})")
        for name, tensor in (head | tensors).items():
            places[name].copy_(tensor)
        self.scaling[g] = scaling
        self.ranks_if_mixed = None if bool((self.ranks == self.rank).all()) else self.ranks
        self.refresh(g)


def _adder(place: Tensor):
    def add(leaf: Tensor) -> None:
        place.add_(leaf.grad)
        leaf.grad = None

    return add


def _slots(config: XLMRConfig, targets: Sequence[str], rank: int, head: bool) -> dict[str, Slot]:
    width, inner = config.hidden_size, config.intermediate_size
    sizes = {"qkv": (width, 3 * width, 3), "out": (width, width, 1), "up": (width, inner, 1), "down": (inner, width, 1)}
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(config.num_hidden_layers):
        for target in targets:
            inputs, outputs, slices = sizes[target]
            shapes[f"{layer}.{target}.a"] = (slices * rank, inputs)
            shapes[f"{layer}.{target}.b"] = (outputs, rank)
    if head:
        shapes["head.weight"], shapes["head.bias"] = (config.num_labels, width), (config.num_labels,)
    slots, start = {}, 0
    for name, shape in shapes.items():
        slots[name] = Slot(start, shape)
        start = _aligned(start + math.prod(shape))
    return slots


def _aligned(columns: int) -> int:
    return -(-columns // ALIGNMENT) * ALIGNMENT


def _width(slots: dict[str, Slot]) -> int:
    last = list(slots.values())[-1]
    return _aligned(last.start + math.prod(last.shape))
