"""kloss trains many LoRA adapters on one frozen XLM-R in a single pass, to find out what makes it lose knowledge."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["attach", "use_adapters"]


def __getattr__(name: str) -> Any:
    """Import attach and use_adapters on first access: torch takes seconds, and a report does without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .models import attach

    return getattr(attach, name)
