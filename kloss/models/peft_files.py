"""Write and read one LoRA adapter in peft's two files.

A file may hold nothing but plain LoRA. The tables below judge every field of peft's LoraConfig (0.21.2), each by what peft's
source does with it when an adapter is loaded. A setting that is in none of them, or that differs from its only allowed value,
is refused by name.
"""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..files import read_json, read_tensors, write_json, write_tensors
from .checkpoint import read_file
from .targets import WRAPPED

# Read, and obeyed or refused by value.
HONOURED = {"peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights", "modules_to_save"}

# Say nothing about the adapter's function.
_METADATA = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
_RUNTIME = {"runtime_config", "megatron_core"}
# Which layers; the names of the tensors say the same.
_LAYERS = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"}
# Dropout is of training, fan_in_fan_out of Conv1D's weight. merge_weights (of 2023) merged before evaluation. The group size
# is read with use_qalora alone, each of the configurations under its own initialisation alone.
_NO_EFFECT = {"lora_dropout", "fan_in_fan_out", "merge_weights", "qalora_group_size"}
_OF_AN_INIT = {"loftq_config", "eva_config", "corda_config", "lora_ga_config"}
HARMLESS = _METADATA | _RUNTIME | _LAYERS | _NO_EFFECT | _OF_AN_INIT

# Other functions than plain LoRA. layer_replication and kasa_config change the base, use_qalora what A reads, bias the base's.
DEFAULT_ONLY: dict[str, Any] = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "megatron_config": None,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
    "use_qalora": False,
    "monteclora_config": None,
    "velora_config": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "ensure_weight_tying": False,
}

# These initialisations leave the base model as it is; the others subtract the first adapter from it, or quantise it.
PLAIN_INITS = ("gaussian", "orthogonal", "eva", "mica")
CONVERTIBLE_INITS = ("pissa", "corda", "olora", "lora_ga")

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST_ALPHA = torch.finfo(torch.float32).max
SAFETENSORS, BIN, CONFIG = "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"


class Adapter(NamedTuple):
    """An adapter as its files give it.

    rank: r.
    alpha: LoRA's, such that the scaling is alpha / rank; a rank-stabilised adapter's is √rank times what the file says.
    scaling: of B A.
    tensors: by peft's names.
    saved_whole: names of the modules that were trained and saved whole (modules_to_save), the head as a rule.
    """

    rank: int
    alpha: float
    scaling: float
    tensors: dict[str, Tensor]
    saved_whole: tuple[str, ...]

    def in_saved_whole(self, name: str) -> bool:
        """Whether a tensor belongs to a module that was saved whole, and not to an adapter in one."""
        return ".lora_" not in name and any(f".{module}." in name for module in self.saved_whole)


