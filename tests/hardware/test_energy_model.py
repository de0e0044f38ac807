"""Energy and area from tables: hand-worked rows, bands, speed, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from sparseloom.hardware import MachineError, load_table
from sparseloom.hardware.actions import Action, Block, Kind
from sparseloom.hardware.energy_model import EnergyModel
from sparseloom.hardware.memory_energy import load_memory_energy
from sparseloom.hardware.primitives import load_primitives

ALADDIN = EnergyModel()
HOROWITZ = EnergyModel(logic="horowitz_45nm", node_nm=45)


def pj(model: EnergyModel, op: str, bits: int, kib: float = 0.0, kind: Kind = "int") -> float:
    return float(model.event_joules(op, bits, kib, kind)) * 1e12


def test_rows_of_the_tables() -> None:
    # Aladdin, quadratic in width from 32 bits.
    for bits, energy, area in ((16, 3.17, 1588), (12, 1.78, 893), (8, 0.79, 397), (4, 0.20, 99)):
        assert pj(ALADDIN, "multiply", bits) == pytest.approx(energy, rel=0.01)
        block = Block("x", "multiply", 1e6, bits)
        assert ALADDIN.area([block])["x"] == pytest.approx(area, rel=0.01)
    # Horowitz: (12/8)² × 0.2 pJ, and the widths that it prints.
    assert pj(HOROWITZ, "multiply", 12) == pytest.approx(0.45, rel=0.02)
    for op, bits, kind, energy in (
        ("add", 8, "int", 0.03), ("add", 16, "int", 0.05), ("add", 32, "int", 0.1),
        ("add", 64, "int", 0.2), ("multiply", 4, "int", 0.05), ("multiply", 32, "int", 3.1),
        ("add", 16, "fp", 0.4), ("add", 32, "fp", 0.9), ("multiply", 32, "fp", 3.7),
        ("exp", 32, "fp", 5 * 4.6), ("divide", 32, "fp", 5 * 3.7 + 2 * 0.9),
    ):  # fmt: skip
        assert pj(HOROWITZ, op, bits, kind=kind) == pytest.approx(energy)


def test_what_a_table_lacks_comes_from_its_fallback_at_the_same_node() -> None:
    comparator = pj(ALADDIN, "compare", 32)
    assert comparator == pytest.approx(0.02947)
    assert pj(EnergyModel(logic="horowitz_45nm"), "compare", 32) == pytest.approx(comparator)
    at_45 = pj(HOROWITZ, "add", 32, kind="fp")
    assert 0.8 * at_45 < pj(ALADDIN, "add", 32, kind="fp") < at_45
    with pytest.raises(MachineError, match=r"no energy_pj of 'add' \(fp\) at \[24\] bits in aladd"):
        ALADDIN.event_joules("add", 24, kind="fp")
    with pytest.raises(MachineError, match=r"no energy_pj of 'exp' \(int\)"):
        ALADDIN.event_joules("exp", 32)


def test_memory_beside_memory() -> None:
    """A 6144-bit line is twelve macros of 512 bits, not one bank."""
    assert pj(ALADDIN, "sram_read", 6144, 192) == pytest.approx(
        12 * pj(ALADDIN, "sram_read", 512, 16)
    )
    assert pj(ALADDIN, "sram_read", 6144, 192) == pytest.approx(139, rel=0.03)
    line, macros = Block("a", "sram", 1, 6144, 192), Block("b", "sram", 12, 512, 16)
    assert ALADDIN.area([line])["a"] == pytest.approx(ALADDIN.area([macros])["b"])
    # A word narrower than the narrowest port costs the whole port.
    assert pj(ALADDIN, "sram_write", 12, 16) == pj(ALADDIN, "sram_write", 64, 16)


def test_small_fifos_are_registers() -> None:
    assert pj(ALADDIN, "fifo", 12, 0.1875) == pytest.approx(12 * 0.009)
    bits = 128 * 12
    block = Block("f", "fifo", 1, 12, bits / 8192)
    assert ALADDIN.area([block])["f"] == pytest.approx(bits * 5.98e-6)
    large = pj(ALADDIN, "fifo", 128, 2)
    assert large == pytest.approx(
        pj(ALADDIN, "sram_read", 128, 2) + pj(ALADDIN, "sram_write", 128, 2)
    )
    both = ALADDIN.event_joules("fifo", np.array([12, 128]), np.array([0.1875, 2]))
    assert both * 1e12 == pytest.approx([12 * 0.009, large])


def test_dram_is_activations_and_bits() -> None:
    actions = [
        Action("dram", "dram_activate", 2),
        Action("dram", "dram_read", 10, 256),
        Action("dram", "dram_write", 1, 256),
    ]
    assert ALADDIN.dynamic(actions)["dram"] == pytest.approx((2 * 909 + 11 * 256 * 2.54) * 1e-12)
    hbm2 = load_memory_energy("oconnor_hbm2")
    # The paper's own share of activation: 1.21 pJ/bit; 3.97 in total holds ECC as well.
    assert hbm2.equivalent_pj_per_bit(909 / 1.21) == pytest.approx(3.75)
    assert hbm2.published_pj_per_bit == 3.97
    gddr5 = EnergyModel(memory="gddr5")
    assert gddr5.dynamic(actions)["dram"] == pytest.approx(11 * 256 * 14e-12)


def test_crossbars_are_multiplexers() -> None:
    assert pj(ALADDIN, "crossbar", 32) == pytest.approx(0.417)
    block = Block("x", "crossbar", 32 * 16, 256)
    assert ALADDIN.area([block])["x"] == pytest.approx(512 * 256 * 250 / 160 * 1e-6)


def test_joules_adds_up_by_component_and_lists_leakage() -> None:
    actions = [
        Action("qk", "multiply", 10, 12),
        Action("qk", "add", 9, 24),
        Action("pv", "add", 1, 32),
    ]
    blocks = [Block("qk", "multiply", 512, 12), Block("pv", "sram", 12, 512, 16)]
    found = ALADDIN.joules(actions, 1000, 2.0, blocks)
    assert found["qk"] == pytest.approx((10 * 12.68 * 9 / 64 + 9 * 0.21 * 24 / 32) * 1e-12)
    watts = 512 * 77.9e-6 * 9 / 64 + 12 * 0.63e-3
    assert sum(ALADDIN.leakage(blocks).values()) == pytest.approx(watts, rel=0.03)
    assert found["leakage"] == pytest.approx(watts * 1000 / 2e9, rel=0.03)
    assert set(found) == {"qk", "pv", "leakage"}
    with pytest.raises(MachineError, match="component must not be 'leakage'"):
        ALADDIN.joules([Action("leakage", "add", 1, 8)], 1, 1.0, [])


def test_bands_span_the_tables() -> None:
    model = EnergyModel(node_nm=45)
    actions = [Action("qk", "multiply", 1, 12), Action("dram", "dram_activate", 1)]
    bands = model.bands(actions)
    low, high = bands["qk"]
    assert low == pytest.approx(0.446e-12, rel=0.01)
    assert high == pytest.approx(1.78e-12 / 0.858, rel=0.02)
    assert bands["dram"] == pytest.approx((909e-12, 909e-12))


def test_voltage_is_recorded_and_counts() -> None:
    low = EnergyModel(voltage=0.7)
    assert pj(low, "add", 32) < 0.8 * pj(ALADDIN, "add", 32)
    assert low.name == "aladdin_40nm + cacti_sram (lop) + oconnor_hbm2 at 40 nm, 0.7 V"
    assert pj(low, "sram_read", 64, 8) == pj(ALADDIN, "sram_read", 64, 8)


def test_many_design_points_are_one_product() -> None:
    model = EnergyModel()
    ops = ["multiply", "add", "compare", "register", "crossbar"]
    actions = [Action(f"c{i}", ops[i % 5], 1.0, 4 + i) for i in range(20)]
    actions += [Action("m", "sram_read", 1.0, 512, 16 * (i + 1)) for i in range(5)]
    counts = np.random.default_rng(0).integers(0, 1000, (100_000, 25)).astype(np.float64)
    started = time.perf_counter()
    energy = counts @ model.coefficients(actions)
    assert time.perf_counter() - started < 1
    one = [
        Action(a.component, a.op, n, a.bits, a.kib)
        for a, n in zip(actions, counts[7].tolist(), strict=True)
    ]
    assert energy[7] == pytest.approx(sum(model.dynamic(one).values()))


def test_widths_of_many_design_points_at_once() -> None:
    bits, kib = np.meshgrid([64, 100, 512, 6144], [48.0, 192.0, 500.0])
    found = ALADDIN.event_joules("sram_read", bits, kib)
    assert found.shape == bits.shape
    for i, j in np.ndindex(found.shape):
        assert found[i, j] * 1e12 == pytest.approx(
            pj(ALADDIN, "sram_read", int(bits[i, j]), float(kib[i, j]))
        )


def test_what_is_refused() -> None:
    with pytest.raises(MachineError, match="bits of 'add' must be at least 1, got 0"):
        ALADDIN.event_joules("add")
    with pytest.raises(MachineError, match="kib of 'sram_read' must be above 0, got 0"):
        ALADDIN.event_joules("sram_read", 64)
    with pytest.raises(MachineError, match=r"op must be one of multiply, .*got 'fly'"):
        ALADDIN.event_joules("fly", 8)
    with pytest.raises(MachineError, match="unknown primitive table 'aladin'; did you mean"):
        _ = EnergyModel(logic="aladin").logic_table
    with pytest.raises(MachineError, match="schema"):
        load_primitives("dota_22nm")
    assert load_table("dota_22nm").technology_nm == 22


def test_tables_name_their_source_and_themselves() -> None:
    for name in ("horowitz_45nm", "aladdin_40nm"):
        table = load_primitives(name)
        assert table.name == name
        assert "20" in table.source
        assert table.other is not None
    for name in ("oconnor_hbm2", "oconnor_hbm2_flat", "gddr5", "ddr4_2400_sequential",
                 "ddr4_2400_random"):  # fmt: skip
        assert load_memory_energy(name).name == name
        assert load_memory_energy(name).source


def test_a_table_with_descending_widths(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "schema: sparseloom/primitive_table/1\nname: mine\nsource: me\ntechnology_nm: 45\n"
        "volts: 0.9\nops: {add: {int: {width: linear, points: [{bits: 8, energy_pj: 1.0},"
        " {bits: 4, energy_pj: 1.0}]}}}\n",
        encoding="utf-8",
    )
    with pytest.raises(MachineError, match=r"widths must ascend, got \[8, 4\]"):
        load_primitives(file)
