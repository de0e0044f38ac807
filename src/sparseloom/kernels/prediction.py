"""Prediction and selection by a compiled backend: what goes in and out, and which one runs.

A backend is a module with ``pack_weights``, ``encode``, ``top_keys`` and ``keys_above``:
``cpu/predict.py`` in C++ and ``triton/predict.py`` on GPUs.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int8, Int64
from torch import Tensor

_EXACT = 1 << 22  # integers that keep their order as fp32 numbers times any scale
# Package and widest codes by the type of device; a GPU holds rows of a tile in registers.
_BACKENDS: dict[str, tuple[str, int | None]] = {"cpu": ("cpu", None), "cuda": ("triton", 256)}


class Encoded(NamedTuple):
    """Codes of q̃ and k̃, and the scale of each row of q̃, with its 1/√width."""

    q: Int8[Tensor, "batch heads length width"]
    k: Int8[Tensor, "batch heads length width"]
    q_scale: Float[Tensor, "batch heads length 1"]
    scratch_bytes: int


class Rotation(NamedTuple):
    """The model's cos and sin at the positions, and which frequencies the predictor takes."""

    cos: Float[Tensor, "#batch length rotary_dim"]
    sin: Float[Tensor, "#batch length rotary_dim"]
    chosen: Int64[Tensor, " pairs"]


class Codes(NamedTuple):
    """Queries and keys of a call as codes of ``bits``; a score is q·k times both scales."""

    q: Int8[Tensor, "batch heads q_len width"]
    q_scale: Float[Tensor, "batch heads q_len 1"]
    k: Int8[Tensor, "batch heads kv_len width"]
    k_scale: Float[Tensor, " heads"]
    bits: int = 8


class Blocks(NamedTuple):
    """Which pairs compete, in which blocks, and what each query block has to keep
    (`methods/grid.py` has the meaning of the last three)."""

    block_size: tuple[int, int]
    is_causal: bool
    key_padding: Bool[Tensor, "#batch kv_len"] | None
    visible: Int64[Tensor, "#batch q_blocks"]
    budget: Int64[Tensor, "#batch q_blocks"]
    diagonal: Int64[Tensor, "q_blocks 2"]


def offsets_of(
    counts: Int64[Tensor, "batch heads rows"],
) -> Int64[Tensor, "batch heads rows_plus_1"]:
    """Absolute places of rows of these lengths, one after the other."""
    ends = counts.reshape(-1).cumsum(0).view(counts.shape)
    return torch.cat([ends[..., :1] - counts[..., :1], ends], -1)


def unsupported(bits: int, width: int, device: torch.device) -> str | None:
    """Why codes of `width` columns and `bits` cannot be predicted from on a device (None: they
    can)."""
    if device.type not in _BACKENDS:
        return f"tensors are on {device}, neither on the CPU nor on a GPU"
    name, _ = _BACKENDS[device.type]
    reason = importlib.import_module(f"sparseloom.kernels.{name}").unavailable()
    if reason is not None:
        return f"the {name} backend is missing: {reason}"
    if bits > 8:
        return "there are no codes to multiply: the predictor is not quantised"
    most = 2 ** (bits - 1) - 1
    if most * most * width >= _EXACT:
        return f"width must be below {_EXACT // (most * most) + 1} at {bits} bits, got {width}"
    widest = _BACKENDS[device.type][1]
    if widest is not None and width > widest:
        return f"width must be at most {widest} on a GPU, got {width}"
    if torch.compiler.is_compiling():
        return "torch.compile traces the call"
    return None


def backend(device: torch.device) -> ModuleType:
    """The module that predicts on a device of which ``unsupported`` says nothing."""
    return importlib.import_module(f"sparseloom.kernels.{_BACKENDS[device.type][0]}.predict")
