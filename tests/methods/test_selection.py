"""Top-k and threshold selection against a slow, literal reading of the rules."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import sparseloom.methods.scores as scores_module
from sparseloom.mask import SparseMask
from sparseloom.methods.grid import Grid, budgets, keeps_all
from sparseloom.methods.selection import Scores, threshold_mask, topk_mask


def rows_of(mask: SparseMask) -> list[list[list[list[int]]]]:
    """Kept key blocks as nested lists [batch][head][query block]."""
    return [
        [
            [
                mask.indices[mask.offsets[b, h, i] : mask.offsets[b, h, i + 1]].tolist()
                for i in range(mask.q_blocks)
            ]
            for h in range(mask.heads)
        ]
        for b in range(mask.batch)
    ]


def slow_topk(
    block_scores: Tensor,
    *,
    q_len: int,
    kv_len: int,
    sparsity: float,
    minimum_keys: int,
    block_size: tuple[int, int],
    is_causal: bool,
    key_padding: Tensor | None,
) -> list[list[list[list[int]]]]:
    bq, bk = block_size
    shift = kv_len - q_len
    chosen = []
    for b in range(block_scores.shape[0]):
        pad = key_padding[b if len(key_padding) > 1 else 0] if key_padding is not None else None

        def attended(key: int, pad: Tensor | None = pad) -> bool:
            return pad is None or bool(pad[key])

        heads = []
        for h in range(block_scores.shape[1]):
            rows = []
            for i in range(-(-q_len // bq)):
                queries = range(i * bq, min((i + 1) * bq, q_len))
                last = queries[-1] + shift if is_causal else kv_len - 1
                keys = [j for j in range(kv_len) if j <= last and attended(j)]
                may = sorted({j // bk for j in keys})
                must = set()
                if is_causal:
                    diagonal = {(q + shift) // bk for q in queries if q + shift >= 0}
                    must = {block for block in diagonal if block in may}
                share = math.ceil(round((1 - sparsity) * len(may), 6) - 1e-9)
                budget = min(len(may), max(share, math.ceil(minimum_keys / bk)))
                budget = max(budget, len(must))
                row = block_scores[b, h, i].tolist()
                order = sorted(may, key=lambda j: (j not in must, -row[j], j))
                rows.append(sorted(order[:budget]))
            heads.append(rows)
        chosen.append(heads)
    return chosen


def test_budget_is_the_rounded_up_share() -> None:
    allowed = torch.tensor([0, 1, 9, 10, 11, 20, 100, 2000])
    assert budgets(allowed, 0.9, 1).tolist() == [0, 1, 1, 1, 2, 2, 10, 200]
    assert budgets(allowed, 0.95, 16).tolist() == [0, 1, 9, 10, 11, 16, 16, 100]
    assert budgets(allowed, 0.0, 1).tolist() == allowed.tolist()


@given(st.integers(0, 5000), st.integers(0, 99), st.integers(1, 40))
@settings(deadline=None)
def test_budget_has_no_rounding_surprises(allowed: int, percent: int, minimum: int) -> None:
    exact = -(-(100 - percent) * allowed // 100)
    got = int(budgets(torch.tensor(allowed), percent / 100, minimum))
    assert got == min(allowed, max(minimum, exact))


def test_keeps_all() -> None:
    assert keeps_all(16, 0.9, 16)
    assert not keeps_all(17, 0.9, 16)
    assert keeps_all(10_000, 0.0, 1)


def test_worked_example_of_four_by_four() -> None:
    scores = torch.tensor([[9.0, 8, 7, 6], [1, 2, 8, 9], [3, 3, 1, 9], [5, 1, 5, 5]])[None, None]
    free = topk_mask(scores, sparsity=0.5, minimum_keys=1)
    assert rows_of(free) == [[[[0, 1], [2, 3], [0, 3], [0, 2]]]]
    # Causal budgets ⌈i/2⌉ for i = 1 … 4; the diagonal takes one place of each.
    causal = topk_mask(scores, sparsity=0.5, minimum_keys=1, is_causal=True)
    assert rows_of(causal) == [[[[0], [1], [0, 2], [0, 3]]]]
    padded = torch.tensor([[False, True, True, True]])
    left = topk_mask(scores, sparsity=0.5, minimum_keys=1, is_causal=True, key_padding=padded)
    assert rows_of(left) == [[[[], [1], [2], [2, 3]]]]
    tall = topk_mask(
        scores, sparsity=0.5, minimum_keys=1, block_size=(2, 1), is_causal=True, pooling="max"
    )
    # Block 0 must keep keys 0 and 1. Block 1 must keep 2 and 3: its budget of 2 is spent.
    assert rows_of(tall) == [[[[0, 1], [2, 3]]]]


def test_worked_example_of_pooling_by_mass() -> None:
    # Row 0 is sure of key 2, row 1 is torn between 0 and 1: shares 0.9, 0.05, … and 0.4, 0.4, ….
    shares = torch.tensor([[0.04, 0.05, 0.9, 0.01], [0.4, 0.39, 0.01, 0.2]])
    mask = topk_mask(
        shares.log()[None, None], sparsity=0.5, minimum_keys=1, block_size=(2, 1), pooling="mass"
    )
    assert rows_of(mask) == [[[[0, 2]]]]  # 0.44, 0.44 − ε, 0.91, 0.21
    wide = topk_mask(
        shares.log()[None, None], sparsity=0.5, minimum_keys=1, block_size=(1, 2), pooling="mass"
    )
    assert rows_of(wide) == [[[[1], [0]]]]


def test_ties_go_to_the_lowest_key() -> None:
    scores = torch.zeros(1, 2, 3, 100)
    scores[0, 1, :, 50:] = 1
    mask = topk_mask(scores, sparsity=0.9, minimum_keys=1)
    assert rows_of(mask) == [[[list(range(10))] * 3, [list(range(50, 60))] * 3]]


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    q_len = draw(st.integers(1, 20))
    kv_len = draw(st.integers(1, 28))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    padding = None
    if draw(st.booleans()):
        rows = draw(st.sampled_from([1, batch]))
        bits = st.lists(st.booleans(), min_size=kv_len, max_size=kv_len)
        padding = torch.tensor([draw(bits) for _ in range(rows)])
    return {
        "sizes": (batch, heads, q_len, kv_len),
        "seed": draw(st.integers(0, 1000)),
        "levels": draw(st.sampled_from([2, 5, 1000])),
        "settings": {
            "sparsity": draw(st.sampled_from([0.0, 0.3, 0.5, 0.9, 0.95])),
            "minimum_keys": draw(st.sampled_from([1, 3, 16])),
            "block_size": draw(st.sampled_from([(1, 1), (1, 1), (4, 1), (1, 3), (3, 4), (8, 1)])),
            "is_causal": draw(st.booleans()),
            "key_padding": padding,
        },
    }


@given(cases())
@settings(max_examples=120, deadline=None)
def test_topk_is_the_slow_rule(case: dict) -> None:
    batch, heads, q_len, kv_len = case["sizes"]
    bq, bk = case["settings"]["block_size"]
    generator = torch.Generator().manual_seed(case["seed"])
    blocks = (batch, heads, -(-q_len // bq), -(-kv_len // bk))
    block_scores = torch.randint(0, case["levels"], blocks, generator=generator).float()
    # One value per block, the same for all its pairs, so that no pooling rule can matter …
    fine = block_scores.repeat_interleave(bq, 2).repeat_interleave(bk, 3)[:, :, :q_len, :kv_len]
    expected = slow_topk(block_scores, q_len=q_len, kv_len=kv_len, **case["settings"])
    if (bq, bk) == (1, 1):
        got = topk_mask(fine, **case["settings"])
        assert rows_of(got) == expected
    else:  # … but which rows and keys take part still does: only the counts are free of it.
        for pooling in ("mass", "max"):
            got = topk_mask(fine, pooling=pooling, **case["settings"])
            counts = [[[len(row) for row in head] for head in entry] for entry in expected]
            assert got.counts.tolist() == counts
    remade = SparseMask(
        got.indices, got.offsets, block_size=got.block_size, q_len=q_len, kv_len=kv_len
    )  # validates: ascending, in range
    assert remade == got
    keep = got.to_bool()
    if case["settings"]["is_causal"]:
        padding = case["settings"]["key_padding"]
        for query in range(q_len):
            key = query + kv_len - q_len
            if key >= 0:
                real = (
                    torch.tensor(True) if padding is None else padding[:, key].view(-1, 1)
                ).expand(batch, heads)
                assert keep[:, :, query, key][real].all()
    if case["settings"]["sparsity"] == 0.0:
        grid = Grid(q_len, kv_len, **_grid_settings(case["settings"]), device=torch.device("cpu"))
        assert (keep | ~grid.allowed_pairs(0, q_len, kv_len)).all()


def _grid_settings(chosen: dict) -> dict:
    return {key: chosen[key] for key in ("block_size", "is_causal", "key_padding")}


@pytest.mark.parametrize("block_size", [(1, 1), (8, 1), (4, 4)])
@pytest.mark.parametrize("pooling", ["mass", "max"])
def test_chunks_change_nothing(
    monkeypatch: pytest.MonkeyPatch, block_size: tuple[int, int], pooling: str
) -> None:
    scores = torch.randn(2, 2, 50, 70, generator=torch.Generator().manual_seed(0))
    padding = torch.ones(2, 70, dtype=torch.bool)
    padding[1, :13] = False

    def run() -> list[SparseMask]:
        common = {"block_size": block_size, "is_causal": True, "key_padding": padding}
        return [
            topk_mask(scores, sparsity=0.8, minimum_keys=4, pooling=pooling, **common),
            threshold_mask(scores, 1.0, **common),
            threshold_mask(scores, 0.05, probability=True, **common),
        ]

    whole = run()
    monkeypatch.setattr(scores_module, "CPU_CHUNK", 1)
    assert run() == whole


def test_a_padded_query_has_no_say() -> None:
    scores = torch.zeros(1, 1, 4, 8)
    scores[0, 0, 0, 1] = scores[0, 0, 1, 2] = 9
    scores[0, 0, 2:, 7] = 99
    real = torch.tensor([[True, True, False, False]])
    for pooling in ("mass", "max"):
        settings_ = {"sparsity": 0.75, "minimum_keys": 1, "block_size": (4, 1)}
        with_padding = topk_mask(scores, pooling=pooling, query_padding=real, **settings_)
        alone = topk_mask(scores[:, :, :2], pooling=pooling, **settings_)
        assert rows_of(with_padding) == rows_of(alone) == [[[[1, 2]]]]


def test_pooling_by_mass_is_the_best_choice() -> None:
    """No other two columns of six retain more probability than the chosen ones."""
    from itertools import combinations

    scores = 3 * torch.randn(1, 1, 4, 6, generator=torch.Generator().manual_seed(3))
    mask = topk_mask(scores, sparsity=2 / 3, minimum_keys=1, block_size=(4, 1))
    columns = scores.softmax(-1)[0, 0].sum(0)
    best = max(combinations(range(6), 2), key=lambda pair: float(columns[list(pair)].sum()))
    assert rows_of(mask) == [[[list(best)]]]


def test_threshold_of_scores_per_head() -> None:
    scores = torch.tensor([[1.0, 2, 3], [3, 1, 2], [-5, -6, -7]]).expand(1, 2, 3, 3)
    mask = threshold_mask(scores, torch.tensor([2.0, 3.0]))
    assert rows_of(mask) == [[[[1, 2], [0, 2], [0]], [[2], [0], [0]]]]
    causal = threshold_mask(scores, torch.tensor([2.0, 3.0]), is_causal=True)
    assert rows_of(causal) == [[[[0], [0, 1], [0, 2]], [[0], [0, 1], [0, 2]]]]
    blocks = threshold_mask(scores, 3.0, block_size=(2, 2))
    assert rows_of(blocks) == [[[[0, 1], [0]], [[0, 1], [0]]]]


def test_threshold_of_probabilities_and_padding() -> None:
    shares = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.5, 0.3]])
    scores = shares.log()[None, None]
    assert rows_of(threshold_mask(scores, 0.25, probability=True)) == [[[[0, 1], [2], [1, 2]]]]
    padding = torch.tensor([[True, True, False]])
    # Without key 2 the rows are 5/8, 3/8; 1/2, 1/2; 2/7, 5/7.
    mask = threshold_mask(scores, 0.3, probability=True, key_padding=padding)
    assert rows_of(mask) == [[[[0, 1], [0, 1], [1]]]]
    nobody = threshold_mask(
        scores, 0.3, probability=True, key_padding=torch.zeros(1, 3, dtype=torch.bool)
    )
    assert nobody.nnz == 0


def test_scores_of_grouped_heads() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    key = torch.randn(2, 3, 7, 8, generator=generator)
    full = (query @ key.repeat_interleave(2, 1).transpose(-1, -2)) * 0.3
    got = Scores.from_query_key(query, key, 0.3).rows(1, 4, 6)
    torch.testing.assert_close(got, full[:, :, 1:4, :6])
    with pytest.raises(ValueError, match="multiple of 3"):
        Scores.from_query_key(query[:, :4], key, 1.0)


def test_given_scores_are_not_written_to() -> None:
    scores = torch.randn(1, 1, 6, 6)
    before = scores.clone()
    threshold_mask(scores, 0.5, is_causal=True)
    topk_mask(scores, sparsity=0.5, block_size=(2, 1), is_causal=True)
    assert torch.equal(scores, before)


@given(cases(), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_local_topk_is_topk_of_every_tile(case: dict, tile: int) -> None:
    batch, heads, q_len, kv_len = case["sizes"]
    chosen = {**case["settings"], "block_size": (1, 1)}
    generator = torch.Generator().manual_seed(case["seed"])
    scores = torch.randint(0, case["levels"], (batch, heads, q_len, kv_len), generator=generator)
    whole = {**chosen, "sparsity": 0.0, "minimum_keys": 1}
    slow: dict = {"q_len": q_len, "kv_len": kv_len}
    allowed = slow_topk(scores.float(), **slow, **whole)
    budget = slow_topk(scores.float(), **slow, **chosen)
    got = rows_of(topk_mask(scores.float(), tile=tile, **chosen))
    edges = range(0, kv_len, tile)
    for b in range(batch):
        for h in range(heads):
            for i in range(q_len):
                may, k = allowed[b][h][i], len(budget[b][h][i])
                diagonal = i + kv_len - q_len if chosen["is_causal"] else None
                wanted = []
                for edge in edges:
                    here = [j for j in may if edge <= j < edge + tile]
                    from_here = sum(j >= edge for j in may)
                    after = from_here - len(here)
                    share = -(-k * from_here // max(1, len(may))) + (k * -after // max(1, len(may)))
                    order = sorted(here, key=lambda j: (j != diagonal, -scores[b, h, i, j], j))
                    wanted += sorted(order[:share])
                # One diagonal lies in the last tile, whose share is rounded up: nothing is raised.
                assert len(wanted) == k
                assert got[b][h][i] == wanted


def test_worked_example_of_tiles() -> None:
    scores = torch.tensor([9.0, 8, 7, 6, 1, 2, 4, 3, 0, 5]).expand(1, 1, 1, 10)
    common: dict = {"sparsity": 0.5, "minimum_keys": 1}
    assert rows_of(topk_mask(scores, **common)) == [[[[0, 1, 2, 3, 9]]]]
    # Tiles of 4, 4 and 2 keys get 2, 2 and 1 of the five.
    assert rows_of(topk_mask(scores, tile=4, **common)) == [[[[0, 1, 6, 7, 9]]]]
    assert rows_of(topk_mask(scores, tile=16, **common)) == [[[[0, 1, 2, 3, 9]]]]
    blocks = topk_mask(scores, tile=4, block_size=(1, 2), pooling="max", **common)
    # 5 blocks, 3 to keep: the later tiles get what rounding leaves over.
    assert rows_of(blocks) == [[[[0, 3, 4]]]]
    # Four queries must keep the last four keys. Shares of 3 and 1 become 3 and 2 by that.
    tall = topk_mask(
        scores.expand(1, 1, 4, 10), tile=8, block_size=(4, 1), sparsity=0.9, minimum_keys=1,
        is_causal=True,
    )  # fmt: skip
    assert rows_of(tall) == [[[[0, 6, 7, 8, 9]]]]


def test_heads_that_share_a_mask_keep_the_most_of_their_mass() -> None:
    scores = 3 * torch.randn(2, 4, 6, 9, generator=torch.Generator().manual_seed(3))
    for heads in (1, 2):
        mask = topk_mask(scores, sparsity=2 / 3, minimum_keys=1, mask_heads=heads)
        summed = scores.softmax(-1).unflatten(1, (heads, -1)).sum(2)
        assert mask == topk_mask(summed, sparsity=2 / 3, minimum_keys=1)
        best = topk_mask(scores, sparsity=2 / 3, minimum_keys=1, mask_heads=heads, pooling="mean")
        summed = scores.unflatten(1, (heads, -1)).mean(2)
        assert best == topk_mask(summed, sparsity=2 / 3, minimum_keys=1)
    tall = topk_mask(scores, sparsity=2 / 3, minimum_keys=1, mask_heads=1, block_size=(3, 1))
    summed = scores.softmax(-1).sum(1, keepdim=True).unflatten(2, (2, 3)).sum(3)
    assert rows_of(tall) == rows_of(topk_mask(summed, sparsity=2 / 3, minimum_keys=1))
    level = threshold_mask(scores, 2.0, mask_heads=2).to_bool()
    alone = threshold_mask(scores, 2.0).to_bool()
    assert torch.equal(level, alone.unflatten(1, (2, 2)).any(2))


def test_caps_take_keys_in_their_order_and_fill_up_with_the_best() -> None:
    scores = torch.tensor([[1.0, 5, 3, 9, 4, 8], [1, 2, 0, 9, 0, 1]]).expand(1, 2, 2, 6)
    common: dict = {"sparsity": 0.5, "minimum_keys": 1}
    mask = topk_mask(scores, caps=torch.tensor([3.0, 100.0]), **common)
    # Keys 1, 2, 3, 4, 5 reach 3 in the first row, key 3 alone in the second.
    assert rows_of(mask) == [[[[1, 2, 3], [0, 1, 3]], [[1, 3, 5], [0, 1, 3]]]]
