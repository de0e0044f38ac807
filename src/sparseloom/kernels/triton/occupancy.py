"""How many warps of a kernel fit on one multiprocessor at once.

Limits per compute capability: CUDA C++ Programming Guide 12.8, "Technical Specifications per
Compute Capability"; granularities: the occupancy calculator of Nsight Compute.
"""

from __future__ import annotations

import math
from typing import NamedTuple

_WARP = 32
_RESERVED_SHARED = 1024  # what the system takes of every block, from sm_80 on
_SHARED_UNIT = 128
_REGISTER_UNIT = 8  # registers per thread are given in eights, i.e. 256 per warp
_PARTITIONS = 4  # each holds a quarter of the registers, and whole warps


class Multiprocessor(NamedTuple):
    """What one multiprocessor holds. Shared memory in bytes."""

    registers: int
    warps: int
    blocks: int
    shared: int
    shared_per_block: int
    """Most that one block may have; it needs to be asked for beyond 48 KiB, which Triton does."""


MULTIPROCESSORS = {
    80: Multiprocessor(65536, 64, 32, 164 << 10, 163 << 10),
    90: Multiprocessor(65536, 64, 32, 228 << 10, 227 << 10),
}
"""By compute capability times ten: A100 and H100, H200."""


def multiprocessor(arch: int) -> Multiprocessor:
    """The limits of an architecture.

    Raises:
        ValueError: nothing is known of it.
    """
    if arch not in MULTIPROCESSORS:
        known = ", ".join(map(str, MULTIPROCESSORS))
        raise ValueError(f"arch must be one of {known} (compute capability times ten), got {arch}")
    return MULTIPROCESSORS[arch]


def warps_per_multiprocessor(arch: int, *, threads: int, registers: int, shared_bytes: int) -> int:
    """Warps that are resident at once, bounded by registers, shared memory, warps and blocks.

    Args:
        arch: compute capability times ten: 80 or 90.
        threads: of one block.
        registers: of one thread.
        shared_bytes: of one block, without what the system reserves.

    Returns:
        Resident warps, 0 where not even one block fits.
    """
    limits = multiprocessor(arch)
    if shared_bytes > limits.shared_per_block:
        return 0
    warps = math.ceil(threads / _WARP)
    per_thread = math.ceil(max(registers, 1) / _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = limits.registers // _PARTITIONS // (per_thread * _WARP) * _PARTITIONS // warps
    per_block = math.ceil((shared_bytes + _RESERVED_SHARED) / _SHARED_UNIT) * _SHARED_UNIT
    blocks = min(by_registers, limits.shared // per_block, limits.warps // warps, limits.blocks)
    return blocks * warps
