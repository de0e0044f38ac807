"""The loaded library runs the tier that was asked for."""

from __future__ import annotations

from types import ModuleType

import pytest

from sparseloom.kernels.cpu import native

LANES = {"portable": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16, "amx": 16}


def test_a_tier_runs_the_code_that_was_compiled_for_it(tier: str) -> None:
    assert native.active_tier() == tier
    assert native.TIERS[native.library().tier_rank()] == tier
    assert native.library().tier_lanes() == LANES[tier]


def test_the_tier_before_comes_back_after_an_error() -> None:
    before = native.active_tier()

    def fail() -> None:
        with native.use_tier("portable"):
            assert native.active_tier() == "portable"
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert native.active_tier() == before


def test_an_unknown_tier_is_refused_with_the_ones_there_are() -> None:
    with (
        pytest.raises(ValueError, match=r"unknown tier 'avx512_bf'; did you mean 'avx512_bf16'"),
        native.use_tier("avx512_bf"),
    ):
        pass


def test_a_tier_that_the_processor_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = ModuleType("narrow")
    monkeypatch.setattr(narrow, "widest_tier", lambda: 1, raising=False)
    monkeypatch.setattr(narrow, "active_tier", lambda: 1, raising=False)
    monkeypatch.setattr(native, "library", lambda: narrow)
    assert native.available_tiers() == ("portable", "avx2")
    with (
        pytest.raises(ValueError, match="tier must be at most 'avx2' on this machine, got 'amx'"),
        native.use_tier("amx"),
    ):
        pass
