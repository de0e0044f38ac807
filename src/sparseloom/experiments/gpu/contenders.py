"""Who takes part on a card: PyTorch's dense kernels one by one, FlexAttention, and ours.

SDPA is asked for each of its kernels by name, so that none stands in for another.  FlexAttention
skips blocks of 128 × 128 at the least that it was made for; where the mask keeps single keys it
gets a mask of such blocks with the same share dropped: another mask of the same cost at best.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparseloom.experiments.bench_cases import DTYPES, AttentionCase
from sparseloom.experiments.bench_contenders import (
    Contender,
    Tensors,
    draw_tensors,
    dynamic,
    inputs_of,
    run_kernel,
    run_sdpa,
    untrained,
    with_backward,
)
from sparseloom.experiments.bench_masks import random_mask
from sparseloom.experiments.gpu.memory import Peak, call_with_peak
from sparseloom.mask import SparseMask

SDPA = {
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
OURS, WHOLE, SELECT, ENCODE = "triton", "dynamic", "select", "quantise and project"
FLEX_BLOCK = (128, 128)
_MATH_SHARE = 0.25  # of the card's memory that the scores of SDPA's plain form may take
_SCORE_BYTES = 8  # in bf16 and, for the softmax, in fp32 beside them

Makers = Mapping[str, Callable[[], Contender]]


def makers_of(case: AttentionCase, seed: int, device: str = "cuda") -> Makers:
    """What could take part, by name; each is made when it is called for, and may refuse."""
    tensors = draw_tensors(case, seed, device).to(DTYPES[case.dtype], gradients=case.gradients)
    mask = draw_mask(case, case.block_size, seed, device)
    method = untrained(case, seed, device=device)
    inputs = inputs_of(case, tensors)

    def given(run: Callable[[], object], kept: SparseMask | None) -> Contender:
        return Contender(run, kept, "given", case.dtype)

    def encode() -> object:
        # A cache of its own each time, which then holds the codes of the keys.
        return method.remember(dataclasses.replace(inputs, past=method.new_state(0)))

    def flex(block: tuple[int, int] | None) -> Contender:
        whole = SparseMask.full(
            case.q_len, case.kv_len, block_size=FLEX_BLOCK, device=torch.device(device)
        )
        kept = whole if block is None else draw_mask(case, block, seed, device)
        return given(_flex(case, tensors, kept), None if block is None else kept)

    makers: dict[str, Callable[[], Contender]] = {
        name: lambda kernel=kernel: given(_sdpa(case, tensors, kernel), None)
        for name, kernel in SDPA.items()
    }
    block = case.block_size if min(case.block_size) >= FLEX_BLOCK[0] else FLEX_BLOCK
    makers["flex causal" if case.causal else "flex full"] = lambda: flex(None)
    makers[f"flex {block[0]}x{block[1]}"] = lambda: flex(block)
    makers[OURS] = lambda: given(run_kernel(case, tensors, mask, OURS), mask)
    makers[WHOLE] = lambda: dynamic(case, tensors, seed, backend=OURS)
    if not case.gradients:
        makers[SELECT] = lambda: Contender(lambda: method.select(inputs), mask, "select", "int4")
        makers[ENCODE] = lambda: Contender(encode, None, "select", "int4")
    return makers


def contenders_of(
    case: AttentionCase, makers: Makers
) -> tuple[dict[str, Contender], dict[str, Peak], dict[str, str]]:
    """Those that take the case, the memory that each takes, and why the others do not.

    Each has run once: what compiles has compiled.
    """
    found: dict[str, Contender] = {}
    peaks: dict[str, Peak] = {}
    refused: dict[str, str] = {}
    for name, make in makers.items():
        try:
            contender = make()
            with torch.inference_mode(not case.gradients):
                contender.run()
                peaks[name] = call_with_peak(contender.run)
        except (ValueError, NotImplementedError, RuntimeError, ImportError) as error:
            refused[name] = " ".join(str(error).split())[:300]
        else:
            found[name] = contender
    return found, peaks, refused


def draw_mask(
    case: AttentionCase, block_size: tuple[int, int], seed: int, device: str
) -> SparseMask:
    """A random mask of the case's sizes and sparsity, with a head for each query head."""
    return random_mask(
        case.q_len,
        case.kv_len,
        heads=case.heads,
        block_size=block_size,
        sparsity=case.sparsity,
        is_causal=case.causal,
        seed=seed,
        device=device,
    )


def _sdpa(case: AttentionCase, tensors: Tensors, kernel: SDPBackend) -> Callable[[], object]:
    scores = case.heads * case.q_len * case.kv_len * _SCORE_BYTES
    if kernel == SDPBackend.MATH and scores > _MATH_SHARE * _memory():
        raise ValueError(f"left out: its scores would take {scores / 2**30:.0f} GiB")
    run = run_sdpa(case, tensors)

    def alone() -> object:
        # Why a kernel does not take a call comes as warnings, before an error that names none.
        with warnings.catch_warnings(record=True) as said, sdpa_kernel(kernel):
            warnings.simplefilter("always")
            try:
                return run()
            except RuntimeError as error:
                reasons = "; ".join(str(one.message).split(" (Triggered")[0] for one in said)
                raise NotImplementedError(reasons or str(error)) from error

    return alone


def _flex(case: AttentionCase, tensors: Tensors, mask: SparseMask) -> Callable[[], object]:
    """FlexAttention, compiled for the one call; its block lists are there before it is timed."""
    from torch.nn.attention.flex_attention import flex_attention

    blocks = mask.to_block_mask(is_causal=case.causal)
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    grouped = case.heads != case.kv_heads

    def forward() -> Tensor:
        return compiled(
            tensors.query, tensors.key, tensors.value, block_mask=blocks, enable_gqa=grouped
        )

    return with_backward(tensors, forward) if case.gradients else forward


def _memory() -> int:
    return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
