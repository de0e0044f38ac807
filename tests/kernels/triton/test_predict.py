"""Prediction and selection in Triton against the plain torch of `methods/`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparseloom.kernels import prediction
from sparseloom.mask import SparseMask
from sparseloom.methods import compiled
from sparseloom.methods.coding import Coded
from sparseloom.methods.grid import Grid
from sparseloom.methods.pooling import pool_scores
from sparseloom.methods.predictor import LayerPredictor
from sparseloom.methods.selection import threshold_mask, topk_mask

POOLINGS = ("mass", "max", "mean")
few = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # the interpreter is too slow to shrink with
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def on_triton(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors on the CPU go to the interpreter, a few query blocks at a time."""
    from sparseloom.kernels.triton import chunks, predict

    monkeypatch.setattr(prediction, "backend", lambda device: predict)
    monkeypatch.setattr(prediction, "unsupported", lambda bits, width, device: None)
    monkeypatch.setattr(chunks, "RANK_BYTES", 8000)
    return


def codes_of(
    device: torch.device, q_len: int, kv_len: int, width: int, bits: int, seed: int
) -> tuple[Coded, Coded]:
    """Random codes, as the predictor makes them, with scores of a few units: two batch entries
    with odd seeds, two heads with even ones."""
    batch, heads = (2, 1) if seed % 2 else (1, 2)
    generator = torch.Generator().manual_seed(seed)
    most = 2 ** (bits - 1) - 1
    spread = max(1.0, most / 2.5)

    def draw(length: int) -> Tensor:
        normal = torch.randn(batch, heads, length, width, generator=generator)
        return (normal * spread).round().clamp(-most, most).to(device)

    rows = 2.0 / (math.sqrt(width) * spread**2) * (
        0.5 + torch.rand(batch, heads, q_len, 1, generator=generator)
    )  # fmt: skip
    per_head = 0.5 + torch.rand(1, heads, 1, 1, generator=generator)
    return Coded(draw(q_len), rows.to(device)), Coded(draw(kv_len), per_head.to(device))


def scores_of(q: Coded, k: Coded) -> Tensor:
    return (q.codes.float() @ k.codes.float().transpose(-1, -2)) * (q.scale * k.scale)


def valid(mask: SparseMask) -> SparseMask:
    """The mask again, checked: ascending, in range."""
    return SparseMask(
        mask.indices,
        mask.offsets,
        block_size=mask.block_size,
        q_len=mask.q_len,
        kv_len=mask.kv_len,
    )


@st.composite
def cases(draw: st.DrawFn, sizes: tuple[int, int] = (3, 40)) -> dict[str, Any]:
    q_len, kv_len = draw(st.integers(1, sizes[0])), draw(st.integers(1, sizes[1]))
    padding, seed = None, draw(st.integers(0, 1000))
    if draw(st.booleans()):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
        rows = draw(st.sampled_from([1, 1 + seed % 2]))
        padding = torch.rand(rows, kv_len, generator=generator) < 0.6
    return {
        "sizes": (q_len, kv_len, draw(st.sampled_from([1, 5, 16, 40]))),
        "bits": draw(st.sampled_from([2, 4, 8])),
        "seed": seed,
        "is_causal": draw(st.booleans()),
        "padding": padding,
        "sparsity": draw(st.sampled_from([0.0, 0.5, 0.9])),
        "minimum_keys": draw(st.sampled_from([1, 3])),
        "voters": draw(st.booleans()),
    }


def _options(case: dict[str, Any], device: torch.device, **options: Any) -> dict[str, Any]:
    padding, voters = case["padding"], None
    if case["voters"]:
        generator = torch.Generator().manual_seed(1)
        rows = 1 + case["seed"] % 2
        voters = (torch.rand(rows, case["sizes"][0], generator=generator) < 0.6).to(device)
    return {
        "sparsity": case["sparsity"],
        "minimum_keys": case["minimum_keys"],
        "is_causal": case["is_causal"],
        "key_padding": None if padding is None else padding.to(device),
        "query_padding": voters,
        **options,
    }


