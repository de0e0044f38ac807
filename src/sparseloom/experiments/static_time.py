"""Time attention under static masks, planned once, against dense SDPA in the same run.

The masks are drawn to look learned: every head has the first query tile, the diagonal tiles and the
first key tile, and then bands, stripes and blocks until its share of the tiles is used up. One
contender computes all of that exactly, another one half as much and the rest of the keys as means
of four.

    python -m sparseloom.experiments.static_time

`--folders` adds models saved with their learned regions: attention of all their layers, at every
length that the regions were chosen for, on the same drawn inputs.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sparseloom.experiments.study_command import run_command
from sparseloom.experiments.timing import interleave
from sparseloom.kernels.regions import RegionPlan, plan_regions, region_attention
from sparseloom.regions import (
    TILE_KEYS,
    TILE_QUERIES,
    HeadRegions,
    Mode,
    Region,
    band,
    block,
    decode_heads,
    density,
    region_limit,
    rows,
    stripe,
)

DENSITY = 0.38
_SHORTEST = 128
"""Tokens of which heads are drawn."""
_TRIES = 200


def drawn_head(n: int, share: float, rng: np.random.Generator) -> HeadRegions:
    """Regions of a head for n tokens that computes about `share` of its tiles, and never more.

    Args:
        n: tokens, at least 128.
        share: of the tiles; the forced ones are kept whatever it is.
        rng: draws the regions.
    """
    found: HeadRegions = (rows(0, 1, n), band(0, TILE_QUERIES), stripe(0, TILE_KEYS))
    for _ in range(_TRIES):
        more = (*found, _drawn_region(n, rng))
        if len(more) > region_limit(more):
            break
        if density(more, n, n) <= share:
            found = more
    return found


def with_means(head: HeadRegions, n: int) -> HeadRegions:
    """The head with every tile it leaves out as means of four keys."""
    return (*head, stripe(0, -(-n // TILE_QUERIES) * TILE_QUERIES, mode=Mode.COARSE, segment=4))


@torch.inference_mode()
def time_rows(
    n: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    heads: int = 12,
    batch: int = 1,
    share: float = DENSITY,
    repeats: int = 9,
    flex: bool = False,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Milliseconds of attention at one size, and how many times less than dense it is.

    Args:
        n: tokens.
        head_dim: dims per head.
        dtype: of the inputs.
        heads: each with a mask of its own, shared by the batch.
        batch: sequences.
        share: of the tiles that a head may compute exactly; (share − 1/4) / (3/4) beside means.
        repeats: measured rounds, all contenders in each.
        flex: also run the exact masks through FlexAttention, which compiles first.
        seed: of masks and inputs.
    """
    rng = np.random.default_rng(seed)
    exact = [drawn_head(n, share, rng) for _ in range(heads)]
    near = [with_means(drawn_head(n, (share - 0.25) / 0.75, rng), n) for _ in range(heads)]
    masks = [("static", [exact], "auto"), ("static with means", [near], "auto")]
    if flex:
        masks.append(("static, FlexAttention", [exact], "flex"))
    return _timed(masks, n, head_dim, dtype, batch=batch, repeats=repeats, seed=seed)


