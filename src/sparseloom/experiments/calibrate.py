"""Measure what the cost rule goes by, and fit its coefficients (`sparseloom bench --calibrate`).

Dense attention, prediction with selection, and attention under a mask are timed apart, over
lengths, blocks, sparsities and dtypes, interleaved per length.  Each is then a sum of few terms
with coefficients of at least zero, fitted by least squares of relative errors.  Best times count:
what disturbs a run only makes it longer.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch

from sparseloom.experiments.bench_cases import DTYPES, AttentionCase
from sparseloom.experiments.bench_contenders import Tensors, draw_tensors, inputs_of, untrained
from sparseloom.experiments.bench_masks import random_mask
from sparseloom.experiments.timing import interleave
from sparseloom.kernels import attention, available_backends
from sparseloom.kernels.cpu import native
from sparseloom.methods import DynamicSparse, Work, costs
from sparseloom.methods.predictor import predictor_width
from sparseloom.methods.selection import kept_blocks
from sparseloom.results import machine_facts, versions

LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
BLOCKS = ((1, 1), (4, 1), (8, 1), (16, 1), (64, 64))
SPARSITIES = (0.3, 0.6, 0.8, 0.9, 0.97)
LONG = 2048
"""Longer calls take long: of them only these sparsities and dtypes, and none causal."""
LONG_SPARSITIES, LONG_DTYPES = (0.8, 0.97), ("float32", "bfloat16")
PROJECTION, WIDE = 0.25, 0.5
_LIMIT_S = 2.0  # of one contender: long runs need few repeats
_IRRELEVANT = 4.0  # times dense: such points are far from any crossover


@dataclass(frozen=True, slots=True)
class Point:
    """One measured time in seconds, with the case, the dense time beside which it counts, and the
    predictor's width over the head's."""

    case: AttentionCase
    seconds: float
    dense: float
    projection: float = PROJECTION

    @property
    def work(self) -> Work:
        """What selecting leaves to do in the case."""
        return _work(self.case, self.projection)


@dataclass(frozen=True, slots=True)
class Measured:
    """All points, by part."""

    dense: list[Point]
    select: list[Point]
    attend: list[Point]


def calibrate(
    *,
    command: str,
    repeats: int = 5,
    seed: int = 0,
    lengths: Sequence[int] = LENGTHS,
    blocks: Sequence[tuple[int, int]] = BLOCKS,
    sparsities: Sequence[float] = SPARSITIES,
    dtypes: Sequence[str] = tuple(DTYPES),
    progress: Callable[[str], None] | None = None,
) -> tuple[costs.CostTable, list[dict[str, Any]]]:
    """The cost table of this machine, and how well it tells the times it was made from.

    Raises:
        ValueError: the CPU backend is missing: there is nothing to choose between.
    """
    reason = available_backends().get("cpu", "not part of this version")
    if reason is not None:
        raise ValueError(f"calibration needs the CPU backend: {reason}")
    measured = Measured([], [], [])
    for length in lengths:
        cases = [
            AttentionCase(
                q_len=length, kv_len=length, block_size=block, sparsity=share, dtype=dtype,
                causal=causal,
            )
            for block in blocks
            for share in sparsities
            for dtype in dtypes
            for causal in (False, True)
            if not causal or (share == max(sparsities[:-1]) and dtype == "float32")
            if length <= LONG or (share in LONG_SPARSITIES and dtype in LONG_DTYPES and not causal)
        ]  # fmt: skip
        _measure(cases, measured, repeats, seed, progress or (lambda _: None))
    facts = machine_facts()
    table = fit(
        measured,
        cpu=facts.cpu,
        tier=native.active_tier(),
        threads=torch.get_num_threads(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
        versions=versions(),
    )
    return table, check(table, measured)


def fit(measured: Measured, **about: Any) -> costs.CostTable:
    """A cost table from measured points."""
    dense = {
        dtype: _coefficients(points, lambda p: costs.dense_terms(p.case.shape))
        for dtype, points in _by(measured.dense, _dtype).items()
    }
    attend = {
        dtype: {
            block: _coefficients(some, lambda p: costs.attend_terms(p.case.shape, p.work))
            for block, some in _by(points, _block).items()
        }
        for dtype, points in _by(measured.attend, _dtype).items()
    }
    select = {
        block: _coefficients(points, lambda p: costs.select_terms(p.case.shape, p.work))
        for block, points in _by(measured.select, _block).items()
    }
    unit_dtype = "float32" if "float32" in dense else next(iter(dense))
    largest = max(
        (point for point in measured.dense if point.case.dtype == unit_dtype),
        key=lambda point: point.case.shape.allowed_pairs,
    )
    unit = largest.seconds / costs.dense_terms(largest.case.shape)["pairs"]

    def scaled(terms: Mapping[str, float]) -> dict[str, float]:
        return {name: factor / unit for name, factor in terms.items()}

    return costs.CostTable(
        unit_seconds=unit,
        dense={dtype: scaled(terms) for dtype, terms in dense.items()},
        attend={
            dtype: {block: scaled(terms) for block, terms in found.items()}
            for dtype, found in attend.items()
        },
        select={block: scaled(terms) for block, terms in select.items()},
        **about,
    )


def check(table: costs.CostTable, measured: Measured) -> list[dict[str, Any]]:
    """For each measured call: its times, what the table expects, and what the rule would do."""
    select = {
        choice(point.case): point.seconds
        for point in measured.select
        if point.projection == PROJECTION
    }
    rows: list[dict[str, Any]] = []
    for point in measured.attend:
        case = point.case
        chosen = select[choice(case)]
        found = costs.expected(table, case.shape, point.work, case.dtype)
        rows.append(
            {
                "record": "cost check",
                "q_len": case.q_len,
                "kv_len": case.kv_len,
                "block_size": list(case.block_size),
                "sparsity": case.sparsity,
                "dtype": case.dtype,
                "causal": case.causal,
                "dense_ms": 1e3 * point.dense,
                "dense_expected_ms": 1e3 * found.dense,
                "select_ms": 1e3 * chosen,
                "select_expected_ms": 1e3 * found.select,
                "attend_ms": 1e3 * point.seconds,
                "attend_expected_ms": 1e3 * found.attend,
                "ratio": (chosen + point.seconds) / point.dense,
                "expected_ratio": found.ratio,
                "rule": "sparse" if found.ratio <= costs.MARGIN else "dense",
            }
        )
    return rows


def table_rows(table: costs.CostTable) -> list[dict[str, Any]]:
    """The table as a row of the results file."""
    return [{"record": "cost table", **table.model_dump()}]


# ---------------------------------------------------------------------------- measuring


def _measure(
    cases: Sequence[AttentionCase],
    measured: Measured,
    repeats: int,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Times of all cases of one length, interleaved, added to `measured`."""
    runs: dict[tuple[str, AttentionCase, float], Callable[[], object]] = {}
    drawn = draw_tensors(cases[0], seed)
    tensors = {name: drawn.to(dtype, gradients=False) for name, dtype in DTYPES.items()}
    for case in cases:
        plain = choice(case)
        for one in (plain, case):
            dense = all_kept(one)
            runs.setdefault(("dense", dense, 0.0), _dense(dense, tensors[one.dtype]))
        for width in (PROJECTION, WIDE):
            if ("select", plain, width) not in runs:
                runs["select", plain, width] = _select(plain, tensors["float32"], seed, width)
        runs["attend", case, PROJECTION] = _attend(case, tensors[case.dtype], seed)
    named = {f"{part} {i}": run for i, ((part, *_), run) in enumerate(runs.items())}
    with torch.inference_mode():
        times = interleave(
            named,
            repeats=repeats,
            limit_s=_LIMIT_S,
            progress=lambda step: say(f"{cases[0].q_len} tokens: {step}"),
        )
    found = dict(zip(runs, times.values(), strict=True))
    for (part, case, width), timing in found.items():
        beside = found["dense", all_kept(case), 0.0].best_ms / 1e3
        getattr(measured, part).append(Point(case, timing.best_ms / 1e3, beside, width))


