"""`sparseloom bench --calibrate`: measure what the cost rule goes by, here or on a card."""

from __future__ import annotations

from sparseloom.cli.bench_table import block
from sparseloom.cli.options import command_line
from sparseloom.cli.output import Column, emit, number, percent, progress_console, value


def calibrate_rule(device: str, repeats: int, *, seed: int, as_json: bool) -> None:
    """Measure, keep the table among the user's, and show how well it tells what was measured."""
    from sparseloom.experiments.calibrate import calibrate, table_rows
    from sparseloom.methods import costs
    from sparseloom.results import results

    measure = calibrate
    if device == "cuda":
        from sparseloom.experiments.gpu.calibrate import calibrate_card as measure
    with progress_console().status("calibrate") as status:
        table, checks = measure(
            command=command_line(), repeats=repeats, seed=seed, progress=status.update
        )
    path = costs.save_table(table)
    columns: list[Column] = [
        ("tokens", value("q_len")),
        ("block", block),
        ("sparsity", percent("sparsity")),
        ("dtype", value("dtype")),
        ("dense ms", number("dense_ms", 3)),
        ("expected", number("dense_expected_ms", 3)),
        ("select ms", number("select_ms", 3)),
        ("expected", number("select_expected_ms", 3)),
        ("attend ms", number("attend_ms", 3)),
        ("expected", number("attend_expected_ms", 3)),
        ("sparse/dense", number("ratio", 2)),
        ("expected", number("expected_ratio", 2)),
        ("rule", value("rule")),
    ]
    found = results(table_rows(table) + checks, command=command_line())
    emit(
        found,
        as_json=as_json,
        columns=columns,
        notes=["", f"{path}  used from now on {_where(device, table.threads)}"],
        only=lambda row: row.get("record") == "cost check",
    )


def _where(device: str, threads: int) -> str:
    return "on this card" if device == "cuda" else f"with {threads} threads of this processor"
