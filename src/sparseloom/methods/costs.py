"""The cost rule: run dense where selecting first would take longer, from times measured here.

A call that may select pays for prediction and selection, and then for the kept pairs; dense
attention pays for all of them.  Each of the three is a sum of terms (a fixed part, rows, pairs …)
times coefficients that `sparseloom bench --calibrate` fits to measured times.  Coefficients are
in units of one dense fp32 pair and dimension, so that a table made on one machine tells when to
be sparse on another with the same instructions; the package ships such tables, and those of
this very processor come first.

Only the method layer uses the rule: a mask that is given is always computed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sparseloom import files
from sparseloom.kernels import available_backends, prediction
from sparseloom.methods.base import AttentionInputs, AttentionShape, Selector, Work
from sparseloom.results import machine_facts

SCHEMA = "sparseloom/costs/1"
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MARGIN = 0.85
"""Selecting pays while its expected time is at most this multiple of the dense one: forecasts err
by a quarter, and being dense where both take as long costs nothing.  It is the largest twentieth at
which no call that the table of AMX was fitted to runs sparse and takes over 1.1 times as long; with
that of AVX2, `benchmarks/costs.py --check` has seen one in forty, by three hundredths."""

MINIMUM_QUERIES = 17
"""With fewer queries nothing was measured: `decode_attention` is made for them."""

Terms = Mapping[str, float]


class CostTable(BaseModel):
    """Coefficients of one machine.  Blocks are written as "8x1".

    Attributes:
        cpu: name of the processor, or of the card.
        tier: instruction set of the CPU backend that they hold for, or the card's ("sm_90").
        unit_seconds: what one dense fp32 pair and dimension took there, in the longest call; on a
            card, one of the first dtype.
        dense: by dtype.
        attend: attention under a mask, by dtype and block.
        select: prediction and selection, by block.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    cpu: str
    tier: str
    threads: int = Field(ge=1)
    date: str
    command: str
    versions: dict[str, str]
    unit_seconds: float = Field(gt=0)
    dense: dict[str, dict[str, float]]
    attend: dict[str, dict[str, dict[str, float]]]
    select: dict[str, dict[str, float]]


