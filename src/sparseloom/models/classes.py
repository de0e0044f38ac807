"""The class of a saved model: one of transformers, or one of this package."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

from transformers import PreTrainedModel

_OWN = {"lra": ("sparseloom.models.lra", "LraForSequenceClassification")}
"""`model_type` of config.json → where its class is."""


def own_class(folder: Path) -> type[PreTrainedModel] | None:
    """The class of this package that the model in `folder` was saved from, or None."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    if kind not in _OWN:
        return None
    module, name = _OWN[kind]
    found: type[PreTrainedModel] = getattr(import_module(module), name)
    return found


def class_of(folder: Path) -> type[PreTrainedModel]:
    """The class that a saved model names.

    Raises:
        ValueError: it names none, or one that neither transformers nor this package has.
    """
    import transformers

    own = own_class(folder)
    if own is not None:
        return own
    names = transformers.AutoConfig.from_pretrained(folder).architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise ValueError(f"path: {folder} names no model class of transformers, got {names}")
    return found
