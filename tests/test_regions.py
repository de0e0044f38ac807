"""Regions of static masks: words, ownership, runs, costs, rows without keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom import regions as rg
from sparseloom.regions import Mode, Region, band, block, dilated, rows, stripe

DRAWS = settings(max_examples=30, deadline=None)


@st.composite
def any_region(draw: st.DrawFn, tiles: int = 512, units: int = 1023, start: int = 2047) -> Region:
    mode = draw(st.sampled_from(list(Mode)))
    r0 = draw(st.integers(0, min(tiles, 512) - 1))
    return Region(
        mode,
        r0,
        draw(st.integers(r0 + 1, tiles)),
        draw(st.integers(-start - 1, start)),
        draw(st.integers(1, units)),
        draw(st.integers(0, 1)),
        draw(st.integers(1, 3)) if mode is Mode.COARSE else 0,
        draw(st.booleans()),
        draw(st.integers(1, 255)) if mode is Mode.STRIDED else 0,
        draw(st.integers(1, 5)) if mode is Mode.LOW_PRECISION else 0,
    )


small_regions = st.lists(any_region(tiles=8, units=8, start=8), min_size=1, max_size=5)
lengths = st.integers(1, 100)


def brute_owner(
    regions: list[Region], q_len: int, kv_len: int, n_valid: int, i: int, j: int
) -> int:
    """The rule of ownership, tile (i, j) alone, word for word."""
    if j * 32 >= n_valid:
        return -1
    order = [r for r in regions if r.mode is not Mode.COARSE]
    order += [r for r in regions if r.mode is Mode.COARSE]
    queries = range(i * 16, min(q_len, i * 16 + 16))
    for region in order:
        if not region.r0 <= i < region.r1:
            continue
        first = 16 * (region.c0 + region.slope * (i - region.r0))
        if not any(first <= key < first + 16 * region.width for key in range(j * 32, j * 32 + 32)):
            continue
        if region.causal:
            seen = [
                key <= q + kv_len - q_len for q in queries for key in range(j * 32, j * 32 + 32)
            ]
            if not (all(seen) if region.mode is Mode.COARSE else any(seen)):
                continue
        return next(k for k, r in enumerate(regions) if r is region)
    return -1


@given(any_region(), st.booleans(), st.booleans())
@DRAWS
def test_a_word_gives_the_region_back(region: Region, first: bool, last: bool) -> None:
    word = region.encode(first=first, last=last)
    assert 0 <= word < 1 << 64
    assert Region.decode(word) == region
    assert (word >> 18 & 1, word >> 17 & 1, word & 15) == (first, last, 0)


def test_the_fields_stand_where_they_are_said_to_stand() -> None:
    region = Region(Mode.COARSE, 3, 9, -5, 12, slope=1, log2s=2, causal=True)
    expected = 1 << 62 | 2 << 60 | 1 << 59 | 3 << 50 | 8 << 41 | 0xFFB << 29 | 12 << 19 | 1 << 16
    assert region.encode() == expected
    low = Region(Mode.LOW_PRECISION, 0, 512, 0, 1, low_precision_shift=4)
    assert low.encode(last=True) == 3 << 62 | 511 << 41 | 1 << 19 | 1 << 17 | 4 << 4
    strided = Region(Mode.STRIDED, 0, 1, 0, 1, pattern=0b10000001)
    assert strided.encode(first=True) == 2 << 62 | 1 << 19 | 1 << 18 | 0b10000001 << 8


@given(st.lists(st.lists(any_region(), min_size=1, max_size=8), max_size=3))
@DRAWS
def test_a_list_of_words_gives_the_heads_back(heads: list[list[Region]]) -> None:
    found = rg.decode_heads(rg.encode_heads(heads))
    assert [list(head) for head in found] == [
        [head[i] for i in rg.by_priority(head)] for head in heads
    ]


def test_lists_that_are_none_are_refused() -> None:
    full = band(0, 16)
    with pytest.raises(ValueError, match="head 1 must have 1 to 8 regions, got 9"):
        rg.encode_heads([[full], [full] * 9])
    far = band(0, 64, mode=Mode.COARSE, segment=4)
    assert len(rg.encode_heads([[full] * 8 + [far] * 8])) == 16
    with pytest.raises(ValueError, match="head 0 must have 1 to 16 regions, got 17"):
        rg.encode_heads([[full] * 8 + [far] * 9])
    with pytest.raises(ValueError, match="head 0 must have 1 to 8 regions, got 0"):
        rg.encode_heads([[]])
    words = rg.encode_heads([[full, full]])
    with pytest.raises(ValueError, match="word 0 must be marked as the first of its head"):
        rg.decode_heads(words[1:])
    with pytest.raises(ValueError, match="word 0 must be marked as the last of its head"):
        rg.decode_heads(words[:1])
    with pytest.raises(ValueError, match="word 1 must be marked as not the first of its head"):
        rg.decode_heads(words[[0, 0]])
    with pytest.raises(ValueError, match="4 lowest bits zero"):
        Region.decode(full.encode() | 1)
    with pytest.raises(ValueError, match="word must have 64 bits, got -1"):
        Region.decode(-1)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"r0": -1}, r"r0 of a FULL region must be in \[0, 511\], got -1"),
        ({"r1": 0}, r"r1 of a FULL region must be in \[1, 512\], got 0"),
        ({"r0": 4, "r1": 4}, r"r1 of a FULL region must be in \[5, 512\], got 4"),
        ({"r1": 513}, "got 513"),
        ({"c0": -2049}, r"c0 of a FULL region must be in \[-2048, 2047\], got -2049"),
        ({"c0": 2048}, "got 2048"),
        ({"width": 0}, r"width of a FULL region must be in \[1, 1023\], got 0"),
        ({"width": 1024}, "got 1024"),
        ({"slope": 2}, r"slope of a FULL region must be in \[0, 1\], got 2"),
        ({"log2s": 1}, "log2s of a FULL region must be 0, got 1"),
        ({"mode": Mode.COARSE}, r"log2s of a COARSE region must be in \[1, 3\], got 0"),
        ({"mode": Mode.STRIDED}, r"pattern of a STRIDED region must be in \[1, 255\], got 0"),
        ({"pattern": 1}, "pattern of a FULL region must be 0, got 1"),
        ({"mode": Mode.LOW_PRECISION}, r"low_precision_shift .* must be in \[1, 5\], got 0"),
    ],
)
def test_a_field_outside_its_range_is_refused(change: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(Region(Mode.FULL, 0, 1, 0, 1), **change)


def test_shapes_take_tokens() -> None:
    assert band(-32, 80) == Region(Mode.FULL, 0, 512, -2, 5, slope=1)
    # Wherever a band begins, its keys follow the query tile's own position.
    assert band(-32, 80, r0=3, r1=5) == Region(Mode.FULL, 3, 5, 1, 5, slope=1)
    assert stripe(64, 32, mode=Mode.COARSE, segment=8) == Region(Mode.COARSE, 0, 512, 4, 2, log2s=3)
    assert rows(0, 2, 100) == Region(Mode.FULL, 0, 2, 0, 7)
    assert block(2, 4, 32, 64, causal=True) == Region(Mode.FULL, 2, 4, 2, 4, causal=True)
    assert dilated(0, 64, 0b00010001) == Region(Mode.STRIDED, 0, 512, 0, 4, slope=1, pattern=17)
    assert dilated(32, 64, 1, diagonal=False, r0=1).c0 == 2
    assert band(0, 16, mode=Mode.LOW_PRECISION).low_precision_shift == 4
    with pytest.raises(ValueError, match="width must be a multiple of 16 tokens, got 40"):
        band(0, 40)
    with pytest.raises(ValueError, match="segment must be 1, 2, 4 or 8, got 3"):
        stripe(0, 32, mode=Mode.COARSE, segment=3)


@given(small_regions, lengths, lengths, st.data())
@DRAWS
def test_each_tile_belongs_to_the_first_that_claims_it(
    regions: list[Region], q_len: int, kv_len: int, data: st.DataObject
) -> None:
    n_valid = data.draw(st.integers(0, kv_len))
    owner = rg.owners(regions, q_len, kv_len, n_valid)
    expected = [
        [brute_owner(regions, q_len, kv_len, n_valid, i, j) for j in range(-(-kv_len // 32))]
        for i in range(-(-q_len // 16))
    ]
    assert owner.tolist() == expected
    # What the decoded list claims is what was encoded: compiler and sequencer agree.
    decoded = rg.decode_heads(rg.encode_heads([regions]))[0]
    order = np.array([*rg.by_priority(regions), -1])
    assert (order[rg.owners(decoded, q_len, kv_len, n_valid)] == owner).all()


@given(small_regions, lengths, lengths)
@DRAWS
def test_runs_tile_the_owned_tiles(regions: list[Region], q_len: int, kv_len: int) -> None:
    owner = rg.owners(regions, q_len, kv_len)
    for merge in (False, True):
        found = rg.runs(regions, q_len, kv_len, merge=merge)
        painted = np.full_like(owner, -1)
        for t, begin, end, region in zip(*found, strict=True):
            assert (painted[t, begin:end] == -1).all()
            painted[t, begin:end] = region
        assert ((painted >= 0) == (owner >= 0)).all()
        if not merge:
            assert (painted == owner).all()
        neighbours = (found.query_tile[1:] == found.query_tile[:-1]) & (
            found.begin[1:] == found.end[:-1]
        )
        assert (found.region[1:] != found.region[:-1])[neighbours].all()


def test_tiles_and_runs_counted_by_hand() -> None:
    """384 tokens, 24 × 12 tiles: diagonal ± 1 tile, key tile 0, all keys for query tile 0."""
    local = (rows(0, 1, 384), band(-32, 80), stripe(0, 32))
    # 12 in query tile 0, 2 in tile 1, 3 in tiles 2 and 3, 4 in tiles 4 to 21, 3 in 22 and 23.
    assert rg.computed_tiles(local, 384, 384) == 12 + 2 + 2 * 3 + 18 * 4 + 2 * 3
    assert rg.density(local, 384, 384) == pytest.approx(98 / 288)
    # The stripe stands apart from the band from query tile 6 on; in tiles 4 and 5 they adjoin.
    assert len(rg.runs(local, 384, 384).region) == 4 + 20 * 2
    assert len(rg.runs(local, 384, 384, merge=True).region) == 42
    coarse = (*local, stripe(0, 384, mode=Mode.COARSE, segment=4))
    # ⌈10 / 4⌉ in query tile 1, ⌈9 / 4⌉ in 2, 3, 22 and 23, 8 / 4 in 4 to 21.
    assert rg.computed_tiles(coarse, 384, 384) == 98 + 3 + 4 * 3 + 18 * 2
    assert len(rg.runs(coarse, 384, 384, merge=True).region) == 79


def test_costs_by_mode() -> None:
    assert rg.tile_cost(band(0, 16)) == 1
    assert rg.tile_cost(band(0, 16, mode=Mode.LOW_PRECISION)) == 1
    assert rg.tile_cost(band(0, 16, mode=Mode.COARSE, segment=8)) == 1 / 8
    assert rg.tile_cost(dilated(0, 16, 0b10010001)) == 3 / 8
    # One query tile, 5 tiles of 3 keys in 8, packed: ⌈15 / 8⌉.
    assert rg.computed_tiles([dilated(0, 160, 0b10010001)], 16, 160) == 2


def test_all_of_it_as_one_region() -> None:
    for n in (1, 16, 33, 384):
        everything = [rows(0, 512, n)]
        assert rg.density(everything, n, n) == 1
        assert rg.exact_pairs(everything, n, n).all()


@given(small_regions, lengths, lengths, st.data())
@DRAWS
def test_padding_only_takes_away(
    regions: list[Region], q_len: int, kv_len: int, data: st.DataObject
) -> None:
    n_valid = data.draw(st.integers(0, kv_len))
    pairs = rg.exact_pairs(regions, q_len, kv_len)
    clipped = rg.exact_pairs(regions, q_len, kv_len, n_valid)
    assert not clipped[:, n_valid:].any()
    assert (clipped[:, :n_valid] == pairs[:, :n_valid]).all()
    whole = rg.coarse_segments(regions, q_len, kv_len)
    part = rg.coarse_segments(regions, q_len, kv_len, n_valid)
    for size, met in whole.items():
        with_a_valid_key = np.arange(met.shape[1]) * size < n_valid
        assert (part.get(size, np.zeros_like(met)) == met & with_a_valid_key).all()


@given(small_regions, lengths, lengths)
@DRAWS
def test_no_key_counts_twice_and_none_comes_later(
    regions: list[Region], q_len: int, kv_len: int
) -> None:
    times = rg.exact_pairs(regions, q_len, kv_len).astype(int)
    for size, met in rg.coarse_segments(regions, q_len, kv_len).items():
        times += met.repeat(16, 0)[:q_len].repeat(size, 1)[:, :kv_len]
    assert times.max(initial=0) <= 1
    causal = [replace(region, causal=True) for region in regions]
    seen = np.arange(kv_len) <= np.arange(kv_len - q_len, kv_len)[:, None]
    assert not (rg.exact_pairs(causal, q_len, kv_len) & ~seen).any()
    for size, met in rg.coarse_segments(causal, q_len, kv_len).items():
        keys = met.repeat(16, 0)[:q_len].repeat(size, 1)[:, :kv_len]
        assert not (keys & ~seen).any()


@given(small_regions, st.integers(1, 50))
@settings(max_examples=10, deadline=None)
def test_rows_without_keys_are_found(regions: list[Region], n: int) -> None:
    for padding_rows in (False, True):
        empty = False
        for n_valid in range(1, n + 1):
            met = rg.exact_pairs(regions, n, n, n_valid)
            for size, segments in rg.coarse_segments(regions, n, n, n_valid).items():
                met |= segments.repeat(16, 0)[:n].repeat(size, 1)[:, :n]
            asked = n if padding_rows else n_valid
            empty |= bool((~met[:asked, :n_valid].any(1)).any())
        if empty:
            with pytest.raises(ValueError, match=r"regions must leave a key to every query, but"):
                rg.check_rows(regions, n, n, padding_rows=padding_rows)
        else:
            rg.check_rows(regions, n, n, padding_rows=padding_rows)


def test_the_diagonal_tile_serves_every_row() -> None:
    rg.check_rows([band(0, 16)], 512, 512)
    rg.check_rows([band(0, 16, causal=True)], 512, 512)
    rg.check_rows([stripe(0, 32)], 512, 512, padding_rows=True)
    with pytest.raises(ValueError, match="query 32 has none when 1 of 64 keys are valid"):
        rg.check_rows([band(0, 16)], 64, 64, padding_rows=True)
    with pytest.raises(ValueError, match="query 0 has none when 1 of 64 keys are valid"):
        rg.check_rows([stripe(32, 32)], 64, 64)


def test_lengths_outside_their_range_are_refused() -> None:
    with pytest.raises(ValueError, match="q_len must be at least 1, got 0"):
        rg.owners([band(0, 16)], 0, 4)
    with pytest.raises(ValueError, match=r"n_valid must be in \[0, 4\], got 5"):
        rg.owners([band(0, 16)], 4, 4, 5)


def test_no_regions_no_work() -> None:
    assert (rg.owners([], 40, 40) == -1).all()
    assert rg.computed_tiles([], 40, 40) == 0
    assert len(rg.runs([], 40, 40, merge=True).region) == 0
