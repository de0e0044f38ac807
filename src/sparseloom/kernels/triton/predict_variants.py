"""What the report of compiled kernels lists of prediction and selection, at a usual size:
128 columns of a head in the model, 32 in the predictor, codes of 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparseloom.kernels.prediction import Blocks, Codes, Rotation, offsets_of
from sparseloom.kernels.triton import arithmetic, predict, select
from sparseloom.kernels.triton.launches import launches_of

_HEADS, _WIDTH, _LENGTH, _HIDDEN = 2, 32, 1024, 256


def compiled_variants() -> Iterator[tuple[Any, ...]]:
    """The kernels of the module's functions as they launch them (``compile_report.Variant``)."""
    yield from _named("encode", (80, 90), _encode)
    yield from _named("top-k 1x1", (80, 90), lambda: _top("mass", (1, 1)))
    for pooling in ("mass", "max", "mean"):
        for variant in _named(
            f"top-k {pooling} 64x1", (80, 90), lambda p=pooling: _top(p, (64, 1))
        ):
            if pooling == "mass" or variant[1].__module__ != select.__name__:  # all select alike
                yield variant
    yield from _named("top-k mass 8x1", (80, 90), lambda: _top("mass", (8, 1)), "_rank_blocks")
    yield from _named("threshold 8x1", (80, 90), _above)
    with arithmetic.use_arithmetic("fp8"):
        yield from _named("encode fp8", (90,), _encode, "_product")
        yield from _named("top-k 1x1 fp8", (90,), lambda: _top("mass", (1, 1)), "_rank_products")


def _named(
    what: str, archs: tuple[int, ...], call: Callable[[], None], only: str = ""
) -> Iterator[tuple[Any, ...]]:
    for launch in launches_of(call):
        digit, digits = (launch.constexprs.get(name, 1) for name in ("DIGIT", "DIGITS"))
        if 0 < digit < digits - 1:
            continue  # the first and the last are the extremes
        name = launch.kernel.fn.__name__
        if only in name:
            part = f" digit {digit}" if "DIGIT" in launch.constexprs else ""
            yield f"{what} {name.lstrip('_')}{part}", *launch, archs


def _encode() -> None:
    outputs = 2 * _HEADS * _WIDTH
    weights = predict.pack_weights(torch.zeros(_HIDDEN, outputs), torch.ones(outputs))
    turn = torch.zeros(1, _LENGTH, 128)
    predict.encode(
        torch.zeros(1, _LENGTH, _HIDDEN, dtype=torch.bfloat16),
        weights,
        bits=4,
        heads=_HEADS,
        width=_WIDTH,
        input_scale=1.0,
        key_scale=torch.ones(_HEADS),
        rotation=Rotation(turn, turn, torch.zeros(_WIDTH // 2, dtype=torch.int64)),
    )


def _call(block_size: tuple[int, int]) -> tuple[Codes, Blocks]:
    codes = torch.zeros(1, _HEADS, _LENGTH, _WIDTH, dtype=torch.int8)
    scale = torch.ones(1, _HEADS, _LENGTH, 1)
    rows = -(-_LENGTH // block_size[0])
    ends = torch.full((1, rows), _LENGTH)
    blocks = Blocks(block_size, True, None, ends, ends, torch.zeros(rows, 2, dtype=torch.int64))
    return Codes(codes, scale, codes, torch.ones(_HEADS), 4), blocks


def _top(pooling: str, block_size: tuple[int, int]) -> None:
    codes, blocks = _call(block_size)
    budget = blocks.budget[:, None].expand(1, _HEADS, -1)
    predict.top_keys(codes, blocks, offsets_of(budget), pooling=pooling)


def _above() -> None:
    predict.keys_above(*_call((8, 1)), torch.zeros(_HEADS))
