"""Facts that SpAtten's paper and repository state, each on our own code.

Beside these: importance as column sums, in `test_spatten`; the top-k engine on the figure's and the
slides' examples, its zero eliminator on Fig. 10 and the softmax bound in 12 bits, in
`hardware/units`; bit planes by hand and over all codes, in `test_quantize`.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseloom.kernels.planes import PlaneCache
from sparseloom.methods.cascade import largest, slots_of
from sparseloom.methods.generation import listed


def test_top_k_of_figure_9() -> None:
    """HPCA 2021, Fig. 9: the top 3 of [0.6 0.1 0.5 1.2 0.6]; Algorithm 3 as printed misses 0.6."""
    row = torch.tensor([[0.6, 0.1, 0.5, 1.2, 0.6]])
    assert largest(row, torch.tensor([3])).tolist() == [[True, False, False, True, True]]
    assert largest(row, torch.tensor([2])).tolist() == [[True, False, False, True, False]]


def test_what_is_kept_is_packed_in_order_as_in_figure_10() -> None:
    """HPCA 2021, Fig. 10: [a 0 b 0 c d 0 e] becomes [a b c d e], in encoders and in generation."""
    kept = torch.tensor([[1, 0, 1, 0, 1, 1, 0, 1]]).bool()
    slots, counts = slots_of(kept)
    assert slots.tolist() == [[0, 2, 4, 5, 7]]
    assert bool(counts.all())
    assert listed(kept[:, None], None).tolist() == [[[0, 2, 4, 5, 7]]]


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 64), st.floats(-8, 8), st.floats(0.1, 10))
def test_a_score_error_moves_probabilities_by_half_of_it_at_most(
    seed: int, keys: int, by: float, spread: float
) -> None:
    """HPCA 2021, Eq. 1-2: Σ|Δp| <= |Δs| / 2, since dp/ds = p (1 - p) <= 1/4."""
    generator = torch.Generator().manual_seed(seed)
    scores = spread * torch.randn(keys, generator=generator, dtype=torch.float64)
    moved = scores.clone()
    moved[0] += by
    change = (moved.softmax(0) - scores.softmax(0)).abs().sum()
    assert float(change) <= abs(by) / 2 + 1e-12


def test_a_full_key_is_its_planes_side_by_side() -> None:
    """mit-han-lab/spatten, MatrixFetcher: key = msb << 4 | lsb; its high plane alone: msb << 4."""
    key = torch.randn(2, 3, 9, 8, generator=torch.Generator().manual_seed(0))
    for msb_bits in (4, 6, 8, 10, 12):  # the five widths of §III-D
        planes = PlaneCache.from_tensors(key, key, msb_bits=msb_bits, lsb_bits=4)
        full = planes.full_keys(planes.key_msb, planes.key_lsb)
        msb, high = planes.key_msb.int(), planes.high_keys(planes.key_msb)
        assert torch.equal(high, msb << 4)
        low = full & 15
        assert torch.equal(full, (msb << 4) | low)
        assert torch.equal(full - high, low)
        assert full.abs().max() == 2 ** (msb_bits + 3) - 1
