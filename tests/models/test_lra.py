"""The LRA encoders: published sizes, plain-tensor equality, sparsify, saving and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sparseloom as sl
from sparseloom.integrations import describe
from sparseloom.models import load_model
from sparseloom.models.lra import LraForSequenceClassification, sinusoids
from sparseloom.models.lra_presets import LENGTHS, RECIPES, lra_config

TASKS = ("text", "retrieval", "image", "listops")
SMALL: dict[str, Any] = {
    "length": 24, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2,
    "intermediate_size": 24,
}  # fmt: skip


def build(task: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: Any = {**SMALL, **({"qkv_size": 8} if task == "image" else {}), **changes}
    model = LraForSequenceClassification(lra_config(task, **sizes))
    with torch.no_grad():  # initial attention is flat and [CLS] is zero: errors would not show
        for parameter in model.parameters():
            parameter.mul_(2.0).add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(task: str, *, padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (3, 2, 24) if task == "retrieval" else (3, 24)
    ids = torch.randint(1, 16, shape, generator=generator)
    if padded:
        ids[0, ..., 15:] = 0
        ids[2, ..., 4:9] = 0
    return {"input_ids": ids}


@pytest.mark.parametrize(
    ("task", "weights"),
    [
        # embeddings + cls + blocks (2 LN, 4 projections, MLP) + final LN + head, by hand
        ("text", 257 * 256 + 256 + 4 * (1024 + 4 * 256 * 256 + 2 * 256 * 1024 + 1280) + 512
         + 257 * 1024 + 2 * 1025),
        ("retrieval", 257 * 128 + 128 + 4 * (512 + 4 * 128 * 128 + 2 * 128 * 512 + 640) + 256
         + 257 * 512 + 256 * 513 + 2 * 257),
        ("image", 256 * 128 + 1025 * 128 + 128 + (512 + 4 * 128 * 64 + 2 * 128 * 128 + 256) + 256
         + 129 * 128 + 10 * 129),
        ("listops", 16 * 512 + 512 + 6 * (2048 + 4 * 512 * 512 + 2 * 512 * 2048 + 2560) + 1024
         + 513 * 2048 + 10 * 2049),
    ],
)  # fmt: skip
def test_published_sizes_have_as_many_weights_as_by_hand(task: str, weights: int) -> None:
    config = lra_config(task)
    with torch.device("meta"):
        model = LraForSequenceClassification(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == weights
    assert config.input_length == LENGTHS[task] == config.max_position_embeddings - 1
    assert task in RECIPES


def test_initial_weights_are_the_published_ones() -> None:
    torch.manual_seed(0)
    model = LraForSequenceClassification(lra_config("image"))
    assert not model.encoder.embeddings.cls.any()
    assert model.encoder.embeddings.tokens.weight.std().item() == pytest.approx(1.0, abs=0.02)
    positions = model.encoder.embeddings.positions
    assert positions is not None
    assert positions.weight.std().item() == pytest.approx(0.02, abs=0.001)
    query: Any = model.encoder.layers[0].attention
    limit = (6 / (128 + 64)) ** 0.5  # Xavier
    assert 0.98 * limit < query.query.weight.abs().max().item() <= limit
    head: Any = model.head.layers[0]
    assert head.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
    assert not head.bias.any()


def by_hand(model: Any, ids: Tensor) -> Tensor:
    """The text model of one unpadded or right-padded row, in plain tensors."""
    weights = model.state_dict()

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(
            x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], 1e-6
        )

    ids = ids[ids != 0]
    x = torch.cat(
        [
            weights["encoder.embeddings.cls"][0],
            weights["encoder.embeddings.tokens.weight"][ids],
        ]
    )
    x = x + sinusoids(len(x), x.shape[-1])
    for layer in range(2):
        name = f"encoder.layers.{layer}"
        y = norm(x, f"{name}.attention_norm")
        heads = []
        for h in range(2):
            part = slice(8 * h, 8 * h + 8)
            q, k, v = (
                y @ weights[f"{name}.attention.{one}.weight"][part].T
                for one in ("query", "key", "value")
            )
            heads.append(torch.softmax(q @ k.T / 8**0.5, -1) @ v)
        x = x + torch.cat(heads, -1) @ weights[f"{name}.attention.out.weight"].T
        y = norm(x, f"{name}.mlp_norm")
        y = y @ weights[f"{name}.mlp_in.weight"].T + weights[f"{name}.mlp_in.bias"]
        y = F.gelu(y, approximate="tanh")
        x = x + y @ weights[f"{name}.mlp_out.weight"].T + weights[f"{name}.mlp_out.bias"]
    y = norm(x, "encoder.norm")[0]
    y = torch.relu(y @ weights["head.layers.0.weight"].T + weights["head.layers.0.bias"])
    return y @ weights["head.layers.1.weight"].T + weights["head.layers.1.bias"]


def test_the_model_equals_the_same_in_plain_tensors() -> None:
    model = build("text")
    ids = torch.randint(1, 16, (2, 24))
    ids[1, 11:] = 0
    with torch.no_grad():
        logits = model(ids).logits
    expected = torch.stack([by_hand(model, row) for row in ids])
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)


def test_sinusoids_alternate() -> None:
    table = sinusoids(50, 6)
    assert table[0].tolist() == [0, 1, 0, 1, 0, 1]
    assert table[7, 2].item() == pytest.approx(torch.sin(torch.tensor(7 * 1e4 ** (-2 / 6))).item())


@pytest.mark.parametrize("task", TASKS)
def test_padding_and_its_content_change_nothing(task: str) -> None:
    model, given = build(task), inputs(task)
    real = given["input_ids"] != 0
    other = torch.where(real, given["input_ids"], torch.full_like(given["input_ids"], 7))
    with torch.no_grad():
        implied = model(**given).logits
        said = model(input_ids=other, attention_mask=real.long()).logits
        seen = model(input_ids=other).logits
    torch.testing.assert_close(implied, said)
    assert not torch.allclose(implied, seen, atol=1e-3)


def test_each_document_is_read_by_itself_and_order_matters() -> None:
    model, ids = build("retrieval"), inputs("retrieval", padded=False)["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
        turned = model(ids.flip(1)).logits
        first = model.encoder(ids[:, 0], ids[:, 0] != 0)[0][:, 0]
        second = model.encoder(ids[:, 1], ids[:, 1] != 0)[0][:, 0]
        apart = model.head(torch.cat([first, second], -1))
    torch.testing.assert_close(logits, apart, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits, turned, atol=1e-3)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("padded", [False, True])
def test_sparse_attention_that_keeps_everything_changes_nothing(task: str, padded: bool) -> None:
    model, given = build(task), inputs(task, padded=padded)
    with torch.no_grad():
        dense = model(**given).logits
        with sl.sparsify(model, sl.Oracle(sparsity=1e-6), when="always") as sparse:
            kept = model(**given).logits
            rows = sparse.stats()
        with sl.sparsify(model, sl.Oracle(sparsity=0.8, minimum_keys=1), when="always") as sparse:
            few = model(**given).logits
    torch.testing.assert_close(kept, dense, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(few, dense, atol=1e-3)
    assert [row["calls"] for row in rows] == [1] * len(rows)
    assert sparse.stats()[0]["density"] < 0.35


@pytest.mark.parametrize("task", ["image", "retrieval"])
def test_sparse_gradients_equal_dense_ones_where_everything_is_kept(task: str) -> None:
    model = build(task, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    given = {**inputs(task), "labels": torch.tensor([0, 1, 1])}

    def gradients() -> list[Tensor]:
        model.zero_grad()
        model(**given).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    dense = gradients()
    with sl.sparsify(model, sl.Oracle(sparsity=1e-6), when="always"):
        kept = gradients()
    for one, other in zip(kept, dense, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def test_eager_and_sdpa_agree_and_eager_returns_probabilities() -> None:
    model, given = build("image"), inputs("image")
    with torch.no_grad():
        fast = model(**given).logits
        with pytest.raises(ValueError, match="attn_implementation='eager'"):
            model(**given, output_attentions=True)
        model.config._attn_implementation = "eager"
        slow = model(**given, output_attentions=True)
    torch.testing.assert_close(slow.logits, fast, atol=1e-5, rtol=1e-4)
    assert slow.attentions[0].shape == (3, 2, 25, 25)
    torch.testing.assert_close(slow.attentions[0].sum(-1), torch.ones(3, 2, 25))
    assert not slow.attentions[0][0, :, :, 16:].any()  # padding, behind [CLS]


def test_the_description_has_the_width_of_the_heads() -> None:
    shape = describe(build("image"))
    assert (shape.hidden_size, shape.heads, shape.head_dim) == (16, 2, 4)
    assert not shape.is_causal
    assert not shape.rotary


def test_wrong_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"input_ids must be \(batch, 2, length\), got \(3, 24\)"):
        build("retrieval")(inputs("text")["input_ids"])
    with pytest.raises(ValueError, match="at most 24 tokens, got 25"):
        build("text")(torch.ones(1, 25, dtype=torch.long))
    with pytest.raises(ValueError, match="unknown task 'texts'; did you mean 'text'"):
        lra_config("texts")
    with pytest.raises(ValueError, match="qkv_size must be a multiple of the 3 heads, got 16"):
        build("text", num_attention_heads=3)


@pytest.mark.parametrize("task", ["text", "retrieval", "image"])
def test_saved_models_come_back_with_their_method(task: str, tmp_path: Path) -> None:
    model, given = build(task), inputs(task)
    sl.save(model, sl.Oracle(sparsity=0.5), tmp_path / "saved")
    loaded, method = sl.load(tmp_path / "saved")
    assert isinstance(loaded, LraForSequenceClassification)
    assert method == sl.Oracle(sparsity=0.5)
    with torch.no_grad():
        assert torch.equal(loaded(**given).logits, model(**given).logits)
        by_name = load_model(tmp_path / "saved")
        assert torch.equal(by_name.model(**given).logits, model(**given).logits)
    assert by_name.context == 25
