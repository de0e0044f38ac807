"""In which arithmetic the tensor cores multiply codes: int8, or fp8 where it gives the same."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from sparseloom.errors import unknown_name

ARITHMETICS = ("int8", "fp8")
FP8_BITS = 4
"""Widest codes that fp8 (e4m3) holds exactly: its significand has four bits."""
FP8_DEPTH = 128
"""Products that Hopper's fp8 units may sum before the sum moves on to fp32.  Inside, they keep
about 14 bits; 128 products of two 4-bit codes stay below 2**13."""

_chosen = "int8"


def chosen() -> str:
    """The arithmetic in use."""
    return _chosen


@contextmanager
def use_arithmetic(name: str) -> Generator[None]:
    """Multiply codes in ``name`` inside the block, on all threads; the codes are the same.

    Raises:
        ValueError: there is no such arithmetic.
    """
    global _chosen
    if name not in ARITHMETICS:
        raise unknown_name("arithmetic", name, ARITHMETICS)
    before, _chosen = _chosen, name
    try:
        yield
    finally:
        _chosen = before


def check(bits: int, device: torch.device) -> None:
    """Refuse what the arithmetic in use cannot multiply.

    Raises:
        NotImplementedError: fp8 on a GPU that is not of compute capability 9, or for codes that
            it does not hold exactly.
    """
    if _chosen == "int8":
        return
    if bits > FP8_BITS:
        raise NotImplementedError(
            f"arithmetic 'fp8' takes codes of up to {FP8_BITS} bits, which it holds exactly, "
            f"got {bits} bits"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device)[0] != 9:
        major, minor = torch.cuda.get_device_capability(device)
        raise NotImplementedError(
            f"arithmetic 'fp8' needs a GPU of compute capability 9 (Hopper), "
            f"got {major}.{minor}: 'int8' runs on it"
        )


def code_dtype() -> torch.dtype:
    """How codes are given to the tensor cores."""
    return torch.int8 if _chosen == "int8" else torch.float8_e4m3fn
