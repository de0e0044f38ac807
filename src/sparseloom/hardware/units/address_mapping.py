"""Which bits of an address choose channel, pseudo-channel, bank group, bank, row and column.

A mapping is data: the fields from the lowest bit above the atom up, and what is XORed into a
field. Every such mapping is linear over bits, so that the simulators decode an address with a few
table look-ups, whatever the mapping.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, field_validator

from sparseloom.hardware.config import Section

FIELDS = ("channel", "pseudo_channel", "bank_group", "bank", "row", "column")
"""The fields of an address."""

TABLE_BITS = 11
"""Bits of an address that one look-up decodes."""


class Mapping(Section):
    """Fields from the lowest bit up; `column:2` is two bits of a field, `column` all that is left.

    xor: field → lowest of the column bits that are XORed into it (as many as the field has).
    """

    order: list[str]
    xor: dict[str, int] = Field(default_factory=dict)

    @field_validator("order")
    @classmethod
    def _known(cls, order: list[str]) -> list[str]:
        for item in order:
            field, colon, bits = item.partition(":")
            if field not in FIELDS or (colon and not (bits.isdigit() and int(bits) > 0)):
                raise ValueError(
                    f"{item!r} must be one of {', '.join(FIELDS)}, or a field and bits: column:2"
                )
        whole = sorted(item for item in order if ":" not in item)
        if whole != sorted(FIELDS):
            raise ValueError(f"every field must stand once without bits: {', '.join(FIELDS)}")
        return order

    @field_validator("xor")
    @classmethod
    def _targets(cls, xor: dict[str, int]) -> dict[str, int]:
        for field, low in xor.items():
            if field not in FIELDS[:4] or low < 0:
                raise ValueError(f"{field}: {low} must be one of {', '.join(FIELDS[:4])} and a bit")
        return xor


# The names are those of Ramulator; its channel comes first of all (CacheLineInterleave). SpAtten's
# channel, bits [8:5] of an address for 16 channels of 32-byte atoms, is the same choice.
MAPPINGS: dict[str, Mapping] = {
    "RoBaRaCoCh": Mapping(
        order=["channel", "column", "pseudo_channel", "bank_group", "bank", "row"]
    ),
    "ChRaBaRoCo": Mapping(
        order=["channel", "column", "row", "bank", "bank_group", "pseudo_channel"]
    ),
    "MOP4CLXOR": Mapping(
        order=["channel", "column:2", "pseudo_channel", "bank_group", "bank", "column", "row"],
        xor={"pseudo_channel": 0, "bank_group": 1, "bank": 3},
    ),
}
"""Mappings with a name."""


def decode(mapping: Mapping, bits: dict[str, int], atoms: np.ndarray) -> dict[str, np.ndarray]:
    """Fields of atom numbers (address / atom size); bits above the last field are dropped.

    Args:
        mapping: the order of the fields.
        bits: width of each field.
        atoms: (n) int64.
    """
    left = dict(bits)
    found = {field: np.zeros_like(atoms) for field in FIELDS}
    whole = {item: bits[item] for item in mapping.order if ":" not in item}
    for item in mapping.order:
        field, colon, some = item.partition(":")
        if colon:
            whole[field] -= int(some)
    shift = 0
    for item in mapping.order:
        field, colon, some = item.partition(":")
        width = int(some) if colon else whole[field]
        place = bits[field] - left[field]
        found[field] |= ((atoms >> shift) & ((1 << width) - 1)) << place
        left[field] -= width
        shift += width
    for field, low in mapping.xor.items():
        found[field] = found[field] ^ ((found["column"] >> low) & ((1 << bits[field]) - 1))
    return found
