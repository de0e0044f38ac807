from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sparseloom.models import LoadedModel
from sparseloom.tasks.base import spread
from sparseloom.tasks.stream import TokenStream, encode


def count_up(tokens: int) -> TokenStream:
    done = np.arange(1, tokens + 1, dtype=np.int32)
    return TokenStream(np.arange(tokens), done, done // 5)


@given(st.integers(2, 300), st.integers(1, 50))
def test_every_token_but_the_first_is_scored_once(tokens: int, context: int) -> None:
    stream = count_up(tokens)
    scored = [t for first, last in stream.windows(context) for t in range(first + 1, last + 1)]
    assert scored == list(range(1, tokens))
    assert sum(stream.bytes_in(span) for span in stream.windows(context)) == tokens - 1


@given(st.integers(20, 300), st.integers(1, 9), st.integers(1, 60))
def test_limited_windows_are_whole_distinct_and_spread(
    tokens: int, context: int, limit: int
) -> None:
    stream = count_up(tokens)
    spans = stream.windows(context, limit)
    whole = [span for span in stream.windows(context) if span[1] - span[0] == context]
    if limit > len(whole):
        assert spans == stream.windows(context)
    else:
        assert len(spans) == limit
        assert set(spans) <= set(whole)
        assert sorted(set(spans)) == spans
        positions = [whole.index(span) for span in spans]
        assert positions[0] <= len(whole) // limit
        assert len(whole) - 1 - positions[-1] <= len(whole) // limit


def test_spread_refuses_nothing() -> None:
    assert spread(10, 2) == [2, 7]
    assert spread(3, None) == spread(3, 5) == [0, 1, 2]
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        spread(3, 0)
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        count_up(5).windows(0)


def test_bytes_and_words_of_a_byte_model(byte_model: LlamaForCausalLM) -> None:
    text = " = Zoë = \n\n a <unk> é \n".encode()
    stream = encode(LoadedModel.of(byte_model), text, start=True)
    assert stream.tokens[0] == 0
    assert bytes(stream.tokens[1:].astype(np.uint8)) == text
    assert stream.bytes_done[0] == 0
    assert stream.bytes_done[-1] == len(text)
    # Words = Zoë = a <unk> é, and three line ends.
    assert stream.words_done[-1] == 6 + 3
    without = encode(LoadedModel.of(byte_model), text, start=False)
    assert len(without.tokens) == len(text)
    assert without.bytes_done[0] == 1


def test_a_word_belongs_to_the_token_that_ends_it(byte_model: LlamaForCausalLM) -> None:
    stream = encode(LoadedModel.of(byte_model), b"ab c\n", start=False)
    assert stream.words_done.tolist() == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("fast", [True, False])
def test_a_tokenizer_covers_the_same_bytes_and_words(
    byte_model: LlamaForCausalLM, encoder: LoadedModel, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = encoder.tokenizer
    assert tokenizer is not None
    text = "the dog runs\nthe cät 😀 sleeps".encode()
    if not fast:
        monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", False)
    stream = encode(LoadedModel("tiny", byte_model, tokenizer), text, start=True)
    assert stream.bytes_done[-1] == len(text)
    assert stream.words_done[-1] == 7 + 1
    assert np.all(np.diff(stream.bytes_done) >= 0)
    if fast:
        assert stream.bytes_done.tolist() == [3, 7, 12, 16, 21, 26, 33]
