"""Memory files: by name and by path, overrides, and one line for everything that is wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparseloom.hardware.config import MachineError
from sparseloom.hardware.units.address_mapping import FIELDS, MAPPINGS, decode
from sparseloom.hardware.units.dram import make_dram
from sparseloom.hardware.units.dram_config import list_memories, load_memory

SPARE = """\
schema: sparseloom/memory/1
name: spare
extends: hbm2_2000
source: a test
channels: 4
timing_clocks:
  rp: 20
"""


def test_a_file_by_path_extends_a_shipped_one(tmp_path: Path) -> None:
    file = tmp_path / "spare.yaml"
    file.write_text(SPARE)
    config = load_memory(file)
    shipped = load_memory("hbm2_2000")
    assert (config.name, config.channels, config.timing_clocks.rp) == ("spare", 4, 20)
    assert config.timing_clocks.ras == shipped.timing_clocks.ras
    assert load_memory(file, **{"timing_clocks.rp": 21}).timing_clocks.rp == 21


def test_every_shipped_memory_loads_and_runs() -> None:
    assert list_memories() == [
        "ddr4_2400",
        "ddr4_3200",
        "hbm2_1600",
        "hbm2_2000",
        "hbm2_2400",
        "rtl_compat",
    ]
    for name in list_memories():
        config = load_memory(name)
        assert config.name == name
        assert len(make_dram(config).channels) == config.channels


def test_published_sizes() -> None:
    config = load_memory("hbm2_2000")
    assert config.peak_bytes_per_clock * config.clock_ghz == 512
    assert config.capacity_bytes == 16 << 30
    assert load_memory("ddr4_2400").peak_bytes_per_clock * 1.2 == pytest.approx(19.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": 3}, "channels: .*must be a power of two, got 3"),
        ({"chanels": 4}, "chanels"),
        ({"timing_clocks.rcd": 4}, "rcd"),
        ({"timing_clocks.rp": 0}, "rp must be .*at least 1|rp.*greater than or equal to 1"),
        ({"row_bytes": 16}, "row_bytes must be at least atom_bytes = 32"),
        ({"mapping": "RoRoRo"}, "mapping: .*must be one of RoBaRaCoCh, ChRaBaRoCo, MOP4CLXOR"),
        ({"refresh_clocks.interval": 300}, "interval must be 0 or above all_banks = 350"),
        ({"command_bus": "both"}, "command_bus"),
        ({"controller.write_low_fraction": 1.5}, "write_low_fraction"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(changes: dict[str, object], message: str) -> None:
    with pytest.raises(MachineError, match=message) as caught:
        load_memory("hbm2_2000", **changes)
    assert "\n" not in str(caught.value)
    assert "hbm2_2000" in str(caught.value) or next(iter(changes)) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schema: [", "spare.yaml"),
        (SPARE.replace("/1", "/2"), "spare.yaml.*schema"),
        (SPARE.replace("rp: 20", "rp: soon"), "spare.yaml.*rp"),
        (SPARE + "  tRP: 20\n", "spare.yaml.*tRP"),
        (
            SPARE + "mapping:\n  order: [channel, column]\n",
            "spare.yaml.*every field must stand once",
        ),
        (
            SPARE + "mapping:\n  order: [channel:9, column, row, bank, bank_group, "
            "pseudo_channel, channel]\n",
            "mapping takes 9 bits of channel, which has 2",
        ),
    ],
)
def test_a_broken_file_is_named_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "spare.yaml"
    file.write_text(text)
    with pytest.raises(MachineError, match=message) as caught:
        load_memory(file)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(MachineError, match=r"did you mean 'hbm2_2000'.*ddr4_2400, ddr4_3200"):
        load_memory("hbm2_20000")
    with pytest.raises(MachineError, match=r"memory file nowhere\.yaml does not exist"):
        load_memory("nowhere.yaml")


@pytest.mark.parametrize("name", MAPPINGS)
def test_a_mapping_gives_every_atom_a_place_of_its_own(name: str) -> None:
    config = load_memory("hbm2_2000", rows=4, mapping=name)
    bits = config.field_bits
    atoms = np.arange(config.capacity_bytes // config.atom_bytes)
    fields = decode(config.mapping, bits, atoms)
    place = np.zeros_like(atoms)
    for field in FIELDS:
        assert fields[field].max() == (1 << bits[field]) - 1
        place = (place << bits[field]) | fields[field]
    assert len(np.unique(place)) == len(atoms)


def test_sixteen_channels_take_bits_five_to_eight() -> None:
    config = load_memory("hbm2_2000")
    atoms = np.array([0x0, 0x20, 0x1E0, 0x200, 0x2A0]) // 32
    assert decode(config.mapping, config.field_bits, atoms)["channel"].tolist() == [0, 1, 15, 0, 5]
