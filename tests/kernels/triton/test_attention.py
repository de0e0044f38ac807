"""The Triton kernels in Triton's interpreter against the reference, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparseloom.kernels import AttentionOutput, attention, choose_backend
from sparseloom.kernels.triton import backend, backward, configs
from sparseloom.mask import SparseMask

NEAR = {torch.float32: 5e-6, torch.float16: 2e-3}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if torch.cuda.is_available():
    NEAR[torch.bfloat16] = 2e-2


@pytest.fixture(autouse=True)
def needs_triton() -> None:
    reason = backend.unavailable()
    if reason is not None:
        pytest.skip(reason)


def run(case: Any, dtype: torch.dtype, name: str, steady: bool = True) -> list[Tensor]:
    """Outputs, and gradients of a sum that weighs all outputs differently; in fp64.

    With `steady` the sum has no part in Σ|out|: its derivative jumps where rounding meets 0.
    """
    leaves = [t.detach().to(DEVICE, dtype).requires_grad_() for t in case.inputs]
    padding = None if case.key_padding is None else case.key_padding.to(DEVICE)
    options = {**case.options, "key_padding": padding, "return_importance": True}
    found = attention(*leaves, case.mask.to(DEVICE), **options, return_lse=True, backend=name)
    assert isinstance(found, AttentionOutput)
    outputs = [t for t in found if t is not None]
    assert len(outputs) == 4
    generator = torch.Generator().manual_seed(5)
    loss = torch.zeros((), dtype=torch.float64, device=DEVICE)
    for output in outputs[: 3 if steady else 4]:
        weights = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(DEVICE)
        finite = output.double().masked_fill(output == -torch.inf, 0)
        loss = loss + (finite * weights).sum()
    grads = torch.autograd.grad(loss, leaves)
    return [t.detach().double().cpu() for t in (*outputs, *grads)]


def check(case: Any, dtype: torch.dtype) -> None:
    """Against the reference on the same rounded inputs in fp64; errors relative to the largest."""
    rounded = [t.to(dtype).double() for t in case.inputs]
    exact = type(case)(*rounded, case.mask, case.is_causal, case.key_padding, case.scale)
    steady = dtype != torch.float32
    got = run(case, dtype, "triton", steady)
    wanted = run(exact, torch.float64, "reference", steady)
    for left, right in zip(got, wanted, strict=True):
        finite = right.masked_fill(right == -torch.inf, 0)
        near = NEAR[dtype] * max(1.0, float(finite.abs().max()))
        torch.testing.assert_close(left, right, rtol=0, atol=near)


@pytest.fixture
def short_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles per row from short lists: the interpreter takes its time."""
    monkeypatch.setattr(configs, "KEYS", 32)


SHAPES = [
    pytest.param((64, 1), (70, 40), 32, id="rows on M"),
    pytest.param((8, 1), (12, 40), 48, id="keys on M"),
    pytest.param((4, 1), (6, 20), 16, id="keys on M, few rows"),
    pytest.param((1, 1), (3, 12), 16, id="single rows"),
    pytest.param((16, 1), (20, 9), 32, id="more queries than keys"),
    pytest.param((64, 64), (70, 100), 32, id="blocks"),
    pytest.param((8, 16), (20, 60), 24, id="small blocks, gathered"),
    pytest.param((5, 3), (10, 12), 8, id="odd blocks"),
    pytest.param((150, 70), (160, 90), 16, id="blocks larger than tiles"),
]


def thin(case: Any, heads: int = 1) -> Any:
    """The second batch entry and the first key head of a case, for so many query heads."""
    padding = None if case.key_padding is None else case.key_padding[1:]
    inputs = case.query[1:, :heads], case.key[1:, :1], case.value[1:, :1]
    return type(case)(*inputs, case.mask[0, 0:1], case.is_causal, padding, case.scale)


@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize(("block", "lengths", "head_dim"), SHAPES)
def test_blocks(
    make_case: Any, block: tuple[int, int], lengths: tuple[int, int], head_dim: int
) -> None:
    """Causality, shared masks, an empty query block, and what is padding: `make_case`."""
    sizes = {"q_len": lengths[0], "kv_len": lengths[1], "head_dim": head_dim}
    check(thin(make_case(block=block, **sizes)), torch.float16)


@pytest.mark.usefixtures("short_tiles")
@pytest.mark.parametrize("block", [(8, 1), (64, 1), (16, 64)])
def test_tiles_without_any_mask(make_case: Any, block: tuple[int, int]) -> None:
    """Two query heads share keys and mask: they are packed where they fit."""
    case = make_case(
        block=block, q_len=block[0] + 3, kv_len=40, head_dim=16, is_causal=False, padded=False
    )
    check(thin(case, heads=2), torch.float16)


@pytest.mark.parametrize("block", [(4, 1), (8, 16)])
def test_shared_keys_and_masks(make_case: Any, block: tuple[int, int]) -> None:
    """Two batch entries, four query heads, two key heads, two mask heads."""
    check(make_case(block=block, q_len=9, kv_len=7, head_dim=16), torch.float16)


@pytest.mark.parametrize("block", [(8, 1), (16, 16)])
def test_fp32_is_exact(make_case: Any, block: tuple[int, int]) -> None:
    check(thin(make_case(block=block, q_len=20, kv_len=18, head_dim=16), 2), torch.float32)


