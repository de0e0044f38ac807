"""The precision in which a study trains where nothing else is said."""

from __future__ import annotations

from typing import Literal

import torch

from sparseloom.results import machine_facts

Precision = Literal["no", "bf16", "fp16"]
"""accelerate's names."""


def trained_in() -> Precision:
    """bf16 where the card or the processor multiplies such numbers itself, else "no".

    Elsewhere PyTorch emulates it: a training step of MiniLM took 25 times as long on a processor
    that has AVX2 and no more.
    """
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if {"avx512_bf16", "amx_bf16"} & set(machine_facts().isa) else "no"
