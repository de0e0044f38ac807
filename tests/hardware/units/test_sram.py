"""SRAM buffers: published capacity, port limits, and clocks that do not fit."""

from __future__ import annotations

import pytest

from sparseloom.hardware.config import MachineError, checked
from sparseloom.hardware.units.sram import SramConfig, access_cycles, check_clock, lines_for

KEYS = SramConfig(lines=256, line_bits=512 * 12)


def test_published_key_buffer() -> None:
    """196608 B; 1024 keys of 64 x 12 bits fill half of it: the rest is the other buffer."""
    assert KEYS.kib == 192
    assert KEYS.macro_kib == 96
    assert lines_for(KEYS, 1024, 64 * 12) == 128
    assert SramConfig(lines=2048, line_bits=64 * 12).kib == 192  # the 1/8 machine


def test_ports_bound_the_accesses() -> None:
    assert access_cycles(KEYS, [0, 1, 2, 3], []) == 2  # two banks, one read port each
    assert access_cycles(KEYS, [0, 2, 4], []) == 3  # one bank
    assert access_cycles(KEYS, [0], [2]) == 1
    shared = SramConfig(lines=4, line_bits=8, shared_ports=True)
    assert access_cycles(shared, [0], [2]) == 2
    assert access_cycles(shared, [0], [1]) == 1
    with pytest.raises(MachineError, match="no write port"):
        access_cycles(SramConfig(lines=2, line_bits=8, write_ports=0), [], [1])


def test_vectors_do_not_cross_lines() -> None:
    buffer = SramConfig(lines=4, line_bits=100)
    assert lines_for(buffer, 8, 40) == 4
    with pytest.raises(MachineError, match="9 vectors of 40 bits need 5 lines"):
        lines_for(buffer, 9, 40)
    with pytest.raises(MachineError, match="at most the line's 100 bits, got 101"):
        lines_for(buffer, 1, 101)


def test_a_macro_slower_than_the_clock_is_refused() -> None:
    check_clock("key", 1.0, 1.0)
    with pytest.raises(MachineError, match=r"sram 'key' cycles in 2 ns, too slow for 1 GHz"):
        check_clock("key", 2.0, 1.0)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(MachineError, match=r"lines \(5\) must be a multiple of banks \(2\)"):
        checked(SramConfig, {"lines": 5, "line_bits": 8}, "here")
    with pytest.raises(MachineError, match="must be equal"):
        checked(
            SramConfig,
            {"lines": 4, "line_bits": 8, "shared_ports": True, "write_ports": 2},
            "here",
        )