def write_adapter(folder: str | Path, tensors: dict[str, Tensor], *, rank: int, alpha: float, **settings: object) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    tensors: under peft's names.
    alpha: LoRA's; a whole number is written as an integer.
    settings: other entries of peft's config, target_modules among them.
    """
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": int(rank),
        "lora_alpha": int(alpha) if float(alpha).is_integer() else float(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    copies = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    write_tensors(Path(folder) / SAFETENSORS, copies, {"format": "pt"})
    write_json(Path(folder) / CONFIG, config | settings)


def read_adapter(folder: str | Path, largest: int) -> Adapter:
    """Read a plain LoRA adapter; where there are both adapter_model.safetensors and .bin, the former counts, as in peft.

    Raises UserError for files that are missing or damaged, a rank above `largest`, or another method. The line names the
    setting; for a folder of several adapters it names their folders.
    """
    folder = Path(folder)
    if os.path.isdir(folder) and not os.path.exists(folder / CONFIG):
        several = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        if several:
            raise UserError(f"{folder} holds no {CONFIG}, but those of several adapters; give one: {', '.join(several)}")
    config = read_json(folder / CONFIG)
    kind, rank, alpha, stabilised = (config.get(key) for key in ("peft_type", "r", "lora_alpha", "use_rslora"))
    if kind != "LORA" or type(rank) is not int or not 1 <= rank <= largest:
        raise UserError(f"{folder}: a LORA adapter of rank 1 to {largest} is needed, got {kind!s:.60} {rank!s:.60}")
    _check_settings(folder, config)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) <= LARGEST_ALPHA:
        raise UserError(f"{folder}: lora_alpha must be a number that is finite in fp32, got {alpha!r:.60}")
    if not (stabilised is None or isinstance(stabilised, bool)):
        raise UserError(f"{folder}: use_rslora must be true or false, got {stabilised!r:.60}")
    saved_whole = config.get("modules_to_save") or ()
    saved_whole = (saved_whole,) if isinstance(saved_whole, str) else saved_whole
    if not isinstance(saved_whole, list | tuple) or not all(isinstance(module, str) for module in saved_whole):
        raise UserError(f"{folder}: modules_to_save must be a list of names, got {saved_whole!r:.60}")
    tensors = _read_weights(folder)
    a, b = ({name.replace(kind, "") for name in tensors if kind in name} for kind in (".lora_A", ".lora_B"))
    if a != b:
        raise UserError(f"{folder}: {min(a ^ b)} has only one of lora_A and lora_B")
    if not a:
        raise UserError(f"{folder}: the file of the weights holds no lora_A and lora_B")
    alpha, root = float(alpha), math.sqrt(rank)
    alpha, scaling = (alpha * root, alpha / root) if stabilised else (alpha, alpha / rank)
    return Adapter(rank, alpha, scaling, tensors, tuple(saved_whole))


def _check_settings(folder: Path, config: dict) -> None:
    """Raises UserError for a setting that makes the adapter another function than plain LoRA, or that nobody has judged."""
    for key, value in config.items():
        if key in DEFAULT_ONLY and value is not None and value != DEFAULT_ONLY[key]:
            raise UserError(f"{folder}: {key} is not supported, only plain LoRA with one rank and alpha; given {value!r:.60}")
        if value and not (key in HONOURED or key in HARMLESS or key in DEFAULT_ONLY):
            raise UserError(f"{folder}: {key:.60} is not supported, kloss does not know this setting; given {value!r:.60}")
    init = config.get("init_lora_weights")
    if init is None or isinstance(init, bool) or init in PLAIN_INITS:
        return
    message = f"{folder}: init_lora_weights {init!r:.60} is not supported"
    if isinstance(init, str) and init.lower().startswith(CONVERTIBLE_INITS):
        raise UserError(
            f"{message}: it changed the base model, which these files lack. peft makes plain LoRA of it: "
            "save_pretrained(folder, path_initial_model_for_weight_conversion=...)"
        )
    if init == "loftq":
        raise UserError(f"{message}: the adapter belongs to a quantised base model, which these files lack")
    raise UserError(f"{message}; allowed: true, false, {', '.join(PLAIN_INITS)}")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    if os.path.exists(folder / SAFETENSORS):
        return read_tensors(folder / SAFETENSORS)
    path = folder / BIN
    if not os.path.exists(path):
        raise UserError(f"{folder}: neither {SAFETENSORS} nor {BIN} is there, one must exist")
    tensors = read_file(path)
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{path} must hold tensors by name, got other things")
    return tensors


def fitted(folder: str | Path, tensors: dict[str, Tensor], views: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a file as the views they belong to want them, by the views' names. Nothing is written.

    tensors: by peft's names; what wrappers put in (torch.compile's _orig_mod, DDP's module) is left out.
    where: what lacks a place, for messages.
    Raises UserError for a tensor that has no view of its shape, that comes twice, is no strided float, or is not finite.
    """
    ready: dict[str, Tensor] = {}
    for given, tensor in tensors.items():
        name, shape = _unwrapped(given, views), tuple(tensor.shape)
        if name not in views or views[name].shape != tensor.shape:
            raise UserError(f"{folder}: {given} {shape} has no place in {where}")
        if name in ready:
            raise UserError(f"{folder}: {name} comes twice, once of them as {given}")
        if tensor.layout is not torch.strided or tensor.dtype not in FLOATS or tensor.device.type != "cpu":
            raise UserError(f"{folder}: {given} {shape} is {tensor.layout} {tensor.dtype}, a dense tensor of floats is needed")
        ready[name] = tensor.detach().to(views[name].dtype)
        if not ready[name].isfinite().all():
            raise UserError(f"{folder}: {given} {shape} has numbers that are not finite in {views[name].dtype}")
    return ready


def _unwrapped(name: str, known: Mapping[str, Tensor]) -> str:
    """A tensor's name without the parts that wrappers put in, unless the model has them itself."""
    if name not in known:
        name = ".".join(part for part in name.split(".") if part not in WRAPPED)
    if name not in known:
        name = re.sub(r"^(module\.)*base_model\.model\.(module\.)*", "base_model.model.", name)
    return name
