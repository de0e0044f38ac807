"""Times and memory of whole encoders, on a tiny one."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest
import torch

from sparseloom.experiments import end_to_end
from sparseloom.experiments.bench_memory import memory_of_call
from sparseloom.experiments.end_to_end import EAGER, SDPA, Plan, Setup, run_study
from sparseloom.methods import DynamicSparse, parse_method

TINY = Plan(batch=1, length=64, layers=1, repeats=1, dtypes=("float32",))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("DSA-95, 1×8", "Linformer")
    monkeypatch.setattr(end_to_end, "METHODS", {x: end_to_end.METHODS[x] for x in names})


def test_methods_are_the_published_ones() -> None:
    for name, text in end_to_end.METHODS.items():
        method = parse_method(text)
        if name.startswith("DSA"):
            assert isinstance(method, DynamicSparse)
            assert (method.bits, method.projection, method.rotary) == (8, 0.25, False)
            assert name.startswith(f"DSA-{round(100 * method.sparsity)}")
    assert {"Performer", "Reformer", "Linformer"} < set(end_to_end.METHODS)


def test_study_times_every_contender_and_goes_on_where_it_was(
    few: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = {op: {SDPA: 1, EAGER: 2} for op in ("attention", "model")}
    monkeypatch.setattr(end_to_end, "_peaks_elsewhere", lambda *_: peaks)
    rows = run_study(TINY, tmp_path)
    names = [SDPA, EAGER, "DSA-95, 1×8", "Linformer"]
    assert [(row["op"], row["contender"]) for row in rows] == [
        (op, name) for op in ("attention", "model") for name in names
    ]
    assert all(row["ms"] > 0 and row["q_len"] == 64 for row in rows)
    assert rows[1]["peak_bytes"] == 2
    assert "peak_bytes" not in rows[2]

    def never(*_: object) -> object:
        raise AssertionError("timed again")

    monkeypatch.setattr(end_to_end, "time_all", never)
    assert run_study(TINY, tmp_path) == rows


def test_contenders_of_the_model_do_what_they_are_called(few: None) -> None:
    setup = Setup.make(TINY, "float32", 0)
    with torch.inference_mode():
        runs = setup.runs()
        assert list(runs["attention"]) == list(runs["model"])
        before = setup.model.config._attn_implementation
        for run in runs["model"].values():
            run()
        assert setup.model.config._attn_implementation == before == "sdpa"
    method = setup.methods["DSA-95, 1×8"]
    assert isinstance(method, DynamicSparse)
    assert method.predictor is not None
    assert int(method.predictor.layers[0].updates) == 1  # its scales are set


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells peaks on Linux")
def test_memory_of_a_call() -> None:
    data = bytes(64 << 20)
    # Mapped rather than allocated: what malloc keeps of earlier tests takes no part.
    peak = memory_of_call(lambda: mmap.mmap(-1, len(data)).write(data))
    if peak is None:
        pytest.skip("the system does not tell")
    assert (60 << 20) < peak < (90 << 20)
