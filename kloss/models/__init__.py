"""A hand-written XLM-R, which BERT and RoBERTa fit too, and the bank of adapters that learn on it."""

from .architecture import BASE, TINY, XLMRConfig
from .bank import AdapterBank
from .flat import FlatModel
from .rows import Rows
from .xlmr import XLMRForTokenClassification

__all__ = [
    "BASE",
    "TINY",
    "AdapterBank",
    "FlatModel",
    "Rows",
    "XLMRConfig",
    "XLMRForTokenClassification",
]
