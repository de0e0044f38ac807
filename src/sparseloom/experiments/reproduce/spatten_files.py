"""The traces that SpAtten's authors published, where they are at hand, and their statistics."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import compress

from sparseloom.tasks.data import find_data
from sparseloom.trace import Selection, Trace, Workload
from sparseloom.trace.summary import call_counts
from sparseloom.trace.traffic import Traffic, selection_traffic

SMALL = "summary-gpt2-small-wikitext2-per8.csv"
SMALL_DENSE = "summary-gpt2-small-wikitext2-per8-step1+dedic.csv"


@dataclass(frozen=True)
class Statistics:
    """Counts of a selection over all its calls, all heads and sequences together.

    Attributes:
        keys, values: key and value vectors that rows read.
        low: key vectors whose low bits were fetched.
        rows, low_rows: rows of heads that are alive, and those that fetched low bits.
        length: keys that the rows of all heads could read.
        present: the same of heads that are alive.
        key_bits, low_bits, value_bits: widths; None = 32.
        head_dim: of keys and values.
        moved, dense: bytes, and those of dense fp32.
    """

    keys: int
    values: int
    low: int
    rows: int
    low_rows: int
    length: int
    present: int
    key_bits: int
    low_bits: int
    value_bits: int
    head_dim: int
    moved: Traffic
    dense: Traffic

    @property
    def average_key_bits(self) -> float:
        """Bits fetched per key that is read."""
        return self.key_bits + self.low_bits * self.low / self.keys

    @property
    def average_bits(self) -> float:
        """The same over keys and values."""
        codes = self.keys * self.average_key_bits + self.values * self.value_bits
        return codes / (self.keys + self.values)

    @property
    def operations(self) -> int:
        """Two per multiply-accumulate; what is computed again does not count."""
        return 2 * self.head_dim * (self.keys + self.values)

    @property
    def computation(self) -> float:
        """Dense operations over those that are left."""
        return 4 * self.head_dim * self.length / self.operations

    def dram(self, *, low: bool = True, present: bool = False) -> float:
        """Bytes of dense fp32 over those that are used.

        Args:
            low: count the low bits, too.
            present: hold them against the heads that are alive, not against all.
        """
        used = self.moved.useful - (0 if low else self.moved.useful_lsb)
        return self.dense.useful * (self.present / self.length if present else 1) / used


def statistics(workload: Workload, selection: Selection) -> Statistics:
    """The counts of the calls that generate."""
    generated = [operator.stage == "decode" for operator in workload.attention()]
    operators = tuple(compress(workload.attention(), generated))
    calls = tuple(compress(selection.calls, generated))
    steps, chosen = replace(workload, operators=operators), replace(selection, calls=calls)
    counts, moved = call_counts(steps, chosen), selection_traffic(steps, chosen)
    head_dim, low_bits = operators[-1].head_dim, calls[-1].lsb_bits or 0
    pairs = list(zip(counts, operators, strict=True))
    return Statistics(
        keys=sum(one.keys for one in counts),
        values=sum(one.values for one in counts),
        low=round(moved.useful_lsb * 8 / (low_bits * head_dim)) if low_bits else 0,
        rows=sum(one.rows for one in counts),
        low_rows=sum(one.low_rows for one in counts),
        length=sum(one.heads * operator.kv_len for one, operator in pairs),
        present=sum(one.heads_alive * operator.kv_len for one, operator in pairs),
        key_bits=calls[-1].key_bits or 32,
        low_bits=low_bits,
        value_bits=calls[-1].value_bits or 32,
        head_dim=head_dim,
        moved=moved,
        dense=selection_traffic(steps, Trace(steps).selection("dense")),
    )


@cache
def published(name: str) -> Statistics | None:
    """The statistics of one of the authors' files; None where it is not at hand."""
    try:
        folder = find_data("spatten_traces", files=(name,))
    except FileNotFoundError:
        return None
    file = folder / name
    trace = Trace.from_spatten_csv(file if file.is_file() else folder / f"{name}.gz")
    return statistics(trace.workload, trace.selection())
