"""Methods that replace or restrict attention train inside a model, and are stored with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from sparseloom.integrations import method_shape, sparsify
from sparseloom.methods import Attender, Learned, Method, parse_method
from sparseloom.training import finetune, load, save

pytest.importorskip("accelerate", reason="training needs the train extra")

METHODS = [
    "linformer:rank=8",
    "linformer:rank=8,share_kv=true",
    "performer",
    "performer:kernel=relu,features=0",
    "reformer:rounds=2,bucket_size=8",
    "sinkhorn:block=6",
    "synthesizer:rank=4",
    "synthesizer:variant=random",
    "synthesizer:variant=dense",
    "synthesizer:variant=factorized_dense",
    "linear",
    "blocklocal:block=6",
    "fixed:stride=6,columns=2",
    "strided:stride=5",
    "longformer:window=6",
    "bigbird:block=4,random_blocks=1",
    "spatten:token_keep=0.75,head_keep=0.75",
]


def bert(dropout: float = 0.1) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        attention_probs_dropout_prob=dropout,
        hidden_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).eval()


def batch(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 32, (8, 24), generator=generator)
    mask = torch.ones_like(ids)
    mask[::2, 20:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": (ids[:, 1] > 16).long()}


def ready(text: str, model: Any) -> Method:
    method = parse_method(text)
    return method.initialise(method_shape(model)) if isinstance(method, Learned) else method


@pytest.mark.parametrize("text", METHODS)
def test_it_learns_in_a_model_and_is_stored_with_it(text: str, tmp_path: Path) -> None:
    model = bert()
    method = ready(text, model)
    before = {}
    if isinstance(method, Learned):
        assert method.module is not None
        before = {name: p.clone() for name, p in method.module.named_parameters()}
    log = finetune(model, method, [batch()], steps=25, lr=5e-3, predictor_lr=5e-3, progress=False)
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    if isinstance(method, Learned):
        assert method.module is not None
        for name, parameter in method.module.named_parameters():
            assert not torch.equal(parameter, before[name]), name
    save(model, method, tmp_path / "model")
    again, stored = load(tmp_path / "model")
    assert stored == method
    inputs = {key: value for key, value in batch(1).items() if key != "labels"}
    with torch.no_grad(), sparsify(model, method) as ours:
        expected = model(**inputs).logits
    with torch.no_grad(), sparsify(again, stored) as theirs:
        torch.testing.assert_close(again(**inputs).logits, expected)
    (row, _), (same, _) = ours.stats(), theirs.stats()
    assert row == same
    if isinstance(method, Attender):
        assert (row["ran"], row["dense_calls"], row["density"]) == ("replaced", 0, 1.0)
        shape = (8, 4, 24, 8)
        assert row["attention_macs"] > 0
        assert row["dense_macs"] == shape[0] // 2 * 4 * (24 * 24 + 24 * 20) * 2 * 8


@pytest.mark.parametrize("text", ["linformer:rank=8", "sinkhorn:block=6"])
def test_methods_without_a_causal_form_refuse_causal_models(text: str) -> None:
    model = llama()
    method = ready(text, model)
    with sparsify(model, method), pytest.raises(NotImplementedError, match="bidirectional models"):
        model(input_ids=batch()["input_ids"])


def llama() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "text",
    [
        "performer:features=16",
        "performer:kernel=relu,features=0",
        "linear",
        "synthesizer",
        "synthesizer:variant=factorized_dense",
        "longformer:window=4",
        "bigbird:block=2",
        "strided:stride=3,block=2",
        "fixed:stride=3,columns=1,parts=heads",
        "blocklocal:block=3,shifts=0x1",
    ],
)
def test_causal_forms_generate_with_a_cache_as_without(text: str) -> None:
    model = llama()
    method = ready(text, model)
    ids = batch()["input_ids"][:2, :8]
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with torch.no_grad(), sparsify(model, method):
        cached = model.generate(ids, **settings)
        plain = model.generate(ids, use_cache=False, **settings)
    assert torch.equal(cached, plain)
    assert cached.shape == (2, 14)


def test_shared_queries_and_keys_refuse_a_cache() -> None:
    model = llama()
    method = ready("reformer:bucket_size=4", model)
    ids = batch()["input_ids"][:2, :8]
    with torch.no_grad(), sparsify(model, method):
        model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False)
        with pytest.raises(NotImplementedError, match="reformer needs all tokens at once"):
            model.generate(ids, max_new_tokens=3, do_sample=False)
