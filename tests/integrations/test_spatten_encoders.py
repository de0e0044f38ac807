"""Encoders under SpAtten: the shortened model against a slow one that masks instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseloom.integrations import sparsify
from sparseloom.integrations.call import SITES
from sparseloom.methods import AttentionInputs, SpAtten

ENCODERS = ["bert", "roberta", "distilbert"]
LAYERS = {"bert": "num_hidden_layers", "roberta": "num_hidden_layers", "distilbert": "n_layers"}
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
METHOD = SpAtten(token_keep=0.5, head_keep=0.6)
METHODS = [
    METHOD,
    SpAtten(token_keep=0.4, head_keep=None, keep_first=False),
    SpAtten(token_keep=None, head_keep=(1.0, 0.75, 0.5, 0.25)),
    SpAtten(token_keep=(1.0, 0.7, 0.7, 0.2), head_keep=0.8, reference_length=20),
    SpAtten(token_keep=0.5, head_keep=0.6, granularity="head"),
    SpAtten(token_keep=(1.0, 0.7, 0.7, 0.2), head_keep=None, granularity="head", keep_first=False),
]


@pytest.fixture(params=ENCODERS)
def encoder(request: pytest.FixtureRequest) -> str:
    return request.param


def build(zoo: SimpleNamespace, family: str, layers: int = 4, **changes: object) -> nn.Module:
    return zoo.build(family, **{LAYERS[family]: layers}, **changes)


def only_real(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """One sequence without its padding."""
    real = inputs["attention_mask"][row].bool()
    return {name: tensor[row : row + 1, real] for name, tensor in inputs.items()}


def alive_of(alive: Tensor | None) -> list[int]:
    """Which tokens or heads of the only sequence are alive."""
    assert alive is not None
    return alive[0].nonzero().flatten().tolist()


def parts(layer: Any) -> tuple[Any, ...]:
    """(query, key, value, out, norm, feed-forward, heads) of a layer of either layout."""
    own = layer.attention
    if hasattr(own, "q_lin"):
        forward = (lambda x: layer.output_layer_norm(layer.ffn(x) + x), own.n_heads)
        return own.q_lin, own.k_lin, own.v_lin, own.out_lin, layer.sa_layer_norm, *forward
    forward = (lambda x: layer.output(layer.intermediate(x), x), own.self.num_attention_heads)
    inner, after = own.self, own.output
    return inner.query, inner.key, inner.value, after.dense, after.LayerNorm, *forward


def masked_reference(model: Any, ids: Tensor, method: SpAtten) -> tuple[Tensor, list, list]:
    """One sequence, token by token alive or not; nothing is ever shortened."""
    x = model.embeddings(input_ids=ids)[0]  # (n, W)
    length, width = x.shape
    layers = [
        m for m in model.modules() if type(m).__name__.endswith(("Layer", "TransformerBlock"))
    ]
    counts = method.kept_tokens(len(layers), length)
    tokens, token_scores = set(range(length)), [0.0] * length
    seen_tokens: list = []
    seen_heads: list = []
    first = 0 if method.keep_first is not False else -1

    def best(of: set[int], count: int) -> set[int]:
        ranked = sorted(of, key=lambda j: (j != first, -token_scores[j], j))
        return set(ranked[: min(count, len(of))])

    head_counts, heads, head_scores = [], None, []
    for number, layer in enumerate(layers):
        query, key, value, out, norm, feed_forward, count = parts(layer)
        if heads is None:
            heads, head_scores = set(range(count)), [0.0] * count
            head_counts = method.kept_heads(len(layers), count)
        seen_tokens.append(sorted(tokens))
        seen_heads.append(sorted(heads))
        dim = width // count
        context = torch.zeros_like(x)
        last = number + 1 == len(layers)
        for done, h in enumerate(sorted(heads), 1):
            span = slice(h * dim, (h + 1) * dim)
            q, k, v = (part(x)[:, span] for part in (query, key, value))
            for i in tokens:
                alive = sorted(tokens)
                scores = (k[alive] @ q[i]) * dim**-0.5
                weights = scores.softmax(0)
                for j, weight in zip(alive, weights.tolist(), strict=True):
                    token_scores[j] += weight
                context[i, span] = weights @ v[alive]
                head_scores[h] += float(context[i, span].abs().sum())
            if method.granularity == "head" and not last:
                gone = (counts[number] - counts[number + 1]) * done // len(heads)
                tokens = best(tokens, counts[number] - gone)
        if not last:
            tokens = best(tokens, counts[number + 1])
            ranked = sorted(heads, key=lambda h: (-head_scores[h], h))
            heads = set(ranked[: head_counts[number + 1]])
        new = feed_forward(norm(out(context) + x))
        stays = torch.tensor([i in tokens for i in range(length)])
        x = torch.where(stays[:, None], new, x)
    return x, seen_tokens, seen_heads


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_equals_the_reference_that_masks(
    zoo: SimpleNamespace, encoder: str, method: SpAtten
) -> None:
    model, ids = build(zoo, encoder), zoo.inputs("none", length=17, batch=1)["input_ids"]
    expected, tokens, heads = masked_reference(model, ids, method)
    with sparsify(model, method) as sparse:
        found = model(ids)[0][0]
    torch.testing.assert_close(found, expected, **CLOSE)
    survivors = sparse.survivors()
    assert [alive_of(s.tokens) for s in survivors] == tokens
    assert [alive_of(s.heads) for s in survivors] == heads
    kept = method.kept_tokens(4, 17)
    assert [len(ids) for ids in tokens] == kept
    assert all(set(b) <= set(a) for a, b in pairwise(tokens))
    rows = sparse.stats()
    assert [row["tokens_alive"] for row in rows] == kept
    assert [row["tokens_after"] for row in rows] == [*kept[1:], kept[-1]]
    assert [row["heads_alive"] for row in rows] == method.kept_heads(4, 4)
    assert all(row["ran"] == "pruned" for row in rows)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_batch_equals_its_sequences_alone(
    zoo: SimpleNamespace, encoder: str, padding: str, granularity: str
) -> None:
    method = dataclasses.replace(METHOD, granularity=granularity)
    model, inputs = build(zoo, encoder), zoo.inputs(padding, length=40, batch=8)
    given = dict(inputs)
    if encoder != "distilbert":  # positions count from the left edge, padding or not
        first = {"bert": 0, "roberta": 2}[encoder]
        given["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0) + first
    assert len(set(inputs["attention_mask"].sum(1).tolist())) == 8
    with sparsify(model, method) as sparse:
        together = model(**given)[0]
        alive = [s.tokens for s in sparse.survivors()]
        for row in range(8):
            one = {name: tensor[row : row + 1] for name, tensor in given.items()}
            if encoder != "distilbert" or padding == "right":  # its positions cannot be given
                one = only_real(given, row)
            alone = model(**one)[0]
            real = one["attention_mask"][0].bool()
            full = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(together[row][full], alone[0][real], **CLOSE)
            for batch, single in zip(alive, sparse.survivors(), strict=True):
                assert batch is not None
                assert single.tokens is not None
                assert torch.equal(batch[row][full], single.tokens[0][real])
                assert not batch[row][~full].any()


@torch.no_grad()
def test_everything_kept_is_the_dense_model(
    zoo: SimpleNamespace, encoder: str, padding: str
) -> None:
    model, inputs = build(zoo, encoder), zoo.inputs(padding)
    expected = zoo.real(model(**inputs)[0], inputs)
    for method in (
        SpAtten(token_keep=1.0, head_keep=1.0),
        SpAtten(token_keep=None, head_keep=None),
    ):
        with sparsify(model, method) as sparse:
            found = zoo.real(model(**inputs)[0], inputs)
        torch.testing.assert_close(found, expected, **CLOSE)
        rows = sparse.stats()
        assert all(row["density"] == 1.0 for row in rows)
        assert all(row["linear_macs"] == row["dense_linear_macs"] for row in rows)


@torch.no_grad()
def test_pruned_tokens_leave_the_linear_layers(zoo: SimpleNamespace, encoder: str) -> None:
    model, inputs = build(zoo, encoder), zoo.inputs("none", length=20, batch=1)
    shapes: list[int] = []
    linears = [m for name, m in model.named_modules()
               if isinstance(m, nn.Linear) and "pooler" not in name]  # fmt: skip
    hooks = [m.register_forward_hook(lambda _, args, out: shapes.append(out.shape[1]))
             for m in linears]  # fmt: skip
    method = SpAtten(token_keep=(1.0, 0.5, 0.5, 0.25), head_keep=None)
    with sparsify(model, method) as sparse:
        model(**inputs)
    for hook in hooks:
        hook.remove()
    # Three projections, then output and feed-forward on those who stay.
    assert shapes == [*[20] * 3, *[10] * 3, *[10] * 6, *[10] * 3, *[5] * 3, *[5] * 6]
    row = sparse.stats()[2]
    assert row["density"] == 0.25
    assert row["linear_macs"] == 10 * 3 * 32 * 32 + 5 * (32 * 32 + 2 * 32 * 48)
    assert row["dense_linear_macs"] == 20 * (4 * 32 * 32 + 2 * 32 * 48)
    assert row["attention_macs"] == 10 * 10 * 64


@torch.no_grad()
def test_wrapped_projections_are_called_not_sliced(zoo: SimpleNamespace, encoder: str) -> None:
    """An adapter around a projection must have its say; only plain weights are sliced."""
    model, ids = build(zoo, encoder), zoo.inputs("none", length=12, batch=1)["input_ids"]
    with sparsify(model, METHOD):
        expected = model(ids)[0]
    linears = [m for name, m in model.named_modules()
               if isinstance(m, nn.Linear) and "pooler" not in name]  # fmt: skip
    hooks = [m.register_forward_hook(lambda _, args, out: out) for m in linears]
    with sparsify(model, METHOD):
        torch.testing.assert_close(model(ids)[0], expected, **CLOSE)
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def test_the_model_is_given_back(
    zoo: SimpleNamespace, encoder: str, snapshot: Callable[[nn.Module], object]
) -> None:
    model, inputs = build(zoo, encoder), zoo.inputs("left")
    expected = model(**inputs)[0]
    before = snapshot(model)
    with sparsify(model, METHOD):
        assert not torch.equal(model(**inputs)[0], expected)
        with pytest.raises(RuntimeError, match="sparsified already"), sparsify(model, METHOD):
            pass
    assert snapshot(model) == before
    assert len(SITES) == 0
    assert torch.equal(model(**inputs)[0], expected)
    with pytest.raises(KeyError), sparsify(model, METHOD):
        raise KeyError
    assert snapshot(model) == before


class Watcher:
    """Keeps the sizes of the attention calls."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_attention(self, inputs: AttentionInputs, mask: object, output: Tensor) -> None:
        assert mask is None
        assert output.shape == inputs.query.shape
        self.sizes.append(inputs.query.shape[2])


