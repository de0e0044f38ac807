"""H2O, StreamingLLM, SnapKV and Quest in tiny models, each beside one loop that spells it out."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

import sparseloom as sl
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Generating

PROMPT, LENGTH, HEADS, KV_HEADS = 16, 24, 4, 2
METHODS = [
    sl.H2O(heavy_keep=0.25, recent_keep=0.25),
    sl.H2O(heavy_keep=3, recent_keep=5),
    sl.StreamingLLM(sinks=2, window=5),
    sl.StreamingLLM(sinks=0, window=0.4),
    sl.SnapKV(token_keep=8, window=4, kernel=3),
    sl.SnapKV(token_keep=0.5, window=3, kernel=5, pooling="max"),
    sl.Quest(token_keep=0.5, page_size=4, dense_layers=1, minimum_pages=1),
    sl.Quest(token_keep=9, page_size=3, dense_layers=0, minimum_pages=1, mask_heads="kv"),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=str)


class Seen:
    """The attention calls of a run."""

    def __init__(self) -> None:
        self.calls: list[tuple[AttentionInputs, SparseMask | None, Tensor]] = []

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        self.calls.append((inputs, mask, output))

    def layer(self, number: int) -> Iterator[tuple[AttentionInputs, Tensor | None, Tensor]]:
        """One layer's calls; what steps kept as (batch, heads, keys)."""
        for inputs, mask, out in self.calls:
            if inputs.layer == number:
                kept = None if mask is None else mask.to_bool()[:, :, 0]
                if kept is not None:
                    kept = kept.repeat_interleave(HEADS // kept.shape[1], dim=1)
                yield inputs, kept, out


def probabilities(query: np.ndarray, keys: np.ndarray, scale: float) -> np.ndarray:
    scores = np.exp((scores := keys @ query * scale) - scores.max())
    return scores / scores.sum()


def best(scores: dict[int, float], count: int) -> list[int]:
    """The places with the highest scores, of equal ones the first; in order."""
    return sorted(sorted(scores, key=lambda place: (-scores[place], place))[:count])


def budget(keep: float, tokens: int) -> int:
    return int(keep) if keep > 1 else int(keep * tokens)


class Reference:
    """One layer and key/value head of one sequence, token by token."""

    def __init__(self, method: Generating, layer: int) -> None:
        self.method, self.layer = method, layer
        self.held: list[int] = []
        self.gathered: dict[int, float] = {}
        self.tokens = 0

    def prompt(self, queries: np.ndarray, keys: np.ndarray, scale: float) -> None:
        """Queries (group, tokens, dim), keys (tokens, dim)."""
        self.tokens = tokens = len(keys)
        self.held = list(range(tokens))
        rows = np.zeros((len(queries), tokens, tokens))
        for g, query in enumerate(queries):
            for i in range(tokens):
                rows[g, i, : i + 1] = probabilities(query[i], keys[: i + 1], scale)
        self.gathered = dict(enumerate(rows.sum((0, 1))))
        if isinstance(self.method, sl.SnapKV):
            method, end = self.method, tokens - self.method.window
            smooth: dict[int, float] = dict.fromkeys(range(end), 0.0)
            for given in rows[:, end:, :end].sum(1):
                wide = np.pad(given, method.kernel // 2)
                for i in range(end):
                    places = wide[i : i + method.kernel]
                    smooth[i] += places.mean() if method.pooling == "mean" else places.max()
            kept = best(smooth, budget(method.token_keep, tokens) - method.window)
            self.held = [*kept, *range(end, tokens)]

    def step(self, queries: np.ndarray, keys: np.ndarray, scale: float) -> list[list[int]]:
        """Queries (group, dim); what each of them reads."""
        method, new = self.method, len(keys) - 1
        if isinstance(method, sl.H2O):
            heavy, recent = (
                budget(x, self.tokens) for x in (method.heavy_keep, method.recent_keep)
            )
            if len(self.held) > heavy + recent:
                old = self.held[:-recent]
                self.held = [*best({i: self.gathered[i] for i in old}, heavy), *self.held[-recent:]]
        if isinstance(method, sl.StreamingLLM):
            window = budget(method.window, self.tokens)
            self.held = [i for i in range(new) if i < method.sinks or i >= new - window]
        self.held = [*self.held, new]
        reads = [self.held] * len(queries)
        if isinstance(method, sl.Quest) and self.layer >= method.dense_layers:
            reads = self.pages(method, queries, keys)
        for query, places in zip(queries, reads, strict=True):
            for place, p in zip(places, probabilities(query, keys[places], scale), strict=True):
                self.gathered[place] = self.gathered.get(place, 0.0) + p
        return reads

    def pages(self, method: sl.Quest, queries: np.ndarray, keys: np.ndarray) -> list[list[int]]:
        size = method.page_size
        pages = [list(range(at, min(at + size, len(keys)))) for at in range(0, len(keys), size)]
        bounds = np.zeros((len(queries), len(pages)))
        for g, query in enumerate(queries):
            for number, page in enumerate(pages):
                low, high = keys[page].min(0), keys[page].max(0)
                bounds[g, number] = np.maximum(query * low, query * high).sum()
        if method.mask_heads == "kv":
            bounds[:] = bounds.mean(0)
        bounds[:, -1] = np.inf
        count = max(budget(method.token_keep, len(keys)) // size, method.minimum_pages)
        chosen = [best(dict(enumerate(row)), count) for row in bounds]
        return [[place for number in row for place in pages[number]] for row in chosen]


@each_method
def test_steps_are_those_of_the_paper(zoo: SimpleNamespace, method: Generating) -> None:
    model, seen = zoo.build("llama"), Seen()
    with sl.sparsify(model, method, observer=seen):
        zoo.follow(model, zoo.ids(LENGTH), DynamicCache(), prompt=PROMPT)
    group, left_out = HEADS // KV_HEADS, 0
    for layer in range(2):
        heads = [Reference(method, layer) for _ in range(KV_HEADS)]
        for inputs, kept, out in seen.layer(layer):
            assert inputs.value is not None
            query, key, value = (
                t[0].double().numpy() for t in (inputs.query, inputs.key, inputs.value)
            )
            for h, one in enumerate(heads):
                mine = slice(h * group, (h + 1) * group)
                if kept is None:
                    one.prompt(query[mine], key[h], inputs.scale)
                    continue
                reads = one.step(query[mine, 0], key[h], inputs.scale)
                for g, places in enumerate(reads):
                    found = kept[0, mine][g].nonzero()[:, 0].tolist()
                    assert found == places, (layer, h, g, len(key[h]))
                    p = probabilities(query[mine][g, 0], key[h][places], inputs.scale)
                    assert np.allclose(out[0, mine][g, 0].numpy(), p @ value[h][places], atol=1e-5)
                    left_out += len(key[h]) - len(places)
    assert left_out > 100


@each_method
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_is_its_sequences(zoo: SimpleNamespace, method: Generating, side: str) -> None:
    model, lengths, steps = zoo.build("llama"), [PROMPT, 6], 4
    rows = [zoo.ids(n + steps)[0] for n in lengths]
    ids, mask = torch.zeros(2, PROMPT + steps).long(), torch.zeros(2, PROMPT + steps).long()
    for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
        prompt = slice(PROMPT - n, PROMPT) if side == "left" else slice(0, n)
        ids[b, prompt], mask[b, prompt] = row[:n], 1
        ids[b, PROMPT:], mask[b, PROMPT:] = row[n:], 1
    with sl.sparsify(model, method):
        together = zoo.follow(model, ids, DynamicCache(), mask=mask)[:, 1:]
        for b, (n, row) in enumerate(zip(lengths, rows, strict=True)):
            alone = zoo.follow(model, row[None], DynamicCache(), prompt=n)[:, 1:]
            assert torch.allclose(together[b], alone[0], atol=1e-5 * float(alone.abs().max()))


@each_method
def test_reordered_batches_go_on_as_their_sequences(
    zoo: SimpleNamespace, method: Generating
) -> None:
    model, ids, order = zoo.build("llama"), zoo.ids(batch=3), torch.tensor([2, 2, 0])
    with sl.sparsify(model, method):
        wanted = zoo.follow(model, ids, DynamicCache())[order]
        for before in (PROMPT, 20):  # before the first step, and after some
            cache = DynamicCache()
            zoo.follow(model, ids[:, :before], cache)
            cache.reorder_cache(cast("torch.LongTensor", order))
            found = zoo.follow(model, ids[order], cache)
            assert torch.allclose(found, wanted[:, before - LENGTH :], atol=1e-4)
        cache.crop(20)  # the history was reordered, too
        assert torch.allclose(zoo.follow(model, ids[order], cache), wanted[:, -4:], atol=1e-4)


@each_method
def test_cropped_tokens_leave_no_trace(zoo: SimpleNamespace, method: Generating) -> None:
    model, ids, cache = zoo.build("llama"), zoo.ids(), DynamicCache()
    other = torch.cat([ids[:, :18], ids[:, 2:5]], 1)
    with sl.sparsify(model, method):
        wanted = zoo.follow(model, ids, DynamicCache())
        zoo.follow(model, other, cache)
        cache.crop(18)
        assert torch.allclose(zoo.follow(model, ids, cache), wanted[:, -6:], atol=1e-5)
        cache.crop(PROMPT)
        assert torch.allclose(zoo.follow(model, ids, cache), wanted[:, 1:], atol=1e-5)


def test_a_crop_into_the_prompt_begins_another_one(zoo: SimpleNamespace) -> None:
    """The second half of the prompt holds the whole window, so nothing of the first one counts."""
    model, ids, cache = zoo.build("llama"), zoo.ids(), DynamicCache()
    other = torch.cat([ids[:, :8], ids[:, :12]], 1)
    with sl.sparsify(model, METHODS[4]):
        wanted = zoo.follow(model, ids, DynamicCache())
        zoo.follow(model, other, cache)
        cache.crop(8)
        with torch.no_grad():
            model(input_ids=ids[:, 8:PROMPT], past_key_values=cache)
        assert torch.allclose(zoo.follow(model, ids, cache), wanted[:, 1:], atol=1e-5)


@each_method
def test_a_prompt_may_come_in_parts_and_another_may_follow(
    zoo: SimpleNamespace, method: Generating
) -> None:
    model, ids, cache, seen = zoo.build("llama"), zoo.ids(28), DynamicCache(), Seen()
    with torch.no_grad(), sl.sparsify(model, method, observer=seen):
        wanted = zoo.follow(model, ids[:, :20], DynamicCache())
        seen.calls.clear()
        model(input_ids=ids[:, :13], past_key_values=cache)
        model(input_ids=ids[:, 13:PROMPT], past_key_values=cache)
        assert torch.allclose(zoo.follow(model, ids[:, :20], cache), wanted[:, 1:], atol=1e-4)
        model(input_ids=ids[:, 20:23], past_key_values=cache)
        zoo.follow(model, ids, cache)
    for layer in range(2):
        gone = torch.zeros(1, HEADS, 0, dtype=torch.bool)
        for _, kept, _ in seen.layer(layer):
            if kept is None:
                continue
            assert kept[..., -1].all()
            assert isinstance(method, sl.Quest) or not (kept[..., : gone.shape[-1]] & gone).any()
            gone = ~kept
        assert gone.shape[-1] == 28


@pytest.mark.parametrize(
    "method",
    [
        sl.H2O(heavy_keep=10, recent_keep=10),
        sl.StreamingLLM(),
        sl.SnapKV(token_keep=1.0),
        sl.Quest(token_keep=1.0, page_size=1, dense_layers=0),
    ],
    ids=str,
)
def test_keeping_everything_is_dense_token_for_token(
    zoo: SimpleNamespace, method: Generating
) -> None:
    model, inputs = zoo.build("llama"), zoo.inputs("left", length=12)
    settings: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    for beams in (1, 3):
        dense = model.generate(**inputs, **settings, num_beams=beams)
        with sl.sparsify(model, method):
            assert torch.equal(model.generate(**inputs, **settings, num_beams=beams), dense)


@each_method
def test_half_precision_and_a_prompt_in_inference_mode(
    zoo: SimpleNamespace, method: Generating
) -> None:
    model, ids, cache = zoo.build("llama"), zoo.ids(20), DynamicCache()
    with sl.sparsify(model, method):
        wanted = zoo.follow(model, ids, DynamicCache())
        with torch.inference_mode():
            model(input_ids=ids[:, :PROMPT], past_key_values=cache)
        assert torch.equal(zoo.follow(model, ids, cache), wanted[:, 1:])
        half = zoo.follow(model.to(torch.bfloat16), ids, DynamicCache())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_bytes_read(zoo: SimpleNamespace) -> None:
    """Two key heads of width 8 in fp32; the second step after a prompt of 19."""
    model, ids = zoo.build("llama"), zoo.ids(21)
    wide = KV_HEADS * 8 * 4
    with sl.sparsify(model, sl.H2O(heavy_keep=4, recent_keep=3)) as sparse:
        zoo.follow(model, ids, DynamicCache(), prompt=19)
    first = sparse.stats()[0]
    assert first["steps"] == 2
    assert first["key_high_bytes"] == first["value_bytes"] == 2 * 8 * wide
    assert first["dense_cache_bytes"] == 2 * (20 + 21) * wide
    assert (first["index_bytes"], first["prediction_macs"]) == (0, 0)

    seen, method = Seen(), sl.Quest(token_keep=8, page_size=4, dense_layers=1, minimum_pages=1)
    with sl.sparsify(model, method, observer=seen) as sparse:
        zoo.follow(model, ids, DynamicCache(), prompt=19)
    first, second = sparse.stats()
    assert first["key_high_bytes"] == (20 + 21) * wide
    assert (first["index_bytes"], first["prediction_macs"]) == (0, 0)
    steps = [kept for _, kept, _ in seen.layer(1) if kept is not None]
    union = [int(kept.unflatten(1, (KV_HEADS, -1)).any(2).sum()) for kept in steps]
    assert sum(union) > sum(int(kept.sum()) for kept in steps) / 2  # heads want different pages
    assert second["key_high_bytes"] == second["value_bytes"] == sum(union) * 8 * 4
    assert second["index_bytes"] == 2 * (5 + 6) * wide
    assert second["prediction_macs"] == 2 * (5 + 6) * HEADS * 8


def test_snapkv_counts_what_choosing_takes(zoo: SimpleNamespace) -> None:
    model = zoo.build("llama")
    with sl.sparsify(model, METHODS[4]) as sparse:
        zoo.follow(model, zoo.ids(20), DynamicCache())
    row = sparse.stats()[0]
    assert row["prediction_macs"] == HEADS * 4 * PROMPT * 8
    assert row["key_high_bytes"] == sum(8 + n for n in (1, 2, 3, 4)) * KV_HEADS * 8 * 4


@each_method
def test_steps_are_recorded(zoo: SimpleNamespace, method: Generating) -> None:
    trace = sl.record(zoo.build("llama"), method, {"input_ids": zoo.ids(PROMPT)}, new_tokens=3)
    calls = trace.selection(str(method)).calls
    assert [call.mask is None for call in calls] == [True] * 2 + [False] * 6
    masks = [call.mask for call in calls if call.mask is not None]
    assert all(mask.q_len == 1 for mask in masks)
    assert any(mask.offsets[0, 0, -1] < mask.kv_len for mask in masks)


def test_what_cannot_be_done_is_refused(zoo: SimpleNamespace) -> None:
    rotated = sl.StreamingLLM(positions="cache")
    with (
        sl.sparsify(zoo.build("llama"), rotated) as sparse,
        pytest.raises(NotImplementedError, match="positions 'cache' is not supported"),
    ):
        sparse.model(input_ids=torch.tensor([[5, 6]]), use_cache=True)
    with (
        pytest.raises(NotImplementedError, match="h2o prunes caches, and BertModel has none"),
        sl.sparsify(zoo.build("bert"), sl.H2O()),
    ):
        pass
