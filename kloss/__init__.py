"""kloss trains many LoRA adapters on one frozen XLM-R in a single pass, to find out what makes it lose knowledge."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import adapters as adapters
    from . import optim as optim
    from .models.attach import attach as attach
    from .models.attach import use_adapters as use_adapters
    from .models.losses import adapter_losses as adapter_losses

__version__ = "0.1.0"
__all__ = ["adapter_losses", "adapters", "attach", "optim", "use_adapters"]
_OF_MODULES = {"adapter_losses": ".models.losses", "attach": ".models.attach", "use_adapters": ".models.attach"}


def __getattr__(name: str) -> Any:
    """Import what needs torch on first access: torch takes seconds, and a report does without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_OF_MODULES.get(name, f".{name}"), __name__)
    return getattr(module, name) if name in _OF_MODULES else module
