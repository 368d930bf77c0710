"""A whole model as a bank of one row, so that full fine-tuning shares the optimiser and the checkpoints of the adapters."""

import torch
from torch import nn

from .rows import Rows


class FlatModel(Rows):
    """All parameters of a model as one row [1, P]; the parameters become views of the working copy. Its head comes last."""

    def __init__(self, model: nn.Module):
        parameters = list(model.requires_grad_(True).parameters())
        first, total = parameters[0], sum(p.numel() for p in parameters)
        work = torch.empty(1, total, dtype=first.dtype, device=first.device)
        grad, start = torch.zeros_like(work), 0
        for parameter in parameters:
            end = start + parameter.numel()
            work[0, start:end] = parameter.detach().flatten()
            parameter.data = work[0, start:end].view_as(parameter)
            parameter.grad = grad[0, start:end].view_as(parameter)
            start = end
        super().__init__(work if first.dtype == torch.float32 else work.float(), work, grad)
        self.head_start = total - sum(p.numel() for name, p in model.named_parameters() if name.startswith("classifier."))
