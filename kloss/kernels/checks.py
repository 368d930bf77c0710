"""What the ops refuse, in one wording.

Shapes, dtypes and devices are known to the host. Values are read on a CPU only. For those of a GPU the host would wait, so an
assertion stops the device; under torch.compile too, where a branch on a value would cut the graph.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IGNORED = -100  # the label of a row without one
INTS = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device | None
) -> None:
    """Raise ValueError for a tensor of another shape, dtype or device. device: None allows any."""
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is of {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_dim(name: str, tensor: Tensor, sizes: str) -> None:
    """Raise ValueError unless the tensor has as many dimensions as `sizes`, such as "T, K", and none but the first is empty."""
    if tensor.dim() != sizes.count(",") + 1 or 0 in tensor.shape[1:]:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected [{sizes}]")


def readable(values: Tensor) -> bool:
    """Whether the host may look at values without waiting."""
    return values.is_cpu and not torch.compiler.is_compiling()


def require(holds: Tensor, message: str) -> None:
    """Raise ValueError unless `holds`, bool []."""
    if not readable(holds):
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


def shortened(values: list) -> str:
    """The values as text, of many the first ones."""
    return str(values if len(values) <= 8 else [*values[:8], ...]).replace("Ellipsis", "...")


def check_offsets(cu_seqlens: Tensor, rows: int | None, device: torch.device | None = None) -> None:
    """Raise ValueError unless cu_seqlens is int [S+1], starts at 0, does not decrease, and ends within `rows` (None: any)."""
    check("cu_seqlens", cu_seqlens, (max(1, cu_seqlens.numel()),), INTS, device)
    order, room = "cu_seqlens must start at 0 and not decrease", f"cu_seqlens must end within the {rows} rows there are"
    if not readable(cu_seqlens):
        torch._assert_async((cu_seqlens[0] == 0) & (cu_seqlens[1:] >= cu_seqlens[:-1]).all(), order)
        if rows is not None:
            torch._assert_async(cu_seqlens[-1] <= rows, room)
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] or offsets != sorted(offsets):
        raise ValueError(f"{order}, got {shortened(offsets)}")
    if offsets[-1] >= 1 << 31:
        raise ValueError(f"cu_seqlens must end below 2^31, got {offsets[-1]}")
    if rows is not None and offsets[-1] > rows:
        raise ValueError(f"{room}, got {offsets[-1]}")


def check_ids(name: str, ids: Tensor, low: int, end: int, ignored: int | None = None) -> None:
    """Raise ValueError unless all ids lie in low..end-1 or are `ignored`."""
    allowed = f"{name} must lie in [{low}, {end})" + ("" if ignored is None else f" or be {ignored}")
    if not readable(ids):
        ids = ids.long()  # in uint8 no value is below 0
        fits = (ids >= low) & (ids < end)
        torch._assert_async((fits if ignored is None else fits | (ids == ignored)).all(), allowed)
        return
    if not ids.numel():
        return
    least, most = (int(bound) for bound in ids.aminmax())
    if ignored is not None and ignored <= least < low:
        counted = ids[ids != ignored]
        least = int(counted.min()) if counted.numel() else low
    if least < low or most >= end:
        raise ValueError(f"{allowed}, got {least}..{most}")


def check_labels(
    pred: Tensor, gold: Tensor, cu_seqlens: Tensor, group: Tensor, tags: Tensor | None, types: Tensor | None
) -> None:
    """What `span_counts` needs of its tensors before anybody looks at many values."""
    check("gold", gold, (gold.numel(),), INTS, cu_seqlens.device)
    check("pred", pred, (gold.numel(),), INTS, gold.device)
    check("cu_seqlens", cu_seqlens, (max(1, cu_seqlens.numel()),), INTS, None)
    check("group", group, (cu_seqlens.numel() - 1,), INTS, cu_seqlens.device)
    if tags is None and types is None:
        return
    if tags is None or types is None:
        raise ValueError("tags and types are given together or not at all")
    check("tags", tags, (tags.numel(),), INTS, gold.device)
    check("types", types, (tags.numel(),), INTS, gold.device)


def check_label_values(
    pred: Tensor, gold: Tensor, cu_seqlens: Tensor, group: Tensor, num_groups: int, tags: Tensor | None
) -> None:
    """What `span_counts` needs of borders, groups, tags and labels."""
    check_offsets(cu_seqlens, gold.numel())
    if tags is not None:
        check_ids("tags", tags, 0, 3)
    check_ids("group", group, 0, num_groups)
    labels = torch.iinfo(torch.int64).max if tags is None else tags.numel()
    if readable(gold):
        end = int(cu_seqlens[-1])
        check_ids("pred", pred[:end][gold[:end] != IGNORED], 0, labels)
        check_ids("gold", gold[:end], 0, labels, ignored=IGNORED)


def check_values(name: str, values: Iterable[float], fits: Callable[[float], bool], allowed: str) -> None:
    """Raise ValueError for the first value that does not fit."""
    for g, value in enumerate(values):
        if not fits(value):
            raise ValueError(f"{name}[{g}] is {value}, expected {allowed}")
