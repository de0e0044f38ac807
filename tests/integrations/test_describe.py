"""What `describe` says of each family, and where its attention modules are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import transformers

from sparseloom.integrations import describe
from sparseloom.integrations.describe import attention_modules


def test_shape(zoo: SimpleNamespace, family: str) -> None:
    shape = describe(zoo.build(family))
    llama_like = family in ("llama", "mistral", "qwen2", "qwen3")
    assert shape.family == family
    assert (shape.layers, shape.hidden_size, shape.heads) == (2, 32, 4)
    assert shape.kv_heads == (2 if llama_like else 4)
    assert shape.head_dim == (16 if family == "qwen3" else 8)
    assert shape.intermediate_size == (128 if family == "gpt2" else 48)
    assert shape.vocab_size == 61
    assert shape.is_causal == (llama_like or family in ("gpt2", "gpt_neox"))
    assert shape.rotary == (llama_like or family == "gpt_neox")
    assert shape.gated_ffn == llama_like


def test_attention_modules_are_in_order(zoo: SimpleNamespace, family: str) -> None:
    model = zoo.build(family)
    found = attention_modules(model)
    names = {module: name for name, module in model.named_modules()}
    assert len(found) == 2
    assert [".0." in names[found[0]], ".1." in names[found[1]]] == [True, True]


def test_a_bert_decoder_is_causal() -> None:
    config = transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=20,
        is_decoder=True,
    )
    assert describe(transformers.BertModel(config)).is_causal


@pytest.mark.parametrize("inner", [None, 40])
def test_the_inner_size_of_gpt2(zoo: SimpleNamespace, inner: int | None) -> None:
    assert describe(zoo.build("gpt2", n_inner=inner)).intermediate_size == (inner or 128)
