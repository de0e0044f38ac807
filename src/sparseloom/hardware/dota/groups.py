"""An attention call as what a Lane sees: groups of parallel queries, and the loads of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int32, Int64

from sparseloom.hardware.dota import lane as ln
from sparseloom.hardware.dota.closed_form import Cost, detection_cost, kept_cost, resident
from sparseloom.hardware.dota.config import DotaConfig
from sparseloom.hardware.units.rmmu import detecting_rows, score_cycles, tile_cycles
from sparseloom.hardware.units.token_scheduler import schedule
from sparseloom.trace import AttentionCall, MaskArrays, Operator, PredictorShape


class Loads(NamedTuple):
    """Loads of one head, group by group.

    steps, loads, pushes: per group; from_ (groups + 1): slices of `step` and `key`, which are
    empty where the keys are simply all of them, in order.
    counts: kept keys of each query.
    """

    steps: Int64[np.ndarray, "groups"]
    loads: Int64[np.ndarray, "groups"]
    pushes: Int64[np.ndarray, "groups"]
    from_: Int64[np.ndarray, "groups_and_one"]
    step: Int32[np.ndarray, "_"]
    key: Int32[np.ndarray, "_"]
    counts: Int64[np.ndarray, "rows"]

    @property
    def listed(self) -> bool:
        """Whether the loads are named."""
        return self.key.size > 0


@dataclass(frozen=True, eq=False)
class LaneWork:
    """What one Lane does in a call: its table of groups and its lists of loads."""

    groups: np.ndarray
    key_steps: np.ndarray
    keys: np.ndarray
    value_steps: np.ndarray
    values: np.ndarray


@dataclass(frozen=True, eq=False)
class Work:
    """One call of one sequence.

    Args:
        lanes: what each Lane does.
        parallel: queries side by side.
        detecting_rows: rows that only detect; 0: all rows take turns.
        costs: detection and attention, for energy.
        dram_bytes: everything that moves.
        kept, loads, idle_slots: pairs, key loads, and places in steps that had no work.
    """

    lanes: list[LaneWork]
    parallel: int
    detecting_rows: int
    costs: list[Cost]
    dram_bytes: int
    kept: int
    loads: int
    idle_slots: int


class Lowering:
    """Turns the attention calls of a selection into work; equal heads are scheduled once."""

    def __init__(self, config: DotaConfig, hidden_size: int) -> None:
        self.config, self.hidden_size = config, hidden_size
        self._known: dict[tuple[object, ...], Loads] = {}
        self._alive: list[object] = []

    def work(
        self,
        operator: Operator,
        call: AttentionCall,
        padding: Bool[np.ndarray, "_ kv_len"] | None,
        sequence: int,
    ) -> Work:
        """The call of one sequence."""
        c = self.config
        parallel = min(c.detector.parallel_queries, operator.q_len)
        alive = np.ones(operator.heads, np.bool_) if call.heads_alive is None else call.heads_alive
        heads = [int(h) for h in np.flatnonzero(alive)]
        valid = None if padding is None else padding[min(sequence, len(padding) - 1)]
        visible = _visible(operator, valid)
        keys = [self._loads(operator, call, call.mask, valid, sequence, h) for h in heads]
        values = keys
        if call.value_mask is not None:
            values = [
                self._loads(operator, call, call.value_mask, valid, sequence, h) for h in heads
            ]
        shown = np.full(len(heads), float(visible.sum()))
        costs: list[Cost] = []
        detect_bytes = 0
        if call.predictor is not None and heads:
            found = detection_cost(c, self.hidden_size, operator, call.predictor, shown)
            detect_bytes = round(found.dram_bytes / len(heads))
            costs.append(found)
        macs = sum(
            float(k.counts.sum()) * operator.head_dim + float(v.counts.sum()) * operator.value_dim
            for k, v in zip(keys, values, strict=True)
        )
        rows = _detecting_rows(c, self.hidden_size, operator, call.predictor, shown, macs)
        tables = [
            self._table(operator, call.predictor, visible, k, v, rows, parallel, detect_bytes)
            for k, v in zip(keys, values, strict=True)
        ]
        costs.append(
            kept_cost(
                c,
                operator,
                shown,
                *(
                    np.array([float(part.sum()) for part in parts])
                    for parts in (
                        [k.counts for k in keys],
                        [v.counts for v in values],
                        [k.loads for k in keys],
                        [v.loads for v in values],
                    )
                ),
            )
        )
        moving = (ln.G_HEAD_BYTES, ln.G_KEY_BYTES, ln.G_VALUE_BYTES)
        kept = sum(int(k.counts.sum()) for k in keys)
        return Work(
            lanes=[
                _joined(tables[lane :: c.lanes], keys[lane :: c.lanes], values[lane :: c.lanes])
                for lane in range(c.lanes)
            ],
            parallel=parallel,
            detecting_rows=rows,
            costs=costs,
            dram_bytes=sum(int(table[:, moving].sum()) for table in tables),
            kept=kept,
            loads=sum(int(k.loads.sum()) for k in keys),
            idle_slots=parallel * sum(int(k.steps.sum()) for k in keys) - kept,
        )

    def _loads(
        self,
        operator: Operator,
        call: AttentionCall,
        mask: MaskArrays | None,
        valid: Bool[np.ndarray, "kv_len"] | None,
        sequence: int,
        head: int,
    ) -> Loads:
        parallel = min(self.config.detector.parallel_queries, operator.q_len)
        if mask is None:
            seen = valid
            if call.tokens_alive is not None:
                alive = call.tokens_alive[sequence]
                seen = alive if valid is None else valid & alive
            return _in_order(_visible(operator, seen), parallel)
        b, h = min(sequence, mask.batch - 1), head * mask.heads // operator.heads
        name = (id(mask), b, h, None if valid is None else valid.tobytes(), parallel)
        if name not in self._known:
            self._alive.append(mask)  # an id must not be given out again
            s = self.config.scheduler
            offsets, keys = mask.query_keys(b, h, valid)
            found = schedule(
                offsets,
                keys,
                parallel_queries=parallel,
                dataflow=s.dataflow,
                split=s.split,
                record=True,
            )
            assert found.issued is not None
            self._known[name] = Loads(
                steps=found.steps,
                loads=found.loads,
                pushes=found.union,
                from_=np.concatenate([[0], np.cumsum(found.loads)]),
                step=found.issued.step,
                key=found.issued.key,
                counts=np.diff(offsets),
            )
        return self._known[name]

    def _table(
        self,
        operator: Operator,
        predictor: PredictorShape | None,
        visible: Int64[np.ndarray, "rows"],
        keys: Loads,
        values: Loads,
        rows_apart: int,
        parallel: int,
        detect_bytes: int,
    ) -> np.ndarray:
        """The groups of one head (`lane.GROUP`)."""
        c, width = self.config, self.config.rmmu.base_bits // 8
        table = np.zeros((keys.steps.size, len(ln.GROUP)), np.int64)
        table[:, ln.G_KEY_FROM], table[:, ln.G_KEY_TO] = keys.from_[:-1], keys.from_[1:]
        table[:, ln.G_VALUE_FROM], table[:, ln.G_VALUE_TO] = values.from_[:-1], values.from_[1:]
        table[:, ln.G_KEY_STEPS], table[:, ln.G_VALUE_STEPS] = keys.steps, values.steps
        table[:, ln.G_IN_ORDER] = not keys.listed
        table[:, ln.G_PUSHES] = keys.pushes
        taken = -(-_grouped(keys.counts, parallel) // c.mfu.scores_per_cycle)
        table[:, ln.G_SOFTMAX] = taken.sum(axis=1)
        table[:, ln.G_LAST_ROW] = taken.max(axis=1)
        if predictor is not None:
            rows = rows_apart or c.rmmu.rows
            found = _detection(c, predictor, _grouped(visible, parallel), rows)
            table[:, ln.G_DETECT], table[:, ln.G_COMPARE] = found
            project, codes = projection(c, self.hidden_size, operator, predictor)
            table[0, ln.G_PROJECT] = -(-project * c.rmmu.rows // rows)
            table[0, ln.G_REQUANTISE] = -(-codes // c.mfu.elements_per_cycle)
        table[0, ln.G_HEAD_BYTES] = detect_bytes
        if not resident(c, operator):
            rows_here = _grouped(np.ones_like(visible), parallel).sum(axis=1)
            table[:, ln.G_KEY_BYTES] = (keys.loads + rows_here) * operator.head_dim * width
            table[:, ln.G_VALUE_BYTES] = (values.loads + rows_here) * operator.value_dim * width
        elif operator.kind == "attention":
            earlier = max(0, operator.kv_len - operator.q_len)
            both = operator.head_dim + operator.value_dim
            table[0, ln.G_HEAD_BYTES] += earlier * both * width
        return table


def projection(
    c: DotaConfig, hidden_size: int, operator: Operator, predictor: PredictorShape
) -> tuple[int, int]:
    """Cycles of the whole array for a head's predicted queries and keys, and how many codes."""
    wide, bits = predictor.head_dim, predictor.bits
    if operator.kind == "attention":
        cycles = tile_cycles(c.rmmu, operator.q_len, hidden_size, 2 * wide, bits=bits)
        return cycles, 2 * operator.q_len * wide
    # Keys of another sequence are made once, with the prompt.
    tokens = [operator.q_len] + ([operator.kv_len] if operator.stage == "prefill" else [])
    cycles = sum(tile_cycles(c.rmmu, n, hidden_size, wide, bits=bits) for n in tokens)
    return cycles, sum(tokens) * wide


