"""Modules 3 to 6 and 14: ids to addresses, crossbar, DRAM, crossbar back, whole vectors to SRAM.

A request is a list of token ids and where their vectors lie. The fetcher serves one request at a
time, low key bits first and otherwise keys and values in turn (HPCA 2021, section IV-D). The atoms
of its vectors lie across the ports in beats, one atom each, as in the public RTL. Behind the
crossbar a beat leaves its ports in lock-step, and whole vectors are written to SRAM.
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
    emitting: int,
    base: int,
    stride: int,
    atoms: int,
    start: int,
    own_list: int,
    packed: int,
) -> int:
    """Queue a request; returns its place in the ring.

    It starts in cycle `start`; where `emitting` is above 0 its ids come in so many cycles from
    then on, in equal parts.
    """
    i = s.registers[st.R_NEXT_REQUEST] % s.requests.shape[0]
    s.registers[st.R_NEXT_REQUEST] += 1
    s.requests[i, st.Q_KIND] = kind
    s.requests[i, st.Q_OWNER] = owner
    s.requests[i, st.Q_AT] = ids_at
    s.requests[i, st.Q_IDS] = ids
    s.requests[i, st.Q_EMITTING] = emitting
    s.requests[i, st.Q_TAKEN] = 0
    s.requests[i, st.Q_READY] = 0
    s.requests[i, st.Q_GATHERED] = 0
    s.requests[i, st.Q_WHOLE] = 0
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
    """Module 5: the oldest beat leaves its ports once every one of them has its atom."""
    if s.registers[st.R_BEATS] == 0:
        note(log, st.DATA, st.IDLE, -1, now)
        return
    g = s.registers[st.R_BEAT_HEAD]
    n = s.beats[g, st.B_ATOMS]
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
    note(log, st.DATA, st.BUSY, -1, now)
    s.registers[st.R_BEAT_HEAD] = (g + 1) % st.BEATS
    s.registers[st.R_BEATS] -= 1
    q = s.beats[g, st.B_REQUEST]
    s.requests[q, st.Q_GATHERED] += n
    whole = s.requests[q, st.Q_GATHERED] // s.requests[q, st.Q_ATOMS]
    if whole > s.requests[q, st.Q_WHOLE]:
        e = (s.registers[st.R_LINE_HEAD] + s.registers[st.R_LINES]) % st.LINES
        s.lines[e, st.W_REQUEST] = q
        s.lines[e, st.W_VECTORS] = (whole - s.requests[q, st.Q_WHOLE]) * s.requests[q, st.Q_PACKED]
        s.lines[e, st.W_FROM] = now + z.convert_latency
        s.registers[st.R_LINES] += 1
        s.requests[q, st.Q_WHOLE] = whole


@inlined
def step_memory(z: Sizes, s: State, m: Dram, log: Log, now: int) -> None:
    """Module 14: responses back to their ports. The memory's clock follows the new addresses."""
    if s.registers[st.R_IN_FLIGHT] == 0:
        note(log, st.DRAM, st.IDLE, -1, now)
        return
    came = 0
    for channel in range(z.channels):
        tag = memory.pop(m, channel, now)
        if tag >= 0:
            port, slot = tag >> SLOT_BITS, tag & SLOT_MASK
            if z.reorders == 0:
                slot = s.ports[port, st.P_CAME] & (z.data_depth - 1)
                s.ports[port, st.P_CAME] += 1
            s.arrived[port, slot] = 1
            s.registers[st.R_IN_FLIGHT] -= 1
            came += 1
    # The tag of an interval: atoms that came in each of its cycles.
    note(log, st.DRAM, st.BUSY, came, now)


