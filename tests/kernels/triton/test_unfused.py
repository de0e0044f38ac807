"""SDDMM, softmax and SpMM in Triton against their PyTorch forms: on a card, or interpreted."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")

from sparseloom.kernels import sddmm, sparse_softmax, spmm
from sparseloom.kernels.triton import unfused
from sparseloom.mask import SparseMask

ON_CARD = torch.cuda.is_available()
DEVICE = "cuda" if ON_CARD else "cpu"
pytestmark = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1",
    reason="no CUDA device, and Triton's interpreter was not chosen (TRITON_INTERPRET=1)",
)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
CASES = [
    ((1, 1), torch.float32), ((4, 1), torch.float16), ((8, 1), torch.float32),
    ((3, 5), torch.float16), ((16, 16), torch.float32),
]  # fmt: skip
if ON_CARD:  # the interpreter multiplies the bits of bfloat16 as integers
    CASES.append(((8, 1), torch.bfloat16))


def draw(
    block: tuple[int, int], *, q_len: int = 9, kv_len: int = 70, heads: int = 2, seed: int = 0
) -> SparseMask:
    """Two sequences, rows of different lengths, one that keeps nothing and one that keeps all."""
    torch.manual_seed(seed)
    keep = torch.rand(2, heads, -(-q_len // block[0]), -(-kv_len // block[1])) < 0.4
    keep[:, 1, 0], keep[:, 0, -1] = False, True
    return SparseMask.from_block_bool(keep, block_size=block, q_len=q_len, kv_len=kv_len)


def check(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert ours.dtype == expected.dtype
    torch.testing.assert_close(ours.cpu(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("block", "dtype"), CASES, ids=str)
def test_equal_their_pytorch_forms(block: tuple[int, int], dtype: torch.dtype) -> None:
    mask, is_causal = draw(block), block[0] != 4
    query = torch.randn(2, 2, 9, 20).to(dtype)
    # Keys and values as a cache holds them, tokens before heads.
    key, value = (torch.randn(2, 70, 1, dim).to(dtype).transpose(1, 2) for dim in (20, 40))
    padding = None if block == (1, 1) else torch.rand(2, 70) < 0.8
    there = mask.to(DEVICE)
    scores = sddmm(query, key, mask, is_causal=is_causal, key_padding=padding)
    ours = unfused.sddmm(
        query.to(DEVICE), key.to(DEVICE), there, is_causal=is_causal, scale=20**-0.5,
        key_padding=None if padding is None else padding.to(DEVICE),
    )  # fmt: skip
    check(ours, scores, 1e-5)
    probs = sparse_softmax(scores, mask)
    check(unfused.sparse_softmax(scores.to(DEVICE), there), probs, 1e-5)
    out = spmm(probs, mask, value)
    check(unfused.spmm(probs.to(DEVICE), there, value.to(DEVICE)), out, TOLERANCE[dtype])


def test_rows_longer_than_a_tile_and_rows_without_a_key() -> None:
    mask = draw((8, 1), kv_len=400)
    assert mask.counts.max() > 128
    assert mask.counts.min() == 0
    scores = torch.randn(mask.nnz, 8, 1)
    scores[::3] = -torch.inf
    scores[mask.offsets[0, 0, 0] : mask.offsets[0, 0, 1]] = -torch.inf  # all are forbidden
    probs = unfused.sparse_softmax(scores.to(DEVICE), mask.to(DEVICE)).cpu()
    check(probs, sparse_softmax(scores, mask), 1e-5)
    assert (probs[mask.offsets[0, 0, 0] : mask.offsets[0, 0, 1]] == 0).all()


def test_what_is_left_to_pytorch() -> None:
    mask = draw((8, 1))
    plain = torch.randn(2, 2, 9, 20)
    assert unfused.takes(mask, plain)
    assert not unfused.takes(mask, plain.double())
    assert not unfused.takes(mask, plain.requires_grad_())
    with torch.no_grad():
        assert unfused.takes(mask, plain)
    assert not unfused.takes(mask, torch.randn(2, 2, 9, 264))
    assert not unfused.takes(draw((129, 1), q_len=200), torch.randn(2, 2, 200, 20))


@pytest.mark.gpu
def test_a_card_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("sddmm", "sparse_softmax", "spmm"):
        real = getattr(unfused, name)
        monkeypatch.setattr(
            unfused, name, lambda *a, r=real, n=name, **k: (taken.append(n), r(*a, **k))[1]
        )
    mask = draw((8, 1)).to("cuda")
    q, k, v = (torch.randn(2, 2, length, 20, device="cuda") for length in (9, 70, 70))
    spmm(sparse_softmax(sddmm(q, k, mask), mask), mask, v)
    assert taken == ["sddmm", "sparse_softmax", "spmm"]
