"""Who takes part in the attention benchmark, each as a callable, and why others do not."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sparseloom.experiments.bench_cases import DTYPES, AttentionCase
from sparseloom.kernels import attention, available_backends
from sparseloom.kernels.api import AttentionOutput
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, DynamicSparse, Predictor
from sparseloom.methods.pooling import Pooling

BASELINE = "sdpa float32"
PEERS = ("masked", "csr")
"""What PyTorch offers for a mask: SDPA with a boolean mask, and torch.sparse in CSR."""
_REFERENCE_PAIRS = 1 << 27  # scores that the reference is asked for at most
_CSR_PAIRS = 1 << 25  # kept pairs of torch.sparse: it takes about a microsecond for ten
_MASK_BYTES = 1 << 29


@dataclass(frozen=True, slots=True)
class Contender:
    """One way to compute a case.

    Attributes:
        run: computes it once.
        mask: what it keeps; None = everything.
        path: "given" (the mask is there), "whole" (it is chosen within `run`), or "select".
        dtype: of its inputs.
    """

    run: Callable[[], object]
    mask: SparseMask | None
    path: str
    dtype: str


@dataclass(frozen=True, slots=True)
class Tensors:
    """Queries, keys and values of one call, and the hidden states they could have come from."""

    query: Tensor
    key: Tensor
    value: Tensor
    hidden: Tensor
    grad_out: Tensor

    def to(self, dtype: torch.dtype, *, gradients: bool) -> Tensors:
        """The same numbers in another dtype; with gradients, queries, keys and values want them."""
        cast = {
            field.name: getattr(self, field.name).to(dtype, copy=True)
            for field in dataclasses.fields(self)
        }
        for name in ("query", "key", "value"):
            cast[name].requires_grad_(gradients)
        return Tensors(**cast)


def draw_tensors(case: AttentionCase, seed: int, device: torch.device | str = "cpu") -> Tensors:
    """Normal random inputs in fp32, drawn where they are to lie."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return Tensors(
        query=draw(1, case.heads, case.q_len, case.head_dim),
        key=draw(1, case.kv_heads, case.kv_len, case.head_dim),
        value=draw(1, case.kv_heads, case.kv_len, case.head_dim),
        hidden=draw(1, case.q_len, case.heads * case.head_dim),
        grad_out=draw(1, case.heads, case.q_len, case.head_dim),
    )


def kernels_and_peers() -> dict[str, str | None]:
    """Names that can be asked for, and why some of them cannot be had."""
    backends = {name: why for name, why in available_backends().items() if name != "dense"}
    return backends | dict.fromkeys(PEERS)


