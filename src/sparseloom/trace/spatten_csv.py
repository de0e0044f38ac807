"""The CSV workloads of the SpAtten authors (mit-han-lab/spatten, spatten_hardware/workloads).

One row is one head of one layer of one generation step. The columns are described in the
repository's TestSpAtten.scala; the last line can be the path of the configuration that made it.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from os import PathLike
from pathlib import Path

import numpy as np

from sparseloom.files import fresh_file
from sparseloom.trace.errors import TraceError
from sparseloom.trace.schema import AttentionCall, ModelShape, Operator, Selection, Workload

_WHOLE, _NUMBER, _TRUTH = "a whole number", "a number", "True or False"
_COLUMNS = {
    "iteration_id": _WHOLE,
    "layer_id": _WHOLE,
    "head_id": _WHOLE,
    "embedding_length_D": _WHOLE,
    "sentence_length_L": _WHOLE,
    "key_fetch_num": _WHOLE,
    "quant_key_bit": _WHOLE,
    "quant_query_bit": _WHOLE,
    "auto_requant_thres": _NUMBER,
    "if_requant": _TRUTH,
    "auto_requant_incre": _WHOLE,
    "value_fetch_num": _WHOLE,
    "quant_value_bit": _WHOLE,
    "if_accumulate_importance": _TRUTH,
    "if_rescale_previous_importance": _TRUTH,
    "if_topk": _TRUTH,
    "topk": _WHOLE,
}
_TRUTHS = {"True": 1.0, "False": 0.0}
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

_Table = dict[str, np.ndarray]


def read(path: str | PathLike[str], *, name: str, heads: int | None) -> tuple[Workload, Selection]:
    """The workload and the selection of one file; see `Trace.from_spatten_csv`."""
    file = Path(path)
    table, config = _table(file)
    seen = int(table["head_id"].max()) + 1
    total = seen if heads is None else heads
    if total < seen:
        raise TraceError(f"{file}: heads must be at least {seen}, got {total}")
    operators: list[Operator] = []
    calls: list[AttentionCall] = []
    place = np.stack([table["iteration_id"], table["layer_id"]])
    starts = np.flatnonzero((np.diff(place, axis=1) != 0).any(axis=0)) + 1
    for rows in np.split(np.arange(place.shape[1]), starts):
        one = {column: values[rows] for column, values in table.items()}
        operator, call = _call(file, one, total)
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


def write(path: str | PathLike[str], workload: Workload, selection: Selection) -> None:
    """Write the generation steps of a selection; see `Trace.to_spatten_csv`."""
    file = Path(path)
    steps = [
        (operator, call)
        for operator, call in zip(workload.attention(), selection.calls, strict=True)
        if operator.stage == "decode"
    ]
    if not steps:
        raise TraceError(
            f"{workload.name} has no generation steps, and the format knows nothing else"
        )
    numbers = {step: i for i, step in enumerate(sorted({op.step for op, _ in steps}))}
    text = io.StringIO(newline="")
    out = csv.writer(text, lineterminator="\n")
    out.writerow(_COLUMNS)
    for operator, call in steps:
        if operator.batch != 1 or operator.q_len != 1:
            raise TraceError(
                f"step {operator.step}, layer {operator.layer}: the format has one sequence and "
                f"one query, got {operator.batch} and {operator.q_len}"
            )
        out.writerows(_lines(numbers[operator.step], operator, call, workload))
    config = selection.method.get("config", selection.name)
    if config:
        out.writerow([config, *[""] * (len(_COLUMNS) - 1)])
    data = text.getvalue().encode("utf-8")
    with fresh_file(file) as fresh:
        fresh.write_bytes(gzip.compress(data, mtime=0) if file.suffix == ".gz" else data)


def _lines(
    step: int, operator: Operator, call: AttentionCall, workload: Workload
) -> list[list[object]]:
    """The rows of the heads that are alive; selection and rescaling stand on the last one."""
    padding = workload.padding_of(operator)
    keys = call.kept_pairs(operator, padding)[0]
    values = call.value_pairs(operator, padding)[0]
    low = np.zeros(operator.heads, np.bool_)
    if call.lsb_refetch is not None:
        low = call.lsb_refetch[0, :, 0]
    alive = np.arange(operator.heads)
    if call.heads_alive is not None:
        alive = np.flatnonzero(call.heads_alive)
    threshold = -1 if call.lsb_threshold is None else call.lsb_threshold
    keep = -1 if call.token_keep is None else call.token_keep
    found: list[list[object]] = []
    for head in alive.tolist():
        last = head == alive[-1]
        found.append(
            [step, operator.layer or 0, head, float(operator.head_dim), operator.kv_len,
             int(keys[head]), call.key_bits or -1, call.query_bits or -1, threshold,
             bool(low[head]), call.lsb_bits or -1, int(values[head]), call.value_bits or -1,
             call.accumulates_importance, call.rescales_importance and last,
             last and call.token_keep is not None, keep if last else -1]
        )  # fmt: skip
    return found


def _stem(file: Path) -> str:
    return file.name.removesuffix(".gz").removesuffix(".csv")


def _table(file: Path) -> tuple[_Table, str]:
    """Columns by name, and the configuration path of the last line ("" if there is none)."""
    try:
        raw = file.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8")
    except FileNotFoundError:
        raise TraceError(f"{file}: no such file") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TraceError(f"{file}: cannot be read as a (gzip) text file: {error}") from None
    lines = [line for line in csv.reader(io.StringIO(text)) if line]
    header = lines[0] if lines else []
    missing = [column for column in _COLUMNS if column not in header]
    if missing:
        raise TraceError(
            f"{file}: not a SpAtten generation workload, the header lacks {', '.join(missing)}"
        )
    config = ""
    if len(lines) > 1 and not any(lines[-1][1:]):
        config = lines.pop()[0]
    if len(lines) < 2:
        raise TraceError(f"{file}: there are no rows after the header")
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(header):
            raise TraceError(
                f"{file}, line {number}: {len(header)} columns expected, got {len(line)}"
            )
    cells = dict(zip(header, zip(*lines[1:], strict=True), strict=True))
    return {name: _column(file, name, cells[name]) for name in _COLUMNS}, config


def _column(file: Path, name: str, cells: tuple[str, ...]) -> np.ndarray:
    kind = _COLUMNS[name]
    found: list[float] = []
    for cell in cells:
        try:
            found.append(_TRUTHS[cell] if kind is _TRUTH else float(cell))
        except (KeyError, ValueError):
            found.append(np.nan)
    values = np.array(found)
    wrong = ~np.isfinite(values)
    if kind is _WHOLE:
        wrong |= values != np.floor(values)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise TraceError(f"{file}, line {row + 2}: {name} must be {kind}, got {cells[row]!r}")
    return values if kind is _NUMBER else values.astype(np.bool_ if kind is _TRUTH else np.int64)


def _call(file: Path, rows: _Table, heads: int) -> tuple[Operator, AttentionCall]:
    """One attention call from the rows of its heads."""
    first = {column: values[0].item() for column, values in rows.items()}
    step, layer = first["iteration_id"], first["layer_id"]
    where = f"{file}: step {step}, layer {layer}"
    for column in _SHARED:
        if (rows[column] != first[column]).any():
            raise TraceError(f"{where}: {column} differs between heads")
    ids = rows["head_id"]
    if np.unique(ids).size < ids.size or ids.min() < 0:
        raise TraceError(f"{where}: head_id must be unique and not negative")
    length, width = first["sentence_length_L"], first["embedding_length_D"]
    if min(step, layer) < 0 or min(length, width) < 1:
        raise TraceError(f"{where}: sizes must be positive")

    def per_head(column: str) -> np.ndarray:
        values = np.zeros((1, heads, 1), rows[column].dtype)
        values[0, ids, 0] = rows[column]
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
    chosen = rows["topk"][rows["if_topk"]]
    call = AttentionCall(
        key_counts=per_head("key_fetch_num"),
        value_counts=per_head("value_fetch_num"),
        key_bits=_bits(first["quant_key_bit"]),
        value_bits=_bits(first["quant_value_bit"]),
        query_bits=_bits(first["quant_query_bit"]),
        lsb_bits=_bits(first["auto_requant_incre"]),
        lsb_threshold=None if threshold < 0 else threshold,
        lsb_refetch=per_head("if_requant"),
        heads_alive=None if alive.all() else alive,
        token_keep=int(chosen[-1]) if chosen.size else None,
        accumulates_importance=bool(rows["if_accumulate_importance"].any()),
        rescales_importance=bool(rows["if_rescale_previous_importance"].any()),
    )
    try:
        call.check(operator)
    except TraceError as error:
        raise TraceError(f"{where}: {error}") from None
    return operator, call


def _bits(value: int) -> int | None:
    return value if value > 0 else None
