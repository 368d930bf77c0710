"""Many adapters on any model: its linear layers become multi-adapter ones, and each batch row names its adapter.

    kloss.attach(model, adapters=52, rank=32)
    with kloss.use_adapters(model, [3, 0, -1, 3]):  # an adapter per batch row; -1: the base model alone
        logits = model(input_ids, attention_mask=mask).logits

The adapters are ordinary parameters. An adapter without rows in a batch gets a gradient of zero, to which an ordinary optimiser
still applies momentum and weight decay; `kloss.optim.AdapterAdamW` leaves it as it is. A state dict holds weights, names, ranks,
scalings, seeds and the dropout's step, and one without them is refused. `kloss.adapters` adds, removes, copies, saves and loads.
"""

import copy
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from ..kernels import multi_lora_direct, multi_lora_linear
from ..kernels.dropout import draws, stream_keys
from .blocks import Arguments, Batch, RepeatedRows, Shared
from .peft_files import fitted, read_adapter, write_adapter
from .settings import check_names, whole_numbers
from .targets import find_targets, is_transposed, named, plain_modules, routed, time_first
from .traced import FIXED, key_of, rows_of, traced_arguments


class MultiAdapterLinear(nn.Module):
    """A linear layer with the LoRA update of each batch row's own adapter; outside `use_adapters` the linear itself.

    weight: [N, K], the linear's own, frozen; [K, N] of a Conv1D.
    bias: [N] or None, likewise.
    lora_a: [G, R, K], lora_b: [G, N, R], fp32 as in peft (fp64 on an fp64 base), rounded to the input's dtype where used. An
        adapter of rank r < R has r rows of A and r columns of B; zeros follow.
    A is uniform in ±1/√K, as in peft. Each number is a function of (seed, adapter, layer name, row, column) alone. B is zero.
    """

    weight: Tensor
    bias: Tensor | None

    batch_first: bool | None = None  # whether inputs are [B, length, ...]: what the model or earlier inputs say, if anything
    routed = False  # its inputs [n, K] are tokens that a router chose, by its place in the model or by their number

    def __init__(self, linear: nn.Module, shared: Shared, name: str, site: int):
        super().__init__()
        self.transposed = is_transposed(linear)
        weight: Tensor = linear.weight  # type: ignore[assignment]
        self.in_features, self.out_features = weight.shape if self.transposed else weight.shape[::-1]
        self.shared, self.name, self.site = shared, name, site
        self.plain = (_with_parameters(linear, None, None),)
        for parameter in ("weight", "bias"):
            self.register_parameter(parameter, linear._parameters[parameter])
        self.lora_a = nn.Parameter(self.drawn(range(len(shared.ranks))))
        self.lora_b = nn.Parameter(self.lora_a.new_zeros(len(shared.ranks), self.out_features, shared.rank))
        self.key = key_of(self)
        self.train(linear.training)

    def __setstate__(self, state: dict) -> None:
        """A copy is a layer of its own."""
        super().__setstate__(state)
        self.key = key_of(self)

    def drawn(self, adapters: Sequence[int]) -> Tensor:
        """A of some adapters as they begin: [n, R, K]."""
        shared, device = self.shared, self.weight.device
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        seeds, ranks = (torch.tensor([each[g] for g in adapters], device=device) for each in (shared.seeds, shared.ranks))
        name_hash = int.from_bytes(blake2b(self.name.encode(), digest_size=8).digest())
        row, column = (torch.arange(size, device=device) for size in (shared.rank, self.in_features))
        keys = stream_keys(seeds[:, None], row, name_hash)  # [n, R]
        a = draws(keys[..., None], column.int()).to(dtype) / (2**31 * math.sqrt(self.in_features))
        return torch.where((row < ranks[:, None])[..., None], a, 0.0)

    def get_extra_state(self) -> Tensor:
        """The adapters' settings, for a state dict."""
        return self.shared.packed()

    def set_extra_state(self, state: Tensor) -> None:
        """Take them over, for all layers of the model. Raises UserError inside `use_adapters`, and for others that do not fit."""
        self.shared.outside()
        self.shared.unpack(state, self.name)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        x: [B, ..., K], B the batch rows of `use_adapters`, in the weight's dtype; under autocast in any.
        Returns [B, ..., N].
        Raises ValueError, with the layer's name, for another first dimension or dtype. If all batch rows have one id, x may have
        any shape [..., K].
        """
        given = traced_arguments(x, self) if torch.compiler.is_compiling() else self.arguments(x, self.training)
        if given is not None and given.lists is not None:
            own: Any = self._parameters.get  # an attribute of a module takes six times as long
            weight, factors = own("weight"), (own("lora_a"), own("lora_b"))
            if multi_lora_direct.serves(x, weight, *factors):
                lists = given.lists if given.dropout is None else given.lists.dropping(given.dropout, given.segments)
                return multi_lora_direct.linear(x, weight, own("bias"), *factors, lists, transposed=self.transposed)
        weight, bias = self.weight.t() if self.transposed else self.weight, self.bias
        if given is None:
            return F.linear(x, weight, bias)
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{self.name}: the input is {x.dtype}, the weight {weight.dtype}; they must be of one dtype")
        segments, scaling, ranks, dropout, _ = given
        packed = x.reshape(-1, x.shape[-1])  # [T, K], a batch row's rows are neighbours
        adapters = self.lora_a, self.lora_b, scaling, segments
        y = multi_lora_linear(packed, weight, bias, *adapters, ranks=ranks, dropout=dropout)
        return y.view(*x.shape[:-1], self.out_features)

    def arguments(self, x: Tensor, training: bool) -> Arguments | None:
        """What the block's batch says of the rows of x, None for the base model. Errors as in `forward`."""
        batch = self.shared.blocks.batch(self.name, training)
        if batch is None:
            return None
        if torch._C._is_tracing():
            raise UserError(FIXED.format("torch.jit.trace"))
        self._check_layout(x, batch)
        given = batch.arguments(*rows_of(x), x.device, training)
        return given if given.dropout is None else given._replace(dropout=given.dropout._replace(site=self.site))

    def as_before(self, g: int | None) -> nn.Module:
        """The layer that this was made of, adapter g merged into its weight, or none."""
        weight: Tensor = self.weight
        if g is not None:
            update = self.lora_b[g] @ self.lora_a[g] * self.shared.scaling[g]  # [N, K]
            update = update.t() if self.transposed else update
            weight = nn.Parameter((weight.to(update.dtype) + update).to(weight.dtype), requires_grad=False)
        return _with_parameters(self.plain[0], weight, self.bias).train(self.training)

    def _check_layout(self, x: Tensor, batch: Batch) -> None:
        """Raises ValueError for a nested tensor, and where several adapters meet a first dimension that may not be the batch.

        Where the second dimension is as long as the batch too, `batch_first` decides, and the strides if nothing is known yet.
        """
        if x.is_nested:
            raise ValueError(
                f"{self.name}: the input is a nested tensor; pass enable_nested_tensor=False to nn.TransformerEncoder"
            )
        size, shape = len(batch.ids), x.shape
        first, second = len(shape) > 1 and shape[0] == size, len(shape) > 2 and shape[1] == size
        if first is not second and size > 1 and len(shape) > 2:
            if first:
                self.batch_first = True
            elif self.batch_first is None and shape[0] % size:  # a multiple may be a batch of beams
                self.batch_first = False
        if size > 1 and len(shape) == 2 and shape[0] % size:
            self.routed = True
        if batch.alike:
            return
        if not first:
            needed = f"[{size}, ..., {self.in_features}], a first dimension that is the batch of use_adapters"
            raise ValueError(f"{self.name}: the input has shape {list(shape)}, needed is {needed}; or one id for all rows")
        if second and not self.batch_first and (self.batch_first is False or x.stride(0) < x.stride(1)):
            why = "which may have time before batch, as another length would show"
        elif len(shape) == 2 and self.routed:
            why = "the tokens that a router chose"
        else:
            return
        raise ValueError(f"{self.name}: the input has shape {list(shape)}, {why}: use one id for all rows")


