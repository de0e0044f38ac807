"""The published sizes and training recipes of Long Range Arena, as data.

Source: the configuration files of github.com/google-research/long-range-arena
(`text_classification/configs/base_tc_config.py`, `matching/configs/base_match_config.py`,
`image/configs/cifar10/transformer_base.py`, `listops/configs/base_listops_config.py`) and their
`train.py`: flax Adam, β = (0.9, 0.98), ε = 1e-9, decoupled weight decay, no gradient clipping,
no augmentation.  For Text, Liu et al. (IEEE TC 2022) use 2000 bytes where the file says 1000.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from sparseloom.errors import unknown_name
from sparseloom.models.lra import LraConfig

Law = Literal["rsqrt", "cosine"]


@dataclass(frozen=True, slots=True)
class LraRecipe:
    """How a published model is trained.

    `peak_lr` is the largest rate of the law: for `"rsqrt"`, base · min(1, t/warmup) / √max(t,
    warmup), it is base / √warmup; for `"cosine"`, a linear rise, then ½(1 + cos π·progress).
    """

    steps: int
    batch_size: int
    peak_lr: float
    law: Law
    warmup_steps: int
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-9


_BASE_LR = 0.05

RECIPES = MappingProxyType(
    {
        "text": LraRecipe(20_000, 32, _BASE_LR / 8000**0.5, "rsqrt", 8000, 0.1),
        # ends inside its warm-up, at 3.5e-4
        "retrieval": LraRecipe(5_000, 32, _BASE_LR / 8000**0.5, "rsqrt", 8000, 0.1),
        "image": LraRecipe(175 * 200, 256, 5e-4, "cosine", 175, 0.0),
        "listops": LraRecipe(5_000, 32, _BASE_LR / 1000**0.5, "rsqrt", 1000, 0.1),
    }
)
"""The published recipe of each task."""

_BYTES = 257  # padding and 256 byte values
_SIZES: dict[str, dict[str, Any]] = {
    "text": {
        "vocab_size": _BYTES, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 1024, "num_labels": 2,
    },
    "retrieval": {
        "vocab_size": _BYTES, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 512, "num_labels": 2, "dual": True,
    },
    "image": {
        "vocab_size": 256, "hidden_size": 128, "qkv_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 8, "intermediate_size": 128, "num_labels": 10,
        "learned_positions": True, "hidden_dropout_prob": 0.3, "attention_probs_dropout_prob": 0.2,
    },
    "listops": {
        "vocab_size": 16, "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
        "intermediate_size": 2048, "num_labels": 10,
    },
}  # fmt: skip

LENGTHS = MappingProxyType({"text": 2000, "retrieval": 4000, "image": 1024, "listops": 2000})
"""Input lengths in tokens; Text as in Liu et al., the others as in the published files."""


def lra_config(task: str, *, length: int | None = None, **changes: Any) -> LraConfig:
    """The published model of a task: `"text"`, `"retrieval"`, `"image"` or `"listops"`.

    Args:
        task: its name, with or without `lra-`.
        length: input length in tokens, without [CLS]; default `LENGTHS`.
        **changes: any other setting of `LraConfig`, for a smaller model.

    Raises:
        ValueError: no such task, or sizes that do not fit.
    """
    name = task.removeprefix("lra-")
    if name not in _SIZES:
        raise unknown_name("task", task, _SIZES)
    size = LENGTHS[name] if length is None else length
    settings: dict[str, Any] = {**_SIZES[name], "max_position_embeddings": size + 1, **changes}
    return LraConfig(**settings)
