"""Which layers of a model can carry adapters, what they are called, and what is known of their inputs' layout."""

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


def find_targets(model: nn.Module, ends: Sequence[str] | None) -> dict[str, nn.Linear]:
    """The layers to adapt, by name. ends: of names; None: all-linear. Errors as in `attach`."""
    _refuse_adapters(model)
    modules = {name: module for name, module in plain_modules(model).items() if name}
    # Not subclasses: a quantised linear computes otherwise, nn.MultiheadAttention's is never called.
    linears = {name: module for name, module in modules.items() if type(module) is nn.Linear}
    allowed = f"all-linear, or ends of names such as {', '.join(sorted({name.rpartition('.')[2] for name in linears})) or '-'}"
    targets = "all-linear" if ends is None else ends
    if ends is None:
        model = plain_modules(model)[""]
        head = getattr(model, "get_output_embeddings", lambda: None)()
        body = set(getattr(model, "base_model", model).modules()) - {head}
        names = [name for name, module in linears.items() if module in body]
    else:
        hits = [named(modules, [end]) for end in ends]
        if not all(hits):
            raise UserError(f"targets {targets!r}: no layer's name is or ends in {ends[hits.index(set())]!r}; allowed: {allowed}")
        names = [name for name in modules if any(name in hit for hit in hits)]
    if not names:
        raise UserError(f"targets {targets!r} choose no nn.Linear of this model; allowed: {allowed}")
    parents = _parents(model)
    for name in names:
        module = modules[name]
        if name not in linears:
            raise UserError(f"{name} is a {type(module).__name__}, only nn.Linear can carry adapters; allowed: {allowed}")
        if "parametrizations" in name.split("."):
            raise UserError(f"{name} belongs to a parametrisation: call torch's remove_parametrizations first")
        if any(isinstance(parent, nn.TransformerEncoderLayer) for parent in parents[module]):
            raise UserError(f"{name}: torch's nn.TransformerEncoderLayer takes the weights of its linears and does not call them")
        if any(type(parent).__name__ == "OptimizedModule" for parent in parents[module]):
            raise UserError(f"{name} is compiled by itself, and would go on as it is: attach first, then compile")
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
            raise UserError(f"{name} has hooks or another forward, which would be lost: attach first, then add them")
    return {name: linears[name] for name in names}


def _parents(model: nn.Module) -> dict[nn.Module, list[nn.Module]]:
    """The modules that hold each module; a shared one is held by several."""
    parents: dict[nn.Module, list[nn.Module]] = {}
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
