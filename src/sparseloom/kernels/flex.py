"""The flex backend: PyTorch's FlexAttention on the blocks of the mask, forward only.

FlexAttention skips blocks, not pairs, and its speed falls steeply below 16 x 16, so smaller
blocks are refused. It generates code per kind of call: a C++ compiler is needed on the CPU, and
the first call of a kind takes seconds to tens of seconds. Lengths may then change freely, except
with padding, which compiles once per pair of lengths.

Two bugs of PyTorch 2.13 are avoided. One tensor passed as both ``kv_indices`` and
``full_kv_indices`` does not compile: ``SparseMask.to_block_mask`` never shares them. And under
dynamic lengths the code generator renames the block size by plain text replacement, which also
hits longer names of captured sizes ("cur_kvSplitSize5 was not declared"): causality captures a
tensor instead of a number, and padding, whose strides cannot be hidden, gets static lengths.
"""

from __future__ import annotations

import functools
import inspect
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparseloom.kernels.common import AttentionCall, ForwardResult
from sparseloom.mask import SparseMask

HAS_BACKWARD = False
MINIMUM_BLOCK = 16
# Below this many pairs per head the reference is quick enough not to wait for a compilation.
PROFITABLE_PAIRS = 2048 * 2048
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def unavailable() -> str | None:
    """Why the backend cannot run on this machine (None: it can). Looked up once."""
    if torch.cuda.is_available():
        return None
    if platform.system() == "Darwin":
        return "FlexAttention has no CPU code generator on macOS"
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return "FlexAttention on the CPU needs AVX2 or better"
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"no C++ compiler: {compiler!r} is not on PATH (set CXX to another one)"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "the C++ headers of Python (Python.h) are not installed"
    return None


def unsupported(call: AttentionCall, *, lse: bool, importance: bool, grad: bool) -> str | None:
    """Why the backend refuses this call (None: it does not)."""
    if grad:
        return "it has no backward pass (FlexAttention has none on the CPU): use torch.no_grad()"
    if call.dropout_p:
        return f"it has no dropout, got dropout_p {call.dropout_p}"
    if lse or importance:
        return "it returns neither log-sum-exp nor importance"
    if call.query.dtype not in _DTYPES:
        return f"it computes in float32, bfloat16 or float16, got {call.query.dtype}"
    if call.indices is None:
        return "it needs a mask (backend 'dense' does without)"
    if min(call.block_size) < MINIMUM_BLOCK:
        return f"it needs blocks of at least {MINIMUM_BLOCK}x{MINIMUM_BLOCK}, got {call.block_size}"
    if call.q_len == 1:
        return "it needs at least two queries (one query is decoding: use decode_attention)"
    return None


def profitable(call: AttentionCall) -> bool:
    """Whether "auto" should take it: long enough, and no padding (which compiles per length)."""
    return call.key_padding is None and call.q_len * call.kv_len >= PROFITABLE_PAIRS


def forward(call: AttentionCall, *, lse: bool, importance: bool) -> ForwardResult:
    """Attention over the kept blocks; see ``reference.forward`` for the meaning.

    Raises:
        NotImplementedError: the call is one that ``unsupported`` refuses.
        RuntimeError: the generated code did not compile.
    """
    refusal = unsupported(call, lse=lse, importance=importance, grad=False)
    if refusal is not None:
        raise NotImplementedError(f"backend 'flex' cannot run this call: {refusal}")
    assert call.indices is not None
    assert call.offsets is not None
    mask = SparseMask(
        call.indices,
        call.offsets,
        block_size=call.block_size,
        q_len=call.q_len,
        kv_len=call.kv_len,
        validate=False,
    )
    heads = call.query.shape[1]
    if mask.heads not in (1, heads):
        mask = mask.expand(mask.batch, heads)
    block_mask = mask.to_block_mask(is_causal=call.is_causal, key_padding=call.key_padding)
    padded = call.key_padding is not None
    kind = (
        call.query.device,
        call.query.dtype,
        call.query.shape[1::2],
        call.key.shape[1],
        call.value.shape[3],
        call.block_size,
        (mask.batch, mask.heads, call.query.shape[0] > 1),
        (call.is_causal, call.q_len == call.kv_len),
        (call.q_len, call.kv_len) if padded else None,
    )
    from torch._dynamo.exc import BackendCompilerFailed

    # FlexAttention refuses leaves that require gradients even where none are recorded.
    query, key, value = (t.detach() for t in (call.query, call.key, call.value))
    try:
        out = _compiled(kind, dynamic=not padded)(
            query,
            key,
            value,
            block_mask=block_mask,
            scale=call.scale,
            enable_gqa=call.groups > 1,
        )
    except BackendCompilerFailed as error:
        raise RuntimeError(
            f"FlexAttention did not compile for this call ({error.inner_exception!r}); "
            "use backend='reference'"
        ) from error
    return ForwardResult(out, None, None, None)


@functools.lru_cache(maxsize=64)
def _compiled(kind: tuple[Any, ...], *, dynamic: bool) -> Callable[..., Tensor]:  # noqa: ARG001
    """FlexAttention compiled for one kind of call.

    One instance per kind, each with its own recompilation budget where torch has such budgets:
    otherwise eight kinds of calls in one process would exhaust the one that they share.
    """
    # Loading it takes a second or two: only those who run it wait.
    from torch.nn.attention.flex_attention import flex_attention

    options: dict[str, Any] = {"dynamic": dynamic, "fullgraph": True}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    return torch.compile(flex_attention, **options)
