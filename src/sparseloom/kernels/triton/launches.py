"""The kernels that calls launch, recorded instead of run: what there is to compile by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor

_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
_DIVISOR = 16  # of a number or an address, which the compiler is told of


class Launch(NamedTuple):
    """One kernel as it is launched: a ``Variant`` without a name and architectures."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]


def launches_of(call: Callable[[], object]) -> Iterator[Launch]:
    """The kernels that ``call`` launches, each once, in order; none of them runs.

    The tensors of the call may lie on the CPU and hold anything.
    """
    seen: set[str] = set()
    found: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        launch = _launch(kernel, args, options)
        key = repr((kernel.fn.__qualname__, *launch[1:]))
        if key not in seen:
            seen.add(key)
            found.append(launch)

    with patch.object(triton.JITFunction, "run", record):
        call()
    yield from found


def _launch(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Launch:
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    given = dict(zip(kernel.arg_names, args, strict=False))
    for parameter in kernel.params:
        name = parameter.name
        value = given[name] if name in given else options.pop(name)
        if parameter.is_constexpr or value is None:
            signature[name], constexprs[name] = "constexpr", value
        else:
            signature[name] = _type_of(value)
    return Launch(kernel, signature, constexprs, options)


def _type_of(value: Tensor | float) -> str:
    if isinstance(value, Tensor):
        return f"*{_TYPES[value.dtype]}:{_DIVISOR}"  # new tensors are
    if isinstance(value, float):
        return "fp32"
    return f"i32:{_DIVISOR}" if value % _DIVISOR == 0 else "i32"
