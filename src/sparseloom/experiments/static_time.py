"""Time attention under static masks, planned once, against dense SDPA in the same run.

The masks are drawn to look learned: every head has the first query tile, the diagonal tiles and the
first key tile, and then bands, stripes and blocks until its share of the tiles is used up. One
contender computes all of that exactly, another one half as much and the rest of the keys as means
of four.

    python -m sparseloom.experiments.static_time
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sparseloom.experiments.timing import interleave
from sparseloom.kernels.regions import plan_regions, region_attention
from sparseloom.regions import (
    TILE_KEYS,
    TILE_QUERIES,
    HeadRegions,
    Mode,
    Region,
    band,
    block,
    density,
    region_limit,
    rows,
    stripe,
)
from sparseloom.results import module_command, write_results

DENSITY = 0.38
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
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(batch, heads, n, head_dim, generator=generator).to(dtype)
              for _ in range(3)]  # fmt: skip
    query, key, value = inputs
    exact = [drawn_head(n, share, rng) for _ in range(heads)]
    near = [with_means(drawn_head(n, (share - 0.25) / 0.75, rng), n) for _ in range(heads)]
    runs: dict[str, Callable[[], object]] = {
        "dense SDPA": lambda: F.scaled_dot_product_attention(query, key, value)
    }
    facts: dict[str, dict[str, float]] = {"dense SDPA": {"density": 1.0, "plan_ms": 0.0}}
    masks = [("static", exact, "auto"), ("static with means", near, "auto")]
    if flex:
        masks.append(("static, FlexAttention", exact, "flex"))
    for name, regions, backend in masks:
        began = time.perf_counter()
        plan = plan_regions(regions, n, n)
        planning = time.perf_counter() - began
        work = sum(density(head, n, n) for head in regions) / heads
        facts[name] = {"density": work, "plan_ms": planning * 1e3}
        runs[name] = lambda plan=plan, backend=backend: region_attention(
            query, key, value, plan, backend=backend
        )
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


def main() -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("results/static_time.json"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--share", type=float, default=DENSITY)
    parser.add_argument("--flex", action="store_true")
    arguments = parser.parse_args()
    found: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16):
        for n in arguments.lengths:
            for head_dim in (64, 32):
                found += time_rows(
                    n, head_dim, dtype, batch=max(1, 2048 // n), share=arguments.share,
                    repeats=arguments.repeats, flex=arguments.flex,
                )  # fmt: skip
                for row in found[-4 if arguments.flex else -3 :]:
                    sys.stdout.write(
                        f"{n} tokens, {head_dim} dims, {row['dtype']}, {row['contender']}: "
                        f"{row['ms']:.1f} ms at density {row['density']:.3f} "
                        f"({row['speedup']:.2f}x)\n"
                    )
    command = module_command("sparseloom.experiments.static_time")
    write_results(arguments.out, found, command=command)


if __name__ == "__main__":
    main()
