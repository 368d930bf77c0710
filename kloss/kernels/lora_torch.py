"""The plain torch backend of `multi_lora.py`: one adapter's rows at a time, with the gradients written out.

An adapter's bits do not depend on the other adapters, as those of `reference.multi_lora_linear` may. BLAS chooses its order of
summation by shapes, strides and addresses, so products get an adapter's own rows at an aligned address.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .dropout import keep
from .eager import aligned
from .segments import host_runs, rows_of


class Forward(NamedTuple):
    """Arguments of a backend's `forward`, those of `multi_lora_linear` but for `lists`, which each backend describes.

    activated: [T, K], of the backends in Triton; gelu(x) is written there and takes x's place.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    ranks: Tensor | None
    lists: list[Tensor]
    site: int
    slices: int
    exact: bool
    activated: Tensor | None = None


class Backward(NamedTuple):
    """Arguments of a backend's `backward`.

    s, keys: what forward saved.
    need_*: which gradients to compute.
    into_*: where those of the factors are written, in the factors' dtype and each adapter's matrix contiguous; None: they are
        returned.
    before: [T, N], of the backends in Triton, with one slice; dy is then the gradient at gelu(before), and before is y.
    """

    dy: Tensor
    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    scaling: Tensor
    s: Tensor
    keys: Tensor
    ranks: Tensor | None
    lists: list[Tensor]
    slices: int
    exact: bool
    need_x: bool
    need_a: bool
    need_b: bool
    into_a: Tensor | None = None
    into_b: Tensor | None = None
    before: Tensor | None = None

    def outputs(self) -> tuple[Tensor, Tensor]:
        """Where dA and dB go: the given tensors, or new ones; empty where not needed."""

        def output(factor: Tensor, need: bool, into: Tensor | None) -> Tensor:
            return factor.new_empty(factor.shape if need else 0) if into is None or not need else into

        return output(self.lora_a, self.need_a, self.into_a), output(self.lora_b, self.need_b, self.into_b)

    def returned(self, d_a: Tensor, d_b: Tensor) -> tuple[Tensor, Tensor]:
        """What `backward` returns for these outputs: an operator must not return what it was given."""
        return d_a.new_empty(0) if d_a is self.into_a else d_a, d_b.new_empty(0) if d_b is self.into_b else d_b


def saved(x: Tensor, SR: int, lists: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Empty tensors that forward fills for backward: S [T, SR], and with dropout the mask, bool [T, K rounded up to even]."""
    rows, K = lists[0].shape[0], x.shape[1]
    return x.new_empty(rows, SR), x.new_empty(rows if len(lists) > 2 else 0, K + K % 2, dtype=torch.bool)


def forward(call: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """y, S and the mask.

    scaling: with dropout's 1/(1-p).
    lists: order, ends, and with dropout each row's key and threshold.
    """
    x, weight, bias, lora_a, lora_b, scaling, ranks, lists, _, slices, exact, _ = call
    order, ends, *dropout = lists
    y = base_product(x, weight, bias, order, ends, exact)
    s, mask = saved(x, lora_a.shape[1], lists)
    if dropout:
        keys, threshold = dropout
        mask = keep(keys, threshold, torch.arange(mask.shape[1], dtype=torch.int32, device=x.device))
    dropped = _dropped(x, mask)
    with on_one_thread(exact):
        for g, run, rows, rank, scale in _runs(order, ends, ranks, lora_b.shape[2], scaling):
            s_g = torch.mm(aligned(dropped[rows]), _live_a(aligned(lora_a[g]), slices, rank).t())  # [n, slices*rank]
            b = _live_b(aligned(lora_b[g]), slices, rank)
            y[rows] += _products(_by_slice(s_g, slices), b.transpose(1, 2), scale)
            s[run].unflatten(1, (slices, -1))[..., :rank] = s_g.unflatten(1, (slices, -1))
    return y, s, mask


def backward(call: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB, empty where not needed."""
    dy, x, weight, lora_a, lora_b, scaling, s, mask, ranks, lists, slices, exact, need_x, need_a, need_b, *_ = call
    order, ends, *dropout = lists
    dx = base_product(dy, weight.t(), None, order, ends, exact) if need_x else x.new_empty(0)
    d_a, d_b = (output.zero_() for output in call.outputs())
    dropped = _dropped(x, mask) if need_a else x
    with on_one_thread(exact):
        for g, run, rows, rank, scale in _runs(order, ends, ranks, lora_b.shape[2], scaling):
            dy_g = _by_slice(aligned(dy[rows]), slices)
            ds = _products(dy_g, _live_b(aligned(lora_b[g]), slices, rank), scale)  # [n, slices*rank]
            if need_b:
                s_g = s[run].unflatten(1, (slices, -1))[..., :rank].contiguous().flatten(1)  # as forward computed it
                s_g = _by_slice(aligned(s_g), slices)
                d_b[g, :, :rank] = _scaled(dy_g.transpose(1, 2), s_g, scale).flatten(0, 1)
            if need_a:
                d_a_g = torch.mm(ds.t(), aligned(dropped[rows]))
                d_a[g].unflatten(0, (slices, -1))[:, :rank] = d_a_g.unflatten(0, (slices, -1))
            if need_x:
                dx_g = torch.mm(ds, _live_a(aligned(lora_a[g]), slices, rank))
                dx[rows] += torch.where(mask[rows, : x.shape[1]], dx_g, dx_g.new_zeros(())) if dropout else dx_g
    return dx, *call.returned(d_a, d_b)


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, ends: Tensor, exact: bool) -> Tensor:
    """x Wᵀ + b [T, N]. exact: each adapter's rows on their own, on one thread: BLAS chooses its order of summation by both."""
    if not exact:
        return row_linear(x, weight, bias)
    runs = host_runs(ends)
    first = runs[-1][2] if runs else 0  # of the rows without an adapter
    behind = torch.arange(order.numel(), x.shape[0], device=x.device)
    y = x.new_empty(x.shape[0], weight.shape[0])
    with on_one_thread(True):
        for rows in (*rows_of(runs, order), torch.cat([order[first:], behind])):
            y[rows] = F.linear(aligned(x[rows]), weight, bias)
    return y


