"""Dynamic Sparse Attention's tables: formulas against the library's own counters."""

from __future__ import annotations

import pytest
import torch

from sparseloom.experiments.reproduce import dynamic_energy as energy
from sparseloom.experiments.reproduce import dynamic_macs as macs
from sparseloom.experiments.reproduce import find_tables
from sparseloom.integrations.counts import LayerCounts
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs


def test_every_name_of_the_paper_gives_the_same_tables() -> None:
    found = find_tables("dynamic")
    assert found == find_tables("dsa_tc_2022") == find_tables("liu_2022")
    assert all(table.title for table in found)


@pytest.mark.parametrize("shape", macs.SHAPES, ids=lambda shape: shape.label)
def test_counters_agree_with_the_formula(shape: macs.Shape) -> None:
    length, width, hidden = shape.length, shape.heads * shape.head_dim, shape.hidden
    k = shape.heads * round(macs.SIGMA * shape.head_dim)
    counted = macs.counted(shape)
    assert counted.linear == 3 * length * hidden * width
    assert counted.attention == 2 * length**2 * width
    assert counted.other == length * width * hidden + 2 * length * hidden * shape.ffn
    assert counted.prediction == length * hidden * 2 * k + length**2 * k
    # A mask drops whole pairs: their number is the nearest to the share that stays.
    for sparsity in macs.SPARSITIES:
        pairs = macs.kept_macs(shape, sparsity) / (2 * width)
        assert pairs == pytest.approx((1 - sparsity) * length**2, abs=1)


def test_a_models_statistics_count_the_same() -> None:
    """What `Sparsified.stats()` adds up, on the shape of Image with an eighth of its tokens."""
    shape = macs.Shape("Image", 128, 128, 8, 8, 128)
    keep = torch.zeros(1, 1, 128, 128, dtype=torch.bool)
    keep[..., ::16] = True
    mask = SparseMask.from_bool(keep)
    tensors = [torch.zeros(1, shape.heads, shape.length, shape.head_dim) for _ in range(3)]
    inputs = AttentionInputs(
        query=tensors[0], key=tensors[1], value=tensors[2], layer=0, is_causal=False, scale=1.0
    )
    counts = LayerCounts()
    counts.add(inputs, mask, backend="none")
    assert counts.dense_macs == macs.counted(shape).attention
    assert counts.attention_macs == macs.kept_macs(shape, 1 - 1 / 16)


def test_figure_7() -> None:
    rows = macs.fig7()
    identity = [row for row in rows if row["basis"] == "identity"]
    assert len(identity) == 7 * len(macs.SHAPES)
    assert all(row["within"] for row in identity)
    assert {row["published"] for row in rows if row["basis"] == "calibrated"} == {2.79, 4.35}
    assert all(row["within"] for row in rows if row["basis"] == "calibrated")
    assert all(row["assumptions"] for row in rows if row["basis"] == "scenario")
    # The plain formula is not what the claim was made with.
    plain = [row for row in rows if row["quantity"].endswith("beside the claim")]
    assert all(row["difference"] > 0.1 for row in plain)


def test_figure_8() -> None:
    rows = energy.fig8()
    ends = rows[:2]
    assert [row["published"] for row in ends] == [1.17, 1.33]
    assert all(row["basis"] == "calibrated" and row["within"] for row in ends)
    # Any f in between keeps all three tasks within the printed overheads.
    shapes = (macs.TEXT_4K, macs.RETRIEVAL_4K, macs.IMAGE)
    assert all(0.0117 < energy.overhead(shape, 0.1165) < 0.0133 for shape in shapes)
    by_name = {row["quantity"]: row["ours"] for row in rows}
    for shape in shapes:
        saved = by_name[f"{shape.label}: energy at 95% over dense, f = 0.115"]
        assert saved == pytest.approx(energy.relative_energy(shape, 0.115))
        assert saved - energy.overhead(shape, 0.115) == pytest.approx(
            1 / macs.reduction(shape, 0.95)
        )


def test_energy_of_a_mac_at_45_nm() -> None:
    assert energy.mac_joules(32, floating=True) == pytest.approx(4.6e-12)
    assert energy.mac_joules(8) == pytest.approx(0.23e-12)
    assert energy.mac_joules(4) == pytest.approx(0.065e-12)
    assert energy.factor(4) < energy.factor(8) < energy.CALIBRATED[0]
