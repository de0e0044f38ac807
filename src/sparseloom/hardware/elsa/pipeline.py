"""ELSA's cycles for one head on one unit, in closed form and cycle by cycle (§IV-C, §IV-D).

Keys lie in the banks in turn, and the keys of a bank belong to its selectors in turn: key i to bank
i mod P_a and to selector ⌊i / P_a⌋ mod P_c.  Each selector looks at a key a cycle and queues those
that it keeps; each bank's attention module takes one at a time, from the longest queue.  The next
query is hashed and the last one divided meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from sparseloom.hardware.elsa.config import ElsaConfig
from sparseloom.hardware.engine.compiled import compiled, inlined
from sparseloom.hardware.engine.fifo import full, make_fifos, peek, pop, push, used
from sparseloom.hardware.engine.log import BUSY, IDLE, Log, close, make_log, note
from sparseloom.hashing import Hasher

CAUSES = (
    "idle",
    "busy",
    "preprocessing",
    "candidates",
    "queue",
    "banks",
    "attention",
    "hash",
    "buffer",
)
"""What a unit does: waits for keys to be hashed, for a selector to find a candidate, for room in a
selector's queue, for the other banks, for the bank's attention module, for the query's hash, and
for a place among the queries that are hashed."""
ON_KEYS, ON_CANDIDATES, ON_QUEUE, ON_BANKS, ON_ATTENTION, ON_HASH, ON_BUFFER = range(2, 9)

# Registers of a run.
R_DIVIDED, R_DIVISION_LEFT, R_HASHED, R_HASH_LEFT, R_NOW = range(5)
REGISTERS = 5
_QUIET = 10_000_000  # cycles without an output after which something is stuck


class Head(NamedTuple):
    """The work of one head: keys are those that are no padding, in their order.

    kept (queries, keys): candidates.
    seen (queries): how many keys a query may see; they are the first ones.
    """

    kept: Bool[np.ndarray, "queries keys"]
    seen: Int64[np.ndarray, "queries"]


class Rates(NamedTuple):
    """Cycles that a module takes: to hash a vector (0: nothing is hashed), to compare a hash, for
    a candidate, for a norm, to divide an output; and those behind the last candidate."""

    hash: int
    compare: int
    attend: int
    norm: int
    divide: int
    depth: int


class Timing(NamedTuple):
    """cycles: of the whole head; preprocessing: of those, before the first query; lost: cycles in
    which the modules of other banks waited for the slowest; slowest: queries by what bound them
    (hash, selection, attention, division)."""

    cycles: int
    preprocessing: int
    lost: int
    slowest: tuple[int, int, int, int]


def rates(config: ElsaConfig, hasher: Hasher, head_dim: int, value_dim: int) -> Rates:
    """Cycles per item for heads of these widths: what does not fit in 64 numbers takes turns."""
    turns = -(-max(head_dim, value_dim) // config.attention.dim)
    wide = turns * config.attention.dim
    hashing = -(-hasher.multiplications // config.hashing.multipliers)
    approximate = config.search.mode == "approximate"
    return Rates(
        hashing if approximate else 0,
        -(-hasher.bits // config.attention.dim) if approximate else 1,
        turns,
        turns if approximate else 0,
        -(-wide // config.division.multipliers),
        config.attention.depth_cycles,
    )


def closed_form(head: Head, config: ElsaConfig, rate: Rates) -> Timing:
    """Preprocessing 3·(n + 1) cycles, then a query each max(hash, scan, largest bank, division).

    With 64 numbers, 256 hash and 16 division multipliers that is
    max(3, n / (P_a · P_c), max over banks of the candidates, 4).
    """
    banks, selectors = config.selection.banks, config.selection.selectors
    keys = head.kept.shape[1]
    scan = rate.compare * -(-head.seen // (banks * selectors))
    counts = np.stack([head.kept[:, b::banks].sum(axis=1) for b in range(banks)])
    most = rate.attend * counts.max(axis=0)
    parts = np.stack(
        [
            np.full_like(scan, rate.hash),
            scan,
            most,
            np.full_like(scan, rate.divide),
        ]
    )
    per_query = parts.max(axis=0)
    balanced = np.maximum(
        np.delete(parts, 2, axis=0).max(axis=0), rate.attend * -(-counts.sum(axis=0) // banks)
    )
    before = rate.hash * (keys + 1)
    bound = np.bincount(parts.argmax(axis=0), minlength=4)
    cycles = before + int(per_query.sum()) + rate.divide + rate.depth
    lost = int((per_query - balanced).sum())
    return Timing(
        cycles, before, lost, (int(bound[0]), int(bound[1]), int(bound[2]), int(bound[3]))
    )


def units_of(config: ElsaConfig) -> tuple[str, ...]:
    """Names of the units in the log: hash, selectors bank by bank, attention modules, division."""
    banks, selectors = config.selection.banks, config.selection.selectors
    return (
        "hash",
        *(f"selector {b}.{c}" for b in range(banks) for c in range(selectors)),
        *(f"attention {b}" for b in range(banks)),
        "division",
    )


def make_unit_log(config: ElsaConfig, window: tuple[int, int] | None = None) -> Log:
    """An empty log for `cycle_by_cycle`."""
    return make_log(len(units_of(config)), len(CAUSES), window=window or (0, 0))


def cycle_by_cycle(head: Head, config: ElsaConfig, rate: Rates, log: Log, start: int = 0) -> int:
    """Step every unit each cycle from `start` on; the cycle in which the unit is free again.

    Raises:
        RuntimeError: the units wait for each other, which no head may bring about.
    """
    s = config.selection
    banks, selectors = s.banks, s.selectors
    state = np.zeros((3, banks), np.int64)
    scanning = np.zeros((4, banks * selectors), np.int64)
    scanning[1] = rate.compare
    scanning[3] = (np.arange(selectors) * banks + np.arange(banks)[:, None]).reshape(-1)
    queues = make_fifos(banks * selectors, s.queue)
    registers = np.zeros(REGISTERS, np.int64)
    registers[R_NOW] = start
    limits = np.array(
        [banks, selectors, s.run_ahead, s.query_buffer, config.attention.output_buffer], np.int64
    )
    kept = np.ascontiguousarray(head.kept)
    seen = np.ascontiguousarray(head.seen, np.int64)
    end = _run(
        kept, seen, np.array(rate, np.int64), limits, state, scanning, queues, registers, log
    )
    if end < 0:
        raise RuntimeError(f"{config.name}: no output in {_QUIET} cycles: the units are stuck")
    return int(end)


@compiled
def _run(
    kept: np.ndarray,
    seen: np.ndarray,
    rate: np.ndarray,
    limits: np.ndarray,
    state: np.ndarray,
    scanning: np.ndarray,
    queues: np.ndarray,
    registers: np.ndarray,
    log: Log,
) -> int:
    """state (3, banks): the query of a bank's module, cycles left of its candidate, outputs that
    wait. scanning (4, selectors): the query of a selector, cycles left of its key, whether nothing
    has changed since it had to wait, so that it need not look again, and its key."""
    banks, selectors = limits[0], limits[1]
    queries, keys = kept.shape
    modules = 1 + banks * selectors
    _preprocess(keys, rate, limits, registers, log)
    if rate[0] == 0:
        registers[R_HASHED] = queries
    last, last_change = 0, registers[R_NOW]
    while registers[R_DIVIDED] < queries:
        now = registers[R_NOW]
        _step_division(rate, limits, state, registers, log, modules + banks)
        for b in range(banks):
            _step_attention(
                b, queries, rate, limits, state, scanning, queues, log, modules + b, now
            )
        for b in range(banks):
            for c in range(selectors):
                if scanning[2, b * selectors + c] == 0:
                    _step_selector(
                        b, c, kept, seen, rate, limits, state, scanning, queues, registers, log, now
                    )
        if _step_hash(queries, rate, limits, state, registers, log, now):
            for u in range(banks * selectors):
                scanning[2, u] = 0
        if registers[R_DIVIDED] != last:
            last, last_change = registers[R_DIVIDED], now
        if now - last_change > _QUIET:
            return -1
        registers[R_NOW] = now + 1
    end = registers[R_NOW] + rate[5]
    for unit in range(modules + banks + 1):
        note(log, unit, IDLE, -1, registers[R_NOW])
        close(log, unit, end)
    return end


@inlined
def _preprocess(
    keys: int, rate: np.ndarray, limits: np.ndarray, registers: np.ndarray, log: Log
) -> None:
    """All keys and the first query are hashed, and the attention modules take the norms."""
    banks, selectors = limits[0], limits[1]
    if rate[0] == 0:
        return
    now = registers[R_NOW]
    end = now + rate[0] * (keys + 1)
    note(log, 0, BUSY, -1, now)
    for unit in range(1, 1 + banks * selectors):
        note(log, unit, ON_KEYS, -1, now)
    for b in range(banks):
        unit = 1 + banks * selectors + b
        own = (keys - b + banks - 1) // banks
        note(log, unit, BUSY, -1, now)
        note(log, unit, ON_KEYS, -1, min(end, now + max(0, own) * rate[3]))
    note(log, 1 + banks * selectors + banks, ON_KEYS, -1, now)
    registers[R_HASHED] = 1
    registers[R_NOW] = end


@inlined
def _step_division(
    rate: np.ndarray,
    limits: np.ndarray,
    state: np.ndarray,
    registers: np.ndarray,
    log: Log,
    unit: int,
) -> None:
    """A query's output, once every bank has its part."""
    if registers[R_DIVISION_LEFT] == 0:
        ready = 0
        for b in range(limits[0]):
            ready += 1 if state[2, b] > 0 else 0
        if ready == limits[0]:
            for b in range(limits[0]):
                state[2, b] -= 1
            registers[R_DIVISION_LEFT] = rate[4]
        else:
            code = ON_BANKS if ready > 0 else ON_ATTENTION
            note(log, unit, code, registers[R_DIVIDED], registers[R_NOW])
            return
    note(log, unit, BUSY, registers[R_DIVIDED], registers[R_NOW])
    registers[R_DIVISION_LEFT] -= 1
    if registers[R_DIVISION_LEFT] == 0:
        registers[R_DIVIDED] += 1


