"""A hand-written XLM-R and the bank of adapters that learn on it."""

from .bank import AdapterBank
from .flat import FlatModel
from .rows import Rows
from .xlmr import BASE, TINY, XLMRConfig, XLMRForTokenClassification

__all__ = [
    "BASE",
    "TINY",
    "AdapterBank",
    "FlatModel",
    "Rows",
    "XLMRConfig",
    "XLMRForTokenClassification",
]
