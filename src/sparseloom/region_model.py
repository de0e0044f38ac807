"""What an accelerator computes for one head of a static mask: run after run, in numpy.

After Dai et al. 2023 (DAC); region design ours. A query tile takes the runs of its regions one by
one; a row's softmax, in base 2, is merged on the way: each run raises the integer maximum m and
adds to the sum ℓ, and in the end all powers are shifted to the last maximum and divided by ℓ.
`merged_attention` does that in fp64 and equals one softmax over the union of the regions;
`integer_attention` does it in the integers of `softermax`, from 8-bit codes to exact sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64

from sparseloom.regions import (
    PATTERN_KEYS,
    TILE_KEYS,
    TILE_QUERIES,
    Mode,
    Region,
    by_priority,
    runs,
)
from sparseloom.softermax import (
    RunPowers,
    SoftermaxFormat,
    add_run,
    empty_rows,
    normalize,
    score_codes,
)

_LOG2E = float(np.log2(np.e))
LOW_CODE = 7
"""Largest 4-bit code of a LOW_PRECISION region."""


class RunWork(NamedTuple):
    """One run of one query tile.

    queries: rows of the tile.
    keys: the keys, or segments of `size` keys, that the run meets.
    counts: valid keys that each of them stands for, 1 for keys.
    allowed: pairs that take part.
    """

    region: Region
    queries: slice
    keys: Int64[np.ndarray, " keys"]
    counts: Int64[np.ndarray, " keys"]
    allowed: Bool[np.ndarray, "queries keys"]


Order = Callable[[list[RunWork]], list[RunWork]]


def run_work(
    regions: Sequence[Region], q_len: int, kv_len: int, n_valid: int | None = None
) -> Iterator[list[RunWork]]:
    """The runs of each query tile, in the order of the sequencer: by priority, then by key.

    Arguments and errors as in `sparseloom.regions.owners`. Runs without a valid key are left out.
    """
    found = runs(regions, q_len, kv_len, n_valid)
    n_valid = kv_len if n_valid is None else n_valid
    rank = {region: place for place, region in enumerate(by_priority(regions))}
    tiles: list[list[tuple[int, RunWork]]] = [[] for _ in range(-(-q_len // TILE_QUERIES))]
    for t, begin, end, owner in zip(*(x.tolist() for x in found), strict=True):
        region = regions[owner]
        queries = slice(t * TILE_QUERIES, min((t + 1) * TILE_QUERIES, q_len))
        size = region.segment
        last = min(end * TILE_KEYS, n_valid)
        keys = np.arange(begin * TILE_KEYS // size, -(-last // size))
        if region.mode is Mode.STRIDED:
            keys = keys[(region.pattern >> keys % PATTERN_KEYS & 1).astype(np.bool_)]
        allowed = np.ones((queries.stop - queries.start, len(keys)), np.bool_)
        if region.causal and region.mode is not Mode.COARSE:
            position = np.arange(queries.start, queries.stop) + kv_len - q_len
            allowed = keys <= position[:, None]
        if len(keys):
            counts = np.minimum((keys + 1) * size, n_valid) - keys * size
            tiles[t].append((rank[owner], RunWork(region, queries, keys, counts, allowed)))
    for tile in tiles:
        yield [work for _, work in sorted(tile, key=lambda ranked: ranked[0])]


def merged_attention(
    query: Float[np.ndarray, "q_len head_dim"],
    key: Float[np.ndarray, "kv_len head_dim"],
    value: Float[np.ndarray, "kv_len value_dim"],
    regions: Sequence[Region],
    *,
    n_valid: int | None = None,
    scale: float | None = None,
    order: Order = list,
) -> Float[np.ndarray, "q_len value_dim"]:
    """Attention over regions by the online merge, in fp64.

    Args:
        query, key, value: of one head.
        regions: of the head; LOW_PRECISION is for `integer_attention`, where there are codes.
        n_valid: keys before the padding, all by default.
        scale: of the scores, 1/√head_dim by default.
        order: rearranges the runs of a query tile.

    Raises:
        ValueError: a LOW_PRECISION region, or a length out of range.
    """
    if any(region.mode is Mode.LOW_PRECISION for region in regions):
        raise ValueError("regions must not be LOW_PRECISION here, where values have no codes")
    valid = len(key) if n_valid is None else n_valid
    factor = _LOG2E * (query.shape[1] ** -0.5 if scale is None else scale)
    out = np.zeros((len(query), value.shape[1]))
    for tile in run_work(regions, len(query), len(key), n_valid):
        kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        works = order(tile)
        rows = works[0].allowed.shape[0] if works else 0
        maximum, total = np.full(rows, -np.inf), np.zeros(rows)
        for work in works:
            scores = (query[work.queries] @ _means(key, work, valid).T) * factor
            scores = np.where(work.allowed, scores + np.log2(work.counts), -np.inf)
            before, maximum = maximum, np.maximum(maximum, np.ceil(scores.max(1)))
            base = np.where(np.isfinite(maximum), maximum, 0)[:, None]
            powers = np.exp2(scores - base)
            total = total * np.exp2(before - base[:, 0]) + powers.sum(1)
            kept.append((powers, base, _means(value, work, valid)))
        for powers, tag, values in kept:
            final = np.where(np.isfinite(maximum), maximum, 0)[:, None]
            share = powers * np.exp2(tag - final) / np.where(total > 0, total, 1)[:, None]
            out[works[0].queries] += np.where(total[:, None] > 0, share, 0) @ values
    return out


def integer_attention(
    query: Int64[np.ndarray, "q_len head_dim"],
    key: Int64[np.ndarray, "kv_len head_dim"],
    value: Int64[np.ndarray, "kv_len value_dim"],
    regions: Sequence[Region],
    factor: float,
    *,
    n_valid: int | None = None,
    form: SoftermaxFormat | None = None,
    order: Order = list,
) -> Int64[np.ndarray, "q_len value_dim"]:
    """Attention over regions in integers: 8-bit codes in, exact sums of 8-bit products out.

    Scores are exact sums, requantised once per pair to the input of `softermax`. A segment's bias,
    log2 of its keys, is an integer for whole segments; segments that the padding cuts get it
    rounded to the input's step. Means are rounded once, halves to even.

    Args:
        query, key, value: codes of one head, symmetric, 8 bits, one scale each.
        regions: of the head.
        factor: what one step of a score is worth in units of the exponent e: the scale of the
            queries times that of the keys times 1/√head_dim.
        n_valid: keys before the padding, all by default.
        form: widths of the softmax.
        order: rearranges the runs of a query tile; the sums round differently then.

    Returns:
        Codes of which one step is worth the scale of the values / 2^output_fraction.

    Raises:
        ValueError: codes beyond 8 bits, a length out of range, or what `softermax.add_run` refuses.
    """
    form = SoftermaxFormat() if form is None else form
    for name, codes in (("query", query), ("key", key), ("value", value)):
        if np.abs(codes).max(initial=0) > 127:
            raise ValueError(f"{name} must hold codes in [-127, 127], got {np.abs(codes).max()}")
    valid = len(key) if n_valid is None else n_valid
    out = np.zeros((len(query), value.shape[1]), np.int64)
    for tile in run_work(regions, len(query), len(key), n_valid):
        works = order(tile)
        if not works:
            continue
        state = empty_rows(form, works[0].allowed.shape[0])
        kept: list[tuple[RunPowers, np.ndarray]] = []
        for work in works:
            rows, columns, values = (
                low_codes(x, work.region.low_precision_shift)
                for x in (
                    query[work.queries],
                    operand_codes(key, work, valid),
                    operand_codes(value, work, valid),
                )
            )
            scores = _product(rows, columns.T) * (factor * _LOG2E) + np.log2(work.counts)
            state, powers = add_run(form, state, score_codes(form, scores), work.allowed)
            kept.append((powers, values))
        for powers, values in kept:
            out[works[0].queries] += _product(normalize(form, state, powers), values)
    return out


def low_codes(
    codes: Int64[np.ndarray, "vectors dim"], shift: int
) -> Int64[np.ndarray, "vectors dim"]:
    """8-bit codes as 4-bit codes times a power of two per vector; the codes themselves for shift 0.

    A vector loses the fewest low bits with which its largest code, rounded, is at most 7, but at
    most `shift` bits; ties round to the even code, and what still exceeds 7 is clipped.
    """
    largest = np.abs(codes).max(1, keepdims=True, initial=0)
    lost = np.zeros_like(largest)
    for bits in range(shift):
        lost = np.where(np.rint(largest / 2**bits) > LOW_CODE, bits + 1, lost)
    few = np.rint(codes / 2.0**lost)
    if shift:
        few = np.clip(few, -LOW_CODE, LOW_CODE)
    return few.astype(np.int64) << lost


def _means(
    rows: Float[np.ndarray, "kv_len dim"], work: RunWork, n_valid: int
) -> Float[np.ndarray, "keys dim"]:
    """The run's keys (or values), as means of their valid ones where they are segments."""
    size = work.region.segment
    if size == 1:
        return rows[work.keys]
    first = int(work.keys[0]) * size
    last = int(work.keys[-1] + 1) * size
    there = np.zeros((last - first, rows.shape[1]), rows.dtype)
    there[: min(last, n_valid) - first] = rows[first : min(last, n_valid)]
    return there.reshape(-1, size, rows.shape[1]).sum(1) / work.counts[:, None]


def operand_codes(
    rows: Int64[np.ndarray, "kv_len dim"], work: RunWork, n_valid: int
) -> Int64[np.ndarray, "keys dim"]:
    """A run's keys (or values) as 8-bit codes: segments as their rounded means."""
    return np.rint(_means(rows.astype(np.float64), work, n_valid)).astype(np.int64)


def _product(a: Int64[np.ndarray, "rows k"], b: Int64[np.ndarray, "k columns"]) -> np.ndarray:
    """a @ b, exactly: in fp64, which is faster, since the sums stay far below 2**53."""
    return np.rint(a.astype(np.float64) @ b.astype(np.float64)).astype(np.int64)