def contenders_of(
    case: AttentionCase,
    mask: SparseMask,
    names: Sequence[str],
    seed: int,
    *,
    only: str | None = None,
    warm: bool = True,
) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that take the case, by name, the baseline first; and the reasons of those that do not.

    Args:
        case: what is computed.
        mask: the mask of path "given".
        names: kernels and peers that get it.
        seed: draws tensors and the untrained predictor.
        only: make this one alone.
        warm: run each once, so that what cannot work is out and what compiles has compiled.
    """
    found: dict[str, Contender] = {}
    refused: dict[str, str] = {}
    for name, make in _makers(case, mask, names, seed).items():
        if only is not None and name != only:
            continue
        try:
            contender = make()
            if warm:
                _call(contender.run, gradients=case.gradients)
        except (ValueError, NotImplementedError, RuntimeError, ImportError) as error:
            refused[name] = " ".join(str(error).split())
        else:
            found[name] = contender
    return found, refused


def _makers(
    case: AttentionCase, mask: SparseMask, names: Sequence[str], seed: int
) -> dict[str, Callable[[], Contender]]:
    drawn = draw_tensors(case, seed)
    own = drawn.to(DTYPES[case.dtype], gradients=case.gradients)
    fp32 = drawn.to(torch.float32, gradients=case.gradients)
    makers = {BASELINE: lambda: Contender(run_sdpa(case, fp32), None, "given", "float32")}
    if case.dtype != "float32":
        makers[f"sdpa {case.dtype}"] = lambda: Contender(
            run_sdpa(case, own), None, "given", case.dtype
        )
    if "cpu" in names:
        makers["cpu dense"] = lambda: Contender(
            run_kernel(case, own, None, "cpu"), None, "given", case.dtype
        )
    for name in names:
        makers[name] = _maker(name, case, own, mask)
    if case.q_len == case.kv_len and case.mask == "random":
        makers["dynamic"] = lambda: dynamic(case, own, seed)
    return makers


def _call(run: Callable[[], object], *, gradients: bool) -> None:
    if gradients:
        run()
    else:
        with torch.inference_mode():
            run()


def _maker(
    name: str, case: AttentionCase, tensors: Tensors, mask: SparseMask
) -> Callable[[], Contender]:
    def make() -> Contender:
        if name == "masked":
            run = _masked(case, tensors, mask)
        elif name == "csr":
            run = _csr(case, tensors, mask)
        else:
            scores = case.heads * case.q_len * case.kv_len
            if name == "reference" and scores > _REFERENCE_PAIRS:
                raise ValueError(f"left out: it would compute all {scores:,} scores")
            run = run_kernel(case, tensors, mask, name)
        return Contender(run, mask, "given", case.dtype)

    return make


def with_backward(tensors: Tensors, forward: Callable[[], Tensor]) -> Callable[[], object]:
    """Forward and backward of `forward`."""

    def run() -> object:
        out = forward()
        return torch.autograd.grad(
            out, (tensors.query, tensors.key, tensors.value), tensors.grad_out
        )

    return run


def run_sdpa(case: AttentionCase, tensors: Tensors) -> Callable[[], object]:
    """Dense attention by whatever kernel PyTorch chooses."""
    q, k, v = tensors.query, tensors.key, tensors.value
    grouped = case.heads != case.kv_heads

    def forward() -> Tensor:
        if case.causal and case.q_len != case.kv_len:  # SDPA aligns causality to the top left
            return _out(attention(q, k, v, is_causal=True, enable_gqa=grouped, backend="dense"))
        return F.scaled_dot_product_attention(q, k, v, is_causal=case.causal, enable_gqa=grouped)

    return with_backward(tensors, forward) if case.gradients else forward


def run_kernel(
    case: AttentionCase, tensors: Tensors, mask: SparseMask | None, backend: str
) -> Callable[[], object]:
    """One of our backends on a mask that is there."""
    grouped = case.heads != case.kv_heads

    def forward() -> Tensor:
        return _out(
            attention(
                tensors.query, tensors.key, tensors.value, mask,
                is_causal=case.causal, enable_gqa=grouped, backend=backend,
            )
        )  # fmt: skip

    return with_backward(tensors, forward) if case.gradients else forward


def _masked(case: AttentionCase, tensors: Tensors, mask: SparseMask) -> Callable[[], object]:
    size = mask.heads * case.q_len * case.kv_len
    if size > _MASK_BYTES:
        raise ValueError(f"left out: its boolean mask would take {size / 2**30:.1f} GiB")
    keep = mask.to_bool()
    if case.causal:
        keep &= torch.ones(keep.shape[-2:], dtype=torch.bool).tril(case.kv_len - case.q_len)
    grouped = case.heads != case.kv_heads

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(
            tensors.query, tensors.key, tensors.value, attn_mask=keep, enable_gqa=grouped
        )

    return with_backward(tensors, forward) if case.gradients else forward


def _csr(case: AttentionCase, tensors: Tensors, mask: SparseMask) -> Callable[[], object]:
    """SDDMM, softmax over the rows of the values, and SpMM with torch.sparse, head by head."""
    if case.block_size != (1, 1):
        raise ValueError("it has no product that computes only the kept blocks (1x1 alone)")
    if case.dtype != "float32" or case.gradients or case.heads != case.kv_heads:
        raise ValueError("float32, forward, as many key heads as query heads: nothing else")
    if mask.nnz > _CSR_PAIRS:
        raise ValueError(f"left out: {mask.nnz:,} kept pairs would take minutes")
    heads: list[tuple[Tensor, Tensor]] = []
    for head in range(case.heads):
        offsets = mask.offsets[0, head % mask.heads]
        columns = mask.indices[offsets[0] : offsets[-1]].long()
        heads.append((offsets - offsets[0], columns))
    size = (case.q_len, case.kv_len)
    scale = case.head_dim**-0.5
    with warnings.catch_warnings():  # torch says once that CSR is in beta
        warnings.simplefilter("ignore", UserWarning)
        torch.eye(1).to_sparse_csr()

    def run() -> Tensor:
        outs: list[Tensor] = []
        for head, (rows, columns) in enumerate(heads):
            pattern = torch.sparse_csr_tensor(
                rows, columns, torch.zeros(len(columns)), size, check_invariants=False
            )
            q, k, v = (t[0, head] for t in (tensors.query, tensors.key, tensors.value))
            scores = torch.sparse.sampled_addmm(pattern, q, k.t(), beta=0.0, alpha=scale).values()
            counts = rows.diff()
            largest = torch.segment_reduce(scores, "max", offsets=rows)
            weights = (scores - largest.repeat_interleave(counts)).exp()
            sums = torch.segment_reduce(weights, "sum", offsets=rows)
            weights = weights / sums.repeat_interleave(counts)
            outs.append(
                torch.sparse_csr_tensor(rows, columns, weights, size, check_invariants=False) @ v
            )
        return torch.stack(outs)[None]

    return run


def dynamic(
    case: AttentionCase, tensors: Tensors, seed: int, *, backend: str = "auto"
) -> Contender:
    """The whole path; the predictor is untrained: time does not depend on what it learned."""
    method = untrained(case, seed, device=tensors.query.device)
    inputs = inputs_of(case, tensors)
    grouped = case.heads != case.kv_heads

    def forward() -> Tensor:
        with torch.no_grad():
            mask = method.select(inputs)
        return _out(
            attention(
                tensors.query, tensors.key, tensors.value, mask,
                is_causal=case.causal, enable_gqa=grouped, backend=backend,
            )
        )  # fmt: skip

    with torch.inference_mode():
        mask = method.select(inputs)
    run = with_backward(tensors, forward) if case.gradients else forward
    return Contender(run, mask, "whole", case.dtype)


def untrained(
    case: AttentionCase,
    seed: int,
    projection: float = 0.25,
    device: torch.device | str = "cpu",
) -> DynamicSparse:
    """The method of the whole path, as the paper has it: σ = 0.25 and INT4.

    It has seen one batch: without, its scales would be searched for in every call.
    """
    settings = DynamicSparse(
        sparsity=case.sparsity,
        block_size=case.block_size,
        projection=projection,
        pooling=cast("Pooling", case.pooling),
        rotary=False,
    )
    hidden_size = case.heads * case.head_dim
    predictor = Predictor.for_shape(
        layers=1,
        hidden_size=hidden_size,
        heads=case.heads,
        head_dim=case.head_dim,
        projection=settings.projection,
        bits=settings.bits,
        seed=seed,
    )
    hidden = torch.randn(1, 64, hidden_size, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode(False), torch.enable_grad():
        predictor.train().layers[0].encode(hidden.clone())
    return dataclasses.replace(settings, predictor=predictor.eval().to(device))


def inputs_of(case: AttentionCase, tensors: Tensors) -> AttentionInputs:
    """What a method sees of the case."""
    return AttentionInputs(
        query=tensors.query.detach(),
        key=tensors.key.detach(),
        value=tensors.value.detach(),
        layer=0,
        is_causal=case.causal,
        scale=case.head_dim**-0.5,
        hidden_states=tensors.hidden,
    )


def _out(result: Tensor | AttentionOutput) -> Tensor:
    return result if isinstance(result, Tensor) else result.out
