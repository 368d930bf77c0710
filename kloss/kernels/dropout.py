"""Dropout as a function: whether an element is kept depends on its keys alone, so no mask outlives a step.

    z   = mix64(mix64(seed + (site + 1) * GOLDEN) + row_key * ODD)        one 64-bit key per row and site
    h   = c * 0x9E3779B1 ^ low32(z);  h ^= h >> 16;  h *= 0x7FEB352D;  h ^= h >> 15
    h  ^= high32(z);  h *= 0x846CA68B;  h ^= h >> 16              one 32-bit draw per pair of features, c = feature // 2
    u   = low 16 bits of h for the even feature, high 16 bits for the odd one
    keep = u >= round(p * 65536);   kept values are divided by 1 - round(p * 65536) / 65536

`mix64` is the finaliser of splitmix64 (Steele, Lea, Flood 2014). The 32-bit rounds are C. Wellons' `lowbias32`, with a second
key between its multiplications. All arithmetic wraps. Nothing depends on the batch: a learner draws the same masks alone and
among others, forward and backward.
"""

from functools import cache
from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import INTS, check, check_dim, check_ids, check_offsets, check_values, readable
from .cpu_library import built

GOLDEN = 0x9E3779B97F4A7C15
ODD = 0xD1B54A32D192ED03
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
COUNTER = 0x9E3779B1
ROUND_1, ROUND_2 = 0x7FEB352D, 0x846CA68B
BLOCK = 1 << 18  # pairs drawn at once on a CPU: they fit its caches, which takes a tenth of the time


class Dropout(NamedTuple):
    """The keys of one dropout site.

    p: fp32 [G], probability in [0, 1), rounded to 1/65536.
    seed: int64 [G].
    row_key: int64 [T], from `row_keys`.
    site: number of the site in the network.
    adapter: int32 [T], the entry of p and seed that each row uses, -1 for no dropout. None: the segments' adapter in
        `multi_lora_linear`, entry 0 elsewhere.
    rows: private. Per-row state that `StepDropout` has computed ahead; a CPU uses it instead of the keys.
    """

    p: Tensor
    seed: Tensor
    row_key: Tensor
    site: int
    adapter: Tensor | None = None
    rows: "RowDropout | None" = None

    def take(self, index: Tensor | slice) -> "Dropout":
        """The keys of some rows."""
        adapter, rows = self.adapter, self.rows
        return self._replace(
            row_key=self.row_key[index],
            adapter=None if adapter is None else adapter[index],
            rows=None if rows is None else RowDropout(*(tensor[index] for tensor in rows)),
        )

    def first(self, rows: int) -> "Dropout":
        """The keys of the first `rows` rows."""
        return self if self.row_key.numel() == rows else self.take(slice(rows))


class RowDropout(NamedTuple):
    """Per-row dropout state of one site; private to kernels.

    keys: int64 [T], z.
    threshold: int16 [T], keep iff draw >= threshold, both shifted by -2^15 into int16.
    scale: fp32 [T], 1 / (1 - p).
    """

    keys: Tensor
    threshold: Tensor
    scale: Tensor


class StepDropout:
    """The dropout of one training step at every site of a network.

    hidden, attention, lora: fp32 [G], probabilities by kind of site; None where no adapter drops.
    seed: int64 [G].
    row_key: int64 [T], from `row_keys`.
    adapter: int32 [T], -1 for rows without dropout.
    num_sites: sites of the network, `XLMRForTokenClassification.num_sites`.
    Raises ValueError for tensors that do not fit each other, on a CPU also for p or adapters out of range.
    """

    def __init__(
        self,
        hidden: Tensor | None,
        attention: Tensor | None,
        lora: Tensor | None,
        seed: Tensor,
        row_key: Tensor,
        adapter: Tensor,
        num_sites: int,
    ):
        self.p = {"hidden": hidden, "attention": attention, "lora": lora}
        self.seed, self.row_key, self.adapter, self.num_sites = seed, row_key, adapter, num_sites
        for p in {id(p): p for p in self.p.values() if p is not None}.values():  # hidden and attention may be one
            check_dropout(Dropout(p, seed, row_key, 0, adapter), 0, row_key.device)
        self._keys: tuple[Tensor, ...] | None = None
        self._limits: dict[int, tuple[Tensor, Tensor]] = {}

    def at(self, kind: str, site: int) -> Dropout | None:
        """The keys of a site; None where no adapter drops. kind: hidden, attention or lora."""
        p = self.p[kind]
        if p is None:
            return None
        if self._keys is None:  # all sites at once: site by site takes longer than the draws of a small batch
            self._keys = _site_keys(self.seed, self.row_key, self.adapter, 0, self.num_sites).unbind()
        if id(p) not in self._limits:
            self._limits[id(p)] = _row_limits(p, self.adapter, self.row_key.numel())
        return Dropout(p, self.seed, self.row_key, site, self.adapter, RowDropout(self._keys[site], *self._limits[id(p)]))


