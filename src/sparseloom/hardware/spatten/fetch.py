"""Modules 3 to 6 and 14: ids to addresses, crossbar, DRAM, crossbar back, whole vectors to SRAM.

A request is a list of token ids and where their vectors lie. The fetcher serves one request at a
time, low key bits first and otherwise keys and values in turn (HPCA 2021, section IV-D). Ids go to
the ports in groups; every port cuts its vector into atoms. Behind the crossbar a group leaves its
ports in lock-step, one atom each, and is written to SRAM as whole vectors.
"""

from __future__ import annotations

import numpy as np

from sparseloom.hardware.engine import fifo
from sparseloom.hardware.engine.compiled import inlined
from sparseloom.hardware.engine.log import Log, note
from sparseloom.hardware.spatten import state as st
from sparseloom.hardware.spatten.layout import ATOM
from sparseloom.hardware.spatten.state import Sizes, State
from sparseloom.hardware.units import dram as memory
from sparseloom.hardware.units.dram import Dram

# An entry of an address FIFO: address, channel, slot of the port's data FIFO.
SLOT_BITS, CHANNEL_BITS = 8, 8
SLOT_MASK, CHANNEL_MASK = (1 << SLOT_BITS) - 1, (1 << CHANNEL_BITS) - 1


@inlined
def request(
    s: State,
    kind: int,
    owner: int,
    ids_at: int,
    ids: int,
    available: int,
    base: int,
    stride: int,
    atoms: int,
    start: int,
    own_list: int,
    packed: int,
) -> int:
    """Queue a request; returns its place in the ring."""
    i = s.registers[st.R_NEXT_REQUEST] % st.REQUESTS
    s.registers[st.R_NEXT_REQUEST] += 1
    s.requests[i, st.Q_KIND] = kind
    s.requests[i, st.Q_OWNER] = owner
    s.requests[i, st.Q_AT] = ids_at
    s.requests[i, st.Q_IDS] = ids
    s.requests[i, st.Q_AVAILABLE] = available
    s.requests[i, st.Q_TAKEN] = 0
    s.requests[i, st.Q_READY] = 0
    s.requests[i, st.Q_BASE] = base
    s.requests[i, st.Q_STRIDE] = stride
    s.requests[i, st.Q_ATOMS] = atoms
    s.requests[i, st.Q_FROM] = start
    s.requests[i, st.Q_LIST] = own_list
    s.requests[i, st.Q_PACKED] = packed
    fifo.push(s.waiting, kind, i)
    return i


@inlined
def step_convert(z: Sizes, s: State, log: Log, now: int) -> None:
    """Vectors that arrived are written to SRAM, so many lines a cycle, and become readable."""
    budget = z.vectors_per_cycle
    while budget > 0 and s.registers[st.R_LINES] > 0:
        e = s.registers[st.R_LINE_HEAD]
        if s.lines[e, st.W_FROM] > now:
            break
        n = min(budget, s.lines[e, st.W_VECTORS])
        q = s.lines[e, st.W_REQUEST]
        s.requests[q, st.Q_READY] += n
        s.lines[e, st.W_VECTORS] -= n
        budget -= n
        kind = s.requests[q, st.Q_KIND]
        if kind == st.KEYS:
            s.counts[st.C_KEY_VECTORS] += n
        elif kind == st.LOW:
            s.counts[st.C_LOW_VECTORS] += n
        else:
            s.counts[st.C_VALUE_VECTORS] += n
        if s.lines[e, st.W_VECTORS] == 0:
            s.registers[st.R_LINE_HEAD] = (e + 1) % st.LINES
            s.registers[st.R_LINES] -= 1
    note(log, st.CONVERTER, st.BUSY if budget < z.vectors_per_cycle else st.IDLE, -1, now)


