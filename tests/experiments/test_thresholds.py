from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from sparseloom.experiments import thresholds
from sparseloom.models import LoadedModel
from sparseloom.results import read_results, write_results

WORDS = ["the", "dog", "cat", "runs", "sleeps", "good", "bad"]


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    torch.manual_seed(3)
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=24,
        initializer_range=0.4,
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=24
    )
    loaded = LoadedModel("tiny", BertModel(config).eval(), fast)
    monkeypatch.setattr(thresholds, "load_model", lambda name: loaded)
    monkeypatch.setattr(thresholds, "_LENGTH", 20)
    return loaded


@pytest.fixture
def data(tmp_path: Path) -> Path:
    pytest.importorskip("scipy")
    (tmp_path / "glue" / "STS-B").mkdir(parents=True)
    (tmp_path / "imdb").mkdir()
    pairs = [
        f"the {a} runs,the {b} sleeps {a},{i}.5\n"
        for i, (a, b) in enumerate(
            [("dog", "cat"), ("cat", "cat"), ("bad", "good"), ("dog", "bad")]
        )
    ]
    (tmp_path / "glue" / "STS-B" / "stsb-en-dev.csv").write_text("".join(pairs))
    rows = [f"1\t8\t{i}\t{' '.join(WORDS[(i + j) % 7] for j in range(30))}\n" for i in range(6)]
    (tmp_path / "imdb" / "test.tsv").write_text("label\trating\tid\ttext\n" + "".join(rows))
    return tmp_path


def test_higher_thresholds_drop_more_and_move_embeddings_more(
    encoder: LoadedModel, data: Path, tmp_path: Path
) -> None:
    parts: list[str] = []
    rows = thresholds.oracle_thresholds(
        data, thresholds=(1e-9, 0.01, 0.2), documents=4, step=parts.append
    )
    assert parts[0] == "STS-B, dense"
    assert len(parts) == 2 + 2 * 3
    imdb = [row for row in rows if row["task"] == "imdb"]
    assert [row["settings"]["threshold"] for row in imdb] == [1e-9, 0.01, 0.2]
    sparsities = [row["sparsity"] for row in imdb]
    assert sparsities[0] < 0.05 < sparsities[1] < sparsities[2] < 1
    assert imdb[0]["value"] < 1e-5
    assert imdb[0]["relative_l2"] < imdb[1]["relative_l2"] < imdb[2]["relative_l2"]
    assert all(row["largest"] >= row["value"] for row in imdb)
    for row in imdb:
        assert len(row["sparsity_by_layer"]) == 2
        assert sum(row["sparsity_by_layer"]) / 2 == pytest.approx(row["sparsity"])
    sentences = [row for row in rows if row["task"] == "sts-b"]
    assert [row["method"] for row in sentences] == ["dense", "oracle", "oracle", "oracle"]
    assert sentences[1]["value"] == pytest.approx(sentences[0]["value"])
    assert "published" in imdb[1]
    assert "published" not in imdb[0]
    write_results(tmp_path / "r.json", rows, command="test")
    assert len(read_results(tmp_path / "r.json").rows) == len(rows)


def test_the_command_writes_a_results_file(
    encoder: LoadedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out" / "thresholds.json"
    words = ["thresholds", "--data", str(data), "--results", str(out), "--documents", "2"]
    monkeypatch.setattr("sys.argv", words)
    thresholds.main()
    assert read_results(out).rows
    assert not list(out.parent.glob("*.part"))


def test_the_change_of_an_embedding() -> None:
    dense = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    other = torch.tensor([[6.0, 8.0], [0.0, 1.0]], dtype=torch.float64)
    change = thresholds.EmbeddingChange.between(dense, other)
    assert change.one_minus_cosine.tolist() == pytest.approx([0.0, 1.0])
    assert change.relative_l2.tolist() == pytest.approx([1.0, 2**0.5])