@inlined
def step_addresses(z: Sizes, s: State, m: Dram, log: Log, now: int) -> None:
    """Module 4: every channel takes the address of the lowest port that has one for it.

    A port that was chosen while the channel had no room stays chosen until it has.
    """
    if s.registers[st.R_ADDRESSES] == 0:
        note(log, st.ADDRESS, st.IDLE, -1, now)
        return
    granted = 0
    for p in range(z.ports):
        if fifo.used(s.addresses, p) == 0:
            continue
        item = fifo.peek(s.addresses, p)
        channel = (item >> SLOT_BITS) & CHANNEL_MASK
        if (granted >> channel) & 1 or (s.chosen[channel] >= 0 and s.chosen[channel] != p):
            continue
        if not memory.can_accept(m, channel):
            s.chosen[channel] = p
            continue
        s.chosen[channel] = -1
        granted |= 1 << channel
        fifo.pop(s.addresses, p)
        s.registers[st.R_ADDRESSES] -= 1
        tag = (p << SLOT_BITS) | (item & SLOT_MASK)
        memory.push(m, channel, item >> (SLOT_BITS + CHANNEL_BITS), False, tag, now)
        s.registers[st.R_IN_FLIGHT] += 1
        s.counts[st.C_ATOMS] += 1
    note(log, st.ADDRESS, st.BUSY if granted else st.ON_CHANNEL, -1, now)


@inlined
def step_ports(
    z: Sizes, s: State, m: Dram, ids: np.ndarray, value_ids: np.ndarray, log: Log, now: int
) -> None:
    """Module 3: a beat, one atom for each port, of the vectors of the next ids.

    As many ids as there are ports are taken at once; their atoms, one vector after the other, lie
    across the ports.
    """
    q = s.registers[st.R_CURRENT]
    if q < 0:
        _next_request(s, now)
        q = s.registers[st.R_CURRENT]
        if q < 0:
            note(log, st.FETCHER, st.IDLE, -1, now)
            return
    taken, sent = s.requests[q, st.Q_TAKEN], s.registers[st.R_SENT]
    group = min(s.requests[q, st.Q_IDS] - taken, z.ports)
    emitting = s.requests[q, st.Q_EMITTING]
    since = now - s.requests[q, st.Q_FROM] + 1
    if since < emitting and s.requests[q, st.Q_IDS] * since // emitting < taken + group:
        note(log, st.FETCHER, st.ON_IDS, -1, now)
        return
    atoms = s.requests[q, st.Q_ATOMS]
    n = min(group * atoms - sent, z.ports)
    ready = s.registers[st.R_BEATS] < st.BEATS
    for p in range(n):
        ready &= s.ports[p, st.P_ISSUED] - s.ports[p, st.P_TAKEN] < z.data_depth
        ready &= not fifo.full(s.addresses, p)
    if not ready:
        note(log, st.FETCHER, st.ON_CHANNEL, -1, now)
        return
    base, stride = s.requests[q, st.Q_BASE], s.requests[q, st.Q_STRIDE]
    at = s.requests[q, st.Q_AT] + taken
    by_value = s.requests[q, st.Q_KIND] == st.VALUES_OF and s.requests[q, st.Q_LIST] == 1
    vector, part = sent // atoms, sent % atoms
    for p in range(n):
        token = value_ids[at + vector] if by_value else ids[at + vector]
        address = base + token * stride
        address += part * ATOM - address % ATOM
        slot = s.ports[p, st.P_ISSUED] & (z.data_depth - 1)
        place = (address << CHANNEL_BITS) | memory.channel_of(m, address)
        fifo.push(s.addresses, p, (place << SLOT_BITS) | slot)
        s.ports[p, st.P_ISSUED] += 1
        part += 1
        if part == atoms:
            vector, part = vector + 1, 0
    s.registers[st.R_ADDRESSES] += n
    g = (s.registers[st.R_BEAT_HEAD] + s.registers[st.R_BEATS]) % st.BEATS
    s.beats[g, st.B_REQUEST] = q
    s.beats[g, st.B_ATOMS] = n
    s.registers[st.R_BEATS] += 1
    note(log, st.FETCHER, st.BUSY, -1, now)
    s.registers[st.R_SENT] = sent + n
    if sent + n == group * atoms:
        s.registers[st.R_SENT] = 0
        s.requests[q, st.Q_TAKEN] = taken + group
        if taken + group == s.requests[q, st.Q_IDS]:
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
