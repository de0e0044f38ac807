"""A text's tokens as parts of the text, so that they can be drawn over it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparseloom.models import LoadedModel


class Piece(NamedTuple):
    """One token: what stands between it and the token before, and its own part of the text."""

    gap: str
    text: str


def encode(
    loaded: LoadedModel, text: str, *, spare: int = 0
) -> tuple[dict[str, Tensor], list[Piece]]:
    """The model's inputs for one text, (1, tokens) each, and the pieces of that text.

    Args:
        loaded: model and tokenizer.
        text: what is encoded.
        spare: tokens that must still fit behind it.

    Raises:
        ValueError: no token, or more than the model takes.
    """
    if not text.strip():
        raise ValueError("text is empty: give at least one word")
    if loaded.tokenizer is None:
        raw = text.encode("utf-8")
        inputs = {"input_ids": torch.tensor([list(raw)])}
        pieces = [Piece("", _byte(one)) for one in raw]
    else:
        inputs, pieces = _with_tokenizer(loaded.tokenizer, text)
    longest = _longest(loaded) - spare
    if len(pieces) > longest:
        raise ValueError(
            f"text has {len(pieces)} tokens, and the model {loaded.name!r} takes at most {longest}"
            f"{' before the one that it adds' if spare else ''}"
        )
    return inputs, pieces


def piece_of(loaded: LoadedModel, token: int) -> Piece:
    """A token that is not part of a text."""
    if loaded.tokenizer is None:
        return Piece("", _byte(token))
    decoded = _decode(loaded.tokenizer, token)
    return Piece(decoded[: len(decoded) - len(decoded.lstrip())], decoded.strip() or "␣")


def token_text(loaded: LoadedModel, token: int) -> str:
    """A token by itself, white space made visible."""
    text = _byte(token) if loaded.tokenizer is None else _decode(loaded.tokenizer, token)
    return text.replace("\n", "↵").replace(" ", "␣") or "∅"


def _with_tokenizer(tokenizer: Any, text: str) -> tuple[dict[str, Tensor], list[Piece]]:
    fast = bool(tokenizer.is_fast)
    encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=fast, verbose=False)
    ids: list[int] = encoded["input_ids"][0].tolist()
    if not fast:
        pieces = [Piece(" " if number else "", _decode(tokenizer, token))
                  for number, token in enumerate(ids)]  # fmt: skip
        return dict(encoded), pieces
    offsets: list[list[int]] = encoded.pop("offset_mapping")[0].tolist()
    return dict(encoded), spans(text, offsets, tokenizer.convert_ids_to_tokens(ids))


def spans(text: str, offsets: list[list[int]], names: list[str]) -> list[Piece]:
    """The spans of a text; tokens without one, such as [CLS], show their names."""
    pieces: list[Piece] = []
    at = 0
    for (start, end), name in zip(offsets, names, strict=True):
        if start == end:
            pieces.append(Piece(" " if pieces else "", name))
            continue
        start = max(start, at)  # several tokens may share one character
        span = text[start:end]
        inner = span.lstrip()
        before = text[at:start] + span[: len(span) - len(inner)]
        if not before and pieces and offsets[len(pieces) - 1][0] == offsets[len(pieces) - 1][1]:
            before = " "  # after a token that is not in the text
        pieces.append(Piece(before, inner or ("␣" if span else "·")))
        at = max(at, end)
    return pieces


def _decode(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))


def _byte(token: int) -> str:
    """A byte as a character, or escaped where it is only a part of one."""
    if token == ord("\n"):
        return "↵\n"
    return chr(token) if 32 <= token < 127 else f"\\x{token:02x}"


def _longest(loaded: LoadedModel) -> int:
    """RoBERTa counts two positions that no token gets; its tokenizer knows."""
    known = getattr(loaded.tokenizer, "model_max_length", None) or loaded.context
    return min(loaded.context, int(known))
