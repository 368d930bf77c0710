"""All adapters of a study in one matrix: adapter g is row g.

A row holds, layer by layer, A [slices*R, K] and B [N, R] of each adapted linear, then the tagging head.
Saving, forking or loading an adapter is a row copy; the optimiser is elementwise; a gradient norm is a row reduction.
"""

import math
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .convert import LINEARS, QKV
from .peft_files import fitted, read_adapter, write_adapter
from .rows import Rows
from .settings import ALPHA, RANK, one_each
from .slots import HEAD, Slot, SlotRows, laid_out, matching, row_width
from .xlmr import XLMRConfig, XLMRForTokenClassification

TARGETS = ("qkv", "out", "up", "down")


class AdapterBank(SlotRows):
    """LoRA adapters of one model, with a tagging head each, as rows of a matrix [G, P].

    model_or_config: the model or its XLMRConfig.
    adapters: G.
    rank: one for all, or one per adapter; R is the largest, and an adapter's tail stays zero.
    targets: "all-linear" or some of qkv, out, up, down.
    alpha: LoRA's, one or one per adapter; None: the rank, so that the scaling alpha / rank is 1.
    head: whether rows end in a tagging head.
    seeds: one per adapter; None: 0, 1, 2, ...
    dtype: of the working copy; the master copy is fp32.
    exact: the base products under the adapters have the same bits whichever adapters share the batch.
    largest: R, if it is to be larger than the largest rank.
    Attributes beside those of `Rows`: ranks int64 [G] and alphas fp64 [G] on the host; scaling fp32 [G].
    Raises UserError for a rank below 1, an alpha that is not finite, another number of seeds, or an unknown target.
    """

    PER_ROW = ("ranks", "alphas", "scaling")

    def __init__(
        self,
        model_or_config: XLMRConfig | XLMRForTokenClassification,
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
        largest: int = 0,
    ):
        self.config = model_or_config if isinstance(model_or_config, XLMRConfig) else model_or_config.config
        whole = isinstance(adapters, Integral) and not isinstance(adapters, bool)
        if not whole or adapters < 1:
            raise UserError(f"adapters must be a whole number of at least 1, got {adapters!r}")
        adapters = int(adapters)
        self.targets = TARGETS if targets == "all-linear" else tuple(targets)
        fit = {*self.targets} <= {*TARGETS} and 0 < len(self.targets) == len({*self.targets})
        if not fit or isinstance(targets, str) and targets != "all-linear":
            raise UserError(f"unknown LoRA targets {targets!r}; allowed: all-linear, or some of {', '.join(TARGETS)}")
        ranks = one_each("rank", rank, adapters, *RANK)
        alphas = ranks if alpha is None else one_each("alpha", alpha, adapters, *ALPHA)
        if seeds is not None and len(seeds) != adapters:
            raise UserError(f"seeds must be one for each of the {adapters} adapters, got {len(seeds)}")
        self.rank, self.has_head, self.exact = max(*ranks, largest), head, exact
        self.ranks, self.alphas = torch.tensor(ranks), torch.tensor([float(a) for a in alphas], dtype=torch.float64)
        self.scaling = torch.tensor([a / r for a, r in zip(alphas, ranks, strict=True)], dtype=torch.float32, device=device)
        super().__init__(_slots(self.config, self.targets, self.rank, head), adapters, dtype, device)
        for g in range(adapters):
            self.init_(g, seeds[g] if seeds is not None else g)

    @staticmethod
    def width_of(config: XLMRConfig, rank: int, targets: Sequence[str] = TARGETS, *, head: bool = True) -> int:
        """P, the length of a row, for a rank."""
        return row_width(_slots(config, targets, rank, head))

    def _make_leaves(self) -> None:
        self._writes: dict[str, Tensor] = {}
        super()._make_leaves()
        self._ranks_changed()

    def _ranks_changed(self) -> None:
        mixed = bool((self.ranks < self.rank).any())
        self.ranks_if_mixed = self.ranks.to(self.param.device) if mixed else None
        self._spans = {}
        self._fresh: dict[tuple[int, int], AdapterBank] = {}

    def adapters_of(self, layer: int, name: str) -> tuple[Tensor, Tensor] | None:
        """lora_a [G, slices*R, K] and lora_b [G, N, R] of a layer's linear; None where it carries no adapters."""
        if name not in self.targets:
            return None
        return self._leaves[f"{layer}.{name}.a"], self._leaves[f"{layer}.{name}.b"]

    def gradients_of(self, layer: int, name: str) -> tuple[Tensor, Tensor] | None:
        """Where backward writes the gradients of `adapters_of`, which have to be there; None: it adds them to `grad`."""
        if not self._writes or name not in self.targets:
            return None
        return self._writes[f"{layer}.{name}.a"], self._writes[f"{layer}.{name}.b"]

    @torch.no_grad()
    def init_(self, g: int, seed: int) -> None:
        """Draw adapter g anew: A uniform in ±1/√K (peft's), B zero, head normal. Depends on the seed and g's rank alone."""
        self.reset_state_(g)
        generator = torch.Generator().manual_seed(seed)
        rank = int(self.ranks[g])
        self.param[g].zero_()
        for name in self.slots:
            tensor = self.view(self.param, name)[g]
            if name.endswith(".a"):
                slices, inputs = tensor.shape[0] // self.rank, tensor.shape[1]
                drawn = torch.empty(slices, rank, inputs, dtype=torch.float32).uniform_(-1, 1, generator=generator)
                tensor.view(slices, self.rank, inputs)[:, :rank] = drawn / math.sqrt(inputs)
            elif name == "head.weight":
                drawn = torch.empty(tensor.shape, dtype=torch.float32)
                tensor.copy_(drawn.normal_(0, self.config.initializer_range, generator=generator))
        self.refresh(g)

    @torch.no_grad()
    def load_row_(self, g: int, row: Tensor, rank: int) -> None:
        """Overwrite adapter g's weights with a row of a bank of another largest rank; its optimiser's state starts anew.

        row: fp32 [P'], the row of an adapter with g's own rank in a bank whose largest rank is `rank`.
        Raises ValueError for a row of another length.
        """
        self.param[g] = self.placed(g, row, rank)
        self.reset_state_(g)
        self.refresh(g)

    def placed(self, g: int, row: Tensor, rank: int) -> Tensor:
        """What has a value for each weight of adapter g in a bank whose largest rank is `rank`, [P'], as in this bank, [P].

        Raises ValueError for a row of another length.
        """
        slots = _slots(self.config, self.targets, rank, self.has_head)
        if row.shape != (row_width(slots),):
            raise ValueError(f"a row of rank {rank} has {row_width(slots)} weights here, not {list(row.shape)}")
        own, placed = int(self.ranks[g]), torch.zeros_like(self.param[g])
        for name, (start, shape) in slots.items():
            given, place = row[start : start + math.prod(shape)].view(shape).to(placed.device), self.view(placed[None], name)[0]
            if name.endswith(".a"):
                place.view(-1, self.rank, shape[1])[:, :own] = given.view(-1, rank, shape[1])[:, :own]
            elif name.endswith(".b"):
                place[:, :own] = given[:, :own]
            else:
                place.copy_(given)
        return placed

    def columns(self, patterns: Sequence[str], ranks: slice | None = None) -> Tensor:
        """As that of `SlotRows`. ranks: those whose columns of A and B count; None: all."""
        mask = super().columns(patterns)
        if ranks is not None:
            others = torch.ones(self.rank, dtype=torch.bool, device=mask.device)
            others[ranks] = False
            for name in self.slots:
                if name.endswith(".a"):
                    self.a_of(mask[None], 0, name)[:, others] = False
                elif name.endswith(".b"):
                    self.view(mask[None], name)[0][:, others] = False
        return mask

    def a_of(self, matrix: Tensor, g: int, name: str) -> Tensor:
        """The slot `name` of row g of a matrix [G, P], an A, as a view [slices, R, K]."""
        return self.view(matrix, name)[g].unflatten(0, (-1, self.rank))

    @torch.no_grad()
    def open_(self, g: int, ranks: slice, before: slice) -> None:
        """Have some ranks of adapter g, untrained so far, go on with the second moments of others that were trained.

        Of moments of 0 that AdamW takes for those of all its steps, the first updates would be several times too large.
        """
        for name in self.slots:
            if name.endswith(".a"):
                squares = self.a_of(self.exp_avg_sq, g, name)
                squares[:, ranks] = squares[:, before]
            elif name.endswith(".b"):
                squares = self.view(self.exp_avg_sq, name)[g]
                squares[:, ranks] = squares[:, before]

    @staticmethod
    def check_patterns(config: XLMRConfig, patterns: Sequence[str], targets: Sequence[str] = TARGETS) -> None:
        """Raise UserError, as `matching` of a bank with these sizes."""
        matching(list(_slots(config, targets, 1, True)), patterns)

    def trainable(self, g: int, patterns: Sequence[str] = ("*",)) -> int:
        """Number of weights that adapter g trains in slots that match: its ranks' share of the row, and its head."""
        sizes = {name: math.prod(self.slots[name].shape) for name in self.matching(patterns)}
        lora = sum(size for name, size in sizes.items() if not name.startswith("head"))
        return lora * int(self.ranks[g]) // self.rank + sum(sizes.values()) - lora

    def fresh(self, start: int, end: int) -> "AdapterBank":
        """`span` for one backward pass through the whole model, which sets the gradients of its rows: nothing need be zeroed."""
        if (start, end) not in self._fresh:
            self._fresh[start, end] = bank = self.span(start, end)._twin()
            bank._writes = {name: bank.view(bank.grad, name) for name in self.slots}
            # Of the factors without a hook; the heads' gradients are still added.
            bank._leaves = {n: x if n in HEAD else x.detach().requires_grad_() for n, x in bank._leaves.items()}
        for name in HEAD if self.has_head else ():
            self._fresh[start, end]._writes[name].zero_()
        return self._fresh[start, end]

    @torch.no_grad()
    def copy_rows_(self, rows: Sequence[int], source: Rows) -> None:
        """Overwrite some adapters with all adapters of `source`: weights, rank, scaling, optimiser's state.

        Raises ValueError for a bank of another model, targets, rank or head.
        """
        super().copy_rows_(rows, source)
        self._ranks_changed()

    def _peft_tensors(self, g: int, rank: int | None = None) -> dict[str, Tensor]:
        """Views into row g under peft's names. rank: None for the adapter's own."""
        whole = isinstance(g, Integral)
        if not whole or not 0 <= g < self.adapters:
            raise UserError(f"there is no adapter {g}, the bank has 0 to {self.adapters - 1}")
        rank, tensors = int(self.ranks[g]) if rank is None else rank, {}
        for layer in range(self.config.num_hidden_layers):
            for target in self.targets:
                a, b = (self.view(self.param, f"{layer}.{target}.{kind}")[g] for kind in "ab")
                names = [f"attention.self.{part}" for part in QKV] if target == "qkv" else [LINEARS[target]]
                prefix = f"base_model.model.{self.config.prefix}encoder.layer.{layer}"
                for name, a_part, b_part in zip(names, a.chunk(len(names)), b.chunk(len(names)), strict=True):
                    tensors[f"{prefix}.{name}.lora_A.weight"] = a_part[:rank]
                    tensors[f"{prefix}.{name}.lora_B.weight"] = b_part[:, :rank]
        if self.has_head:
            for kind in ("weight", "bias"):
                tensors[f"base_model.model.classifier.{kind}"] = self.view(self.param, f"head.{kind}")[g]
        return tensors

    def _target_modules(self) -> list[str] | str:
        """The adapted linears as peft is told of them: ends of names, or a pattern where these would match more."""
        if "down" in self.targets and "out" not in self.targets:  # output.dense is also the end of attention.output.dense
            names = {"qkv": r"attention\.self\.(query|key|value)"} | {k: v.replace(".", r"\.") for k, v in LINEARS.items()}
            return rf".*encoder\.layer\.\d+\.({'|'.join(names[target] for target in self.targets)})"
        return [name for target in self.targets for name in (QKV if target == "qkv" else (LINEARS[target],))]

    def save_peft(self, folder: str | Path, g: int) -> None:
        """Write adapter g as peft does: adapter_config.json and adapter_model.safetensors."""
        write_adapter(
            folder,
            self._peft_tensors(g),
            rank=int(self.ranks[g]),
            alpha=float(self.alphas[g]),
            task_type="TOKEN_CLS",
            target_modules=self._target_modules(),
            modules_to_save=["classifier"] if self.has_head else None,
        )

    @torch.no_grad()
    def load_peft(self, folder: str | Path, g: int) -> None:
        """Overwrite adapter g with one that peft saved; its optimiser's state starts anew.

        Linears that the file does not adapt get a zero update. A head that the file lacks stays as it was.
        Raises UserError for files that are missing, damaged or of another method, a rank above the bank's, numbers that are not
        finite, or tensors that fit no slot. Then nothing has changed.
        """
        head = {name: view.clone() for name, view in self._peft_tensors(g).items() if ".classifier." in name}
        adapter = read_adapter(folder, self.rank)
        views = self._peft_tensors(g, adapter.rank)
        ready = fitted(folder, adapter.tensors, views, f"this bank ({', '.join(self.targets)})")
        self.param[g].zero_()
        for name, tensor in (head | ready).items():
            views[name].copy_(tensor)
        self.ranks[g], self.alphas[g], self.scaling[g] = adapter.rank, adapter.alpha, adapter.scaling
        self.reset_state_(g)
        self._ranks_changed()
        self.refresh(g)


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
        shapes |= zip(HEAD, ((config.num_labels, width), (config.num_labels,)), strict=True)
    return laid_out(shapes)
