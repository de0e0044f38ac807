"""Runs: of masks tile by tile, of regions as the compiler lists them, cut into chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom import hardware
from sparseloom.experiments.reproduce.static_templates import encoder, selection, templates
from sparseloom.hardware import MachineError
from sparseloom.hardware.static_dense import StaticDense
from sparseloom.hardware.static_dense.heads import call_heads
from sparseloom.hardware.static_dense.lowering import HeadSize, deal, lower
from sparseloom.hardware.static_dense.runs import allowed_tiles, kept_tiles
from sparseloom.hardware.static_dense.sequencer import scan, sequence
from sparseloom.regions import Mode, Region, by_priority, computed_tiles, runs
from sparseloom.trace import AttentionCall, MaskArrays


# From a drawn seed: beartype uses `random` where the package is called, and hypothesis forbids that
# inside strategies.
def regions_of_a_head(seed: int) -> list[Region]:
    """Any regions in order of priority."""
    rng = np.random.default_rng(seed)

    def one() -> Region:
        mode = Mode(int(rng.integers(4)))
        more: dict[str, Any] = {
            Mode.FULL: {},
            Mode.COARSE: {"log2s": int(rng.integers(1, 4))},
            Mode.STRIDED: {"pattern": int(rng.integers(1, 256))},
            Mode.LOW_PRECISION: {"low_precision_shift": 4},
        }[mode]
        r0 = int(rng.integers(10))
        c0, width, slope = (int(rng.integers(*ends)) for ends in ((-8, 21), (1, 25), (0, 2)))
        r1 = r0 + int(rng.integers(1, 13))
        return Region(mode, r0, r1, c0, width, slope, causal=bool(rng.integers(2)), **more)

    found = [one() for _ in range(rng.integers(1, 7))]
    return [found[i] for i in by_priority(found)]


SEEDS = st.integers(0, 2**31)


@given(SEEDS, st.integers(1, 200), st.integers(0, 120), st.integers(0, 320))
@settings(max_examples=100, deadline=None)
def test_the_sequencer_emits_what_the_compiler_lists(
    seed: int, q_len: int, earlier: int, valid: int
) -> None:
    regions, kv_len = regions_of_a_head(seed), q_len + earlier
    n_valid = min(valid, kv_len)
    emitted = sequence(regions, q_len, kv_len, n_valid)
    listed = runs(regions, q_len, kv_len, n_valid, merge=True)
    for ours, theirs in (
        (emitted.query_tile, listed.query_tile),
        (emitted.begin, listed.begin),
        (emitted.end, listed.end),
    ):
        assert ours.tolist() == theirs.tolist()
    size = HeadSize(q_len, kv_len, 64, 64)
    machine = hardware.load("dense_static_dac_2023", **{"buffers.weight_kib": 512.0})
    assert isinstance(machine, StaticDense)
    work = lower(machine.settings, emitted, size)
    assert work.tiles.sum() == computed_tiles(regions, q_len, kv_len, n_valid)
    assert work.starts.sum() == work.runs.sum() == emitted.count


def test_a_claim_is_made_once_in_the_order_of_the_words() -> None:
    wide, column = Region(Mode.FULL, 0, 4, 2, 4), Region(Mode.FULL, 0, 4, 0, 8)
    assert scan([wide, column], 1, 64, 128, 128) == [(0b0110, wide), (0b1001, column)]
    # Two keys into the fourth tile are still the tile; the fifth is padding.
    assert scan([column], 1, 64, 128, 98) == [(0b1111, column)]
    assert scan([column], 5, 64, 128, 128) == []


@given(
    st.sampled_from([(1, 1), (8, 1), (16, 32), (64, 64), (24, 40), (1, 7)]),
    st.integers(1, 90),
    st.integers(1, 150),
    st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_a_mask_is_rounded_up_to_tiles(
    block: tuple[int, int], q_len: int, kv_len: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    blocks = rng.random((2, 2, -(-q_len // block[0]), -(-kv_len // block[1]))) < 0.1
    keep = blocks.repeat(block[0], axis=2).repeat(block[1], axis=3)[:, :, :q_len, :kv_len]
    mask = MaskArrays.from_bool(keep, block_size=block)
    found = kept_tiles(mask, 1, 1)
    for t in range(found.shape[0]):
        for u in range(found.shape[1]):
            tile = keep[1, 1, 16 * t : 16 * t + 16, 32 * u : 32 * u + 32]
            assert found[t, u] == tile.any()


def test_tiles_without_an_allowed_pair_are_left_out() -> None:
    found = allowed_tiles(48, 80, 70, is_causal=True)
    # The last query of the first tile stands at position 47.
    assert found.astype(int).tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert allowed_tiles(48, 80, 64, is_causal=False).sum() == 6


def test_heads_share_masks_and_regions_as_attention_does() -> None:
    length, operator = 128, encoder(128, layers=1, heads=4).attention()[0]
    known = templates(length)
    call = selection("s", [[known["local"], known["coarse"]]], length).calls[0]
    heads = call_heads(operator, call, 0, length)
    assert [heads[0] is heads[1], heads[2] is heads[3], heads[0] is heads[2]] == [True, True, False]
    dead = AttentionCall(call.mask, heads_alive=np.array([True, False, True, False]))
    assert len(call_heads(operator, dead, 0, length)) == 2
    assert {runs.descriptors for runs in call_heads(operator, call, 0, length, follow=False)} == {0}


def test_tokens_that_left_are_columns_without_work() -> None:
    operator = encoder(128, layers=1, heads=1).attention()[0]
    alive = np.zeros((1, 128), np.bool_)
    alive[0, [0, 70]] = True
    (runs_,) = call_heads(operator, AttentionCall(tokens_alive=alive), 0, 128)
    assert (runs_.map() >= 0).tolist() == [[True, False, True, False]] * 8


def test_a_mask_must_lie_within_its_regions() -> None:
    operator = encoder(128, layers=1, heads=1).attention()[0]
    one = selection("s", [[templates(128)["local"]]], 128).calls[0]
    wider = AttentionCall(
        MaskArrays.from_bool(np.ones((1, 1, 128, 128), np.bool_)), regions=one.regions
    )
    with pytest.raises(MachineError, match=r"head 0 .* keeps query tile 1, key tile 2"):
        call_heads(operator, wider, 0, 128)


def test_counts_without_keys_are_refused() -> None:
    operator = encoder(128, layers=1, heads=1).attention()[0]
    call = AttentionCall(key_counts=np.full((1, 1, 128), 3))
    with pytest.raises(MachineError, match="must name the kept keys"):
        call_heads(operator, call, 0, 128)
    assert call_heads(operator, call, 0, 128, follow=False)


@given(SEEDS, st.integers(1, 400), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_cutting_keeps_every_tile(seed: int, length: int, tiles: int) -> None:
    whole = sequence(regions_of_a_head(seed), length, length, length)
    pieces, chunk = whole.cut(tiles)
    assert (pieces.map() == whole.map()).all()
    assert (pieces.begin // tiles == chunk).all()
    assert ((pieces.end - 1) // tiles == chunk).all()
    assert (np.diff(chunk * whole.query_tiles + pieces.query_tile) >= 0).all()


def test_the_largest_pass_is_dealt_first() -> None:
    pe = deal(np.array([3, 9, 4, 4, 2]), 2)
    assert np.bincount(pe, [3, 9, 4, 4, 2]).tolist() == [11.0, 11.0]
    assert deal(np.array([5, 5]), 1).tolist() == [0, 0]
