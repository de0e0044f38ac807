"""What the report of compiled kernels lists of decoding: heads of 128, eight of them on two key
heads, for plain bf16 caches and for SpAtten's planes of 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sparseloom.kernels.decode_call import DecodeCall
from sparseloom.kernels.planes import PlaneCache
from sparseloom.kernels.triton.decode import decode
from sparseloom.kernels.triton.launches import launches_of

_BATCH, _HEADS, _KV_HEADS, _LENGTH, _DIM = 1, 8, 2, 1024, 128


def compiled_variants() -> Iterator[tuple[Any, ...]]:
    """The kernels of a step as it launches them (``compile_report.Variant``)."""
    for name, planes in (("bf16", False), ("8+4 int8", True)):
        for launch in launches_of(lambda planes=planes: decode(_call(planes))):
            kernel = launch.kernel.fn.__name__.lstrip("_")
            if planes or kernel in ("score", "weigh"):
                steps = " refetch" if launch.constexprs.get("REFETCH") else ""
                if "select" not in launch.kernel.__module__:
                    yield f"decode {name} {kernel}{steps}", *launch


def _call(planes: bool) -> DecodeCall:
    query = torch.zeros(_BATCH, _HEADS, 1, _DIM, dtype=torch.bfloat16)
    key = torch.zeros(_BATCH, _KV_HEADS, _LENGTH, _DIM, dtype=torch.bfloat16)
    cache = PlaneCache.from_tensors(key, key, int8_values=True) if planes else None
    return DecodeCall(
        query, key, key, cache, None, 0.3 if planes else None, 0.1 if planes else None, False,
        True, None, 0.1, planes, planes,
    )  # fmt: skip
