"""Two compressors to set beside a language model on the same bytes: xz, and a context mixture.

Both may learn from a training text first, as the model did.  The context mixture is the strong
one: bit by bit, the predictions of all contexts of 0 to 6 bytes are mixed in the logistic domain
(the scheme of PAQ: M. Mahoney, "Adaptive weighing of context models for lossless data
compression", 2005).  It predicts every bit before it learns it, so a decoder could follow it.
"""

from __future__ import annotations

import lzma
from collections.abc import Callable
from dataclasses import dataclass
from typing import no_type_check

import numpy as np
from jaxtyping import Float
from numba import njit

_SLOTS = 16  # one bucket: a check word and the 15 nodes of a nibble's tree (one cache line)
# Chosen on the training half: learn the first megabyte, score another part of it.
_COUNT_LIMIT = 31
_SMALLEST = 2.0**-18  # no probability is nearer to 0 or 1
_RATE = 0.0015  # of the mixer
_SLOWEST = 1.0 / 400.0  # of the maps
_STRETCH = np.log((np.arange(4096) + 0.5) / (4095.5 - np.arange(4096)))
_SLICE = 1 << 17  # bytes between two reports of progress


def xz_bits_per_byte(held_out: bytes, train: bytes = b"") -> float:
    """Bits per byte of `held_out` under `xz -9`, the growth it causes behind `train`.

    With an empty `train` the size of the xz file of `held_out` alone.
    """
    if not held_out:
        raise ValueError("held_out must not be empty")
    size = len(lzma.compress(train + held_out, preset=9))
    if train:
        size -= len(lzma.compress(train, preset=9))
    return 8.0 * size / len(held_out)


