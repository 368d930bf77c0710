"""The per-row state of dropout on a GPU: csrc's `dropout_keys` and `dropout_limits` in Triton.

They give the bits of `dropout.py`. An adapter that is out of range is taken as none, for the host waits for no check.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dropout_device import stream_keys, threshold_of
from .tuned import FUSION

BLOCK = 256


@triton.jit
def keys_kernel(
    seed_ptr,  # [G]
    row_key_ptr,  # [T]
    adapter_ptr,  # [T] or None
    keys_ptr,  # [sites, T]
    T, G, first,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """keys[i, t] of site first + i; rows without an adapter have those of entry 0."""
    blocks = tl.cdiv(T, BLOCK)
    i_s, o_t = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < T
    g = tl.zeros((BLOCK,), tl.int32)
    if adapter_ptr is not None:
        g = tl.load(adapter_ptr + o_t, mask=m_t, other=0)
        g = tl.where((g < 0) | (g >= G), 0, g)
    seed, row_key = tl.load(seed_ptr + g), tl.load(row_key_ptr + o_t, mask=m_t, other=0)
    keys = stream_keys(seed, row_key, first + i_s.to(tl.int64))
    tl.store(keys_ptr + i_s.to(tl.int64) * T + o_t, keys.to(tl.int64, bitcast=True), mask=m_t)


@triton.jit
def limits_kernel(
    p_ptr,  # [G]
    adapter_ptr,  # [T] or None
    threshold_ptr,  # int16 [T]
    scale_ptr,  # fp32 [T]
    T, G,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Each row's threshold and scale; rows without an adapter keep everything."""
    o_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < T
    g = tl.zeros((BLOCK,), tl.int32)
    if adapter_ptr is not None:
        g = tl.load(adapter_ptr + o_t, mask=m_t, other=-1)
    threshold, scale = threshold_of(tl.load(p_ptr + g, mask=(g >= 0) & (g < G), other=0.0))
    tl.store(threshold_ptr + o_t, (threshold.to(tl.int32) - 32768).to(tl.int16), mask=m_t)
    tl.store(scale_ptr + o_t, scale, mask=m_t)


def keys(seed: Tensor, row_key: Tensor, adapter: Tensor | None, first_site: int, sites: int) -> Tensor:
    """int64 [sites, T]. seed: int64 [G]. row_key: int64 [T]. adapter: int32 [T] or None for entry 0. All contiguous."""
    T = row_key.numel()
    out = row_key.new_empty(sites, T)
    if T and sites:
        with torch.cuda.device_of(row_key):
            keys_kernel[(triton.cdiv(T, BLOCK) * sites,)](
                seed_ptr=seed, row_key_ptr=row_key, adapter_ptr=adapter, keys_ptr=out, T=T, G=seed.numel(), first=first_site,
                BLOCK=BLOCK, **FUSION,
            )  # fmt: skip
    return out


def limits(p: Tensor, adapter: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Threshold int16 and scale fp32 of each row. p: fp32 [G]. adapter: int32 [rows] or None for entry 0. All contiguous."""
    threshold, scale = p.new_empty(rows, dtype=torch.int16), p.new_empty(rows)
    if rows:
        with torch.cuda.device_of(p):
            limits_kernel[(triton.cdiv(rows, BLOCK),)](
                p_ptr=p, adapter_ptr=adapter, threshold_ptr=threshold, scale_ptr=scale, T=rows, G=p.numel(), BLOCK=BLOCK, **FUSION
            )
    return threshold, scale
