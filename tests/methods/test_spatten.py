"""SpAtten's counts, scores and choice of survivors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from sparseloom.kernels import attention
from sparseloom.kernels.api import AttentionOutput
from sparseloom.methods import AttentionInputs, SpAtten, Survivors
from sparseloom.methods.cascade import Cascade, largest, slots_of


def kept(scores: list[float], count: int) -> list[float]:
    """What the top-k engine would hand on."""
    row = torch.tensor([scores], dtype=torch.float32)
    return row[largest(row, torch.tensor([count]))].tolist()


def test_top_keeps_the_order_of_its_input() -> None:
    # The slides' example of the top-k engine (HPCA 2021): k = 4 of eight numbers.
    assert kept([7, 2, 6, 4, 9, 1, 3, 5], 4) == [7, 6, 9, 5]
    # Two elements tie for the third place: the first in input order stays, as in Fig. 9.
    assert kept([0.5, 0.25, 0.5, 1.25, 0.125], 2) == [0.5, 1.25]
    row = torch.tensor([[0.5, 0.25, 0.5, 1.25, 0.5]])
    assert largest(row, torch.tensor([3])).tolist() == [[True, False, True, True, False]]


@hypothesis_settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.integers(0, 12))
def test_top_against_sorting_in_python(values: list[int], count: int) -> None:
    ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
    wanted = sorted(ranked[:count])
    chosen = largest(torch.tensor([values]).float(), torch.tensor([count]))
    assert chosen[0].nonzero().flatten().tolist() == wanted
    slots, counts = slots_of(chosen)
    assert slots[0, counts[0]].tolist() == wanted
    assert slots.shape[1] == max(min(count, len(values)), 1)
    assert len(set(slots[0].tolist())) == slots.shape[1]


def test_counts_of_the_published_traces() -> None:
    # Keep lists of the authors' gpt2-small trace, of 1024 tokens: 921, 716, 204, 102.
    shares = (0.9, 0.7, *[0.2] * 4, *[0.1] * 6)
    method = SpAtten(token_keep=shares, head_keep=None)
    assert method.kept_tokens(12, 1024) == [921, 716, *[204] * 4, *[102] * 6]
    assert method.kept_heads(12, 12) == [12] * 12


def test_the_rule_of_the_paper() -> None:
    # §V-A: of twelve layers two lose no tokens, four no heads; the rest falls linearly.
    method = SpAtten(token_keep=0.5, head_keep=0.9)
    tokens = method.kept_tokens(12, 1000)
    assert tokens[:3] == [1000, 1000, 700]
    assert tokens[-1] == 100
    assert sum(tokens) / 12 == pytest.approx(500, abs=1)
    heads = method.kept_heads(12, 12)
    assert heads[:4] == [12] * 4
    assert heads[4] == 11  # 1 − 0.5 · 0.1 · 12/8 of twelve
    assert SpAtten(token_keep=0.5, start_ratio=0.6).kept_tokens(12, 1000) == [1000] * 2 + [400] * 10
    assert SpAtten(token_keep=None).kept_tokens(6, 9) == [9] * 6
    assert SpAtten(token_keep=0.5).kept_tokens(6, 1) == [1] * 6
    assert SpAtten(token_keep=0.5).kept_tokens(6, 0) == [0] * 6


def test_longer_inputs_lose_more() -> None:
    # §I: a longer sentence can lose a larger share; none is lost at length 0, at most 0.9 ever.
    method = SpAtten(token_keep=0.8, reference_length=100)
    shares = [sum(method.kept_tokens(10, length)) / length / 10 for length in (50, 100, 200, 9000)]
    assert shares[:3] == pytest.approx([0.9, 0.8, 0.6], abs=0.01)
    assert shares[3] == pytest.approx(1 - 0.9 * 0.8, abs=0.01)  # two of ten layers are left alone
    flat = SpAtten(token_keep=0.8, start_ratio=0.25, reference_length=100)  # of eight layers of ten
    assert flat.kept_tokens(10, 200) == [200] * 2 + [100] * 8
    rising = SpAtten(token_keep=0.8, start_ratio=0.0, reference_length=100)
    assert rising.kept_tokens(10, 9000)[2] == 1350  # 0.85, for the last to lose 0.95
    assert rising.kept_tokens(10, 9000)[-1] == 450
    listed = SpAtten(token_keep=(1.0, 0.8), reference_length=10)
    assert listed.kept_tokens(2, 5) == [5, 4]
    assert listed.kept_tokens(2, 20) == [20, 12]
    assert listed.kept_tokens(2, 1000) == [1000, 100]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token_keep": 0.0}, r"token_keep must be in \(0, 1\], got 0.0"),
        ({"token_keep": (1.0, 1.5)}, r"token_keep must be in \(0, 1\]"),
        ({"head_keep": (0.5, 0.6)}, "head_keep must not rise from layer to layer"),
        ({"head_keep": ()}, "head_keep must name at least one share"),
        ({"value_keep": 2.0}, r"value_keep must be in \(0, 1\], got 2.0"),
        ({"threshold": -0.1}, r"threshold must be in \[0, 1\], got -0.1"),
        ({"front": 1.0}, r"front must be in \[0, 1\), got 1.0"),
        ({"start_ratio": 1.0}, r"start_ratio must be in \[0, 1\) or none, got 1.0"),
        ({"reference_length": 0}, "reference_length must be an integer of at least 1"),
        ({"value_bits": 1}, r"value_bits must be in \[2, 16\] or none, got 1"),
        ({"key_bits": (1, 4)}, "key_bits must be at least 2 high and 0 low bits"),
    ],
)
def test_bad_settings(settings: dict, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        SpAtten(**settings)


def test_lists_must_fit_the_model() -> None:
    with pytest.raises(ValueError, match="token_keep must have one share for each of 3 layers"):
        SpAtten(token_keep=(1.0, 0.5)).kept_tokens(3, 10)


def test_importance_is_the_column_sum_of_the_probabilities() -> None:
    """Algorithm 2, by hand: two queries, three keys, rows (½, ¼, ¼) and (⅛, ⅛, ¾)."""
    rows = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]])
    key = torch.eye(3)[None, None]
    found = attention(
        rows.log()[None, None], key, torch.ones(1, 1, 3, 2), scale=1.0, return_importance=True
    )
    assert isinstance(found, AttentionOutput)
    assert found.key_importance is not None
    assert found.head_importance is not None
    assert found.key_importance[0, 0].tolist() == pytest.approx([0.625, 0.375, 1.0])
    assert found.head_importance.tolist() == [[pytest.approx(4.0)]]  # two rows of (1, 1)


def cascade_of(counts: list[list[int]], heads: list[int], valid: list[list[int]]) -> Cascade:
    return Cascade(counts, heads, torch.tensor(valid).bool())


def test_scores_add_up_and_dead_heads_give_nothing() -> None:
    state = cascade_of([[3, 2, 2]], [2, 1, 1], [[1, 1, 1]])
    state.gather(torch.tensor([[[0.5, 1.0, 2.0], [1.0, 1.0, 0.0]]]), torch.tensor([[5.0, 7.0]]))
    survivors = state.rank(1)
    assert survivors.tokens is not None
    assert survivors.heads is not None
    assert survivors.tokens.tolist() == [[True, True, False]]  # 1.5 (forced), 2.0, 2.0
    assert survivors.heads.tolist() == [[False, True]]
    slots = state.apply(survivors)
    assert slots is not None
    assert slots.tolist() == [[0, 1]]
    state.gather(torch.tensor([[[9.0, 9.0], [0.25, 0.75]]]), torch.tensor([[9.0, 1.0]]))
    assert state.tokens.tolist() == [[1.75, 2.75]]
    assert state.heads.tolist() == [[5.0, 8.0]]
    assert state.rank(2) == Survivors(None, None)
    assert state.rank(3) == Survivors(None, None)


def test_sequences_of_a_batch_keep_to_themselves() -> None:
    """True lengths: padding takes no place; the first real token always stays."""
    state = cascade_of([[4, 2], [2, 1], [0, 0]], [1, 1], [[1, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    importance = torch.tensor([[[1.0, 3.0, 2.0, 5.0]], [[9.0, 9.0, 1.0, 2.0]], [[0.0] * 4]])
    state.gather(importance, torch.ones(3, 1))
    slots = state.apply(state.rank(1))
    assert slots is not None
    assert slots.shape == (3, 2)
    assert state.valid.tolist() == [[True, True], [True, False], [False, False]]
    assert state.positions[0].tolist() == [0, 3]
    assert state.positions[1, 0] == 2


def test_the_newest_token_stays_in_decoders() -> None:
    valid = torch.ones(1, 4).bool()
    method = SpAtten(token_keep=(1.0, 0.5), head_keep=None)
    importance = torch.tensor([[[1.0, 4.0, 3.0, 2.0]]])
    for is_causal, wanted in ((False, [0, 1]), (True, [1, 3])):
        state = method.start(2, 1, valid, is_causal=is_causal)
        state.gather(importance, torch.ones(1, 1))
        state.apply(state.rank(1))
        assert state.positions.tolist() == [wanted]


def test_prune_needs_its_own_state() -> None:
    query = torch.zeros(1, 1, 2, 8)
    inputs = AttentionInputs(query=query, key=query, layer=0, is_causal=False, scale=1.0)
    with pytest.raises(TypeError, match="state must be a Cascade from start, got NoneType"):
        SpAtten().prune(inputs, torch.ones(1, 1, 2), torch.ones(1, 1))
    state = SpAtten(token_keep=(1.0, 0.5)).start(2, 1, torch.ones(1, 2).bool(), is_causal=False)
    survivors = SpAtten().prune(inputs, torch.ones(1, 1, 2), torch.ones(1, 1), state)
    assert survivors.tokens is not None
    assert survivors.tokens.tolist() == [[True, False]]
