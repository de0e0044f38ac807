"""A memory on its own: latency, bandwidth, turnaround, refresh, presets, traces, determinism."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparseloom.hardware.units.dram import (
    LOGGED,
    NEVER,
    RD,
    can_accept,
    channel_of,
    in_flight,
    make_dram,
    next_event,
    pop,
    push,
    step,
)
from sparseloom.hardware.units.dram_config import list_memories, load_memory
from sparseloom.hardware.units.dram_stream import dump_dram, stream, streaming_bandwidth


@pytest.mark.parametrize("name", list_memories())
def test_an_unloaded_read_takes_what_the_formula_says(name: str) -> None:
    config = load_memory(name)
    assert stream(config, np.array([1 << 20])).cycles == config.unloaded_read_clocks


@pytest.mark.parametrize("name", list_memories())
def test_a_stream_moves_every_byte_and_never_more_than_the_buses(name: str) -> None:
    config = load_memory(name)
    n = 20_000
    found = stream(config, np.arange(n) * config.atom_bytes)
    assert (found.reads, found.writes) == (n, 0)
    assert found.row_hits + found.activates == n
    assert found.busy == n * config.timing_clocks.burst
    assert found.bytes_per_clock(config.atom_bytes) <= config.peak_bytes_per_clock


# Of the peak, with open rows and a stream that turns to another bank group with every atom or four.
@pytest.mark.parametrize(
    ("name", "share"), [("hbm2_2000", 0.85), ("ddr4_2400", 0.9), ("ddr4_3200", 0.9)]
)
def test_a_sequential_stream_uses_most_of_the_peak(name: str, share: float) -> None:
    config = load_memory(name)
    assert streaming_bandwidth(config) > share * config.peak_bytes_per_clock
    assert streaming_bandwidth(config, is_write=True) > share * config.peak_bytes_per_clock


def test_writes_and_reads_turn_the_bus_and_lose_no_byte() -> None:
    config = load_memory("hbm2_2000", channels=2)
    n = 20_000
    addresses = np.arange(n) * 32
    mixed = stream(config, addresses, np.arange(n) % 2 == 0)
    assert (mixed.reads, mixed.writes) == (n // 2, n // 2)
    reads = stream(config, addresses)
    assert mixed.cycles > reads.cycles
    # Turned with every request the bus would carry two atoms in 28 clocks.
    one_by_one = n / 2 / (2 * config.pseudo_channels) * 28
    assert mixed.cycles < one_by_one / 3


def test_without_drain_the_clocks_end_with_the_last_request_accepted() -> None:
    config = load_memory("hbm2_2000")
    addresses = np.arange(48) * 32
    assert stream(config, addresses, per_clock=16, drain=False).cycles == 3
    assert stream(config, addresses, per_clock=16).cycles > config.unloaded_read_clocks


def test_refresh_takes_its_share_of_the_time() -> None:
    config = load_memory("hbm2_2000", channels=1)
    never = load_memory("hbm2_2000", channels=1, **{"refresh_clocks.interval": 0})
    addresses = np.arange(200_000) * 32
    with_refresh, without = stream(config, addresses), stream(never, addresses)
    assert without.refreshes == 0
    intervals = with_refresh.cycles / config.refresh_clocks.interval
    assert with_refresh.refreshes == pytest.approx(2 * intervals, abs=2)
    lost = (with_refresh.cycles - without.cycles) / with_refresh.cycles
    share = config.refresh_clocks.all_banks / config.refresh_clocks.interval
    assert share < lost < share + 0.03


def test_the_public_rtl_has_half_the_bandwidth_and_reads_of_twenty_cycles() -> None:
    config = load_memory("rtl_compat", channels=1)
    assert config.unloaded_read_clocks == 20
    assert config.peak_bytes_per_clock == 2 * 32 / 4
    # Both pseudo-channels at work, one open row in each.
    row = config.row_bytes // 32
    atoms = np.stack([np.arange(16), row + np.arange(16)], axis=1).ravel()
    dram = make_dram(config, log=200)
    waiting, sent, now = list(atoms * 32), 0, 0
    while waiting or in_flight(dram):
        if waiting and can_accept(dram, 0):
            push(dram, 0, int(waiting.pop(0)), False, sent, now)
            sent += 1
        step(dram, now)
        pop(dram, 0, now)
        now += 1
    reads = [int(e["clock"]) for e in dram.log[: dram.counters[LOGGED]] if e["command"] == RD]
    in_four = [sum(first <= clock < first + 4 for clock in reads) for first in reads]
    assert max(in_four) == 2


def test_the_same_stream_gives_the_same_clocks() -> None:
    config = load_memory("hbm2_2000", channels=4)
    addresses = np.random.default_rng(3).integers(0, 1 << 24, 5_000) * 32
    assert stream(config, addresses) == stream(config, addresses)


def test_more_channels_are_never_slower() -> None:
    addresses = np.random.default_rng(4).integers(0, 1 << 22, 5_000) * 32
    clocks = [
        stream(load_memory("hbm2_2000", channels=channels), addresses).cycles
        for channels in (1, 2, 4, 8, 16)
    ]
    assert clocks == sorted(clocks, reverse=True)


def test_responses_come_in_the_order_of_their_data_with_their_tags() -> None:
    config = load_memory("hbm2_2000", mapping="RoBaRaCoCh")
    dram = make_dram(config)
    # The second read hits the row that the first has opened, the third needs another row.
    addresses = [0, 16 * 32, 1 << 20]
    assert [channel_of(dram, address) for address in addresses] == [0, 0, 0]
    assert next_event(dram) == config.refresh_clocks.interval
    for tag, address in enumerate(addresses):
        push(dram, 0, address, False, 70 + tag, 0)
    assert in_flight(dram) == 3
    found: list[int] = []
    for now in range(120):
        step(dram, now)
        found.append(pop(dram, 0, now))
    assert [tag for tag in found if tag >= 0] == [70, 71, 72]
    assert found.index(70) == config.unloaded_read_clocks
    assert found.index(71) == config.unloaded_read_clocks + config.timing_clocks.ccd_l
    assert in_flight(dram) == 0
    assert pop(dram, 0, NEVER) == -1


def test_a_channel_takes_as_many_as_its_queues_hold() -> None:
    config = load_memory("hbm2_2000", **{"controller.outstanding_reads": 5})
    dram = make_dram(config)
    room = [0, 0]
    for kind in range(2):
        while can_accept(dram, 3, bool(kind)):
            push(dram, 3, 3 * 32 + (room[kind] << 16), bool(kind), 0, 0)
            room[kind] += 1
    assert room == [5, config.controller.write_entries]
    assert can_accept(dram, 4)


def test_the_command_log_counts_on_when_it_is_full() -> None:
    addresses = np.arange(64) * 32
    config = load_memory("hbm2_2000")
    whole, short = make_dram(config, log=1000), make_dram(config, log=7)
    for dram in (whole, short):
        for address in addresses:
            push(dram, channel_of(dram, int(address)), int(address), False, 0, 0)
        for now in range(80):
            step(dram, now)
    assert whole.counters[LOGGED] == short.counters[LOGGED] == 64 + 64
    assert (short.log == whole.log[:7]).all()


def test_a_trace_for_ramulator_has_a_line_for_each_request(tmp_path: Path) -> None:
    file = tmp_path / "trace"
    dump_dram(file, np.array([0, 64, 1 << 30]), np.array([False, True, False]))
    assert file.read_text() == "LD 0x0\nST 0x40\nLD 0x40000000\n"
    dump_dram(file, np.array([32]))
    assert file.read_text() == "LD 0x20\n"
    assert [one.name for one in tmp_path.iterdir()] == ["trace"]


@pytest.mark.parametrize(
    ("addresses", "is_write", "per_clock", "message"),
    [
        (np.array([-32]), False, None, "addresses must be from 0 below"),
        (np.array([1 << 34]), False, None, "the capacity of hbm2_2000"),
        (np.array([0.5]), False, None, "addresses must be one row of integers, got float64"),
        (np.array([[0]]), False, None, r"got int64 of shape \(1, 1\)"),
        (np.array([0, 32]), np.array([True]), None, "is_write must be one flag or 2 of them"),
        (np.array([0]), False, 0, "per_clock must be at least 1, got 0"),
    ],
)
def test_what_is_no_stream_is_refused(
    addresses: np.ndarray, is_write: np.ndarray | bool, per_clock: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        stream(load_memory("hbm2_2000"), addresses, is_write, per_clock=per_clock)
