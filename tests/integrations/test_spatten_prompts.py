"""Decoders whose prompt gets shorter, against a slow model that masks instead."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparseloom.integrations import Sparsified, record, sparsify
from sparseloom.methods import SpAtten, parse_method
from sparseloom.training import finetune

FAMILIES = ["gpt2", "llama", "mistral", "qwen3"]
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
METHOD = SpAtten(token_keep=0.5, head_keep=0.7, prompt="shorten")
METHODS = [
    METHOD,
    SpAtten(token_keep=(1.0, 0.8, 0.5, 0.2), head_keep=None, recent=3, prompt="shorten"),
    SpAtten(token_keep=None, head_keep=(1.0, 0.75, 0.5, 0.25), prompt="shorten"),
    SpAtten(token_keep=0.5, head_keep=0.7, granularity="head", prompt="shorten"),
]


@pytest.fixture(params=FAMILIES)
def decoder(request: pytest.FixtureRequest) -> str:
    return request.param


def build(zoo: SimpleNamespace, family: str) -> Any:
    return zoo.build(family, **{"n_layer" if family == "gpt2" else "num_hidden_layers": 4})


def given(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With positions that start where the text does."""
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return {**inputs, "position_ids": positions}


def tokens_of(sparse: Sparsified) -> list[Tensor]:
    """Of each layer, (batch, length), the tokens in its attention."""
    return [layer.tokens for layer in sparse.survivors() if layer.tokens is not None]