def row_keys(step: Tensor, sequence: Tensor, cu_seqlens: Tensor, *, rows: int | None = None) -> Tensor:
    """Key of every packed row: step << 32 | sequence within its learner's batch << 16 | position.

    step: int64 [S], below 2^31.
    sequence: int64 [S], below 2^16, as are positions.
    cu_seqlens: int [S+1].
    rows: T; rows behind cu_seqlens[-1] get key 0. None: T is cu_seqlens[-1], for which the host waits on a GPU.
    Returns int64 [T].
    Raises ValueError for tensors that do not fit each other, on a CPU also for values out of range; on a GPU an assertion stops.
    """
    check_offsets(cu_seqlens, rows)
    for name, numbers, end in (("step", step, 1 << 31), ("sequence", sequence, 1 << 16)):
        check(name, numbers, (cu_seqlens.numel() - 1,), (torch.int64,), cu_seqlens.device)
        check_ids(name, numbers, 0, end)
    cu_seqlens = cu_seqlens.contiguous()
    rows = int(cu_seqlens[-1]) if rows is None else rows
    if readable(cu_seqlens) and built() and rows < 1 << 31:
        return torch.ops.kloss.row_keys(step.contiguous(), sequence.contiguous(), cu_seqlens.int(), rows)
    row = torch.arange(rows, device=cu_seqlens.device)
    s = torch.searchsorted(cu_seqlens[1:], row.to(cu_seqlens.dtype), right=True)
    first_key = (step << 32 | sequence << 16) - cu_seqlens[:-1]
    S = first_key.numel()
    return torch.where(s < S, first_key[s.clamp(max=S - 1)] + row, 0) if S else torch.zeros_like(row)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix64(z: Tensor) -> Tensor:
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(MIX_1, 64)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(MIX_2, 64)
    return z ^ (z >> 31 & (1 << 33) - 1)


def stream_keys(seed: Tensor, row_key: Tensor, site: int | Tensor) -> Tensor:
    """The 64-bit key z of each row at one site or at several.

    seed, row_key: int64 [T] or [1].
    site: a number, or int64 [n, 1].
    Returns int64 [T] or [n, T].
    """
    start = (site + 1) * _signed(GOLDEN, 64)
    if isinstance(start, int):  # Python's integers do not wrap
        start = _signed(start % (1 << 64), 64)
    return _mix64(_mix64(seed + start) + row_key * _signed(ODD, 64))


def draws(keys: Tensor, counter: Tensor) -> Tensor:
    """The 32-bit draw h of (row, pair of features). keys: int64, counter: int32, broadcastable. Returns the bits as int32."""
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)  # conversions keep the low 32 bits
    h = counter * _signed(COUNTER, 32) ^ low
    h.bitwise_xor_(h >> 16 & 0xFFFF).mul_(_signed(ROUND_1, 32))
    h.bitwise_xor_(h >> 15 & 0x1FFFF).bitwise_xor_(high).mul_(_signed(ROUND_2, 32))
    return h.bitwise_xor_(h >> 16 & 0xFFFF)


def thresholds(p: Tensor) -> Tensor:
    """round(p * 65536) as int32, at most 65535."""
    return (p.double() * 65536).round().clamp(0, 65535).to(torch.int32)


def kept_scaling(scaling: Tensor, p: Tensor) -> Tensor:
    """LoRA's scaling times dropout's 1 / (1 - p), fp32 [G]: a product for each adapter instead of one for each element of x."""
    if readable(p) and built():
        return torch.ops.kloss.kept_scaling(scaling.contiguous(), p.contiguous())
    return scaling / (1 - thresholds(p).float() / 65536)


_library = torch.library.Library("kloss", "FRAGMENT")


@cache
def _on_gpu() -> bool:
    """Whether the operators of the keys are there for a GPU; registers them."""
    if built():
        kernels = import_module(".dropout_triton", __package__)  # only now: Triton need not be there
        _library.impl("dropout_keys", kernels.keys, "CUDA")
        _library.impl("dropout_limits", kernels.limits, "CUDA")
    return built()


def _served(numbers: Tensor) -> bool:
    """Whether operators compute keys and limits, where these numbers are."""
    if numbers.device.type == "cuda":
        return not torch.compiler.is_compiling() and _on_gpu()
    return readable(numbers) and built()


def _site_keys(seed: Tensor, row_key: Tensor, adapter: Tensor | None, first: int, sites: int) -> Tensor:
    """`stream_keys` int64 [sites, T] of some sites, `first` the first. adapter: [T], the entry of seed, or None for entry 0."""
    if _served(row_key):
        entry = None if adapter is None else adapter.int().contiguous()
        return torch.ops.kloss.dropout_keys(seed.contiguous(), row_key.contiguous(), entry, _signed(first % (1 << 64), 64), sites)
    site = (first + torch.arange(sites, device=seed.device))[:, None]
    return stream_keys(seed[:1] if adapter is None else seed[adapter.clamp(min=0).long()], row_key, site)


