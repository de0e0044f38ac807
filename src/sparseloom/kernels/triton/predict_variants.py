"""What the report of compiled kernels lists of prediction and selection, at a usual size:
128 columns of a head in the model, 32 in the predictor, codes of 4 and 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sparseloom.kernels.prediction import Blocks, Codes, Rotation, offsets_of
from sparseloom.kernels.triton import arithmetic, predict
from sparseloom.kernels.triton.launches import launches_of

_HEADS, _WIDTH, _LENGTH, _HIDDEN = 2, 32, 1024, 256


def compiled_variants() -> Iterator[tuple[Any, ...]]:
    """Every kernel of the module's functions as they launch it (``compile_report.Variant``)."""
    for kind, archs in (("int8", (80, 90)), ("fp8", (90,))):
        with arithmetic.use_arithmetic(kind):
            for launch in launches_of(_encode):
                yield f"encode {kind}{launch.kernel.fn.__name__}", *launch, archs
            for pooling, block in (("", (1, 1)), ("mass", (64, 1)), ("max", (8, 1))):
                for launch in launches_of(lambda p=pooling, b=block: _top(p, b)):
                    name = f"{pooling} {block[0]}x{block[1]} {kind}{launch.kernel.fn.__name__}"
                    yield f"top-k {name}", *launch, archs
    for launch in launches_of(lambda: _top("mean", (64, 1))):
        yield f"top-k mean 64x1{launch.kernel.fn.__name__}", *launch, (80, 90)
    for launch in launches_of(_above):
        yield f"threshold 8x1{launch.kernel.fn.__name__}", *launch, (80, 90)


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