def _dense(case: AttentionCase, tensors: Tensors) -> Callable[[], object]:
    return lambda: attention(tensors.query, tensors.key, tensors.value, is_causal=case.causal)


def _select(
    case: AttentionCase, tensors: Tensors, seed: int, projection: float
) -> Callable[[], object]:
    method, inputs = untrained(case, seed, projection), inputs_of(case, tensors)
    return lambda: method.select(inputs)


def _attend(case: AttentionCase, tensors: Tensors, seed: int) -> Callable[[], object]:
    mask = random_mask(
        case.q_len,
        case.kv_len,
        heads=case.heads,
        block_size=case.block_size,
        sparsity=case.sparsity,
        is_causal=case.causal,
        seed=seed,
    )
    return lambda: attention(
        tensors.query, tensors.key, tensors.value, mask, is_causal=case.causal, backend="cpu"
    )


# ---------------------------------------------------------------------------- fitting


def _coefficients(
    points: Sequence[Point], terms: Callable[[Point], Mapping[str, float]]
) -> dict[str, float]:
    """Factors of at least 0 whose sum of terms comes nearest to the points."""
    near = [point for point in points if point.seconds <= _IRRELEVANT * point.dense]
    points = near if len(near) >= len(points) / 4 else points
    rows = [terms(point) for point in points]
    names = list(rows[0])
    matrix = np.array([[row[name] for name in names] for row in rows])
    weight = np.array([1 / max(point.seconds, point.dense / _IRRELEVANT) for point in points])
    target = np.array([point.seconds for point in points]) * weight
    factors = least_squares(matrix * weight[:, None], target)
    return {name: float(factor) for name, factor in zip(names, factors, strict=True) if factor}


