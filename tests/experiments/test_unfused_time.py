"""Times of the unfused steps, and parts of studies that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sparseloom.experiments import unfused_time
from sparseloom.experiments.bench_masks import random_mask
from sparseloom.experiments.parts import kept_part
from sparseloom.kernels import sddmm, sparse_softmax, spmm

SHAPE = unfused_time.Shape(batch=1, heads=2, length=48, head_dim=16)


def test_every_step_block_and_sparsity_is_timed(tmp_path: Path) -> None:
    rows = unfused_time.run_study(unfused_time.tiny(), tmp_path)
    table = [row for row in rows if row["part"] == "table3"]
    sparse = [(row["op"], tuple(row["block_size"])) for row in table if row["block_size"]]
    assert sorted(sparse) == sorted(
        (step, block) for step in unfused_time.STEPS for block in unfused_time.BLOCKS
    )
    dense = {(row["op"], row["dtype"]) for row in table if not row["block_size"]}
    assert dense == {(s, d) for s in unfused_time.STEPS for d in ("float32", "bfloat16")}
    assert all(row["speedup"] == pytest.approx(row["baseline_ms"] / row["ms"]) for row in rows)
    assert unfused_time.run_study(unfused_time.tiny(), tmp_path) == rows


def test_what_is_timed_is_attention() -> None:
    """The three dense steps, and the three sparse ones on a full mask, are the same attention."""
    tensors = unfused_time._Tensors.draw(SHAPE, 0)
    mask = random_mask(48, 48, heads=2, block_size=(8, 1), sparsity=0.0, is_causal=False, seed=0)
    with torch.inference_mode():
        scores = tensors.dense("sddmm", torch.float32)()
        kept = sddmm(tensors.query, tensors.key, mask)
        out = spmm(sparse_softmax(kept, mask), mask, tensors.value)
    assert isinstance(scores, torch.Tensor)
    torch.testing.assert_close(out, scores.softmax(-1) @ tensors.value, atol=1e-5, rtol=1e-5)


def test_a_part_is_made_once_for_the_same_settings(tmp_path: Path) -> None:
    made: list[int] = []

    def make() -> list[int]:
        made.append(len(made))
        return list(made)

    file = tmp_path / "deep" / "part.json"
    assert kept_part(file, {"a": (1, 2)}, make) == [0]
    assert kept_part(file, {"a": (1, 2)}, make) == [0]
    assert kept_part(file, {"a": (1, 3)}, make) == [0, 1]
    assert [path.name for path in file.parent.iterdir()] == ["part.json"]