class CostFile(BaseModel):
    """What `costs.json` of the package and `calibration.json` of a user hold."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, populate_by_name=True
    )

    schema_: Literal["sparseloom/costs/1"] = Field(default=SCHEMA, alias="schema")
    tables: list[CostTable]


@dataclass(frozen=True, slots=True)
class Expected:
    """Expected seconds of one attention call."""

    dense: float
    select: float
    attend: float

    @property
    def ratio(self) -> float:
        """Selecting and attending over dense."""
        return (self.select + self.attend) / self.dense


# ---------------------------------------------------------------------------- the rule


def pays(method: Selector, inputs: AttentionInputs) -> bool:
    """Whether selecting is expected to be no slower than running the call dense.

    It has a say only in calls that a table describes.  Otherwise:

    - a method without `work`, gradients (what is learned must not depend on the speed of a
      machine), a card that was not measured (`sparseloom bench --device cuda --calibrate`), or
      another device: select;
    - no CPU backend, or a dtype, predictor or rule that it does not take: run dense, because the
      reference computes every score anyway; on a measured card likewise, and blocks that are
      smaller than all that were measured;
    - at most 16 queries, as in decoding: run dense.  Looking through the keys of a cache costs
      as much as reading them.
    """
    work = method.work(inputs.shape)
    device = inputs.query.device.type
    if work is None or device not in ("cpu", "cuda") or _needs_grad(inputs):
        return True
    table = table_in_use() if device == "cpu" else table_of_card()
    if table is None and device == "cuda":
        return True
    dtype = _dtype_of(inputs)
    if table is None or dtype not in table.dense or inputs.query.shape[2] < MINIMUM_QUERIES:
        return False
    unsupported = prediction.unsupported(work.bits, work.width, inputs.query.device)
    if unsupported is not None or not work.compiled:
        return False
    if not all(_fit(work.block_size, known) for known in (table.attend[dtype], table.select)):
        return False
    return expected(table, inputs.shape, work, dtype).ratio <= MARGIN


def expected(table: CostTable, shape: AttentionShape, work: Work, dtype: str) -> Expected:
    """Expected times of a call in `dtype` ("float32", "bfloat16", "float16").

    Blocks that were not measured count as the largest measured ones that fit into them.

    Raises:
        ValueError: the table does not know the dtype.
    """
    if dtype not in table.dense:
        raise ValueError(f"dtype must be one of {', '.join(table.dense)}, got {dtype!r}")
    unit = table.unit_seconds
    attend, select = table.attend[dtype], table.select
    return Expected(
        dense=unit * _dot(table.dense[dtype], dense_terms(shape)),
        select=unit * _dot(select[fitting(work.block_size, select)], select_terms(shape, work)),
        attend=unit * _dot(attend[fitting(work.block_size, attend)], attend_terms(shape, work)),
    )


def table_in_use() -> CostTable | None:
    """The table for this processor and the tier that the CPU backend runs with.

    A user's own table of the same processor and tier comes first (of several, the one with the
    number of threads in use); then the shipped one of the tier, or of the next narrower tier.
    None without the CPU backend.
    """
    if available_backends().get("cpu", "not part of this version") is not None:
        return None
    from sparseloom.kernels.cpu import native

    tier = native.active_tier()
    own = [t for t in read_tables(user_file()) if (t.cpu, t.tier) == (_cpu(), tier)]
    threads = torch.get_num_threads()
    if own:
        return min(own, key=lambda table: abs(table.threads - threads))
    shipped = {table.tier: table for table in _shipped()}
    known = native.TIERS[: native.TIERS.index(tier) + 1]
    return next((shipped[name] for name in reversed(known) if name in shipped), None)


def table_of_card() -> CostTable | None:
    """The user's own table of the current CUDA device; None where it was not measured.

    None is shipped: nothing of a card is known before it is measured.
    """
    if not torch.cuda.is_available():
        return None
    card = (torch.cuda.get_device_name(), tier_of_card())
    return next((t for t in read_tables(user_file()) if (t.cpu, t.tier) == card), None)


def tier_of_card() -> str:
    """The architecture of the current CUDA device, as "sm_90"."""
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def forecast(
    method: Selector, shape: AttentionShape, dtype: str, table: CostTable | None = None
) -> Expected | None:
    """What the rule expects of `method` in such a call; None where it has no say."""
    table = table_in_use() if table is None else table
    work = method.work(shape)
    if table is None or work is None or dtype not in table.dense:
        return None
    return expected(table, shape, work, dtype)


def crossover(method: Selector, shape: AttentionShape, dtype: str) -> float | None:
    """The least sparsity, in steps of 0.01, from which on the rule lets `method` select.

    None where it never does, or has no say.
    """
    least = None
    for step in range(99, -1, -1):
        found = forecast(_at(method, step / 100), shape, dtype)
        if found is None or found.ratio > MARGIN:
            break
        least = step / 100
    return least


def _at(method: Selector, sparsity: float) -> Selector:
    changes: dict[str, Any] = {"sparsity": sparsity}
    return dataclasses.replace(method, **changes)  # pyright: ignore[reportArgumentType]


# ---------------------------------------------------------------------------- terms


def dense_terms(shape: AttentionShape) -> dict[str, float]:
    """Terms of dense attention: the call, its rows, its pairs."""
    heads = shape.batch * shape.heads
    return {
        "call": 1.0,
        "rows": float(heads * (shape.q_len + shape.kv_len) * shape.head_dim),
        "pairs": float(heads * shape.allowed_pairs * shape.head_dim),
    }


def attend_terms(shape: AttentionShape, work: Work) -> dict[str, float]:
    """Terms of attention under a mask: the call, its rows, its kept pairs."""
    heads = shape.batch * shape.heads
    bq, bk = work.block_size
    return {
        "call": 1.0,
        "rows": float(heads * (shape.q_len + shape.kv_len) * shape.head_dim),
        "pairs": float(heads * work.kept_blocks * bq * bk * shape.head_dim),
    }


def select_terms(shape: AttentionShape, work: Work) -> dict[str, float]:
    """Terms of prediction and selection: the call, the projection of the tokens, the predicted
    scores, the pairs to choose among, the blocks that are kept."""
    heads = shape.batch * shape.heads
    return {
        "call": 1.0,
        "project": float(shape.batch * shape.q_len * shape.hidden_size * shape.heads * work.width),
        "scores": float(heads * shape.allowed_pairs * work.width),
        "pairs": float(heads * shape.allowed_pairs),
        "entries": float(heads * work.kept_blocks),
    }


def fitting(block_size: tuple[int, int], known: Mapping[str, object]) -> str:
    """The largest known block that fits into `block_size`."""
    fit = _fit(block_size, known)
    if not fit:
        raise ValueError(f"no block of {', '.join(known)} fits into {block_size}")
    return max(fit, key=lambda name: math.prod(_block(name)))


def _fit(block_size: tuple[int, int], known: Mapping[str, object]) -> list[str]:
    """Known blocks that fit into `block_size`."""
    sizes = {name: _block(name) for name in known}
    return [name for name, (q, k) in sizes.items() if q <= block_size[0] and k <= block_size[1]]


# ---------------------------------------------------------------------------- tables


def user_file() -> Path:
    """Where `sparseloom bench --calibrate` keeps its tables: $SPARSELOOM_CALIBRATION, else
    calibration.json in $XDG_CACHE_HOME/sparseloom (~/.cache/sparseloom)."""
    return files.user_file("calibration.json", variable="SPARSELOOM_CALIBRATION")


def save_table(table: CostTable, path: Path | None = None) -> Path:
    """Put a table among the user's, in place of an older one of the same machine and threads."""
    path = user_file() if path is None else path
    same = (table.cpu, table.tier, table.threads)
    others = [t for t in read_tables(path) if (t.cpu, t.tier, t.threads) != same]
    write_tables(path, [*others, table])
    return path