def least_squares(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """x ≥ 0 with the least |matrix · x − target|, by trying every set of columns."""
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0] = 1.0
    columns = matrix.shape[1]
    best, error = np.zeros(columns), float(target @ target)
    for count in range(1, columns + 1):
        for chosen in itertools.combinations(range(columns), count):
            some = matrix[:, chosen] / scale[list(chosen)]
            x = np.linalg.lstsq(some, target, rcond=None)[0]
            off = float(((some @ x - target) ** 2).sum())
            # More terms must earn their place: what they gain could be noise.
            if (x >= 0).all() and off < 0.98 * error - 1e-9 * float(target @ target):
                best, error = np.zeros(columns), off
                best[list(chosen)] = x / scale[list(chosen)]
    return best


def _by(points: Sequence[Point], key: Callable[[Point], str]) -> dict[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(key(point), []).append(point)
    return found


def _dtype(point: Point) -> str:
    return point.case.dtype


def _block(point: Point) -> str:
    return "x".join(map(str, point.case.block_size))


@functools.lru_cache(maxsize=4096)
def _work(case: AttentionCase, projection: float) -> Work:
    """What `untrained(case, …)` would leave to do, without making its predictor."""
    settings = DynamicSparse(block_size=case.block_size, sparsity=case.sparsity)
    kept = kept_blocks(
        case.q_len,
        case.kv_len,
        case.block_size,
        is_causal=case.causal,
        sparsity=case.sparsity,
        minimum_keys=settings.minimum_keys,
    )
    width = predictor_width(case.head_dim, projection, rotary=False)
    return Work(case.block_size, kept, width, settings.bits)


def all_kept(case: AttentionCase) -> AttentionCase:
    """The dense call of the same sizes."""
    return dataclasses.replace(case, block_size=(1, 1), sparsity=0.0)


def choice(case: AttentionCase) -> AttentionCase:
    """Selection does not depend on the dtype of attention."""
    return dataclasses.replace(case, dtype="float32")
