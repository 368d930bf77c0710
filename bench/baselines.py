"""What the multi-adapter linear is measured against: torch, its grouped_mm, peft and AdapterHub, on the same data and work.

Same work: forward, and backward with gradients of x, A and B; dropout of the adapters' input; weights in the compute dtype.
Each side is written as its users would at their best, not as autograd would by itself.
"""

import math
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from . import timing
from .cases import DROPOUT, Problem, forward_backward, forward_only


class _GroupedMM(Function):
    """LoRA products by F.grouped_mm beside the vendor's base product. y and dx are accumulated in place, slices are views."""

    @staticmethod
    def forward(ctx, x, weight, bias, scaling, offsets, p, lora_a, *lora_b):
        dropped, keep = torch.native_dropout(x, p, True)
        s = F.grouped_mm(dropped, lora_a.transpose(1, 2), offs=offsets).mul_(scaling)
        y = torch.addmm(bias, x, weight.t())
        for y_slice, s_slice, b in zip(y.chunk(len(lora_b), 1), s.chunk(len(lora_b), 1), lora_b, strict=True):
            y_slice.add_(F.grouped_mm(s_slice, b.transpose(1, 2), offs=offsets))
        ctx.save_for_backward(weight, scaling, offsets, dropped, keep, s, lora_a, *lora_b)
        ctx.p = p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        weight, scaling, offsets, dropped, keep, s, lora_a, *lora_b = ctx.saved_tensors
        dy_slices, s_slices = dy.chunk(len(lora_b), 1), s.chunk(len(lora_b), 1)
        ds = [F.grouped_mm(dy_slice, b, offs=offsets) for dy_slice, b in zip(dy_slices, lora_b, strict=True)]
        ds = (ds[0] if len(ds) == 1 else torch.cat(ds, 1)).mul_(scaling)
        dx = torch.ops.aten.native_dropout_backward(F.grouped_mm(ds, lora_a, offs=offsets), keep, 1 / (1 - ctx.p))
        dx.addmm_(dy, weight)
        d_a = F.grouped_mm(ds.t(), dropped, offs=offsets)
        d_b = [F.grouped_mm(dy_slice.t(), s_slice, offs=offsets) for dy_slice, s_slice in zip(dy_slices, s_slices, strict=True)]
        return dx, *(None,) * 5, d_a, *d_b


def grouped_mm(problem: Problem, p: float = DROPOUT) -> Callable[[], tuple[Tensor, ...]]:
    """A call of torch's composition that returns y and the gradients of x, A and each slice of B."""
    x, lora_a = (t.detach().requires_grad_() for t in (problem.x, problem.lora_a))
    lora_b = [b.detach().contiguous().requires_grad_() for b in problem.lora_b.chunk(problem.slices, 1)]
    offsets = problem.segments.ends[:-1].to(torch.int32)
    scaling = problem.scaling.to(x.dtype)[problem.segments.row_adapter.long()][:, None]

    def call():
        y = _GroupedMM.apply(x, problem.weight, problem.bias, scaling, offsets, p, lora_a, *lora_b)
        return y, *torch.autograd.grad(y, (x, lora_a, *lora_b), problem.dy)

    return call


def torch_loop(problem: Problem) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[], Tensor]]:
    """One base product for all rows, and the LoRA products in a loop under autograd: forward and backward, and inference."""
    x, lora_a, lora_b = leaves = [t.detach().requires_grad_() for t in (problem.x, problem.lora_a, problem.lora_b)]
    counts, slices, p = problem.counts, problem.slices, DROPOUT if problem.dropout else 0.0

    def forward(p: float = 0.0) -> Tensor:
        updates = []
        for x_g, a, b, scaling in zip(x.split(counts), lora_a.unbind(), lora_b.unbind(), problem.scaling, strict=True):
            s = (F.dropout(x_g, p) @ a.t() * scaling).chunk(slices, 1)
            updates.append(torch.cat([s_i @ b_i.t() for s_i, b_i in zip(s, b.chunk(slices), strict=True)], 1))
        return F.linear(x, problem.weight, problem.bias) + torch.cat(updates)

    def both() -> tuple[Tensor, ...]:
        y = forward(p)
        return y, *torch.autograd.grad(y, leaves, problem.dy)

    return both, torch.no_grad()(forward)


