"""Generation with cascade pruning, local value pruning and bit planes, on tiny models."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, StaticCache

import sparseloom as sl
from sparseloom.integrations.generation import GenerationLayer
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs
from sparseloom.methods.cascade_steps import CascadeRun
from sparseloom.methods.generation import Generating


@dataclass(frozen=True)
class Cascade(Generating):
    """The settings of one run, as plain numbers."""

    name: ClassVar[str] = "cascade"

    tokens: tuple[float, ...] | None = None
    heads: tuple[int, ...] | None = None
    value_keep: float = 1.0
    key_bits: tuple[int, int] | None = None
    value_bits: int | None = None
    threshold: float | None = None
    decay: float = 1.0
    keep_first: bool = False
    recent: int = 1

    @property
    def stored_key_bits(self) -> tuple[int, int] | None:
        return self.key_bits

    @property
    def stored_value_bits(self) -> int | None:
        return self.value_bits

    def __str__(self) -> str:
        return self.name

    def counts(self, length: int) -> list[int]:
        assert self.tokens is not None
        return [max(1, int(share * length)) for share in self.tokens]

    def new_run(self, layers: int) -> CascadeRun:
        heads = self.heads
        return CascadeRun(
            token_counts=None if self.tokens is None else self.counts,
            head_counts=None if heads is None else lambda _: heads,
            value_keep=self.value_keep,
            threshold=self.threshold,
            decay=self.decay,
            keep_first=self.keep_first,
            recent=self.recent,
        )


EVERYTHING = Cascade(
    tokens=(0.8, 0.4), heads=(4, 3), value_keep=0.5, key_bits=(4, 4), value_bits=6, threshold=0.2,
    decay=0.9,
)  # fmt: skip
PROMPT = 16


def test_keeping_everything_is_dense_token_for_token(
    zoo: SimpleNamespace, causal_family: str
) -> None:
    model, ids = zoo.build(causal_family), zoo.ids(12)
    method = Cascade(key_bits=(12, 4), threshold=0.1)
    settings: dict[str, Any] = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False}
    settings["attention_mask"] = torch.ones_like(ids)
    dense = model.generate(ids, **settings)
    beams = model.generate(ids, **settings, num_beams=3)
    with sl.sparsify(model, method) as sparse:
        assert torch.equal(model.generate(ids, **settings), dense)
        assert sparse.stats()[1]["steps"] == 9
        assert torch.equal(model.generate(ids, **settings, num_beams=3), beams)


@dataclass
class Seen:
    """The attention calls of a run, each with the scales of its keys."""

    cache: DynamicCache
    calls: list[tuple[AttentionInputs, SparseMask | None, Tensor, Any]]

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        layer: Any = self.cache.layers[inputs.layer]
        planes = layer.stored.cache
        scale = None if isinstance(planes, tuple) else planes.key_scale[0, :, 0, 0].numpy()
        self.calls.append((inputs, mask, output, scale))


def softmax(scores: np.ndarray) -> np.ndarray:
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()


def best(scores: np.ndarray, count: int) -> list[int]:
    """Places of the largest, in order; of equal ones the first."""
    ranked = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    return sorted(ranked)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "method",
    [
        Cascade(tokens=(0.8, 0.4)),
        Cascade(tokens=(0.7, 0.7), heads=(4, 2), decay=0.5, keep_first=True),
        Cascade(tokens=(0.5, 0.2), recent=6),
        EVERYTHING,
    ],
    ids=["tokens", "heads", "recent", "everything"],
)
def test_steps_are_those_of_the_published_algorithm(
    zoo: SimpleNamespace, family: str, method: Cascade
) -> None:
    """SpAtten (HPCA 2021), Algorithms 1 and 2 with §III-C and §III-D, one loop for each of them."""
    model, ids, cache = zoo.build(family), zoo.ids(), DynamicCache()
    seen = Seen(cache, [])
    with sl.sparsify(model, method, observer=seen) as sparse:
        zoo.follow(model, ids, cache)
    low_rows = 0
    tokens, heads = np.zeros(0), np.zeros(4)
    alive: list[int] = []
    alive_heads: list[int] = []
    for inputs, mask, out, scale in seen.calls:
        assert inputs.value is not None
        query, key, value = (
            t[0].double().numpy() for t in (inputs.query, inputs.key, inputs.value)
        )
        length, layer, group = key.shape[1], inputs.layer, 4 // key.shape[0]
        tokens = np.pad(tokens, (0, length - len(tokens)))
        if query.shape[1] > 1:
            for h in range(4):
                for i in range(length):
                    p = softmax(query[h, i] @ key[h // group, : i + 1].T * inputs.scale)
                    tokens[: i + 1] += p
                    heads[h] += np.abs(p @ value[h // group, : i + 1]).sum()
            continue
        if layer == 0:
            tokens *= method.decay
            alive, alive_heads = list(range(length)), list(range(4))
        scores = tokens.copy()
        for i in range(method.recent):
            scores[-1 - i] = 1e30 / (i + 1)
        if method.keep_first:
            scores[0] = np.inf
        assert method.tokens is not None
        count = min(method.counts(length)[layer], len(alive))
        alive = [alive[i] for i in best(scores[alive], count)]
        if method.heads is not None and method.heads[layer] < len(alive_heads):
            chosen = best(heads[alive_heads], method.heads[layer])
            alive_heads = [alive_heads[i] for i in chosen]
        assert mask is not None
        wanted = np.zeros((4, length), bool)
        wanted[np.ix_(alive_heads, alive)] = True
        kept = mask.to_bool()[0, :, 0].expand(4, -1).numpy()
        assert np.array_equal(kept, wanted), (layer, length)
        for h in range(4):
            if h not in alive_heads:
                assert not out[0, h].any()
                continue
            k, v = key[h // group, alive], value[h // group, alive]
            if scale is not None:
                codes = np.rint(k / scale[h // group])
                assert np.abs(codes - k / scale[h // group]).max() < 1e-3
                high = np.floor(codes / 16) * 16 * scale[h // group]
                p = softmax(query[h, 0] @ high.T * inputs.scale)
                if p.max() < method.threshold:
                    p = softmax(query[h, 0] @ k.T * inputs.scale)
                    low_rows += 1
            else:
                p = softmax(query[h, 0] @ k.T * inputs.scale)
            tokens[alive] += p
            reads = best(p, max(1, int(method.value_keep * len(alive))))
            e = p[reads] @ v[reads]
            heads[h] += np.abs(e).sum()
            assert np.allclose(out[0, h, 0].numpy(), e, atol=2e-4)
    if method.key_bits is not None:
        assert 0 < low_rows < sum(row["rows"] for row in sparse.stats())
        assert low_rows == sum(row["low_rows"] for row in sparse.stats())


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_sequences(zoo: SimpleNamespace, side: str) -> None:
    model, lengths = zoo.build("llama"), [PROMPT, 11, 6]
    steps = 6
    rows = [zoo.ids(n + steps)[0] for n in lengths]
    ids, mask = torch.zeros(3, PROMPT + steps).long(), torch.zeros(3, PROMPT + steps).long()
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        prompt = slice(PROMPT - n, PROMPT) if side == "left" else slice(0, n)
        ids[b, prompt], mask[b, prompt] = row[:n], 1
        ids[b, PROMPT:], mask[b, PROMPT:] = row[n:], 1
    with sl.sparsify(model, EVERYTHING):
        together = zoo.follow(model, ids, DynamicCache(), mask=mask)[:, 1:]
        for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
            alone = zoo.follow(model, row[None], DynamicCache(), prompt=n)[:, 1:]
            assert torch.allclose(together[b], alone[0], atol=1e-5 * float(alone.abs().max()))


def test_reordered_batches_go_on_as_their_sequences(zoo: SimpleNamespace) -> None:
    model, ids, order = zoo.build("llama"), zoo.ids(batch=3), torch.tensor([2, 2, 0])
    with sl.sparsify(model, EVERYTHING):
        cache = DynamicCache()
        zoo.follow(model, ids[:, :20], cache)
        cache.reorder_cache(cast("torch.LongTensor", order))
        found = zoo.follow(model, ids[order], cache)
        assert torch.allclose(found, zoo.follow(model, ids, DynamicCache())[order, -4:], atol=1e-4)
        cache.batch_select_indices(torch.tensor([2]))
        cache.batch_repeat_interleave(2)
        more = torch.cat([ids[:1], ids[:1, :1]], 1).expand(2, -1)
        found = zoo.follow(model, more, cache)
        assert torch.allclose(found, zoo.follow(model, more[:1], DynamicCache())[:, -1:], atol=1e-4)


@pytest.mark.parametrize("method", [EVERYTHING, Cascade(tokens=(0.6, 0.3))], ids=["all", "tokens"])
def test_cropped_steps_leave_no_trace(zoo: SimpleNamespace, method: Cascade) -> None:
    model, ids, cache = zoo.build("gpt2"), zoo.ids(), DynamicCache()
    other = torch.cat([ids[:, :19], ids[:, 2:5]], 1)
    plain = replace(method, key_bits=None, value_bits=None, threshold=None)
    with sl.sparsify(model, plain):  # the scales of codes remember, as they are meant to
        wanted = zoo.follow(model, ids, DynamicCache())
        zoo.follow(model, other, cache)
        cache.crop(-3)
        assert cache.get_seq_length() == 19
        assert torch.allclose(zoo.follow(model, ids, cache), wanted[:, -5:], atol=1e-5)


def test_compiled_and_reference_backends_agree(zoo: SimpleNamespace) -> None:
    model, ids = zoo.build("llama"), zoo.ids()
    with sl.sparsify(model, EVERYTHING, backend="cpu") as fast:
        found = zoo.follow(model, ids, DynamicCache())
    with sl.sparsify(model, EVERYTHING, backend="reference") as slow:
        wanted = zoo.follow(model, ids, DynamicCache())
    assert torch.allclose(found, wanted, atol=1e-4)
    for row, other in zip(fast.stats(), slow.stats(), strict=True):
        assert row["value_bytes"] == other["value_bytes"]
        assert row["low_rows"] == other["low_rows"]


def test_bytes_read(zoo: SimpleNamespace) -> None:
    """Two key heads of width 8 and two queries each, one step after 20 tokens."""
    model = zoo.build("llama")
    method = Cascade(tokens=(1.0, 0.5), key_bits=(6, 4), value_bits=8, threshold=0.0)
    with sl.sparsify(model, method) as sparse:
        zoo.follow(model, zoo.ids(20), DynamicCache(), prompt=19)
    first, second = sparse.stats()
    assert (first["steps"], first["dense_calls"], first["calls"]) == (1, 1, 2)
    assert first["key_high_bytes"] == 20 * 2 * 8 * 6 / 8
    assert first["key_low_bytes"] == 0
    assert first["value_bytes"] == 20 * 2 * 8
    assert first["dense_cache_bytes"] == 20 * 2 * 16 * 4
    assert second["key_high_bytes"] == 10 * 2 * 8 * 6 / 8
    assert (second["rows"], second["low_rows"]) == (4, 0)
    with sl.sparsify(model, Cascade(key_bits=(6, 4), threshold=1.0, value_keep=0.1)) as sparse:
        zoo.follow(model, zoo.ids(20), DynamicCache(), prompt=19)
    first = sparse.stats()[0]
    assert first["key_low_bytes"] == 20 * 2 * 8 * 4 / 8
    assert first["low_rows"] == 4
    assert first["value_bytes"] == 2 * 4 * 8 * 4  # two of twenty, four query heads, fp32


def test_the_cache_is_of_use_outside(zoo: SimpleNamespace) -> None:
    model, ids = zoo.build("llama"), zoo.ids()
    wanted = zoo.follow(model, ids, DynamicCache())
    cache = DynamicCache()
    with sl.sparsify(model, Cascade(key_bits=(12, 4), value_bits=8)):
        zoo.follow(model, ids[:, :20], cache)
    assert isinstance(cache.layers[0], GenerationLayer)
    error = zoo.follow(model, ids, cache) - wanted[:, -4:]
    assert error.abs().max() < 0.02 * wanted.abs().max()


def test_caches_with_a_past_are_refused(zoo: SimpleNamespace) -> None:
    model, ids, cache = zoo.build("llama"), zoo.ids(), DynamicCache()
    zoo.follow(model, ids[:, :20], cache)
    with (
        sl.sparsify(model, EVERYTHING),
        pytest.raises(ValueError, match="holds 20 tokens that method 'cascade' has not seen"),
    ):
        zoo.follow(model, ids, cache)
    static = StaticCache(config=model.config, max_cache_len=32)
    with sl.sparsify(model, EVERYTHING), pytest.raises(NotImplementedError, match="static"):
        model(input_ids=ids, past_key_values=static)


def test_without_a_cache_everything_is_read(zoo: SimpleNamespace) -> None:
    model, ids = zoo.build("llama"), zoo.ids()
    wanted = model(input_ids=ids, use_cache=False).logits
    with sl.sparsify(model, EVERYTHING):
        assert torch.allclose(model(input_ids=ids, use_cache=False).logits, wanted, atol=1e-5)
