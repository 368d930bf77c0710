"""The Triton backend of `multi_lora.py`: which kernels a forward and a backward pass launch.

    S  = drop(x) A_gᵀ                  shrink   [T, slices*R]               g = adapter of the row
    y  = s_g S B_gᵀ + b + x Wᵀ          expand   [T, N]
    dS = s_g dy B_g                    shrink   [T, slices*R]
    dx = mask ⊙ (dS A_g) + dy W        expand   [T, K]
    dA_g = dSᵀ drop(x)                 reduce   [slices*R, K]               dB_g = s_g dyᵀ S   [N, R]

Row t of x and y is row i of S and dS, where order[i] = t: in `order` an adapter's rows are neighbours. A tile holds rows of one
adapter only, and its height is fixed for each kernel. A reduction walks the adapter's own rows from the first, in fixed steps. So
an adapter's values have the same bits whatever else is in the batch. There are no atomics. Sums are fp32; S and dS are rounded to
x's dtype with their factor, as torch rounds them in that dtype. Dropout's scale 1/(1-p) is the same for all rows of a tile and is
applied to fp32 sums.

The base product comes last. `expand` writes the LoRA term and the vendor's product accumulates on top of it in place: what is
rounded in between is the smaller term (an H100's library rounds the product too). With exact=True `expand` adds the base product
in its accumulator, in fixed tiles; on an H100 that is slower at every size that was tried. `lora_hopper.py` is neither.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor

from .lora_shrink import shrink
from .lora_tiles import Factor, expand, reduce
from .lora_torch import Backward, Forward
from .segments import Work

BESIDE = True  # whether dA and dB are computed beside dS and dx where a graph is captured
WORK = slice(1, 1 + len(Work._fields))  # where `lists` has the fields of Work; dropout is behind them


def saved(x: Tensor, SR: int, lists: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Empty tensors that forward fills for backward: S [T, SR], and with dropout its keys int64 [T], rows in order."""
    rows = lists[0].shape[0]
    return x.new_empty(rows, SR), x.new_empty(rows if len(lists) > WORK.stop else 0, dtype=torch.int64)


def forward(call: Forward) -> tuple[Tensor, Tensor, Tensor]:
    """y, S and the keys. lists: order, the fields of `Work`, and with dropout p, seed and row_key."""
    x, weight, bias, lora_a, lora_b, scaling, ranks, lists, site, slices, exact, activated = call
    order, work, dropout = lists[0], Work(*lists[WORK]), lists[WORK.stop :]
    (_, SR, K), (_, N, R), rows = lora_a.shape, lora_b.shape, order.numel()
    s, keys = saved(x, SR, lists)
    y = x.new_empty(x.shape[0], N)
    a = Factor(lora_a, lora_a.stride(0), 0, lora_a.stride(1), lora_a.stride(2))
    b = Factor(lora_b, lora_b.stride(0), 0, lora_b.stride(1), lora_b.stride(2))
    draws = (*dropout, keys) if dropout else ()
    with torch.cuda.device_of(x):
        shrink(x, a, s, order, work.tiles_64, ranks, None, *draws, site=site, K=K, C=SR, R=R, blocks=1, of_x=activated)
        x = x if activated is None else activated
        expand(s, b, x, weight.t(), bias, y, order, work, ranks, scaling, R=R, blocks=slices, slices=slices, fused=exact)
    _add_base(y, x, weight.t(), bias, rows, exact)
    return y, s, keys


def backward(call: Backward) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dA and dB, empty where not needed."""
    return gradients(call, call.scaling, _product, call.lists[0])


def gradients(
    call: Backward, scaling_of_s: Tensor | None, product: Callable[..., None], order: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What `backward` returns.

    scaling_of_s: what dB_g = dyᵀ S lacks; None: S holds it.
    order: None where rows are in order.
    product: fills dx, given (call, dS, dx, work, p and keys).
    """
    dy, x, _, lora_a, lora_b, scaling, s, keys, ranks, lists, slices, _, need_x, need_a, need_b, _, _, before = call
    work, dropout = Work(*lists[WORK]), lists[WORK.stop :]
    (_, N, R), SR, K = lora_b.shape, s.shape[1], x.shape[1]
    C = N // slices
    p_and_keys = (dropout[0], keys) if dropout else (None, None)
    dx, (d_a, d_b) = x.new_empty(x.shape if need_x else 0), call.outputs()
    with torch.cuda.device_of(x), _beside(x) as aside:
        if need_x or need_a or before is not None:
            ds, given, made = torch.empty_like(s), dy, None
            if before is not None:
                dy = made = torch.empty_like(before)
            b = Factor(lora_b, lora_b.stride(0), C * lora_b.stride(1), lora_b.stride(2), lora_b.stride(1))
            tiles = work.tiles_64
            shrink(given, b, ds, order, tiles, ranks, scaling, K=C, C=R, R=R, blocks=slices, of_x=made, before=before)
        if need_b:
            with aside():
                reduce(dy, s, d_b, order, work, ranks, scaling_of_s, C=C, SR=R, R=R, blocks=slices, strides=(R, 1))
        if need_a:
            with aside():
                reduce(x, ds, d_a, order, work, ranks, None, *p_and_keys, C=K, SR=SR, R=R, blocks=1, strides=(1, K))
        if need_x:
            product(call._replace(dy=dy), ds, dx, work, p_and_keys)
    return dx, *call.returned(d_a, d_b)


def _product(call: Backward, ds: Tensor, dx: Tensor, work: Work, p_and_keys: tuple) -> None:
    """dx = mask ⊙ (dS A_g) + dy W."""
    dy, weight, lora_a, slices, R = call.dy, call.weight, call.lora_a, call.slices, call.lora_b.shape[2]
    a = Factor(lora_a, lora_a.stride(0), R * lora_a.stride(1), lora_a.stride(2), lora_a.stride(1))
    rest = call.lists[0], work, call.ranks, None, *p_and_keys
    expand(ds, a, dy, weight, None, dx, *rest, R=R, blocks=1, slices=slices, fused=call.exact)
    _add_base(dx, dy, weight, None, len(ds), call.exact)


@contextmanager
def _beside(x: Tensor) -> Iterator[Callable[[], AbstractContextManager[object]]]:
    """Within it `with aside():` launches kernels that wait for what was launched before; nothing waits for them until the end.

    In a graph that is captured they run on another stream; launched one by one the events would cost more than they save.
    """
    capturing = BESIDE and torch.version.cuda is not None and x.is_cuda and torch.cuda.is_current_stream_capturing()
    if not capturing:
        yield nullcontext
        return
    here = torch.cuda.current_stream(x.device)
    other, forked = _other_stream(x.device), False

    @contextmanager
    def aside() -> Iterator[None]:
        nonlocal forked
        other.wait_stream(here)
        forked = True
        with torch.cuda.stream(other):
            yield

    yield aside
    if forked:  # else it is no part of the graph
        here.wait_stream(other)


@cache
def _other_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _add_base(y: Tensor, x: Tensor, w: Tensor, bias: Tensor | None, rows: int, fused: bool) -> None:
    """Add x w in place; rows behind the first `rows` hold nothing yet and get the bias too. fused: the first have x w already."""
    if rows < y.shape[0]:
        y[rows:] = 0 if bias is None else bias
    y, x = (y[rows:], x[rows:]) if fused else (y, x)
    if y.shape[0]:
        y.addmm_(x, w)