def write_tables(path: Path, tables: Sequence[CostTable]) -> None:
    """Write tables as one file, whole or not at all."""
    text = CostFile(tables=list(tables)).model_dump_json(by_alias=True, indent=1) + "\n"
    with files.fresh_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")


def read_tables(path: Path) -> tuple[CostTable, ...]:
    """The tables of a file; none where there is no file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        stamp = path.stat().st_mtime_ns
    except OSError:
        return ()
    return _read(path, stamp)


@functools.lru_cache(maxsize=4)
def _read(path: Path, stamp: int) -> tuple[CostTable, ...]:
    del stamp  # another content is another entry
    return _parse(path.read_text("utf-8"), str(path))


@functools.cache
def _shipped() -> tuple[CostTable, ...]:
    file = resources.files("sparseloom.methods").joinpath("costs.json")
    return _parse(file.read_text("utf-8"), "costs.json of the package")


def _parse(text: str, where: str) -> tuple[CostTable, ...]:
    try:
        return tuple(CostFile.model_validate(json.loads(text)).tables)
    except (ValidationError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{where} holds no cost tables ({reason}): remove it, or make it anew with "
            "`sparseloom bench --calibrate`"
        ) from None


@functools.cache
def _cpu() -> str:
    return machine_facts().cpu


def _dot(coefficients: Terms, terms: Terms) -> float:
    return sum(factor * terms[name] for name, factor in coefficients.items())


def _block(name: str) -> tuple[int, int]:
    rows, _, columns = name.partition("x")
    return int(rows), int(columns)


def _needs_grad(inputs: AttentionInputs) -> bool:
    tensors = (inputs.query, inputs.key, inputs.value)
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _dtype_of(inputs: AttentionInputs) -> str | None:
    dtype, device = inputs.query.dtype, inputs.query.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    return DTYPES.get(dtype)