@inlined
def _step_attention(
    b: int,
    queries: int,
    rate: np.ndarray,
    limits: np.ndarray,
    state: np.ndarray,
    scanning: np.ndarray,
    queues: np.ndarray,
    log: Log,
    unit: int,
    now: int,
) -> None:
    """A candidate of the bank's query from the longest queue; or on to the next query."""
    first = b * limits[1]
    code = BUSY
    while state[1, b] == 0:
        query = state[0, b]
        if query == queries:
            code = IDLE
            break
        longest, at = 0, -1
        for u in range(first, first + limits[1]):
            waiting = used(queues, u)
            if waiting > longest and peek(queues, u) == query:
                longest, at = waiting, u
        if at >= 0:
            pop(queues, at)
            scanning[2, at] = 0
            state[1, b] = rate[2]
            break
        passed = True
        for u in range(first, first + limits[1]):
            passed = passed and scanning[0, u] > query
        if not passed:
            code = ON_CANDIDATES
            break
        if state[2, b] == limits[4]:
            code = ON_BANKS
            break
        state[2, b] += 1
        state[0, b] = query + 1
        for u in range(first, first + limits[1]):
            scanning[2, u] = 0
    note(log, unit, code, state[0, b] if code != IDLE else -1, now)
    if code == BUSY:
        state[1, b] -= 1


