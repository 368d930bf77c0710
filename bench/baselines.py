"""What the multi-adapter linear is measured against: torch's grouped_mm and peft, on the same data and the same work.

Same work: forward, and backward with gradients of x, A and B; dropout 0.1 of the adapters' input; weights in the compute
dtype. Each side is written as its users would at their best, not as autograd would by itself.
"""

from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .problems import DROPOUT, Problem, forward_only, together


class _GroupedMM(Function):
    """The LoRA products by F.grouped_mm beside the vendor's base product, with no pass that the products do not ask for:
    y and dx are added to in place, slices are views.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, scale, offsets, p, lora_a, *lora_b):
        dropped, keep = torch.native_dropout(x, p, True)
        s = F.grouped_mm(dropped, lora_a.transpose(1, 2), offs=offsets).mul_(scale)
        y = torch.addmm(bias, x, weight.t())
        for part, block, b in zip(y.chunk(len(lora_b), 1), s.chunk(len(lora_b), 1), lora_b, strict=True):
            part.add_(F.grouped_mm(block, b.transpose(1, 2), offs=offsets))
        ctx.save_for_backward(weight, scale, offsets, dropped, keep, s, lora_a, *lora_b)
        ctx.p = p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, scale, offsets, dropped, keep, s, lora_a, *lora_b = ctx.saved_tensors
        parts, blocks = dy.chunk(len(lora_b), 1), s.chunk(len(lora_b), 1)
        ds = [F.grouped_mm(part, b, offs=offsets) for part, b in zip(parts, lora_b, strict=True)]
        ds = (ds[0] if len(ds) == 1 else torch.cat(ds, 1)).mul_(scale)
        dx = torch.ops.aten.native_dropout_backward(F.grouped_mm(ds, lora_a, offs=offsets), keep, 1 / (1 - ctx.p))
        dx.addmm_(dy, weight)
        d_a = F.grouped_mm(ds.t(), dropped, offs=offsets)
        d_b = [F.grouped_mm(part.t(), block, offs=offsets) for part, block in zip(parts, blocks, strict=True)]
        return dx, *(None,) * 5, d_a, *d_b


def grouped_mm(one: Problem, p: float = DROPOUT) -> Callable[[], tuple[Tensor, ...]]:
    """Forward and backward of torch's composition: y and the gradients of x, A and the slices of B, which it keeps apart."""
    x, lora_a = (t.detach().requires_grad_() for t in (one.x, one.lora_a))
    lora_b = [block.detach().contiguous().requires_grad_() for block in one.lora_b.chunk(one.slices, 1)]
    offsets = one.segments.ends[:-1].to(torch.int32)
    scale = one.scaling.to(x.dtype)[one.segments.row_adapter.long()][:, None]

    def call():
        y = _GroupedMM.apply(x, one.weight, one.bias, scale, offsets, p, lora_a, *lora_b)
        return y, *torch.autograd.grad(y, (x, lora_a, *lora_b), one.dy)

    return call


class Peft:
    """One linear under peft with the problem's weights and adapters; a fused q, k, v is three linears on one input, as it is in
    the model that peft knows.
    """

    def __init__(self, one: Problem, p: float = DROPOUT):
        from peft import LoraConfig, inject_adapter_in_model

        self.one, self.groups, rank = one, one.lora_b.shape[0], one.lora_b.shape[2]
        self.names = [str(g) for g in range(self.groups)]
        model = torch.nn.ModuleList()
        for weight, bias in zip(one.weight.chunk(one.slices), one.bias.chunk(one.slices), strict=True):
            base = torch.nn.Linear(*weight.t().shape, device=one.x.device, dtype=one.x.dtype).requires_grad_(False)
            base.weight.copy_(weight)
            base.bias.copy_(bias)
            model.append(base)
        targets = [str(i) for i in range(one.slices)]
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=p, target_modules=targets)
        for name in self.names:
            inject_adapter_in_model(config, model, adapter_name=name)
        self.layers = list(model.to(one.x.dtype))
        with torch.no_grad():
            blocks = zip(one.lora_a.chunk(one.slices, 1), one.lora_b.chunk(one.slices, 1), strict=True)
            for layer, (a, b) in zip(self.layers, blocks, strict=True):
                for g, name in enumerate(self.names):
                    layer.lora_A[name].weight.copy_(a[g])
                    layer.lora_B[name].weight.copy_(b[g])
        # In the model q, k and v have gradients of their own, each contiguous.
        slices = [part.contiguous() for part in one.dy.chunk(one.slices, 1)]
        self.inputs = one.x.chunk(self.groups)
        self.gradients = list(zip(*(part.chunk(self.groups) for part in slices), strict=True))

    def adapter(self, g: int) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Adapter g's batch: the outputs, then the gradients of x, of every A and every B."""
        name = self.names[g]
        for layer in self.layers:
            layer.set_adapter(name)
        x = self.inputs[g].detach().requires_grad_()
        outputs = [layer(x) for layer in self.layers]
        weights = [getattr(layer, kind)[name].weight for kind in ("lora_A", "lora_B") for layer in self.layers]
        return outputs, torch.autograd.grad(outputs, (x, *weights), self.gradients[g])

    def in_turn(self) -> None:
        """Training, one adapter at a time."""
        for g in range(self.groups):
            self.adapter(g)

    @torch.no_grad()
    def mixed(self) -> list[Tensor]:
        """Inference of a batch that mixes all adapters."""
        x = self.one.x.view(self.groups, -1, self.one.x.shape[1])
        return [layer.eval()(x, adapter_names=self.names) for layer in self.layers]


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: the same kernels without what the host needs to launch them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


class Other(NamedTuple):
    """A baseline. name: short, for the targets. label: with its version. make: its call. ours: the call it is compared with."""

    name: str
    label: str
    make: Callable[[Problem], Callable[[], object]]
    ours: Callable[[Problem], Callable[[], object]]


def others() -> tuple[list[Other], list[Other]]:
    """Baselines that the targets name, and further ones; peft's only where peft and transformers are installed."""
    named = [Other("grouped_mm", f"torch {torch.__version__} grouped_mm", grouped_mm, together)]
    try:
        label = f"peft {metadata.version('peft')}"
        metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return named, []
    named.append(Other("peft in turn", f"{label} one adapter at a time", lambda one: Peft(one).in_turn, together))
    return named, [
        Other("peft captured", f"{label} one adapter at a time, CUDA graph", lambda one: captured(Peft(one).in_turn), together),
        Other("peft mixed", f"{label} mixed batch, inference", lambda one: Peft(one).mixed, forward_only),
    ]
