"""Every timing constraint: a command comes in the clock that it allows, and with it one longer,
one clock later (so that one clock earlier was illegal)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from sparseloom.hardware.units.dram import (
    ACT,
    LOGGED,
    PRE,
    PREA,
    RD,
    REF,
    WR,
    make_dram,
    pop,
    push,
    step,
)
from sparseloom.hardware.units.dram_config import MemoryConfig, Timing, load_memory

BASE = {
    "channels": 1,
    "pseudo_channels": 1,
    "mapping": "RoBaRaCoCh",
    "refresh_clocks.interval": 0,
}


class Request(NamedTuple):
    """A request of one atom, offered at a clock."""

    clock: int
    group: int
    bank: int
    row: int
    write: bool = False
    column: int = 0


class Logged(NamedTuple):
    """An entry of the command log."""

    clock: int
    command: int
    bank: int
    row: int


def run(config: MemoryConfig, requests: list[Request], clocks: int) -> list[Logged]:
    """The command log of a memory that is offered the requests."""
    dram = make_dram(config, log=200)
    for now in range(clocks):
        for i, one in enumerate(requests):
            if one.clock == now:
                place = (one.row * config.banks_per_group + one.bank) * config.bank_groups
                address = (place + one.group) * config.row_bytes + one.column * config.atom_bytes
                push(dram, 0, address, one.write, i, now)
        step(dram, now)
        pop(dram, 0, now)
    entries = dram.log[: dram.counters[LOGGED]]
    return [
        Logged(int(e["clock"]), int(e["command"]), int(e["bank"]), int(e["row"])) for e in entries
    ]


def gap(log: list[Logged], first: tuple[int, int], second: tuple[int, int]) -> int:
    """Clocks from the n-th command of one kind to the m-th of another."""

    def clock(command: int, n: int) -> int:
        return [entry.clock for entry in log if entry.command == command][n]

    return clock(*second) - clock(*first)


class Gate(NamedTuple):
    """A constraint (or two), a scene in which it alone decides, and how long it must take."""

    key: str
    requests: list[Request]
    first: tuple[int, int]
    second: tuple[int, int]
    clocks: Callable[[Timing], int]
    changes: tuple[tuple[str, int], ...] = ()


R = Request
# Rows of banks 0 of the groups 0 and 1 are open from clock 0 on; what is timed comes at clock 90.
OPENED = [R(0, 0, 0, 1), R(0, 1, 0, 1)]
GATES = [
    Gate("rcd_read", [R(0, 0, 0, 1)], (ACT, 0), (RD, 0), lambda t: t.rcd_read + 1),
    Gate("rcd_write", [R(0, 0, 0, 1, True)], (ACT, 0), (WR, 0), lambda t: t.rcd_write + 1),
    Gate("ras", [R(0, 0, 0, 1), R(0, 0, 0, 2)], (ACT, 0), (PRE, 0), lambda t: t.ras + 1),
    Gate("rp", [R(0, 0, 0, 1), R(0, 0, 0, 2)], (PRE, 0), (ACT, 1), lambda t: t.rp),
    Gate("rc", [R(0, 0, 0, 1), R(0, 0, 0, 2)], (ACT, 0), (ACT, 1), lambda t: t.rc, (("rc", 60),)),
    Gate("rtp", [R(0, 0, 0, 1), R(0, 0, 0, 2)], (RD, 0), (PRE, 0), lambda t: t.rtp, (("ras", 10),)),
    Gate(
        "wr",
        [R(0, 0, 0, 1, True), R(0, 0, 0, 2, True)],
        (WR, 0),
        (PRE, 0),
        lambda t: t.write_latency + t.burst + t.wr,
    ),
    Gate(
        "write_latency",
        [R(0, 0, 0, 1, True), R(0, 0, 0, 2, True)],
        (WR, 0),
        (PRE, 0),
        lambda t: t.write_latency + t.burst + t.wr,
    ),
    Gate("rrd_s", [R(0, 0, 0, 1), R(0, 1, 0, 1)], (ACT, 0), (ACT, 1), lambda t: t.rrd_s),
    Gate(
        "rrd_l",
        [R(0, 0, 0, 1), R(0, 0, 1, 1)],
        (ACT, 0),
        (ACT, 1),
        lambda t: t.rrd_l,
        (("rrd_l", 7),),
    ),
    Gate(
        "faw",
        [R(0, group, 0, 1) for group in range(4)] + [R(0, 0, 1, 1)],
        (ACT, 0),
        (ACT, 4),
        lambda t: t.faw,
        (("faw", 22),),
    ),
    Gate(
        "activate_command",
        [R(0, 0, 0, 1), R(0, 1, 0, 1)],
        (ACT, 0),
        (ACT, 1),
        lambda t: t.activate_command,
        (("rrd_s", 1), ("rrd_l", 1)),
    ),
    Gate(
        "ccd_s",
        [*OPENED, R(90, 0, 0, 1, column=1), R(90, 1, 0, 1, column=1)],
        (RD, 2),
        (RD, 3),
        lambda t: t.ccd_s,
    ),
    Gate(
        "burst",
        [*OPENED, R(90, 0, 0, 1, column=1), R(90, 1, 0, 1, column=1)],
        (RD, 2),
        (RD, 3),
        lambda t: t.burst,
    ),
    Gate(
        "ccd_l",
        [*OPENED, R(90, 0, 0, 1, column=1), R(90, 0, 0, 1, column=2)],
        (RD, 2),
        (RD, 3),
        lambda t: t.ccd_l,
    ),
    Gate(
        "wtr_s",
        [*OPENED, R(90, 0, 0, 1, True), R(91, 1, 0, 1)],
        (WR, 0),
        (RD, 2),
        lambda t: t.write_latency + t.burst + t.wtr_s,
    ),
    Gate(
        "wtr_l",
        [*OPENED, R(90, 0, 0, 1, True), R(91, 0, 0, 1)],
        (WR, 0),
        (RD, 2),
        lambda t: t.write_latency + t.burst + t.wtr_l,
    ),
    Gate(
        "read_to_write_gap",
        [*OPENED, R(90, 0, 0, 1), R(91, 1, 0, 1, True)],
        (RD, 2),
        (WR, 0),
        lambda t: t.read_latency + t.burst + t.read_to_write_gap - t.write_latency,
    ),
    Gate(
        "read_latency",
        [*OPENED, R(90, 0, 0, 1), R(91, 1, 0, 1, True)],
        (RD, 2),
        (WR, 0),
        lambda t: t.read_latency + t.burst + t.read_to_write_gap - t.write_latency,
    ),
]


def test_every_constraint_has_a_gate() -> None:
    assert {gate.key for gate in GATES} == set(Timing.model_fields)


@pytest.mark.parametrize("gate", GATES, ids=[gate.key for gate in GATES])
def test_a_command_waits_for_its_constraint_and_no_longer(gate: Gate) -> None:
    changes = {f"timing_clocks.{key}": clocks for key, clocks in gate.changes}
    config = load_memory("hbm2_2000", **BASE, **changes)
    found = gap(run(config, gate.requests, 180), gate.first, gate.second)
    assert found == gate.clocks(config.timing_clocks)
    longer = getattr(config.timing_clocks, gate.key) + 1
    slower = load_memory("hbm2_2000", **(BASE | changes | {f"timing_clocks.{gate.key}": longer}))
    assert gap(run(slower, gate.requests, 180), gate.first, gate.second) == found + 1


@pytest.mark.parametrize("all_banks", [50, 51])
def test_refresh_closes_all_banks_and_blocks_them(all_banks: int) -> None:
    config = load_memory(
        "hbm2_2000",
        **(BASE | {"refresh_clocks.interval": 100, "refresh_clocks.all_banks": all_banks}),
    )
    # The row is open when the refresh is due; the request of clock 105 waits for its end.
    log = run(config, [R(0, 0, 0, 1), R(105, 0, 0, 1)], 320)
    assert [(e.clock, e.command) for e in log] == [
        (0, ACT),
        (15, RD),
        (100, PREA),
        (100 + 14, REF),
        (100 + 14 + all_banks, ACT),
        (100 + 14 + all_banks + 15, RD),
        (200, PREA),
        (214, REF),
        (300, REF),
    ]


def test_a_refresh_waits_for_who_has_opened_a_row() -> None:
    config = load_memory("hbm2_2000", **(BASE | {"refresh_clocks.interval": 400}))
    log = run(config, [R(395, 2, 3, 7)], 500)
    assert [(e.clock, e.command, e.bank, e.row) for e in log] == [
        (395, ACT, 2 * 4 + 3, 7),
        (410, RD, 2 * 4 + 3, 7),
        (395 + 35, PREA, -1, -1),
        (395 + 35 + 14, REF, -1, -1),
    ]


def test_a_shared_command_bus_carries_one_command_in_a_clock() -> None:
    shared = load_memory("ddr4_2400", mapping="RoBaRaCoCh")
    requests = [R(0, i % 4, i // 4, 3, column=i) for i in range(16)]
    requests += [R(0, i % 4, i // 4, 3, column=i + 1) for i in range(16)]
    clocks = [entry.clock for entry in run(shared, requests, 300)]
    assert len(clocks) == len(set(clocks)) == 16 + 32
    split = load_memory("ddr4_2400", mapping="RoBaRaCoCh", command_bus="split")
    clocks = [entry.clock for entry in run(split, requests, 300)]
    assert len(set(clocks)) < len(clocks) == 16 + 32


def test_a_hit_goes_before_an_older_request_to_another_row() -> None:
    config = load_memory("hbm2_2000", **BASE)
    requests = [R(0, 0, 0, 1), R(1, 0, 0, 2), R(60, 0, 0, 1, column=5)]
    # The older request needs a PRE from clock 35 on: by clock 60 the row of the younger is gone.
    log = run(config, requests, 200)
    assert [(e.command, e.row) for e in log] == [
        (ACT, 1),
        (RD, 1),
        (PRE, -1),
        (ACT, 2),
        (RD, 2),
        (PRE, -1),
        (ACT, 1),
        (RD, 1),
    ]
    # Here the younger one comes while the row is open.
    log = run(config, [*requests[:2], R(20, 0, 0, 1, column=5)], 200)
    assert [(e.command, e.row) for e in log] == [
        (ACT, 1),
        (RD, 1),
        (RD, 1),
        (PRE, -1),
        (ACT, 2),
        (RD, 2),
    ]


def test_of_two_legal_commands_the_older_request_has_its_own() -> None:
    config = load_memory("hbm2_2000", **BASE)
    for groups in ((2, 1), (1, 2)):
        log = run(config, [R(0, group, 0, 1) for group in groups], 60)
        assert [e.bank for e in log if e.command == ACT] == [4 * group for group in groups]
        opened = [R(0, group, 0, 1) for group in (1, 2)]
        hits = [R(90, group, 0, 1, column=1) for group in groups]
        log = run(config, [*opened, *hits], 120)
        assert [e.bank for e in log if e.command == RD][2:] == [4 * group for group in groups]


def test_writes_wait_for_the_end_of_the_reads_or_a_full_queue() -> None:
    reads = [R(0, 0, 0, 1, column=column) for column in range(12)]
    few = [R(0, 1, 0, 1, True, column) for column in range(3)]
    config = load_memory("hbm2_2000", **BASE)
    commands = [e.command for e in run(config, reads + few, 300) if e.command in (RD, WR)]
    assert commands == [RD] * 12 + [WR] * 3
    # Four of five entries are 80 %: writes go first, down to less than 20 %: none.
    small = load_memory("hbm2_2000", **BASE, **{"controller.write_entries": 5})
    many = [R(0, 1, 0, 1, True, column) for column in range(4)]
    commands = [e.command for e in run(small, reads + many, 300) if e.command in (RD, WR)]
    assert commands == [WR] * 4 + [RD] * 12
