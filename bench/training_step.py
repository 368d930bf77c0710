"""The whole training step that the GPU suite profiles: whole_step's, on a device, and its check against the CPU."""

import torch
from torch import Tensor

from kloss.kernels import make_segments, row_keys, token_loss
from kloss.models import AdapterBank, StepDropout, XLMRConfig, XLMRForTokenClassification

from .whole_step import Batch, Kloss, make_batch

CONFIG = XLMRConfig(vocab_size=1000, num_hidden_layers=4, num_labels=111)
ADAPTERS, RANK, UTTERANCES, DROPOUT = 52, 32, 32, 0.1


class DeviceStep(Kloss):
    """The step as the trainer takes it: the batch comes from the host with its sizes, the optimiser's numbers for each adapter
    stay there, and the losses go back. All adapters share one pass, whatever `pass_tokens` would be.
    """

    def gradients(self, batch: Batch) -> Tensor:
        """Fills the bank's gradients; returns the losses fp32 [G]. batch: on the host."""
        bank, device, groups = self.bank, self.bank.param.device, self.bank.adapters
        rows, sequences = batch.input_ids.numel(), batch.adapter.numel()
        within = torch.arange(sequences) % (sequences // groups)
        input_ids, labels, cu_seqlens, adapter, within = (tensor.to(device) for tensor in (*batch, within))
        segments = make_segments(cu_seqlens, adapter, groups, rows=rows)
        dropout = None
        if self.p:
            keys = row_keys(torch.full_like(within, self.steps), within, cu_seqlens, rows=rows)
            p = torch.full((groups,), self.p, device=device)
            dropout = StepDropout(p, p, p, torch.arange(groups, device=device), keys, segments.row_adapter)
        loss, _ = token_loss(self.model(input_ids, cu_seqlens, segments, bank, dropout=dropout), labels, segments)
        loss.sum().backward()
        self.loss = loss.detach()
        return self.loss

    def step(self, batch: Batch) -> Tensor:
        """One training step of every adapter; returns the losses, on the host."""
        super().step(batch)
        return self.loss.cpu()


def make_step(
    config: XLMRConfig = CONFIG, adapters: int = ADAPTERS, rank: int = RANK, utterances: int = UTTERANCES, *,
    device: str = "cuda", dtype: torch.dtype = torch.bfloat16, dropout: float = DROPOUT, seed: int = 0,
) -> tuple[DeviceStep, Batch]:  # fmt: skip
    """A step with random weights in dtype on the device, and its batch. The weights depend on the seed and dtype alone."""
    generator = torch.Generator().manual_seed(seed)
    model = XLMRForTokenClassification.random(config, seed).freeze_backbone().to(device=device, dtype=dtype)
    bank = AdapterBank(model, adapters, rank, dtype=dtype, device=device)
    for name in bank.slots:
        if name.endswith(".b"):
            place = bank.view(bank.param, name)
            place.copy_(torch.empty(place.shape).normal_(0, 0.02, generator=generator))
    bank.refresh()
    return DeviceStep(model, bank, dropout), make_batch(config, adapters, utterances, generator)


def check_step(
    config: XLMRConfig = CONFIG, rank: int = RANK, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> None:
    """A step of few utterances on the device: losses and gradient norms off from fp32 on the CPU at most twice as far as the
    CPU's in dtype, as `whole_step.gate` demands. Dropout is drawn, the same on every device. Raises AssertionError.
    """

    def figures(device: str, dtype: torch.dtype) -> Tensor:
        step, batch = make_step(config, 4, rank, 4, device=device, dtype=dtype)
        return torch.stack([step.gradients(batch), step.bank.grad.float().norm(dim=1)]).double().cpu()

    truth = figures("cpu", torch.float32)
    error, allowed = ((figures(*side) - truth).abs().amax(1) / truth.amax(1) for side in ((device, dtype), ("cpu", dtype)))
    floor = torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps
    assert (error <= 2 * allowed + floor).all(), (
        f"losses and gradient norms of a training step are off by {error.tolist()}, allowed {(2 * allowed + floor).tolist()}"
    )
