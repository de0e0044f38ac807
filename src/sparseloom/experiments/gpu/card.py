"""The card that is measured: whether there is one, and what it is."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sparseloom.errors import SparseloomError

_DRIVER = Path("/proc/driver/nvidia/version")


def check_card() -> None:
    """Refuse to measure where there is nothing to measure on.

    Raises:
        SparseloomError: no CUDA device, in one sentence that says why.
    """
    reason = missing_reason()
    if reason is not None:
        raise SparseloomError(f"--device cuda needs a CUDA device: {reason}")


def missing_reason() -> str | None:
    """Why nothing can be measured on a GPU here (None: it can)."""
    if torch.version.cuda is None:
        return "this build of PyTorch is for CPUs"
    if not torch.cuda.is_available():
        return "PyTorch finds none (nvidia-smi shows what the driver sees)"
    return None


def card_row() -> dict[str, Any]:
    """The card, its driver and the software between them, as a row of the results file."""
    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "record": "card",
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
    }


def _driver() -> str | None:
    """The driver's version, as its kernel module tells it."""
    try:
        text = _DRIVER.read_text("utf-8", "replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module(?: for \S+)?\s+(\d+\.[\d.]+)", text)
    return None if found is None else found[1]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
