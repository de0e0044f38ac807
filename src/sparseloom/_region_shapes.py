"""The shapes of static masks as regions: bands, stripes, rows, blocks, with or without holes."""

from __future__ import annotations

from sparseloom._region_words import UNIT, Mode, Region

_ALL = 512
"""End of the query tiles of a region that covers them all."""


def band(
    offset: int,
    width: int,
    *,
    mode: Mode = Mode.FULL,
    segment: int = 1,
    causal: bool = False,
    r0: int = 0,
    r1: int = _ALL,
) -> Region:
    """A diagonal band: the queries from 16·t on meet keys 16·t + offset … + width − 1.

    Snapping to key tiles of 32 adds keys: offset 0, width 16 is the diagonal tile alone, offset
    −32, width 80 is that tile and one on either side.

    Args:
        offset: tokens from the first query of a tile to its first key, a multiple of 16.
        width: tokens, a multiple of 16.
        mode: what is computed inside.
        segment: keys per coarse segment, 2, 4 or 8; 1 unless the mode is COARSE.
        causal: leave out keys after the query.
        r0, r1: query tiles that the band covers; all by default.

    Raises:
        ValueError: a number is not a multiple of 16, or out of range.
    """
    c0 = _units("offset", offset) + r0
    return _region(mode, (r0, r1), c0, width, 1, segment, causal)


def stripe(
    first: int, width: int, *, mode: Mode = Mode.FULL, segment: int = 1, causal: bool = False
) -> Region:
    """A vertical stripe: every query meets keys first … first + width − 1, as a [CLS] column.

    Arguments and errors as in `band`, `first` counted from the first key.
    """
    return _region(mode, (0, _ALL), _units("first", first), width, 0, segment, causal)


def rows(
    r0: int, r1: int, kv_len: int, *, mode: Mode = Mode.FULL, segment: int = 1, causal: bool = False
) -> Region:
    """Global queries: query tiles r0 … r1 − 1 meet all `kv_len` keys. Errors as in `band`."""
    width = -(-kv_len // UNIT) * UNIT
    return _region(mode, (r0, r1), 0, width, 0, segment, causal)


def block(
    r0: int,
    r1: int,
    first: int,
    width: int,
    *,
    mode: Mode = Mode.FULL,
    segment: int = 1,
    causal: bool = False,
) -> Region:
    """A rectangle: query tiles r0 … r1 − 1 meet keys first … first + width − 1, as in `stripe`."""
    return _region(mode, (r0, r1), _units("first", first), width, 0, segment, causal)


def dilated(
    offset: int,
    width: int,
    pattern: int,
    *,
    diagonal: bool = True,
    causal: bool = False,
    r0: int = 0,
    r1: int = _ALL,
) -> Region:
    """A band (`diagonal`) or stripe with holes: of every 8 keys those whose bit `pattern` has.

    Args:
        offset, width, causal, r0, r1: as in `band`; without `diagonal`, `offset` is the first key.
        pattern: bit b keeps the keys j with j mod 8 = b.
        diagonal: whether the region moves on with the queries.

    Raises:
        ValueError: as in `band`.
    """
    c0 = _units("offset", offset) + (r0 if diagonal else 0)
    return Region(
        Mode.STRIDED, r0, r1, c0, _units("width", width), int(diagonal), 0, causal, pattern
    )


def _region(
    mode: Mode,
    tiles: tuple[int, int],
    c0: int,
    width: int,
    slope: int,
    segment: int,
    causal: bool,
) -> Region:
    if segment not in (1, 2, 4, 8):
        raise ValueError(f"segment must be 1, 2, 4 or 8, got {segment}")
    shift = 4 if mode is Mode.LOW_PRECISION else 0
    log2s = segment.bit_length() - 1
    units = _units("width", width)
    return Region(mode, *tiles, c0, units, slope, log2s, causal, low_precision_shift=shift)


def _units(name: str, tokens: int) -> int:
    if tokens % UNIT:
        raise ValueError(f"{name} must be a multiple of {UNIT} tokens, got {tokens}")
    return tokens // UNIT
