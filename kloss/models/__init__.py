"""A hand-written XLM-R and the bank of adapters that learn on it."""

from .bank import AdapterBank
from .flat import FlatModel
from .xlmr import BASE, TINY, StepDropout, XLMRConfig, XLMRForTokenClassification

__all__ = [
    "BASE",
    "TINY",
    "AdapterBank",
    "FlatModel",
    "StepDropout",
    "XLMRConfig",
    "XLMRForTokenClassification",
]
