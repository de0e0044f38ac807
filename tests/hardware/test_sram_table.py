"""The SRAM grid: direct CACTI rows, shape against published caches, and its edges."""

from __future__ import annotations

import numpy as np
import pytest

from sparseloom.hardware import MachineError
from sparseloom.hardware.sram_table import QUANTITIES, load_sram


def look(quantity: str, kib: float, bits: float, node: float = 40, cell: str = "lop") -> float:
    at = load_sram().value(quantity, np.array([kib]), np.array([bits]), node_nm=node, cell=cell)
    return float(at[0])


# CACTI 7 run directly, 40 nm, 300 K, 512-bit port: read pJ, write pJ, leakage mW, mm², access and
# cycle ns. Leakage of lstp is given to one digit only.
@pytest.mark.parametrize(
    ("kib", "cell", "expected"),
    [
        (192, "lstp", (125, 185, None, 0.665, 2.25, 2.02)),
        (192, "lop", (52, 69, 6.5, 0.665, 1.52, 1.45)),
        (192, "hp", (89, 136, 68, 0.665, 0.81, 0.80)),
        (16, "lstp", (28.3, 52.4, None, 0.056, 1.06, 1.02)),
        (16, "lop", (11.6, 19.9, 0.63, 0.056, 0.64, 0.65)),
        (16, "hp", (20.6, 40.0, 6.5, 0.056, 0.29, 0.33)),
    ],
)
def test_direct_runs(kib: float, cell: str, expected: tuple[float | None, ...]) -> None:
    for quantity, value in zip(QUANTITIES, expected, strict=True):
        if value is not None:
            assert look(quantity, kib, 512, cell=cell) == pytest.approx(value, rel=0.03)
    assert look("leakage_mw", 192, 512, cell="lstp") == pytest.approx(0.007, rel=0.1)


def test_shape_of_published_caches() -> None:
    """Horowitz, ISSCC 2014: 10, 20 and 100 pJ for 64 bits of 8 KB, 32 KB and 1 MB at 45 nm."""
    ours = [look("read_pj", kib, 64, node=45, cell="lstp") for kib in (8, 32, 1024)]
    assert ours == sorted(ours)
    for mine, published in zip(ours, (10, 20, 100), strict=True):
        assert published / 2 < mine < published * 1.2


def test_between_points_lies_between_their_values() -> None:
    for quantity in QUANTITIES:
        ends = sorted(look(quantity, kib, 128) for kib in (32, 64))
        assert ends[0] <= look(quantity, 45, 128) <= ends[1]
    # Between powers of two of both axes: the geometric mean of the corners.
    corners = [look("read_pj", kib, bits) for kib in (32, 64) for bits in (64, 128)]
    middle = look("read_pj", 32 * 2**0.5, 64 * 2**0.5)
    assert middle == pytest.approx(float(np.exp(np.mean(np.log(corners)))))


def test_more_capacity_takes_more_area_and_leaks_more() -> None:
    kib = np.array(load_sram().kib[2:])
    for quantity in ("area_mm2", "leakage_mw"):
        values = load_sram().value(quantity, kib, np.full_like(kib, 256), node_nm=40, cell="lop")
        assert (np.diff(values) > 0).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2048, 64), "capacity must be 0.5 to 1024 KiB, got 2048"),
        ((64, 8192), "port width must be 64 to 6144 bits, got 8192"),
        ((64, 64, 16), "node must be 22 to 65 nm, got 16"),
        ((64, 64, 40, "fast"), "cell must be one of hp, lop, lstp, got 'fast'"),
        ((1, 512), "a neighbouring point is not in the grid"),
    ],
)
def test_outside_the_grid(arguments: tuple[float, ...], message: str) -> None:
    with pytest.raises(MachineError, match=message):
        look("read_pj", *arguments)


def test_unknown_grids() -> None:
    with pytest.raises(MachineError, match="unknown SRAM table 'dram'"):
        load_sram("dram")
