"""One region of a static mask: its fields, their ranges, and its 64-bit word."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from jaxtyping import UInt64

TILE_QUERIES, TILE_KEYS = 16, 32
"""Queries and keys of one tile, the grid of every static mask."""
UNIT = 16
"""Tokens that one step of `Region.c0` and `Region.width` stands for."""
PATTERN_KEYS = 8
"""Keys after which the pattern of a strided region repeats."""
MAX_REGIONS, MAX_REGIONS_COARSE = 8, 16
"""Regions that a head may have, and that it may have if one of them is coarse."""


class Mode(IntEnum):
    """What is computed inside a region."""

    FULL = 0
    """Every pair, exactly."""
    COARSE = 1
    """Runs of 2, 4 or 8 keys stand as their mean, weighted by their number."""
    STRIDED = 2
    """Fixed columns of every eight keys, exactly."""
    LOW_PRECISION = 3
    """Every pair, from 4-bit codes with a power of two per vector."""


@dataclass(frozen=True)
class Region:
    """A sheared rectangle of (query, key) pairs, after Dai et al. 2023 (DAC); region design ours.

    Query tile t in [r0, r1) meets the keys from 16·(c0 + slope·(t − r0)) on, 16·width of them,
    snapped outwards to key tiles of 32 and clipped to the keys that there are.

    Args:
        mode: what is computed inside.
        r0: first query tile, in [0, 511]. Query tiles hold 16 queries.
        r1: end of the query tiles, in (r0, 512]. Tiles beyond the queries that there are count for
            nothing, so 512 means "all".
        c0: first key of query tile r0 in units of 16 tokens, in [−2048, 2047].
        width: keys in units of 16 tokens, in [1, 1023].
        slope: 0, or 1 for a band that moves on by 16 keys with every query tile.
        log2s: of the keys per coarse segment, 1 to 3 (COARSE), else 0.
        causal: keys after the query are left out. A causal COARSE region owns the key tiles that
            lie wholly before their query tile: means over later keys would leak.
        pattern: which of every 8 keys are kept, bit b for keys j with j mod 8 = b, 1 to 255
            (STRIDED), else 0. A period of 4 is written twice.
        low_precision_shift: most low bits that a vector's 8-bit codes lose on their way to 4 bits,
            1 to 5 (LOW_PRECISION), else 0.

    Raises:
        ValueError: a field is outside its range.
    """

    mode: Mode
    r0: int
    r1: int
    c0: int
    width: int
    slope: int = 0
    log2s: int = 0
    causal: bool = False
    pattern: int = 0
    low_precision_shift: int = 0

    def __post_init__(self) -> None:
        if self.mode not in tuple(Mode):
            raise ValueError(f"mode must be one of {', '.join(Mode.__members__)}, got {self.mode}")
        object.__setattr__(self, "mode", Mode(self.mode))
        mode = self.mode
        ranges = {
            "r0": (0, 511),
            "r1": (self.r0 + 1, 512),
            "c0": (-2048, 2047),
            "width": (1, 1023),
            "slope": (0, 1),
            "log2s": (1, 3) if mode is Mode.COARSE else (0, 0),
            "pattern": (1, 255) if mode is Mode.STRIDED else (0, 0),
            "low_precision_shift": (1, 5) if mode is Mode.LOW_PRECISION else (0, 0),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high:
                allowed = str(low) if low == high else f"in [{low}, {high}]"
                raise ValueError(f"{name} of a {mode.name} region must be {allowed}, got {value}")

    @property
    def segment(self) -> int:
        """Keys that one score stands for: 2, 4 or 8 in COARSE regions, else 1."""
        return 1 << self.log2s

    def encode(self, *, first: bool = False, last: bool = False) -> int:
        """The region as 64 bits; `first` and `last` mark the ends of a head's list.

        From the most significant bit on: mode 2, log2s 2, slope 1, r0 9, r1 − 1 9, c0 12 (two's
        complement), width 10, first 1, last 1, causal 1, pattern 8, low_precision_shift 4, 4 zeros.
        """
        values = dataclasses.asdict(self)
        values |= {"r1": self.r1 - 1, "c0": self.c0 & 0xFFF, "first": first, "last": last}
        word = 0
        for name, bits in _FIELDS:
            word = word << bits | int(values.get(name, 0))
        return word

    @classmethod
    def decode(cls, word: int) -> Region:
        """The region that `encode` wrote; the marks of the list are not part of it.

        Raises:
            ValueError: not 64 bits, or fields that no region has.
        """
        found = _fields(word)
        if found["spare"]:
            raise ValueError(f"word must have its 4 lowest bits zero, got {word:#018x}")
        c0 = found["c0"] - (1 << 12 if found["c0"] >> 11 else 0)
        return cls(
            Mode(found["mode"]),
            found["r0"],
            found["r1"] + 1,
            c0,
            found["width"],
            found["slope"],
            found["log2s"],
            bool(found["causal"]),
            found["pattern"],
            found["low_precision_shift"],
        )


HeadRegions: TypeAlias = tuple[Region, ...]
"""The regions of one head, in order of priority."""

_FIELDS = (
    ("mode", 2), ("log2s", 2), ("slope", 1), ("r0", 9), ("r1", 9), ("c0", 12), ("width", 10),
    ("first", 1), ("last", 1), ("causal", 1), ("pattern", 8), ("low_precision_shift", 4),
    ("spare", 4),
)  # fmt: skip


def _fields(word: int) -> dict[str, int]:
    if not 0 <= word < 1 << 64:
        raise ValueError(f"word must have 64 bits, got {word}")
    found: dict[str, int] = {}
    for name, bits in reversed(_FIELDS):
        found[name] = word & (1 << bits) - 1
        word >>= bits
    return found


def by_priority(regions: Sequence[Region]) -> list[int]:
    """Places of the regions in the order in which they claim tiles: coarse ones last."""
    return sorted(range(len(regions)), key=lambda i: regions[i].mode is Mode.COARSE)


def region_limit(regions: Sequence[Region]) -> int:
    """How many regions this head may have: 8, or 16 if one of them is coarse."""
    coarse = any(region.mode is Mode.COARSE for region in regions)
    return MAX_REGIONS_COARSE if coarse else MAX_REGIONS


def encode_heads(heads: Iterable[Sequence[Region]]) -> UInt64[np.ndarray, " words"]:
    """The regions of several heads as one list of words, each head's in order of priority.

    The first and the last word of a head are marked, so the list needs no lengths.

    Raises:
        ValueError: a head has no region, or more than `region_limit`.
    """
    words: list[int] = []
    for h, regions in enumerate(heads):
        limit = region_limit(regions)
        if not 1 <= len(regions) <= limit:
            raise ValueError(f"head {h} must have 1 to {limit} regions, got {len(regions)}")
        order = by_priority(regions)
        words += [
            regions[i].encode(first=i == order[0], last=i == order[-1])  # places are distinct
            for i in order
        ]
    return np.array(words, np.uint64)


def decode_heads(words: UInt64[np.ndarray, " words"]) -> tuple[HeadRegions, ...]:
    """The heads that `encode_heads` wrote, their regions in order of priority.

    Raises:
        ValueError: the marks do not delimit heads, or a word is no region.
    """
    heads: list[HeadRegions] = []
    open_head: list[Region] = []
    for i, word in enumerate(int(w) for w in words):
        found = _fields(word)
        if bool(found["first"]) != (not open_head):
            wanted = "the first of its head" if not open_head else "not the first of its head"
            raise ValueError(f"word {i} must be marked as {wanted}, got {word:#018x}")
        open_head.append(Region.decode(word))
        if found["last"]:
            heads.append(tuple(open_head))
            open_head = []
    if open_head:
        raise ValueError(f"word {len(words) - 1} must be marked as the last of its head")
    return tuple(heads)
