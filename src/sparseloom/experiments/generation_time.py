"""Time the attention of one generation step, all layers, with SpAtten's cache and dense.

Random keys and scores of GPT-2 small's shape: such probabilities are flat, so whether rows fetch
the low bits is not left to them. In one contender no row does, in the other all do.

    python -m sparseloom.experiments.generation_time
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from sparseloom.experiments.study_command import run_command
from sparseloom.experiments.timing import interleave
from sparseloom.integrations.counts import LayerCounts
from sparseloom.integrations.generate import generate_step
from sparseloom.integrations.generation import GenerationLayer, generation_layer
from sparseloom.methods import SpAtten
from sparseloom.methods.base import AttentionInputs
from sparseloom.methods.settings import check_at_least

SMALL_TRACE = (0.9, 0.7, *(0.2,) * 4, *(0.1,) * 6)
"""Tokens per layer of GPT-2 small in the published trace (keep 921, 716, 204, 102 of 1024)."""


@torch.inference_mode()
def time_rows(
    *,
    kv_len: int = 8192,
    heads: int = 12,
    head_dim: int = 64,
    shares: tuple[float, ...] = SMALL_TRACE,
    repeats: int = 9,
) -> list[dict[str, Any]]:
    """Milliseconds of attention per step, and how many times less than dense it is.

    The dense time is that of SDPA alone. SpAtten's holds everything: quantising and storing the new
    token, ranking, attention, scores and statistics. The dense cache copies itself at each step,
    which is timed apart.

    Raises:
        ValueError: no keys, or no rounds.
    """
    check_at_least("kv_len", kv_len, 1)
    generator = torch.Generator().manual_seed(0)

    def draw(length: int) -> Tensor:
        return torch.randn(1, heads, length, head_dim, generator=generator)

    layers = len(shares)
    cached = [(draw(kv_len - 1), draw(kv_len - 1)) for _ in range(layers)]
    query, key, value = draw(1), draw(1), draw(1)
    scores = torch.rand(1, heads, kv_len - 1, generator=generator)
    runs: dict[str, Callable[[], object]] = {}
    full = [tuple(torch.cat(pair, 2) for pair in zip(one, (key, value), strict=True))
            for one in cached]  # fmt: skip

    def dense() -> None:
        for keys, values in full:
            F.scaled_dot_product_attention(query, keys, values)

    def copies() -> None:
        for keys, values in cached:
            layer = DynamicLayer()
            layer.update(keys[:, :, :0], values[:, :, :0])
            layer.keys, layer.values = keys, values
            F.scaled_dot_product_attention(query, *layer.update(key, value))

    runs["dense"], runs["dense with its cache"] = dense, copies
    for name, threshold in (("spatten", 0.0), ("spatten, all low bits", 1.0)):
        method = SpAtten(
            token_keep=shares, head_keep=None, value_keep=0.2, key_bits=(6, 4), value_bits=6,
            threshold=threshold,
        )  # fmt: skip
        runs[name] = _stepper(method, cached, scores, (query, key, value))
    times = interleave(runs, repeats=repeats, warmup=2)
    baseline = times["dense"]
    return [
        {
            "record": "generation_time",
            "contender": name,
            "layers": layers,
            "heads": heads,
            "head_dim": head_dim,
            "kv_len": kv_len,
            "ms": time.ms,
            "spread": time.spread,
            "best_ms": time.best_ms,
            "speedup": baseline.ms / time.ms,
            "threads": torch.get_num_threads(),
        }
        for name, time in times.items()
    ]


def _stepper(
    method: SpAtten,
    cached: list[tuple[Tensor, Tensor]],
    scores: Tensor,
    new: tuple[Tensor, Tensor, Tensor],
) -> Callable[[], None]:
    """Runs one step in all layers; each one leaves the cache a token longer."""
    cache, (query, key, value) = DynamicCache(), new
    layers: list[GenerationLayer] = []
    for number, (keys, values) in enumerate(cached):
        layer = generation_layer(cache, number, method, len(cached), number)
        inputs = _inputs(number, key, *layer.update(keys, values))
        layer.settle()
        layer.run.prompt(inputs, scores, scores.new_zeros(1, scores.shape[1]))
        layers.append(layer)
    counts = LayerCounts()

    def run() -> None:
        for number, layer in enumerate(layers):
            layer.reads_planes = True
            inputs = _inputs(number, query, *layer.update(key, value))
            generate_step(layer, inputs, counts, backend="auto", dropout_p=0.0, observed=False)

    return run


def _inputs(layer: int, query: Tensor, key: Tensor, value: Tensor) -> AttentionInputs:
    return AttentionInputs(
        query=query, key=key, value=value, layer=layer, is_causal=True, scale=query.shape[3] ** -0.5
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """Keys in the cache, and measured rounds."""

    kv_len: int = 8192
    repeats: int = 9


def run_study(settings: Settings) -> list[dict[str, Any]]:
    """All rows, said one by one."""
    rows = time_rows(kv_len=settings.kv_len, repeats=settings.repeats)
    for row in rows:
        sys.stdout.write(f"{row['contender']}: {row['ms']:.1f} ms ({row['speedup']:.2f}x)\n")
    return rows


def main() -> None:
    """Command line of the measurement."""
    run_command(
        "generation_time", __doc__, Settings(), lambda settings, *_: run_study(settings),
        stored=lambda _: Path("results/spatten_generation_time.json"), keeps=False, reads=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
