"""Measure a card for the cost rule (`sparseloom bench --device cuda --calibrate`).

Dense attention by PyTorch's fastest kernel, prediction with selection, and attention under a mask
are timed apart over lengths, blocks and sparsities; terms and fit are those of the CPU's table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import torch

from sparseloom.experiments.bench_cases import AttentionCase
from sparseloom.experiments.calibrate import (
    Measured,
    Point,
    all_kept,
    check,
    choice,
    fit,
)
from sparseloom.experiments.gpu import contenders
from sparseloom.experiments.gpu.bench import fastest_dense
from sparseloom.experiments.gpu.card import check_card
from sparseloom.experiments.gpu.cases import HEAD_DIM, HEADS
from sparseloom.experiments.gpu.clock import CudaClock, interleave
from sparseloom.methods import costs
from sparseloom.results import versions

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
BLOCKS = ((8, 1), (16, 1), (64, 1), (128, 1), (128, 128))
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)
DTYPES = ("bfloat16", "float16")
NAMES = ("sdpa cudnn", "sdpa flash", contenders.OURS, contenders.SELECT)

Say = Callable[[str], None]
Times = dict[str, float]


def calibrate_card(
    *, command: str, repeats: int = 5, seed: int = 0, progress: Say | None = None
) -> tuple[costs.CostTable, list[dict[str, Any]]]:
    """The cost table of this card, and how well it tells the times it was made from.

    Raises:
        SparseloomError: no CUDA device.
        RuntimeError: a backend cannot run on it.
    """
    check_card()
    say, clock = progress or (lambda _: None), CudaClock()
    measured = Measured([], [], [])
    for case in calibration_cases():
        say(case.describe())
        add_points(case, best_seconds(case, clock, repeats, seed), measured)
    table = fit(
        measured,
        cpu=torch.cuda.get_device_name(),
        tier=costs.tier_of_card(),
        threads=1,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=versions(),
    )
    return table, check(table, measured)


def calibration_cases(
    lengths: Sequence[int] = LENGTHS, blocks: Sequence[tuple[int, int]] = BLOCKS
) -> Iterator[AttentionCase]:
    """What is measured: causal where heads are as many and as wide as in the benchmark, and a few
    calls with fewer and narrower heads, without which no term could be told from another."""
    for length in lengths:
        for block in blocks:
            for sparsity in SPARSITIES:
                for dtype in DTYPES:
                    for heads, head_dim, causal in (
                        (HEADS, HEAD_DIM, True),
                        *(((8, 64, False),) if sparsity == 0.9 and length <= 8192 else ()),
                    ):
                        yield AttentionCase(
                            q_len=length, kv_len=length, heads=heads, kv_heads=heads,
                            head_dim=head_dim, block_size=block, sparsity=sparsity, dtype=dtype,
                            causal=causal,
                        )  # fmt: skip


def best_seconds(case: AttentionCase, clock: CudaClock, repeats: int, seed: int) -> Times:
    """Least seconds of each contender that takes the case.

    Raises:
        RuntimeError: one of ours does not: a rule cannot be made without it.
    """
    makers = {
        name: make for name, make in contenders.makers_of(case, seed).items() if name in NAMES
    }
    found, _, refused = contenders.contenders_of(case, makers)
    for name in (contenders.OURS, contenders.SELECT):
        if name in refused:
            raise RuntimeError(f"{case.describe()}: {name} cannot run: {refused[name]}")
    with torch.inference_mode():
        ready = {name: clock.prepare(contender.run) for name, contender in found.items()}
        times = interleave(ready, clock, repeats=repeats)
    torch.cuda.empty_cache()
    dense = fastest_dense(times)
    return {
        "dense": times[dense].best_ms / 1e3,
        "select": times[contenders.SELECT].best_ms / 1e3,
        "attend": times[contenders.OURS].best_ms / 1e3,
    }


def add_points(case: AttentionCase, seconds: Times, measured: Measured) -> None:
    """Put the three times of a case where they belong."""
    dense = seconds["dense"]
    measured.dense.append(Point(all_kept(case), dense, dense))
    measured.select.append(Point(choice(case), seconds["select"], dense))
    measured.attend.append(Point(case, seconds["attend"], dense))