@inlined
def _step_selector(
    b: int,
    c: int,
    kept: np.ndarray,
    seen: np.ndarray,
    rate: np.ndarray,
    limits: np.ndarray,
    state: np.ndarray,
    scanning: np.ndarray,
    queues: np.ndarray,
    registers: np.ndarray,
    log: Log,
    now: int,
) -> None:
    """The next key of a selector: compared, and queued if it is a candidate."""
    banks, selectors = limits[0], limits[1]
    u = b * selectors + c
    query, key = scanning[0, u], scanning[3, u]
    scanning[2, u] = 1
    if query == kept.shape[0]:
        note(log, 1 + u, IDLE, -1, now)
        return
    if query >= registers[R_HASHED]:
        note(log, 1 + u, ON_HASH, query, now)
        return
    if query - state[0, b] > limits[2]:
        note(log, 1 + u, ON_ATTENTION, query, now)
        return
    if key < seen[query]:
        if scanning[1, u] == 1 and kept[query, key]:
            if full(queues, u):
                note(log, 1 + u, ON_QUEUE, query, now)
                return
            push(queues, u, query)
        note(log, 1 + u, BUSY, query, now)
        scanning[1, u] -= 1
        if scanning[1, u] == 0:
            scanning[1, u] = rate[1]
            key += banks * selectors
    else:
        note(log, 1 + u, IDLE, query, now)  # it has no key that the query may see
    scanning[2, u] = 0
    scanning[3, u] = key
    if key >= seen[query]:
        scanning[0, u] = query + 1
        scanning[3, u] = c * banks + b


@inlined
def _step_hash(
    queries: int,
    rate: np.ndarray,
    limits: np.ndarray,
    state: np.ndarray,
    registers: np.ndarray,
    log: Log,
    now: int,
) -> bool:
    """The hash of the next query, while there is a place for it; whether it is done."""
    hashed = registers[R_HASHED]
    if hashed == queries:
        note(log, 0, IDLE, -1, now)
        return False
    if registers[R_HASH_LEFT] == 0:
        slowest = state[0, 0]
        for b in range(1, limits[0]):
            slowest = min(slowest, state[0, b])
        if hashed - slowest >= limits[3]:
            note(log, 0, ON_BUFFER, hashed, now)
            return False
        registers[R_HASH_LEFT] = rate[0]
    note(log, 0, BUSY, hashed, now)
    registers[R_HASH_LEFT] -= 1
    if registers[R_HASH_LEFT] > 0:
        return False
    registers[R_HASHED] = hashed + 1
    return True
