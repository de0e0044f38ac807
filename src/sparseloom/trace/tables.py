"""The two tables of a trace as Arrow: operators, and the attention calls of a selection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from sparseloom.trace.errors import TraceError, first_problem
from sparseloom.trace.masks import MaskArrays
from sparseloom.trace.schema import AttentionCall, Operator, PredictorShape

Arrays = dict[str, np.ndarray]

_TYPES = {"kind": pa.string(), "role": pa.string(), "stage": pa.string(), "is_causal": pa.bool_()}
OPERATORS = pa.schema([(name, _TYPES.get(name, pa.int64())) for name in Operator.model_fields])

_SCALARS = {
    "key_bits": pa.int64(),
    "value_bits": pa.int64(),
    "query_bits": pa.int64(),
    "lsb_bits": pa.int64(),
    "lsb_threshold": pa.float64(),
    "token_keep": pa.int64(),
    "accumulates_importance": pa.bool_(),
    "rescales_importance": pa.bool_(),
}
_PREDICTOR = {"predictor_head_dim": pa.int64(), "predictor_bits": pa.int64()}
_MASK = {
    "rows": pa.int64(),
    "keys": pa.int64(),
    "q_len": pa.int64(),
    "kv_len": pa.int64(),
    "is_causal": pa.bool_(),
}
_MASKS = ("mask", "value_mask")
_ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "key_counts": (np.int64, 3),
    "value_counts": (np.int64, 3),
    "lsb_refetch": (np.bool_, 3),
    "tokens_alive": (np.bool_, 2),
    "heads_alive": (np.bool_, 1),
    "regions": (np.uint64, 1),
}
CALLS = pa.schema(
    [
        *((f"{mask}_{column}", kind) for mask in _MASKS for column, kind in _MASK.items()),
        *_PREDICTOR.items(),
        *_SCALARS.items(),
    ]
)


def operators_to_table(operators: tuple[Operator, ...]) -> pa.Table:
    """One row per operator, one column per field."""
    return pa.Table.from_pylist([op.model_dump() for op in operators], schema=OPERATORS)


def operators_from_table(table: pa.Table) -> tuple[Operator, ...]:
    """The operators of a table; a TraceError names the row that is wrong."""
    _expect(table, OPERATORS)
    found: list[Operator] = []
    for i, row in enumerate(table.to_pylist()):
        try:
            found.append(Operator.model_validate(row))
        except ValidationError as error:
            raise TraceError(f"row {i}: {first_problem(error)}") from None
    return tuple(found)


def calls_to_table(calls: tuple[AttentionCall, ...]) -> tuple[pa.Table, Arrays]:
    """One row per call for what is a number, and the arrays by `calls.I.FIELD`."""
    rows: list[dict[str, object]] = []
    arrays: Arrays = {}
    for i, call in enumerate(calls):
        row: dict[str, object] = {name: getattr(call, name) for name in _SCALARS}
        if call.predictor is not None:
            row["predictor_head_dim"] = call.predictor.head_dim
            row["predictor_bits"] = call.predictor.bits
        for name in _MASKS:
            mask: MaskArrays | None = getattr(call, name)
            if mask is None:
                continue
            row[f"{name}_rows"], row[f"{name}_keys"] = mask.block_size
            row |= {f"{name}_{k}": getattr(mask, k) for k in ("q_len", "kv_len", "is_causal")}
            arrays[f"calls.{i}.{name}.indices"] = mask.indices
            arrays[f"calls.{i}.{name}.offsets"] = mask.offsets
        for name in _ARRAYS:
            array = getattr(call, name)
            if array is not None:
                arrays[f"calls.{i}.{name}"] = array
        rows.append(row)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return pa.Table.from_pylist(rows, schema=CALLS), contiguous


def calls_from_table(
    table: pa.Table, arrays: Mapping[str, np.ndarray]
) -> tuple[AttentionCall, ...]:
    """The calls of a selection; a TraceError names the call that is wrong."""
    _expect(table, CALLS)
    left = dict(arrays)
    calls: list[AttentionCall] = []
    for i, row in enumerate(table.to_pylist()):
        try:
            calls.append(_call(f"calls.{i}", row, left))
        except TraceError as error:
            raise TraceError(f"call {i}: {error}") from None
    if left:
        raise TraceError(f"array {min(left)} belongs to no call")
    return tuple(calls)


def _call(prefix: str, row: dict[str, Any], left: Arrays) -> AttentionCall:
    call = AttentionCall(**{name: row[name] for name in _SCALARS})
    for name in _MASKS:
        if row[f"{name}_rows"] is None:
            continue
        parts = {column: row[f"{name}_{column}"] for column in _MASK}
        absent = [column for column, value in parts.items() if value is None]
        absent += [part for part in ("indices", "offsets") if f"{prefix}.{name}.{part}" not in left]
        if absent:
            raise TraceError(f"{name} lacks {', '.join(absent)}")
        mask = MaskArrays(
            _take(left, f"{prefix}.{name}.indices", np.int32, 1),
            _take(left, f"{prefix}.{name}.offsets", np.int64, 3),
            (parts["rows"], parts["keys"]),
            parts["q_len"],
            parts["kv_len"],
            parts["is_causal"],
        )
        call = replace(call, **{name: mask})
    found = {
        name: _take(left, f"{prefix}.{name}", kind, axes)
        for name, (kind, axes) in _ARRAYS.items()
        if f"{prefix}.{name}" in left
    }
    if row["predictor_head_dim"] is not None:
        try:
            shape = PredictorShape(head_dim=row["predictor_head_dim"], bits=row["predictor_bits"])
        except ValidationError as error:
            raise TraceError(f"predictor {first_problem(error)}") from None
        call = replace(call, predictor=shape)
    return replace(call, **found)


def _take(left: Arrays, name: str, kind: type[np.generic], axes: int) -> np.ndarray:
    array = left.pop(name)
    if array.dtype != kind or array.ndim != axes:
        raise TraceError(
            f"{name} must be {np.dtype(kind)} with {axes} axes, got {array.dtype} with {array.ndim}"
        )
    return array


def _expect(table: pa.Table, schema: pa.Schema) -> None:
    """The same columns of the same types, in any order."""
    wrong = [
        field.name
        for field in schema
        if field.name not in table.schema.names or table.schema.field(field.name).type != field.type
    ]
    wrong += [name for name in table.schema.names if name not in schema.names]
    if wrong:
        raise TraceError(f"missing, unknown or mistyped columns: {', '.join(wrong)}")
