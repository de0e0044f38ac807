"""What a trace holds: the operators of a workload and what a method did at each attention call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Literal, cast

import numpy as np
from jaxtyping import Bool, Int64, UInt64
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sparseloom.regions import decode_heads
from sparseloom.trace.errors import TraceError
from sparseloom.trace.masks import MaskArrays, allowed_pairs

Kind = Literal["gemm", "attention", "cross_attention", "norm", "elementwise"]
Role = Literal["qkv", "attention", "attention_output", "ffn", "head", "norm", "other"]
Stage = Literal["prefill", "decode"]
Scope = Literal["model", "attention"]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelShape(_Record):
    """The sizes of a Transformer, as `describe(model)` reports them."""

    layers: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    head_dim: int = Field(ge=1)
    intermediate_size: int = Field(default=0, ge=0)
    vocab_size: int = Field(default=0, ge=0)
    is_causal: bool = False
    rotary: bool = False
    family: str = ""
    gated_ffn: bool = False

    @model_validator(mode="after")
    def _heads_group(self) -> ModelShape:
        if self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads")
        return self


class Operator(_Record):
    """One operator of the workload, in the order in which it ran.

    Every size is per sequence; `batch` sequences ran together.

    - `gemm`: (rows × inner) · (inner × columns), rows being tokens and `inner · columns` weights;
    - `attention`, `cross_attention`: the head fields; `is_causal` is aligned bottom-right and
      `padding` is the position of the key padding in `Workload.paddings`, if there is one;
    - `norm`, `elementwise`: rows × columns elements.

    `step` is 0 for the prompt and counts up while tokens are generated.
    """

    kind: Kind
    role: Role = "other"
    layer: int | None = Field(default=None, ge=0)
    step: int = Field(default=0, ge=0)
    stage: Stage = "prefill"
    batch: int = Field(default=1, ge=1)
    rows: int = Field(default=0, ge=0)
    inner: int = Field(default=0, ge=0)
    columns: int = Field(default=0, ge=0)
    heads: int = Field(default=0, ge=0)
    kv_heads: int = Field(default=0, ge=0)
    q_len: int = Field(default=0, ge=0)
    kv_len: int = Field(default=0, ge=0)
    head_dim: int = Field(default=0, ge=0)
    value_dim: int = Field(default=0, ge=0)
    is_causal: bool = False
    padding: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _sizes_fit_the_kind(self) -> Operator:
        needed = {
            "gemm": ("rows", "inner", "columns"),
            "attention": ("heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim"),
            "cross_attention": ("heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim"),
        }.get(self.kind, ("rows", "columns"))
        missing = [name for name in needed if getattr(self, name) == 0]
        if missing:
            raise ValueError(f"{self.kind} needs {', '.join(missing)} of at least 1")
        if self.is_attention and self.heads % self.kv_heads:
            raise ValueError(f"heads ({self.heads}) must be a multiple of kv_heads")
        return self

    @property
    def is_attention(self) -> bool:
        """Whether the operator is an attention call (and so has an `AttentionCall`)."""
        return self.kind in ("attention", "cross_attention")

    @property
    def macs(self) -> int:
        """Multiply-accumulates, all sequences; attention counts every pair (Q·Kᵀ and P·V)."""
        if self.kind == "gemm":
            return self.batch * self.rows * self.inner * self.columns
        if self.is_attention:
            pairs = self.batch * self.heads * self.q_len * self.kv_len
            return pairs * (self.head_dim + self.value_dim)
        return 0

    @property
    def elements(self) -> int:
        """Elements written, all sequences (0 for attention)."""
        return self.batch * self.rows * self.columns


class PredictorShape(_Record):
    """The path that chose a mask: width per head, and bits (2, 4, 8, 16 or 32) of its operands."""

    head_dim: int = Field(ge=1)
    bits: Literal[2, 4, 8, 16, 32] = 4


@dataclass(frozen=True, eq=False)
class Workload:
    """What ran, without saying which pairs were kept.

    Args:
        model: the sizes of the model.
        operators: every operator in order. With scope "attention" only attention is listed.
        name: what to call it in reports.
        paddings: key paddings (sequences, keys), True = may be attended; operators point here.
        scope: whether the whole model is listed or attention alone.
        source: where the workload comes from (a command, a file), for the reader.
    """

    model: ModelShape
    operators: tuple[Operator, ...]
    name: str = "workload"
    paddings: tuple[Bool[np.ndarray, "_ _"], ...] = ()
    scope: Scope = "model"
    source: str = ""

    def __post_init__(self) -> None:
        for i, operator in enumerate(self.operators):
            if operator.padding is None:
                continue
            if operator.padding >= len(self.paddings):
                raise TraceError(
                    f"operator {i} points at padding {operator.padding} of {len(self.paddings)}"
                )
            shape = self.paddings[operator.padding].shape
            if shape not in ((operator.batch, operator.kv_len), (1, operator.kv_len)):
                raise TraceError(
                    f"padding {operator.padding} of operator {i} must be "
                    f"({operator.batch}, {operator.kv_len}), got {shape}"
                )

    def attention(self) -> tuple[Operator, ...]:
        """The attention operators in order: call i of a selection belongs to operator i here."""
        return tuple(operator for operator in self.operators if operator.is_attention)

    def padding_of(self, operator: Operator) -> Bool[np.ndarray, "batch kv_len"] | None:
        """The key padding of an attention operator, or None."""
        return None if operator.padding is None else self.paddings[operator.padding]

    def allowed_pairs(self, operator: Operator) -> Int64[np.ndarray, "batch heads"]:
        """Pairs that causality and padding allow, per sequence and query head."""
        pairs = allowed_pairs(
            operator.q_len,
            operator.kv_len,
            is_causal=operator.is_causal,
            key_padding=self.padding_of(operator),
        )
        shape = (operator.batch, operator.heads)
        return np.ascontiguousarray(np.broadcast_to(pairs[:, None], shape))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Workload) and _same(self, other)


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """What a method did at one attention call. Without a mask and counts every pair is kept.

    Args:
        mask: the kept pairs of Q·Kᵀ.
        value_mask: the kept pairs of P·V where they differ (local value pruning).
        key_counts: kept keys per query where only their number is known, not which ones they are
            (the SpAtten CSV files). Excludes `mask`.
        value_counts: the same for P·V.
        predictor: the path that chose the mask; None where nothing was computed for it.
        key_bits, value_bits, query_bits: operand widths; None = not quantised.
        lsb_bits, lsb_threshold, lsb_refetch: progressive quantisation: bits fetched again for the
            queries marked True, those whose largest probability is below the threshold.
        tokens_alive, heads_alive: what cascade pruning has left when the call starts. The kept
            pairs of a mask leave dead tokens out already; without a mask dead keys are not kept.
        token_keep: tokens kept from the end of this call on; None = no selection happens here.
        accumulates_importance, rescales_importance: whether the call adds to the token scores,
            and whether it rescales the earlier ones.
        regions: static regions of the heads, as `sparseloom.regions.encode_heads` writes them.
            `mask` holds the tiles that they own; coarse regions say more than a mask can.
    """

    mask: MaskArrays | None = None
    value_mask: MaskArrays | None = None
    key_counts: Int64[np.ndarray, "batch heads q_len"] | None = None
    value_counts: Int64[np.ndarray, "batch heads q_len"] | None = None
    predictor: PredictorShape | None = None
    key_bits: int | None = None
    value_bits: int | None = None
    query_bits: int | None = None
    lsb_bits: int | None = None
    lsb_threshold: float | None = None
    lsb_refetch: Bool[np.ndarray, "batch heads q_len"] | None = None
    tokens_alive: Bool[np.ndarray, "batch kv_len"] | None = None
    heads_alive: Bool[np.ndarray, "heads"] | None = None
    token_keep: int | None = None
    accumulates_importance: bool = False
    rescales_importance: bool = False
    regions: UInt64[np.ndarray, " words"] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionCall) and _same(self, other)

    @property
    def knows_keys(self) -> bool:
        """False where only the number of kept keys is known."""
        return self.key_counts is None

    def kept_pairs(
        self,
        operator: Operator,
        padding: Bool[np.ndarray, "_ kv_len"] | None = None,
        *,
        group: int = 1,
    ) -> Int64[np.ndarray, "batch heads"]:
        """Pairs of Q·Kᵀ kept under causality and padding, per sequence and query head.

        With `group` > 1 a key counts once for each `group` consecutive queries that keep it:
        the key loads of hardware that works on so many queries together. Counts without keys
        cannot tell, and are taken as if nothing were shared.
        """
        return self._pairs(self.mask, self.key_counts, operator, padding, group)

    def value_pairs(
        self,
        operator: Operator,
        padding: Bool[np.ndarray, "_ kv_len"] | None = None,
        *,
        group: int = 1,
    ) -> Int64[np.ndarray, "batch heads"]:
        """Pairs of P·V kept: those of Q·Kᵀ unless values were pruned further."""
        if self.value_mask is None and self.value_counts is None:
            return self.kept_pairs(operator, padding, group=group)
        return self._pairs(self.value_mask, self.value_counts, operator, padding, group)

    def _pairs(
        self,
        mask: MaskArrays | None,
        counts: Int64[np.ndarray, "batch heads q_len"] | None,
        operator: Operator,
        padding: Bool[np.ndarray, "_ kv_len"] | None,
        group: int,
    ) -> Int64[np.ndarray, "batch heads"]:
        shape = (operator.batch, operator.heads)
        if counts is not None:
            pairs = counts.sum(axis=2)
        elif mask is not None:
            shared = group > 1
            pairs = mask.distinct_keys(group, padding) if shared else mask.kept_pairs(padding)
            # Query head h reads mask head h · (mask heads) // heads: runs of equal length.
            pairs = np.broadcast_to(pairs, (operator.batch, pairs.shape[1]))
            pairs = pairs.repeat(operator.heads // pairs.shape[1], axis=1)
        else:
            valid = padding
            if self.tokens_alive is not None:
                valid = self.tokens_alive if padding is None else padding & self.tokens_alive
            allowed = allowed_pairs(
                operator.q_len,
                operator.kv_len,
                is_causal=operator.is_causal,
                key_padding=valid,
                group=group,
            )
            pairs = np.broadcast_to(allowed[:, None], shape)
        alive = 1 if self.heads_alive is None else self.heads_alive
        return np.ascontiguousarray(np.broadcast_to(pairs * alive, shape))

    def check(self, operator: Operator) -> None:
        """Raise a TraceError where the call contradicts its operator."""
        for name, mask in (("mask", self.mask), ("value_mask", self.value_mask)):
            if mask is not None:
                _check_mask(name, mask, operator)
        if self.mask is not None and self.key_counts is not None:
            raise TraceError("a call has either a mask or key_counts, not both")
        if self.value_mask is not None and self.value_counts is not None:
            raise TraceError("a call has either a value_mask or value_counts, not both")
        per_query = (operator.batch, operator.heads, operator.q_len)
        shapes = {
            "key_counts": per_query,
            "value_counts": per_query,
            "lsb_refetch": per_query,
            "tokens_alive": (operator.batch, operator.kv_len),
            "heads_alive": (operator.heads,),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise TraceError(f"{name} must be {shape}, got {array.shape}")
        if self.regions is not None:
            self._check_regions(operator)
        for name in ("key_counts", "value_counts"):
            counts = getattr(self, name)
            if counts is not None and not ((counts >= 0) & (counts <= operator.kv_len)).all():
                raise TraceError(f"{name} must be in [0, {operator.kv_len}]")

    def _check_regions(self, operator: Operator) -> None:
        assert self.regions is not None
        if self.mask is None:
            raise TraceError("regions need the mask that they compile to beside them, got none")
        try:
            heads = len(decode_heads(self.regions))
        except ValueError as error:
            raise TraceError(f"regions: {error}") from None
        if heads == 0 or operator.heads % heads:
            raise TraceError(f"regions must divide {operator.heads} heads evenly, got {heads}")


@dataclass(frozen=True, eq=False)
class Selection:
    """One method's choices on a workload.

    Args:
        name: unique in the trace, usually the method's short form.
        calls: one per attention operator of the workload, in order.
        method: `Method.to_dict()`; anything that JSON can hold.
        quality: what was measured with it: `metric`, `value`, `dense_value` and what else helps.
    """

    name: str
    calls: tuple[AttentionCall, ...]
    method: Mapping[str, object] = field(default_factory=dict)
    quality: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name or any(ord(c) < 32 or c in "/\\" for c in self.name):
            raise TraceError(f"a selection needs a name without slashes, got {self.name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Selection) and _same(self, other)


def _check_mask(name: str, mask: MaskArrays, operator: Operator) -> None:
    for size in ("q_len", "kv_len", "is_causal"):
        mine, wanted = getattr(mask, size), getattr(operator, size)
        if mine != wanted:
            raise TraceError(f"{name}.{size} is {mine}, but the operator has {wanted}")
    if mask.batch not in (1, operator.batch):
        raise TraceError(f"{name} must have 1 or {operator.batch} sequences, got {mask.batch}")
    if operator.heads % mask.heads:
        raise TraceError(f"{name} must divide {operator.heads} heads evenly, got {mask.heads}")


def _same(one: object, other: object) -> bool:
    """Field by field, arrays by type and content."""
    names = [f.name for f in fields(cast("Workload", one))]
    return all(_equal(getattr(one, name), getattr(other, name)) for name in names)


def _equal(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return False
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    return a == b
