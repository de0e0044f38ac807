"""What cannot be computed faithfully is refused in one clear sentence, never ignored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

from sparseloom.integrations import describe, sparsify
from sparseloom.integrations.call import attention_function
from sparseloom.integrations.padding import PaddingReader
from sparseloom.methods import H2O, AttentionInputs, Dense, Oracle, Pruner, SpAtten

SPARSE = Oracle(sparsity=0.5, minimum_keys=2)
TINY: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 61,
}


@torch.no_grad()
def test_static_cache(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("none", length=6)
    with sparsify(model, SPARSE), pytest.raises(NotImplementedError, match="static cache"):
        model.generate(**inputs, max_new_tokens=3, cache_implementation="static")
    kind = {"config": model.config, "max_cache_len": 12}
    with sparsify(model, SPARSE), pytest.raises(NotImplementedError, match="static cache"):
        model(**inputs, past_key_values=transformers.StaticCache(**kind))


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("softcap", 30.0, "soft-capped scores"),
        ("s_aux", torch.zeros(2), "attention sinks"),
        ("position_bias", torch.zeros(1, 2, 4, 4), "a position bias"),
        ("head_mask", torch.ones(2), "a mask over heads"),
        ("output_attentions", True, "attention matrices"),
        ("sliding_window", 3, "own window of 3 tokens is shorter than the 4 tokens"),
    ],
)
def test_arguments_that_change_the_result(name: str, value: object, sentence: str) -> None:
    states = torch.randn(1, 2, 4, 8)
    harmless: dict[str, Any] = {"softcap": None, "output_attentions": False, "sliding_window": 4}
    out, _ = attention_function(nn.Identity(), states, states, states, None, **harmless)
    assert out.shape == (1, 4, 2, 8)
    with pytest.raises(NotImplementedError, match=sentence):
        attention_function(nn.Identity(), states, states, states, None, **{name: value})


@torch.no_grad()
def test_a_model_with_soft_capped_scores() -> None:
    small = {**TINY, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    gemma = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**small)).eval()
    ids = torch.arange(8)[None]
    with sparsify(gemma, Dense()), pytest.raises(NotImplementedError, match=r"^softcap: "):
        gemma(input_ids=ids)


@torch.no_grad()
def test_a_window_of_the_model_that_matters(zoo: SimpleNamespace) -> None:
    model, inputs = zoo.build("mistral", sliding_window=20), zoo.inputs("none", length=24)
    short = {name: tensor[:, :20] for name, tensor in inputs.items()}
    expected = model(**short)[0]
    with sparsify(model, zoo.everything):
        torch.testing.assert_close(model(**short)[0], expected, rtol=1e-5, atol=1e-5)
        with pytest.raises(NotImplementedError, match="window of 20 tokens"):
            model(**inputs)
        with pytest.raises(NotImplementedError, match="window of 20 tokens"):
            model.generate(**short, max_new_tokens=3, min_new_tokens=3, do_sample=False)


@torch.no_grad()
def test_packed_sequences(zoo: SimpleNamespace) -> None:
    model, ids = zoo.build("llama"), zoo.inputs("none")["input_ids"]
    one = torch.arange(24)[None].expand(3, -1)
    two = torch.cat([torch.arange(14), torch.arange(10)])[None].expand(3, -1)
    expected = model(input_ids=ids, position_ids=one, use_cache=False)[0]
    with sparsify(model, zoo.everything):
        found = model(input_ids=ids, position_ids=one, use_cache=False)[0]
        with pytest.raises(NotImplementedError, match="packed into one row"):
            model(input_ids=ids, position_ids=two, use_cache=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.eye(24, dtype=torch.bool)[None, None], "only causality and padding"),
        (torch.ones(24, 24, dtype=torch.bool)[None, None], "only causality and padding"),
        (-torch.rand(1, 1, 24, 24), "position bias"),
        (torch.ones(1, 4, 24, 24, dtype=torch.bool), "one mask per head"),
    ],
)
def test_masks_that_say_more(zoo: SimpleNamespace, mask: Tensor, sentence: str) -> None:
    model, ids = zoo.build("llama"), zoo.inputs("none")["input_ids"]
    with sparsify(model, SPARSE), pytest.raises(NotImplementedError, match=sentence):
        model(input_ids=ids, attention_mask=mask)


@torch.no_grad()
def test_attention_outputs(zoo: SimpleNamespace, family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs("none")
    with sparsify(model, SPARSE), pytest.raises(NotImplementedError, match=r"^output_attentions: "):
        model(**inputs, output_attentions=True)


def test_quantised_and_other_caches(zoo: SimpleNamespace) -> None:
    from transformers.cache_utils import Cache, DynamicLayer

    class Odd(DynamicLayer):
        """A layer whose keys may not be what they seem."""

    model, inputs = zoo.build("llama"), zoo.inputs("none")
    cache = Cache(layers=[Odd(), Odd()])
    with sparsify(model, SPARSE), pytest.raises(NotImplementedError, match="a cache of Odd"):
        model(**inputs, past_key_values=cache)


def _t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "num_layers": 1, "num_heads": 2, "d_ff": 16}
    return transformers.T5Model(transformers.T5Config(**sizes, vocab_size=61))


def _cross() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=61, add_cross_attention=True
    )
    return transformers.GPT2Model(config)


def _albert() -> nn.Module:
    return transformers.AlbertModel(transformers.AlbertConfig(**TINY, embedding_size=16))


def _bloom() -> nn.Module:
    sizes = {"hidden_size": 16, "n_layer": 1, "n_head": 2, "vocab_size": 61}
    return transformers.BloomModel(transformers.BloomConfig(**sizes))


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (_t5, "has cross-attention"),
        (_cross, "has cross-attention"),
        (_albert, "each layer must have its own"),
        (_bloom, "does not follow the attention interface"),
    ],
)
def test_models_of_other_kinds(make: Callable[[], nn.Module], sentence: str) -> None:
    with pytest.raises(NotImplementedError, match=sentence), sparsify(make(), SPARSE):
        pass


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="model must be a Hugging Face model, got Linear"):
        sparsify(nn.Linear(2, 2), SPARSE)
    with pytest.raises(TypeError, match="model must be a Hugging Face model, got Linear"):
        describe(nn.Linear(2, 2))


@dataclass(frozen=True)
class Leaver(Pruner):
    """Prunes in a way that encoders have no use for."""

    name: ClassVar[str] = "leaver"

    def prune(
        self, inputs: AttentionInputs, key_importance: Any, head_importance: Any, state: Any = None
    ) -> Any:
        """Never called."""
        raise AssertionError


def test_methods_and_backends(zoo: SimpleNamespace) -> None:
    model = zoo.build("bert")
    assert sparsify(model, [SPARSE]).method is SPARSE
    with pytest.raises(NotImplementedError, match="2 methods cannot be composed yet"):
        sparsify(model, [SPARSE, Dense()])
    with pytest.raises(NotImplementedError, match="0 methods cannot be composed yet"):
        sparsify(model, [])
    with (
        pytest.raises(NotImplementedError, match="leaver prunes caches, and BertModel has none"),
        sparsify(model, Leaver()),
    ):
        pass
    with pytest.raises(ValueError, match="unknown backend 'flax'; did you mean 'flex'"):
        sparsify(model, SPARSE, backend="flax")
    with pytest.raises(ValueError, match="unknown when 'allways'; did you mean 'always'"):
        sparsify(model, SPARSE, when="allways")


def test_what_shortens_the_sequence_is_not_exchanged_inside_the_block(
    zoo: SimpleNamespace,
) -> None:
    model, shorter = zoo.build("bert"), SpAtten(token_keep=0.7, head_keep=None)
    message = "cannot take the place of .* makes the sequence shorter"
    with sparsify(model, SPARSE) as sparse:
        with pytest.raises(NotImplementedError, match=message):
            sparse.use(shorter)
        sparse.use(Dense())
        assert sparse.method == Dense()
    with sparsify(model, shorter) as sparse:
        sparse.use(shorter)
        for other in (Dense(), SpAtten(token_keep=0.8, head_keep=None)):
            with pytest.raises(NotImplementedError, match=message):
                sparse.use(other)
        assert sparse.method == shorter


def test_steps_of_generation_run_on_the_backend_that_is_named(zoo: SimpleNamespace) -> None:
    model = zoo.build("llama")
    message = "backend must be one of 'auto', .* for h2o, .* got 'flex'"
    with pytest.raises(NotImplementedError, match=message), sparsify(model, H2O(), backend="flex"):
        pass
    with sparsify(model, SPARSE, backend="flex") as sparse:  # nothing was left behind
        with pytest.raises(NotImplementedError, match=message):
            sparse.use(H2O())
        assert sparse.method == SPARSE


def test_a_mask_that_was_written_into_is_read_again() -> None:
    read, mask = PaddingReader(), torch.ones(1, 1, 1, 4, dtype=torch.bool)
    first = read(mask, q_len=1, is_causal=False)
    assert read(mask, q_len=1, is_causal=False) is first
    mask[..., 3] = False
    second = read(mask, q_len=1, is_causal=False)
    assert second is not None
    assert second.tolist() == [[True, True, True, False]]
    with torch.inference_mode():  # whose tensors count no versions
        assert read(torch.ones_like(mask), q_len=1, is_causal=False) is not None
