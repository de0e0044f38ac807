"""Bytes of keys and values that an attention call needs, and those that a memory must deliver.

A vector of `head_dim` codes of 6 bits is 48 bytes, and memory hands out atoms of 32: fetched alone
it costs 64. SpAtten packs the vectors of two heads side by side, 96 bytes or three atoms, which
saves the waste where both heads want the same tokens: keys under cascade pruning. After local value
pruning each head wants tokens of its own, and a packed vector costs as much as one alone (mit-han-
lab/spatten, TestSpAtten.scala, `fused_mat`).

What is counted follows §IV-A of the paper (HPCA 2021): a head's keys and values are fetched once
for all queries of a call. Query heads that share keys (grouped queries) fetch them each.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import numpy as np
from jaxtyping import Bool, Int64

from sparseloom.trace.masks import MaskArrays
from sparseloom.trace.schema import AttentionCall, Operator, Selection, Workload
from sparseloom.trace.trace import Trace

UNQUANTIZED_BITS = 32

Counts = Int64[np.ndarray, "batch heads"]


@dataclass(frozen=True)
class Layout:
    """How vectors lie in memory.

    Args:
        atom_bytes: the smallest access of the memory.
        packed_bits: widths at which the vectors of `packed_heads` consecutive heads lie side by
            side; others start at an atom of their own.
        packed_heads: how many heads are packed.
    """

    atom_bytes: int = 32
    packed_bits: tuple[int, ...] = (6,)
    packed_heads: int = 2

    def __post_init__(self) -> None:
        if self.atom_bytes < 1 or self.packed_heads < 1:
            raise ValueError(
                f"atom_bytes and packed_heads must be at least 1, got {self.atom_bytes} and "
                f"{self.packed_heads}"
            )

    def packs(self, bits: int) -> bool:
        """Whether vectors of this width share atoms with those of other heads."""
        return bits in self.packed_bits and self.packed_heads > 1

    def atoms(self, wanted: tuple[bool, ...], width: int, bits: int) -> int:
        """Atoms that hold the wanted vectors among those of heads that are packed together.

        Args:
            wanted: for each head of the pack, whether its vector is wanted.
            width: codes of a vector.
            bits: bits of a code.
        """
        if not self.packs(bits):
            return sum(wanted) * -(-width * bits // (8 * self.atom_bytes))
        atom = 8 * self.atom_bytes
        touched: set[int] = set()
        for head in np.flatnonzero(wanted).tolist():
            start = head * width * bits
            touched.update(range(start // atom, -(-(start + width * bits) // atom)))
        return len(touched)


SPATTEN_LAYOUT = Layout()
"""32-byte atoms, two heads of 6 bits side by side, as in the public RTL."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of one call or of many, all sequences and heads together.

    `useful_…` counts bits that are used; `fetched_…` whole atoms. `lsb` are the low bits of
    progressive quantisation, fetched for the queries that needed them.
    """

    useful_key: float = 0.0
    useful_lsb: float = 0.0
    useful_value: float = 0.0
    fetched_key: int = 0
    fetched_lsb: int = 0
    fetched_value: int = 0

    @property
    def useful(self) -> float:
        """All bytes that are used."""
        return self.useful_key + self.useful_lsb + self.useful_value

    @property
    def fetched(self) -> int:
        """All bytes that the memory delivers."""
        return self.fetched_key + self.fetched_lsb + self.fetched_value

    def __add__(self, other: Traffic) -> Traffic:
        names = [f.name for f in fields(self)]
        return Traffic(**{name: getattr(self, name) + getattr(other, name) for name in names})


def vectors(
    call: AttentionCall,
    operator: Operator,
    padding: Bool[np.ndarray, "_ kv_len"] | None = None,
) -> tuple[Counts, Counts, Counts]:
    """Key, low-bit and value vectors that a call fetches, per sequence and query head.

    A vector counts once however many queries of the call want it. Where only counts are known, the
    query that keeps most stands for all: under cascade pruning they keep the same tokens.
    """
    keys = _distinct(call, call.mask, call.key_counts, operator, padding)
    values = keys
    if call.value_mask is not None or call.value_counts is not None:
        values = _distinct(call, call.value_mask, call.value_counts, operator, padding)
    low = np.zeros_like(keys)
    if call.lsb_bits is not None and call.lsb_refetch is not None:
        if operator.q_len == 1:
            low = keys * call.lsb_refetch[:, :, 0]
        else:
            # Once the low bits of a head are on chip, later queries find them there.
            low = keys * call.lsb_refetch.any(axis=2)
    return keys, low, values


def call_traffic(
    call: AttentionCall,
    operator: Operator,
    padding: Bool[np.ndarray, "_ kv_len"] | None = None,
    *,
    layout: Layout = SPATTEN_LAYOUT,
) -> Traffic:
    """Bytes of keys, their low bits and values of one call; without bit widths 32 are taken."""
    keys, low, values = vectors(call, operator, padding)
    key_bits = call.key_bits or UNQUANTIZED_BITS
    value_bits = call.value_bits or UNQUANTIZED_BITS
    low_bits = call.lsb_bits or 0
    k_width, v_width = operator.head_dim, operator.value_dim
    # Heads want the same keys unless a mask tells them apart, the same values unless pruned apart.
    shared_k = call.mask is None or call.mask.heads == 1
    own_values = call.value_mask is not None or call.value_counts is not None
    fetched_low = 0
    if low_bits:
        fetched_low = int(low.sum()) * layout.atoms((True,), k_width, low_bits)
    return Traffic(
        useful_key=int(keys.sum()) * k_width * key_bits / 8,
        useful_lsb=int(low.sum()) * k_width * low_bits / 8,
        useful_value=int(values.sum()) * v_width * value_bits / 8,
        fetched_key=_atoms(keys, k_width, key_bits, layout, shared_k) * layout.atom_bytes,
        fetched_lsb=fetched_low * layout.atom_bytes,
        fetched_value=_atoms(values, v_width, value_bits, layout, shared_k and not own_values)
        * layout.atom_bytes,
    )


def trace_traffic(
    trace: Trace, selection: str | None = None, *, layout: Layout = SPATTEN_LAYOUT
) -> Traffic:
    """Bytes of all attention calls of a selection."""
    return selection_traffic(trace.workload, trace.selection(selection), layout=layout)


def selection_traffic(
    workload: Workload, selection: Selection, *, layout: Layout = SPATTEN_LAYOUT
) -> Traffic:
    """Bytes of all attention calls of a selection of this workload."""
    total = Traffic()
    for call, operator in zip(selection.calls, workload.attention(), strict=True):
        total += call_traffic(call, operator, workload.padding_of(operator), layout=layout)
    return total


def _distinct(
    call: AttentionCall,
    mask: MaskArrays | None,
    counts: Int64[np.ndarray, "batch heads q_len"] | None,
    operator: Operator,
    padding: Bool[np.ndarray, "_ kv_len"] | None,
) -> Counts:
    shape = (operator.batch, operator.heads)
    if counts is not None:
        found = counts.max(axis=2)
    elif mask is not None:
        found = mask.distinct_keys(operator.q_len, padding)
        found = np.broadcast_to(found, (operator.batch, found.shape[1]))
        found = found.repeat(operator.heads // found.shape[1], axis=1)
    else:
        valid = padding
        if call.tokens_alive is not None:
            valid = call.tokens_alive if padding is None else padding & call.tokens_alive
        # The last query sees every key that any query sees.
        alone = np.full((1, operator.kv_len), True) if valid is None else valid
        found = np.broadcast_to(alone.sum(axis=1)[:, None], shape)
    alive = 1 if call.heads_alive is None else call.heads_alive
    return np.ascontiguousarray(np.broadcast_to(found * alive, shape), np.int64)


def _atoms(counts: Counts, width: int, bits: int, layout: Layout, shared: bool) -> int:
    """Atoms of so many vectors per head; heads that share tokens keep nested sets of them."""
    if not layout.packs(bits):
        return int(counts.sum()) * layout.atoms((True,), width, bits)
    batch, heads = counts.shape
    size = layout.packed_heads
    padded = np.zeros((batch, -(-heads // size) * size), np.int64)
    padded[:, :heads] = counts
    total = 0
    for pack in padded.reshape(-1, size):
        if shared:
            # The tokens between two neighbouring counts are wanted by the heads with larger ones.
            steps = np.unique(np.append(pack, 0))
            for below, up_to in pairwise(steps.tolist()):
                wanted = tuple(bool(one) for one in pack >= up_to)
                total += (up_to - below) * layout.atoms(wanted, width, bits)
        else:
            for head, count in enumerate(pack.tolist()):
                wanted = tuple(other == head for other in range(size))
                total += count * layout.atoms(wanted, width, bits)
    return total
