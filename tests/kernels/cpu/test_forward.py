"""Sparse attention of the library against the reference in fp64, in every tier."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import sparseloom as sl
from sparseloom.kernels import cpu, reference
from sparseloom.kernels.common import AttentionCall
from sparseloom.kernels.cpu import dense
from sparseloom.mask import SparseMask

OUT = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SUMS = {torch.float32: 5e-6, torch.bfloat16: 4e-3, torch.float16: 5e-6}


def make_call(
    q_len: int = 37,
    kv_len: int = 53,
    block: tuple[int, int] = (8, 1),
    *,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int, int] = (2, 2, 2),
    dims: tuple[int, int] = (32, 32),
    density: float = 0.4,
    batch: tuple[int, int] = (2, 2),
    is_causal: bool = False,
    padded: bool = False,
    **rest: Any,
) -> AttentionCall:
    """`heads` of query, key and mask; `batch` of the inputs and of the mask."""
    torch.manual_seed(q_len * 1009 + kv_len)
    query = torch.randn(batch[0], heads[0], q_len, dims[0]).to(dtype)
    key = torch.randn(batch[0], heads[1], kv_len, dims[0]).to(dtype)
    value = torch.randn(batch[0], heads[1], kv_len, dims[1]).to(dtype)
    grid = (batch[1], heads[2], -(-q_len // block[0]), -(-kv_len // block[1]))
    keep = torch.rand(grid) < density
    keep[:, 0, grid[2] // 2] = False
    mask = SparseMask.from_block_bool(keep, block_size=block, q_len=q_len, kv_len=kv_len)
    padding = torch.rand(batch[0], kv_len) < 0.7 if padded else None
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        indices=mask.indices,
        offsets=mask.offsets,
        block_size=block,
        key_padding=padding,
        is_causal=is_causal,
        scale=dims[0] ** -0.5,
        **rest,
    )


def check(call: AttentionCall, size: float = 1.0) -> None:
    """`size` of the scores: their rounding in fp32 grows with it."""
    dtype = call.query.dtype
    wide = [t.double() for t in (call.query, call.key, call.value)]
    exact = call._replace(query=wide[0], key=wide[1], value=wide[2])
    wanted = reference.forward(exact, lse=True, importance=True)
    got = cpu.forward(call, lse=True, importance=True)
    near, sums = OUT[dtype] * size, SUMS[dtype] * size

    def close(left: Tensor | None, right: Tensor | None, tolerance: float) -> None:
        assert left is not None
        torch.testing.assert_close(left.double(), right, rtol=tolerance, atol=tolerance)

    assert got.out.dtype == dtype
    close(got.out, wanted.out, near)
    close(got.lse, wanted.lse, sums)
    close(got.key_importance, wanted.key_importance, 5 * sums)
    close(got.head_importance, wanted.head_importance, near)
    plain = cpu.forward(call, lse=False, importance=False)
    assert torch.equal(plain.out, got.out)
    assert plain[1:] == (None, None, None)


@pytest.mark.parametrize("block", [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (16, 16), (5, 3)])
@pytest.mark.parametrize("dtype", list(OUT))
def test_blocks_and_types(tier: str, block: tuple[int, int], dtype: torch.dtype) -> None:
    check(make_call(block=block, dtype=dtype, is_causal=True, padded=True))


@pytest.mark.parametrize("dims", [(8, 8), (40, 24), (64, 64), (80, 80), (96, 128), (256, 8)])
@pytest.mark.parametrize("dtype", list(OUT))
def test_dims(tier: str, dims: tuple[int, int], dtype: torch.dtype) -> None:
    check(make_call(dims=dims, dtype=dtype))
    check(make_call(dims=dims, dtype=dtype, block=(1, 1)))


@pytest.mark.parametrize("dim", range(32, 257, 32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lists_are_not_read_past_their_end(tier: str, dim: int, dtype: torch.dtype) -> None:
    call = make_call(24, 128, dtype=dtype, dims=(dim, dim), density=1.0)
    # What lies behind the last list is far outside the keys.
    longer = torch.cat([call.indices, torch.full((64,), 1 << 30, dtype=torch.int32)])
    check(call._replace(indices=longer[: len(call.indices)]))


@pytest.mark.parametrize("sizes", [(1, 1), (1, 90), (90, 1), (64, 200), (200, 64), (17, 17)])
def test_lengths(tier: str, sizes: tuple[int, int]) -> None:
    for is_causal in (False, True):
        check(make_call(*sizes, is_causal=is_causal))
        check(make_call(*sizes, block=(64, 64), density=0.8, is_causal=is_causal))


@pytest.mark.parametrize("heads", [(4, 2, 4), (4, 1, 2), (6, 3, 1)])
@pytest.mark.parametrize("mask_batch", [1, 2])
def test_shared_keys_and_masks(tier: str, heads: tuple[int, int, int], mask_batch: int) -> None:
    check(make_call(heads=heads, batch=(2, mask_batch)))


@pytest.mark.parametrize("dtype", list(OUT))
@pytest.mark.parametrize("alike", [True, False])
def test_large_tiles(tier: str, dtype: torch.dtype, alike: bool) -> None:
    """Blocks of 16 x 32 are not gathered: query blocks that keep a tile compute it together."""
    sizes = [(150, 230, (4, 2, 4)), (64, 40, (2, 1, 1)), (97, 97, (2, 2, 2))]
    for case, (q_len, kv_len, heads) in enumerate(sizes):
        call = make_call(
            q_len,
            kv_len,
            (16, 32),
            dtype=dtype,
            heads=heads,
            dims=[(64, 64), (24, 40), (32, 8)][case],
            batch=(2, 1 + case % 2),
            is_causal=case != 1,
            padded=case != 0,
        )
        assert call.offsets is not None
        if alike:  # four query blocks at a time, but for one of the first
            keep = torch.rand((*call.offsets.shape[:2], -(-q_len // 64), -(-kv_len // 32))) < 0.4
            keep[..., 0] = True
            keep = keep.repeat_interleave(4, 2)[:, :, : -(-q_len // 16)]
            keep[:, :, 1, 0] = False
            mask = SparseMask.from_block_bool(keep, block_size=(16, 32), q_len=q_len, kv_len=kv_len)
            call = call._replace(indices=mask.indices, offsets=mask.offsets)
        assert dense.suits(call, importance=False)
        assert not dense.suits(call, importance=True)
        wide = [t.double() for t in (call.query, call.key, call.value)]
        exact = call._replace(query=wide[0], key=wide[1], value=wide[2])
        wanted = reference.forward(exact, lse=True, importance=False)
        near, sums = OUT[dtype], SUMS[dtype]
        for lse in (False, True):
            got = cpu.forward(call, lse=lse, importance=False)
            torch.testing.assert_close(got.out.double(), wanted.out, rtol=near, atol=near)
            if lse:
                assert got.lse is not None
                torch.testing.assert_close(got.lse.double(), wanted.lse, rtol=sums, atol=sums)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything(tier: str, density: float) -> None:
    call = make_call(density=density)
    check(call)
    if density == 0.0:
        assert not cpu.forward(call, lse=False, importance=False).out.any()


@pytest.mark.parametrize("dtype", list(OUT))
def test_more_keys_than_stay_in_the_cache(tier: str, dtype: torch.dtype) -> None:
    """Keys come in several segments, joined by the running maximum."""
    call = make_call(
        40, 9000, dims=(128, 128), density=0.02, dtype=dtype, heads=(1, 1, 1), batch=(1, 1)
    )
    check(call)
    # Growing scores: the maximum of every row moves from segment to segment.
    ramp = torch.linspace(0, 3, 9000)[:, None].to(dtype)
    check(call._replace(key=call.key + ramp * call.query.mean().sign()))


def test_large_and_tiny_scores(tier: str) -> None:
    call = make_call()
    check(call._replace(query=call.query * 1e-30))
    check(call._replace(query=call.query * 300), size=100)


@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout_bits(tier: str, dropout_p: float) -> None:
    seed = torch.tensor([7], dtype=torch.int64)
    check(make_call(dropout_p=dropout_p, seed=seed, is_causal=True))


def test_strided_inputs_and_shared_memory(tier: str) -> None:
    call = make_call(dims=(64, 64))
    layout = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in call[:3]]
    check(call._replace(query=layout[0], key=layout[1], value=layout[2]))
    wide = torch.randn(*call.key.shape[:3], 128)
    check(call._replace(key=wide[..., ::2]))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_thread_counts(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(make_call(300, 300, heads=(3, 3, 3)))
    finally:
        torch.set_num_threads(before)


def test_nan_stays_where_it_is(tier: str) -> None:
    """A NaN key spoils the rows that keep it, and no other."""
    call = make_call(block=(8, 1), heads=(1, 1, 1), batch=(1, 1))
    assert call.indices is not None
    assert call.offsets is not None
    key = call.key.clone()
    key[0, 0, int(call.indices[0])] = torch.nan
    spoilt = cpu.forward(call._replace(key=key), lse=False, importance=False).out
    clean = cpu.forward(call, lse=False, importance=False).out
    hit = torch.zeros(call.q_len, dtype=torch.bool)
    for block in range(call.offsets.shape[2] - 1):
        row = call.indices[int(call.offsets[0, 0, block]) : int(call.offsets[0, 0, block + 1])]
        hit[8 * block : 8 * block + 8] = bool((row == call.indices[0]).any())
    assert spoilt[0, 0, hit].isnan().all()
    assert torch.equal(spoilt[0, 0, ~hit], clean[0, 0, ~hit])


def test_auto_takes_the_backend() -> None:
    call = make_call(heads=(2, 2, 2))
    assert call.indices is not None
    assert call.offsets is not None
    mask = SparseMask(call.indices, call.offsets, block_size=call.block_size, q_len=37, kv_len=53)
    inputs = call[:3]
    assert sl.kernels.choose_backend(*inputs, mask) == "cpu"
    odd = [t[..., :5].contiguous() for t in inputs]
    assert sl.kernels.choose_backend(*odd, mask) == "reference"
    with pytest.raises(NotImplementedError, match="multiple of 8 up to 256, got 5"):
        sl.attention(*odd, mask, backend="cpu")
    with pytest.raises(NotImplementedError, match="float64"):
        sl.attention(*(t.double() for t in inputs), mask, backend="cpu")