def row_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, backward: bool = False) -> Tensor:
    """x Wᵀ + b, [T, N], in which no row sees another's NaN. backward: nor in that of autograd, which contracts over N.

    Where a contraction is no multiple of 32, AMX's bf16 products on a CPU read beyond a row, into the next, and multiply by 0.
    """
    N, K = weight.shape
    inputs, outputs = -K % 32, -N % 32 * backward
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not (inputs or outputs):
        return F.linear(x, weight, bias)
    bias = None if bias is None else F.pad(bias, (0, outputs))
    return F.linear(F.pad(x, (0, inputs)), F.pad(weight, (0, inputs, 0, outputs)), bias)[:, :N]


@contextmanager
def on_one_thread(exact: bool) -> Iterator[None]:
    """Within it torch computes on one thread, if exact: in fp32 its products sum in other orders on more."""
    threads = torch.get_num_threads()
    if not exact or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _runs(
    order: Tensor, ends: Tensor, ranks: Tensor | None, R: int, scaling: Tensor
) -> Iterator[tuple[int, slice, slice | Tensor, int, float]]:
    """Of each adapter that has rows: its number, its rows of S, its rows of x, its rank and its scaling."""
    runs = host_runs(ends)
    all_ranks, scales = [R] * len(scaling) if ranks is None else ranks.tolist(), scaling.tolist()
    for (g, start, end), rows in zip(runs, rows_of(runs, order), strict=True):
        yield g, slice(start, end), rows, all_ranks[g], scales[g]


def _dropped(x: Tensor, mask: Tensor) -> Tensor:
    """drop(x) without its scale; x itself for an empty mask."""
    return torch.where(mask[:, : x.shape[1]], x[: len(mask)], x.new_zeros(())) if len(mask) else x


def _by_slice(x: Tensor, slices: int) -> Tensor:
    """Columns [n, slices*C] as [slices, n, C], a view."""
    return x.unflatten(1, (slices, -1)).transpose(0, 1)


def _products(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b for [slices, n, k] and [slices, k, m], side by side: [n, slices*m]."""
    return _scaled(a, b, scale).transpose(0, 1).flatten(1)


def _scaled(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a b. For alpha=0 and beta=0 torch leaves 16-bit results as the memory was."""
    if not scale:
        return a.new_zeros(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(a.new_zeros(1, 1, 1), a, b, beta=0, alpha=scale)


def _live_a(a: Tensor, slices: int, rank: int) -> Tensor:
    """The first `rank` rows of each slice of A [slices*R, K]: [slices*rank, K]."""
    return a.unflatten(0, (slices, -1))[:, :rank].flatten(0, 1)


def _live_b(b: Tensor, slices: int, rank: int) -> Tensor:
    """The first `rank` columns of B [N, R], by slice: [slices, N/slices, rank]."""
    return b.unflatten(0, (slices, -1))[..., :rank]
