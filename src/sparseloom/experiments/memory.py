"""The DRAM model beside Ramulator 2.1: sequential streams by mapping, kept keys of pruned heads.

    python -m sparseloom.experiments.memory

Ramulator's figures were measured once (HBM2, 2 Gb/s per pin, its timing table, read-only traces of
32-byte requests, one player of traces) and stand here as constants. What is printed of its traces
of keys is "a sorted random subset of L = 1024 keys of d = 64, 16 channels, MOP4CLXOR", bandwidth
and energy, 909 pJ for an ACT and 2.54 pJ for a bit. The rest of the workload is our assumption,
the same for all 15 points:

- Four heads, one behind the other in memory, every bank closed at the start. It follows from the
  energies: they give 0.130 and 0.84 ACTs for each 32-byte request at keep 1.0 and 0.05, which four
  adjacent heads have (512 rows; 0.125 and 0.85) and three or six have not.
- The clocks end with the last read command. With the data's way back (16 clocks) 5 % of 4-bit
  keys could not reach more than 100 bytes per clock; without the queues' contents dense heads
  would exceed the peak.
- The player offers twice what the buses carry, in order; the first request without room in its
  channel holds up those behind it.
- Mean of 20 draws.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from sparseloom.experiments.study_command import NoSettings, run_command
from sparseloom.hardware.units.dram_config import MemoryConfig, load_memory
from sparseloom.hardware.units.dram_stream import stream, streaming_bandwidth

SEQUENTIAL = {"RoBaRaCoCh": 129, "MOP4CLXOR": 223, "ChRaBaRoCo": 47}
"""Mapping → bytes per clock of a sequential stream, 8 channels (256 at most)."""

KEEPS = (1.0, 0.5, 0.28, 0.10, 0.05)

KEPT = {
    32: (453, 368, 339, 207, 171),
    64: (450, 394, 361, 283, 213),
    96: (466, 432, 412, 337, 252),
}
"""Bytes of a key → bytes per clock at each of KEEPS, 16 channels (512 at most)."""

ENERGY = {32: (3.00, 5.53), 64: (2.80, 5.03), 96: (2.71, 4.66)}
"""Bytes of a key → pJ per bit at keep 1.0 and 0.05."""

HEADS, LENGTH, DRAWS = 4, 1024, 20
ACT_PJ, BIT_PJ = 909.0, 2.54
_ATOM = 32


def kept_keys(key_bytes: int, keep: float, seed: int) -> np.ndarray:
    """Addresses of the kept keys of all heads: sorted, at random, the same number in each head."""
    rng = np.random.default_rng(seed)
    n = max(1, round(keep * LENGTH))
    parts = np.arange(0, key_bytes, _ATOM)
    heads = [
        head * LENGTH * key_bytes
        + np.sort(rng.permutation(LENGTH)[:n])[:, None] * key_bytes
        + parts
        for head in range(HEADS)
    ]
    return np.concatenate([head.ravel() for head in heads])


def commands_bandwidth(config: MemoryConfig, addresses: np.ndarray) -> tuple[float, int]:
    """Bytes per clock up to the last read command, and ACTs."""
    found = stream(config, addresses)
    t = config.timing_clocks
    way_back = t.read_latency + t.burst + config.controller.response_clocks
    return found.reads * config.atom_bytes / (found.cycles - way_back), found.activates


def sequential_row(mapping: str) -> dict[str, Any]:
    """Bandwidth of a sequential stream through eight channels."""
    config = load_memory("hbm2_2000", channels=8, mapping=mapping)
    ours, published = streaming_bandwidth(config, megabytes=6.0), SEQUENTIAL[mapping]
    return {
        "record": "memory_sequential",
        "mapping": mapping,
        "ours_bytes_per_clock": round(ours, 2),
        "ramulator_bytes_per_clock": published,
        "difference": round(ours / published - 1, 4),
    }


def kept_row(key_bytes: int, keep: float) -> dict[str, Any]:
    """Bandwidth and energy of fetching the kept keys of HEADS heads through sixteen channels."""
    config = load_memory("hbm2_2000")
    rates: list[float] = []
    activates: list[float] = []
    requests = 0
    for seed in range(DRAWS):
        addresses = kept_keys(key_bytes, keep, seed)
        rate, acts = commands_bandwidth(config, addresses)
        requests = len(addresses)
        rates.append(1 / rate)
        activates.append(acts)
    ours = float(1 / np.mean(rates))
    energy = float(ACT_PJ * np.mean(activates) / (requests * _ATOM * 8) + BIT_PJ)
    published = KEPT[key_bytes][KEEPS.index(keep)]
    row: dict[str, Any] = {
        "record": "memory_kept_keys",
        "key_bytes": key_bytes,
        "keep": keep,
        "ours_bytes_per_clock": round(ours, 2),
        "ramulator_bytes_per_clock": published,
        "difference": round(ours / published - 1, 4),
        "activates": round(float(np.mean(activates)), 2),
        "ours_pj_per_bit": round(energy, 3),
    }
    if keep in (KEEPS[0], KEEPS[-1]):
        printed = ENERGY[key_bytes][0 if keep == KEEPS[0] else 1]
        row["ramulator_pj_per_bit"] = printed
        row["energy_difference"] = round(energy / printed - 1, 4)
    return row


def rows() -> list[dict[str, Any]]:
    """All comparisons, and their mean difference regardless of sign."""
    sequential = [sequential_row(mapping) for mapping in SEQUENTIAL]
    kept = [kept_row(key_bytes, keep) for key_bytes in KEPT for keep in KEEPS]
    differences = [abs(row["difference"]) for row in kept]
    summary = {
        "record": "memory_oracle_summary",
        "points": len(kept),
        "mean_difference": round(float(np.mean(differences)), 4),
        "largest_difference": max(differences),
        "within_10_percent": sum(one <= 0.10 for one in differences),
    }
    return [*sequential, *kept, summary]


def run_study() -> list[dict[str, Any]]:
    """All rows, said one by one."""
    found = rows()
    for row in found:
        sys.stdout.write(", ".join(f"{key} {value}" for key, value in row.items()) + "\n")
    return found


def main() -> None:
    """Command line of the comparison."""
    run_command(
        "memory", __doc__, NoSettings(), lambda *_: run_study(),
        stored=lambda _: Path("results/memory_oracle.json"), keeps=False, reads=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
