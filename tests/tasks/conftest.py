"""Small models and data folders that the task tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sparseloom.models import LoadedModel


@pytest.fixture(scope="session")
def byte_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def word_tokenizer(words: list[str], *, marks: bool) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: i for i, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if marks:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        bos_token=None if marks else "[CLS]",
        model_max_length=32,
    )


@pytest.fixture(scope="session")
def encoder() -> LoadedModel:
    torch.manual_seed(1)
    words = ["the", "dog", "cat", "runs", "sleeps", "a", "plays", "good", "bad", "film"]
    config = BertConfig(
        vocab_size=len(words) + 4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    model = BertModel(config).eval()
    return LoadedModel("tiny-bert", model, word_tokenizer(words, marks=True))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, for the tests that need it."""
    named = os.environ.get("SPARSELOOM_DATA")
    if not named or not Path(named).is_dir():
        pytest.skip("SPARSELOOM_DATA names no folder of data sets")
    return Path(named)


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSELOOM_DATA", raising=False)
