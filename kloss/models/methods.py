"""Banks of methods that LoRA is compared with: prefix tuning, IA³, and a fusion of finished adapters; a tagging head per learner.

They are in plain torch, for comparison and not for speed. Each product is of one learner's own rows, so a learner's bits do not
depend on who shares the batch, where widths are multiples of 16; on the number of threads they do.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import Dropout, Segments
from ..kernels.dropout import keep_mask
from .architecture import XLMRConfig
from .bank import TARGETS, AdapterBank
from .slots import HEAD, Slot, SlotRows, laid_out
from .xlmr import XLMRForTokenClassification


class MethodBank(SlotRows):
    """Learners of one method as rows [G, P].

    model_or_config: the model or its XLMRConfig.
    seeds: one per learner.
    size: what the method says; 1 where it has none.
    dtype: of the working copy; the master copy is fp32.
    """

    capturable = False

    def __init__(
        self,
        model_or_config: XLMRConfig | XLMRForTokenClassification,
        seeds: Sequence[int],
        size: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ):
        self.config = model_or_config if isinstance(model_or_config, XLMRConfig) else model_or_config.config
        self.size = size
        super().__init__(self.slots_of(self.config, size), len(seeds), dtype, device)
        for g, seed in enumerate(seeds):
            self._draw_(g, torch.Generator().manual_seed(seed))

    @classmethod
    def slots_of(cls, config: XLMRConfig, size: int) -> dict[str, Slot]:
        """The slots of a row."""
        layers, labels = range(config.num_hidden_layers), config.num_labels
        shapes = {f"{layer}.{name}": shape for layer in layers for name, shape in cls.shapes(config, size).items()}
        return laid_out(shapes | dict(zip(HEAD, ((labels, config.hidden_size), (labels,)), strict=True)))

    @staticmethod
    def shapes(config: XLMRConfig, size: int) -> dict[str, tuple[int, ...]]:
        """What a row holds of each layer, by name."""
        raise NotImplementedError

    @torch.no_grad()
    def _draw_(self, g: int, generator: torch.Generator) -> None:
        """Draw a row: the head normal, all else of it zero."""
        self._normal_(g, HEAD[0], self.config.initializer_range, generator)
        self.refresh(g)

    def _normal_(self, g: int, name: str, deviation: float, generator: torch.Generator) -> None:
        drawn = torch.empty(self.slots[name].shape, dtype=torch.float32).normal_(0, deviation, generator=generator)
        self.view(self.param, name)[g] = drawn

    def linear(self, layer: int, name: str, x: Tensor, base: nn.Linear, segments: Segments) -> Tensor | None:
        return by_adapter(x, segments, lambda g, rows, _: F.linear(rows, base.weight, base.bias))

    def _of(self, layer: int, name: str) -> tuple[Tensor, ...]:
        """A layer's slot, each row's own."""
        return self._leaves[f"{layer}.{name}"].unbind()


def by_adapter(x: Tensor, segments: Segments, function: Callable[[int | None, Tensor, Tensor], Tensor]) -> Tensor:
    """function(g, its rows of x [n, K], their index int64 [n]) of each adapter, back in the batch's order.

    Rows without an adapter have None for g.
    """
    runs, order = segments.host_runs(), segments.order
    if not segments.sorted or len(order) < len(x):
        order = torch.cat([order, torch.arange(len(order), len(x), device=x.device)])
        x = x[order]
    counts: dict[int | None, int] = {g: end - start for g, start, end in runs}
    if rest := len(x) - sum(counts.values()):
        counts[None] = rest
    sizes = list(counts.values())
    y = torch.cat([function(*part) for part in zip(counts, x.split(sizes), order.split(sizes), strict=True)])
    return y if order is segments.order else torch.empty_like(y).index_copy(0, order, y)


class PrefixBank(MethodBank):
    """Prefix tuning: each layer attends to `size` keys and values of the learner's own beside those of the tokens.

    Source: Li and Liang 2021, arXiv 2101.00190, without their reparametrisation, as peft has it by default.
    """

    @staticmethod
    def shapes(config: XLMRConfig, size: int) -> dict[str, tuple[int, ...]]:
        return dict.fromkeys(("keys", "values"), (size, config.hidden_size))

    def _draw_(self, g: int, generator: torch.Generator) -> None:
        """Keys and values are normal, of deviation 1 as peft's."""
        for name in self.slots:
            if name not in HEAD:
                self._normal_(g, name, 1.0, generator)
        super()._draw_(g, generator)

    def attention(
        self, layer: int, qkv: Tensor, cu_seqlens: Tensor, heads: int, segments: Segments, dropout: Dropout | None
    ) -> Tensor | None:
        keys, values = self._of(layer, "keys"), self._of(layer, "values")
        lengths = defaultdict[int, list[int]](list)
        for g, length in zip(segments.adapter.tolist(), cu_seqlens.diff().tolist(), strict=True):
            lengths[g] += [length] if length else []

        def attend(g: int | None, rows: Tensor, index: Tensor) -> Tensor:
            own = lengths[-1 if g is None else g]
            behind = len(rows) - sum(own)
            prefix = None if g is None else (keys[g], values[g])
            kept = None if dropout is None else dropout.take(index)
            return prefixed_attention(rows, [*own, behind] if behind else own, heads, prefix, kept)

        return by_adapter(qkv, segments, attend)