def _with_parameters(linear: nn.Module, weight: Tensor | None, bias: Tensor | None) -> nn.Module:
    """A copy of a linear with other parameters."""
    linear = copy.copy(linear)
    linear._parameters = {"weight": weight, "bias": bias}  # type: ignore[dict-item]
    return linear


def _is_called(module: nn.Module, args: tuple) -> None:
    """A hook that does nothing. torch's nn.TransformerEncoderLayer calls layers that have one, else it may take their weights."""


def attach(
    model: nn.Module,
    adapters: int | Sequence[str] = 52,
    rank: int | Sequence[int] = 32,
    targets: str | Sequence[str] = "all-linear",
    *,
    alpha: float | Sequence[float] | None = None,
    dropout: float | Sequence[float] = 0.0,
    seed: int = 0,
    dropout_seed: int | None = None,
) -> nn.Module:
    """Put LoRA adapters on a model, in place: the targets' linear layers become `MultiAdapterLinear`.

    These are nn.Linear, its subclasses that keep its forward, and transformers' Conv1D (GPT-2) and FalconLinear.

    adapters: G, or the name of each; without names they are called "0", "1" and so on.
    rank: one for all or one per adapter; the largest is R.
    targets: ends of layer names: ("query", "value") matches every name that is one of them or ends in "." and one of them.
        "all-linear" matches every linear layer except the output head. The head is `model.get_output_embeddings()` and what lies
        outside `model.base_model`, if the model has these. A warning names what is left out besides: linear layers that compute
        otherwise (quantised ones) or whose weights another module takes (torch's attention, Mamba), and experts in one tensor.
    alpha: LoRA's, one for all or one per adapter. None: the rank, so that the scaling alpha / rank is 1.
    dropout: of the adapters' inputs in training, in [0, 1), one for all or one per adapter.
    seed: of A. Adapter g does not depend on the number of adapters or on the other ranks.
    dropout_seed: of dropout; None: seed.
    Returns the model. Its other parameters, the head's too, stop requiring gradients. A copy.deepcopy has its own adapters.
    Raises UserError for a model that has adapters, kloss's or another library's, or is wrapped for several processes. Also for
    targets that match no linear layer or another module, for layers that may not be called, and for numbers out of range. Then
    nothing has changed.
    """
    if any(isinstance(module, MultiAdapterLinear) for module in model.modules()):
        raise UserError("the model has adapters already: attach once, with as many adapters as are needed")
    whole = isinstance(adapters, Integral) and not isinstance(adapters, bool) and int(adapters) >= 1
    names = [str(g) for g in range(adapters)] if whole else check_names(adapters)  # type: ignore[arg-type]
    seeds = seed, seed if dropout_seed is None else dropout_seed
    for name, number in zip(("seed", "dropout_seed"), seeds, strict=True):
        if not isinstance(number, Integral) or not -(1 << 63) <= number < 1 << 63:
            raise UserError(f"{name} must be a whole number in [-2^63, 2^63), got {number!r}")
    seeds = int(seeds[0]), int(seeds[1])
    ends = None if targets == "all-linear" else [targets] if isinstance(targets, str) else list(targets)
    linears, shared = find_targets(model, ends), Shared(names, rank, alpha, dropout, seeds, ends)
    layers = {linear: MultiAdapterLinear(linear, shared, name, i) for i, (name, linear) in enumerate(linears.items())}
    seldom_first, in_experts = time_first(model), routed(model)
    for linear, layer in layers.items():
        layer.batch_first, layer.routed = False if seldom_first else None, linear in in_experts
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for child in module.children():
                if child in layers:
                    layers[child].register_forward_pre_hook(_is_called)
    model.requires_grad_(False)
    for name, module in list(model.named_modules(remove_duplicate=False)):  # a layer may have several names
        if module in layers:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layers[module])
    repeats = RepeatedRows(shared.blocks)
    model.register_forward_pre_hook(repeats.before, with_kwargs=True)
    model.register_forward_hook(repeats.after, with_kwargs=True, always_call=True)
    return model


