"""The shipped language model: a byte-level Llama of at most 3 M parameters, context 2048.

It learned the source of the Python standard library (`training/pretrain.py`; recipe and curve lie
beside the weights).  Stored in 16 bits, computed in 32 unless asked otherwise.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch

from sparseloom.models.base import LoadedModel


def stdlib_lm_folder() -> Path:
    """The folder of the shipped weights.

    Raises FileNotFoundError when the installation lacks them.
    """
    folder = Path(str(resources.files("sparseloom.models").joinpath("stdlib_lm")))
    if not (folder / "config.json").exists() or not (folder / "model.safetensors").exists():
        raise FileNotFoundError(
            f"the built-in model's weights are missing from {folder}: install sparseloom from a "
            "wheel or a full checkout, or train them with `python -m sparseloom.training.pretrain`"
        )
    return folder


def load_stdlib_lm(dtype: torch.dtype) -> LoadedModel:
    """The shipped model in `dtype`, without a tokenizer: its tokens are bytes."""
    from sparseloom.models.load import from_huggingface

    return from_huggingface(str(stdlib_lm_folder()), head="causal", dtype=dtype, name="stdlib")
