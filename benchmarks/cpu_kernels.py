"""Measure the CPU backend at 4096 tokens, 8 heads x 64, against dense SDPA in fp32.

    python benchmarks/cpu_kernels.py                  # everything: ten minutes on two idle cores
    python benchmarks/cpu_kernels.py --part whole     # one part, merged into the file
    python benchmarks/cpu_kernels.py --table          # the table of the file, as Markdown
    python benchmarks/cpu_kernels.py --out results/cpu_kernels_avx2.json   # of another machine

Writes results/cpu_kernels.json: every timed row with the machine's peaks beside it, and for each
goal of the backend what was reached.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from sparseloom.experiments.bench import AttentionCase, bench_attention, bench_predict
from sparseloom.experiments.bench_decode import DecodeCase, bench_decode
from sparseloom.kernels import available_backends
from sparseloom.kernels.cpu import native
from sparseloom.methods.pooling import POOLINGS
from sparseloom.results import ResultsFile, read_results, results, write_results

OUT = Path(__file__).parents[1] / "results" / "cpu_kernels.json"
LENGTH, SPARSITIES = 4096, (0.9, 0.95, 0.99)
BLOCKS = ((8, 1), (1, 1), (64, 64))
Rows = list[dict[str, Any]]
Say = Callable[[str], None]

# What the backend is for: part, what is looked at, and the least (or the most) that will do.
GOALS: list[tuple[str, str, dict[str, Any], float]] = [
    *(("given", f"8x1 at {s:.0%}", {"block_size": [8, 1], "sparsity": s}, least)
      for s, least in zip(SPARSITIES, (13, 25, 60), strict=True)),
    *(("given", f"1x1 at {s:.0%}", {"block_size": [1, 1], "sparsity": s}, least)
      for s, least in zip(SPARSITIES, (2, 4, 15), strict=True)),
    *(("whole", f"8x1 at {s:.0%}", {"block_size": [8, 1], "sparsity": s}, least)
      for s, least in zip(SPARSITIES, (9, 15, 25), strict=True)),
    *(("gradients", f"8x1 at {s:.0%}", {"block_size": [8, 1], "sparsity": s}, least)
      for s, least in zip(SPARSITIES, (6, 10), strict=False)),
]  # fmt: skip


def case(**changes: Any) -> AttentionCase:
    """A case of the table, with changes."""
    settings: dict[str, Any] = {"q_len": LENGTH, "kv_len": LENGTH, "causal": False, **changes}
    return AttentionCase(**settings)


def given(repeats: int, say: Say) -> Rows:
    """Masks given: all kernels, and PyTorch's own ways where they take the mask."""
    names = ["cpu", "masked", "csr"]
    if available_backends()["flex"] is None:
        names.insert(1, "flex")
    cases = [case(block_size=block, sparsity=share) for block in BLOCKS for share in SPARSITIES]
    return bench_attention(cases, backends=names, repeats=repeats, progress=say)


def whole(repeats: int, say: Say) -> Rows:
    """Prediction and selection alone, and the whole path, with each rule of pooling; with "mass"
    the path is a contender of part "given", too."""
    cases = [
        case(block_size=(8, 1), sparsity=share, pooling=pooling)
        for pooling in POOLINGS
        for share in SPARSITIES
    ]
    alone = bench_predict(cases, repeats=repeats, progress=say)
    path = bench_attention(cases, backends=["cpu"], repeats=repeats, progress=say)
    return [*alone, *(row for row in path if row.get("contender") == "dynamic")]


def gradients(repeats: int, say: Say) -> Rows:
    """Forward and backward."""
    cases = [case(block_size=(8, 1), sparsity=s, gradients=True) for s in SPARSITIES[:2]]
    return bench_attention(cases, backends=["cpu"], repeats=repeats, progress=say)


def lengths(repeats: int, say: Say) -> Rows:
    """(8, 1) at 95 % over lengths: share of the FMA peak, and memory."""
    cases = [
        case(q_len=n, kv_len=n, block_size=(8, 1), sparsity=0.95)
        for n in (512, 1024, 2048, 4096, 8192, 16384)
    ]
    return bench_attention(cases, backends=["cpu"], repeats=repeats, memory=True, progress=say)


def halves(repeats: int, say: Say) -> Rows:
    """bfloat16: (8, 1) at 95 %, and dense."""
    cases = [case(block_size=(8, 1), sparsity=0.95, dtype="bfloat16")]
    return bench_attention(cases, backends=["cpu"], repeats=repeats, progress=say)


def masks(repeats: int, say: Say) -> Rows:
    """(1, 1) and (8, 1) on random masks and on those that the built-in model keeps: 2048 tokens,
    causal."""
    cases = [
        case(q_len=2048, kv_len=2048, block_size=block, sparsity=share, causal=True, mask=mask)
        for block in ((1, 1), (8, 1))
        for share in (0.9, 0.95)
        for mask in ("random", "model")
    ]
    return bench_attention(cases, backends=["cpu"], repeats=repeats, progress=say)


def decode(repeats: int, say: Say) -> Rows:
    """One query against 32768 keys: dense caches, and progressive quantisation."""
    return bench_decode([DecodeCase()], repeats=2 * repeats, progress=say)


PARTS: dict[str, Callable[[int, Say], Rows]] = {
    "given": given, "whole": whole, "gradients": gradients, "lengths": lengths, "halves": halves,
    "masks": masks, "decode": decode,
}  # fmt: skip


