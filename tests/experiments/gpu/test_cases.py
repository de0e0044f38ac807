"""The shapes, and what a command without a card says."""

from __future__ import annotations

import pytest
import torch

from sparseloom.errors import SparseloomError
from sparseloom.experiments import end_to_end, unfused_time
from sparseloom.experiments.calibrate import Measured, check, fit
from sparseloom.experiments.gpu import card
from sparseloom.experiments.gpu.bench import bench_cuda
from sparseloom.experiments.gpu.calibrate import (
    BLOCKS,
    add_points,
    calibrate_card,
    calibration_cases,
)
from sparseloom.experiments.gpu.cases import gpu_cases
from sparseloom.experiments.on_device import hardware, timed
from sparseloom.methods import costs

no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_what_the_backend_is_measured_on() -> None:
    cases = gpu_cases()
    assert {(c.heads, c.kv_heads, c.head_dim, c.dtype, c.causal) for c in cases} == {
        (32, 32, 128, "bfloat16", True)
    }
    assert {c.q_len for c in cases} == {c.kv_len for c in cases} == {8 << 10, 32 << 10, 128 << 10}
    assert {(c.block_size, c.sparsity) for c in cases} == {
        ((rows, 1), sparsity) for rows in (64, 128) for sparsity in (0.9, 0.95, 0.99)
    }
    assert len(cases) == 18
    assert [c.q_len for c in cases] == sorted(c.q_len for c in cases)


def test_other_shapes_can_be_asked_for() -> None:
    cases = gpu_cases(lengths=(512,), blocks=((16, 1),), sparsities=(0.5,), kv_heads=8)
    assert [(c.q_len, c.block_size, c.kv_heads) for c in cases] == [(512, (16, 1), 8)]


def test_calibration_has_every_block_and_more_than_one_shape() -> None:
    cases = list(calibration_cases())
    assert {c.block_size for c in cases} == set(BLOCKS)
    for block in BLOCKS:
        some = [c for c in cases if c.block_size == block]
        assert len({c.q_len for c in some}) >= 6
        assert {(c.heads, c.causal) for c in some} == {(32, True), (8, False)}
    assert len(set(cases)) == len(cases)


@no_card
def test_without_a_card_there_is_one_sentence() -> None:
    for measure in (
        lambda: bench_cuda(gpu_cases()),
        lambda: calibrate_card(command="sparseloom bench --calibrate --device cuda"),
    ):
        with pytest.raises(SparseloomError, match=r"^--device cuda needs a CUDA device: [^.]*$"):
            measure()


def test_why_there_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert card.missing_reason() == "this build of PyTorch is for CPUs"
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "nvidia-smi" in str(card.missing_reason())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert card.missing_reason() is None


def test_the_driver_is_read_from_its_module(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(card, "_DRIVER", file)
    assert card._driver() is None
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build",
    ):
        file.write_text(f"{line}\nGCC version: gcc version 12.3.0\n")
        assert card._driver() == "570.124.06"


def test_a_table_of_a_card_is_fitted_to_what_was_measured() -> None:
    """Times that are exact sums of the rule's terms are told well."""
    measured = Measured([], [], [])
    for case in calibration_cases(lengths=(1024, 2048, 8192), blocks=((64, 1),)):
        shape = case.shape
        dense = 2e-5 + 1e-14 * costs.dense_terms(shape)["pairs"]
        seconds = {"dense": dense, "select": 1e-4 + 0.1 * dense, "attend": 0.3 * dense}
        add_points(case, seconds, measured)
    table = fit(
        measured, cpu="a card", tier="sm_90", threads=1, date="2026-01-01", command="none",
        versions={},
    )  # fmt: skip
    rows = {(row["q_len"], row["sparsity"], row["causal"]): row for row in check(table, measured)}
    long = rows[8192, 0.9, True]
    assert long["dense_expected_ms"] == pytest.approx(long["dense_ms"], rel=0.02)
    assert long["select_expected_ms"] == pytest.approx(long["select_ms"], rel=0.1)
    assert long["ratio"] == pytest.approx(0.4 + 0.1 / long["dense_ms"])
    assert set(table.dense) == {"bfloat16", "float16"}
    assert set(table.select) == {"64x1"}


def test_studies_run_where_they_are_told() -> None:
    assert set(timed({"one": lambda: None}, device="cpu", repeats=1)) == {"one"}
    assert hardware("cpu").endswith("threads")
    for plan in (unfused_time.on_card(unfused_time.PAPER), end_to_end.on_card(end_to_end.PAPER)):
        assert plan.device == "cuda"
        assert "float16" in plan.dtypes  # as on the V100
        assert plan.repeats == 7
    assert unfused_time.on_card(unfused_time.PAPER).shape == unfused_time.Shape(16, 4, 2000, 64)
    paper = end_to_end.on_card(end_to_end.PAPER)
    assert (paper.batch, paper.length, paper.layers) == (16, 2000, 4)


@no_card
def test_studies_of_a_card_refuse_to_run_elsewhere() -> None:
    with pytest.raises(SparseloomError, match="needs a CUDA device"):
        timed({"one": lambda: None}, device="cuda", repeats=1)
