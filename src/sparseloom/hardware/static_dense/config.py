"""The machine file of a dense accelerator extended for static regions (design ours)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sparseloom.hardware.config import Section
from sparseloom.hardware.machine import MachineConfig
from sparseloom.regions import TILE_KEYS, TILE_QUERIES

Array = Literal["vector", "systolic"]


class Vector(Section):
    """Output-stationary PE with local weight stationary: lanes of dot products.

    A weight register of every lane holds for the queries of a tile, whose sums lie in latches: the
    tile grid of 16 queries by 32 keys is that of the PE.
    """

    lanes: Literal[32]
    vector_width: int = Field(ge=1)
    latches: Literal[16]
    latch_bits: int = Field(ge=16, le=64)
    weight_bytes_per_cycle: int = Field(ge=1)


class Systolic(Section):
    """Weight-stationary array of `size` × `size` multiply-accumulates (as Gemmini's)."""

    size: Literal[8, 16, 32]
    accumulator_kib: float = Field(gt=0)


class Buffers(Section):
    """On-chip memories of one PE, and the global buffer that feeds all of them.

    byte: the event of the energy table that one byte of the global buffer costs.
    """

    weight_kib: float = Field(gt=0)
    input_kib: float = Field(gt=0)
    probability_kib: float = Field(gt=0)
    global_kib: float = Field(gt=0)
    global_bytes_per_cycle: int = Field(ge=1)
    byte: Literal["buffer_byte", "buffer_byte_half"]


class Softmax(Section):
    """Softermax-style unit in base 2: rates per cycle, latency of its pipelines, power sum."""

    scores_per_cycle: int = Field(ge=1)
    normalised_per_cycle: int = Field(ge=1)
    latency_cycles: int = Field(ge=0)
    power_sum_integer_bits: int = Field(ge=1, le=32)


class Sequencer(Section):
    """The region sequencer: what replaces the dense loop's counter of key tiles."""

    present: bool
    max_descriptors: int = Field(ge=1)
    heads_held: int = Field(ge=1)
    run_fifo: int = Field(ge=1)
    bubble_cycles: int = Field(ge=0)


class Scope(Section):
    """Which operators are charged, and whether their operands come from DRAM.

    core: QKᵀ, softmax and PV. mha: also the projections of attention. model: every product.
    """

    work: Literal["core", "mha", "model"]
    dram: bool
    dram_pj_per_byte: float = Field(ge=0)
    dram_gbytes_per_second: float = Field(gt=0)


class StaticDenseConfig(MachineConfig):
    """A machine file of kind `static_dense`."""

    kind: Literal["static_dense"]  # pyright: ignore[reportIncompatibleVariableOverride]
    pes: int = Field(ge=1, le=64)
    array: Array
    sparse_utilisation: float = Field(gt=0, le=1)
    vector: Vector
    systolic: Systolic
    buffers: Buffers
    softmax: Softmax
    sequencer: Sequencer
    scope: Scope

    @model_validator(mode="after")
    def _one_systolic_array(self) -> StaticDenseConfig:
        if self.array == "systolic" and self.pes > 1:
            raise ValueError(f"pes must be 1 with a systolic array, got {self.pes}")
        return self

    @property
    def macs_per_cycle(self) -> int:
        """Multiply-accumulates of one PE in a cycle."""
        if self.array == "systolic":
            return self.systolic.size**2
        return self.vector.lanes * self.vector.vector_width

    def chunk_tiles(self, head_dim: int, value_dim: int) -> int:
        """Key tiles that are worked on at a time: what the weight and probability buffers hold.

        The weight buffer holds K and V of the chunk, the probability buffer two tiles of queries.
        Longer inputs are cut into chunks of keys, whose outputs are merged like regions are.
        """
        keys_of_weights = self.buffers.weight_kib * 1024 // (head_dim + value_dim)
        keys_of_rows = self.buffers.probability_kib * 1024 // (2 * TILE_QUERIES)
        return max(1, int(min(keys_of_weights, keys_of_rows)) // TILE_KEYS)
