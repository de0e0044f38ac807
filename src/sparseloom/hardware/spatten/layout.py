"""Where keys, low bits and values lie in DRAM: a region per layer, sequence, KV head and plane."""

from __future__ import annotations

from dataclasses import dataclass

from sparseloom.hardware.spatten.config import SpAttenConfig
from sparseloom.trace import AttentionCall, Operator

ATOM = 32  # bytes of one DRAM transaction
FULL_BITS = 32  # operands that were not quantised


@dataclass(frozen=True)
class Vectors:
    """Base address, bytes between tokens and atoms read per token, of keys, low bits and values;
    `heads` lie in one key vector."""

    key_base: int
    key_stride: int
    key_atoms: int
    low_base: int
    low_stride: int
    low_atoms: int
    head_region: int
    value_base: int
    value_stride: int
    value_atoms: int
    heads: int


class Regions:
    """Addresses of every vector. A token keeps its place as the context grows.

    High and low bits of keys lie in separate contiguous planes (HPCA 2021, section III-D). Keys
    that are always read whole (no progressive quantisation) lie in one plane, low bits included.
    """

    def __init__(
        self, config: SpAttenConfig, kv_heads: int, operators: tuple[Operator, ...]
    ) -> None:
        self._align = config.layout.region_align_bytes
        self._pack = config.layout.pack_6bit_keys
        self._tokens = max((op.kv_len for op in operators), default=1)
        self._batch = max((op.batch for op in operators), default=1)
        self._kv_heads = max(kv_heads, max((op.kv_heads for op in operators), default=1))
        width = max((op.head_dim for op in operators), default=1)
        whole = width * FULL_BITS // 8 * self._tokens
        self._region = -(-whole // self._align) * self._align

    def vectors(
        self,
        operator: Operator,
        call: AttentionCall,
        sequence: int,
        kv_head: int,
        *,
        pair: bool = False,
    ) -> Vectors:
        """The vectors of one KV head at one call; `pair`: of this one and the next together."""
        width = operator.head_dim
        bits = FULL_BITS if call.key_bits is None else call.key_bits
        # Progressive quantisation is for generation; a prompt's keys are read whole.
        progressive = call.lsb_refetch is not None and operator.q_len == 1
        low_bits = call.lsb_bits or 0
        if not progressive and (call.lsb_refetch is None or call.lsb_refetch.any()):
            bits, low_bits = bits + low_bits, 0
        packed = bits == 6 and self._pack == 2 and operator.heads == operator.kv_heads
        value_bits = FULL_BITS if call.value_bits is None else call.value_bits
        place = ((operator.layer or 0) * self._batch + sequence) * self._kv_heads
        key_place = place + (kv_head - kv_head % 2 if packed else kv_head)
        # Three planes per head, each with room for the widest vectors.
        base = 3 * self._region * key_place
        key_stride = -(-width * bits // 8) * (2 if packed else 1)
        low_stride = -(-width * low_bits // 8)
        value_stride = -(-width * value_bits // 8)
        one = key_stride // 2 if packed and not pair else key_stride
        return Vectors(
            key_base=base + (one if packed and kv_head % 2 else 0),
            key_stride=key_stride,
            key_atoms=_atoms(one),
            low_base=3 * self._region * (place + kv_head) + self._region,
            low_stride=low_stride,
            low_atoms=_atoms(low_stride),
            head_region=3 * self._region if pair else 0,
            value_base=3 * self._region * (place + kv_head) + 2 * self._region,
            value_stride=value_stride,
            value_atoms=_atoms(value_stride),
            heads=2 if pair else 1,
        )


def _atoms(stride: int) -> int:
    """Atoms that a vector may touch; one that is no multiple of an atom straddles two."""
    return 0 if stride == 0 else -(-stride // ATOM)