def _row_limits(p: Tensor, adapter: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """`threshold` and `scale` of `RowDropout`. adapter: [T], the entry of p [G] for each row, or None for entry 0."""
    if _served(p):
        return torch.ops.kloss.dropout_limits(p.contiguous(), None if adapter is None else adapter.int().contiguous(), rows)
    limit = torch.cat([thresholds(p), torch.zeros(1, dtype=torch.int32, device=p.device)])  # adapter -1 finds the zero at the end
    threshold, scale = (limit - 32768).to(torch.int16), (1 / (1 - limit.double() / 65536)).float()
    if adapter is None:
        return threshold[:1].expand(rows), scale[:1].expand(rows)
    return threshold[adapter.long()], scale[adapter.long()]


def check_dropout(dropout: Dropout, rows: int, device: torch.device) -> None:
    """Raise ValueError unless the keys fit each other and are those of at least `rows` rows."""
    p, keys, adapter = dropout.p, dropout.row_key, dropout.adapter
    if keys.numel() < rows:
        raise ValueError(f"dropout.row_key has {keys.numel()} entries, the rows are {rows}")
    if dropout.rows is not None:
        return  # `StepDropout` has checked
    check("dropout.row_key", keys, (keys.numel(),), (torch.int64,), device)
    check("dropout.p", p, (p.numel(),), (torch.float32,), device)
    check("dropout.seed", dropout.seed, (p.numel(),), (torch.int64,), device)
    if adapter is not None:
        check("dropout.adapter", adapter, (keys.numel(),), INTS, device)
    if readable(p):  # a GPU's are clamped
        check_values("dropout.p", p.tolist(), lambda value: 0 <= value < 1, "a number in [0, 1)")
        if adapter is not None:
            check_ids("dropout.adapter", adapter, -1, p.numel())


def check_row_keys(dropout: Dropout, x: Tensor) -> None:
    """Raise ValueError unless the keys fit each other and are those of x [T, K]."""
    check_dim("x", x, "T, K")
    if dropout.row_key.numel() != x.shape[0]:
        raise ValueError(f"dropout.row_key has {dropout.row_key.numel()} entries for {x.shape[0]} rows")
    check_dropout(dropout, x.shape[0], x.device)


def row_dropout(dropout: Dropout, adapter: Tensor | None = None) -> RowDropout:
    """Per-row state of a site. adapter: int32 [T], overrides dropout.adapter."""
    if dropout.rows is not None:
        return dropout.rows
    adapter = dropout.adapter if adapter is None else adapter
    keys = _site_keys(dropout.seed, dropout.row_key, adapter, dropout.site, 1)[0]
    return RowDropout(keys, *_row_limits(dropout.p, adapter, dropout.row_key.numel()))


def row_tensors(dropout: Dropout) -> list[Tensor]:
    """What a kernel reads of a site: the three tensors of `RowDropout`, contiguous."""
    return [tensor.contiguous() for tensor in row_dropout(dropout)]


def keep(keys: Tensor, threshold: Tensor, features: Tensor) -> Tensor:
    """Which elements are kept.

    keys, threshold: [T], of `RowDropout`.
    features: int32 [..., F], F even, in pairs (2c, 2c+1).
    Returns bool [T, ..., F].
    """
    counter = features[..., ::2] >> 1
    T, behind = keys.numel(), (-1,) + (1,) * counter.dim()
    kept = torch.empty(T, *features.shape, dtype=torch.bool, device=features.device)
    block = max(1, BLOCK // max(1, counter.numel())) if features.device.type == "cpu" else max(1, T)
    for first in range(0, T, block):
        rows = slice(first, first + block)
        # Flipping the top bit of each half turns the unsigned comparison into the signed one that int16 has.
        u = draws(keys[rows].view(behind), counter).bitwise_xor_(_signed(0x80008000, 32)).view(torch.int16)
        torch.ge(u, threshold[rows].view(behind), out=kept[rows])
    return kept


def keep_mask(dropout: Dropout, features: Tensor, adapter: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which elements are kept, bool [T, ..., F], and the scale of kept ones, fp32 [T]; arguments as in `keep`, `row_dropout`."""
    rows = row_dropout(dropout, adapter)
    return keep(rows.keys, rows.threshold, features), rows.scale


def apply_dropout(x: Tensor, dropout: Dropout | None, adapter: Tensor | None = None) -> Tensor:
    """drop(x) for x [T, K]: dropped elements are 0 whatever they held, kept ones are scaled in fp32 and rounded once.

    adapter: int32 [T], overrides dropout.adapter.
    Returns [T, K] in x's dtype; x itself without dropout.
    Raises ValueError for keys that do not fit x or each other, on a CPU also for p or adapters out of range.
    """
    if dropout is None:
        return x
    check_row_keys(dropout, x)
    K = x.shape[1]
    kept, scale = keep_mask(dropout, torch.arange(K + K % 2, dtype=torch.int32, device=x.device), adapter)
    return torch.where(kept[:, :K], (x * scale[:, None]).to(x.dtype), x.new_zeros(()))
