"""Which layers of a model can carry adapters, what they are called, and what is known of their inputs' layout."""

import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from ..errors import UserError

# Modules of other adapter libraries, by the beginning of their class's module: peft, AdapterHub's adapters, lycoris, loralib.
ADAPTER_LIBRARIES = ("peft.", "adapters.methods.", "lycoris.", "loralib.")
# The names of what torch.compile and torch's activation checkpointing wrap.
WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
# Wrappers that manage the parameters they found when they were made; those of adapters attached later they would not.
PARAMETER_WRAPPERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"}
# Models of transformers in which some linears get [length, batch, width].
TIME_FIRST = ("XLNet", "FSMT", "PretrainedFSMT", "Longformer", "LED")
# Layers of transformers that compute what nn.Linear does: one with its weight as [K, N], one that writes the product out.
CONV1D, FALCON = "transformers.pytorch_utils.Conv1D", "transformers.models.falcon.modeling_falcon.FalconLinear"
# Modules that take the weights of these linears and do not call them; Mamba's do so where they have kernels, on a GPU.
_MAMBA, _MAMBA2, _ATTENTION_MAP = ("x_proj", "dt_proj", "out_proj"), ("out_proj",), ("k_proj",)
READ_PAST = {
    "MultiheadAttention": ("out_proj",),
    "MambaMixer": _MAMBA,
    "FalconMambaMixer": _MAMBA,
    "JambaMambaMixer": ("dt_proj",),
    "BambaMixer": _MAMBA2,
    "FalconH1Mixer": _MAMBA2,
    "GraniteMoeHybridMambaLayer": _MAMBA2,
    "Mamba2Mixer": _MAMBA2,
    "NemotronHMamba2Mixer": _MAMBA2,
    "Zamba2MambaMixer": _MAMBA2,
    "WavLMAttention": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "DetrMHAttentionMap": _ATTENTION_MAP,
    "ConditionalDetrMHAttentionMap": _ATTENTION_MAP,
    "MaskFormerDetrMHAttentionMap": _ATTENTION_MAP,
    "DabDetrMHAttentionMap": ("k_linear",),
    "LongcatFlashTopkRouter": ("classifier",),
    "MobileBertLMPredictionHead": ("decoder", "dense"),
}


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """A model's modules by the names they have without wrappers: no torch.compile's _orig_mod, no nn.DataParallel's module.

    A wrapper and what it wraps have one name, which gives the latter.
    """
    modules = dict(model.named_modules())
    plain = {"": ""}
    for name in modules:
        if name:
            parent, _, leaf = name.rpartition(".")
            wraps = leaf in WRAPPED or leaf == "module" and isinstance(modules[parent], nn.DataParallel)
            plain[name] = plain[parent] if wraps else f"{plain[parent]}.{leaf}".lstrip(".")
    return {plain[name]: module for name, module in modules.items()}


def named(modules: Iterable[str], ends: Iterable[str]) -> set[str]:
    """The names that are one of `ends` or end in "." and one of them, which is what a list of peft's target_modules means."""
    return {name for name in modules if any(f".{name}".endswith(f".{end}") for end in ends)}


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b and no more: nn.Linear, a subclass that keeps its forward, or one of the two above."""
    kind = type(module)
    if kind is nn.Linear:
        return True
    known = kind.forward is nn.Linear.forward or _path(kind) in (CONV1D, FALCON)
    return known and {*module._parameters} == {"weight", "bias"} and not module._buffers and not module._modules


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear's weight is [K, N]."""
    return _path(type(module)) == CONV1D


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def find_targets(model: nn.Module, ends: Sequence[str] | None) -> dict[str, nn.Module]:
    """The layers to adapt, by name. ends: of names; None: all-linear, with a warning that names what it leaves out.

    Errors as in `attach`.
    """
    _refuse_adapters(model)
    modules = {name: module for name, module in plain_modules(model).items() if name}
    parents = _parents(model)
    unfit = {name: reason for name, module in modules.items() if (reason := _unfit(name, module, parents[module]))}
    linears = {name: module for name, module in modules.items() if is_linear(module) and name not in unfit}
    allowed = f"all-linear, or ends of names such as {', '.join(sorted({name.rpartition('.')[2] for name in linears})) or '-'}"
    targets, left_out = "all-linear" if ends is None else ends, ""
    if ends is None:
        model = plain_modules(model)[""]
        head = getattr(model, "get_output_embeddings", lambda: None)()
        body = set(getattr(model, "base_model", model).modules()) - {head}
        names = [name for name, module in linears.items() if module in body]
        left_out = _listed({name: reason for name, reason in unfit.items() if modules[name] in body})
    else:
        hits = [named(modules, [end]) for end in ends]
        if not all(hits):
            end = ends[hits.index(set())]
            raise UserError(f"targets {targets!r}: {_no_layer(model, end)}; allowed: {allowed}")
        names = [name for name in modules if any(name in hit for hit in hits)]
    if not names:
        raise UserError(f"targets {targets!r} choose no nn.Linear of this model: {left_out or 'it has none'}; allowed: {allowed}")
    for name in names:
        module = modules[name]
        if name in unfit:
            raise UserError(f"{name} {unfit[name]}; allowed: {allowed}")
        if name not in linears:
            raise UserError(f"{name} is a {type(module).__name__}, only nn.Linear can carry adapters; allowed: {allowed}")
        if "parametrizations" in name.split("."):
            raise UserError(f"{name} belongs to a parametrisation: call torch's remove_parametrizations first")
        if any(type(parent).__name__ == "OptimizedModule" for parent in parents[module]):
            raise UserError(f"{name} is compiled by itself, and would go on as it is: attach first, then compile")
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
            raise UserError(f"{name} has hooks or another forward, which would be lost: attach first, then add them")
    if left_out:
        warnings.warn(f"all-linear leaves these as they are: {left_out}", stacklevel=3)
    return {name: linears[name] for name in names}


