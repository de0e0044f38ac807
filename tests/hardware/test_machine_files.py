"""Machine files: what is read, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sparseloom import hardware
from sparseloom.hardware import MachineError


def test_every_shipped_machine_loads() -> None:
    names = hardware.list_machines()
    assert "dota_asplos_2022" in names
    for name in names:
        machine = hardware.load(name)
        assert machine.name == name
        assert name in repr(machine)
        assert machine.config.source
        assert set(machine.area()) == set(machine.power()) == set(machine.table.modules)


def test_overrides_are_typed_and_change_the_hash() -> None:
    plain = hardware.load("dota_asplos_2022")
    settings = hardware.parse_overrides(
        ["rmmu.rows=64", "clock_ghz=1e0", "dram.gbytes_per_second = 64", "rmmu.multiplier=linear"]
    )
    assert settings == {
        "rmmu.rows": 64,
        "clock_ghz": 1.0,
        "dram.gbytes_per_second": 64,
        "rmmu.multiplier": "linear",
    }
    changed = hardware.load("dota_asplos_2022", **settings)
    assert changed.config_hash != plain.config_hash
    assert plain.config_hash == hardware.load("dota_asplos_2022").config_hash
    # Twice the rows are twice the area of the array, and nothing else.
    assert changed.area()["rmmu"] == pytest.approx(2 * plain.area()["rmmu"])
    assert changed.area()["sram"] == plain.area()["sram"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rmmu.rowz": 3}, "unknown key 'rmmu.rowz'"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"gpu.cores": 3}, "unknown key 'gpu.cores': the machine has no section 'gpu'"),
        ({"lanes.count": 3}, "no section 'lanes'"),
        ({"lanes": "4"}, "lanes: Input should be a valid integer, got '4'"),
        ({"lanes": 0}, "lanes: Input should be greater than or equal to 1, got 0"),
        ({"lanes": True}, "lanes: "),
        ({"clock_ghz": float("inf")}, "clock_ghz: "),
        ({"rmmu": 3}, "rmmu: "),
        ({"rmmu.multiplier": "cubic"}, "'quadratic' or 'linear', got 'cubic'"),
        ({"kind": "gpu"}, r"kind must be one of dota, .*got 'gpu'"),
        ({"energy_table": "dota_7nm"}, "unknown energy table 'dota_7nm'; did you mean 'dota_22nm'"),
        ({"schema": "sparseloom/machine/2"}, "schema: "),
    ],
)
def test_bad_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(MachineError, match=message) as caught:
        hardware.load("dota_asplos_2022", **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["rmmu.rows", "=3", "lanes=[1", "lanes={a: 1, a: 2}"])
def test_unreadable_settings(setting: str) -> None:
    with pytest.raises(MachineError, match=r"setting|value"):
        hardware.parse_overrides([setting])
    with pytest.raises(MachineError, match="set twice"):
        hardware.parse_overrides(["lanes=1", "lanes=2"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dota_asplos_2021", "did you mean 'dota_asplos_2022'"),
        ("mine.yaml", "machine file mine.yaml does not exist"),
        ("folder/mine", "does not exist"),
    ],
)
def test_unknown_machines(name: str, message: str) -> None:
    with pytest.raises(MachineError, match=message):
        hardware.load(name)


def test_a_machine_file_may_extend_another(tmp_path: Path) -> None:
    (tmp_path / "wide.yaml").write_text(
        "extends: dota_asplos_2022\nname: wide\nrmmu: {columns: 32}\n", encoding="utf-8"
    )
    (tmp_path / "wider.yaml").write_text(
        "extends: wide.yaml\nname: wider\nlanes: 8\n", encoding="utf-8"
    )
    machine = hardware.load(tmp_path / "wider.yaml")
    base = hardware.load("dota_asplos_2022")
    assert machine.name == "wider"
    assert machine.area()["rmmu"] == pytest.approx(4 * base.area()["rmmu"])
    assert machine.config.source == base.config.source


def test_a_machine_file_may_bring_its_energy_table(tmp_path: Path) -> None:
    table = Path(hardware.__file__).parent / "tables" / "dota_22nm.yaml"
    text = table.read_text(encoding="utf-8").replace("name: dota_22nm", "name: mine")
    (tmp_path / "mine_table.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "m.yaml").write_text(
        "extends: dota_asplos_2022\nenergy_table: mine_table.yaml\n", encoding="utf-8"
    )
    assert hardware.load(tmp_path / "m.yaml").table.name == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lanes: 1\nlanes: 2\n", "line 2: key 'lanes' appears twice"),
        ("rmmu:\n  rows: 1\n  rows: 2\n", "line 3: key 'rows' appears twice"),
        ("- 1\n", "the top level must be a mapping"),
        ("", "the top level must be a mapping"),
        ("a: [1\n", "cannot be read"),
        ("a: !!python/object:os.system {}\n", "cannot be read"),
        ("extends: m.yaml\n", "extends itself"),
        ("extends: 3\n", "extends must be a name or a path, got 3"),
        ("extends: nothing\n", "unknown machine 'nothing'"),
        ("kind: dota\n", "m.yaml: schema: Field required"),
    ],
)
def test_bad_files_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(MachineError, match=message) as caught:
        hardware.load(tmp_path / "m.yaml")
    assert "\n" not in str(caught.value)


def test_energy_is_counts_times_the_table() -> None:
    table = hardware.load_table("dota_22nm")
    found = table.joules(
        {"rmmu_pe_cycle": 1e12, "sram_bit": 1e12}, {"rmmu_pe_cycle": 1e12}, width={"sram_bit": 2.0}
    )
    assert found == {"rmmu": pytest.approx(1.26 * 1.1), "sram": pytest.approx(0.16)}
    # The events are the module powers per cycle at 1 GHz.
    assert table.events_pj["rmmu_pe_cycle"] == pytest.approx(645.98 / 512, rel=0.002)
    assert table.events_pj["accumulator_cycle"] == pytest.approx(139.21, rel=0.002)
