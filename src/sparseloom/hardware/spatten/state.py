"""What SpAtten's units keep from cycle to cycle, and the sizes that they work with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sparseloom.hardware.engine.fifo import make_fifos
from sparseloom.hardware.spatten.config import SpAttenConfig
from sparseloom.hardware.units.merge_sort import sort_cycles
from sparseloom.hardware.units.topk import make_rng

UNITS = (
    "token_score",
    "token_topk",
    "fetcher",
    "address_crossbar",
    "data_crossbar",
    "converter",
    "scores",
    "softmax",
    "decision",
    "value_topk",
    "values",
    "head_score",
    "dram",
)
"""Modules by the paper's order (1 to 14; the head top-k, 13, shares the engine of 2)."""
(
    TOKEN_SCORE,
    TOKEN_TOPK,
    FETCHER,
    ADDRESS,
    DATA,
    CONVERTER,
    SCORES,
    SOFTMAX,
    DECISION,
    VALUE_TOPK,
    VALUES,
    HEAD_SCORE,
    DRAM,
) = range(len(UNITS))

CAUSES = (
    "idle",
    "busy",
    "waits for data from dram",
    "waits for room in sram",
    "waits for room in the row fifo",
    "waits for the selection of tokens",
    "waits for the selection of values",
    "waits for low bits",
    "waits for a channel",
    "waits for all ports",
    "waits for value ids",
    "waits for the row to end",
    "waits for probabilities",
)
(
    IDLE,
    BUSY,
    ON_DATA,
    ON_SRAM,
    ON_ROW_FIFO,
    ON_TOKENS,
    ON_VALUE_TOPK,
    ON_LOW_BITS,
    ON_CHANNEL,
    ON_PORTS,
    ON_IDS,
    ON_ROW_END,
    ON_PROBABILITIES,
) = range(len(CAUSES))

KEYS, LOW, VALUES_OF = 0, 1, 2
"""Kinds of requests: keys of a load, low key bits of a row, values of a row or of a load."""


PORT_CYCLES = 1  # an address through its port's FIFO to the memory


class Sizes(NamedTuple):
    """The machine's numbers as the compiled loop reads them (all int64)."""

    ports: int
    channels: int
    data_depth: int
    reorders: int
    init_cycles: int
    request_latency: int
    convert_latency: int
    vectors_per_cycle: int
    keys_per_line: int
    key_lines: int
    value_lines: int
    tree_latency: int
    line_cycles: int
    row_fifo_lines: int
    sum_latency: int
    probability_latency: int
    decision_latency: int
    replay_latency: int
    value_latency: int
    pass_through: int
    topk_lanes: int
    merge_sort: int
    emit: int
    hold: int
    loads_in_flight: int