def projected(layer: Any, states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all query heads, (heads, n, head_dim), by the model's parts."""
    if hasattr(layer, "attn"):
        own = layer.attn
        parts = own.c_attn(layer.ln_1(states)).split(own.split_size, -1)
        return tuple(part.unflatten(-1, (-1, own.head_dim)).transpose(0, 1) for part in parts)
    own = layer.self_attn
    entered = layer.input_layernorm(states)
    query, key, value = (
        part(entered).unflatten(-1, (-1, own.head_dim)).transpose(0, 1)
        for part in (own.q_proj, own.k_proj, own.v_proj)
    )
    if hasattr(own, "q_norm"):
        query, key = own.q_norm(query), own.k_norm(key)
    half = own.head_dim // 2
    angles = positions[:, None] * 10_000.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()
    query, key = (
        torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
        for a, b in (part.split(half, -1) for part in (query, key))
    )
    times = query.shape[0] // key.shape[0]
    return query, key.repeat_interleave(times, 0), value.repeat_interleave(times, 0)


def finished(layer: Any, context: Tensor, states: Tensor) -> Tensor:
    """The rest of a layer, on (n, heads · head_dim)."""
    if hasattr(layer, "attn"):
        states = states + layer.attn.c_proj(context)
        return states + layer.mlp(layer.ln_2(states))
    states = states + layer.self_attn.o_proj(context)
    return states + layer.mlp(layer.post_attention_layernorm(states))


def masked_reference(model: Any, ids: Tensor, method: SpAtten) -> tuple[Tensor, list[list[int]]]:
    """Logits of one sequence, (n, vocabulary), and the tokens alive in each layer."""
    length = ids.shape[1]
    positions = torch.arange(length)
    if hasattr(model, "transformer"):
        body = model.transformer
        x, layers, norm = body.wte(ids[0]) + body.wpe(positions), body.h, body.ln_f
    else:
        body = model.model
        x, layers, norm = body.embed_tokens(ids[0]), body.layers, body.norm
    counts = method.kept_tokens(len(layers), length)
    alive, scores = torch.ones(length, dtype=torch.bool), torch.zeros(length)
    heads, head_scores = torch.ones(4, dtype=torch.bool), torch.zeros(4)
    seen: list[list[int]] = []

    def best(count: int) -> Tensor:
        newest = [length - 1 - i for i in range(min(method.recent, length))]
        ranked = newest + sorted(
            (j for j in range(length) if alive[j] and j not in newest),
            key=lambda j: (-float(scores[j]), j),
        )
        return torch.isin(positions, torch.tensor(ranked[:count]))

    for number, layer in enumerate(layers):
        seen.append(alive.nonzero().flatten().tolist())
        query, key, value = projected(layer, x, positions)
        scale = query.shape[-1] ** -0.5
        if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
            scale /= number + 1
        context = torch.zeros_like(query)
        last = number + 1 == len(layers)
        for done, h in enumerate(heads.nonzero().flatten().tolist(), 1):
            allowed = (alive[:, None] & alive[None]).tril()
            logits = (query[h] @ key[h].T * scale).masked_fill(~allowed, -torch.inf)
            weights = logits.softmax(-1).nan_to_num(0.0)
            context[h] = weights @ value[h]
            scores += weights.sum(0)
            head_scores[h] += context[h].abs().sum()
            if method.granularity == "head" and not last:
                gone = (counts[number] - counts[number + 1]) * done // int(heads.sum())
                alive = best(counts[number] - gone) & alive
        if not last:
            alive = best(counts[number + 1]) & alive
            left = method.kept_heads(len(layers), 4)[number + 1]
            ranked = head_scores.masked_fill(~heads, -1.0).topk(left).indices
            heads = torch.isin(torch.arange(4), ranked)
        new = finished(layer, context.transpose(0, 1).flatten(1), x)
        x = torch.where(alive[:, None], new, x)
    return model.lm_head(norm(x)), seen


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_equals_the_reference_that_masks(
    zoo: SimpleNamespace, decoder: str, method: SpAtten
) -> None:
    model, ids = build(zoo, decoder), zoo.inputs("none", length=18, batch=1)["input_ids"]
    expected, tokens = masked_reference(model, ids, method)
    with sparsify(model, method) as sparse:
        out = model(ids, labels=ids)
    torch.testing.assert_close(out.logits[0], expected, **CLOSE)
    assert out.past_key_values is None
    found = [alive.nonzero().flatten().tolist() for alive, *_ in tokens_of(sparse)]
    assert found == tokens
    assert [len(one) for one in tokens] == method.kept_tokens(4, 18)
    rows = sparse.stats()
    if method.granularity == "layer":
        alive = zip(method.kept_tokens(4, 18), method.kept_heads(4, 4), strict=True)
        assert [row["kept_pairs"] for row in rows] == [h * n * (n + 1) // 2 for n, h in alive]
    assert rows[0]["density"] == 1.0 or method.granularity == "head"


@torch.no_grad()
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_a_batch_equals_its_sequences_alone(
    zoo: SimpleNamespace, decoder: str, padding: str, granularity: str
) -> None:
    method = dataclasses.replace(METHOD, granularity=granularity)
    model, inputs = build(zoo, decoder), given(zoo.inputs(padding, length=40, batch=8))
    with sparsify(model, method) as sparse:
        together = model(**inputs).logits
        alive = tokens_of(sparse)
        for row in range(8):
            real = inputs["attention_mask"][row].bool()
            alone = model(**{name: part[row : row + 1, real] for name, part in inputs.items()})
            torch.testing.assert_close(together[row][real], alone.logits[0], **CLOSE)
            for batch, single in zip(alive, tokens_of(sparse), strict=True):
                assert torch.equal(batch[row][real], single[0])
                assert not batch[row][~real].any()


@torch.no_grad()
def test_everything_kept_is_the_dense_model(
    zoo: SimpleNamespace, decoder: str, padding: str, snapshot: Any
) -> None:
    model, inputs = build(zoo, decoder), given(zoo.inputs(padding))
    expected = zoo.real(model(**inputs).logits, inputs)
    before = snapshot(model)
    method = SpAtten(token_keep=None, head_keep=None, prompt="shorten")
    with sparsify(model, method) as sparse:
        found = zoo.real(model(**inputs).logits, inputs)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert snapshot(model) == before
    for row in sparse.stats():
        assert row["density"] == 1.0
        assert row["linear_macs"] == row["dense_linear_macs"]


@torch.no_grad()
def test_pruned_tokens_leave_the_linear_layers(zoo: SimpleNamespace, decoder: str) -> None:
    model, inputs = build(zoo, decoder), zoo.inputs("none", length=20, batch=1)
    ends = (".mlp", ".mlp.c_proj", ".mlp.c_fc")
    inner = [m for name, m in model.named_modules() if name.endswith(ends)]
    sizes: list[int] = []
    hooks = [m.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
             for m in inner]  # fmt: skip
    method = SpAtten(token_keep=(1.0, 0.5, 0.5, 0.25), head_keep=None, prompt="shorten")
    with sparsify(model, method) as sparse:
        model(**inputs)
    for hook in hooks:
        hook.remove()
    times = len(inner) // 4
    assert sizes == [10] * 2 * times + [5] * 2 * times
    row, config = sparse.stats()[2], model.config
    width, one = 32, 32 * (16 if decoder == "qwen3" else 8)
    kv_heads = getattr(config, "num_key_value_heads", 4)
    inside = 2 * 128 if decoder == "gpt2" else 3 * 48
    expected = 10 * (4 + 2 * kv_heads) * one + 5 * (4 * one + inside * width)
    assert row["linear_macs"] == expected


def test_training_reaches_what_stays(zoo: SimpleNamespace, decoder: str) -> None:
    """A finite difference of the loss agrees with the gradient; the choice is a constant."""
    model = build(zoo, decoder).double()
    inputs = zoo.inputs("right", length=14)
    ends = ("mlp.c_fc.weight", "up_proj.weight")
    weight = next(p for name, p in model.named_parameters() if name.endswith(ends))
    target = torch.randn(3, 14, 61, dtype=torch.float64)
    with sparsify(model, METHOD):
        (model(**inputs).logits * target).sum().backward()
        direction, step = weight.grad / weight.grad.norm(), 1e-4
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step * direction)
                values.append(float((model(**inputs).logits * target).sum()))
                weight.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float(weight.grad.norm()), rel=1e-3)  # norms run in fp32


