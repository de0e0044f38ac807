"""Entropy by head: of known attention, and as a page."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from sparseloom.methods import AttentionInputs
from sparseloom.report.entropy import summary, write_entropy_page
from sparseloom.results import results
from sparseloom.training.entropy_statistics import EntropyGauge, HeadEntropy


def call(which: torch.Tensor, sharpness: float = 60.0, length: int = 8) -> AttentionInputs:
    """Head 0 is uniform; in head 1 all queries of input b attend to key `which[b]`."""
    batch = len(which)
    query, key = torch.zeros(batch, 2, length, 1), torch.zeros(batch, 2, length, 1)
    query[:, 1] = sharpness
    key[torch.arange(batch), 1, which] = 1.0
    return AttentionInputs(query=query, key=key, layer=0, is_causal=False, scale=1.0)


def test_uniform_fixed_and_moving_heads() -> None:
    gauge = EntropyGauge(every=3)
    one = call(torch.tensor([1, 1]))
    gauge.on_attention(one, None, one.query)
    uniform, fixed = gauge.result(2)
    assert uniform.entropy == pytest.approx(1.0)
    assert uniform.effective_keys == pytest.approx(8.0)
    assert (fixed.entropy, fixed.mean_entropy, fixed.mutual) == pytest.approx((0, 0, 0), abs=1e-4)
    two = call(torch.tensor([5, 5]))
    gauge.on_attention(two, None, two.query)
    uniform, moving = gauge.result(4)
    assert uniform.mutual == pytest.approx(0.0, abs=1e-5)
    assert moving.entropy == pytest.approx(0.0, abs=1e-4)
    assert moving.mutual == pytest.approx(math.log(2) / math.log(8), rel=1e-3)
    assert moving.inputs == 4


def test_inputs_of_several_lengths_and_padding() -> None:
    gauge = EntropyGauge(every=1)
    long, short = call(torch.tensor([1, 1])), call(torch.tensor([1]), length=5)
    real = torch.ones(2, 8, dtype=torch.bool)
    real[1, 4:] = False
    gauge.on_attention(dataclasses.replace(long, key_padding=real), None, long.query)
    gauge.on_attention(short, None, short.query)
    uniform, _ = gauge.result(3)
    assert 4 < uniform.effective_keys < 8
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        EntropyGauge(0)


def test_the_page(tmp_path: Path) -> None:
    heads = [
        HeadEntropy(layer, head, 0.2 * layer, 0.5, 4.0, 0.1 * head, 9)
        for layer in range(2)
        for head in range(3)
    ]
    told = {"record": "entropy", "model": "tiny", "data": "words"}
    rows = [{**told, **dataclasses.asdict(head)} for head in heads]
    write_entropy_page(tmp_path / "page.html", results(rows, command="test"))
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "How tiny spreads its attention" in page
    assert "<td>0.200</td>" in page
    assert page.count('class="plotly-graph-div"') == 4
    assert "Layer 0, head 2 moves most" in summary(rows)[2]
