"""Kernels of one decoding step: scores, their softmax, values; each over parts of the keys.

The rows of a program are all queries that read the same keys: those of the query heads that
share a key head (and a list of kept keys), one under another, as they lie in memory. Scores stay
between the kernels as ranks (``order.py``), 0 where a row may not attend, so that the selection
of ``select.py`` works on them.
"""
# pyright: reportMissingParameterType=false, reportGeneralTypeIssues=false, reportCallIssue=false
# pyright: reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

from sparseloom.kernels.triton.order import ordered, unordered


@triton.jit
def _keys(
    at, stop, batch, group, keep, padding, keep_batch, keep_group, padding_batch, kv_len,
    KEPT: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Numbers of some entries, the keys that they name, and whether these may be attended to."""
    entry = at + tl.arange(0, KEYS)
    there = entry < stop
    place = entry
    if KEPT:
        place = tl.load(
            keep + batch * keep_batch + group * keep_group + entry, mask=there, other=-1
        ).to(tl.int32)
        there = (place >= 0) & (place < kv_len)
    if PADDED:
        there = there & (tl.load(padding + batch * padding_batch + place, mask=there, other=0) != 0)
    return entry, place, there


@triton.jit
def _product(a, b):
    """a·bᵀ in fp32; fp32 numbers as three products of what tensor cores take of them."""
    if a.dtype == tl.float32:
        return tl.dot(a, tl.trans(b), input_precision="tf32x3")
    else:
        return tl.dot(a, tl.trans(b))


@triton.jit
def score(
    query, key, low, key_scale, keep, padding, flat, ranks, tops, sums, counts, entries, stride,
    kv_len, q_len, rows, read_heads, per_head, span, key_batch, key_head, key_token, low_batch,
    low_head, low_token, scale_batch, scale_head, scale_token, keep_batch, keep_group,
    padding_batch, scale, fill, DIM: tl.constexpr, WIDE: tl.constexpr, HALF: tl.constexpr,
    SHIFT: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr, BY_DIM: tl.constexpr,
    KEPT: tl.constexpr, PADDED: tl.constexpr, CAUSAL: tl.constexpr, REFETCH: tl.constexpr,
    FLOAT32: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Ranks of the scores of a part of the keys, and the largest score, the sum of exponentials
    and the number of keys of each row. With REFETCH only of rows that are marked flat."""
    reader = tl.program_id(1).to(tl.int64)
    batch, group = reader // read_heads, reader % read_heads
    head = group // per_head
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    row = reader * rows + r
    live = r < rows
    if REFETCH:
        live = live & (tl.load(flat + row, mask=live, other=0) != 0)
    if tl.max(live.to(tl.int32), 0) > 0:
        d = tl.arange(0, WIDE)
        q = tl.load(
            query + row[:, None] * DIM + d[None], mask=live[:, None] & (d[None] < DIM), other=0.0
        )
        if FLOAT32:
            q = q.to(tl.float32)
        scales = key_scale
        if SCALED:
            scales += batch * scale_batch + head * scale_head
        if BY_DIM:
            q *= tl.load(scales + d, mask=d < DIM, other=0.0)[None]
        if LOW:  # a byte has two numbers, half a row apart
            half = tl.arange(0, HALF)
            inside = live[:, None] & (half[None] < DIM // 2)
            at = query + row[:, None] * DIM + half[None]
            first = tl.load(at, mask=inside, other=0.0)
            second = tl.load(at + DIM // 2, mask=inside, other=0.0)
            if FLOAT32:
                first = first.to(tl.float32)
                second = second.to(tl.float32)
            if BY_DIM:
                first *= tl.load(scales + half, mask=half < DIM // 2, other=0.0)[None]
                second *= tl.load(scales + DIM // 2 + half, mask=half < DIM // 2, other=0.0)[None]
        unread = fill * tl.sum(q.to(tl.float32), 1)
        last = kv_len - q_len + r % q_len
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        count = tl.zeros([ROWS], tl.int32)
        start = tl.program_id(0) * span
        stop = tl.minimum(start + span, entries)
        for at in range(start, stop, KEYS):
            entry, place, there = _keys(
                at, stop, batch, group, keep, padding, keep_batch, keep_group, padding_batch,
                kv_len, KEPT, PADDED, KEYS,
            )  # fmt: skip
            where = place.to(tl.int64)[:, None]
            codes = tl.load(
                key + batch * key_batch + head * key_head + where * key_token + d[None],
                mask=there[:, None] & (d[None] < DIM), other=0,
            )  # fmt: skip
            s = _product(q, codes.to(q.dtype)) * (1 << SHIFT)
            if LOW:
                pair = tl.load(
                    low + batch * low_batch + head * low_head + where * low_token + half[None],
                    mask=there[:, None] & (half[None] < DIM // 2), other=0,
                )  # fmt: skip
                s += _product(first, (pair & 15).to(q.dtype))
                s += _product(second, (pair >> 4).to(q.dtype))
            else:
                s += unread[:, None]
            if SCALED and not BY_DIM:
                s *= tl.load(scales + place * scale_token, mask=there, other=0.0)[None]
            s *= scale
            ok = there[None] & live[:, None]
            if CAUSAL:
                ok = ok & (place[None] <= last[:, None])
            s = tl.where(ok, s, float("-inf"))
            tl.store(
                ranks + row[:, None] * stride + entry[None], tl.where(ok, ordered(s), 0),
                mask=live[:, None] & (entry < stop)[None],
            )  # fmt: skip
            new = tl.maximum(top, tl.max(s, 1))
            base = tl.where(new > float("-inf"), new, 0.0)
            total *= tl.exp2((top - base) * 1.4426950408889634)
            total += tl.sum(tl.exp2((s - base[:, None]) * 1.4426950408889634), 1)
            count += tl.sum(ok.to(tl.int32), 1)
            top = new
        to = row * tl.num_programs(0) + tl.program_id(0)
        tl.store(tops + to, top, mask=live)
        tl.store(sums + to, total, mask=live)
        tl.store(counts + to, count, mask=live)


@triton.jit
def merge(
    tops, sums, counts, lse, count, flat, threshold, rows, parts, REFETCH: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp of each row, to the base 2, from those of the parts; how many keys it has;
    and whether its largest probability is under the threshold, so that it is flat."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    if REFETCH:  # the others stay as they are
        live = live & (tl.load(flat + row, mask=live, other=0) != 0)
    part = tl.arange(0, PARTS)[None]
    at = row.to(tl.int64)[:, None] * parts + part
    here = live[:, None] & (part < parts)
    some = tl.load(tops + at, mask=here, other=float("-inf"))
    top = tl.max(some, 1)
    base = tl.where(top > float("-inf"), top, 0.0)
    weight = tl.exp2((some - base[:, None]) * 1.4426950408889634)
    total = tl.sum(weight * tl.load(sums + at, mask=here, other=0.0), 1)
    full = top > float("-inf")
    value = base * 1.4426950408889634 + tl.log2(tl.where(full, total, 1.0))
    tl.store(lse + row, tl.where(full, value, float("inf")), mask=live)
    if not REFETCH:
        tl.store(count + row, tl.sum(tl.load(counts + at, mask=here, other=0), 1), mask=live)
        is_flat = full & (tl.div_rn(full.to(tl.float32), tl.where(full, total, 1.0)) < threshold)
        tl.store(flat + row, is_flat.to(tl.int8), mask=live)


@triton.jit
def _probabilities(ranks, lse, row, live, entry, stop, stride):
    """Softmax of some scores: exactly 0 where the rank is."""
    mask = live[:, None] & (entry < stop)[None]
    rank = tl.load(ranks + row[:, None] * stride + entry[None], mask=mask, other=0)
    offset = tl.load(lse + row, mask=live, other=float("inf"))
    p = tl.exp2(unordered(rank) * 1.4426950408889634 - offset[:, None])
    return tl.where(rank != 0, p, 0.0)


@triton.jit
def weigh(
    ranks, lse, value, value_scale, keep, out, totals, entries, stride, kv_len, rows, read_heads,
    per_head, span, value_batch, value_head, value_token, scale_batch, scale_head, scale_token,
    keep_batch, keep_group, DIM: tl.constexpr, WIDE: tl.constexpr, SCALED: tl.constexpr,
    BY_DIM: tl.constexpr, KEPT: tl.constexpr, FLOAT32: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """The values of a part of the keys, weighted by their probabilities, and the weights' sum.
    A value that no row weighs is not read."""
    reader = tl.program_id(1).to(tl.int64)
    batch, group = reader // read_heads, reader % read_heads
    head = group // per_head
    r = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    row = reader * rows + r
    live = r < rows
    d = tl.arange(0, WIDE)
    scales = value_scale
    if SCALED:
        scales += batch * scale_batch + head * scale_head
    weighted = tl.zeros([ROWS, WIDE], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    start = tl.program_id(0) * span
    stop = tl.minimum(start + span, entries)
    for at in range(start, stop, KEYS):
        entry, place, there = _keys(
            at, stop, batch, group, keep, None, keep_batch, keep_group, 0, kv_len, KEPT, False, KEYS
        )
        p = _probabilities(ranks, lse, row, live, entry, stop, stride)
        there = there & (tl.max(p, 0) > 0.0)
        total += tl.sum(p, 1)
        values = tl.load(
            value + batch * value_batch + head * value_head
            + place.to(tl.int64)[:, None] * value_token + d[None],
            mask=there[:, None] & (d[None] < DIM), other=0,
        )  # fmt: skip
        if SCALED and not BY_DIM:
            p *= tl.load(scales + place * scale_token, mask=there, other=0.0)[None]
        if FLOAT32:
            weighted = tl.dot(p, values.to(tl.float32), weighted, input_precision="tf32x3")
        elif SCALED:  # codes, which bf16 holds exactly
            weighted = tl.dot(p.to(tl.bfloat16), values.to(tl.bfloat16), weighted)
        else:
            weighted = tl.dot(p.to(values.dtype), values, weighted)
    if BY_DIM:
        weighted *= tl.load(scales + d, mask=d < DIM, other=0.0)[None]
    to = row * tl.num_programs(0) + tl.program_id(0)
    tl.store(out + to[:, None] * DIM + d[None], weighted, mask=live[:, None] & (d[None] < DIM))
    tl.store(totals + to, total, mask=live)


@triton.jit
def finish(
    partial, totals, out, importance, parts, q_len, DIM: tl.constexpr, WIDE: tl.constexpr,
    RENORMALISE: tl.constexpr, IMPORTANCE: tl.constexpr,
):  # fmt: skip
    """The sum over the parts, and Σ|out| of a head."""
    d = tl.arange(0, WIDE)
    size = tl.zeros([WIDE], tl.float32)
    for q in range(q_len):
        row = tl.program_id(0).to(tl.int64) * q_len + q
        result = tl.zeros([WIDE], tl.float32)
        total = 0.0
        for part in range(parts):
            at = row * parts + part
            result += tl.load(partial + at * DIM + d, mask=d < DIM, other=0.0)
            total += tl.load(totals + at)
        if RENORMALISE:
            result = result / tl.where(total > 0.0, total, 1.0)
        tl.store(out + row * DIM + d, result.to(out.dtype.element_ty), mask=d < DIM)
        size += tl.abs(result)
    if IMPORTANCE:
        tl.store(importance + tl.program_id(0), tl.sum(size, 0))


@triton.jit
def spread(
    ranks, lse, keep, importance, entries, stride, kv_len, q_len, heads, read_heads, keep_batch,
    keep_group, KEPT: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The probabilities of each key, summed over the queries of a head."""
    bh = tl.program_id(1).to(tl.int64)
    batch, group = bh // heads, bh % heads // (heads // read_heads)
    entry, place, there = _keys(
        tl.program_id(0) * KEYS, entries, batch, group, keep, None, keep_batch, keep_group, 0,
        kv_len, KEPT, False, KEYS,
    )  # fmt: skip
    total = tl.zeros([KEYS], tl.float32)
    for q in range(q_len):
        row = bh * q_len + q + tl.zeros([1], tl.int64)
        total += tl.sum(_probabilities(ranks, lse, row, row >= 0, entry, entries, stride), 0)
    tl.store(importance + bh * kv_len + place, total, mask=there)
