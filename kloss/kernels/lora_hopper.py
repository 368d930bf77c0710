"""The multi-adapter linear on Hopper: csrc/cuda/linear.cu computes y and dx whole, `lora_triton.py`'s kernels the rest.

    S  = s_g drop(x) A_gᵀ               shrink   [T, slices*R]               g = adapter of the row
    y  = S B_gᵀ + b + x Wᵀ              linear   [T, N]
    dS = s_g dy B_g                    shrink   [T, slices*R]
    dx = mask ⊙ (dS A_g) + dy W        linear   [T, K]
    dA_g = dSᵀ drop(x)                 reduce   [slices*R, K]               dB_g = dyᵀ S   [N, R]

S holds its scaling, so that LoRA's term is nothing but further steps of the base product's contraction, and no sum is rounded
before the last. Tiles are fixed: an adapter's bits do not depend on who shares the batch, as long as it serves that batch.
"""

import torch
from torch import Tensor

from . import cuda_library
from .lora_shrink import shrink
from .lora_tiles import Factor
from .lora_torch import Backward, Forward
from .lora_triton import WORK, gradients, saved
from .segments import Segments, Work

__all__ = ["backward", "forward", "saved", "serves"]
LEAST = 132 * 256 * 256  # outputs: two tiles for each multiprocessor. With fewer the vendor can divide contractions, too


def serves(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, segments: Segments, ranks: Tensor | None, wanted: bool
) -> bool:
    """Whether the kernel computes this layer: 16 bits, rows in order, one rank, a Hopper, and sizes that fit its tiles.

    wanted: also where it may not be the fastest: with few outputs, and with widths that are no multiples of its wider tile.
    """
    if x.device.type != "cuda" or not segments.sorted or ranks is not None or segments.order.numel() != x.shape[0]:
        return False
    tensors, R, dtype = (x, weight, lora_a, lora_b), lora_b.shape[2], x.dtype
    if dtype not in cuda_library.HALVES or any(t.dtype != dtype for t in tensors):
        return False
    (N, K), C = weight.shape, weight.shape[0] * R // lora_a.shape[1]
    wide = cuda_library.COLUMNS[0]
    if not lora_b.shape[0] or (not wanted and (x.shape[0] * N < LEAST or C % wide or K % wide)):
        return False
    if R % 16 or K % 8 or max(N, K) > cuda_library.WIDEST or C % (cuda_library.COLUMNS[-1] if C < N else 8):
        return False
    return _is_hopper(x.device) and cuda_library.load() and all(cuda_library.walks(t) for t in tensors)


def forward(call: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """y, S and the keys; arguments as in `lora_triton.forward`."""
    x, weight, bias, lora_a, lora_b, scaling, _, lists, site, slices, _, activated = call
    work, dropout = Work(*lists[WORK]), lists[WORK.stop :]
    (_, SR, K), R = lora_a.shape, lora_b.shape[2]
    s, keys = saved(x, SR, lists)
    a = Factor(lora_a, lora_a.stride(0), 0, lora_a.stride(1), lora_a.stride(2))
    draws = (*dropout, keys) if dropout else ()
    with torch.cuda.device_of(x):
        shrink(x, a, s, None, work.tiles_64, None, scaling, *draws, site=site, K=K, C=SR, R=R, blocks=1, of_x=activated)
        x = x if activated is None else activated
    y = x.new_empty(x.shape[0], weight.shape[0])
    cuda_library.linear(x, weight, s, lora_b, bias, y, work.tiles_64, slices=slices)
    return y, s, keys


def backward(call: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB, empty where not needed."""
    dy = call.dy.contiguous()
    return gradients(call._replace(dy=dy if cuda_library.walks(dy) else dy.clone()), None, _product, None)


def _product(call: Backward, ds: Tensor, dx: Tensor, work: Work, p_and_keys: tuple) -> None:
    cuda_library.linear(call.dy, call.weight, ds, call.lora_a, None, dx, work.tiles_64, *p_and_keys, turned=True)


def _is_hopper(device: torch.device) -> bool:
    return not torch.version.hip and torch.cuda.get_device_capability(device) == (9, 0)