def test_finetune_runs_the_shorter_prompt(zoo: SimpleNamespace) -> None:
    model = build(zoo, "llama")
    before = model.model.layers[3].mlp.up_proj.weight.detach().clone()
    batches = [
        {**zoo.inputs("right", length=16), "labels": zoo.inputs("right", length=16)["input_ids"]}
    ]
    log = finetune(model, METHOD, batches * 2, steps=2, progress=False)
    assert len(log) >= 1
    assert not torch.equal(model.model.layers[3].mlp.up_proj.weight, before)


def test_a_recorded_pass_says_who_was_left(zoo: SimpleNamespace) -> None:
    model, inputs = build(zoo, "llama"), zoo.inputs("none", length=18, batch=1)
    for granularity in ("layer", "head"):
        method = dataclasses.replace(METHOD, granularity=granularity)
        with torch.no_grad(), sparsify(model, method) as sparse:
            model(**inputs)
        trace = record(model, method, inputs)
        calls = trace.selections[str(method)].calls
        alive = [call.tokens_alive for call in calls]
        for mine, theirs in zip(alive, tokens_of(sparse), strict=True):
            assert mine is None or mine[0].tolist() == theirs[0].tolist()
        kept = [int(pairs.sum()) for pairs in trace.kept_pairs(str(method))]
        assert kept == [row["kept_pairs"] for row in sparse.stats()]


def test_caches_and_other_layers_are_refused(zoo: SimpleNamespace, decoder: str) -> None:
    model, inputs = build(zoo, decoder), zoo.inputs("none")
    with sparsify(model, METHOD):
        with pytest.raises(NotImplementedError, match="generate with SpAtten\\(prompt='whole'\\)"):
            model.generate(**inputs, max_new_tokens=2)
        with pytest.raises(NotImplementedError, match="past_key_values: a cache of a prompt"):
            model(**inputs, use_cache=True)
    wide: nn.Module = zoo.build("gpt_neox")
    with pytest.raises(NotImplementedError, match="known are the layers of GPT-2, Llama"):
        sparsify(wide, METHOD).__enter__()


def test_the_setting_is_checked() -> None:
    assert parse_method("spatten:prompt=shorten") == SpAtten(prompt="shorten")
    with pytest.raises(ValueError, match="prompt must be one of 'whole', 'shorten', got 'short'"):
        parse_method("spatten:prompt=short")