def _unfit(name: str, module: nn.Module, parents: Sequence[nn.Module]) -> str | None:
    """Why a linear, or experts in one tensor, cannot carry adapters. None: nothing speaks against it, or it is something else."""
    leaf, kind = name.rpartition(".")[2], type(module)
    for holder in (kind for parent in parents for kind in type(parent).__mro__):
        if leaf in READ_PAST.get(holder.__name__, ()):
            return f"is in a {holder.__name__}, which takes its weight and may not call it"
    if isinstance(module, nn.Linear) and not is_linear(module):
        return f"is a {kind.__name__}, which computes in another way than nn.Linear"
    shape = next(([*p.shape] for p in module._parameters.values() if p is not None and p.dim() == 3), None)
    if shape and (leaf == "experts" or kind.__name__.endswith("Experts")):
        return f"is a {kind.__name__}, which holds its experts in one tensor {shape}"
    return None


def _listed(unfit: dict[str, str]) -> str:
    """Modules and why they are unfit, with one name for each reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in unfit.items():
        reasons.setdefault(reason, []).append(name)
    more = [f" (and {len(names) - 1} more)" if len(names) > 1 else "" for names in reasons.values()]
    return "; ".join(f"{names[0]}{more} {reason}" for (reason, names), more in zip(reasons.items(), more, strict=True))


def _no_layer(model: nn.Module, end: str) -> str:
    """What to say of an end that is no layer's."""
    parameters = dict(model.named_parameters())
    for name in sorted(named(parameters, [end])):
        holder = type(model.get_submodule(name.rpartition(".")[0])).__name__
        return f"{name} {[*parameters[name].shape]} is a parameter of a {holder}, only layers can carry adapters"
    return f"no layer's name is or ends in {end!r}"


def _parents(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The modules that hold each module; a shared one is held by several."""
    parents: dict[nn.Module, list[nn.Module]] = {model: []}
    for module in model.modules():
        for child in module.children():
            parents.setdefault(child, []).append(module)
    return parents


def _refuse_adapters(model: nn.Module) -> None:
    """Raises UserError for a model with adapters of another library, and for one whose wrapper would not know ours."""
    for name, module in model.named_modules():
        classes = type(module).__mro__
        sources = [f"{kind.__module__}." for kind in classes]
        library = next((source.partition(".")[0] for source in sources if source.startswith(ADAPTER_LIBRARIES)), None)
        parts = {part.lower() for part in (*module._parameters, *module._modules)}
        if library or {"lora_a", "lora_b"} <= parts or {"lora_down", "lora_up"} <= parts:
            whose = f"{library} adapters" if library else "LoRA adapters of its own"
            raise UserError(
                f"the model has {whose} ({name or 'itself'}: {type(module).__name__}); "
                "merge them and take them off first (peft: merge_and_unload), then attach"
            )
        if wrapper := PARAMETER_WRAPPERS & {kind.__name__ for kind in classes}:
            raise UserError(f"{name or 'the model'} is in a {wrapper.pop()}, which would not see the adapters: attach first")


def time_first(model: nn.Module) -> str | None:
    """The class of the first module by which linears of the model may get [length, batch, ...]; None: nothing says so."""
    for module in model.modules():
        kind = type(module)
        known = kind.__module__.startswith("transformers.") and kind.__name__.startswith(TIME_FIRST)
        if known or getattr(module, "batch_first", True) is False:
            return kind.__name__
    return None


def routed(model: nn.Module) -> set[nn.Module]:
    """The modules within experts that a router sends single tokens to: those beneath `experts` beside a `router` or `gate`."""
    return {
        module
        for block in model.modules()
        if {"router", "gate"} & block._modules.keys() and (experts := block._modules.get("experts")) is not None
        for module in experts.modules()
    }