@contextmanager
def use_adapters(model: nn.Module, adapter_ids: Sequence[int | str] | Tensor, *, step: int | None = None) -> Iterator[list[int]]:
    """Within the block each batch row is computed with its own adapter. It gives the rows' adapters as numbers.

    adapter_ids: int [B] on any device, the adapter of each batch row, -1 for the base model alone; a list may hold names. If they
        differ, every adapted layer must get an input [B, ..., K]; if they are all alike, any input [..., K] will do.
    step: the dropout's, below 2^31. None: each block entered while model.training, but not within backward, takes the next,
        counted from 0 or from the last step given. Give it to resume a training run.
    Blocks may be nested, and each task of asyncio and each thread has its own. A generator must not yield inside one. Outside of
    all blocks a model is the base model; a new thread has to say so, by a block of ids -1, since it may have been started to see
    the block of another.
    Backward may run anywhere. Layers that gradient checkpointing computes again get the batch of their forward pass. A checkpoint
    lies in one block, or opens all of its blocks itself; of several with dropout in one checkpoint each wants its step. On a GPU
    reentrant checkpoints within checkpoints want backward inside a block, where it stays in this thread.
    `generate` may repeat rows, for beams or several sequences: its calls repeat the ids alike.
    What torch.compile makes of the model serves all blocks. torch.export and torch.jit.trace inside one are refused.
    The dropout mask of a row depends on (attach's dropout_seed, adapter, step, earlier batch rows of that adapter, position,
    layer, feature), never on neighbours.
    A layer tells the batch by its input's first dimension. [length, B, K] is refused, also at length B if the model, an earlier
    input or the strides tell of it, and so are B tokens that a router chose, if the model or an earlier number tells. Not seen:
    the first input of a module of your own, if it is contiguous and its first dimension is B by chance.
    Raises UserError for a model without adapters, for ids that are not adapters of it, in a thread that said nothing, and where
    blocks end out of order.
    """
    shared = adapted_layers(model)[0].shared
    adapters = len(shared.names)
    if isinstance(adapter_ids, list | tuple):
        adapter_ids = [shared.index(g) if isinstance(g, str) else g for g in adapter_ids]
    ids = whole_numbers(adapter_ids)
    if ids is None or not ids.numel() or int(ids.min()) < -1 or int(ids.max()) >= adapters:
        raise UserError(f"adapter_ids must be one whole number in [-1, {adapters}) for each batch row, got {adapter_ids}")
    given, step = step is not None, shared.step if step is None else step
    if not isinstance(step, Integral) or not 0 <= step < 1 << 31:
        raise UserError(f"step must be a whole number in [0, 2^31), got {step!r}")
    batch = Batch(shared, ids.tolist(), int(step), given=given)
    if model.training and batch.opened.task == -1:
        shared.step = int(step) + 1
    with shared.blocks.within(batch):
        yield batch.ids