def _detection(
    c: DotaConfig,
    predictor: PredictorShape,
    visible: Int64[np.ndarray, "groups parallel"],
    rows: int,
) -> tuple[Int64[np.ndarray, "groups"], Int64[np.ndarray, "groups"]]:
    """Cycles of `rows` rows for the scores of each group, and of what takes them.

    A group's queries are all compared with the keys that any of them may see.
    """
    bits, rmmu = predictor.bits, c.rmmu
    keys = visible.max(axis=1)
    scores = keys * (visible > 0).sum(axis=1)
    few, which = np.unique(scores, return_inverse=True)
    cycles = [
        score_cycles(rmmu, count, predictor.head_dim, bits=bits, rows=rows)
        for count in few.tolist()
    ]
    work = np.array(cycles, np.int64)[which]
    codes = -(-keys * predictor.head_dim * bits // 8)
    compare = -(-scores // c.detector.scores_per_cycle)
    return work, np.maximum(compare, -(-codes // c.sram.code_bytes_per_cycle))


def _detecting_rows(
    c: DotaConfig,
    hidden_size: int,
    operator: Operator,
    predictor: PredictorShape | None,
    shown: Float64[np.ndarray, "heads"],
    macs: float,
) -> int:
    """Rows that only detect, so that both sides take equally long; 0 without detection."""
    rmmu = c.rmmu
    if predictor is None or rmmu.policy == "sequential" or not shown.size:
        return 0
    if rmmu.detecting_rows:
        return rmmu.detecting_rows
    project, _ = projection(c, hidden_size, operator, predictor)
    scores = float(shown.sum()) * predictor.head_dim / rmmu.products(predictor.bits)
    detect = project * shown.size * rmmu.elements + scores
    wanted = detecting_rows(rmmu, detect, macs)
    parallel = min(c.detector.parallel_queries, operator.q_len)
    # Every query has the same number of rows; what is left over detects.
    computing = max(1, (rmmu.rows - wanted) // parallel) * parallel
    return rmmu.rows - computing if rmmu.rows > computing else parallel


def _in_order(counts: Int64[np.ndarray, "rows"], parallel: int) -> Loads:
    """Loads of queries that see all keys: each key once, all queries together."""
    steps = _grouped(counts, parallel).max(axis=1)
    none = np.zeros(0, np.int32)
    zeros = np.zeros(steps.size, np.int64)
    return Loads(steps, steps, zeros, np.zeros(steps.size + 1, np.int64), none, none, counts)


def _visible(
    operator: Operator, valid: Bool[np.ndarray, "kv_len"] | None
) -> Int64[np.ndarray, "rows"]:
    """Keys that each query may see."""
    ends = np.full(operator.q_len, operator.kv_len)
    if operator.is_causal:
        last = np.arange(operator.q_len) + operator.kv_len - operator.q_len + 1
        ends = np.clip(last, 0, operator.kv_len)
    if valid is None:
        return ends
    return np.concatenate([[0], np.cumsum(valid, dtype=np.int64)])[ends]


def _grouped(rows: Int64[np.ndarray, "rows"], parallel: int) -> Int64[np.ndarray, "groups lanes"]:
    """One line per group; the last is filled up with zeros."""
    groups = -(-rows.size // parallel)
    return np.pad(rows, (0, groups * parallel - rows.size)).reshape(groups, parallel)


def _joined(tables: list[np.ndarray], keys: list[Loads], values: list[Loads]) -> LaneWork:
    """The heads of a Lane one after another."""
    if not tables:
        none = np.zeros(0, np.int32)
        return LaneWork(np.zeros((0, len(ln.GROUP)), np.int64), none, none, none, none)
    joined = [table.copy() for table in tables]
    for columns, loads in (
        ((ln.G_KEY_FROM, ln.G_KEY_TO), keys),
        ((ln.G_VALUE_FROM, ln.G_VALUE_TO), values),
    ):
        before = 0
        for table, mine in zip(joined, loads, strict=True):
            table[:, columns] += before
            before += mine.key.size
    key_steps = np.concatenate([k.step for k in keys])
    key_ids = np.concatenate([k.key for k in keys])
    same = all(k is v for k, v in zip(keys, values, strict=True))
    return LaneWork(
        np.concatenate(joined),
        key_steps,
        key_ids,
        key_steps if same else np.concatenate([v.step for v in values]),
        key_ids if same else np.concatenate([v.key for v in values]),
    )
