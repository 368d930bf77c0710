"""Write and read one LoRA adapter in peft's two files."""

import math
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..files import read_json, read_tensors, write_json, write_tensors

# Settings of peft that are not plain LoRA.
ALTERED = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias", "alora_invocation_tokens")


def write_adapter(folder: str | Path, tensors: dict[str, Tensor], *, rank: int, scaling: float, **settings: object) -> None:
    """Write adapter_config.json and adapter_model.safetensors.

    tensors: under peft's names.
    settings: other entries of peft's config, target_modules among them.
    """
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "r": rank,
        "lora_alpha": scaling * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    copies = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    write_tensors(Path(folder) / "adapter_model.safetensors", copies, {"format": "pt"})
    write_json(Path(folder) / "adapter_config.json", config | settings)


def read_adapter(folder: str | Path, largest: int) -> tuple[int, float, dict[str, Tensor]]:
    """Rank, scaling and tensors (under peft's names) of a plain LoRA adapter.

    Raises UserError for files that are missing or damaged, a rank above `largest`, or another method.
    """
    config = read_json(Path(folder) / "adapter_config.json")
    tensors = read_tensors(Path(folder) / "adapter_model.safetensors")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or not isinstance(rank, int) or not 1 <= rank <= largest:
        raise UserError(f"{folder}: a LORA adapter of rank 1 to {largest} is needed, got {config.get('peft_type')} {rank}")
    if changed := [key for key in ALTERED if config.get(key)]:
        raise UserError(f"{folder}: {changed[0]} is not supported, only plain LoRA with one rank and alpha")
    if not isinstance(alpha, int | float):
        raise UserError(f"{folder}: lora_alpha must be a number, got {alpha!r}")
    a, b = ({name.replace(kind, "") for name in tensors if kind in name} for kind in (".lora_A", ".lora_B"))
    if a != b:
        raise UserError(f"{folder}: {min(a ^ b)} has only one of lora_A and lora_B")
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), tensors
