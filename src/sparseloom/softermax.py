"""Softermax in integers: a base-2 softmax that is merged run by run, bit for bit.

After Stevens, Venkatesan, Dai, Khailany and Raghunathan, "Softermax: Hardware/Software Co-Design
of an Efficient Softmax for Transformers" (DAC 2021), which gives: base 2 instead of e, an integer
running maximum, so that rescaling is a shift, 2^x by 4 linear pieces, and the formats: input
Q(6,2), unnormalised powers Q(1,15), their sum Q(10,6), reciprocal and output Q(1,7).

Choices of ours, since the paper leaves them open: pieces are chords, exact where they meet; sums
and results round halves up, shifts of running values round down; powers wait for the end of their
row in Q(1,7) together with the maximum that they were made with; the reciprocal is a mantissa in
Q(1,7) and an exponent.

Q(10,6) ends just below 1024: a row of 1,024 keys that all share the largest score overflows it.
That raises, unless `saturate` asks for what the register does; `sum_integer` widens it. Q(1,7) ends
at 1/128: probabilities below half of that are 0, and `output_fraction` widens it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

PIECES = 4
"""Linear pieces of 2^x and of 1/x between powers of two."""
_FAR = 63
"""Shifts by more than the width of a word give what this one gives."""


@dataclass(frozen=True)
class SoftermaxFormat:
    """Widths of the integers; the defaults are those of Softermax (DAC 2021).

    input_bits, input_fraction: of scores, signed: codes of 2^−2 in 8 bits.
    power_fraction: of 2^(score − maximum), which is in (0, 1].
    stored_fraction: of the powers while they wait for their row.
    sum_integer, sum_fraction: of the sum of powers.
    reciprocal_fraction: of the reciprocal's mantissa.
    output_fraction: of probabilities.
    saturate: let sums stop at their largest value instead of raising.

    Raises:
        ValueError: a width that the arithmetic does not hold.
    """

    input_bits: int = 8
    input_fraction: int = 2
    power_fraction: int = 15
    stored_fraction: int = 7
    sum_integer: int = 10
    sum_fraction: int = 6
    reciprocal_fraction: int = 7
    output_fraction: int = 7
    saturate: bool = False

    def __post_init__(self) -> None:
        fraction, power = self.input_fraction, self.power_fraction
        ranges = {
            "input_fraction": (2, 8),
            "input_bits": (fraction + 2, fraction + 7),
            "power_fraction": (4, 24),
            "stored_fraction": (2, power),
            "sum_integer": (1, 24 - self.sum_fraction),
            "sum_fraction": (2, power),
            "reciprocal_fraction": (2, 15),
            "output_fraction": (2, self.stored_fraction + self.reciprocal_fraction - 1),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name} must be in [{low}, {high}] beside the other widths, "
                    f"got {getattr(self, name)}"
                )

    @property
    def largest_sum(self) -> int:
        """Largest code of a sum: just below 2^sum_integer."""
        return (1 << self.sum_integer + self.sum_fraction) - 1

    @property
    def lowest_maximum(self) -> int:
        """Where the running maximum begins: the lowest of its 8 bits."""
        return -128


class RowState(NamedTuple):
    """Running maximum (an integer) and sum of powers (codes of `sum_fraction`) of each row."""

    maximum: Int64[np.ndarray, " rows"]
    total: Int64[np.ndarray, " rows"]


class RunPowers(NamedTuple):
    """What is kept of a run: codes of powers (`stored_fraction`), and the maximum they refer to."""

    powers: Int64[np.ndarray, "rows keys"]
    maximum: Int64[np.ndarray, " rows"]


def score_codes(
    form: SoftermaxFormat, scores: np.ndarray[Any, np.dtype[np.float64]]
) -> Int64[np.ndarray, "..."]:
    """Codes of scores that are in units of log 2: rounded, halves to even, and saturated."""
    high = (1 << form.input_bits - 1) - 1
    return np.clip(np.rint(scores * (1 << form.input_fraction)), -high - 1, high).astype(np.int64)


def empty_rows(form: SoftermaxFormat, rows: int) -> RowState:
    """The state before the first run."""
    return RowState(np.full(rows, form.lowest_maximum), np.zeros(rows, np.int64))


def add_run(
    form: SoftermaxFormat,
    state: RowState,
    scores: Int64[np.ndarray, "rows keys"],
    allowed: Bool[np.ndarray, "rows keys"],
) -> tuple[RowState, RunPowers]:
    """Merge one run: raise the maximum, shift the sum to it, add the run's powers.

    Args:
        form: widths.
        state: of the rows so far.
        scores: codes from `score_codes`.
        allowed: pairs that take part.

    Raises:
        ValueError: a sum leaves its format, and the format does not saturate.
    """
    fraction = form.input_fraction
    ceilings = -((-scores) >> fraction)
    maximum = np.where(allowed, ceilings, form.lowest_maximum).max(1, initial=form.lowest_maximum)
    maximum = np.maximum(maximum, state.maximum)
    below = np.where(allowed, scores - (maximum[:, None] << fraction), 0)
    powers = np.where(allowed, power_codes(form, below), 0)
    kept = state.total >> np.minimum(maximum - state.maximum, _FAR)
    total = kept + _rounded(powers.sum(1), form.power_fraction - form.sum_fraction)
    if (total > form.largest_sum).any() and not form.saturate:
        row = int((total > form.largest_sum).argmax())
        raise ValueError(
            f"sum_integer must hold the sum of a row's powers, which is "
            f"{total[row] / (1 << form.sum_fraction):.2f} in row {row} and at most "
            f"{form.largest_sum / (1 << form.sum_fraction):.2f} in {form.sum_integer} bits"
        )
    total = np.minimum(total, form.largest_sum)
    stored = _rounded(powers, form.power_fraction - form.stored_fraction)
    return RowState(maximum, total), RunPowers(stored, maximum)


def normalize(
    form: SoftermaxFormat, state: RowState, run: RunPowers
) -> Int64[np.ndarray, "rows keys"]:
    """Probabilities of a run as codes of `output_fraction`, when its rows are complete.

    Powers are shifted to the row's last maximum, then multiplied by the reciprocal of the sum. Rows
    without any key give 0.
    """
    mantissa, exponent = reciprocal_codes(form, np.maximum(state.total, 1))
    late = np.minimum(state.maximum - run.maximum, _FAR)
    products = (run.powers >> late[:, None]) * mantissa[:, None]
    shift = form.stored_fraction + form.reciprocal_fraction - form.output_fraction + exponent
    shift = np.maximum(shift, 0)[:, None]  # only rows without keys, whose sum is no sum, are below
    return np.where(state.total[:, None] > 0, _rounded(products, shift), 0)


def power_codes(form: SoftermaxFormat, below: Int64[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
    """2^x of codes x <= 0 of `input_fraction`, as codes of `power_fraction`.

    The fraction picks one of 4 chords, the integer is a shift, which rounds down.
    """
    fraction = form.input_fraction
    ends = np.rint(2.0 ** (np.arange(PIECES + 1) / PIECES) * (1 << form.power_fraction))
    ends = ends.astype(np.int64)
    rest_bits = fraction - 2
    part = below & (1 << fraction) - 1
    piece, rest = part >> rest_bits, part & (1 << rest_bits) - 1
    mantissa = ends[piece] + ((ends[piece + 1] - ends[piece]) * rest >> rest_bits)
    return mantissa >> np.minimum(-(below >> fraction), _FAR)


def reciprocal_codes(
    form: SoftermaxFormat, sums: Int64[np.ndarray, " rows"]
) -> tuple[Int64[np.ndarray, " rows"], Int64[np.ndarray, " rows"]]:
    """1 / sum as mantissa · 2^−exponent, the mantissa in [1/2, 1] in codes of its format.

    `sums` are codes of `sum_fraction`, at least 1. Where the bits after the leading one begin, the
    first two pick one of 4 chords of 1 / (1 + f).
    """
    ends = np.rint(PIECES / np.arange(PIECES, 2 * PIECES + 1) * (1 << 15)).astype(np.int64)
    leading = np.frexp(sums.astype(np.float64))[1].astype(np.int64) - 1
    wide = 24  # bits that all fractions are aligned to
    part = (sums << wide - leading) - (1 << wide)
    piece, rest = part >> wide - 2, part & (1 << wide - 2) - 1
    chord = ends[piece] - ((ends[piece] - ends[piece + 1]) * rest >> wide - 2)
    return _rounded(chord, 15 - form.reciprocal_fraction), leading - form.sum_fraction


def _rounded(
    codes: Int64[np.ndarray, "..."], shift: int | Int64[np.ndarray, "..."]
) -> Int64[np.ndarray, "..."]:
    """codes / 2^shift, halves up."""
    return (codes + ((1 << np.asarray(shift, np.int64)) >> 1)) >> shift