def adapted_layers(model: nn.Module) -> list[MultiAdapterLinear]:
    """The adapted layers of a model. Raises UserError for one without adapters, and for several models with adapters."""
    layers = [module for module in model.modules() if isinstance(module, MultiAdapterLinear)]
    models = len({layer.shared for layer in layers})
    if models != 1:
        raise UserError(f"a model that kloss.attach was called on is needed, this one holds {models} of them")
    return layers


def whole_layers(model: nn.Module, *parts: str) -> list[MultiAdapterLinear]:
    """`adapted_layers`, whose adapters are about to be read or written. Raises UserError where they are sharded over processes.

    parts: names of tensors besides the adapters that are needed whole, too.
    """
    layers = adapted_layers(model)
    for layer in layers:
        for part in ("lora_a", "lora_b", *parts):
            tensor = getattr(layer, part)
            if hasattr(tensor, "device_mesh") or tensor.dim() < 2:  # FSDP of before has flat ones
                raise UserError(
                    f"{layer.name}.{part} is sharded over processes, and is needed whole; fully_shard leaves those out that it "
                    "gets as ignored_params, and torch.optim.AdamW trains sharded ones"
                )
    return layers


def _tensors(model: nn.Module, g: int, rank: int | None = None) -> dict[str, Tensor]:
    """Views of adapter g's A [rank, K] and B [N, rank] under peft's names. rank: None for the adapter's own.

    Backward sees it if they are written to after its forward pass.
    """
    layers, tensors = whole_layers(model), {}
    rank = layers[0].shared.ranks[g] if rank is None else rank
    for layer in layers:
        tensors[f"base_model.model.{layer.name}.lora_A.weight"] = layer.lora_a.detach()[g, :rank]
        tensors[f"base_model.model.{layer.name}.lora_B.weight"] = layer.lora_b.detach()[g, :, :rank]
    return tensors


