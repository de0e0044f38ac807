from __future__ import annotations

import lzma

import numpy as np
import pytest

from sparseloom.tasks.compressors import (
    bit_probabilities,
    context_mixture_bits_per_byte,
    xz_bits_per_byte,
)

RANDOM = np.random.default_rng(0)
NOISE = RANDOM.integers(0, 256, 3000, dtype=np.uint8).tobytes()
CODE = b"".join(b"def f%d(x):\n    return x + %d\n" % (i, i * i) for i in range(300))


def test_xz_is_the_size_of_the_file_or_its_growth() -> None:
    assert xz_bits_per_byte(CODE) == 8 * len(lzma.compress(CODE, preset=9)) / len(CODE)
    assert xz_bits_per_byte(NOISE, NOISE) < 0.5 < 8.0 < xz_bits_per_byte(NOISE)
    with pytest.raises(ValueError, match="held_out must not be empty"):
        xz_bits_per_byte(b"", CODE)


def test_noise_cannot_be_compressed_and_repetition_nearly_vanishes() -> None:
    assert 8.0 < context_mixture_bits_per_byte(NOISE, table_bits=12) < 9.5
    assert context_mixture_bits_per_byte(b"abcdefgh" * 2000, table_bits=10) < 0.03


def test_it_learns_from_the_training_text() -> None:
    cut = len(CODE) // 2
    alone = context_mixture_bits_per_byte(CODE[cut:], table_bits=14)
    after = context_mixture_bits_per_byte(CODE[cut:], CODE[:cut], table_bits=14)
    assert after < 0.9 * alone
    assert after < xz_bits_per_byte(CODE[cut:], CODE[:cut])


def test_longer_contexts_help_text_that_has_them() -> None:
    by_order = [context_mixture_bits_per_byte(CODE, order=n, table_bits=14) for n in (0, 1, 3)]
    assert by_order[0] > 1.5 * by_order[1] > 1.5 * by_order[2]


def test_each_bit_is_predicted_before_it_is_seen() -> None:
    """What a decoder needs: a prediction depends on nothing that comes after it."""
    same = 200
    one = bit_probabilities(CODE[:same] + NOISE[:100], table_bits=10)
    two = bit_probabilities(CODE[:same] + bytes(300), table_bits=10)
    np.testing.assert_array_equal(one[: 8 * same + 1], two[: 8 * same + 1])
    assert not np.array_equal(one[8 * same + 1 :], two[8 * same + 1 : len(one)])
    assert len(one) == 8 * (same + 100)


@pytest.mark.parametrize("text", [NOISE, bytes(30_000), b"\xff" * 30_000])
def test_probabilities_lie_strictly_between_0_and_1(text: bytes) -> None:
    ones = bit_probabilities(text, table_bits=8)
    assert np.all(ones > 0.0)
    assert np.all(ones < 1.0)


def test_results_do_not_depend_on_the_slices_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    every = bit_probabilities(CODE, table_bits=12)
    monkeypatch.setattr("sparseloom.tasks.compressors._SLICE", 1000)
    ones = bit_probabilities(
        CODE, len(CODE) - 500, table_bits=12, progress=lambda *at: seen.append(at)
    )
    assert len(seen) == -(-len(CODE) // 1000)
    assert seen[-1] == (len(CODE), len(CODE))
    np.testing.assert_array_equal(ones, every[-4000:])


def test_a_full_table_still_predicts() -> None:
    tight = context_mixture_bits_per_byte(CODE, table_bits=8)
    roomy = context_mixture_bits_per_byte(CODE, table_bits=14)
    assert roomy < tight < 8.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": 3}, r"first must be in \[0, 3\)"),
        ({"order": 9}, r"order must be in \[0, 8\], got 9"),
        ({"table_bits": 7}, r"table_bits must be in \[8, 28\], got 7"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bit_probabilities(b"abc", **settings)
