"""A3's query pipeline: modules that take a query each, in closed form and cycle by cycle."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from sparseloom.hardware.engine.compiled import allocating
from sparseloom.hardware.engine.fifo import full, make_fifos, pop, push, used
from sparseloom.hardware.engine.log import BUSY, IDLE, Log, close, make_log, note

STALL_DRAM, STALL_NEXT, STALL_BUFFER = 2, 3, 4
"""Waiting for DRAM, for the next module to take a query, for a key and value buffer to be free."""
CODES = 5


class Jobs(NamedTuple):
    """Queries in the order in which they run.

    service (modules, queries): cycles of every module.
    head_of (queries): heads count up from 0; each brings its keys and values.
    kv_cycles: to fetch the keys and values of a head; query_cycles: a query in and an output out.
    """

    service: Int64[np.ndarray, "modules queries"]
    head_of: Int64[np.ndarray, "queries"]
    kv_cycles: int
    query_cycles: int


class Timing(NamedTuple):
    """cycles of everything; dram: of those, the first module's wait; drain: to empty the pipeline;
    totals (units, codes): cycles of the modules and, last, the loader (empty in closed form)."""

    cycles: int
    dram: int
    drain: int
    totals: Int64[np.ndarray, "units codes"]


def closed_form(jobs: Jobs, copies: int) -> Timing:
    """A query starts when its slowest module can take it: Σ max over modules, plus the drain.

    With one copy of the key and value memories a head loads after the one before it has left; with
    two it loads behind it.
    """
    slowest = np.maximum(jobs.service.max(axis=0), jobs.query_cycles)
    heads = int(jobs.head_of[-1]) + 1
    compute = np.bincount(jobs.head_of, weights=slowest, minlength=heads).astype(np.int64)
    last = np.append(np.flatnonzero(np.diff(jobs.head_of)), jobs.head_of.size - 1)
    tails = jobs.service[:, last].sum(axis=0) - jobs.service[:, last].max(axis=0)
    first = jobs.kv_cycles + jobs.query_cycles
    if copies == 1:
        dram, drain = first * heads, int(tails.sum())
    else:
        queries = np.bincount(jobs.head_of, minlength=heads)
        behind = jobs.kv_cycles + queries * jobs.query_cycles - compute
        dram = first + int(np.maximum(0, behind[:-1]).sum())
        drain = int(tails[-1])
    cycles = int(compute.sum()) + dram + drain
    return Timing(cycles, dram, drain, np.zeros((0, CODES), np.int64))


def cycle_by_cycle(jobs: Jobs, copies: int, depth: int) -> Timing:
    """Every module and the loader stepped each cycle; `depth` queries wait between two modules."""
    modules = jobs.service.shape[0]
    log = make_log(modules + 1, CODES)
    fifos = make_fifos(modules, depth)
    service, head_of = (np.ascontiguousarray(part) for part in (jobs.service, jobs.head_of))
    cycles = _run(service, head_of, jobs.kv_cycles, jobs.query_cycles, copies, fifos, log)
    return Timing(int(cycles), int(log.totals[0, STALL_DRAM]), 0, log.totals)


@allocating
def _run(
    service: np.ndarray,
    head_of: np.ndarray,
    kv_cycles: int,
    query_cycles: int,
    copies: int,
    fifos: np.ndarray,
    log: Log,
) -> int:
    modules, queries = service.shape
    heads = head_of[queries - 1] + 1
    current = np.full(modules, -1, np.int64)
    left = np.zeros(modules, np.int64)
    fetched, started, done, loaded, finished = 0, 0, 0, 0, 0
    query_left, kv_left = 0, 0
    now = 0
    while done < queries:
        free = finished
        for back in range(modules):
            m = modules - 1 - back
            if current[m] >= 0 and left[m] == 0 and not full(fifos, m + 1):
                push(fifos, m + 1, int(current[m]))
                current[m] = -1
            if current[m] < 0 and used(fifos, m) > 0:
                current[m] = pop(fifos, m)
                left[m] = service[m, current[m]]
                if m == 0:
                    started += 1
            if current[m] < 0:
                code = IDLE
                if m == 0 and started < queries:
                    held = fetched < queries and head_of[fetched] >= loaded and kv_left == 0
                    code = STALL_BUFFER if held and loaded - free >= copies else STALL_DRAM
                note(log, m, code, -1, now)
                continue
            if left[m] == 0:
                note(log, m, STALL_NEXT, current[m], now)
                continue
            note(log, m, BUSY, current[m], now)
            left[m] -= 1
            if left[m] == 0:
                if m == modules - 1:
                    query = current[m]
                    done += 1
                    if query == queries - 1 or head_of[query + 1] != head_of[query]:
                        finished += 1
                    current[m] = -1
                elif not full(fifos, m + 1):
                    push(fifos, m + 1, int(current[m]))
                    current[m] = -1
        # Queries first: they are small, and a module waits for each.
        if query_left == 0 and fetched < queries and head_of[fetched] < loaded:
            query_left = query_cycles if not full(fifos, 0) else 0
        if query_left == 0 and kv_left == 0 and loaded < heads and loaded - free < copies:
            kv_left = kv_cycles
        if query_left > 0:
            note(log, modules, BUSY, fetched, now)
            query_left -= 1
            if query_left == 0:
                push(fifos, 0, fetched)
                fetched += 1
        elif kv_left > 0:
            note(log, modules, BUSY, -1, now)
            kv_left -= 1
            loaded += 1 if kv_left == 0 else 0
        else:
            note(log, modules, STALL_BUFFER if loaded < heads else IDLE, -1, now)
        now += 1
    for unit in range(modules + 1):
        close(log, unit, now)
    return now
