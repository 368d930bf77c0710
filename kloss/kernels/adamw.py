"""AdamW for some rows of a matrix, each with its own rate, step, decay and clipping: all rows move, or none does."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from . import shared_ops
from .checks import FLOATS, check, check_dim, check_values, readable

LARGEST = torch.finfo(torch.float32).max


def _check_rows(param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, work: Tensor | None) -> None:
    """What `adapter_adamw_` needs of memory that it writes in place."""
    check_dim("param", param, "G, P")
    (G, P), memory = param.shape, {"param": param, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check("grad", grad, (G, P), FLOATS[:3], param.device)
    if work is not None:
        memory["work"] = work
    for name, tensor in memory.items():
        check(name, tensor, (G, P), (grad.dtype if name == "work" else torch.float32,), param.device)
        if (P > 1 and tensor.stride(1) != 1) or (G > 1 and tensor.stride(0) < P):
            raise ValueError(f"{name} must have contiguous rows that do not overlap, got strides {tensor.stride()}")
    if G and P and len({tensor.data_ptr() for tensor in (grad, *memory.values())}) < 1 + len(memory):
        raise ValueError(f"{', '.join(['grad', *memory])} must not be one tensor")


@torch.no_grad()
def adapter_adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: Tensor,
    max_norm: Tensor,
    active: Tensor,
    work: Tensor | None = None,
    tail: int | None = None,
    tail_lr: Tensor | None = None,
) -> Tensor:
    """One AdamW step for each active row of the bank, in place, with that row's own rate, step, decay and clipping.

    param, exp_avg, exp_avg_sq: fp32 [G, P], each row contiguous.
    grad: fp32, bf16 or fp16 [G, P].
    step: int64 [G], steps taken so far.
    lr, weight_decay: float [G], finite, at least 0.
    max_norm: float [G], above 0; gradients of a larger norm are clipped to it; inf: never.
    active: bool [G].
    work: [G, P] in grad's dtype, each row contiguous, or None; gets a copy of the new weights of rows that move.
    tail, tail_lr: columns from `tail` on, such as a head's, have this rate, float [G]; both None: none have.
    betas: in [0, 1).
    eps: above 0.
    All numbers are on the host, or all on param's device: then a GPU's values are not checked, for nobody waits for them.
    Returns the gradient norms fp32 [G] before clipping, 0 for inactive rows. A row that is inactive, or whose norm is not finite,
    is left untouched to the bit.
    Raises ValueError for arguments out of range or that do not fit each other; then no row has changed.
    Source: Loshchilov and Hutter 2017, arXiv 1711.05101; clipping as torch.nn.utils.clip_grad_norm_.
    """
    _check_rows(param, grad, exp_avg, exp_avg_sq, work)
    G = param.shape[0]
    check_values("betas", betas, lambda value: 0 <= value < 1, "a number in [0, 1)")
    if not 0 < eps <= LARGEST:
        raise ValueError(f"eps is {eps}, expected a finite number above 0")
    if any(t is not None and t.device.type == "meta" for t in (param, step, lr, tail_lr, weight_decay, max_norm, active)):
        raise ValueError("a tensor on meta has no values")
    check("step", step, (G,), (torch.int64,), None)
    check("active", active, (G,), (torch.bool,), step.device)
    if (tail is None) != (tail_lr is None) or not 0 <= (tail or 0) <= param.shape[1]:
        raise ValueError(f"tail is {tail}, expected a column of {param.shape[1]}, with tail_lr, or None for both")
    rates = {"lr": lr} if tail_lr is None else {"lr": lr, "tail_lr": tail_lr}
    for name, tensor in {**rates, "weight_decay": weight_decay, "max_norm": max_norm}.items():
        check(name, tensor, (G,), FLOATS, step.device)
    if readable(step):
        check_values("step", step.tolist(), lambda value: value >= 0, "a count")
        for name, values in {**rates, "weight_decay": weight_decay}.items():
            check_values(name, values.tolist(), lambda value: 0 <= value <= LARGEST, "a finite number, at least 0")
        check_values("max_norm", max_norm.tolist(), lambda value: value > 0, "a number above 0, or inf for no clipping")
    if step.device == param.device and shared_ops.runs_on(param.device):
        apart = grad.stride(1) == 1 and (G < 2 or grad.stride(0) >= grad.shape[1])  # as an expanded row is not
        grad = grad if apart else grad.contiguous()
        rate, decay, top = (numbers.to(torch.float32).contiguous() for numbers in (lr, weight_decay, max_norm))
        tail_rate = None if tail_lr is None else tail_lr.to(torch.float32).contiguous()
        return shared_ops.adamw_(
            param, grad, exp_avg, exp_avg_sq, step, rate, betas=betas, eps=eps, weight_decay=decay, max_norm=top,
            active=active.contiguous(), work=work, tail=tail, tail_lr=tail_rate,
        )  # fmt: skip
    parts = [(slice(None, tail), lr), *([] if tail_lr is None else [(slice(tail, None), tail_lr)])]
    return _row_by_row(param, grad, exp_avg, exp_avg_sq, step, parts, betas, eps, weight_decay, max_norm, active, work)


def _row_by_row(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    parts: Sequence[tuple[slice, Tensor]],
    betas: tuple[float, float],
    eps: float,
    weight_decay: Tensor,
    max_norm: Tensor,
    active: Tensor,
    work: Tensor | None,
) -> Tensor:
    """`adapter_adamw_` without C++: torch's fused AdamW for one row after the other. The host waits for a GPU's norms.

    parts: columns, and their rates [G].
    """
    (beta_1, beta_2), rows = betas, active.nonzero()[:, 0].tolist()
    steps, decays, tops = step.tolist(), weight_decay.tolist(), max_norm.tolist()
    rates = [(columns, lr.tolist()) for columns, lr in parts]
    norms = torch.zeros(param.shape[0], dtype=torch.float32, device=param.device)
    for g in rows:
        norms[g] = torch.linalg.vector_norm(grad[g], dtype=torch.float32)
    host_norms = norms.tolist()  # read back together: on a GPU one wait
    for g in rows:
        if not math.isfinite(host_norms[g]):
            continue
        shrink = max(1.0, (host_norms[g] + 1e-6) / tops[g])  # the fused step divides by it, in place
        row = grad[g].to(torch.float32, copy=shrink > 1).contiguous()  # the fused step takes memory as contiguous
        if shrink > LARGEST:
            row, shrink = (grad[g].double() / shrink).float(), 1.0
        # Filled on the device: for a copy from the host, the host would wait.
        scalars = float(steps[g]), shrink, 0.0
        for columns, lr in rates:
            taken, divisor, found_inf = (torch.full((), x, dtype=torch.float32, device=param.device) for x in scalars)
            adamw(
                [param[g, columns]], [row[columns]], [exp_avg[g, columns]], [exp_avg_sq[g, columns]], [], [taken], fused=True,
                amsgrad=False, maximize=False, beta1=beta_1, beta2=beta_2, lr=lr[g], weight_decay=decays[g], eps=eps,
                grad_scale=divisor, found_inf=found_inf,
            )  # fmt: skip
        step[g] += 1
        if work is not None:
            work[g].copy_(param[g])
    return norms
