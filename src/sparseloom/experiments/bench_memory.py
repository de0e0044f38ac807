"""Peak memory of one contender, in a process of its own (Linux)."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparseloom.experiments.bench_cases import AttentionCase

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(case: AttentionCase, contender: str, seed: int = 0) -> int | None:
    """Bytes of physical memory that one call takes above what was there before it, its output
    included; None where the system does not tell.

    The process runs the contender once on a case of 64 tokens first, which loads what it loads.
    """
    if not _REFERENCES.exists():
        return None
    import torch

    question = {
        "case": dataclasses.asdict(case),
        "contender": contender,
        "seed": seed,
        "threads": torch.get_num_threads(),
    }
    done = subprocess.run(
        [sys.executable, "-m", "sparseloom.experiments.bench_memory"],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
    )
    if done.returncode:
        reason = done.stderr.strip().rpartition("\n")[2].partition(": ")[2]
        raise RuntimeError(f"memory of {contender!r} was not measured: {reason}")
    return json.loads(done.stdout)


def memory_of_call(run: Callable[[], object]) -> int | None:
    """Bytes of physical memory that `run` takes at its peak above what was there before it; None
    where the system does not tell.

    Memory that the C library keeps from earlier calls hides in what was there before: start the
    process with MALLOC_MMAP_THRESHOLD_=65536 and MALLOC_TRIM_THRESHOLD_=0.
    """
    if not _REFERENCES.exists():
        return None
    _REFERENCES.write_text("5", "ascii")  # the peak starts anew
    before = _status("VmRSS")
    result = run()
    del result
    return max(0, _status("VmHWM") - before)


def _measure(question: dict[str, Any]) -> int:
    import torch

    from sparseloom.experiments.bench import mask_of
    from sparseloom.experiments.bench_contenders import contenders_of

    torch.set_num_threads(question["threads"])
    fields: dict[str, Any] = question["case"]
    fields["block_size"] = tuple(fields["block_size"])
    case, name, seed = AttentionCase(**fields), question["contender"], question["seed"]
    small = dataclasses.replace(case, q_len=64, kv_len=64)
    peak: int | None = None
    for one in (small, case):
        found, refused = contenders_of(
            one, mask_of(one, seed), [name.split()[0]], seed, only=name, warm=False
        )
        if name not in found:
            raise ValueError(refused.get(name, f"no contender {name!r}"))
        with torch.inference_mode(not one.gradients):
            peak = memory_of_call(found[name].run)
    return peak or 0


def _status(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text("ascii"), re.MULTILINE)
    if match is None:
        raise RuntimeError(f"{_STATUS} has no {field}")
    return int(match.group(1)) << 10


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(json.load(sys.stdin))))