@inlined
def step_gather(z: Sizes, s: State, log: Log, now: int) -> None:
    """Module 5: the oldest group gives one atom per port once every port of it has one."""
    if s.registers[st.R_GROUPS] == 0:
        note(log, st.DATA, st.IDLE, -1, now)
        return
    g = s.registers[st.R_GROUP_HEAD]
    n = s.groups[g, st.G_IDS]
    if s.registers[st.R_LINES] == st.LINES:
        note(log, st.DATA, st.ON_SRAM, -1, now)
        return
    here = 0
    for p in range(n):
        here += s.arrived[p, s.ports[p, st.P_TAKEN] & (z.data_depth - 1)]
    if here < n:
        note(log, st.DATA, st.ON_PORTS if here > 0 else st.ON_DATA, -1, now)
        return
    for p in range(n):
        s.arrived[p, s.ports[p, st.P_TAKEN] & (z.data_depth - 1)] = 0
        s.ports[p, st.P_TAKEN] += 1
    s.groups[g, st.G_TAKEN] += 1
    note(log, st.DATA, st.BUSY, -1, now)
    if s.groups[g, st.G_TAKEN] == s.groups[g, st.G_ATOMS]:
        q = s.groups[g, st.G_REQUEST]
        e = (s.registers[st.R_LINE_HEAD] + s.registers[st.R_LINES]) % st.LINES
        s.lines[e, st.W_REQUEST] = q
        s.lines[e, st.W_VECTORS] = s.groups[g, st.G_IDS] * s.groups[g, st.G_PACKED]
        s.lines[e, st.W_FROM] = now + z.convert_latency
        s.registers[st.R_LINES] += 1
        s.registers[st.R_GROUP_HEAD] = (g + 1) % st.GROUPS
        s.registers[st.R_GROUPS] -= 1


@inlined
def step_memory(z: Sizes, s: State, m: Dram, log: Log, now: int) -> None:
    """Module 14: responses back to their ports, then one memory clock."""
    if s.registers[st.R_IN_FLIGHT] == 0:
        note(log, st.DRAM, st.IDLE, -1, now)
        memory.step(m, now)
        return
    for channel in range(z.channels):
        tag = memory.pop(m, channel, now)
        if tag >= 0:
            s.arrived[tag >> SLOT_BITS, tag & SLOT_MASK] = 1
            s.registers[st.R_IN_FLIGHT] -= 1
    memory.step(m, now)
    note(log, st.DRAM, st.BUSY, -1, now)


@inlined
def step_addresses(z: Sizes, s: State, m: Dram, log: Log, now: int) -> None:
    """Module 4: every channel takes the address of the lowest port that has one for it."""
    if s.registers[st.R_ADDRESSES] == 0:
        note(log, st.ADDRESS, st.IDLE, -1, now)
        return
    granted = 0
    refused = False
    for p in range(z.ports):
        if fifo.used(s.addresses, p) == 0:
            continue
        item = fifo.peek(s.addresses, p)
        channel = (item >> SLOT_BITS) & CHANNEL_MASK
        if (granted >> channel) & 1 or not memory.can_accept(m, channel):
            refused = True
            continue
        granted |= 1 << channel
        fifo.pop(s.addresses, p)
        s.registers[st.R_ADDRESSES] -= 1
        tag = (p << SLOT_BITS) | (item & SLOT_MASK)
        memory.push(m, channel, item >> (SLOT_BITS + CHANNEL_BITS), False, tag, now)
        s.registers[st.R_IN_FLIGHT] += 1
        s.counts[st.C_ATOMS] += 1
    note(log, st.ADDRESS, st.ON_CHANNEL if refused and granted == 0 else st.BUSY, -1, now)