def goals(rows: Sequence[dict[str, Any]]) -> Rows:
    """For each goal what was wanted and what was found."""
    found: Rows = []

    def add(name: str, value: float | None, wanted: float, *, most: bool = False) -> None:
        if value is not None:
            met = value <= wanted if most else value >= wanted
            found.append(
                {"record": "goal", "name": name, "value": value, "wanted": wanted, "met": met}
            )

    for part, what, keys, least in GOALS:
        contender = "dynamic" if part == "whole" else "cpu"
        row = _find(rows, "given" if part == "whole" else part, contender=contender, **keys)
        add(f"{part}, {what}: times SDPA fp32", row and row["speedup"], least)
    for share in SPARSITIES:
        keys = {"block_size": [64, 64], "sparsity": share}
        ours, flex = (_find(rows, "given", contender=name, **keys) for name in ("cpu", "flex"))
        add(f"given, 64x64 at {share:.0%}: times FlexAttention",
            flex["ms"] / ours["ms"] if ours and flex else None, 1.0)  # fmt: skip
    for length in (1024, 2048, 4096, 8192, 16384):
        row = _find(rows, "lengths", contender="cpu", q_len=length)
        name = f"8x1 at 95% and {length} tokens: share of the FMA peak"
        add(name, row and row["peak_fraction"], 0.4)
    half, full = (_find(rows, part, contender="cpu", sparsity=0.95, block_size=[8, 1], q_len=LENGTH)
                  for part in ("halves", "lengths"))  # fmt: skip
    speedup = half["speedup"] / full["speedup"] if half and full else None
    add("bfloat16 8x1 at 95%: times float32", speedup, 1.5)
    dense, sdpa = (_find(rows, "halves", contender=name) for name in ("cpu dense", "sdpa bfloat16"))
    add("bfloat16 dense: times SDPA bf16", sdpa["ms"] / dense["ms"] if dense and sdpa else None, 2)
    for name, what, least in (
        ("cpu int8", "INT8 cache", 3.0),
        ("progressive", "8+4 bits, 28% of keys, 20% of values", 8.0),
        ("cpu bfloat16", "bfloat16 cache", 1.5),
    ):
        row = _find(rows, "decode", contender=name)
        add(f"decode, {what}: times SDPA fp32", row and row["speedup"], least)
    memory = _find(rows, "lengths", contender="dynamic", q_len=16384)
    extra = memory.get("extra_bytes") if memory else None
    add("whole path at 16384 tokens: MiB beyond mask and output",
        None if extra is None else extra / 2**20, 32, most=True)  # fmt: skip
    return found


def table(found: ResultsFile) -> str:
    """The times of the file as the lines of a Markdown table."""
    rows = [row.model_dump() for row in found.rows]
    lines = ["| 4096 tokens | 90 % | 95 % | 99 % |", "|---|---|---|---|"]
    for part, contender, block, label in (
        ("given", "cpu", [8, 1], "8×1 vectors, mask given"),
        ("given", "cpu", [1, 1], "fine-grained, mask given"),
        ("given", "cpu", [64, 64], "64×64 blocks, mask given"),
        ("given", "flex", [64, 64], "the same with FlexAttention"),
        ("given", "csr", [1, 1], "fine-grained with `torch.sparse`"),
        ("given", "dynamic", [8, 1], "8×1, predicted, selected and computed"),
        ("given", "dynamic", [1, 1], "fine-grained, predicted, selected and computed"),
        ("gradients", "cpu", [8, 1], "8×1, forward and backward"),
    ):
        cells = [
            _find(rows, part, contender=contender, block_size=block, sparsity=share)
            for share in SPARSITIES
        ]
        if any(cells):
            texts = [f"{cell['speedup']:.1f}×" if cell else "–" for cell in cells]
            lines.append(f"| {label} | {' | '.join(texts)} |")
    return "\n".join(lines)


def _find(rows: Sequence[dict[str, Any]], part: str, **keys: Any) -> dict[str, Any] | None:
    for row in rows:
        if row.get("part") == part and all(row.get(key) == want for key, want in keys.items()):
            return row
    return None


def main() -> None:
    """Run the parts and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--table", action="store_true")
    wanted = parser.parse_args()
    if wanted.table:
        sys.stdout.write(table(read_results(wanted.out)) + "\n")
        return
    reason = native.missing_reason()
    if reason is not None:
        parser.error(f"the C++ backend is missing: {reason}")
    if wanted.threads is not None:
        torch.set_num_threads(wanted.threads)
    rows: Rows = []
    if wanted.part and wanted.out.exists():
        kept = [row.model_dump(exclude_unset=True) for row in read_results(wanted.out).rows]
        rows = [row for row in kept if row.get("part") not in {None, *wanted.part}]
    with Console(stderr=True).status("starting") as status:
        for name in wanted.part or PARTS:
            made = PARTS[name](
                wanted.repeats, lambda step, name=name: status.update(f"{name}: {step}")
            )
            rows += [{"part": name, **row} for row in made]
    elsewhere = "" if wanted.out == OUT else f" --out {shlex.quote(str(wanted.out))}"
    command = f"python benchmarks/{Path(__file__).name}{elsewhere}"
    found = results([*rows, *goals(rows)], command=command)
    write_results(wanted.out, found)
    for row in goals(rows):
        mark = "yes" if row["met"] else "NO"
        sys.stdout.write(f"{mark:4} {row['value']:8.2f} (goal {row['wanted']:g})  {row['name']}\n")
    sys.stdout.write(f"\n{table(found)}\n\n{wanted.out}\n")


if __name__ == "__main__":
    main()