@torch.no_grad()
def test_observers_see_the_shorter_calls(zoo: SimpleNamespace) -> None:
    model, inputs = build(zoo, "bert"), zoo.inputs("right", length=20)
    with sparsify(model, METHOD, observer=(watcher := Watcher())) as sparse:
        model(**inputs)
        sparse.reset()
        assert sparse.stats() == []
    assert watcher.sizes == METHOD.kept_tokens(4, 20)


@torch.no_grad()
def test_half_precision_and_empty_sequences(zoo: SimpleNamespace, encoder: str) -> None:
    model, inputs = build(zoo, encoder).bfloat16(), zoo.inputs("right", length=20)
    inputs["attention_mask"][1] = 0
    with sparsify(model, METHOD):
        found = model(**inputs)[0]
    assert found.dtype == torch.bfloat16
    assert found[[0, 2]].isfinite().all()


@torch.no_grad()
def test_pairs_are_counted_head_by_head(zoo: SimpleNamespace) -> None:
    model, inputs = build(zoo, "bert"), zoo.inputs("none", length=20, batch=1)
    keep = (1.0, 1.0, 0.5, 0.5)
    method = SpAtten(token_keep=keep, head_keep=None, granularity="head")
    with sparsify(model, method) as sparse:
        model(**inputs)
    rows = sparse.stats()
    # From 20 to 10 tokens over the four heads of the second layer.
    expected = [4 * 400, 20**2 + 18**2 + 15**2 + 13**2, 4 * 100, 4 * 100]
    assert [row["kept_pairs"] for row in rows] == expected
    assert [row["tokens_after"] for row in rows] == [20, 10, 10, 10]