@inlined
def step_ports(
    z: Sizes, s: State, m: Dram, ids: np.ndarray, value_ids: np.ndarray, log: Log, now: int
) -> None:
    """Module 3: ports put the addresses of their vectors in their FIFOs, then take new ids."""
    if s.registers[st.R_PUSHING] > 0:
        moved = 0
        for p in range(z.ports):
            if s.ports[p, st.P_LEFT] == 0:
                continue
            busy = s.ports[p, st.P_ISSUED] - s.ports[p, st.P_TAKEN] == z.data_depth
            if busy or fifo.full(s.addresses, p):
                continue
            slot = s.ports[p, st.P_ISSUED] & (z.data_depth - 1)
            address = s.ports[p, st.P_ADDRESS]
            place = (address << CHANNEL_BITS) | memory.channel_of(m, address)
            fifo.push(s.addresses, p, (place << SLOT_BITS) | slot)
            s.registers[st.R_ADDRESSES] += 1
            s.ports[p, st.P_ISSUED] += 1
            s.ports[p, st.P_ADDRESS] += ATOM
            s.ports[p, st.P_LEFT] -= 1
            s.registers[st.R_PUSHING] -= s.ports[p, st.P_LEFT] == 0
            moved += 1
        note(log, st.FETCHER, st.BUSY if moved > 0 else st.ON_CHANNEL, -1, now)
        if s.registers[st.R_PUSHING] > 0:
            return
        _next_group(z, s, ids, value_ids, now)
        return
    _next_group(z, s, ids, value_ids, now)
    if s.registers[st.R_PUSHING] > 0:
        note(log, st.FETCHER, st.BUSY, -1, now)
    elif s.registers[st.R_CURRENT] >= 0:
        note(log, st.FETCHER, st.ON_IDS, -1, now)
    else:
        note(log, st.FETCHER, st.IDLE, -1, now)


@inlined
def _next_group(z: Sizes, s: State, key_ids: np.ndarray, value_ids: np.ndarray, now: int) -> None:
    """Hand the next ids of the request at hand to the ports; take another request if it is done."""
    if s.registers[st.R_CURRENT] < 0:
        _next_request(s, now)
    q = s.registers[st.R_CURRENT]
    if q < 0 or s.registers[st.R_GROUPS] == st.GROUPS:
        return
    taken = s.requests[q, st.Q_TAKEN]
    left = s.requests[q, st.Q_IDS] - taken
    n = min(left, z.ports)
    if s.requests[q, st.Q_AVAILABLE] - taken < n:
        return
    atoms = s.requests[q, st.Q_ATOMS]
    base, stride = s.requests[q, st.Q_BASE], s.requests[q, st.Q_STRIDE]
    at = s.requests[q, st.Q_AT] + taken
    by_value = s.requests[q, st.Q_KIND] == st.VALUES_OF and s.requests[q, st.Q_LIST] == 1
    for p in range(n):
        token = value_ids[at + p] if by_value else key_ids[at + p]
        address = base + token * stride
        s.ports[p, st.P_ADDRESS] = address - address % ATOM
        s.ports[p, st.P_LEFT] = atoms
    g = (s.registers[st.R_GROUP_HEAD] + s.registers[st.R_GROUPS]) % st.GROUPS
    s.groups[g, st.G_REQUEST] = q
    s.groups[g, st.G_IDS] = n
    s.groups[g, st.G_ATOMS] = atoms
    s.groups[g, st.G_TAKEN] = 0
    s.groups[g, st.G_PACKED] = s.requests[q, st.Q_PACKED]
    s.registers[st.R_GROUPS] += 1
    s.registers[st.R_PUSHING] = n
    s.requests[q, st.Q_TAKEN] = taken + n
    if left == n:
        s.registers[st.R_CURRENT] = -1


@inlined
def _next_request(s: State, now: int) -> None:
    """Low bits before all else; keys and values take turns."""
    first = st.KEYS if s.registers[st.R_LAST_KIND] == st.VALUES_OF else st.VALUES_OF
    for turn in range(3):
        kind = st.LOW
        if turn == 1:
            kind = first
        elif turn == 2:
            kind = st.KEYS + st.VALUES_OF - first
        if fifo.used(s.waiting, kind) == 0:
            continue
        q = fifo.peek(s.waiting, kind)
        if s.requests[q, st.Q_FROM] > now:
            continue
        fifo.pop(s.waiting, kind)
        s.registers[st.R_CURRENT] = q
        if kind != st.LOW:
            s.registers[st.R_LAST_KIND] = kind
        return
