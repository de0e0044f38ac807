"""The CSV workloads of the SpAtten authors (mit-han-lab/spatten, spatten_hardware/workloads).

One row is one head of one layer of one generation step. The columns are described in the
repository's TestSpAtten.scala; the last line can be the path of the configuration that made it.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable
from itertools import groupby
from os import PathLike
from pathlib import Path

import numpy as np

from sparseloom.trace.errors import TraceError
from sparseloom.trace.schema import AttentionCall, ModelShape, Operator, Selection, Workload


def _whole(text: str) -> int:
    number = float(text)
    if not number.is_integer():
        raise ValueError
    return int(number)


def _truth(text: str) -> bool:
    return {"True": True, "False": False}[text]


_COLUMNS: dict[str, Callable[[str], float | int | bool]] = {
    "iteration_id": _whole,
    "layer_id": _whole,
    "head_id": _whole,
    "embedding_length_D": _whole,
    "sentence_length_L": _whole,
    "key_fetch_num": _whole,
    "quant_key_bit": _whole,
    "quant_query_bit": _whole,
    "auto_requant_thres": float,
    "if_requant": _truth,
    "auto_requant_incre": _whole,
    "value_fetch_num": _whole,
    "quant_value_bit": _whole,
    "if_accumulate_importance": _truth,
    "if_rescale_previous_importance": _truth,
    "if_topk": _truth,
    "topk": _whole,
}
_KINDS: dict[Callable[[str], float | int | bool], str] = {
    _whole: "a whole number",
    float: "a number",
    _truth: "True or False",
}
# Settings that the heads of one layer share; selection and rescaling show on one head alone.
_SHARED = (
    "embedding_length_D",
    "sentence_length_L",
    "quant_key_bit",
    "quant_query_bit",
    "auto_requant_thres",
    "auto_requant_incre",
    "quant_value_bit",
)

_Row = dict[str, float]


def read(path: str | PathLike[str], *, name: str, heads: int | None) -> tuple[Workload, Selection]:
    """The workload and the selection of one file; see `Trace.from_spatten_csv`."""
    file = Path(path)
    rows, config = _rows(file)
    seen = max(int(row["head_id"]) for row in rows) + 1
    total = seen if heads is None else heads
    if total < seen:
        raise TraceError(f"{file}: heads must be at least {seen}, got {total}")
    operators: list[Operator] = []
    calls: list[AttentionCall] = []
    for (step, layer), group in groupby(rows, lambda r: (r["iteration_id"], r["layer_id"])):
        operator, call = _call(file, int(step), int(layer), list(group), total)
        operators.append(operator)
        calls.append(call)
    places = [(operator.step, operator.layer) for operator in operators]
    if len(set(places)) < len(places):
        raise TraceError(f"{file}: the rows of a layer must stand together")
    head_dim = operators[0].head_dim
    model = ModelShape(
        layers=max(op.layer or 0 for op in operators) + 1,
        hidden_size=total * head_dim,
        heads=total,
        kv_heads=total,
        head_dim=head_dim,
        is_causal=True,
        family="gpt2",
    )
    workload = Workload(
        model, tuple(operators), name=_stem(file), scope="attention", source=config or file.name
    )
    method = {"method": "spatten_csv", "version": 1, "config": config}
    return workload, Selection(name, tuple(calls), method)


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".csv")


def _rows(file: Path) -> tuple[list[_Row], str]:
    """Parsed rows, and the configuration path of the last line ("" if there is none)."""
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except FileNotFoundError:
        raise TraceError(f"{file}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(f"{file}: cannot be read as a (gzip) text file: {error}") from None
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    header = lines[0] if lines else []
    missing = [column for column in _COLUMNS if column not in header]
    if missing:
        raise TraceError(
            f"{file}: not a SpAtten generation workload, the header lacks {', '.join(missing)}"
        )
    config = ""
    if len(lines) > 1 and len(lines[-1]) >= 1 and not any(lines[-1][1:]):
        config = lines.pop()[0]
    if len(lines) < 2:
        raise TraceError(f"{file}: there are no rows after the header")
    rows: list[_Row] = []
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise TraceError(
                f"{file}, line {number}: {len(header)} columns expected, got {len(line)}"
            )
        given = dict(zip(header, line, strict=True))
        row: _Row = {}
        for column, parse in _COLUMNS.items():
            try:
                row[column] = parse(given[column])
            except (ValueError, KeyError):
                raise TraceError(
                    f"{file}, line {number}: {column} must be {_KINDS[parse]}, "
                    f"got {given[column]!r}"
                ) from None
        rows.append(row)
    return rows, config


def _call(
    file: Path, step: int, layer: int, rows: list[_Row], heads: int
) -> tuple[Operator, AttentionCall]:
    """One attention call from the rows of its heads."""
    where = f"{file}: step {step}, layer {layer}"
    first = rows[0]
    for column in _SHARED:
        if any(row[column] != first[column] for row in rows):
            raise TraceError(f"{where}: {column} differs between heads")
    ids = np.array([int(row["head_id"]) for row in rows])
    if np.unique(ids).size < ids.size or ids.min() < 0:
        raise TraceError(f"{where}: head_id must be unique and not negative")
    if step < 0 or layer < 0 or min(first["sentence_length_L"], first["embedding_length_D"]) < 1:
        raise TraceError(f"{where}: sizes must be positive")
    length, width = int(first["sentence_length_L"]), int(first["embedding_length_D"])

    def per_head(column: str) -> np.ndarray:
        values = np.zeros((1, heads, 1), np.int64)
        values[0, ids, 0] = [int(row[column]) for row in rows]
        return values

    # One new token attends to all that precede it, so causality removes nothing.
    operator = Operator(
        kind="attention",
        role="attention",
        layer=layer,
        step=step,
        stage="decode",
        heads=heads,
        kv_heads=heads,
        q_len=1,
        kv_len=length,
        head_dim=width,
        value_dim=width,
        is_causal=True,
    )
    alive = np.zeros(heads, np.bool_)
    alive[ids] = True
    threshold = first["auto_requant_thres"]
    chosen = [int(row["topk"]) for row in rows if row["if_topk"]]
    call = AttentionCall(
        key_counts=per_head("key_fetch_num"),
        value_counts=per_head("value_fetch_num"),
        key_bits=_bits(first["quant_key_bit"]),
        value_bits=_bits(first["quant_value_bit"]),
        query_bits=_bits(first["quant_query_bit"]),
        lsb_bits=_bits(first["auto_requant_incre"]),
        lsb_threshold=None if threshold < 0 else float(threshold),
        lsb_refetch=per_head("if_requant").astype(np.bool_),
        heads_alive=None if alive.all() else alive,
        token_keep=chosen[-1] if chosen else None,
        accumulates_importance=any(row["if_accumulate_importance"] for row in rows),
        rescales_importance=any(row["if_rescale_previous_importance"] for row in rows),
    )
    try:
        call.check(operator)
    except TraceError as error:
        raise TraceError(f"{where}: {error}") from None
    return operator, call


def _bits(value: float) -> int | None:
    return int(value) if value > 0 else None