def prefixed_attention(
    qkv: Tensor, lengths: Sequence[int], heads: int, prefix: tuple[Tensor, Tensor] | None, dropout: Dropout | None
) -> Tensor:
    """softmax(q [K; k]ᵀ / √D) [V; v] within each sequence: `packed_attention` with a prefix that all sequences see.

    qkv: [T, 3H], sequences of these lengths end to end.
    prefix: K and V, [p, H] each; None: p is 0. Dropout's feature of key j, the prefix's first, is head << 16 | j.
    Returns [T, H].
    """
    shape = len(lengths), max(lengths)  # S, L
    slots = torch.cat([torch.arange(n) + s * shape[1] for s, n in enumerate(lengths)]).to(qkv.device)

    def padded(x: Tensor) -> Tensor:
        """[T, ...] -> [S, L, ...]."""
        return x.new_zeros(math.prod(shape), *x.shape[1:]).index_copy(0, slots, x).unflatten(0, shape)

    q, k, v = padded(qkv.unflatten(1, (3, heads, -1))).permute(2, 0, 3, 1, 4)  # [S, heads, L, D] each
    seen = padded(torch.ones_like(slots, dtype=torch.bool))
    if prefix is not None:
        before = [x.unflatten(1, (heads, -1)).transpose(0, 1).expand(len(lengths), -1, -1, -1) for x in prefix]
        k, v = (torch.cat(pair, 2) for pair in zip(before, (k, v), strict=True))
        seen = F.pad(seen, (k.shape[2] - shape[1], 0), value=True)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(~seen[:, None, None], -torch.inf)
    p = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    if dropout is not None:
        count = k.shape[2]
        features = torch.arange(heads)[:, None] << 16 | torch.arange(count + count % 2)
        mask, scale = keep_mask(dropout, features.int().to(qkv.device))  # [T, heads, keys], [T]
        mask, scale = padded(mask[..., :count]), padded(scale)
        p = torch.where(mask.transpose(1, 2), p * scale[:, None, :, None], p.new_zeros(()))
    return (p.to(v.dtype) @ v).transpose(1, 2).flatten(2).flatten(0, 1)[slots]


class IA3Bank(MethodBank):
    """IA³: keys, values and the feed-forward's inner activation, each feature times a factor. `size` says nothing.

    A row holds what factors differ from 1 by, so weight decay pulls them to 1, where they start.
    Source: Liu et al. 2022, arXiv 2205.05638.
    """

    @staticmethod
    def shapes(config: XLMRConfig, size: int) -> dict[str, tuple[int, ...]]:
        return {"key_value": (2 * config.hidden_size,), "inner": (config.intermediate_size,)}

    def linear(self, layer: int, name: str, x: Tensor, base: nn.Linear, segments: Segments) -> Tensor | None:
        if name not in ("qkv", "down"):
            return super().linear(layer, name, x, base, segments)
        more = self._of(layer, "key_value" if name == "qkv" else "inner")

        def scaled(g: int | None, rows: Tensor, _: Tensor) -> Tensor:
            if g is None:
                return F.linear(rows, base.weight, base.bias)
            if name == "down":
                return F.linear(rows * (1 + more[g]), base.weight, base.bias)
            query, rest = F.linear(rows, base.weight, base.bias).tensor_split([rows.shape[1]], 1)
            return torch.cat([query, rest * (1 + more[g])], 1)

        return by_adapter(x, segments, scaled)


class FusionBank(MethodBank):
    """A fusion of `size` finished LoRA adapters, the donors, which stay as they are: y = W x + Σ_m γ_m s_m B_m A_m x.

    γ is a gate for each layer and donor, and begins with 1 / size: the mean of the donors' updates. A row holds what gates
    differ from that by. Our reading of AdapterFusion (Pfeiffer et al. 2021, arXiv 2005.00247), whose weights depend on the token.
    """

    PER_ROW = ("given",)

    def __init__(self, model: XLMRConfig | XLMRForTokenClassification, seeds: Sequence[int], size: int, **options: Any):
        self.given = torch.full((len(seeds),), -1)  # which of `donors` each learner has
        self.donors: list[AdapterBank] = []
        super().__init__(model, seeds, size, **options)

    @staticmethod
    def shapes(config: XLMRConfig, size: int) -> dict[str, tuple[int, ...]]:
        return {"gates": (size,)}

    def give_(self, g: int, donors: AdapterBank) -> None:
        """Set the donors of a learner: a bank of `size` adapters of this model, on all linears. Learners may share it."""
        assert donors.adapters == self.size and donors.targets == TARGETS
        if not any(donors is other for other in self.donors):
            self.donors.append(donors)
        self.given[g] = next(i for i, other in enumerate(self.donors) if donors is other)

    def linear(self, layer: int, name: str, x: Tensor, base: nn.Linear, segments: Segments) -> Tensor | None:
        more, given, slices = self._of(layer, "gates"), self.given.tolist(), 3 if name == "qkv" else 1

        def fused(g: int | None, rows: Tensor, _: Tensor) -> Tensor:
            y = F.linear(rows, base.weight, base.bias)
            if g is None:
                return y
            donors = self.donors[given[g]]
            a, b = (donors.view(donors.work, f"{layer}.{name}.{kind}") for kind in "ab")  # [M, slices*R, K], [M, N, R]
            gates = donors.scaling.to(rows.dtype) * (1 / self.size + more[g])
            shrunk = F.linear(rows, a.unflatten(1, (slices, -1)).transpose(0, 1).flatten(0, 2))  # [n, slices*M*R]
            shrunk = shrunk.unflatten(1, (slices, self.size, -1)) * gates[:, None]
            b = b.unflatten(1, (slices, -1)).permute(1, 0, 3, 2).flatten(1, 2)  # [slices, M*R, N/slices]
            return y + (shrunk.flatten(2).transpose(0, 1) @ b).transpose(0, 1).flatten(1)

        return by_adapter(x, segments, fused)


METHODS: dict[str, type[MethodBank]] = {"prefix": PrefixBank, "ia3": IA3Bank, "fusion": FusionBank}
