"""The formulas of dropout.py for use inside Triton kernels; they give the same bits."""

import triton
import triton.language as tl

from . import dropout

GOLDEN, ODD = tl.constexpr(dropout.GOLDEN), tl.constexpr(dropout.ODD)
MIX_1, MIX_2 = tl.constexpr(dropout.MIX_1), tl.constexpr(dropout.MIX_2)
COUNTER = tl.constexpr(dropout.COUNTER)
ROUND_1, ROUND_2 = tl.constexpr(dropout.ROUND_1), tl.constexpr(dropout.ROUND_2)


@triton.jit
def _mix64(z):
    z = (z ^ (z >> 30)) * MIX_1
    z = (z ^ (z >> 27)) * MIX_2
    return z ^ (z >> 31)


@triton.jit
def stream_keys(seed, row_key, site):
    """The 64-bit key of each row at a site. seed: int64 scalar or [BT]. row_key: int64 [BT]. Returns uint64 [BT]."""
    start = seed.to(tl.uint64) + (site + 1).to(tl.uint64) * GOLDEN
    return _mix64(_mix64(start) + row_key.to(tl.uint64) * ODD)


@triton.jit
def threshold_of(p):
    """The threshold round(p * 65536), ties to even, at most 65535, and the scale 1 / (1 - threshold / 65536).

    p: fp32. Returns uint32, fp32.
    """
    product = p * 65536.0
    below = tl.floor(product)
    rest, count = product - below, below.to(tl.int32)
    count += ((rest > 0.5) | ((rest == 0.5) & (count % 2 == 1))).to(tl.int32)
    count = tl.minimum(count, 65535)
    return count.to(tl.uint32), tl.div_rn(65536.0, (65536 - count).to(tl.float32))


@triton.jit
def keep_block(keys, threshold, first, WIDTH: tl.constexpr):
    """Which of the features first..first+WIDTH are kept.

    keys: uint64 [BT]. threshold: uint32. first: even, a scalar or [BT, 1]. Returns int1 [BT, WIDTH].
    """
    counter = (first // 2 + tl.arange(0, WIDTH // 2)[None, :]).to(tl.uint32)
    h = (counter * COUNTER) ^ keys.to(tl.uint32)[:, None]
    h = (h ^ (h >> 16)) * ROUND_1
    h ^= h >> 15
    h = (h ^ (keys >> 32).to(tl.uint32)[:, None]) * ROUND_2
    h ^= h >> 16
    even, odd = (h & 0xFFFF) >= threshold, (h >> 16) >= threshold
    return tl.reshape(tl.join(even, odd), (keys.shape[0], WIDTH))
