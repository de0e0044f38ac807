"""Sparse attention for Transformers: choose what to keep, run only that, and say what it costs.

The names below are loaded on first use, so that `import sparseloom` costs nothing and
`import sparseloom.hardware` never loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from sparseloom import hardware, kernels, methods, models, quantize, tasks, trace
    from sparseloom.errors import SparseloomError
    from sparseloom.integrations.huggingface import Sparsified, sparsify
    from sparseloom.integrations.record import record
    from sparseloom.kernels import attention, decode_attention
    from sparseloom.mask import SparseMask
    from sparseloom.methods import (
        H2O,
        AttentionGate,
        BigBird,
        BlockLocal,
        Dense,
        DynamicSparse,
        Elsa,
        Fixed,
        LightningIndexer,
        LinearAttention,
        Linformer,
        Longformer,
        Method,
        Oracle,
        Performer,
        Quest,
        RandomMask,
        Reformer,
        Sinkhorn,
        SlidingWindow,
        SnapKV,
        SpAtten,
        StaticSparse,
        StreamingLLM,
        Strided,
        Synthesizer,
        TileAligned,
        format_method,
        parse_method,
    )
    from sparseloom.trace import Trace
    from sparseloom.training import adapt, calibrate, load, save

__all__ = [
    "H2O",
    "AttentionGate",
    "BigBird",
    "BlockLocal",
    "Dense",
    "DynamicSparse",
    "Elsa",
    "Fixed",
    "LightningIndexer",
    "LinearAttention",
    "Linformer",
    "Longformer",
    "Method",
    "Oracle",
    "Performer",
    "Quest",
    "RandomMask",
    "Reformer",
    "Sinkhorn",
    "SlidingWindow",
    "SnapKV",
    "SpAtten",
    "SparseMask",
    "SparseloomError",
    "Sparsified",
    "StaticSparse",
    "StreamingLLM",
    "Strided",
    "Synthesizer",
    "TileAligned",
    "Trace",
    "adapt",
    "attention",
    "calibrate",
    "decode_attention",
    "format_method",
    "hardware",
    "kernels",
    "load",
    "methods",
    "models",
    "parse_method",
    "quantize",
    "record",
    "save",
    "sparsify",
    "tasks",
    "trace",
]

_HOMES = {
    "sparseloom.errors": ("SparseloomError",),
    "sparseloom.integrations.huggingface": ("Sparsified", "sparsify"),
    "sparseloom.integrations.record": ("record",),
    "sparseloom.kernels": ("attention", "decode_attention"),
    "sparseloom.mask": ("SparseMask",),
    "sparseloom.methods": (
        "AttentionGate",
        "BigBird",
        "BlockLocal",
        "Dense",
        "DynamicSparse",
        "Elsa",
        "Fixed",
        "H2O",
        "LightningIndexer",
        "LinearAttention",
        "Linformer",
        "Longformer",
        "Method",
        "Oracle",
        "Performer",
        "Quest",
        "RandomMask",
        "Reformer",
        "Sinkhorn",
        "SlidingWindow",
        "SnapKV",
        "StaticSparse",
        "StreamingLLM",
        "Strided",
        "Synthesizer",
        "SpAtten",
        "TileAligned",
        "format_method",
        "parse_method",
    ),
    "sparseloom.trace": ("Trace",),
    "sparseloom.training": ("adapt", "calibrate", "load", "save"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_MODULES = frozenset({"hardware", "kernels", "methods", "models", "quantize", "tasks", "trace"})


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(f"sparseloom.{name}")
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'sparseloom' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
