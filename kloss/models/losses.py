"""The loss of each adapter in a mixed batch: the one it would have alone."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .settings import whole_numbers

IGNORED = -100  # transformers' label of what does not count


def adapter_losses(logits: Tensor, labels: Tensor | None, adapter_ids: Sequence[int] | Tensor, *, shift: bool = False) -> Tensor:
    """The mean loss of each adapter over its own rows. The sum's gradients are those of each adapter trained alone.

    `.loss` of transformers is the mean over the batch: an adapter's share of its gradient alone depends on its neighbours.

    logits: float [B, ..., C], for the cross-entropy in fp32, of fp64 in fp64. With labels None: losses [B, ...] of your own.
    labels: int [B, ...], -100 for what does not count. None: all losses count.
    adapter_ids: int [B], as `use_adapters` takes and gives them; rows of -1 have no adapter and count for none.
    shift: whether position i predicts label i + 1, as in causal language models.
    Returns fp32 or fp64 [highest id + 1]; 0 for an adapter of whose labels none counts.
    Raises UserError for tensors that do not fit each other.
    """
    ids, rows = whole_numbers(adapter_ids), logits.shape[:1]
    if ids is None or ids.shape != rows or not ids.numel() or int(ids.min()) < -1:
        raise UserError(f"adapter_ids must be one whole number of at least -1 for each of {[*rows]} rows, got {adapter_ids}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels is None:
        losses, counted = logits, torch.ones_like(logits, dtype=torch.bool)
    else:
        if labels.shape != logits.shape[:-1] or labels.dtype.is_floating_point:
            given = f"{labels.dtype} {list(labels.shape)} and {list(logits.shape)}"
            raise UserError(f"labels must be whole numbers [B, ...] and logits [B, ..., C], got {given}")
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, -2), labels.long().flatten(), ignore_index=IGNORED, reduction="none")
        losses, counted = losses.view(labels.shape), labels != IGNORED
    sums, counts = (x.unsqueeze(-1).flatten(1).sum(1) for x in (losses, counted))  # [B]
    own = torch.arange(int(ids.max()) + 1, device=logits.device)[:, None] == ids.to(logits.device)  # [G, B]
    # By select, never by multiplying: the NaN of one adapter stays its own.
    return torch.where(own, sums, 0.0).sum(1) / torch.where(own, counts, 0).sum(1).clamp(min=1)