@given(case=cases(), tile=st.sampled_from([None, 20]))
@few
def test_single_pairs_are_exactly_those_of_the_reference(
    case: dict[str, Any], tile: int | None, device: torch.device
) -> None:
    q, k = codes_of(device, *case["sizes"], case["bits"], case["seed"])
    options = _options(case, device, block_size=(1, 1), pooling="mass", tile=tile)
    got = compiled.topk_of_codes(q, k, bits=case["bits"], **options)
    assert valid(got) == topk_mask(scores_of(q, k), **options)


@pytest.mark.parametrize("pooling", POOLINGS)
@given(
    case=cases((17, 50)),
    block_size=st.sampled_from([(8, 1), (64, 1), (5, 2), (16, 16)]),
)
@few
def test_blocks_are_those_of_the_reference_but_for_rounding(
    pooling: Any, case: dict[str, Any], block_size: tuple[int, int], device: torch.device
) -> None:
    q, k = codes_of(device, *case["sizes"], case["bits"], case["seed"])
    options = _options(case, device, block_size=block_size, pooling=pooling)
    got = valid(compiled.topk_of_codes(q, k, bits=case["bits"], **options))
    expected = topk_mask(scores_of(q, k), **options)
    assert torch.equal(got.offsets, expected.offsets)
    q_len, kv_len, _ = case["sizes"]
    grid = Grid(
        q_len,
        kv_len,
        block_size=block_size,
        is_causal=case["is_causal"],
        key_padding=options["key_padding"],
        device=device,
    )
    pairs = grid.allowed_pairs(0, q_len, kv_len)
    pooled = pool_scores(scores_of(q, k), pairs, block_size, pooling, options["query_padding"])
    pooled = pooled.nan_to_num(neginf=-1e30)
    ours, theirs = got.to_block_bool(), expected.to_block_bool()
    for b, h, i in (ours ^ theirs).any(-1).nonzero().tolist():
        gained = pooled[b, h, i][ours[b, h, i] & ~theirs[b, h, i]]
        lost = pooled[b, h, i][theirs[b, h, i] & ~ours[b, h, i]]
        assert float(lost.max() - gained.min()) <= 1e-5 * max(1.0, float(lost.abs().max()))


@given(case=cases((6, 40)), block_size=st.sampled_from([(1, 1), (8, 1), (5, 2)]))
@few
def test_thresholds_keep_the_pairs_of_the_reference(
    case: dict[str, Any], block_size: tuple[int, int], device: torch.device
) -> None:
    q, k = codes_of(device, *case["sizes"], case["bits"], case["seed"])
    level = torch.tensor([0.4, 1e9][: q.codes.shape[1]])  # the second head keeps the best alone
    options = _options(case, device)
    options = {name: options[name] for name in ("is_causal", "key_padding")}
    got = compiled.threshold_of_codes(
        q, k, level, block_size=block_size, bits=case["bits"], **options
    )
    assert valid(got) == threshold_mask(scores_of(q, k), level, block_size=block_size, **options)


@pytest.mark.parametrize("block_size", [(1, 1), (8, 1)])
def test_ties_go_to_the_lowest_key(block_size: tuple[int, int], device: torch.device) -> None:
    rows = 2 if block_size == (1, 1) else 8
    q = Coded(torch.ones(1, 1, rows, 16), torch.ones(1, 1, rows, 1))
    k = Coded(torch.zeros(1, 1, 300, 16), torch.ones(1, 1, 1, 1))
    k.codes[:, :, 100:170, 0] = 1
    q, k = (Coded(*(part.to(device) for part in side)) for side in (q, k))
    for pooling in POOLINGS if block_size != (1, 1) else ("mass",):
        for sparsity, wanted in [
            (0.9, torch.arange(100, 130)),
            (0.7, torch.cat([torch.arange(20), torch.arange(100, 170)])),
        ]:
            got = compiled.topk_of_codes(
                q,
                k,
                sparsity=sparsity,
                minimum_keys=1,
                block_size=block_size,
                is_causal=False,
                key_padding=None,
                query_padding=None,
                pooling=pooling,
                bits=2,
            )
            assert (got.padded()[0].cpu() == wanted).all()