def context_mixture_bits_per_byte(
    held_out: bytes,
    train: bytes = b"",
    *,
    order: int = 6,
    table_bits: int = 22,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Bits per byte of `held_out` under a mixture of the contexts of 0 … `order` bytes.

    The mixture learns `train`, then goes on learning through `held_out`.  It uses 2^`table_bits`
    buckets of 64 bytes.
    """
    ones = bit_probabilities(
        train + held_out, len(train), order=order, table_bits=table_bits, progress=progress
    )
    bits = np.unpackbits(np.frombuffer(held_out, dtype=np.uint8))
    assigned = np.where(bits == 1, ones, 1.0 - ones)
    return float(-np.log2(assigned).sum() / len(held_out))


def bit_probabilities(
    text: bytes,
    first: int = 0,
    *,
    order: int = 6,
    table_bits: int = 22,
    progress: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, " bits"]:
    """P(bit is 1) for every bit of text[first:], high bit of a byte first, each given all before.

    Every value lies strictly between 0 and 1.  Raises ValueError when nothing is left to predict.
    """
    if not 0 <= first < len(text):
        raise ValueError(f"first must be in [0, {len(text)}), the text's bytes, got {first}")
    if not 0 <= order <= 8:
        raise ValueError(f"order must be in [0, 8], got {order}")
    if not 8 <= table_bits <= 28:
        raise ValueError(f"table_bits must be in [8, 28], got {table_bits}")
    data = np.frombuffer(text, dtype=np.uint8)
    state = _State.fresh(order, table_bits)
    ones = np.empty(8 * (len(text) - first), dtype=np.float64)
    for start in range(0, len(data), _SLICE):
        stop = min(start + _SLICE, len(data))
        _advance(
            *(data, start, stop, first, ones),
            *(state.table, state.maps, state.hits, state.by_bits, state.by_depth),
        )
        if progress is not None:
            progress(stop, len(data))
    return ones


@dataclass(frozen=True, slots=True)
class _State:
    """What the mixture has learned.

    table: (buckets, 16) uint32.  Word 0 of a bucket tells whose it is, the others are nodes:
        22 bits of P(1), then two 5-bit counts of zeros and ones.
    maps, hits: (orders, 32, 32) P(1) seen after each pair of counts, and how often it was seen.
    by_bits, by_depth: weights of the mixer: the sum of a row for the bits of the byte so far,
        (256, inputs), and a row for the number of contexts met before, (orders + 1, inputs).
    """

    table: np.ndarray
    maps: np.ndarray
    hits: np.ndarray
    by_bits: np.ndarray
    by_depth: np.ndarray

    @classmethod
    def fresh(cls, order: int, table_bits: int) -> _State:
        contexts, counts = order + 1, np.arange(_COUNT_LIMIT + 1, dtype=np.float64)
        share = (counts[None, :] + 0.4) / (counts[:, None] + counts[None, :] + 0.8)
        return cls(
            table=np.zeros((1 << table_bits, _SLOTS), dtype=np.uint32),
            maps=np.repeat(share[None], contexts, axis=0),
            hits=np.zeros((contexts, *share.shape)),
            by_bits=np.full((256, 2 * contexts + 1), 0.225 / contexts),
            by_depth=np.full((contexts + 1, 2 * contexts + 1), 0.225 / contexts),
        )


@njit(cache=True)
@no_type_check
def _advance(data, start, stop, first, ones, table, maps, hits, by_bits, by_depth):
    """Predict and learn data[start:stop]; P(1) of the bits from byte `first` on goes to `ones`."""
    contexts = maps.shape[0]
    inputs = 2 * contexts + 1
    hashes = np.zeros(contexts, dtype=np.uint64)
    buckets = np.zeros(contexts, dtype=np.int64)
    x = np.zeros(inputs)
    x[inputs - 1] = 0.3
    for position in range(start, stop):
        byte = data[position]
        running = np.uint64(0x9E3779B97F4A7C15)
        for context in range(contexts):
            if context > 0:
                before = data[position - context] + 1 if position >= context else 0
                running = _mix(running, np.uint64(before))
            hashes[context] = _mix(running, np.uint64(context))
        partial = 1  # the bits of this byte so far, behind a leading 1
        for nibble in range(2):
            for context in range(contexts):
                key = hashes[context] if nibble == 0 else _mix(hashes[context], np.uint64(partial))
                buckets[context] = _bucket(table, key)
            node = 1
            for shift in range(7 - 4 * nibble, 3 - 4 * nibble, -1):
                bit = (byte >> shift) & 1
                known = 0
                for context in range(contexts):
                    entry = table[buckets[context], node]
                    zeros, seen = (entry >> 5) & 31, entry & 31
                    if zeros + seen == 0:
                        x[2 * context] = 0.0
                    else:
                        x[2 * context] = _STRETCH[entry >> 20]
                    x[2 * context + 1] = _STRETCH[
                        min(np.int64(maps[context, zeros, seen] * 4096.0), 4095)
                    ]
                    known += zeros + seen > 0
                row, other = by_bits[partial], by_depth[known]
                total = 0.0
                for i in range(inputs):
                    total += x[i] * (row[i] + other[i])
                one = 1.0 / (1.0 + np.exp(-total))
                one = min(max(one, _SMALLEST), 1.0 - _SMALLEST)
                if position >= first:
                    ones[8 * (position - first) + 7 - shift] = one

                step = _RATE * (bit - one)
                for i in range(inputs):
                    row[i] += step * x[i]
                    other[i] += step * x[i]
                for context in range(contexts):
                    entry = table[buckets[context], node]
                    zeros, seen = (entry >> 5) & 31, entry & 31
                    hits[context, zeros, seen] += 1.0
                    rate = max(1.0 / (hits[context, zeros, seen] + 1.5), _SLOWEST)
                    maps[context, zeros, seen] += rate * (bit - maps[context, zeros, seen])
                    table[buckets[context], node] = _learned(entry, bit)
                partial = 2 * partial + bit
                node = 2 * node + bit


@njit(cache=True)
@no_type_check
def _learned(entry, bit):
    """A node after one more bit: fast while young, and again after a surprise."""
    p = entry >> 10
    zeros, seen = (entry >> 5) & 31, entry & 31
    share = 1.0 / (zeros + seen + 1.5)
    if zeros + seen == 0:
        p = np.uint32(2097152)
    moved = np.float64(p) + share * (bit * 4194303.0 - np.float64(p))
    if bit:
        seen = min(seen + 1, _COUNT_LIMIT)
        if zeros > 2:
            zeros = (zeros + 6) // 4
    else:
        zeros = min(zeros + 1, _COUNT_LIMIT)
        if seen > 2:
            seen = (seen + 6) // 4
    return np.uint32((np.uint32(moved) << 10) | (np.uint32(zeros) << 5) | np.uint32(seen))


@njit(cache=True)
@no_type_check
def _bucket(table, key):
    """The bucket of a context: its own, or the less used of two neighbours, emptied."""
    check = np.uint32(key >> np.uint64(32)) | np.uint32(1)
    home = np.int64(key & np.uint64(table.shape[0] - 1))
    other = home ^ 1
    if table[home, 0] == check:
        return home
    if table[other, 0] == check:
        return other
    root, rival = table[home, 1], table[other, 1]
    used, rival_used = (root & 31) + ((root >> 5) & 31), (rival & 31) + ((rival >> 5) & 31)
    taken = other if rival_used < used else home
    table[taken, :] = 0
    table[taken, 0] = check
    return taken


@njit(cache=True)
@no_type_check
def _mix(state, value):
    """A 64-bit hash step (the finaliser of SplitMix64)."""
    z = state + (value + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
