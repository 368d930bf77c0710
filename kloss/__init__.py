"""kloss trains many LoRA adapters on one frozen XLM-R in a single pass, to find out what makes it lose knowledge."""

__version__ = "0.1.0"
__all__ = ["attach", "use_adapters"]


def __getattr__(name: str):
    """attach and use_adapters, imported when first asked for: torch takes seconds, and a report does without."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .models import attach

    return getattr(attach, name)
