"""Fixed patterns on the tiles of a static accelerator, at a given budget."""

from __future__ import annotations

import functools
from bisect import bisect_left
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool

from sparseloom.kernels.regions import tile_mask
from sparseloom.mask import SparseMask
from sparseloom.methods.base import AttentionInputs, Selector
from sparseloom.methods.bigbird import BigBird
from sparseloom.methods.blocklocal import BlockLocal
from sparseloom.methods.longformer import Longformer
from sparseloom.methods.random_mask import mix, mix_int
from sparseloom.methods.region_candidates import allowed_tiles, forced_regions
from sparseloom.methods.settings import check_at_least, check_choice
from sparseloom.methods.sparse_transformer import Fixed, Strided
from sparseloom.methods.window import SlidingWindow
from sparseloom.regions import TILE_KEYS, TILE_QUERIES, owners, stripe

Pattern = Literal["window", "strided", "fixed", "blocklocal", "longformer", "bigbird", "random"]


@dataclass(frozen=True)
class TileAligned(Selector):
    """A fixed pattern of whole tiles: what the 16 × 32 grid of `static` makes of it.

    A tile is kept whole where the pattern keeps any of its pairs, which is what hardware of tiles
    computes, so a density counts the pairs that alignment adds.  The pattern's one size (below)
    is the one with the fewest tiles that reach the density.  `random` draws tiles beside the
    diagonal's, for each layer and head.

    Args:
        pattern: `"window"` (width), `"strided"` (stride, and the window of that width; both parts
            in every head), `"fixed"` (stride; a quarter of it, at least 8, are summary columns),
            `"blocklocal"` (block), `"longformer"` (window, one global token), `"bigbird"` (blocks
            of 32; window 3, one global block, random blocks), or `"random"`.
        density: kept over allowed tiles, of every head.
        seed: of random blocks and tiles.
    """

    name: ClassVar[str] = "aligned"

    pattern: Pattern = "window"
    density: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("pattern", self.pattern, get_args(Pattern))
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density must be in (0, 1], got {self.density}")
        check_at_least("seed", self.seed, 0)

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """Whole tiles, shared by the batch, and by heads where they do not differ.

        Raises:
            NotImplementedError: fewer queries than keys, as with a cache.
        """
        q_len, kv_len = inputs.query.shape[2], inputs.key.shape[2]
        if q_len != kv_len:
            raise NotImplementedError(
                f"past_key_values: aligned patterns need all tokens at once, got {q_len} queries "
                f"for {kv_len} keys (generate with use_cache=False)"
            )
        tiles = self.tiles(kv_len, inputs.query.shape[1], inputs.layer, is_causal=inputs.is_causal)
        return tile_mask(tiles, kv_len, kv_len).to(inputs.query.device)

    def worthwhile(self, q_len: int, kv_len: int) -> bool:
        """Whether there is more than one key tile, and a tile to leave out."""
        return q_len > 0 and kv_len > TILE_KEYS and self.density < 1.0

    def tiles(
        self, kv_len: int, heads: int, layer: int, *, is_causal: bool
    ) -> Bool[np.ndarray, "heads_or_one q_tiles k_tiles"]:
        """The tiles that are kept at one length; those of the next multiple of 32, cut off."""
        layer = layer if self.pattern in ("bigbird", "random") else 0
        whole = _tiles(self, -(-kv_len // TILE_KEYS) * TILE_KEYS, heads, layer, is_causal)
        return whole[:, : -(-kv_len // TILE_QUERIES)]

    def tile_density(self, kv_len: int, heads: int, layers: int, *, is_causal: bool) -> float:
        """Kept over allowed tiles at one length: what the machine computes."""
        shares = [
            self.tiles(kv_len, heads, layer, is_causal=is_causal).mean(0).sum()
            for layer in range(layers)
        ]
        return float(np.mean(shares)) / allowed_tiles(kv_len, is_causal=is_causal)

    def inner(self, kv_len: int, heads: int, layer: int, *, is_causal: bool) -> Selector:
        """The pattern of the size that is taken, before alignment.

        Raises:
            ValueError: random tiles have no pattern.
        """
        wanted = self.density * allowed_tiles(kv_len, is_causal=is_causal)
        shape = kv_len, heads, layer, is_causal

        def share(size: int) -> float:
            kept = _touched(self._sized(size), *shape)
            return float(kept.sum()) / len(kept)

        if self.pattern == "bigbird":
            sizes = range(-(-kv_len // 32) + 1)
        elif self.pattern in ("window", "longformer"):
            sizes = range(16, 2 * kv_len + 16, 16)
        else:  # not monotone: all are tried
            sizes = range(16, kv_len + 16, 16)
            above = [(share(size), size) for size in sizes]
            return self._sized(min(pair for pair in above if pair[0] >= wanted)[1])
        return self._sized(sizes[min(bisect_left(sizes, wanted, key=share), len(sizes) - 1)])

    def _sized(self, size: int) -> Selector:
        match self.pattern:
            case "window":
                return SlidingWindow(width=size)
            case "strided":
                return Strided(stride=size)
            case "fixed":
                return Fixed(stride=size, columns=max(8, size // 4))
            case "blocklocal":
                return BlockLocal(block=size)
            case "longformer":
                return Longformer(window=size)
            case "bigbird":
                return BigBird(block=32, random_blocks=size, seed=self.seed)
            case "random":
                raise ValueError("pattern 'random' draws tiles and has no size")


@functools.lru_cache(maxsize=256)
def _tiles(
    method: TileAligned, kv_len: int, heads: int, layer: int, is_causal: bool
) -> Bool[np.ndarray, "heads_or_one q_tiles k_tiles"]:
    if method.pattern == "random":
        return _random(method, kv_len, heads, layer, is_causal)
    pattern = method.inner(kv_len, heads, layer, is_causal=is_causal)
    return _touched(pattern, kv_len, heads, layer, is_causal)


def _random(
    method: TileAligned, kv_len: int, heads: int, layer: int, is_causal: bool
) -> Bool[np.ndarray, "heads q_tiles k_tiles"]:
    _, kept = forced_regions(kv_len, is_causal=is_causal, force=("diagonal",))
    everything = stripe(0, kv_len, causal=is_causal)
    free = (owners((everything,), kv_len, kv_len) >= 0) & ~kept
    wanted = round(method.density * allowed_tiles(kv_len, is_causal=is_causal)) - int(kept.sum())
    head = mix(torch.arange(heads) + mix_int(method.seed, layer))
    drawn = mix(head[:, None] + torch.arange(kept.size)).numpy()
    drawn[:, ~free.reshape(-1)] = 1 << 40  # what may not be drawn comes last
    order = drawn.argsort(1, kind="stable")[:, : min(max(0, wanted), int(free.sum()))]
    found = np.broadcast_to(kept.reshape(-1), drawn.shape).copy()
    np.put_along_axis(found, order, True, 1)
    return found.reshape(heads, *kept.shape)


def _touched(
    pattern: Selector, kv_len: int, heads: int, layer: int, is_causal: bool
) -> Bool[np.ndarray, "heads_or_one q_tiles k_tiles"]:
    """Tiles in which a pattern keeps any allowed pair."""
    empty = torch.zeros(1, heads, kv_len, 1)
    call = AttentionInputs(query=empty, key=empty, layer=layer, is_causal=is_causal, scale=1.0)
    keep = pattern.select(call).to_bool()[0]
    if is_causal:
        keep = keep.tril()
    padded = torch.nn.functional.pad(keep, (0, -kv_len % TILE_KEYS, 0, -kv_len % TILE_QUERIES))
    tiles = padded.unflatten(2, (-1, TILE_KEYS)).unflatten(1, (-1, TILE_QUERIES))
    return tiles.any(4).any(2).numpy()
