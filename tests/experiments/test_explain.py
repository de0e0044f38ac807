"""`explain`: its picture against the survivors and scores that the methods report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicCache

from sparseloom.cli import boundary
from sparseloom.experiments.explain import PAPER_SENTENCE, examples, explain
from sparseloom.experiments.pieces import Piece, encode, spans
from sparseloom.integrations import sparsify
from sparseloom.methods import SpAtten
from sparseloom.models import LoadedModel
from sparseloom.report.words import in_words, lines, outcome

METHOD = SpAtten(token_keep=(1.0, 0.7, 0.4), head_keep=(1.0, 0.75, 0.5))
WORDS = ["as", "a", "visual", "treat", ",", "the", "film", "is", "almost", "perfect", "."]


def tokenizer(longest: int = 24) -> PreTrainedTokenizerFast:
    """One token per word, [CLS] and [SEP] around them."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, "[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]",
        sep_token="[SEP]", model_max_length=longest,
    )  # fmt: skip


def larger(model: PreTrainedModel) -> PreTrainedModel:
    """Small initial weights make attention flat."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return model.eval()


def encoder(kind: type[PreTrainedModel] = BertModel, **settings: Any) -> LoadedModel:
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
        vocab_size=24, max_position_embeddings=32, **settings,
    )  # fmt: skip
    return LoadedModel("tiny", larger(kind(config)), tokenizer())


def decoder() -> LoadedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LoadedModel("bytes", larger(LlamaForCausalLM(config)), None)


@torch.no_grad()
def test_an_encoder_is_shown_as_its_survivors_say() -> None:
    loaded, text = encoder(), "As a visual treat, the film"
    shown = explain(loaded, text, METHOD)
    expected = [
        ("", "[CLS]"), (" ", "As"), (" ", "a"), (" ", "visual"), (" ", "treat"), ("", ","),
        (" ", "the"), (" ", "film"), (" ", "[SEP]"),
    ]  # fmt: skip
    assert list(shown.pieces) == expected
    ids = encode(loaded, text)[0]
    with sparsify(loaded.model, METHOD) as sparse:
        loaded.model(**ids)
    for view, layer in zip(shown.layers, sparse.survivors(), strict=True):
        assert layer.tokens is not None
        assert layer.heads is not None
        assert list(view.alive) == layer.tokens[0].tolist()
        assert list(view.heads) == layer.heads[0].tolist()
    assert [sum(view.alive) for view in shown.layers] == [9, 6, 3]
    for view, after in zip(shown.layers[:-1], shown.layers[1:], strict=True):
        others = [i for i in range(1, 9) if view.alive[i]]  # [CLS] always stays
        left = sorted(others, key=lambda i: -view.importance[i])[: sum(after.alive) - 1]
        assert {i for i in others if after.alive[i]} == set(left)
    # Every alive query of every head hands out probabilities that add up to one.
    assert sum(shown.layers[0].importance) == pytest.approx(9 * 4, rel=1e-3)
    assert sum(shown.layers[1].importance) == pytest.approx(9 * 4 + 6 * 3, rel=1e-3)
    assert shown.answer == "embedding"
    assert shown.similarity is not None
    assert -1 <= shown.similarity < 0.9999
    whole = explain(loaded, text, SpAtten(token_keep=None, head_keep=None))
    assert whole.similarity == pytest.approx(1.0, abs=1e-5)


def test_classifiers_answer_with_their_labels() -> None:
    labels = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    shown = explain(encoder(BertForSequenceClassification, **labels), PAPER_SENTENCE, METHOD)
    assert shown.answer == "class"
    assert {label for label, _ in shown.dense} == {"bad", "good"}
    assert sum(share for _, share in shown.sparse) == pytest.approx(1.0, abs=1e-3)
    assert outcome(shown.to_row()).startswith("Class: dense “")
    scored = explain(encoder(BertForSequenceClassification, num_labels=1), "a film", METHOD)
    assert (scored.answer, len(scored.dense)) == ("score", 1)


@torch.no_grad()
def test_a_decoder_is_shown_in_the_step_after_its_prompt() -> None:
    loaded = decoder()
    text = "for name in names:\n    p\u00e9"
    shown = explain(loaded, text, METHOD)
    length = len(text.encode()) + 1
    assert [sum(view.alive) for view in shown.layers] == METHOD.kept_tokens(3, length)
    assert [sum(view.heads) for view in shown.layers] == [4, 3, 2]
    assert all(view.alive[-1] for view in shown.layers)  # the new token
    assert "".join(piece.text for piece in shown.pieces[:-1]).endswith("    p\\xc3\\xa9")
    cache = DynamicCache()
    ids = torch.tensor([list(text.encode())])
    model: Any = loaded.model
    with sparsify(model, METHOD):
        new = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
        logits = model(input_ids=new, past_key_values=cache).logits[0, -1]
        first: Any = cache.layers[0]
        gathered = first.run.tokens[0]
    assert shown.sparse[0][1] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)
    found = torch.tensor(shown.layers[-1].importance)
    torch.testing.assert_close(found, gathered, rtol=0, atol=1e-3)
    row = shown.to_row()
    assert lines(row)[0].words[-1].new
    assert not lines(row)[0].words[0].new


@torch.no_grad()
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_prompt_that_gets_shorter_is_shown_in_one_pass(granularity: Any) -> None:
    loaded, text = decoder(), "import os"
    method = replace(METHOD, prompt="shorten", granularity=granularity)
    shown = explain(loaded, text, method)
    assert [sum(view.alive) for view in shown.layers] == method.kept_tokens(3, 9)
    assert (shown.written, len(shown.pieces)) == (0, 9)
    # Every alive query of every head hands out probabilities that add up to one.
    first = 9 * 4 if granularity == "layer" else 9 + 9 + 8 + 7
    assert sum(shown.layers[0].importance) == pytest.approx(first, rel=1e-3)
    with sparsify(loaded.model, method):
        logits = loaded.model(torch.tensor([list(text.encode())])).logits[0, -1]
    assert shown.sparse[0][1] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)


def test_the_picture_ranks_and_shades_those_alive() -> None:
    row = {
        "tokens": ["a", "b", "c"], "gaps": ["", " ", " "], "answer": "class",
        "layers": [
            {"alive": [True, True, True], "importance": [1.0, 4.0, 2.0], "heads": [True, True]},
            {"alive": [False, True, True], "importance": [1.0, 5.0, 5.0], "heads": [True, False]},
        ],
        "dense": [["x", 0.5]], "sparse": [["y", 0.75]],
    }  # fmt: skip
    first, second = lines(row)
    assert [word.rank for word in first.words] == [3, 1, 2]
    assert [round(word.shade, 3) for word in first.words] == [0.5, 1.0, 0.707]
    assert [word.rank for word in second.words] == [0, 1, 2]
    assert (second.tokens_alive, second.heads_alive) == (2, 1)
    assert in_words(row) == (
        "Of 3 tokens the layers read 3, 2; of 2 heads they compute 2, 1. The last layer reads: b c"
    )
    assert outcome(row) == "Class: dense “x” (50.0%); pruned “y” (75.0%)."


def test_characters_of_several_tokens_are_not_drawn_twice() -> None:
    found = spans("a \u00e9b", [[0, 1], [1, 3], [2, 3], [3, 4]], ["a", "x", "y", "b"])
    assert found == [Piece("", "a"), Piece(" ", "\u00e9"), Piece("", "·"), Piece("", "b")]


def test_what_cannot_be_explained_is_said() -> None:
    with pytest.raises(ValueError, match="text is empty"):
        explain(encoder(), " \n", METHOD)
    with pytest.raises(
        ValueError, match="text has 42 tokens, and the model 'tiny' takes at most 24"
    ):
        explain(encoder(), "film " * 40, METHOD)
    with pytest.raises(ValueError, match=r"text has 64 tokens, .* at most 63 before the one"):
        explain(decoder(), "x" * 64, METHOD)
    assert len(explain(decoder(), "x" * 63, METHOD).pieces) == 64
    config = decoder().model.config
    other = LoadedModel("c", LlamaForSequenceClassification(config).eval(), None)
    with pytest.raises(NotImplementedError, match="without a language-model head"):
        explain(other, "import", METHOD)


def test_examples_suit_the_model() -> None:
    assert examples(encoder())[0] == PAPER_SENTENCE
    assert "def " in examples(decoder())[0]


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = encoder()
    loaded.model.save_pretrained(tmp_path / "tiny")
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(tmp_path / "tiny")
    words = ["explain", "--model", str(tmp_path / "tiny"), "--text", "the film <is> perfect ."]
    words += ["--token-keep", "1x0.6x0.6", "--head-keep", "none"]
    assert boundary.run([*words, "--html", str(tmp_path / "page.html")]) == 0
    printed = capfd.readouterr().out
    assert "2  5/9" in printed
    assert "4/4 heads" in printed
    assert "cosine" in printed
    assert "··" in printed  # a pipe has no colours
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "&lt;</span>" in page
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert 'role="img" aria-label="Of 9 tokens the layers read 9, 5, 5;' in page
    assert page.count('class="gone"') == 8
    assert "Method: spatten:token_keep=1.0x0.6x0.6,head_keep=none<" in page
    assert boundary.run([*words, "--json"]) == 0
    row = json.loads(capfd.readouterr().out)["rows"][0]
    assert row["settings"]["token_keep"] == [1.0, 0.6, 0.6]
    assert [sum(layer["alive"]) for layer in row["layers"]] == [9, 5, 5]
    for wrong, said in [
        (["--text", ""], "text is empty"),
        (["--method", "window:width=8"], "must be one that prunes in a cascade"),
        (["--model", str(tmp_path / "nothing")], "is not a built-in"),
        (["--token-keep", "2"], "token_keep must be in (0, 1], got 2.0"),
    ]:
        options = [*words[:3], *wrong]
        assert boundary.run(options) == 2
        assert said in capfd.readouterr().err
