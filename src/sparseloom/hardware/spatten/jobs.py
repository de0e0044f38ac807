"""A trace as what SpAtten's controller sees: loads of keys and values, and the rows on them.

A load is one head of one sequence at one attention call: the keys that any of its rows needs, read
from DRAM once. Its rows are the queries, one after another. In generation a row also fetches its
own low key bits and its own values; otherwise values are loaded with the keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.spatten.config import SpAttenConfig
from sparseloom.hardware.spatten.heads import Head, head_groups, read_head
from sparseloom.hardware.spatten.layout import Regions, Vectors
from sparseloom.trace import AttentionCall, Operator, Selection, Workload


class Load(NamedTuple):
    """One load; a table of loads has these as its columns (`L_…`).

    keys_at, keys: slice of `Jobs.key_ids`, in so many lines; first_row, rows: slice of the rows.
    key_base, key_stride, key_atoms: address of id 0, bytes between ids, atoms read per id; `low_…`
    for the low bits, `value_…` for values; both `head_region` bytes further for each row (0 unless
    heads are packed). heads: heads packed in one key vector.
    generation: 1 where values are fetched row by row.
    rank_from, rank_to: tokens ranked when the last row is decided (0: none).
    after: the load whose ranking must be over before this one starts, −1 for none.
    drain: 1 where everything before must have ended. call: position of the attention call.
    """

    keys_at: int
    keys: int
    lines: int
    first_row: int
    rows: int
    key_base: int
    key_stride: int
    key_atoms: int
    low_base: int
    low_stride: int
    low_atoms: int
    head_region: int
    value_base: int
    value_stride: int
    value_atoms: int
    heads: int
    generation: int
    rank_from: int
    rank_to: int
    after: int
    drain: int
    call: int


(
    L_KEYS_AT,
    L_KEYS,
    L_LINES,
    L_FIRST_ROW,
    L_ROWS,
    L_KEY_BASE,
    L_KEY_STRIDE,
    L_KEY_ATOMS,
    L_LOW_BASE,
    L_LOW_STRIDE,
    L_LOW_ATOMS,
    L_HEAD_REGION,
    L_VALUE_BASE,
    L_VALUE_STRIDE,
    L_VALUE_ATOMS,
    L_HEADS,
    L_GENERATION,
    L_RANK_FROM,
    L_RANK_TO,
    L_AFTER,
    L_DRAIN,
    L_CALL,
) = range(len(Load._fields))

(
    N_LOAD,
    N_KEYS,
    N_VALUES,
    N_REFETCH,
    N_VALUE_IDS_AT,
    N_PROBABILITIES_AT,
    N_LINES,
    N_VALUE_LINES,
) = range(8)
"""Columns of the table of rows: the load, keys seen, values used, whether low bits are fetched
again, where the row's value ids and probabilities lie (−1: all of the load's, unknown), and the
lines of its keys and values."""


@dataclass(frozen=True)
class Jobs:
    """Everything that one run needs: tables (int64) of loads `L_…` and rows `N_…`, and ids."""

    head_dim: int
    loads: np.ndarray
    rows: np.ndarray
    key_ids: np.ndarray
    value_ids: np.ndarray
    probabilities: np.ndarray


@dataclass
class _Builder:
    loads: list[Load] = field(default_factory=list)
    rows: list[np.ndarray] = field(default_factory=list)
    row_count: int = 0
    key_ids: list[np.ndarray] = field(default_factory=list)
    key_count: int = 0
    value_ids: list[np.ndarray] = field(default_factory=list)
    value_count: int = 0
    probabilities: list[np.ndarray] = field(default_factory=list)
    probability_count: int = 0


def lower(
    config: SpAttenConfig,
    workload: Workload,
    selection: Selection,
    probabilities: dict[int, np.ndarray] | None = None,
) -> Jobs:
    """The loads and rows of a selection, in the order in which the machine runs them.

    Args:
        config: the machine; its layout decides addresses.
        workload, selection: one call per attention operator; every call must know its keys.
        probabilities: by call, quantised probabilities (batch, heads, q_len, kv_len) where they
            were recorded: the selection engines then see the real ties.

    Raises:
        MachineError: head sizes that differ, a head that the arrays cannot be cut into, keys or
            values that do not fit in the SRAMs, or a row that does not fit in the softmax.
    """
    operators = workload.attention()
    widths = {operator.head_dim for operator in operators} | {op.value_dim for op in operators}
    if len(widths) != 1:
        raise MachineError(
            f"{config.name}: head_dim and value_dim must be one size throughout, got "
            f"{sorted(widths)}"
        )
    head_dim = widths.pop()
    config.keys_per_cycle(head_dim)
    made = _Builder()
    regions = Regions(config, workload.model.kv_heads, operators)
    ranked = -1
    seen_probabilities = probabilities or {}
    for i, (operator, call) in enumerate(zip(operators, selection.calls, strict=True)):
        padding = workload.padding_of(operator)
        first = len(made.loads)
        known = seen_probabilities.get(i)
        for sequence in range(operator.batch):
            for kv_head in head_groups(config, operator, call):
                head = read_head(operator, call, padding, sequence, kv_head[1], known)
                if head is not None:
                    pair = len(kv_head[1]) > operator.heads // operator.kv_heads
                    vectors = regions.vectors(operator, call, sequence, kv_head[0], pair=pair)
                    _add(config, made, operator, head, vectors, (ranked, i))
        last = len(made.loads) - 1
        if last >= first:
            rank = _ranking(operators, i, call)
            if rank is not None:
                heads = range(first if config.ranks_every_head else last, last + 1)
                for one in heads:
                    waits = one - 1 if one > heads[0] else made.loads[one].after
                    made.loads[one] = made.loads[one]._replace(
                        rank_from=rank[0], rank_to=rank[1], after=waits
                    )
                ranked = last
    return _finish(made, head_dim, config.keys_per_cycle(head_dim))


def _ranking(
    operators: tuple[Operator, ...], i: int, call: AttentionCall
) -> tuple[int, int] | None:
    """Tokens before and after the ranking at the end of a call."""
    if call.token_keep is None:
        return None
    # After the last layer the whole context is ranked again for the next step.
    later = i + 1 < len(operators) and operators[i + 1].step == operators[i].step
    tokens = operators[i].kv_len
    if later and call.tokens_alive is not None:
        tokens = int(call.tokens_alive.sum(axis=1).max())
    elif later and call.key_counts is not None:
        tokens = int(call.key_counts.max())
    return (tokens, call.token_keep) if tokens > call.token_keep else None


def _add(
    config: SpAttenConfig,
    made: _Builder,
    operator: Operator,
    head: Head,
    vectors: Vectors,
    place: tuple[int, int],
) -> None:
    ranked, call = place
    rows = head.seen.size
    generation = operator.q_len == 1
    this = len(made.loads)
    _check_room(config, operator, head, vectors.heads)
    if config.ranks_every_row and this:
        # The tokens are ranked anew before every fetch, by what the load before has added.
        made.loads[-1] = made.loads[-1]._replace(rank_from=operator.kv_len, rank_to=head.ids.size)
        ranked = this - 1
    made.loads.append(
        Load(
            keys_at=made.key_count,
            keys=head.ids.size,
            lines=-(-head.ids.size // config.keys_per_cycle(operator.head_dim)),
            first_row=made.row_count,
            rows=rows,
            key_base=vectors.key_base,
            key_stride=vectors.key_stride,
            key_atoms=vectors.key_atoms,
            low_base=vectors.low_base,
            low_stride=vectors.low_stride,
            low_atoms=vectors.low_atoms,
            head_region=vectors.head_region,
            value_base=vectors.value_base,
            value_stride=vectors.value_stride,
            value_atoms=vectors.value_atoms,
            heads=vectors.heads,
            generation=int(generation),
            rank_from=0,
            rank_to=0,
            after=ranked,
            drain=0,
            call=call,
        )
    )
    made.key_ids.append(head.ids)
    made.key_count += head.ids.size
    table = np.full((rows, 6), -1, np.int64)
    table[:, N_LOAD] = this
    table[:, N_KEYS] = head.seen
    table[:, N_VALUES] = head.values
    table[:, N_REFETCH] = head.refetch
    for r, ids in enumerate(head.value_ids):
        table[r, N_VALUE_IDS_AT] = made.value_count
        made.value_ids.append(ids)
        made.value_count += ids.size
    for r, row in enumerate(head.probabilities):
        table[r, N_PROBABILITIES_AT] = made.probability_count
        made.probabilities.append(row)
        made.probability_count += row.size
    made.rows.append(table)
    made.row_count += rows


def _check_room(config: SpAttenConfig, operator: Operator, head: Head, heads: int) -> None:
    """Everything a load or a row holds at once must fit: nothing else would ever make room."""
    per_line = config.keys_per_cycle(operator.head_dim)
    keys, row = head.ids.size, int(head.seen.max())
    values = int(head.values.max()) if operator.q_len == 1 else keys
    scores = config.softmax.row_fifo_depth * config.softmax.lanes
    for what, vectors, copies, room, where in (
        (f"{keys} keys of {heads} heads", keys, heads, config.key_sram.lines, "key_sram"),
        (f"{values} values", values, 1, config.value_sram.lines, "value_sram"),
        (f"{row} scores of a row", row, 1, scores // per_line, "softmax.row_fifo_depth × lanes"),
    ):
        lines = -(-vectors // per_line) * copies
        if lines > room:
            raise MachineError(
                f"{config.name}: {what} take {lines} lines of {per_line}, but {where} holds {room} "
                f"(layer {operator.layer}, step {operator.step}, {operator.kv_len} tokens)"
            )


def _finish(made: _Builder, head_dim: int, per_line: int) -> Jobs:
    table = np.concatenate([np.zeros((0, 6), np.int64), *made.rows])
    lines = -(-table[:, [N_KEYS, N_VALUES]] // per_line)
    return Jobs(
        head_dim=head_dim,
        loads=np.array(made.loads, np.int64).reshape(-1, len(Load._fields)),
        rows=np.ascontiguousarray(np.concatenate([table, lines], axis=1)),
        key_ids=_joined(made.key_ids),
        value_ids=_joined(made.value_ids),
        probabilities=_joined(made.probabilities),
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64)