@torch.inference_mode()
def time_learned(
    folder: Path, dtype: torch.dtype, *, tokens: int = 2048, repeats: int = 9, seed: int = 0
) -> list[dict[str, Any]]:
    """Milliseconds of all layers of a model under its learned regions, beside dense ones.

    Args:
        folder: of a model saved with regions.
        dtype: of the inputs, which are drawn.
        tokens: of all sequences of a batch together, at the least one sequence.
        repeats: measured rounds, all contenders in each.
        seed: of the inputs.

    Raises:
        ValueError: the model has no regions.
    """
    from sparseloom.integrations import describe

    model, method, table = _regions_of(folder)
    shape = describe(model)
    found: list[dict[str, Any]] = []
    for n in map(int, table.lengths):
        layers = [list(decode_heads(table.encoded(n, layer))) for layer in range(shape.layers)]
        rows = _timed(
            [(f"learned, {folder.name}", layers, "auto")], n, shape.head_dim, dtype,
            batch=max(1, tokens // n), is_causal=shape.is_causal, repeats=repeats, seed=seed,
        )  # fmt: skip
        # Of the tiles that causality allows.
        rows[1]["density"] = method.tile_density(n, is_causal=shape.is_causal)
        found += [{**row, "layers": shape.layers, "folder": str(folder)} for row in rows]
    return found


def _regions_of(folder: Path) -> tuple[Any, Any, Any]:
    """A model with static regions, its method, its regions."""
    from sparseloom.methods import StaticSparse
    from sparseloom.training import load

    model, method = load(folder)
    if not isinstance(method, StaticSparse) or method.regions is None:
        raise ValueError(f"folders must hold models with static regions, got {folder}")
    return model, method, method.regions


def _timed(
    masks: list[tuple[str, list[list[HeadRegions]], str]],
    n: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    batch: int,
    repeats: int,
    seed: int,
    is_causal: bool = False,
) -> list[dict[str, Any]]:
    """Rows of (contender, heads of each layer, backend), after that of dense SDPA."""
    generator = torch.Generator().manual_seed(seed)
    layers, heads = len(masks[0][1]), len(masks[0][1][0])
    query, key, value = (
        torch.randn(batch, heads, n, head_dim, generator=generator).to(dtype) for _ in range(3)
    )

    def dense() -> None:
        for _ in range(layers):
            F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)

    def sparse(plans: list[RegionPlan], backend: str) -> None:
        for plan in plans:
            region_attention(query, key, value, plan, backend=backend)

    runs: dict[str, Callable[[], object]] = {"dense SDPA": dense}
    facts: dict[str, dict[str, float]] = {"dense SDPA": {"density": 1.0, "plan_ms": 0.0}}
    for name, regions, backend in masks:
        began = time.perf_counter()
        plans = [plan_regions(layer, n, n, is_causal=is_causal) for layer in regions]
        planning = time.perf_counter() - began
        work = [density(head, n, n) for layer in regions for head in layer]
        facts[name] = {"density": sum(work) / len(work), "plan_ms": planning * 1e3}
        runs[name] = partial(sparse, plans, backend)
    times = interleave(runs, repeats=repeats, warmup=2)
    return [
        {
            "record": "static_time",
            "contender": name,
            "q_len": n,
            "kv_len": n,
            "batch": batch,
            "heads": heads,
            "head_dim": head_dim,
            "dtype": str(dtype).removeprefix("torch."),
            "causal": is_causal,
            **facts[name],
            "ms": timing.ms,
            "spread": timing.spread,
            "best_ms": timing.best_ms,
            "speedup": times["dense SDPA"].ms / timing.ms,
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
        }
        for name, timing in times.items()
    ]


def _drawn_region(n: int, rng: np.random.Generator) -> Region:
    """A band, a stripe or a block, the larger the more tokens there are."""
    scale = max(1, n // 512)
    tiles = -(-n // TILE_KEYS)
    kind = rng.integers(3)
    if kind == 0:
        return band(16 * int(rng.integers(-4, 5)) * scale, 32 * int(rng.integers(1, 7)) * scale)
    if kind == 1:
        first = TILE_KEYS * int(rng.integers(tiles))
        return stripe(first, TILE_KEYS * int(rng.integers(1, 4)) * scale)
    r0, r1 = sorted(rng.choice(n // TILE_QUERIES + 1, 2, replace=False).tolist())
    first, end = sorted(rng.choice(tiles + 1, 2, replace=False).tolist())
    return block(r0, r1, first * TILE_KEYS, (end - first) * TILE_KEYS)


@dataclass(frozen=True, slots=True)
class Settings:
    """What is timed: lengths and folders are separated by commas.

    `share` of the tiles that a drawn head computes, `flex` to run FlexAttention too.
    """

    lengths: str = "512,2048"
    repeats: int = 9
    share: float = DENSITY
    flex: bool = False
    folders: str = ""


def run_study(settings: Settings) -> list[dict[str, Any]]:
    """All rows, said one by one.

    Raises:
        ValueError: a length below the shortest for which heads are drawn, or no number.
        FileNotFoundError: a folder without a model.
    """
    lengths = [_length(word) for word in settings.lengths.split(",")]
    folders = [Path(word) for word in settings.folders.split(",") if word]
    for folder in folders:
        _regions_of(folder)  # before anything is timed
    found: list[dict[str, Any]] = []

    def say(rows: list[dict[str, Any]]) -> None:
        found.extend(rows)
        for row in rows:
            sys.stdout.write(
                f"{row['q_len']} tokens, {row['head_dim']} dims, {row['dtype']}, "
                f"{row['contender']}: {row['ms']:.1f} ms at density {row['density']:.3f} "
                f"({row['speedup']:.2f}x)\n"
            )

    for dtype in (torch.float32, torch.bfloat16):
        for n in lengths:
            for head_dim in (64, 32):
                rows = time_rows(
                    n, head_dim, dtype, batch=max(1, 2048 // n), share=settings.share,
                    repeats=settings.repeats, flex=settings.flex,
                )  # fmt: skip
                say(rows)
        for folder in folders:
            say(time_learned(folder, dtype, repeats=settings.repeats))
    return found


def _length(word: str) -> int:
    if not word.isdecimal() or int(word) < _SHORTEST:
        raise ValueError(f"lengths must be numbers of {_SHORTEST} or more, got {word!r}")
    return int(word)


def main() -> None:
    """Command line of the measurement."""
    run_command(
        "static_time", __doc__, Settings(), lambda settings, *_: run_study(settings),
        keeps=False, reads=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
