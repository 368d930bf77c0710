"""Dropout as a function: whether an element is kept depends on its keys alone, so no mask is ever stored.

    z   = mix64(mix64(seed + (site + 1) * GOLDEN) + row_key * ODD)        one 64-bit key per row and site
    h   = c * 0x9E3779B1 ^ low32(z);  h ^= h >> 16;  h *= 0x7FEB352D;  h ^= h >> 15
    h  ^= high32(z);  h *= 0x846CA68B;  h ^= h >> 16              one 32-bit draw per pair of features, c = feature // 2
    u   = low 16 bits of h for the even feature, high 16 bits for the odd one
    keep = u >= round(p * 65536);   kept values are divided by 1 - round(p * 65536) / 65536

`mix64` is the finaliser of splitmix64 (Steele, Lea, Flood 2014), the 32-bit rounds are C. Wellons'
`lowbias32` with a second key between its multiplications. All arithmetic wraps. Nothing depends on the batch,
so a learner draws the same masks alone and among others, forward and backward.
"""

from typing import NamedTuple

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
ODD = 0xD1B54A32D192ED03
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
COUNTER = 0x9E3779B1
ROUND_1, ROUND_2 = 0x7FEB352D, 0x846CA68B
BLOCK = 1 << 18  # pairs drawn at once on a CPU: they stay in its caches, a tenth of the time of all at once


class Dropout(NamedTuple):
    """The keys of one dropout site.

    p: fp32 [G], probability in [0, 1), rounded to 1/65536. seed: int64 [G]. row_key: int64 [T], from
    `row_keys`. site: which place of the network. adapter: int32 [T], the row of p and seed that each row uses
    (-1: no dropout); None: the segments' in `multi_lora_linear`, row 0 elsewhere. rows: what follows from these for
    each row, where a caller has it already (`RowDropout`); Triton's kernels work it out themselves.
    """

    p: Tensor
    seed: Tensor
    row_key: Tensor
    site: int
    adapter: Tensor | None = None
    rows: "RowDropout | None" = None

    def first(self, count: int) -> "Dropout":
        """That of the first `count` rows."""
        return self._replace(row_key=self.row_key[:count], rows=self.rows and self.rows.take(slice(count)))


class RowDropout(NamedTuple):
    """What a site's draws need of each row. keys: int64 [T], z. least: int16 [T], the smallest u - 32768 that is kept.
    scale: fp32 [T], of what is kept."""

    keys: Tensor
    least: Tensor
    scale: Tensor

    def take(self, index: Tensor | slice) -> "RowDropout":
        """Those of some rows."""
        return RowDropout(*(tensor[index] for tensor in self))


def row_keys(step: Tensor, sequence: Tensor, cu_seqlens: Tensor, *, rows: int | None = None) -> Tensor:
    """Key of every packed row: step << 32 | sequence within its learner's batch << 16 | position.

    step, sequence: int64 [S]. cu_seqlens: int32 [S+1]. Steps below 2^31; sequences and positions below 2^16.
    rows: T; rows behind cu_seqlens[-1] get key 0. Returns int64 [T]. Without rows T is cu_seqlens[-1], which
    on a GPU waits for the device.
    """
    rows = int(cu_seqlens[-1]) if rows is None else rows
    row = torch.arange(rows, device=cu_seqlens.device)
    s = torch.searchsorted(cu_seqlens[1:], row.to(cu_seqlens.dtype), right=True)
    of_sequence = (step << 32 | sequence << 16) - cu_seqlens[:-1]
    behind = s >= of_sequence.numel()
    if not of_sequence.numel():
        return torch.zeros_like(row)
    return torch.where(behind, 0, of_sequence[s.clamp(max=of_sequence.numel() - 1)] + row)


def _signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _mix64(z: Tensor) -> Tensor:
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * _signed(MIX_1, 64)
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * _signed(MIX_2, 64)
    return z ^ (z >> 31 & (1 << 33) - 1)


