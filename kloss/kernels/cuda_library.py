"""The operators of `shared_ops.py` on a GPU: kloss/_cuda.*.so, built by nvcc from csrc/cuda, called with pointers and a stream.

The library knows no torch, so everything that it trusts is checked here. It launches on the current stream of the tensors'
device and never waits for it, so its launches can be captured.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MOST_ROWS = 65_535  # of a grid's second dimension
HALVES = torch.bfloat16, torch.float16  # what `linear` computes
COLUMNS, WIDEST = (256, 128), 8192  # columns of its tiles, and the most of all tiles
SQUARES, CONSTANTS = 4096, 6  # elements of a row in one sum of squares, numbers that its update needs
Long, Int, Pointer, Double = ctypes.c_int64, ctypes.c_int, ctypes.c_void_p, ctypes.c_double
Longs, Pointers = ctypes.POINTER(Long), ctypes.POINTER(Pointer)
ARGUMENTS = {
    "kloss_adamw": [
        Long, Long, *[Pointer] * 5, Longs, Int, Int, Int, *[Pointer] * 2, Long, *[Pointer] * 4, Double, Double, Double,
        *[Pointer] * 4,
    ],
    "kloss_span_counts": [*[Long] * 4, *[Pointer] * 8],
    "kloss_linear": [Longs, Longs, *[Pointer] * 6, Long, *[Pointer] * 4],
    "kloss_work_lists": [Long, Long, Long, Int, *[Pointer] * 4, Pointers, Longs, Pointer, Pointer],
}  # fmt: skip

_library = torch.library.Library("kloss", "FRAGMENT")


@cache
def load() -> bool:
    """Whether this kloss has the GPU's library; loads it and registers its operators. Raises OSError if it is broken."""
    if not _files():
        return False
    _entries()
    for name, function in (("adamw_", _adamw), ("span_counts_", _span_counts), ("work_lists_", _work_lists)):
        _library.impl(name, function, "CUDA")
    return True


def _files() -> list[Path]:
    return sorted(Path(__file__).parents[1].glob("_cuda.*.so"))


@cache
def _entries() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_files()[0]))
    for name, arguments in ARGUMENTS.items():
        getattr(library, name).argtypes = arguments
    library.kloss_work_lists_scratch.argtypes, library.kloss_work_lists_scratch.restype = [Long, Long], Long
    return library


def _launch(name: str, device: torch.device, *arguments: Any) -> None:
    """Call an entry point on the current stream of a device."""
    with torch.cuda.device(device):
        code = getattr(_entries(), name)(*arguments, torch.cuda.current_stream(device).cuda_stream)
    if code:
        raise RuntimeError(f"{name}: CUDA error {code}")


def _pointer(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device, name: str) -> int | None:
    """The address of a contiguous tensor of this dtype, shape and device; None for None."""
    if tensor is None:
        return None
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be a contiguous {dtype} {list(shape)} on {device}, "
            f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
        )
    return tensor.data_ptr()


