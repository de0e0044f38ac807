"""Hugging Face transformers: attach a method to a model, describe it, record what it does."""

from sparseloom.integrations.call import Observer
from sparseloom.integrations.describe import describe, method_shape
from sparseloom.integrations.huggingface import Sparsified, sparsify
from sparseloom.integrations.record import record
from sparseloom.integrations.stats import LayerStats
from sparseloom.methods.attender import in_recomputation

__all__ = [
    "LayerStats",
    "Observer",
    "Sparsified",
    "describe",
    "in_recomputation",
    "method_shape",
    "record",
    "sparsify",
]
