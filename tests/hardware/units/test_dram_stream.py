"""Streams through a memory: bandwidth by mapping against Ramulator 2.1."""

from __future__ import annotations

import numpy as np
import pytest

from sparseloom.hardware.units.dram_config import load_memory
from sparseloom.hardware.units.dram_stream import stream

# Ramulator 2.1, HBM2 2 Gb/s, 8 channels (256 bytes per clock), 32-byte requests in sequence.
SEQUENTIAL = {"RoBaRaCoCh": 129, "MOP4CLXOR": 223, "ChRaBaRoCo": 47}


@pytest.mark.parametrize(("mapping", "published"), SEQUENTIAL.items())
def test_sequential_bandwidth_is_that_of_ramulator(mapping: str, published: float) -> None:
    config = load_memory("hbm2_2000", channels=8, mapping=mapping)
    found = stream(config, np.arange(200_000) * 32)
    assert found.bytes_per_clock(32) == pytest.approx(published, rel=0.10)
