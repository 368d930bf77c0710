"""Linear layer with the LoRA update of each row's own adapter: the public functions, the checks, and the operators below them.

A backend is a module with three functions. `forward` gives y [T, N], S [T, slices*R] and what dropout drew. `backward` gives dx,
dA and dB. `saved` gives the empty tensors that forward fills for backward. `lists` holds what the backend needs of the segments
and of dropout: one list, since each argument of an operator costs the host.
"""

from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import multi_lora_cpu, multi_lora_direct
from .checks import FLOATS, INTS
from .dropout import Dropout, check_dropout, kept_scaling, row_dropout
from .eager import lower, widened
from .lora_torch import Backward, Forward
from .segments import Segments, make_segments, with_work

BACKENDS = {"triton": "lora_triton", "hopper": "lora_hopper", "csrc": "multi_lora_cpu", "torch": "lora_torch"}


@cache
def module_of(backend: str) -> ModuleType:
    return import_module(f".{BACKENDS[backend]}", __package__)  # only now: Triton need not be there for the others


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    segments: Segments,
    *,
    slices: int = 1,
    ranks: Tensor | None = None,
    dropout: Dropout | None = None,
    exact: bool = False,
    into: tuple[Tensor, Tensor] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Linear layer with the LoRA update of each row's own adapter: y[t] = W x[t] + b + s_g B_g (A_g drop(x[t])).

    x: [T, K] in fp32, bf16, fp16 or fp64.
    weight: [N, K] in x's dtype.
    bias: [N] in x's dtype, or None.
    lora_a: [G, slices*R, K], of any float dtype, rounded to x's.
    lora_b: [G, N, R], likewise.
    scaling: fp32 [G], s.
    segments: which rows each adapter has. Rows behind segments.cu_seqlens[-1] get the base model's value.
    slices: the N rows of weight are `slices` equal blocks; block i uses rows i*R..(i+1)*R of A (fused q, k, v).
    ranks: int [G] or None. Adapter g uses the first ranks[g] of R, in 1..R; its tail is skipped and gets zero gradients. On a GPU
        the values are not checked, for that needs a synchronisation; the kernels clamp them to [0, R].
    dropout: of x on the LoRA path only, by the segments' adapters.
    exact: the base product has fixed tiles too, so a row's bits do not depend on who shares the batch.
    into: tensors of lora_a's and lora_b's shapes and dtypes. Backward writes the two gradients there, over what they held, and
        gives autograd none; adapters without rows get zeros.
    backend: "triton", "hopper" (on such a GPU, `lora_hopper.serves`), "csrc" (on a CPU, K and N / slices multiples of 32) or
        "torch". None: on a GPU hopper where it serves and is faster, else Triton, and Triton with `exact`, since whether hopper
        serves depends on the others' ranks and places; on a CPU csrc where it fits, else plain torch, as fp64 is always.
    Returns [T, N] in x's dtype, under autocast in autocast's. Differentiable once in x, weight, bias, lora_a, lora_b.
    Raises ValueError for tensors that do not fit each other.
    Source: Hu et al. 2021, arXiv 2106.09685, equation 3, for many adapters at once.
    """
    x, weight, bias = lower(x, weight, bias)
    check_linear(x, weight, bias, lora_a, lora_b, scaling, segments, slices, ranks, dropout, into)
    chosen, wanted = backend is None, backend == "hopper"
    free = not torch.compiler.is_compiling() and (wanted or not exact)
    hopper = free and hopper_serves(x, weight, lora_a, lora_b, segments, ranks, wanted)
    backend = _fastest(x, weight, slices, hopper) if backend is None else _checked(backend, x, weight, slices, hopper)
    dtype, site = x.dtype, 0 if dropout is None else dropout.site
    scaling = scaling.contiguous()  # the kernels take vectors by their address
    if ranks is not None:
        ranks = ranks.long().contiguous()
    if backend in ("triton", "hopper"):
        lists = kernel_lists(segments, dropout)
    else:
        if not lora_a.dtype == lora_b.dtype == dtype:
            lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
        if dtype != torch.float32:
            x, weight, bias = widened(x), widened(weight), None if bias is None else widened(bias)
            lora_a, lora_b = widened(lora_a), widened(lora_b)
        lists = [segments.order, segments.ends]
        if dropout is not None:
            lists += row_dropout(dropout.first(segments.order.numel()), segments.row_adapter)[:2]
            scaling = kept_scaling(scaling, dropout.p)
        eager = chosen and backend == "csrc" and not exact and into is None and not torch.compiler.is_compiling()
        if eager and multi_lora_direct.serves(x, weight, lora_a, lora_b):
            order, ends, *keys = lists
            rows = multi_lora_direct.Lists(scaling, order, ends, ranks, *keys)
            return multi_lora_direct.linear(x, weight, bias, lora_a, lora_b, rows, slices=slices).to(dtype)
    arguments = x, weight, bias, lora_a, lora_b, scaling, ranks, lists, site, slices, exact, *(into or (None, None)), backend
    y = torch.ops.kloss.multi_lora(*arguments)[0]
    return y if y.dtype == dtype else y.to(dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor | float,
    *,
    dropout: Dropout | None = None,
    exact: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`multi_lora_linear` with one adapter for all rows: lora_a [R, K], lora_b [N, R], scaling a number or fp32 [1]."""
    if x.dim() != 2 or (isinstance(scaling, Tensor) and scaling.numel() != 1):
        raise ValueError(f"expected x [T, K] and one scaling, got x {tuple(x.shape)} and scaling {scaling}")
    cu_seqlens = torch.arange(2, dtype=torch.int32, device=x.device) * x.shape[0]
    segments = make_segments(cu_seqlens, torch.zeros_like(cu_seqlens[1:]), 1, rows=x.shape[0])
    if not isinstance(scaling, Tensor):
        scaling = torch.full((), scaling, dtype=torch.float32, device=x.device)
    adapter = lora_a[None], lora_b[None], scaling.reshape(1)
    return multi_lora_linear(x, weight, bias, *adapter, segments, dropout=dropout, exact=exact, backend=backend)


