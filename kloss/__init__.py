"""kloss trains many LoRA adapters on one frozen XLM-R in a single pass, to find out what makes it lose knowledge."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models.attach import attach as attach
    from .models.attach import use_adapters as use_adapters
    from .models.losses import adapter_losses as adapter_losses

__version__ = "0.1.0"
__all__ = ["adapter_losses", "attach", "use_adapters"]
_MODULES = {"adapter_losses": "losses", "attach": "attach", "use_adapters": "attach"}


def __getattr__(name: str) -> Any:
    """Import what needs torch on first access: torch takes seconds, and a report does without it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".models.{_MODULES[name]}", __name__), name)
