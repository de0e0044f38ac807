"""``decode_attention``: a few new queries against a cache; checks, and which backend runs.

What SpAtten (HPCA 2021) does to one decoding step, each part optional:

- only the kept keys are read (``keep``: the survivors of cascade token pruning, §III-A);
- probabilities come from the high bits of the keys; where the largest probability of a row is
  under a threshold, the row is flat, rounding errors are not damped by the softmax, and it is
  computed once more with the low bits (``progressive``, §III-D);
- only the largest probabilities read their values (``value_keep``, §III-C).

The arithmetic is in ``decode_reference``, its C++ form in ``kernels/cpu``, its form for GPUs in
``kernels/triton``.
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sparseloom.errors import unknown_name
from sparseloom.kernels import decode_reference as reference
from sparseloom.kernels import triton
from sparseloom.kernels.api import check_inputs, check_key_padding
from sparseloom.kernels.cpu import decode as cpu
from sparseloom.kernels.decode_call import DecodeCall, DecodeResult
from sparseloom.kernels.decode_reference import DecodeOutput, DecodeStats, wrong_position
from sparseloom.kernels.planes import PlaneCache

MAXIMUM_QUERIES = 16
BACKENDS = ("auto", "cpu", "triton", "reference")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def decode_attention(
    query: Float[Tensor, "batch heads q_len head_dim"],
    cache: tuple[
        Float[Tensor, "batch kv_heads kv_len head_dim"],
        Float[Tensor, "batch kv_heads kv_len value_dim"],
    ]
    | PlaneCache,
    *,
    keep: Int[Tensor, "batch keep_heads kept"] | None = None,
    value_keep: float | None = None,
    progressive: float | None = None,
    renormalise: bool = False,
    is_causal: bool = True,
    key_padding: Bool[Tensor, "batch kv_len"] | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_importance: bool = False,
    return_stats: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "batch heads q_len value_dim"] | DecodeOutput:
    """Attention of 1 to 16 new queries to a cache that already holds their keys and values.

    A query that may attend to nothing gives 0. Works under ``torch.compile(fullgraph=True)`` in
    its reference form, where the values of ``keep`` are not checked.

    Args:
        query: (batch, heads, q_len, head_dim), the last ``q_len`` tokens.
        cache: ``(key, value)`` in the dtype of the query, or a ``PlaneCache`` with quantised
            keys, in one or two bit planes.
        keep: key positions to read, distinct, in any order, −1 = empty; (batch, keep_heads,
            kept) with keep_heads 1, kv_heads or heads. None reads all keys.
        value_keep: fraction in (0, 1] of the keys of each row whose values are read: the
            ⌊value_keep · n⌋ most probable of the n keys that it may attend to, at least one,
            ties to the key listed first. None reads the values of all.
        progressive: threshold in [0, 1] on the largest probability of a row (0.1 is typical);
            rows under it are computed once more with the low bits. Needs a ``PlaneCache`` with
            two planes. None reads all bits at once.
        renormalise: divide the probabilities left by ``value_keep`` by their sum. The paper
            mentions no such step, so it is off.
        is_causal: query i sees key j if j <= i + kv_len − q_len.
        key_padding: bool (batch, kv_len), True = attend.
        scale: factor of the scores, by default 1/√head_dim.
        enable_gqa: allow ``kv_heads`` to divide ``heads``.
        return_importance: also return the probabilities summed over the queries, per key
            (0 for keys not read), and Σ|out| per head.
        return_stats: also return how many keys and values each row read, and whether it
            fetched the low bits.
        backend: "cpu" (C++) or "triton" (NVIDIA GPUs), both without gradients, in fp32, bf16 or
            fp16; "reference" (plain PyTorch); or "auto", which takes the one for the device of
            the tensors where it can, else "reference".

    Returns:
        (batch, heads, q_len, value_dim) in the dtype of the inputs, or a ``DecodeOutput`` if
        ``return_importance`` or ``return_stats`` is set.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or a value does not fit.
        IndexError: ``keep`` names a key that is not in the cache.
        NotImplementedError: the named backend cannot run this call, here or anywhere.
    """
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if isinstance(cache, PlaneCache):
        planes, key, value = cache, cache.key_msb, cache.value
    else:
        planes, (key, value) = None, cache
    if not _plainly_fits(query, key, value, planes, enable_gqa):
        if planes is not None:
            key, value = _stand_ins(query, planes)
        query, key, value = check_inputs(query, key, value, enable_gqa=enable_gqa)
    _check_options(query, planes, value_keep, progressive)
    if key_padding is not None:
        check_key_padding(key_padding, key)
    if keep is not None:
        _check_keep(keep, query, key)
    scale = 1.0 / math.sqrt(query.shape[3]) if scale is None else float(scale)
    call = DecodeCall(
        query, key, value, planes, keep, value_keep, progressive, renormalise, is_causal,
        key_padding, scale, return_importance, return_stats,
    )  # fmt: skip
    if backend == "auto":
        backend = "triton" if query.is_cuda else "cpu"
        module, refused = _compiled(backend, call)
        return reference.decode(call) if refused is not None else _from(module, call)
    if backend == "reference":
        return reference.decode(call)
    module, refused = _compiled(backend, call)
    if refused is not None:
        raise NotImplementedError(f"backend {backend!r} cannot run this call: {refused}")
    return _from(module, call)


def _compiled(backend: str, call: DecodeCall) -> tuple[ModuleType, str | None]:
    """The module of a compiled backend, and why it cannot run this call (None: it can)."""
    if backend == "cpu":
        return cpu, cpu.refusal(call)
    missing = triton.unavailable()
    if missing is not None:
        return triton, missing
    module = importlib.import_module("sparseloom.kernels.triton.decode")
    return module, module.refusal(call)


def _plainly_fits(
    query: Tensor, key: Tensor, value: Tensor, planes: PlaneCache | None, enable_gqa: bool
) -> bool:
    """Whether ``check_inputs`` would neither refuse nor cast: the usual call, answered quickly.

    Between two steps of a model the interpreter has left the caches of the processor, so that
    every line here is felt.
    """
    shape, keys, values, dtype = query.shape, key.shape, value.shape, query.dtype
    if len(shape) != 4 or len(keys) != 4 or len(values) != 4:
        return False
    if planes is None and not (key.dtype == dtype == value.dtype):
        return False
    return (
        dtype in _FLOATS
        and query.is_cpu
        and key.is_cpu
        and value.is_cpu
        and keys[0] == shape[0]
        and keys[3] == shape[3]
        and values[:3] == keys[:3]
        and 0 not in shape
        and 0 not in keys
        and values[3] > 0
        and (shape[1] == keys[1] or (enable_gqa and shape[1] % keys[1] == 0))
        and not torch.is_autocast_enabled("cpu")
    )


def _stand_ins(query: Tensor, planes: PlaneCache) -> tuple[Tensor, Tensor]:
    """Views of one number in place of the quantised tensors, where only their shapes matter.

    They have the dtype that autocast gives the query, so that there is nothing to cast.
    """
    device, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return planes.stand_ins(dtype)


def _from(module: ModuleType, call: DecodeCall) -> Tensor | DecodeOutput:
    result: DecodeResult | int = module.decode(call)
    if isinstance(result, int):
        assert call.keep is not None
        raise wrong_position(call.keep, result, call.kv_len)
    if not (call.return_importance or call.return_stats):
        return result.out
    stats = None
    if result.keys_read is not None:
        assert result.values_read is not None
        assert result.refetched is not None
        stats = DecodeStats(result.keys_read, result.values_read, result.refetched)
    return DecodeOutput(result.out, result.key_importance, result.head_importance, stats)


def _check_options(
    query: Tensor, planes: PlaneCache | None, value_keep: float | None, progressive: float | None
) -> None:
    if query.shape[2] > MAXIMUM_QUERIES:
        raise ValueError(
            f"query must have 1 to {MAXIMUM_QUERIES} rows (attention takes more), "
            f"got {query.shape[2]}"
        )
    if value_keep is not None and not 0.0 < value_keep <= 1.0:
        raise ValueError(f"value_keep must be in (0, 1], got {value_keep}")
    if progressive is not None:
        if not 0.0 <= progressive <= 1.0:
            raise ValueError(f"progressive must be in [0, 1], got {progressive}")
        if planes is None:
            raise ValueError(
                f"progressive must be None for a cache of plain tensors, got {progressive}: it "
                "needs bit planes (PlaneCache.from_tensors)"
            )
        if planes.lsb_bits == 0:
            raise ValueError(
                f"progressive must be None for a cache with one plane (lsb_bits = 0), "
                f"got {progressive}"
            )


def _check_keep(keep: Tensor, query: Tensor, key: Tensor) -> None:
    """Refuse lists of keys of a wrong type or shape."""
    if keep.dtype == torch.bool or keep.is_floating_point() or keep.is_complex():
        raise TypeError(f"keep must hold integers, got {keep.dtype}")
    (batch, heads), kv_heads = query.shape[:2], key.shape[1]
    shape = keep.shape
    if len(shape) != 3 or shape[0] != batch or shape[1] not in (1, kv_heads, heads):
        raise ValueError(
            f"keep must have shape ({batch}, heads, kept) with heads in "
            f"{sorted({1, kv_heads, heads})}, got {tuple(shape)}"
        )
