"""Every kind of predictor learns on a tiny model, alone and with it, and is stored and read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sparseloom.integrations import method_shape, sparsify
from sparseloom.methods import (
    AttentionGate,
    DynamicSparse,
    LightningIndexer,
    Oracle,
    Predicting,
    RandomMask,
    SlidingWindow,
)
from sparseloom.training import SparsityRamp, adapt, finetune, load, save

pytest.importorskip("accelerate", reason="training needs the train extra")

PREDICTORS: dict[str, Predicting] = {
    "gate": AttentionGate(sparsity=0.6, block_size=(4, 4), width=16, minimum_keys=4),
    "indexer": LightningIndexer(sparsity=0.7, width=16, index_heads=4, minimum_keys=4),
    "shared": DynamicSparse(sparsity=0.7, projection=0.5, minimum_keys=4, mask_heads="one"),
    "ternary": DynamicSparse(
        sparsity=0.7, projection=1.0, bits=2, twos_complement=True, minimum_keys=4
    ),
}


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,  # peaked attention, so that there is something to predict
    )
    return LlamaForCausalLM(config).eval()


def batches(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(0, 32, (2, 48), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in drawn]


def retained(model: Any, method: Any) -> float:
    """Mean mass over layers, of what the oracle retains."""
    with torch.no_grad(), sparsify(model, method, diagnose=True) as sparse:
        model(input_ids=batches(1, seed=99)[0]["input_ids"])
    rows = sparse.stats()
    return sum(row["retained_mass"] / row["oracle_mass"] for row in rows) / len(rows)


@pytest.mark.parametrize("name", PREDICTORS)
def test_warm_up_finds_the_mass_and_leaves_the_model(name: str, tmp_path: Path) -> None:
    model, method = tiny_llama(), PREDICTORS[name]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    fresh = method.initialise(method_shape(model))
    adapted = adapt(model, method, batches(8), warmup_steps=60, predictor_lr=1e-2, progress=False)
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    found = retained(model, adapted)
    random = RandomMask(sparsity=method.sparsity, minimum_keys=4)  # pyright: ignore[reportAttributeAccessIssue]
    assert found > retained(model, fresh) + 0.05
    assert found > retained(model, random) + 0.05
    save(model, adapted, tmp_path / "saved")
    again, stored = load(tmp_path / "saved")
    assert stored == adapted
    assert retained(again, stored) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("name", ["gate", "indexer"])
def test_joint_steps_train_both(name: str) -> None:
    model = tiny_llama()
    method = PREDICTORS[name].initialise(method_shape(model))
    assert method.module is not None
    before = {key: tensor.clone() for key, tensor in method.module.state_dict().items()}
    log = finetune(model, method, batches(2), steps=20, lr=5e-3, progress=False)
    assert set(log[0]) == {"step", "loss", "kl"}
    assert log[-1]["loss"] < log[0]["loss"]
    changed = [not torch.equal(before[k], t) for k, t in method.module.state_dict().items()]
    assert all(changed)


@pytest.mark.parametrize("name", ["gate", "indexer"])
def test_a_loss_that_does_not_suit_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"loss must be one of 'kl' for {name}, got 'mse'"):
        adapt(tiny_llama(), PREDICTORS[name], batches(1), warmup_steps=1, loss="mse")


def test_from_scratch_both_learn_from_the_first_step() -> None:
    model = tiny_llama()
    method = DynamicSparse(sparsity=0.7, projection=0.5, bits=2, minimum_keys=4)
    first = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapted = adapt(
        model, method, batches(4), warmup_steps=0, joint_steps=30, lr=5e-3, progress=False
    )
    assert adapted.predictor is not None
    assert int(adapted.predictor.layers[0].updates) == 30  # quantised from the start
    assert any(not torch.equal(first[key], t) for key, t in model.state_dict().items())


def test_sparsity_rises_to_the_method_s_own() -> None:
    ramp, method = SparsityRamp(0.5, share=0.5), RandomMask(sparsity=0.9, minimum_keys=1)
    levels = [ramp.at(method, step, 8).sparsity for step in range(8)]  # pyright: ignore[reportAttributeAccessIssue]
    assert levels == pytest.approx([0.5, 0.6, 0.7, 0.8, *[0.9] * 4])
    assert ramp.at(RandomMask(sparsity=0.4), 0, 8).sparsity == 0.4  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="ramp must be none for window, which has no sparsity"):
        ramp.at(SlidingWindow(width=4), 0, 8)
    with pytest.raises(ValueError, match=r"ramp must be none for oracle"):
        ramp.at(Oracle(threshold=0.1), 0, 8)
    with pytest.raises(ValueError, match=r"start of the ramp must be in \[0, 1\), got 1.0"):
        SparsityRamp(1.0)
    with pytest.raises(ValueError, match=r"share of the ramp must be in \(0, 1\], got 0"):
        SparsityRamp(0.5, share=0.0)


def test_the_ramp_is_what_the_model_runs() -> None:
    seen: list[float] = []

    @dataclasses.dataclass(frozen=True)
    class Watched(RandomMask):
        """Notes its sparsity in every call."""

        def select(self, inputs: Any) -> Any:
            seen.append(self.sparsity)
            return super().select(inputs)

    method = Watched(sparsity=0.8, minimum_keys=1)
    finetune(tiny_llama(), method, batches(1), steps=4, ramp=SparsityRamp(0.4, 0.5), progress=False)
    assert seen[::2] == pytest.approx([0.4, 0.6, 0.8, 0.8])  # two layers