def stream_keys(seed: Tensor, row_key: Tensor, site: int | Tensor) -> Tensor:
    """The 64-bit key z of each row at a site. seed, row_key: int64 [T] or [1]. site: a number, or int64 [n, 1] for n sites at
    once. Returns int64 [T] or [n, T]."""
    place = (site + 1) * _signed(GOLDEN, 64)
    if isinstance(place, int):  # a number does not wrap by itself
        place = _signed(place % (1 << 64), 64)
    return _mix64(_mix64(seed + place) + row_key * _signed(ODD, 64))


def draws(keys: Tensor, counter: Tensor) -> Tensor:
    """The 32-bit draw h of (row, pair of features). keys: int64, counter: int32, broadcastable. Returns
    int32, the bits of h.
    """
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)  # conversions keep the low 32 bits
    h = counter * _signed(COUNTER, 32) ^ low
    h.bitwise_xor_(h >> 16 & 0xFFFF).mul_(_signed(ROUND_1, 32))
    h.bitwise_xor_(h >> 15 & 0x1FFFF).bitwise_xor_(high).mul_(_signed(ROUND_2, 32))
    return h.bitwise_xor_(h >> 16 & 0xFFFF)


def thresholds(p: Tensor) -> Tensor:
    """round(p * 65536) as int32, at most 65535."""
    return (p.double() * 65536).round().clamp(0, 65535).to(torch.int32)


def row_chances(p: Tensor, adapter: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """`least` and `scale` of `RowDropout` for rows whose entries of p [G] are adapter [T] (-1: keep all), or row 0 for None."""
    threshold = torch.cat([thresholds(p), torch.zeros(1, dtype=torch.int32, device=p.device)])  # -1 finds the zero behind
    least, scale = (threshold - 32768).to(torch.int16), (1 / (1 - threshold.double() / 65536)).float()
    if adapter is None:
        return least[:1].expand(rows), scale[:1].expand(rows)
    return least[adapter.long()], scale[adapter.long()]


def row_dropout(dropout: Dropout, adapter: Tensor | None = None) -> RowDropout:
    """What a site's draws need of each row, from its keys. adapter: int32 [T], overrides dropout.adapter."""
    if dropout.rows is not None:
        return dropout.rows
    adapter = dropout.adapter if adapter is None else adapter
    seed = dropout.seed[:1] if adapter is None else dropout.seed[adapter.clamp(min=0).long()]
    chances = row_chances(dropout.p, adapter, dropout.row_key.numel())
    return RowDropout(stream_keys(seed, dropout.row_key, dropout.site), *chances)


def keep_mask(dropout: Dropout | RowDropout, features: Tensor, adapter: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which elements stay, and by what kept ones are multiplied.

    features: int32 [..., F], even length, in pairs (2c, 2c+1), broadcast behind the rows. adapter: int32 [T],
    overrides dropout.adapter. Returns keep bool [T, ..., F] and scale fp32 [T].
    """
    rows = dropout if isinstance(dropout, RowDropout) else row_dropout(dropout, adapter)
    counter = features[..., ::2] >> 1
    count, behind = rows.keys.numel(), (-1,) + (1,) * counter.dim()
    keep = torch.empty(count, *features.shape, dtype=torch.bool, device=features.device)
    block = max(1, BLOCK // max(1, counter.numel())) if features.device.type == "cpu" else max(1, count)
    for first in range(0, count, block):
        part = slice(first, first + block)
        # Flipping the top bit of each half turns the unsigned comparison into the signed one that int16 has.
        u = draws(rows.keys[part].view(behind), counter).bitwise_xor_(_signed(0x80008000, 32)).view(torch.int16)
        torch.ge(u, rows.least[part].view(behind), out=keep[part])
    return keep, rows.scale


def apply_dropout(x: Tensor, dropout: Dropout | None, adapter: Tensor | None = None) -> Tensor:
    """drop(x) for x [T, K]: dropped elements are 0 whatever they held, kept ones are scaled. None returns
    x.
    """
    if dropout is None:
        return x
    width = x.shape[1]
    features = torch.arange(width + width % 2, dtype=torch.int32, device=x.device)
    keep, scale = keep_mask(dropout, features, adapter)
    return torch.where(keep[:, :width], x * scale[:, None].to(x.dtype), x.new_zeros(()))
