"""`SpAtten` in decoders: its settings reach the cache; keeping everything changes nothing."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.cache_utils import DynamicCache

import sparseloom as sl
from sparseloom.models import load_model

WHOLE = sl.SpAtten(token_keep=1.0, head_keep=1.0, key_bits=(12, 4))
CHECKPOINT = Path(os.environ.get("SPARSELOOM_DATA", "")) / "ckpt_stories260K"


def test_the_built_in_model_generates_the_same_tokens() -> None:
    model: Any = load_model("stdlib").model
    ids = torch.tensor([list(b"def read(self, name):\n    return self.")])
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False}
    dense = model.generate(ids, **settings)
    with sl.sparsify(model, WHOLE) as sparse:
        assert torch.equal(model.generate(ids, **settings), dense)
    assert all(row["steps"] == 23 for row in sparse.stats())
    assert sum(row["key_high_bytes"] for row in sparse.stats()) < 0.2 * sum(
        row["dense_cache_bytes"] for row in sparse.stats()
    )


@pytest.mark.skipif(
    not (CHECKPOINT / "checkpoint_v1.bin").exists(),
    reason="SPARSELOOM_DATA has no ckpt_stories260K",
)
def test_the_stories_checkpoint_generates_the_same_tokens() -> None:
    model: Any = load_model(CHECKPOINT).model
    ids = torch.tensor([[1, 403, 407, 261, 378]])
    settings: dict[str, Any] = {"max_new_tokens": 60, "min_new_tokens": 60, "do_sample": False}
    dense = model.generate(ids, **settings)
    with sl.sparsify(model, WHOLE):
        assert torch.equal(model.generate(ids, **settings), dense)


def test_the_settings_reach_the_cache(zoo: SimpleNamespace) -> None:
    model = zoo.build("llama")
    method = sl.SpAtten(
        token_keep=(0.75, 0.5), head_keep=(1.0, 0.5), value_keep=0.25, key_bits=(6, 4),
        value_bits=8, threshold=0.0,
    )  # fmt: skip
    ids = torch.randint(3, 61, (1, 20), generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    with torch.no_grad(), sl.sparsify(model, method) as sparse:
        model(input_ids=ids[:, :19], past_key_values=cache)
        model(input_ids=ids[:, 19:], past_key_values=cache)
    first, second = sparse.stats()
    assert (first["kept_pairs"] - 4 * 190, second["kept_pairs"] - 4 * 190) == (4 * 15, 2 * 10)
    assert first["key_high_bytes"] == 15 * 2 * 8 * 6 / 8
    assert first["value_bytes"] == 4 * 3 * 8  # ⌊15 / 4⌋ for each query head, one byte a number
    assert first["low_rows"] == 0


def test_recent_is_checked() -> None:
    with pytest.raises(ValueError, match="recent must be an integer of at least 1, got 0"):
        sl.SpAtten(recent=0)


def test_ranking_by_head_is_refused(zoo: SimpleNamespace) -> None:
    model = zoo.build("llama")
    with (
        sl.sparsify(model, sl.SpAtten(granularity="head")),
        pytest.raises(NotImplementedError, match="'head' is not supported in generation"),
    ):
        model(input_ids=torch.tensor([[5, 6]]), use_cache=True)
