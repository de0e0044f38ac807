"""Every kernel at its default settings, for ``compile_report``: as it would be launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sparseloom.kernels.common import AttentionCall
from sparseloom.kernels.triton.backward import backward_queries
from sparseloom.kernels.triton.compile_report import Variant
from sparseloom.kernels.triton.configs import Tiles, backward_tiles, forward_tiles
from sparseloom.kernels.triton.forward import attention_forward
from sparseloom.kernels.triton.importance import column_sums
from sparseloom.kernels.triton.key_gradients import (
    KEYS_FILL_A_TILE,
    backward_keys,
    key_arguments,
)
from sparseloom.kernels.triton.launch import Launch

BLOCKS = ((64, 1), (128, 1), (16, 1), (8, 1), (1, 1), (64, 64), (128, 128))
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_OPTIONS = ("num_warps", "num_stages")
_FP32 = ("lse_ptr", "norm_ptr", "centre_ptr", "bias_ptr", "parts", "key_parts", "value_parts")
_INTEGERS = {"indices": "i32", "order": "i32", "offsets": "i64", "starts": "i64", "padding": "u8"}


def compiled_variants() -> Iterator[Variant]:
    """Causal calls at head_dim 128 in bf16 for every block; some other dims and types."""
    for block in BLOCKS:
        yield from _forward(block, 128, torch.bfloat16)
    for block, dim, dtype in (
        ((64, 1), 64, torch.bfloat16),
        ((64, 1), 80, torch.float16),
        ((64, 1), 256, torch.bfloat16),
        ((8, 1), 256, torch.bfloat16),
        ((8, 1), 64, torch.float32),
    ):
        yield from _forward(block, dim, dtype)
        yield from _backward(block, dim, dtype)
    for block in BLOCKS:
        yield from _backward(block, 128, torch.bfloat16)
    launch = Launch.make(_call((64, 1), 128, torch.bfloat16), forward_tiles, pack=False)
    yield _variant("importance 64x1 d128 bf16", column_sums, launch.arguments(), torch.bfloat16, 90)


def _forward(block: tuple[int, int], dim: int, dtype: torch.dtype) -> Iterator[Variant]:
    for arch in (90, 80):
        launch = Launch.make(_call(block, dim, dtype), _on(forward_tiles, arch))
        arguments = launch.arguments() | {"HAS_LSE": True}
        yield _variant(
            _name("forward", block, dim, dtype), attention_forward, arguments, dtype, arch
        )


def _backward(block: tuple[int, int], dim: int, dtype: torch.dtype) -> Iterator[Variant]:
    call = _call(block, dim, dtype)
    whole = block[1] >= KEYS_FILL_A_TILE
    for arch in (90, 80):
        launch = Launch.make(call, _on(backward_tiles, arch))
        arguments = launch.arguments() | {"HAS_BIAS": False, "SHARES": not whole}
        yield _variant(
            _name("backward queries", block, dim, dtype), backward_queries, arguments, dtype, arch
        )
    if whole:
        arguments = key_arguments(call) | {"HAS_BIAS": False}
        name = _name("backward keys", block, dim, dtype)
        yield _variant(name, backward_keys, arguments, dtype, 90)


def _name(kernel: str, block: tuple[int, int], dim: int, dtype: torch.dtype) -> str:
    return f"{kernel} {block[0]}x{block[1]} d{dim} {_TYPES[dtype]}"


def _on(choose: Callable[..., Tiles], arch: int) -> Callable[..., Tiles]:
    """The tiles of another device than the one here."""
    return lambda *sizes: choose(*sizes[:-1], arch)


def _call(block: tuple[int, int], dim: int, dtype: torch.dtype) -> AttentionCall:
    """A causal call with a mask that keeps the first keys; the tensors have shapes alone."""
    length, heads = 1024, 2
    tensor = torch.empty(1, heads, length, dim, dtype=dtype, device="meta")
    rows = length // block[0]
    return AttentionCall(
        query=tensor,
        key=tensor,
        value=tensor,
        indices=torch.zeros(heads * rows, dtype=torch.int32),
        offsets=torch.arange(rows + 1) + rows * torch.arange(heads)[None, :, None],
        block_size=block,
        key_padding=None,
        is_causal=True,
        scale=dim**-0.5,
    )


def _variant(
    name: str, kernel: Any, arguments: dict[str, Any], dtype: torch.dtype, arch: int
) -> Variant:
    """Signature and constants from what the launch would pass."""

    def kind(argument: str) -> str:
        if argument.isupper():
            return "constexpr"
        if argument in _INTEGERS:
            return f"*{_INTEGERS[argument]}:16"
        if argument in _FP32:
            return "*fp32:16"
        if argument.endswith("_ptr"):
            return f"*{_TYPES[dtype]}:16"
        if argument.endswith("scale"):
            return "fp32"
        # Strides are multiples of 16 where head_dim is; lengths and counts need not be.
        return "i32:16" if argument.endswith(("_batch", "_head", "_row")) else "i32"

    names = kernel.arg_names
    constants = {n: arguments[n] for n in names if n.isupper()}
    options = {n: arguments[n] for n in _OPTIONS}
    return Variant(name, kernel, {n: kind(n) for n in names}, constants, options, (arch,))