def save_peft(model: nn.Module, folder: str | Path, g: int | str) -> None:
    """Write adapter g, a row or a name, as peft does: adapter_config.json and adapter_model.safetensors.

    model: the one given to `attach`.
    """
    layers = adapted_layers(model)
    shared, names = layers[0].shared, [layer.name for layer in layers]
    g = shared.index(g)
    ends = sorted({name.rpartition(".")[2] for name in names}) if shared.ends is None else shared.ends
    exact = named(plain_modules(model), ends) == set(names)
    write_adapter(
        folder,
        _tensors(model, g),
        rank=shared.ranks[g],
        alpha=shared.alphas[g],
        # Else a pattern: ends of names would match more layers.
        target_modules=ends if exact else "|".join(re.escape(name) for name in names),
        lora_dropout=float(shared.chances[g]),
    )


def load_peft(model: nn.Module, folder: str | Path, g: int | str, *, head: Literal["error", "ignore"] = "error") -> None:
    """Overwrite adapter g, a row or a name, with one that peft or `save_peft` wrote; its optimiser's state starts anew.

    head: what to do with modules that were saved whole (modules_to_save), for which attached adapters have no place. peft saves
        the head with every adapter of the tasks TOKEN_CLS and SEQ_CLS. "ignore" leaves the model's own as they are.
    Its dropout stays. Layers missing in the files get a zero update.
    Raises UserError inside `use_adapters`, for files that are missing, damaged or of another method, a rank above R, numbers that
    are not finite, or a tensor that no adapted layer has. Then nothing has changed.
    """
    read_peft(model, folder, g, head=head)()


def read_peft(
    model: nn.Module, folder: str | Path, g: int | str, *, head: Literal["error", "ignore"] = "error"
) -> Callable[[], None]:
    """The first half of `load_peft`, which changes nothing. Returns the other half, which cannot fail."""
    if head not in ("error", "ignore"):
        raise UserError(f"head must be 'error' or 'ignore', got {head!r}")
    shared = adapted_layers(model)[0].shared
    shared.outside()
    g = shared.index(g)
    adapter = read_adapter(folder, shared.rank)
    whole = [name for name in adapter.tensors if adapter.in_saved_whole(name)]
    if whole and head == "error":
        shape = tuple(adapter.tensors[whole[0]].shape)
        raise UserError(
            f"{folder}: {whole[0]} {shape} has no place in the adapted layers of this model, being of modules_to_save "
            f'({", ".join(adapter.saved_whole)}); head="ignore" loads the adapter without it'
        )
    views, tensors = _tensors(model, g, adapter.rank), {n: t for n, t in adapter.tensors.items() if n not in whole}
    ready = fitted(folder, tensors, views, "the adapted layers of this model")

    def write() -> None:
        for view in _tensors(model, g, shared.rank).values():
            view.zero_()
        for name, tensor in ready.items():
            views[name].copy_(tensor)
        shared.ranks[g], shared.alphas[g], shared.scaling[g] = adapter.rank, adapter.alpha, adapter.scaling
        shared.begin_anew(g)

    return write