def sizes(config: SpAttenConfig, head_dim: int) -> Sizes:
    """The sizes for one head width."""
    per_line = config.keys_per_cycle(head_dim)
    softmax = config.softmax
    return Sizes(
        ports=config.fetcher.ports,
        channels=config.dram.channels,
        data_depth=config.fetcher.data_fifo_depth,
        reorders=int(config.fetcher.reorders),
        init_cycles=config.fetcher.init_cycles,
        request_latency=config.fetcher.request_latency - PORT_CYCLES,
        # What is written in one cycle is seen by the multipliers in the next.
        convert_latency=config.fetcher.align_latency + config.fetcher.read_latency - 1,
        vectors_per_cycle=config.key_sram.lines_written_per_cycle * per_line,
        keys_per_line=per_line,
        key_lines=config.key_sram.lines,
        value_lines=config.value_sram.lines,
        # Broadcast, multiply, and a level of adders for each halving.
        tree_latency=2 + (head_dim - 1).bit_length(),
        line_cycles=-(-per_line // softmax.lanes),
        row_fifo_lines=softmax.row_fifo_depth * softmax.lanes // per_line,
        sum_latency=softmax.sum_latency,
        probability_latency=softmax.probability_latency,
        decision_latency=softmax.decision_latency,
        replay_latency=config.topk.replay_latency,
        value_latency=3 + (per_line - 1).bit_length(),
        pass_through=int(softmax.pass_through),
        topk_lanes=config.topk.lanes,
        merge_sort=int(config.topk.engine == "merge_sort"),
        emit=config.topk.emit_per_cycle,
        hold=int(config.progressive.order == "hold"),
        loads_in_flight=config.fetcher.loads_in_flight,
    )


class State(NamedTuple):
    """Struct of arrays: few and wide, which compiled code passes on quickly. Columns have names.

    registers: see `R_…`. requests (ring): `Q_…`. beats (ring): `B_…`. lines (ring): `W_…`.
    ports: `P_…`; arrived (ports, depth): which atoms are there. chosen (channels): the port that
    waits for room in a channel, or −1.
    rows: `ROW_…`; loads: `LOAD_…`. queues: FIFOs between stages, `TO_…`, and row_fifo.
    waiting: FIFOs of requests by kind; addresses: FIFOs by port.
    """

    registers: np.ndarray
    requests: np.ndarray
    beats: np.ndarray
    lines: np.ndarray
    ports: np.ndarray
    chosen: np.ndarray
    arrived: np.ndarray
    rows: np.ndarray
    loads: np.ndarray
    queues: np.ndarray
    row_fifo: np.ndarray
    waiting: np.ndarray
    addresses: np.ndarray
    counts: np.ndarray
    rng: np.ndarray
    sorting: np.ndarray
    scratch: np.ndarray


TO_RERUN, TO_SOFTMAX, TO_DECIDE, TO_TOPK, TO_VALUES, TO_RANK = range(6)
P_ISSUED, P_TAKEN, P_CAME = range(3)
B_REQUEST, B_ATOMS = range(2)
W_REQUEST, W_VECTORS, W_FROM = range(3)
ROW_VALUE_REQUEST, ROW_LOW_REQUEST, ROW_RERUN, ROW_READY_AT, ROW_EMITTED = range(5)
LOAD_KEY_REQUEST, LOAD_UNDECIDED, LOAD_UNFINISHED, LOAD_RANKED, LOAD_END = range(5)

# Columns of a request.
(
    Q_KIND,
    Q_OWNER,
    Q_AT,
    Q_IDS,
    Q_EMITTING,
    Q_TAKEN,
    Q_READY,
    Q_BASE,
    Q_STRIDE,
    Q_ATOMS,
    Q_FROM,
    Q_LIST,
    Q_PACKED,
    Q_GATHERED,
    Q_WHOLE,
) = range(15)
BEATS = 256  # that the rings have room for
LINES = 1024

# Registers.
(
    R_NEXT_REQUEST,
    R_CURRENT,
    R_LAST_KIND,
    R_BEAT_HEAD,
    R_BEATS,
    R_LINE_HEAD,
    R_LINES,
    R_ADDRESSES,
    R_NEXT_LOAD,
    R_KEY_LINES,
    R_VALUE_LINES,
    R_SCORE_ROW,
    R_SCORE_LINE,
    R_SCORE_FREE,
    R_SOFT_LINE,
    R_SOFT_FREE,
    R_DECIDE_USED,
    R_TOPK_ROW,
    R_TOPK_FREE,
    R_TOPK_LINE,
    R_TOPK_LINES,
    R_VALUE_LINE,
    R_RANK_LOAD,
    R_RANK_FREE,
    R_LOW_PENDING,
    R_DONE_ROWS,
    R_END,
    R_SENT,
    R_NEXT_ROW,
    R_ROWS_READY,
    R_LOADS_DONE,
    R_RANKING,
    R_IN_FLIGHT,
) = range(33)
REGISTERS = 33

# Counts of actions, in the order of `COUNTS`.
COUNTS = (
    "score_lines",
    "scores",
    "rerun_scores",
    "softmax_scores",
    "value_lines",
    "values",
    "key_vectors_written",
    "value_vectors_written",
    "low_vectors_written",
    "atoms",
    "topk_cycles",
    "topk_items",
    "topk_rounds",
    "rank_cycles",
    "rank_items",
    "emitted_ids",
    "reruns",
)
(
    C_SCORE_LINES,
    C_SCORES,
    C_RERUN_SCORES,
    C_SOFTMAX,
    C_VALUE_LINES,
    C_VALUES,
    C_KEY_VECTORS,
    C_VALUE_VECTORS,
    C_LOW_VECTORS,
    C_ATOMS,
    C_TOPK_CYCLES,
    C_TOPK_ITEMS,
    C_TOPK_ROUNDS,
    C_RANK_CYCLES,
    C_RANK_ITEMS,
    C_EMITTED,
    C_RERUNS,
) = range(len(COUNTS))


def make_state(
    config: SpAttenConfig, loads: int, rows: int, *, longest: int, most_rows: int, seed: int
) -> State:
    """Empty units, for a run of so many loads and rows.

    A row has `longest` keys at most; a load that fetches values row by row has `most_rows`.
    """
    sorts = config.topk.engine == "merge_sort"
    lengths = range(longest + 1 if sorts else 1)
    fetcher = config.fetcher
    deep = max(rows, loads, 1) + 1
    # A load asks for its keys and values, or each of its rows for low bits and values.
    requests = fetcher.loads_in_flight * (2 + 2 * most_rows)
    registers = np.zeros(REGISTERS, np.int64)
    registers[R_CURRENT] = -1
    return State(
        registers=registers,
        requests=np.zeros((requests, 15), np.int64),
        beats=np.zeros((BEATS, 2), np.int64),
        lines=np.zeros((LINES, 3), np.int64),
        ports=np.zeros((fetcher.ports, 3), np.int64),
        chosen=np.full(config.dram.channels, -1, np.int64),
        arrived=np.zeros((fetcher.ports, fetcher.data_fifo_depth), np.uint8),
        rows=np.zeros((rows, 5), np.int64),
        loads=np.zeros((loads, 5), np.int64),
        queues=make_fifos(6, deep),
        row_fifo=make_fifos(1, config.softmax.row_fifo_depth * config.softmax.lanes),
        waiting=make_fifos(3, requests),
        addresses=make_fifos(fetcher.ports, fetcher.address_fifo_depth),
        counts=np.zeros(len(COUNTS), np.int64),
        rng=make_rng(seed),
        sorting=np.array([sort_cycles(n, config.topk.lanes) for n in lengths], np.int64),
        scratch=np.zeros(longest, np.int64),
    )
