"""The one machine-readable shape of every result: `--json` output and the files in results/.

`{"schema": "sparseloom/results/1", "command", "date", "machine", "versions", "rows"}`. A row is
told by a key that only its kind has: `paper` (reproduce), `op` (bench), `machine` (simulate),
`task` (compare, demo), else `record` names what it is. Keys beyond those listed are allowed.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata, resources
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationError,
)

from sparseloom.files import fresh_file

SCHEMA = "sparseloom/results/1"
_PACKAGES = ("sparseloom", "torch", "transformers", "numpy", "numba", "safetensors", "pyarrow")
# Vector and matrix extensions that decide how fast attention runs; the rest of a CPU's flags
# would fill a page.
_ISA = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl"),
    *("avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "sve", "sve2", "i8mm", "bf16"),
)

Basis = Literal["identity", "calibrated", "predicted", "scenario"]
Number = int | float


def _iso(text: str) -> str:
    datetime.fromisoformat(text)
    return text


class _Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Row(_Shape):
    # Rows may carry more than the contract lists; what it lists has one type.
    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)
    __pydantic_extra__: dict[str, JsonValue] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride]


class CompareRow(_Row):
    """One method on one task. Times are in milliseconds, cycles by machine."""

    model: str
    task: str
    method: str
    settings: dict[str, JsonValue] | None = None
    sparsity: Number | None = None
    density: Number | None = None
    metric: str
    value: Number | None
    dense_value: Number | None = None
    macs: Number | None = None
    attention_ms: Number | None = None
    model_ms: Number | None = None
    dense_attention_ms: Number | None = None
    dense_model_ms: Number | None = None
    prediction_accuracy: Number | list[Number | None] | None = None
    cycles: dict[str, Number | None] | None = None
    seed: int | None = None


class BenchRow(_Row):
    """One timed operation. `path` is "given" (the mask is given), "whole" (it is chosen within
    the time) or "select" (choosing alone)."""

    op: str
    path: Literal["given", "whole", "select"]
    passes: Literal["forward", "forward+backward"] = "forward"
    contender: str | None = None
    q_len: int
    kv_len: int
    heads: int
    kv_heads: int | None = None
    head_dim: int
    block_size: list[int] | None = None
    sparsity: Number | None = None
    dtype: str
    causal: bool
    ms: Number
    spread: Number | list[Number] | None = None
    baseline: str | None = None
    baseline_ms: Number | None = None
    speedup: Number | None = None
    gflops: Number | None = None
    gbytes_s: Number | None = None
    peak_fraction: Number | None = None
    peak_bytes: int | None = None
    extra_bytes: int | None = None


class SimulateRow(_Row):
    """One selection of a trace on one machine. Energy by component in joules, area in mm²."""

    machine: str
    trace: str
    selection: str
    value: Number | None = None
    dense_value: Number | None = None
    scope: Literal["model", "attention"]
    fidelity: Literal["analytic", "cycle", "rtl"]
    cycles: int
    latency_cycles: int
    seconds: Number
    energy_j: dict[str, Number]
    energy_table: str
    area_mm2: Number | None = None
    dram_preset: str | None = None
    dram_bytes: int | None = None
    useful_bytes: int | None = None
    row_hits: Number | None = None
    utilisation: dict[str, Number]
    stalls: dict[str, int]
    config_hash: str
    seed: int | None = None
    assumptions: list[str]


class ReproduceRow(_Row):
    """One published number beside ours. `within` is None where nothing is claimed."""

    paper: str
    table: str
    quantity: str
    published: Number | str | None
    ours: Number | str | None
    difference: Number | None = None
    tolerance: Number | None = None
    within: bool | None = None
    basis: Basis
    assumptions: list[str] = Field(default_factory=list[str])
    note: str | None = None


class RecordRow(_Row):
    """Anything else that a command reports: a backend, a training run, a written trace."""

    record: str


def _kind(row: object) -> str | None:
    keys: set[str] = set()
    if isinstance(row, Mapping):
        keys = {str(key) for key in row}
    elif isinstance(row, _Row):
        keys = set(type(row).model_fields)
    for key in ("paper", "op", "machine", "task", "record"):
        if key in keys:
            return key
    return None


Row = Annotated[
    Annotated[ReproduceRow, Tag("paper")]
    | Annotated[BenchRow, Tag("op")]
    | Annotated[SimulateRow, Tag("machine")]
    | Annotated[CompareRow, Tag("task")]
    | Annotated[RecordRow, Tag("record")],
    Discriminator(
        _kind,
        custom_error_type="row_kind",
        custom_error_message="a row needs one of the keys paper, op, machine, task, record",
    ),
]


class MachineFacts(_Shape):
    """Where a result was made."""

    cpu: str
    threads: int = Field(ge=1)
    isa: list[str]
    gpu: str | None = None


class ResultsFile(_Shape):
    """What one command reports, with all that is needed to judge it."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True, title=SCHEMA
    )

    schema_: Literal["sparseloom/results/1"] = Field(default=SCHEMA, alias="schema")
    command: str
    date: Annotated[str, AfterValidator(_iso), Field(json_schema_extra={"format": "date-time"})]
    machine: MachineFacts
    versions: dict[str, str]
    rows: list[Row]

    def to_json(self) -> str:
        """The file's text; keys that do not apply to a row are left out."""
        data = self.model_dump(by_alias=True, exclude_unset=True) | {"schema": SCHEMA}
        ordered = {name.rstrip("_"): data[name.rstrip("_")] for name in type(self).model_fields}
        return json.dumps(ordered, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def results(rows: Sequence[Mapping[str, Any]], *, command: str | None = None) -> ResultsFile:
    """Rows with today's date, this machine and the versions in use.

    Args:
        rows: as the module describes them.
        command: what produced them; default the command line of this process.

    Raises:
        ValueError: the first row and key that the schema forbids.
    """
    line = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if command is None else command
    return validate_results(
        {
            "schema": SCHEMA,
            "command": line,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine_facts().model_dump(),
            "versions": versions(),
            "rows": [_plain(row) for row in rows],
        }
    )


def module_command(name: str) -> str:
    """The command line of this process, run as the module `name`: `python -m NAME …`."""
    return shlex.join(["python", "-m", name, *sys.argv[1:]])


def validate_results(data: Mapping[str, Any]) -> ResultsFile:
    """Check what a results file holds.

    Raises:
        ValueError: one line with the place, what is wrong and what was given.
    """
    try:
        return ResultsFile.model_validate(dict(data))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "the whole"
        given = repr(problem.get("input"))
        shown = given if len(given) <= 60 else given[:57] + "..."
        raise ValueError(f"results: {where}: {problem['msg']}, got {shown}") from None


def write_results(
    path: str | PathLike[str],
    rows: Sequence[Mapping[str, Any]] | ResultsFile,
    *,
    command: str | None = None,
) -> ResultsFile:
    """Check rows and write them as one JSON file, whole or not at all.

    Raises:
        ValueError: a row that the schema forbids; nothing is written.
    """
    found = rows if isinstance(rows, ResultsFile) else results(rows, command=command)
    text = found.to_json()
    with fresh_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")
    return found


def read_results(path: str | PathLike[str]) -> ResultsFile:
    """Read and check a results file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON, or not a results file.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"an object is expected, got {type(data).__name__}")
        return validate_results(data)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a results file, from the models above."""
    schema = ResultsFile.model_json_schema(by_alias=True)
    items = schema["properties"]["rows"]["items"]
    # A row may carry the key of another kind as an extra, and would then fit twice.
    items["anyOf"] = items.pop("oneOf")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def shipped_schema() -> dict[str, Any]:
    """The same schema as it stands in the package, for tools that do not run Python."""
    text = resources.files("sparseloom").joinpath("results.schema.json").read_text("utf-8")
    return json.loads(text)


def machine_facts() -> MachineFacts:
    """This machine: CPU name, threads in use, vector extensions, GPU. Never loads torch."""
    torch = sys.modules.get("torch")
    threads = torch.get_num_threads() if torch is not None else _usable_cpus()
    flags = set(_cpuinfo("flags", "Features").split())
    return MachineFacts(
        cpu=_cpuinfo("model name", "Model") or platform.processor() or platform.machine(),
        threads=int(threads),
        isa=[flag for flag in _ISA if flag in flags] or [platform.machine()],
        gpu=_gpu(),
    )


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, where installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if "sparseloom" not in found:
        from sparseloom import __version__

        found["sparseloom"] = __version__
    return found


def _plain(value: Any) -> Any:
    """Tuples as lists and array scalars as Python numbers, which is all that JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpuinfo(*names: str) -> str:
    """The first of these fields in /proc/cpuinfo, or "" (other systems have no such file)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    return next((fields[name] for name in names if name in fields), "")


def _gpu() -> str | None:
    """The first GPU's name: from torch if it is loaded anyway, else from the driver's files."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(0))
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.partition(":")[2].strip()
    return None
