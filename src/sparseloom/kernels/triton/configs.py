"""Tile sizes, warps and pipeline stages of the Triton kernels, and why.

A gathered bf16 row of head_dim 128 is 256 contiguous bytes: eight full sectors, so gathering
wastes nothing. What limits is the intensity. A tile of 64 keys costs 32 KB of reads, from L2 at
about 27 B per cycle and multiprocessor on an H100: 1200 cycles. 64 rows do 4.2 MFLOP with it,
about 500 cycles of the tensor cores and as many of the exponentials; 128 rows halve the reads per
product, 16 rows (8 used, at (8, 1)) are bound by reads alone. Hence:

- rows are packed from heads that share keys and mask until they fill 64, and 128 are taken whole;
- below 64 rows the keys take the M side (64 at least for wgmma) and the rows are a narrow N,
  padded to 16, the least that all supported versions pipeline;
- 64 keys a tile, and as many stages as leave room for two programs on a multiprocessor of sm_90
  (115712 bytes each): one waits for rows while the other computes. Indices and rows are a chain
  of two loads, so five stages keep two tiles in flight, three stages one;
- four warps for up to 64 rows and eight for 128 or for 256 dims keep every loop free of spills;
- fp32 is computed exactly, by FMA and not by tensor cores: 16 x 16 tiles are what fits registers.

Long rows first, not split over keys: a row costs about a microsecond per tile, so the longest
one ends in time when it starts first, and no second kernel has to merge partial sums.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

SHARED_BYTES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
"""KiB of shared memory that one program can have, by compute capability."""
NARROW = 16
"""The least rows of a tile."""
KEYS = 64
"""Keys of a tile, where they are not too wide for it."""


@dataclass(frozen=True)
class Tiles:
    """How one kernel cuts its work.

    ``pack`` heads with ``tile_q`` positions each make ``rows`` lanes (a power of two), which meet
    ``tile_k`` keys at a time.
    """

    tile_q: int
    tile_k: int
    pack: int
    rows: int
    warps: int
    stages: int

    @property
    def keys_on_m(self) -> bool:
        """Whether the keys take the M side of the tensor-core products."""
        return self.rows < 64


def width(dim: int) -> int:
    """The power of two to which a dimension is padded, at least 16."""
    return max(NARROW, 1 << (dim - 1).bit_length())


def forward_tiles(
    block_q: int, shared_heads: int, dim: int, dtype: torch.dtype, capability: int = 90
) -> Tiles:
    """Tiles of the forward pass.

    Args:
        block_q: queries of a block of the mask.
        shared_heads: query heads that share keys and mask.
        dim: the wider of head_dim and value_dim, padded.
        dtype: of the inputs.
        capability: 10 · major + minor of the device.
    """
    if dtype == torch.float32:
        return _tiles(block_q, shared_heads, most=16, tile_k=16, warps=4, stages=2)
    wide = dim > 128
    tiles = _tiles(
        block_q, shared_heads, most=64 if wide else 128, tile_k=KEYS // 2 if wide else KEYS
    )
    warps = 8 if tiles.rows * dim > 64 * 128 else 4
    deep = _fits(tiles, dim, 3, capability, programs=8 // warps)
    return dataclasses.replace(tiles, warps=warps, stages=5 if deep else 3)


def backward_tiles(
    block_q: int, shared_heads: int, dim: int, dtype: torch.dtype, capability: int = 90
) -> Tiles:
    """Tiles of the gradient of the queries; the arguments are those of ``forward_tiles``."""
    if dtype == torch.float32:
        return _tiles(block_q, shared_heads, most=16, tile_k=16, warps=4, stages=2)
    tiles = _tiles(block_q, shared_heads, most=64, tile_k=KEYS if dim <= 128 else KEYS // 2)
    return dataclasses.replace(
        tiles,
        warps=8 if tiles.rows * dim > 32 * 128 else 4,
        stages=3 if _fits(tiles, 2 * dim, 2, capability) else 2,
    )


def key_tiles(block_k: int, dim: int, dtype: torch.dtype, capability: int = 90) -> Tiles:
    """Tiles of the gradients of key blocks; ``rows`` are keys here, met by ``tile_q`` queries."""
    if dtype == torch.float32:
        tiles = _tiles(block_k, 1, most=16, tile_k=16, warps=4, stages=2)
    else:
        tiles = _tiles(block_k, 1, most=64, tile_k=KEYS // 2)
        warps = 8 if tiles.rows * dim > 32 * 128 else 4
        stages = 3 if _fits(tiles, 2 * dim, 2, capability) else 2
        tiles = dataclasses.replace(tiles, warps=warps, stages=stages)
    return dataclasses.replace(tiles, tile_q=tiles.tile_k, tile_k=tiles.tile_q)


def _tiles(
    block_q: int, shared_heads: int, *, most: int, tile_k: int, warps: int = 4, stages: int = 3
) -> Tiles:
    tile_q = min(block_q, most)
    pack = max(
        n
        for n in range(1, shared_heads + 1)
        if shared_heads % n == 0 and (n == 1 or n * tile_q <= min(64, most))
    )
    rows = max(NARROW, 1 << (pack * tile_q - 1).bit_length())
    return Tiles(tile_q, tile_k, pack, rows, warps, stages)


def _fits(tiles: Tiles, dim: int, buffers: int, capability: int, programs: int = 1) -> bool:
    """Whether so many 2-byte key and value tiles, and the queries, fit the shared memory."""
    need = 2 * dim * (2 * tiles.tile_k * buffers + tiles.rows) + 1024
    return programs * need <= 1024 * SHARED_BYTES.get(capability, 99)
