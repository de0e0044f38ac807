"""A memory on its own: address streams through it, bandwidth, and traces for other simulators."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sparseloom.hardware.engine.compiled import compiled
from sparseloom.hardware.units.dram import (
    ACTIVATES,
    BUSY,
    PRECHARGES,
    READS,
    REFRESHES,
    ROW_HITS,
    WRITES,
    Dram,
    can_accept,
    channel_of,
    in_flight,
    make_dram,
    next_event,
    pop,
    push,
    step,
)
from sparseloom.hardware.units.dram_config import MemoryConfig


class Stream(NamedTuple):
    """What a stream cost. cycles: clocks up to the last response (or the last write's command)."""

    cycles: int
    activates: int
    row_hits: int
    reads: int
    writes: int
    precharges: int
    refreshes: int
    busy: int

    def bytes_per_clock(self, atom_bytes: int) -> float:
        """Bytes moved for each clock."""
        return (self.reads + self.writes) * atom_bytes / max(self.cycles, 1)


def stream(
    config: MemoryConfig,
    addresses: np.ndarray,
    is_write: np.ndarray | bool = False,
    *,
    per_clock: int | None = None,
    drain: bool = True,
) -> Stream:
    """Run an address stream through an idle memory, as a player of traces does.

    The front end offers requests in the order of the stream, up to `per_clock` in a clock. If the
    channel of the next one has no room, everything behind it waits (head-of-line blocking); what
    is outstanding is bounded by the queues and `outstanding_reads` of the memory. Data is taken
    in the clock in which it is ready.

    Args:
        config: the memory.
        addresses: (n) bytes; every request moves the atom that holds its address.
        is_write: (n) bool, or one for all.
        per_clock: twice what the data buses can move, if not given.
        drain: whether `cycles` ends with the last response, or with the last request accepted
            (as Ramulator's trace players end).

    Raises:
        ValueError: addresses that are not whole numbers from 0 below the capacity, flags of
            another length, `per_clock` below 1.
    """
    state = make_dram(config)
    where, flags = _checked(config, addresses, is_write)
    if per_clock is None:
        per_clock = max(1, round(2 * config.peak_bytes_per_clock / config.atom_bytes))
    if per_clock < 1:
        raise ValueError(f"per_clock must be at least 1, got {per_clock}")
    accepted, ended = play(state, where, flags, per_clock)
    n = [int(number) for number in state.counters]
    return Stream(
        cycles=ended if drain else accepted,
        activates=n[ACTIVATES],
        row_hits=n[ROW_HITS],
        reads=n[READS],
        writes=n[WRITES],
        precharges=n[PRECHARGES],
        refreshes=n[REFRESHES],
        busy=n[BUSY],
    )


def _checked(
    config: MemoryConfig, addresses: np.ndarray, is_write: np.ndarray | bool
) -> tuple[np.ndarray, np.ndarray]:
    given = np.asarray(addresses)
    if given.ndim != 1 or (given.size and not np.issubdtype(given.dtype, np.integer)):
        raise ValueError(
            f"addresses must be one row of integers, got {given.dtype} of shape {given.shape}"
        )
    where = given.astype(np.int64)
    if where.size and not (where.min() >= 0 and where.max() < config.capacity_bytes):
        raise ValueError(
            f"addresses must be from 0 below {config.capacity_bytes} (the capacity of "
            f"{config.name}), got {where.min()} to {where.max()}"
        )
    flags = np.broadcast_to(np.asarray(is_write, dtype=np.bool_), np.shape(is_write) or where.shape)
    if flags.shape != where.shape:
        raise ValueError(
            f"is_write must be one flag or {len(where)} of them, got shape {flags.shape}"
        )
    return where, np.ascontiguousarray(flags)


@compiled
def play(
    state: Dram, addresses: np.ndarray, is_write: np.ndarray, per_clock: int
) -> tuple[int, int]:
    """Clocks after which the last request was accepted, and after which all was done."""
    n = len(addresses)
    sent = 0
    now = 0
    accepted = 0
    ended = 0
    channels = len(state.channels)
    reads = 0
    for i in range(n):
        reads += 0 if is_write[i] else 1
    left = reads
    while True:
        for _ in range(per_clock):
            if sent == n:
                break
            c = channel_of(state, addresses[sent])
            if not can_accept(state, c, is_write[sent]):
                break
            push(state, c, addresses[sent], is_write[sent], sent, now)
            sent += 1
            accepted = now + 1
        step(state, now)
        if left > 0:
            for c in range(channels):
                while pop(state, c, now) >= 0:
                    left -= 1
                    ended = now
        if sent == n and left == 0 and in_flight(state) == 0:
            break
        now += 1
        # Nothing to send and no data under way: jump to the next command.
        if sent == n and left == 0:
            now = max(now, next_event(state))
            ended = now
    return accepted, max(ended, accepted)


def streaming_bandwidth(
    config: MemoryConfig, *, is_write: bool = False, megabytes: float = 4.0
) -> float:
    """Bytes per clock that a sequential stream reaches, refresh included."""
    atoms = max(1, round(megabytes * 2**20 / config.atom_bytes))
    atoms = min(atoms, config.capacity_bytes // config.atom_bytes)
    addresses = np.arange(atoms, dtype=np.int64) * config.atom_bytes
    return stream(config, addresses, is_write).bytes_per_clock(config.atom_bytes)


def dump_dram(
    path: str | PathLike[str], addresses: np.ndarray, is_write: np.ndarray | bool = False
) -> None:
    """Write a load/store trace as Ramulator reads it: `LD 0x40` or `ST 0x40` on each line.

    The file appears whole or not at all.
    """
    where = np.asarray(addresses)
    flags = np.broadcast_to(np.asarray(is_write, dtype=np.bool_), where.shape)
    target = Path(path)
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="ascii") as out:
            for start in range(0, len(where), 1 << 16):
                stop = start + (1 << 16)
                part = zip(where[start:stop], flags[start:stop], strict=True)
                out.writelines(f"{'ST' if write else 'LD'} {int(a):#x}\n" for a, write in part)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
