"""Sizes that Triton takes."""

from __future__ import annotations


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least ``least`` (from 1)."""
    return 1 << (least - 1).bit_length()
