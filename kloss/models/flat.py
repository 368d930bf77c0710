"""A whole model as a bank of one row, so that full fine-tuning shares the optimiser and the checkpoints of the adapters."""

import torch
from torch import nn


class FlatModel:
    """All parameters of a model as one matrix [1, P]; the parameters become views of it.

    param: fp32 master copy [1, P]. work: the model's own memory [1, P] in its dtype. grad: [1, P], where gradients land.
    """

    def __init__(self, model: nn.Module):
        parameters = list(model.requires_grad_(True).parameters())
        first, total = parameters[0], sum(p.numel() for p in parameters)
        self.work = torch.empty(1, total, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros_like(self.work)
        start = 0
        for parameter in parameters:
            end = start + parameter.numel()
            self.work[0, start:end] = parameter.detach().flatten()
            parameter.data = self.work[0, start:end].view_as(parameter)
            parameter.grad = self.grad[0, start:end].view_as(parameter)
            start = end
        self.param = self.work if first.dtype == torch.float32 else self.work.float()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the master copy to the model."""
        if self.work is not self.param:
            self.work.copy_(self.param)

    def zero_grad(self) -> None:
        """Zeroes the gradients."""
        self.grad.zero_()

    def trainable(self, g: int) -> int:
        """Number of weights."""
        return self.param.shape[1]
