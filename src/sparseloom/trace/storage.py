"""A trace on disk: JSON for names, Parquet for tables, safetensors for arrays.

trace.json                        schema, model, the selections' methods and quality
operators.parquet                 one row per operator
selections/NAME.parquet           one row per attention call
selections/NAME.safetensors       the arrays of each call
tensors.safetensors               key paddings and sampled tensors, if there are any
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Shaped
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sparseloom.files import fresh_folder
from sparseloom.trace import tables
from sparseloom.trace.errors import TraceError, first_problem
from sparseloom.trace.schema import ModelShape, Scope, Selection, Workload

SCHEMA = "sparseloom/trace/1"
_PADDING, _TENSOR = "paddings.", "tensors."
_LONGEST = 200  # bytes of a file name before its ending


class _Header(BaseModel):
    """The contents of trace.json."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_: Literal["sparseloom/trace/1"] = Field(alias="schema")
    name: str
    scope: Scope
    source: str
    model: ModelShape
    selections: list[_Named]


class _Named(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    method: dict[str, JsonValue]
    quality: dict[str, JsonValue]


def save(
    path: str | PathLike[str],
    workload: Workload,
    selections: Mapping[str, Selection],
    tensors: Mapping[str, Shaped[np.ndarray, "..."]],
    *,
    overwrite: bool = False,
) -> None:
    """Write everything into a folder beside `path`, then give it its name."""
    target = Path(path)
    if target.exists():
        if not overwrite:
            raise FileExistsError(f"{target} exists: pass overwrite=True to replace it")
        if not (target / "trace.json").is_file():
            raise FileExistsError(f"{target} exists and is not a trace: it is left as it is")
    with fresh_folder(target) as fresh:
        _write(fresh, workload, selections, tensors)


def load(
    path: str | PathLike[str],
) -> tuple[Workload, dict[str, Selection], dict[str, Shaped[np.ndarray, "..."]]]:
    """Read the three parts of a trace; every failure is a TraceError of one line."""
    folder = Path(path)
    if not folder.is_dir():
        what = "is not a folder" if folder.exists() else "does not exist"
        raise TraceError(f"{folder} {what}: a trace is a folder with trace.json")
    header = _read_header(folder / "trace.json")
    stored: dict[str, np.ndarray] = {}
    if (folder / "tensors.safetensors").exists():
        stored = _read_arrays(folder / "tensors.safetensors")
    with _blamed(folder / "operators.parquet"):
        operators = tables.operators_from_table(_read_table(folder / "operators.parquet"))
    with _blamed(folder / "tensors.safetensors"):
        paddings = _paddings(stored)
    with _blamed(folder):
        workload = Workload(
            header.model, operators, header.name, paddings, header.scope, header.source
        )
    selections: dict[str, Selection] = {}
    for named in header.selections:
        base = folder / "selections" / _file_name(named.name)
        arrays = _read_arrays(Path(f"{base}.safetensors"))
        with _blamed(Path(f"{base}.parquet")):
            calls = tables.calls_from_table(_read_table(Path(f"{base}.parquet")), arrays)
            selections[named.name] = Selection(named.name, calls, named.method, named.quality)
    tensors = {
        name.removeprefix(_TENSOR): array
        for name, array in stored.items()
        if name.startswith(_TENSOR)
    }
    return workload, selections, tensors


def _write(
    folder: Path,
    workload: Workload,
    selections: Mapping[str, Selection],
    tensors: Mapping[str, np.ndarray],
) -> None:
    header: dict[str, Any] = {
        "schema": SCHEMA,
        "name": workload.name,
        "scope": workload.scope,
        "source": workload.source,
        "model": workload.model.model_dump(),
        "selections": [
            {"name": s.name, "method": dict(s.method), "quality": dict(s.quality)}
            for s in selections.values()
        ],
    }
    try:
        text = json.dumps(header, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TraceError(f"method or quality of a selection is not JSON: {error}") from None
    (folder / "trace.json").write_text(text + "\n", encoding="utf-8")
    pq.write_table(tables.operators_to_table(workload.operators), folder / "operators.parquet")
    (folder / "selections").mkdir()
    for selection in selections.values():
        base = folder / "selections" / _file_name(selection.name)
        table, arrays = tables.calls_to_table(selection.calls)
        pq.write_table(table, f"{base}.parquet")
        save_file(arrays, f"{base}.safetensors")
    stored = {f"{_PADDING}{i}": array for i, array in enumerate(workload.paddings)}
    stored |= {f"{_TENSOR}{name}": array for name, array in tensors.items()}
    if stored:
        contiguous = {name: np.ascontiguousarray(array) for name, array in stored.items()}
        save_file(contiguous, folder / "tensors.safetensors")


def _file_name(selection: str) -> str:
    quoted = quote(selection, safe=" =,+@")
    if len(quoted) <= _LONGEST:
        return quoted
    # File systems take 255 bytes; what the cut loses is told apart by a hash.
    digest = hashlib.sha256(selection.encode()).hexdigest()[:16]
    return f"{quoted[: _LONGEST - 17]}~{digest}"


def _read_header(file: Path) -> _Header:
    with _blamed(file):
        text = file.read_text(encoding="utf-8")
        data = json.loads(text)
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise TraceError(f"schema {found!r} is not {SCHEMA!r}, the one this version reads")
        return _Header.model_validate_json(text)


def _read_table(file: Path) -> pa.Table:
    # Not read_table: it would take folders named key=value above the trace for columns.
    with pq.ParquetFile(file) as parquet:
        return parquet.read()


def _read_arrays(file: Path) -> dict[str, np.ndarray]:
    with _blamed(file):
        return load_file(os.fspath(file))


def _paddings(stored: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    count = sum(name.startswith(_PADDING) for name in stored)
    found = tuple(stored[f"{_PADDING}{i}"] for i in range(count) if f"{_PADDING}{i}" in stored)
    if len(found) < count or any(a.dtype != np.bool_ or a.ndim != 2 for a in found):
        raise TraceError("paddings must be numbered from 0 and boolean with 2 axes")
    return found


@contextmanager
def _blamed(file: Path) -> Generator[None]:
    """Turn what reading a file can raise into one line that names it."""
    try:
        yield
    except FileNotFoundError:
        raise TraceError(f"{file} is missing") from None
    except ValidationError as error:
        raise TraceError(f"{file}: {first_problem(error)}") from None
    except TraceError as error:
        raise TraceError(f"{file}: {error}") from None
    except (OSError, ValueError, SafetensorError, pa.ArrowException) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise TraceError(f"{file}: cannot be read, {lines[0]}") from None