class _Largest(TorchDispatchMode):
    """Bytes of the largest tensor that an operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_tensor_is_as_large_as_the_scores(pooling: Any, device: torch.device) -> None:
    from sparseloom.kernels.triton import chunks

    q, k = codes_of(device, 256, 512, 16, 4, 0)
    q, k = Coded(q.codes[:, :1], q.scale[:, :1]), Coded(k.codes[:, :1], k.scale[:, :1])
    with _Largest() as largest:
        mask = compiled.topk_of_codes(
            q,
            k,
            sparsity=0.9,
            minimum_keys=1,
            block_size=(64, 1),
            is_causal=True,
            key_padding=None,
            query_padding=None,
            pooling=pooling,
            bits=4,
        )
    linear = 4 * 16 * 512  # codes of queries or keys, at most in fp32
    ranks = chunks.RANK_BYTES
    assert largest.bytes <= max(linear, ranks, 4 * mask.nnz, 8 * 512)
    assert largest.bytes < 256 * 512 // 2  # half a byte for each score


def _layer(bits: int, width: int, hidden_size: int, rotary: bool) -> LayerPredictor:
    layer = LayerPredictor(
        hidden_size=hidden_size, heads=3, head_dim=32, width=width, bits=bits, rotary=rotary
    )
    layer.train()
    with torch.enable_grad():  # its scales are learned
        layer.scores(torch.randn(2, 30, hidden_size), _rotary(30))
    return layer.eval()


def _rotary(length: int) -> tuple[Tensor, Tensor]:
    frequency = 100.0 ** (-torch.arange(0, 24, 2) / 24)  # a part of the head turns
    angle = torch.arange(length)[:, None] * frequency
    angle = torch.cat([angle, angle], -1)[None]
    return angle.cos(), angle.sin()


@pytest.mark.parametrize(
    ("bits", "width", "hidden_size", "rotary"),
    [(2, 6, 70, True), (4, 16, 40, True), (8, 5, 200, False)],
)
@torch.no_grad()
def test_codes_are_those_of_the_reference(
    bits: int, width: int, hidden_size: int, rotary: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    layer = _layer(bits, width, hidden_size, rotary)
    wanted = []
    turn = _rotary(19) if rotary else None
    hiddens = [torch.randn(2, 19, hidden_size).to(d) for d in (torch.float32, torch.bfloat16)]
    for hidden in hiddens:
        hidden[0, 3] = 0
        wanted.append(layer.encode(hidden, turn))  # on the CPU
    layer = layer.to(device)
    turn = None if turn is None else (turn[0].to(device), turn[1].to(device))
    for hidden, coded in zip(hiddens, wanted, strict=True):
        got = compiled.encode_to_codes(layer, hidden.to(device), turn)
        assert got is not None
        for ours, theirs in zip(got, coded, strict=True):
            assert torch.equal(ours.codes.float().cpu(), theirs.codes)
            assert torch.equal(ours.scale.cpu(), theirs.scale)


@torch.no_grad()
def test_numbers_that_are_not_finite_are_left_to_the_reference(device: torch.device) -> None:
    layer = _layer(4, 16, 40, rotary=False).to(device)
    for odd in (math.nan, math.inf):
        hidden = torch.randn(1, 5, 40)
        hidden[0, 2, 39] = odd
        assert compiled.encode_to_codes(layer, hidden.to(device)) is None


def test_fp8_gives_the_same_codes_and_keys_or_says_why_not(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparseloom.kernels.triton import arithmetic

    q, k = codes_of(device, 4, 30, 16, 4, 0)
    common: dict[str, Any] = {
        "sparsity": 0.5,
        "minimum_keys": 1,
        "block_size": (1, 1),
        "is_causal": False,
        "key_padding": None,
        "query_padding": None,
        "pooling": "mass",
    }
    with pytest.raises(ValueError, match="unknown arithmetic"), arithmetic.use_arithmetic("int3"):
        pass
    expected = compiled.topk_of_codes(q, k, bits=4, **common)
    with arithmetic.use_arithmetic("fp8"):
        if device.type == "cpu" or torch.cuda.get_device_capability(device)[0] == 9:
            assert compiled.topk_of_codes(q, k, bits=4, **common) == expected
        with pytest.raises(NotImplementedError, match="codes of up to 4 bits"):
            compiled.topk_of_codes(q, k, bits=8, **common)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        with pytest.raises(NotImplementedError, match=r"capability 9 \(Hopper\), got 8\.0"):
            arithmetic.check(4, torch.device("cuda"))
    assert arithmetic.chosen() == "int8"
