"""What `sparseloom bench` shows and writes: columns, the peaks in a line, JSON, CSV and a page."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sparseloom.cli.output import Column, Row, number, percent, value

if TYPE_CHECKING:
    from sparseloom.results import ResultsFile


def write(found: ResultsFile, out: Path | None, plot: Path | None) -> list[str]:
    """Write the results where they were asked for; the files written."""
    from sparseloom.results import write_results

    if out is not None and out.suffix == ".csv":
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(_csv([row for row in _rows(found) if is_timed(row)]), encoding="utf-8")
    elif out is not None:
        write_results(out, found)
    if plot is not None:
        from sparseloom.report.bench import write_bench_report

        write_bench_report(plot, found)
    return [str(file) for file in (out, plot) if file is not None]


def _csv(rows: Sequence[Row]) -> str:
    """All rows, lists as 8x1; one line each."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, keys, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {key: "x".join(map(str, v)) if isinstance(v, list) else v for key, v in row.items()}
        )
    return text.getvalue()


def _rows(found: ResultsFile) -> list[Row]:
    return json.loads(found.to_json())["rows"]


def is_timed(row: Row) -> bool:
    """Whether the table shows a row."""
    return "op" in row or row.get("record") == "refused"


def peaks_line(rows: Sequence[Row]) -> list[str]:
    """The machine's peaks in a line."""
    found = next((row for row in rows if row.get("record") == "peaks"), None)
    if found is None:
        return []
    parts = [
        f"{found[key]:,.0f} {text}" if found[key] >= 10 else f"{found[key]:.1f} {text}"
        for key, text in (
            ("gflops", "GFLOP/s fp32"),
            ("bf16_gflops", "GFLOP/s bf16"),
            ("int8_gops", "GOP/s int8"),
            ("dram_gbytes_s", "GB/s memory"),
            ("l2_gbytes_s", "GB/s second-level cache"),
        )
        if found[key] is not None
    ]
    how = f"in registers, {found['tier']}" if found["source"] == "registers" else "torch's product"
    return [f"peaks with {found['threads']} threads ({how}): {', '.join(parts)}"]


def block(row: Row) -> str | None:
    """Queries × keys of a block."""
    size = row.get("block_size")
    return None if size is None else "×".join(map(str, size))


def _speedup(row: Row) -> str | None:
    return None if row.get("speedup") is None else f"{row['speedup']:.2f}×"


def _mebibytes(row: Row) -> str | None:
    extra = row.get("extra_bytes")
    return None if extra is None else f"{extra / 2**20:.1f}"


COLUMNS: list[Column] = [
    ("tokens", lambda row: f"{row['q_len']}×{row['kv_len']}"),
    ("block", block),
    ("sparsity", percent("sparsity")),
    ("mask", value("mask")),
    ("dtype", value("dtype")),
    ("path", value("path")),
    ("contender", value("contender")),
    ("pooling", value("pooling")),
    ("density", percent("density")),
    ("ms", number("ms", 2)),
    ("spread", percent("spread")),
    ("speed-up", _speedup),
    ("GFLOP/s", number("gflops", 1)),
    ("of peak", percent("peak_fraction")),
    ("GB/s", number("gbytes_s", 2)),
    ("extra MiB", _mebibytes),
    ("cost rule", value("rule")),
    ("why not", value("note")),
]
