"""Decoding on a GPU: what of a call runs here, and running it.

The interface is that of the C++ backend (``kernels/cpu/decode.py``), the steps are those of
SpAtten (HPCA 2021, §III-C and §III-D), each over parts of the keys, so that one sequence fills
the GPU: scores from the high bits; their softmax, merged over the parts; the rows that are flat
once more with the low bits; of each row the most probable keys; their values.

Memory: four bytes for each query row and key it may attend to, of one step.
"""
# pyright: reportCallIssue=false

from __future__ import annotations

import torch
from torch import Tensor
from triton import knobs

from sparseloom.kernels import decode_call
from sparseloom.kernels.decode_call import DecodeCall, DecodeResult
from sparseloom.kernels.triton import decode_kernels as kernels
from sparseloom.kernels.triton import select
from sparseloom.kernels.triton.sizes import power_of_two

_WIDEST = 256  # dims of a head, which a program holds
_KEYS = 64  # of a tile
_MOST_ROWS = 64  # of a tile
_LEAST_ROWS = 16  # that tensor cores take
_PROGRAMS = 512  # enough to fill a GPU
_MOST_PARTS = 64


def refusal(call: DecodeCall) -> str | None:
    """Why this call cannot run here (None: it can)."""
    if not call.query.is_cuda and not knobs.runtime.interpret:
        return f"the tensors are on {call.query.device}"
    for name, dim in (("head_dim", call.query.shape[3]), ("value_dim", call.value.shape[3])):
        if dim > _WIDEST:
            return f"it needs a {name} of at most {_WIDEST}, got {dim}"
    return decode_call.refusal(call)


def decode(call: DecodeCall) -> DecodeResult | int:
    """Run a call that ``refusal`` does not refuse.

    Returns:
        The result, or the flat index of the first entry of ``keep`` that names no key. In a CUDA
        graph nobody can look: there such entries are left out.
    """
    wrong = _wrong_entry(call)
    if wrong is not None:
        return wrong
    with torch.cuda.device_of(call.query):
        return _Step(call).run()


