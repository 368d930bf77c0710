"""kloss trains many LoRA adapters on one frozen XLM-R in a single pass, to find out what makes it lose knowledge."""

__version__ = "0.1.0"