def _adamw(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, lr: Tensor, tail: int, tail_lr: Tensor,
    weight_decay: Tensor, max_norm: Tensor, active: Tensor, beta_1: float, beta_2: float, eps: float, work: Tensor | None,
    variant: int, norms: Tensor,
) -> None:  # fmt: skip
    (G, P), device = param.shape, param.device
    matrices = {"param": param, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if work is not None:
        matrices["work"] = work
    for name, matrix in matrices.items():
        allowed = TYPES if name in ("grad", "work") else (torch.float32,)
        rows = (P < 2 or matrix.stride(1) == 1) and (G < 2 or matrix.stride(0) >= P)
        if matrix.shape != param.shape or matrix.device != device or matrix.dtype not in allowed or not rows:
            given = f"{matrix.dtype} {list(matrix.shape)} on {matrix.device}"
            raise ValueError(f"{name} must be [{G}, {P}] on {device}, each row contiguous, not {given}")
    if work is not None and grad.dtype not in (torch.float32, work.dtype):
        raise ValueError(f"work must have grad's type where that is not fp32, not {work.dtype} beside {grad.dtype}")
    if not 0 <= tail <= P:
        raise ValueError(f"tail must be a column, or {P}, not {tail}")
    if G > MOST_ROWS:
        raise ValueError(f"at most {MOST_ROWS} rows, not {G}")
    if work is not None and P and work.data_ptr() == param.data_ptr():
        raise ValueError("work must not be param itself")
    packed = P % 4 == 0 and all(m.data_ptr() % 16 == 0 and (G < 2 or m.stride(0) % 4 == 0) for m in matrices.values())
    strides = (Long * 5)(*(matrix.stride(0) for matrix in matrices.values()))
    floats = {"lr": lr, "tail_lr": tail_lr, "weight_decay": weight_decay, "max_norm": max_norm, "norms": norms}
    rate, tail_rate, decay, most, out = (_pointer(t, torch.float32, (G,), device, name) for name, t in floats.items())
    chunks = -(-P // SQUARES)
    scratch = torch.empty(G * (chunks + CONSTANTS), dtype=torch.float32, device=device)
    _launch(
        "kloss_adamw", device, G, P, param.data_ptr(), grad.data_ptr(), exp_avg.data_ptr(), exp_avg_sq.data_ptr(),
        None if work is None else work.data_ptr(), strides, packed, TYPES[grad.dtype], 0 if work is None else TYPES[work.dtype],
        _pointer(step, torch.int64, (G,), device, "step"), rate, tail, tail_rate, decay, most,
        _pointer(active, torch.bool, (G,), device, "active"), beta_1, beta_2, eps, out,
        scratch[CONSTANTS * G :].data_ptr(), scratch.data_ptr(),
    )  # fmt: skip


def _span_counts(
    pred: Tensor, gold: Tensor, cu_seqlens: Tensor, group: Tensor, tags: Tensor | None, types: Tensor | None, counts: Tensor,
    *_on_a_cpu: bool,
) -> None:  # fmt: skip
    device, T, S = pred.device, pred.shape[0], cu_seqlens.shape[0] - 1
    labels = 0 if tags is None else tags.shape[0]
    if (tags is None) != (types is None):
        raise ValueError("tags and types belong together")

    def longs(tensor: Tensor | None, shape: tuple[int, ...], name: str) -> int | None:
        return _pointer(tensor, torch.int64, shape, device, name)

    _launch(
        "kloss_span_counts", device, T, S, labels, counts.shape[0], longs(pred, (T,), "pred"), longs(gold, (T,), "gold"),
        _pointer(cu_seqlens, torch.int32, (S + 1,), device, "cu_seqlens"), longs(group, (S,), "group"),
        longs(tags, (labels,), "tags"), longs(types, (labels,), "types"), longs(counts, (counts.shape[0], 3), "counts"),
    )  # fmt: skip


def walks(tensor: Tensor) -> bool:
    """Whether TMA can walk a matrix, or several: rows contiguous, addresses and strides multiples of 16 bytes."""
    *outer, inner = tensor.stride()
    dense = tensor.dim() < 3 or outer[-1] == tensor.shape[-1]
    bytes_apart = [stride * tensor.element_size() for stride, size in zip(outer, tensor.shape, strict=False) if size > 1]
    return inner == 1 and dense and not any(number % 16 for number in (tensor.data_ptr(), *bytes_apart))


def linear(
    x: Tensor, weight: Tensor, s: Tensor, factor: Tensor, bias: Tensor | None, y: Tensor, tiles: Tensor,
    p: Tensor | None = None, keys: Tensor | None = None, *, slices: int = 1, turned: bool = False,
) -> None:  # fmt: skip
    """y = x weightᵀ + s factor_gᵀ + bias for the rows of tiles, on Hopper, in x's dtype of 16 bits.

    x: [T, K]. weight: [N, K]. s: [T, slices*R]. factor: [G, N, R]. y: [T, N]. tiles: `Work.tiles_64` of rows in order.
    slices: the columns are so many equal blocks, and block i takes columns i*R..(i+1)*R of s.
    turned: weight is [K, N] and factor [G, R, N]; slices is 1.
    p, keys: fp32 [G] and int64 [T], dropout of the term of s and factor.
    Raises ValueError for tensors that do not fit each other, or that TMA cannot walk.
    """
    (T, K), N, SR, G, device = x.shape, y.shape[1], s.shape[1], factor.shape[0], x.device
    rank = SR // slices
    shapes = {
        "weight": (weight, (K, N) if turned else (N, K)), "s": (s, (T, SR)), "y": (y, (T, N)),
        "factor": (factor, (G, SR, N) if turned else (G, N, rank)), "x": (x, (T, K)),
    }  # fmt: skip
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape or tensor.dtype != x.dtype or tensor.device != device or not walks(tensor):
            raise ValueError(
                f"{name} must be {x.dtype} {list(shape)} on {device}, addresses and strides multiples of 16 bytes, "
                f"not {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
    divided = SR % slices == N % slices == 0 and (slices == 1 or N // slices % COLUMNS[-1] == 0)
    if x.dtype not in HALVES or rank % 16 or N > WIDEST or not divided:
        raise ValueError(f"{x.dtype}, rank {rank}, {N} columns and {slices} slices do not fit the kernel's tiles")
    columns = COLUMNS[0] if N // slices % COLUMNS[0] == 0 else COLUMNS[1]
    sizes = T, K, N, G, SR, rank, slices, turned, x.dtype == torch.bfloat16, columns
    strides = x.stride(0), weight.stride(0), s.stride(0), factor.stride(0) if G > 1 else N * rank, y.stride(0)
    _launch(
        "kloss_linear", device, (Long * len(sizes))(*sizes), (Long * len(strides))(*strides),
        *(t.data_ptr() for t in (x, weight, s, factor)), _pointer(bias, x.dtype, (N,), device, "bias"), y.data_ptr(),
        tiles.shape[0], _pointer(tiles, torch.int32, (tiles.shape[0], 3), device, "tiles"),
        _pointer(p, torch.float32, (G,), device, "p"), _pointer(keys, torch.int64, (T,), device, "keys"),
    )  # fmt: skip


def _work_lists(
    cu_seqlens: Tensor, adapter: Tensor, step: Tensor | None, sequence: Tensor | None, backwards: bool, row_adapter: Tensor,
    order: Tensor, ends: Tensor, tiles_64: Tensor, tiles_128: Tensor, chunks: Tensor, slots: Tensor, attention_16: Tensor | None,
    attention_32: Tensor | None, attention_64: Tensor | None, longer: Tensor | None, row_key: Tensor | None, position: Tensor,
) -> None:  # fmt: skip
    device, T, S, G = cu_seqlens.device, row_adapter.shape[0], cu_seqlens.shape[0] - 1, ends.shape[0] - 1
    short = [attention_16, attention_32, attention_64]
    classes = sum(tiles is not None for tiles in short)
    if any(tiles is None for tiles in short[:classes]) or (classes > 0) != (longer is not None):
        raise ValueError("attention's classes are 16, 16 and 32, or 16, 32 and 64, and longer")
    if len({step is None, sequence is None, row_key is None}) > 1:
        raise ValueError("step, sequence and row_key belong together")

    def ints(tensor: Tensor | None, shape: tuple[int, ...], name: str) -> int | None:
        return _pointer(tensor, torch.int32, shape, device, name)

    def longs(tensor: Tensor | None, shape: tuple[int, ...], name: str) -> int | None:
        return _pointer(tensor, torch.int64, shape, device, name)

    tiles = {"tiles_64": tiles_64, "tiles_128": tiles_128, "chunks": chunks}
    attention = {"attention_16": attention_16, "attention_32": attention_32, "attention_64": attention_64, "longer": longer}
    capacities = [0 if t is None else t.shape[0] for t in (tiles | attention).values()]
    lists = [
        ints(row_adapter, (T,), "row_adapter"), longs(order, (T,), "order"), longs(ends, (G + 1,), "ends"),
        *(ints(t, (t.shape[0], 4 if name == "chunks" else 3), name) for name, t in tiles.items()), ints(slots, (G + 1,), "slots"),
        *(None if t is None else ints(t, (t.shape[0], 3), name) for name, t in attention.items()),
        longs(row_key, (T,), "row_key"), ints(position, (T,), "position"),
    ]  # fmt: skip
    scratch = torch.empty(_entries().kloss_work_lists_scratch(S, G), dtype=torch.int32, device=device)
    _launch(
        "kloss_work_lists", device, T, S, G, classes, ints(cu_seqlens, (S + 1,), "cu_seqlens"), ints(adapter, (S,), "adapter"),
        longs(step, (G,), "step"), longs(sequence, (S,), "sequence"), (Pointer * len(lists))(*lists), (Long * 7)(*capacities),
        scratch.data_ptr(),
    )  # fmt: skip