def kernel_lists(segments: Segments, dropout: Dropout | None) -> list[Tensor]:
    """`lists` of the backends in Triton: order, the fields of `Work`, and with dropout p, seed and row_key."""
    segments = with_work(segments)
    assert segments.work is not None
    lists = [segments.order, *segments.work]
    if dropout is not None:
        lists += dropout.p.contiguous(), dropout.seed.contiguous(), dropout.row_key.contiguous()
    return lists


def hopper_serves(x: Tensor, *rest: Any) -> bool:
    if x.device.type != "cuda":
        return False
    from .lora_hopper import serves  # only here: it needs Triton

    return serves(x, *rest)


def _fastest(x: Tensor, weight: Tensor, slices: int, hopper: bool = False) -> str:
    if x.dtype == torch.float64:
        return "torch"
    if x.device.type != "cpu":
        return "hopper" if hopper else "triton"
    return "csrc" if multi_lora_cpu.fits(x, weight, slices) else "torch"


def _checked(backend: str, x: Tensor, weight: Tensor, slices: int, hopper: bool) -> str:
    """The backend, if it can compute the layer."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError("backend 'triton' computes fp32, bf16 and fp16, got fp64; 'torch' computes it")
    cannot_look = torch.compiler.is_compiling()  # for the extension on disk, which the operator looks for again, or a setting
    if backend == "triton" and not (cannot_look or x.device.type != "cpu" or _interpreted()):
        raise ValueError(f"backend 'triton' needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1); got x on {x.device}")
    if backend == "hopper" and not hopper:
        raise ValueError(
            "backend 'hopper' needs such a GPU, 16 bits, a batch whose rows are in order, one rank that is a multiple of 16, and "
            f"aligned tensors; got {x.dtype} on {x.device}, K {x.shape[1]}, N {weight.shape[0]}, slices {slices}"
        )
    if backend == "csrc" and not (cannot_look or (x.device.type == "cpu" and multi_lora_cpu.fits(x, weight, slices))):
        given = f"{x.dtype} on {x.device}, K {x.shape[1]}, N {weight.shape[0]}, slices {slices}"
        needs = f"the C++ extension, a CPU, no fp64, and K and N / slices that are multiples of {multi_lora_cpu.LANES}"
        raise ValueError(f"backend 'csrc' needs {needs}; got {given}")
    return backend


def _interpreted() -> bool:
    from triton import knobs  # only here: kloss computes without Triton, too

    return knobs.runtime.interpret


def check_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: Tensor,
    segments: Segments,
    slices: int,
    ranks: Tensor | None,
    dropout: Dropout | None,
    into: tuple[Tensor, Tensor] | None,
) -> None:
    """Raises ValueError for the first tensor that does not fit the others."""
    if x.dim() != 2 or weight.dim() != 2 or lora_b.dim() != 3:
        given = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, lora_b {tuple(lora_b.shape)}"
        raise ValueError(f"expected x [T, K], weight [N, K] and lora_b [G, N, R], got shapes {given}")
    (rows, K), N, (_, _, R), G, covered = x.shape, weight.shape[0], lora_b.shape, segments.num_adapters, segments.order.numel()
    if slices < 1 or N % slices or K < 1 or N < 1 or R < 1:
        raise ValueError(f"{N} outputs do not divide into {slices} slices; K {K}, N {N}, rank {R} and slices must be at least 1")
    dtype, device = x.dtype, x.device
    if dtype not in FLOATS or weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        given = f"x {dtype}, weight {weight.dtype}, bias {None if bias is None else bias.dtype}"
        raise ValueError(f"expected one dtype for the base layer, of {', '.join(map(str, FLOATS))}; got {given}")
    if not (lora_a.dtype in FLOATS and lora_b.dtype in FLOATS and scaling.dtype == torch.float32):
        given = f"lora_a {lora_a.dtype}, lora_b {lora_b.dtype}, scaling {scaling.dtype}"
        raise ValueError(f"expected float lora_a and lora_b, and scaling in float32; got {given}")
    expected = [("weight", weight, (N, K)), ("lora_a", lora_a, (G, slices * R, K)), ("lora_b", lora_b, (G, N, R))]
    expected.append(("scaling", scaling, (G,)))
    if bias is not None:
        expected.append(("bias", bias, (N,)))
    if ranks is not None:
        expected.append(("ranks", ranks, (G,)))
    if dropout is not None:
        expected += ("dropout.p", dropout.p, (G,)), ("dropout.seed", dropout.seed, (G,))
    if into is not None:
        if (into[0].dtype, into[1].dtype) != (lora_a.dtype, lora_b.dtype):
            raise ValueError(
                f"into must have the factors' {lora_a.dtype} and {lora_b.dtype}, got {into[0].dtype}, {into[1].dtype}"
            )
        expected += ("into[0]", into[0], lora_a.shape), ("into[1]", into[1], lora_b.shape)
    for name, tensor, shape in expected:
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, x on {device}")
    if rows < covered:
        raise ValueError(f"x has {rows} rows, the segments cover {covered}")
    if segments.order.device != device:
        raise ValueError(f"segments are on {segments.order.device}, x on {device}")
    if dropout is not None:
        check_dropout(dropout, covered, device)
    if ranks is not None:
        if ranks.dtype not in INTS:
            raise ValueError(f"ranks must be of an integer dtype, got {ranks.dtype}")
        if G and device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in ranks.aminmax())
            if low < 1 or high > R:
                raise ValueError(f"ranks must lie in 1..{R}, the last dimension of lora_b; got {low}..{high}")


def without_autocast(device_type: str, function: Callable, *arguments: Any) -> Any:
    """function(*arguments) with autocast off: the dtypes are chosen."""
    if not torch.is_autocast_enabled(device_type):
        return function(*arguments)
    with torch.autocast(device_type, enabled=False):
        return function(*arguments)


def written_directly(into: Tensor | None, factor: Tensor) -> Tensor | None:
    """into, if a backend that computes with this factor can write its gradient there."""
    if into is None or into.dtype != factor.dtype or into.stride()[1:] != (into.shape[2], 1):
        return None
    return into


def handed_over(
    gradients: Sequence[Tensor], into: Sequence[Tensor | None], direct: Sequence[Tensor | None], needed: Sequence[bool]
) -> list[Tensor | None]:
    """What autograd gets of the factors' gradients: nothing of those that `into` takes, copied there if not written directly."""
    for gradient, place, written, need in zip(gradients, into, direct, needed, strict=True):
        if need and place is not None and written is None:
            place.copy_(gradient)
    return [gradient if need and place is None else None for gradient, place, need in zip(gradients, into, needed, strict=True)]