@settings(max_examples=6, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_call(draw_case: Any, data: st.DataObject) -> None:
    check(draw_case(data, dtypes=(torch.float16,), masked=True, longest=9), torch.float16)


def test_shares_take_turns(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer too short for all heads gives the same bits as one that holds them."""
    case = make_case(block=(4, 1), q_len=8, kv_len=5, head_dim=16)
    whole = run(case, torch.float16, "triton")
    monkeypatch.setattr(backward, "SHARE_BYTES", 1 << 10)
    for left, right in zip(run(case, torch.float16, "triton"), whole, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("density", [0.0, 1.0])
def test_nothing_and_everything(make_case: Any, density: float) -> None:
    case = make_case(block=(8, 1), q_len=16, kv_len=18, head_dim=16, density=density)
    check(thin(case), torch.float16)


def test_a_mask_written_to_is_read_again() -> None:
    indices = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    offsets = torch.tensor([[[0, 2, 2]]], device=DEVICE)
    mask = SparseMask(indices, offsets, block_size=(1, 1), q_len=2, kv_len=3)
    value = torch.eye(3, device=DEVICE)[None, None]

    def kept() -> list[list[bool]]:
        query = torch.zeros(1, 1, 2, 3, device=DEVICE)
        leaf = value.clone().requires_grad_()
        out = attention(query, value, leaf, mask, backend="triton")
        assert isinstance(out, Tensor)
        out.sum().backward()
        assert leaf.grad is not None
        assert torch.equal(leaf.grad[0, 0].any(-1), (out[0, 0] > 0).any(0))
        return (out[0, 0] > 0).tolist()

    assert kept() == [[True, True, False], [False] * 3]
    mask.indices[1] = 2
    assert kept() == [[True, False, True], [False] * 3]
    mask.offsets[0, 0, 1] = 1
    assert kept() == [[True, False, False], [False, False, True]]


def test_strided_inputs(make_case: Any) -> None:
    case = thin(make_case(block=(8, 1), q_len=9, kv_len=12, head_dim=16))
    plain = run(case, torch.float16, "triton")
    wide = [torch.empty(*t.shape[:3], 2 * t.shape[3]) for t in case.inputs]
    for tensor, given_ in zip(wide, case.inputs, strict=True):
        tensor[..., ::2] = given_
    views = [t[..., ::2] for t in wide]
    views[0] = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    strided = type(case)(*views, case.mask, case.is_causal, case.key_padding, case.scale)
    for left, right in zip(run(strided, torch.float16, "triton"), plain, strict=True):
        assert torch.equal(left, right)


def test_what_it_refuses(make_case: Any) -> None:
    q, k, v = (t.to(DEVICE) for t in make_case(dtype=torch.float16, head_dim=16).inputs)
    mask = make_case().mask.to(DEVICE)
    wide = torch.zeros(2, 2, 9, 257, dtype=torch.float16, device=DEVICE)

    def refused(sentence: str, *inputs: Tensor, **options: Any) -> None:
        options = {"mask": mask, "enable_gqa": True, **options}
        with pytest.raises(NotImplementedError, match=f"'triton' cannot run this call: {sentence}"):
            attention(*inputs, **options, backend="triton")

    refused("it needs a mask", q, k, v, mask=None)
    refused("it has no dropout, got dropout_p 0.5", q, k, v, dropout_p=0.5)
    refused("it computes in .* got torch.float64", q.double(), k.double(), v.double())
    refused("it needs a value_dim of at most 256, got 257", q, k, wide)
    refused("it needs a scale above 0, got -1.0", q, k, v, scale=-1.0)
    if DEVICE == "cpu":
        halves = [t.bfloat16() for t in (q, k, v)]
        refused("Triton's interpreter multiplies the bits of bfloat16", *halves)


def test_auto_takes_it_on_gpus_only(make_case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (t.to(DEVICE) for t in make_case(dtype=torch.float16, head_dim=16).inputs)
    mask = make_case().mask.to(DEVICE)
    chosen = choose_backend(q, k, v, mask, enable_gqa=True)
    assert (chosen == "triton") == (DEVICE == "cuda")
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(NotImplementedError, match="on a CUDA device, got tensors on cpu"):
            attention(q, k, v, mask, enable_gqa=True, backend="triton")


def test_memory_follows_the_kept_pairs() -> None:
    """Elements allocated beside inputs and outputs, four times the length and as many keys."""

    def allocated(length: int) -> int:
        torch.manual_seed(0)
        rows = length // 8
        kept = torch.rand(1, 1, rows, length, device=DEVICE).topk(4, -1).indices.sort(-1).values
        mask = SparseMask.from_padded(kept, block_size=(8, 1), q_len=length, kv_len=length)
        leaves = [
            torch.randn(1, 1, length, 16, dtype=torch.float16, device=DEVICE).requires_grad_()
            for _ in range(3)
        ]
        with Allocations() as counted:
            found = attention(*leaves, mask, return_importance=True, backend="triton")
            assert isinstance(found, AttentionOutput)
            found.out.sum().backward()
        assert counted.elements > length * 16
        return counted.elements

    assert allocated(64) < 4.5 * allocated(16)


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the elements of every tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.elements += tensor.numel()
        return result
