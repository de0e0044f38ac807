"""Calibration on a tiny model, from Python and stored with the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sparseloom.integrations import sparsify
from sparseloom.methods import DynamicSparse, Elsa, SlidingWindow
from sparseloom.training import calibrate, load, save

pytest.importorskip("accelerate", reason="training needs the train extra")


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).train()


def test_thresholds_come_from_the_dense_model_and_are_stored_with_it(tmp_path: Path) -> None:
    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.randint(0, 32, (3, 2, 40), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": one, "labels": one} for one in ids]
    method = calibrate(model, Elsa(p=2.0), batches)
    assert method.thresholds is not None
    assert [len(heads) for heads in method.thresholds] == [1, 1]
    assert model.training
    assert all(torch.equal(before[n], tensor) for n, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.eval()
    with torch.no_grad(), sparsify(model, method) as sparse:
        model(input_ids=ids[0])
    assert all(0.05 < row["density"] < 0.8 for row in sparse.stats())
    save(model, method, tmp_path / "tuned")
    assert load(tmp_path / "tuned")[1] == method


def test_what_cannot_be_calibrated() -> None:
    with pytest.raises(ValueError, match="method must be one that is calibrated"):
        calibrate(tiny(), cast("Any", SlidingWindow(width=3)), [])
    with pytest.raises(ValueError, match="calls must hold every layer"):
        calibrate(tiny(), Elsa(), [])
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.int64)}
    with pytest.raises(ValueError, match="no trained predictor"):
        calibrate(tiny(), DynamicSparse(selection="threshold"), [batch])