class _MultiLora(Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            y, s, keys = torch.ops.kloss.multi_lora(*args)
        x, weight, bias, lora_a, lora_b, scaling, ranks, lists, _, slices, exact, *into, backend = args
        ctx.save_for_backward(x, weight, lora_a, lora_b, scaling, s, keys, ranks, *lists)
        ctx.slices, ctx.exact, ctx.backend, ctx.has_bias, ctx.into = slices, exact, backend, bias is not None, into
        ctx.mark_non_differentiable(s, keys)
        ctx.set_materialize_grads(False)
        return y, s, keys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _ds: None, _dkeys: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 14
        saved = ctx.saved_tensors
        need_x, need_w, need_bias, need_a, need_b = ctx.needs_input_grad[:5]
        dx = dw = db = None
        factors: list[Tensor | None] = [None, None]
        if need_x or need_a or need_b:
            direct = [written_directly(*pair) for pair in zip(ctx.into, saved[2:4], strict=True)]
            settings = ctx.slices, ctx.exact, need_x, need_a, need_b, *direct, ctx.backend
            dx, *gradients = torch.ops.kloss.multi_lora_backward(dy, *saved[:8], saved[8:], *settings)
            factors = handed_over(gradients, ctx.into, direct, (need_a, need_b))
        if need_w:
            dw = without_autocast(dy.device.type, torch.mm, dy.t(), saved[0])
        if need_bias and ctx.has_bias:
            db = dy.sum(0)
        return dx if need_x else None, dw, db, *factors, *(None,) * 9


def _forward(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return without_autocast(x.device.type, module_of(rest[-1]).forward, Forward(x, *rest[:-3]))


def _backward(dy: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return without_autocast(dy.device.type, module_of(rest[-1]).backward, Backward(dy, *rest[:-1]))


def _fake_forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, _, lora_a, _, _, _, lists, *_, backend = args
    return x.new_empty(x.shape[0], weight.shape[0]), *module_of(backend).saved(x, lora_a.shape[1], lists)


def _fake_backward(*args: Any) -> tuple[Tensor, ...]:
    x, lora_a, lora_b = args[1], args[3], args[4]
    need_x, need_a, need_b, into_a, into_b = args[-6:-1]
    needs = need_x, need_a and into_a is None, need_b and into_b is None
    return tuple(t.new_empty(t.shape if need else 0) for t, need in zip((x, lora_a, lora_b), needs, strict=True))


_SCHEMA = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor? ranks, Tensor[] lists, "
    "int site, int slices, bool exact, Tensor? into_a, Tensor? into_b, str backend"
)
_BACKWARD_SCHEMA = (
    "Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor scaling, Tensor s, Tensor keys, Tensor? ranks, "
    "Tensor[] lists, int slices, bool exact, bool need_x, bool need_a, bool need_b, "
    "Tensor(a!)? into_a, Tensor(b!)? into_b, str backend"
)
# torch.library.custom_op costs the host 8 µs more forward and 18 µs more backward.
_library = torch.library.Library("kloss", "FRAGMENT")
_library.define(f"multi_lora({_SCHEMA}) -> (Tensor, Tensor, Tensor)")
_library.define(f"multi_lora_backward({_BACKWARD_SCHEMA}) -> (Tensor, Tensor, Tensor)")
for _device in ("CUDA", "CPU"):
    _library.impl("multi_lora", _forward, _device)
    _library.impl("multi_lora_backward", _backward, _device)
_library.impl("multi_lora", _MultiLora.apply, "Autograd")
torch.library.register_fake("kloss::multi_lora", _fake_forward, lib=_library)
torch.library.register_fake("kloss::multi_lora_backward", _fake_backward, lib=_library)
