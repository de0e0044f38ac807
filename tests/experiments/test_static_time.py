"""The command that times static masks: its masks, and the result it stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from sparseloom import regions as rg
from sparseloom.experiments.static_time import (
    DENSITY,
    drawn_head,
    time_learned,
    time_rows,
    with_means,
)
from sparseloom.integrations import method_shape
from sparseloom.methods import Dense, StaticSparse
from sparseloom.results import read_results
from sparseloom.training import save

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("n", [256, 512, 2048])
def test_drawn_heads_use_their_share_and_leave_no_query_alone(n: int) -> None:
    rng = np.random.default_rng(n)
    heads = [drawn_head(n, 0.38, rng) for _ in range(8)]
    for head in heads:
        assert rg.density(head, n, n) <= 0.38
        rg.check_rows(head, n, n)
        rg.encode_heads([head])
        assert (rg.owners(with_means(head, n), n, n) >= 0).all()
    assert np.mean([rg.density(head, n, n) for head in heads]) > 0.25
    assert len(set(heads)) == 8


def test_times_stand_beside_what_was_computed() -> None:
    found = time_rows(512, 8, torch.float32, heads=2, repeats=1)
    dense, static, means = found
    assert dense["speedup"] == 1.0
    assert static["contender"] == "static"
    assert 0 < static["density"] <= DENSITY
    # A tile of means costs a quarter; packing adds a little.
    assert 0.25 < means["density"] <= DENSITY + 0.05
    assert all(row["ms"] > 0 and row["threads"] >= 1 for row in found)


def test_a_causal_model_is_timed_beside_causal_attention(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=160,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    method = StaticSparse(density=0.6).initialise(method_shape(model))
    save(model, method, tmp_path / "static")
    dense, learned = time_learned(tmp_path / "static", torch.float32, tokens=160, repeats=1)
    assert dense["causal"]
    assert learned["causal"]
    assert 0.3 < learned["density"] <= 0.6


def test_regions_of_a_saved_model_are_timed_at_all_their_lengths(tmp_path: Path) -> None:
    config = BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, max_position_embeddings=160,
    )  # fmt: skip
    model = BertForSequenceClassification(config)
    method = StaticSparse(density=0.6).initialise(method_shape(model))
    save(model, method, tmp_path / "static")
    dense, learned = time_learned(tmp_path / "static", torch.float32, tokens=160, repeats=1)
    assert (dense["contender"], dense["q_len"]) == ("dense SDPA", 160)
    assert learned["contender"] == "learned, static"
    assert 0 < learned["density"] <= 0.6
    assert learned["layers"] == model.config.num_hidden_layers
    save(model, Dense(), tmp_path / "dense")
    with pytest.raises(ValueError, match="folders must hold models with static regions, got"):
        time_learned(tmp_path / "dense", torch.float32)


def test_stored_static_masks_are_faster_than_dense_attention() -> None:
    """At 512 and 2048 tokens 1.8 times or more, drawn or learned."""
    stored = [row.model_dump() for row in read_results(ROOT / "results/static_time.json").rows]
    static = [row for row in stored if row.get("contender") == "static"]
    assert {(row["q_len"], row["dtype"]) for row in static} == {
        (n, dtype) for n in (512, 2048) for dtype in ("float32", "bfloat16")
    }
    assert all(row["density"] <= DENSITY for row in static)
    more = [row.model_dump() for row in read_results(ROOT / "results/static_time_bytes.json").rows]
    learned = [row for row in (*stored, *more) if row["contender"].startswith("learned")]
    assert {(row["q_len"], row["dtype"]) for row in learned} >= {
        (n, dtype) for n in (512, 2048) for dtype in ("float32", "bfloat16")
    }
    means = [row for row in stored if row["contender"] == "static with means"]
    assert min(row["speedup"] for row in (*static, *learned, *means)) >= 1.8
    lines = (ROOT / "docs/static.md").read_text("utf-8").splitlines()
    for row in static:
        key = f"| {row['q_len']} | {row['head_dim']} | {row['dtype']} |"
        line = next(line for line in lines if line.startswith(key))
        assert f" {row['speedup']:.1f}× " in line
    for row in learned:
        name = row["contender"].removeprefix("learned, ")
        key = f"| {name} | {row['q_len']} | {row['dtype']} |"
        line = next(line for line in lines if line.startswith(key))
        assert f" {row['speedup']:.1f}× " in line