def _wrong_entry(call: DecodeCall) -> int | None:
    keep = call.keep
    if keep is None or (keep.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    wrong = (keep < -1) | (keep >= call.kv_len)
    return int(wrong.flatten().nonzero()[0]) if bool(wrong.any()) else None


class _Step:
    """One call and what its kernels share."""

    def __init__(self, call: DecodeCall) -> None:
        self.call, self.planes = call, call.planes
        self.query = call.query.contiguous()
        self.batch, self.heads, self.q_len, self.dim = call.query.shape
        self.kv_heads = call.key.shape[1]
        self.device = call.query.device
        self.keep = None if call.keep is None else call.keep.contiguous()
        self.read_heads = self.kv_heads
        if self.keep is not None and self.keep.shape[1] == self.heads:
            self.read_heads = self.heads
        self.entries = call.kv_len if self.keep is None else self.keep.shape[2]
        self.rows = self.heads // self.read_heads * self.q_len  # that read the same keys
        self.tile = min(_MOST_ROWS, max(_LEAST_ROWS, power_of_two(self.rows)))
        readers = self.batch * self.read_heads * -(-self.rows // self.tile)
        parts = min(_MOST_PARTS, -(-_PROGRAMS // readers), max(1, -(-self.entries // (2 * _KEYS))))
        self.span = max(_KEYS, -(-self.entries // (parts * _KEYS)) * _KEYS)
        self.parts = max(1, -(-self.entries // self.span))
        self.grid = (self.parts, self.batch * self.read_heads, -(-self.rows // self.tile))
        self.all_rows = self.batch * self.heads * self.q_len
        self.stride = max(16, -(-self.entries // 16) * 16)
        self.ranks = self._new(self.all_rows, self.stride, dtype=torch.int32)
        shape = (self.all_rows, self.parts)
        self.tops, self.sums = self._new(*shape), self._new(*shape)
        self.counts = self._new(*shape, dtype=torch.int32)
        self.lse = self._new(self.all_rows)
        self.count = self._new(self.all_rows, dtype=torch.int32)
        self.flat = self._new(self.all_rows, dtype=torch.int8)

    def run(self) -> DecodeResult:
        call, planes = self.call, self.planes
        progressive = call.progressive
        self._score(low=progressive is None, refetch=False)
        self._merge(0.0 if progressive is None else progressive, refetch=False)
        if progressive is not None and planes is not None:
            self._score(low=True, refetch=True)
            self._merge(progressive, refetch=True)
        key_importance = self._spread() if call.return_importance else None
        budget = self.count
        if call.value_keep is not None:
            # The small term undoes representation error, as in 0.29 · 100 = 28.999….
            budget = (self.count.double() * call.value_keep + 1e-9).floor().to(torch.int32)
            budget = budget.clamp(min=1).minimum(self.count)
            ends = torch.full_like(self.count, self.entries)
            rows = select.Rows(self.ranks, ends, self.stride, 1, 32)
            select.clear_rest(rows, select.find_levels(rows, budget))
        out, head_importance = self._weigh()
        if not call.return_stats:
            return DecodeResult(out, key_importance, head_importance)
        shape = (self.batch, self.heads, self.q_len)
        read, values = (number.view(shape).to(torch.int64) for number in (self.count, budget))
        return DecodeResult(
            out, key_importance, head_importance, read, values, self.flat.view(shape) != 0
        )

    def _score(self, *, low: bool, refetch: bool) -> None:
        call, planes = self.call, self.planes
        stored = _dense(call.key if planes is None else planes.key_msb)
        nibbles = None if planes is None or not low else planes.key_lsb
        nibbles = None if nibbles is None else _dense(nibbles)
        scale, steps, by_dim = _scale(None if planes is None else planes.key_scale)
        padding = None if call.key_padding is None else _dense(call.key_padding).view(torch.uint8)
        # Codes of a byte are exact in half precision, the others are not.
        exact = stored.dtype == torch.int8 or planes is None
        halves = _is_multiplied(self.query.dtype) and exact and not by_dim
        kernels.score[self.grid](
            self.query, stored, nibbles, scale, self.keep, padding, self.flat, self.ranks,
            self.tops, self.sums, self.counts, self.entries, self.stride, call.kv_len, self.q_len,
            self.rows, self.read_heads, self.read_heads // self.kv_heads, self.span,
            *stored.stride()[:3], *((0, 0, 0) if nibbles is None else nibbles.stride()[:3]),
            *steps, *self._keep_steps(), 0 if padding is None else padding.stride(0), call.scale,
            float(0 if planes is None or nibbles is not None else planes.fill), DIM=self.dim,
            WIDE=_wide(self.dim), HALF=_wide(self.dim // 2),
            SHIFT=0 if planes is None else planes.lsb_bits, LOW=nibbles is not None,
            SCALED=scale is not None, BY_DIM=by_dim, KEPT=self.keep is not None,
            PADDED=padding is not None, CAUSAL=call.is_causal and self.q_len > 1,
            REFETCH=refetch, FLOAT32=not halves, ROWS=self.tile, KEYS=_KEYS, num_warps=4,
            num_stages=3,
        )  # fmt: skip

    def _merge(self, threshold: float, *, refetch: bool) -> None:
        kernels.merge[(-(-self.all_rows // _LEAST_ROWS),)](
            self.tops, self.sums, self.counts, self.lse, self.count, self.flat, float(threshold),
            self.all_rows, self.parts, REFETCH=refetch, PARTS=power_of_two(self.parts),
            ROWS=_LEAST_ROWS, num_warps=4,
        )  # fmt: skip

    def _weigh(self) -> tuple[Tensor, Tensor | None]:
        call, planes = self.call, self.planes
        value = _dense(call.value if planes is None else planes.value)
        scale, steps, by_dim = _scale(None if planes is None else planes.value_scale)
        dim = value.shape[3]
        partial = self._new(self.all_rows, self.parts, dim)
        totals = self._new(self.all_rows, self.parts)
        # Codes go as bf16, which holds them exactly.
        halves = _is_multiplied(value.dtype if scale is None else torch.bfloat16)
        full = self.query.dtype == torch.float32 or not halves
        kernels.weigh[self.grid](
            self.ranks, self.lse, value, scale, self.keep, partial, totals, self.entries,
            self.stride, call.kv_len, self.rows, self.read_heads, self.read_heads // self.kv_heads,
            self.span, *value.stride()[:3], *steps, *self._keep_steps(), DIM=dim, WIDE=_wide(dim),
            SCALED=scale is not None, BY_DIM=by_dim, KEPT=self.keep is not None, FLOAT32=full,
            ROWS=self.tile, KEYS=_KEYS, num_warps=4, num_stages=3,
        )  # fmt: skip
        out = self._new(self.batch, self.heads, self.q_len, dim, dtype=self.query.dtype)
        importance = self._new(self.batch, self.heads) if call.return_importance else None
        kernels.finish[(self.batch * self.heads,)](
            partial, totals, out, importance, self.parts, self.q_len, DIM=dim, WIDE=_wide(dim),
            RENORMALISE=call.renormalise, IMPORTANCE=call.return_importance, num_warps=4,
        )  # fmt: skip
        return out, importance

    def _spread(self) -> Tensor:
        importance = torch.zeros(
            self.batch, self.heads, self.call.kv_len, dtype=torch.float32, device=self.device
        )
        if self.entries:
            kernels.spread[(-(-self.entries // 256), self.batch * self.heads)](
                self.ranks, self.lse, self.keep, importance, self.entries, self.stride,
                self.call.kv_len, self.q_len, self.heads, self.read_heads, *self._keep_steps(),
                KEPT=self.keep is not None, KEYS=256, num_warps=4,
            )  # fmt: skip
        return importance

    def _keep_steps(self) -> tuple[int, int]:
        """Entries of the lists of a batch entry, and from one reader to the next."""
        if self.keep is None:
            return 0, 0
        _, lists, length = self.keep.shape
        return lists * length, 0 if lists == 1 else length

    def _new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


def _scale(scale: Tensor | None) -> tuple[Tensor | None, tuple[int, int, int], bool]:
    """A scale in fp32, its steps along batch, heads and tokens, and whether it varies along the
    dims (then it does not along the tokens)."""
    if scale is None:
        return None, (0, 0, 0), False
    scale = scale.float().contiguous()
    shape, strides = scale.shape, scale.stride()
    steps = [0 if size == 1 else step for size, step in zip(shape[:3], strides[:3], strict=True)]
    return scale, (steps[0], steps[1], steps[2]), shape[3] != 1


def _is_multiplied(dtype: torch.dtype) -> bool:
    """Whether products take numbers of half precision as they are, not as fp32."""
    if dtype == torch.bfloat16:  # Triton's interpreter would multiply the bits
        return not knobs.runtime.interpret
    return dtype == torch.float16


def _wide(dim: int) -> int:
    """Columns of a tile, zeros included."""
    return max(16, power_of_two(dim))


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, or a copy with a contiguous last dimension."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