def test_gradients_are_those_of_the_same_computation(zoo: SimpleNamespace, encoder: str) -> None:
    """The choice is a constant: a finite difference of the loss agrees with the gradient."""
    model, inputs = build(zoo, encoder).double(), zoo.inputs("right", length=14)
    ends = ("lin1.weight", "intermediate.dense.weight")
    weight = next(p for name, p in model.named_parameters() if name.endswith(ends))
    with sparsify(model, METHOD):
        target = torch.randn(3, 14, 32, dtype=torch.float64)
        (model(**inputs)[0] * target).sum().backward()
        assert weight.grad is not None
        direction, step = weight.grad / weight.grad.norm(), 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step * direction)
                values.append((model(**inputs)[0] * target).sum().item())
                weight.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float(weight.grad.norm()), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "error", "words"),
    [
        (SpAtten(key_bits=(8, 4)), NotImplementedError, "key_bits, value_bits"),
        (SpAtten(token_keep=(0.9,) * 4), ValueError, "must leave the first layer whole"),
        (SpAtten(head_front=0.0), ValueError, "head_front .* must leave the first layer whole"),
        (SpAtten(token_keep=(1.0, 0.5)), ValueError, "one share for each of 4 layers, got 2"),
    ],
)
def test_settings_that_encoders_refuse(
    zoo: SimpleNamespace, method: SpAtten, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words), sparsify(build(zoo, "bert"), method):
        pass


def test_what_cannot_be_done_is_refused(zoo: SimpleNamespace, encoder: str) -> None:
    model: Any = build(zoo, encoder)
    inputs = zoo.inputs("none")
    with sparsify(model, METHOD) as sparse:
        for name in ("output_hidden_states", "output_attentions"):
            with pytest.raises(NotImplementedError, match=name):
                model(**inputs, **{name: True})
        with pytest.raises(RuntimeError, match="no forward pass with pruning has run"):
            sparse.survivors()
    enable = getattr(model, "activation_checkpointing_enable", None)  # its name in 5.x
    (enable or model.gradient_checkpointing_enable)()
    model.train()
    with (
        sparsify(model, METHOD),
        pytest.raises(NotImplementedError, match="gradient_checkpointing"),
    ):
        model(**inputs)