class PeftLinear:
    """One linear under peft with the problem's weights and adapters.

    A fused q, k, v is three linears on one input, as in the model that peft knows.
    """

    def __init__(self, problem: Problem, p: float = DROPOUT, *, switched: bool = True):
        """switched: by peft's `set_adapter`; else an adapter's name is put in its place, and all adapters are trainable."""
        from peft import LoraConfig, inject_adapter_in_model

        self.problem, slices, (adapters, _, rank) = problem, problem.slices, problem.lora_b.shape
        self.names = [str(g) for g in range(adapters)]
        model = torch.nn.ModuleList()
        for weight, bias in zip(problem.weight.chunk(slices), problem.bias.chunk(slices), strict=True):
            base = torch.nn.Linear(*weight.t().shape, device=weight.device, dtype=weight.dtype).requires_grad_(False)
            base.weight.copy_(weight)
            base.bias.copy_(bias)
            model.append(base)
        targets = [str(i) for i in range(slices)]
        config = LoraConfig(r=rank, lora_alpha=rank, lora_dropout=p, target_modules=targets)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            for name in self.names:
                inject_adapter_in_model(config, model, adapter_name=name)
        self.layers, self.switched = list(model.to(problem.x.dtype)), switched
        for layer in [] if switched else self.layers:
            layer.requires_grad_(True).base_layer.requires_grad_(False)
        with torch.no_grad():
            factors = zip(problem.lora_a.chunk(slices, 1), problem.lora_b.chunk(slices, 1), strict=True)
            for layer, (a, b) in zip(self.layers, factors, strict=True):
                for g, name in enumerate(self.names):
                    layer.lora_A[name].weight.copy_(a[g])
                    layer.lora_B[name].weight.copy_(b[g])
        # In the model q, k and v have gradients of their own, each contiguous.
        dy_slices = [dy.contiguous() for dy in problem.dy.chunk(slices, 1)]
        counts = problem.counts
        self.inputs = problem.x.split(counts)
        self.gradients = list(zip(*(dy.split(counts) for dy in dy_slices), strict=True))
        # A mixed batch names the adapter of each batch row, and takes the longer the more there are: these are as few as can be.
        length = math.gcd(*counts)
        self.batch_rows = [name for name, n in zip(self.names, counts, strict=True) for _ in range(n // length)]
        self.mixed_input = problem.x.unflatten(0, (-1, length))
        self.mixed_gradients = [dy.unflatten(0, (-1, length)) for dy in dy_slices]

    def outputs(self, g: int, x: Tensor) -> list[Tensor]:
        """The outputs of adapter g, for each slice."""
        for layer in self.layers:
            if self.switched:
                layer.set_adapter(self.names[g])
            else:
                layer._active_adapter = [self.names[g]]
        return [layer(x) for layer in self.layers]

    def adapter(self, g: int) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """The outputs of adapter g's batch, and the gradients of x, of every A and every B."""
        name, x = self.names[g], self.inputs[g].detach().requires_grad_()
        outputs = self.outputs(g, x)
        weights = [getattr(layer, factor)[name].weight for factor in ("lora_A", "lora_B") for layer in self.layers]
        return outputs, torch.autograd.grad(outputs, (x, *weights), self.gradients[g])

    def in_turn(self) -> None:
        """Forward and backward of one adapter at a time."""
        for g in range(len(self.names)):
            self.adapter(g)

    def in_turn_results(self) -> tuple[Tensor, ...]:
        """y, dx, dA and dB as kloss returns them."""
        slices = self.problem.slices
        outputs, gradients = zip(*(self.adapter(g) for g in range(len(self.names))), strict=True)
        dx, *weights = zip(*gradients, strict=True)
        weights = [torch.stack(tensors) for tensors in weights]
        y = torch.cat([torch.cat(tensors, 1) for tensors in outputs])
        return y, torch.cat(dx), torch.cat(weights[:slices], 1), torch.cat(weights[slices:], 1)

    @torch.no_grad()
    def mixed(self) -> list[Tensor]:
        """Inference of a batch that mixes all adapters."""
        return [layer.eval()(self.mixed_input, adapter_names=self.batch_rows) for layer in self.layers]

    def mixed_training(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        """Forward and backward of a batch that mixes all adapters: outputs, and the gradients of x, of every A and every B.

        peft refuses it in training mode; that of its layers is off, while their dropout's stays.
        """
        x, outputs = self.mixed_input.detach().requires_grad_(), []
        for layer in self.layers:
            layer.training = False
            outputs.append(layer(x, adapter_names=self.batch_rows))
        weights = [getattr(layer, f)[name].weight for f in ("lora_A", "lora_B") for layer in self.layers for name in self.names]
        return outputs, torch.autograd.grad(outputs, (x, *weights), self.mixed_gradients)

    def mixed_results(self) -> tuple[Tensor, ...]:
        """y, dx, dA and dB as kloss returns them, of `mixed_training`."""
        outputs, (dx, *weights) = self.mixed_training()
        slices, adapters = self.problem.slices, len(self.names)
        each = [torch.stack(weights[i : i + adapters]) for i in range(0, len(weights), adapters)]
        y = torch.cat([output.flatten(0, 1) for output in outputs], 1)
        return y, dx.flatten(0, 1), torch.cat(each[:slices], 1), torch.cat(each[slices:], 1)

    def mixed_compiled(self) -> Callable[[], list[Tensor]]:
        """`mixed` by torch.compile for these adapters and this shape. Raises AssertionError if it computes other numbers."""
        layers = [torch.compile(layer.eval(), dynamic=False) for layer in self.layers]

        @torch.no_grad()
        def call() -> list[Tensor]:
            return [layer(self.mixed_input, adapter_names=self.batch_rows) for layer in layers]

        for compiled, eager in zip(call(), self.mixed(), strict=True):
            off, size = (x.double().norm() for x in (compiled - eager, eager))  # norm-wise: 16 bits round elsewhere in one pass
            assert off <= 4 * torch.finfo(eager.dtype).eps * size, f"compiled, it is off by {off / size:.1e}"
        return call


class HubLinear:
    """One linear under AdapterHub's adapters with the problem's weights: its mixed batch, by BatchSplit."""

    def __init__(self, problem: Problem, p: float = DROPOUT):
        from adapters import BatchSplit, LoRAConfig
        from adapters.configuration import ModelAdaptersConfig
        from adapters.methods.lora import LoRALinear
        from transformers import PretrainedConfig

        assert problem.slices == 1
        (adapters, rank, k), n, weight = problem.lora_a.shape, problem.lora_b.shape[1], problem.weight
        base = torch.nn.Linear(k, n, device=weight.device, dtype=weight.dtype).requires_grad_(False)
        base.weight.copy_(weight)
        base.bias.copy_(problem.bias)
        config, names = ModelAdaptersConfig(), [f"adapter{g}" for g in range(adapters)]
        layer = LoRALinear.wrap(base, "output", PretrainedConfig(), config)
        with torch.no_grad():
            for name, a, b in zip(names, problem.lora_a, problem.lora_b, strict=True):
                config.add(name, LoRAConfig(r=rank, alpha=rank, dropout=p, output_lora=True))
                layer.add_adapter(name, 0)
                layer.loras[name].lora_A.copy_(a)
                layer.loras[name].lora_B.copy_(b)
        config.active_setup = BatchSplit(*names, batch_sizes=problem.counts)
        self.problem, self.layer = problem, layer.to(weight.dtype).train()
        self.weights = [getattr(layer.loras[name], factor) for factor in ("lora_A", "lora_B") for name in names]

    def training(self) -> tuple[Tensor, ...]:
        """Forward and backward: y, and the gradients of x, of every A and every B."""
        x = self.problem.x.detach().requires_grad_()
        y = self.layer(x)
        return y, *torch.autograd.grad(y, (x, *self.weights), self.problem.dy)

    def results(self) -> tuple[Tensor, ...]:
        """y, dx, dA and dB as kloss returns them, of `training`."""
        y, dx, *weights = self.training()
        half = len(weights) // 2
        return y, dx, torch.stack(weights[:half]), torch.stack(weights[half:])

    @torch.no_grad()
    def inference(self) -> Tensor:
        return self.layer.eval()(self.problem.x)


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a CUDA graph: the same kernels without the host's time for launches."""
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


class Baseline(NamedTuple):
    """A library. name: as in the targets. label: with its version. make: its call. ours: the call it is compared with."""

    name: str
    label: str
    make: Callable[[Problem], Callable[[], object]]
    ours: Callable[[Problem], Callable[[], object]]


def baselines() -> tuple[list[Baseline], list[Baseline]]:
    """Baselines that the targets name, and further ones; peft's only where peft and transformers are installed."""
    named = [Baseline("grouped_mm", f"torch {torch.__version__} grouped_mm", grouped_mm, forward_backward)]
    peft, transformers = timing.versions(("peft", "transformers")).values()
    if not (peft and transformers):
        return named, []
    label = f"peft {peft} one adapter at a time"
    named.append(Baseline("peft in turn", label, lambda problem: PeftLinear(problem).in_turn, forward_backward))
    return named, [
        Baseline(
            "peft captured", f"{label}, CUDA graph", lambda problem: captured(PeftLinear(problem).in_turn), forward_backward
        ),
        Baseline("peft mixed", f"peft {peft} mixed batch, inference", lambda problem: PeftLinear(problem).mixed, forward_only),
    ]
