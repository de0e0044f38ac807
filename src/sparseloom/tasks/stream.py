"""A text as one stream of tokens that remembers how many bytes and words each token covers.

Language models with different tokenizers can be compared only per byte or per word of the text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int, Integer, Num
from torch import Tensor

from sparseloom.models.base import LoadedModel
from sparseloom.tasks.base import spread


@dataclass(frozen=True, eq=False)
class TokenStream:
    """Tokens of a text, and the bytes and words of it that lie at or before each token's end.

    A word is a run of characters without white space and belongs to the token that ends it; every
    line end counts as one more word, the `<eos>` of word-level corpora.
    """

    tokens: Integer[np.ndarray, " tokens"]
    bytes_done: Int[np.ndarray, " tokens"]
    words_done: Int[np.ndarray, " tokens"]

    def windows(self, context: int, limit: int | None = None) -> list[tuple[int, int]]:
        """Spans (first, last) that score tokens first + 1 … last from inputs first … last − 1.

        Consecutive spans of `context` tokens, so that every token but the first is scored once; the
        last span may be shorter.  With `limit`, that many whole spans spread over the stream.
        """
        if context < 1:
            raise ValueError(f"context must be at least 1, got {context}")
        last = len(self.tokens) - 1
        spans = [(at, min(at + context, last)) for at in range(0, last, context)]
        whole = [span for span in spans if span[1] - span[0] == context]
        chosen = spread(len(whole), limit)
        if limit is None or not whole or limit > len(whole):
            return spans
        return [whole[i] for i in chosen]

    def read(self, first: int, stop: int) -> Int[Tensor, " tokens"]:
        """Tokens first … stop − 1 as int64."""
        return torch.from_numpy(self.tokens[first:stop].astype(np.int64))

    def bytes_in(self, span: tuple[int, int]) -> int:
        """Bytes of text that the span scores."""
        return int(self.bytes_done[span[1]] - self.bytes_done[span[0]])

    def words_in(self, span: tuple[int, int]) -> int:
        """Words (line ends included) that the span scores."""
        return int(self.words_done[span[1]] - self.words_done[span[0]])


def encode(loaded: LoadedModel, text: bytes, *, start: bool) -> TokenStream:
    """`text` (UTF-8) as the model's tokens; with `start`, its start token stands before them.

    A start token covers no text: with it, every token of the text is scored.  Bytes that are no
    UTF-8 reach a tokenizer as U+FFFD.
    """
    if loaded.tokenizer is None:
        raw = np.frombuffer(text, dtype=np.uint8)
        stream = TokenStream(
            raw, np.arange(1, len(raw) + 1, dtype=np.int32), _running_sum(_word_ends(raw))
        )
    else:
        stream = _tokenize(loaded, text.decode("utf-8", errors="replace"))
    first = loaded.start_token if start else None
    if first is None:
        return stream
    return TokenStream(
        np.append(first, stream.tokens),
        np.append(0, stream.bytes_done),
        np.append(0, stream.words_done),
    )


def _tokenize(loaded: LoadedModel, text: str) -> TokenStream:
    tokenizer = loaded.tokenizer
    assert tokenizer is not None
    fast = bool(tokenizer.is_fast)
    # verbose=False: the warning that the text is longer than the model's context is no news.
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
    tokens = np.asarray(encoded["input_ids"], dtype=np.int64)
    characters = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    sizes = 1 + (characters > 0x7F) + (characters > 0x7FF) + (characters > 0xFFFF)
    byte_ends = np.append(0, _running_sum(sizes))
    word_ends = np.append(0, _running_sum(_word_ends(np.minimum(characters, 0x7F))))
    if fast:
        ends = np.asarray(encoded["offset_mapping"], dtype=np.int64)[:, 1]
        ends = np.maximum.accumulate(ends)
    else:
        # Without offsets the text is shared out evenly; only sums over many tokens are meaningful.
        ends = np.linspace(0, len(text), len(tokens) + 1).astype(np.int64)[1:]
    return TokenStream(tokens, byte_ends[ends], word_ends[ends])


def _running_sum(steps: Num[np.ndarray, " n"] | Bool[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    return np.cumsum(steps, dtype=np.int32)


def _word_ends(text: Integer[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Where a word or a line ends, in ASCII codes (every other character is part of a word)."""
    space = np.isin(text, np.frombuffer(b" \t\n\r\v\f\0", dtype=np.uint8))
    after = np.append(space[1:], True)
    return (~space & after) | (text == ord("\n"))
