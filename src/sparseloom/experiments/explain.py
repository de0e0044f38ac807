"""Which tokens of a text each layer of a pruned model still reads, and what it then answers.

The picture of Wang, Zhang, Han: SpAtten, HPCA 2021, Fig. 1, for any text.  Encoders are shown in
one pass, and so are decoders whose prompt gets shorter.  Other decoders read the prompt whole and
choose at every step: shown is the first step, the one that reads the prompt's cache with one new
token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sparseloom.experiments.pieces import Piece, encode, piece_of, token_text
from sparseloom.integrations import sparsify
from sparseloom.integrations.describe import chooses_in_cache, describe
from sparseloom.integrations.generation import GenerationLayer
from sparseloom.integrations.kept import Kept, whole
from sparseloom.kernels import AttentionOutput, attention
from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, SpAtten
from sparseloom.models import LoadedModel
from sparseloom.models.minilm import mean_pool

PAPER_SENTENCE = "As a visual treat, the film is almost perfect."
"""The sentence of SST-2 that the paper prints in its Fig. 1."""

SENTENCES = (
    PAPER_SENTENCE,
    "A man in a red jacket is slowly riding an old bicycle along the beach.",
    "The committee met for three hours on Tuesday, but in the end nobody agreed on the budget.",
)
"""The paper's, and two of our own."""

SNIPPETS = (
    "def area(width, height):\n    return width * ",
    "for name in sorted(names):\n    print(",
    "try:\n    import numpy\nexcept ",
)
"""Our own, for byte-level models: the built-in one has learned Python."""

_SHOWN = 3  # answers


@dataclass(frozen=True, slots=True)
class LayerView:
    """What one layer's attention reads.

    Attributes:
        alive: per token.
        importance: per token, gathered up to and including this layer: what the next one ranks by.
        heads: per head, whether it is computed.
    """

    alive: tuple[bool, ...]
    importance: tuple[float, ...]
    heads: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Explanation:
    """One text under one method.

    Attributes:
        text: as given.
        pieces: its tokens as parts of the text, and what the model wrote.
        written: how many of the pieces the model wrote.
        layers: front to back.
        answer: what `dense` and `sparse` are: "class", "score", "next token", or "embedding".
        dense, sparse: the most probable answers of the unchanged and of the pruned model with
            their probabilities, best first; of a "score" its value; of an "embedding" nothing.
        similarity: cosine of the two mean-pooled embeddings, where there is no other answer.
    """

    text: str
    pieces: tuple[Piece, ...]
    layers: tuple[LayerView, ...]
    answer: str
    dense: tuple[tuple[str, float], ...] = ()
    sparse: tuple[tuple[str, float], ...] = ()
    similarity: float | None = None
    written: int = 0

    def to_row(self) -> dict[str, Any]:
        """As a row of results."""
        return {
            "record": "explain",
            "text": self.text,
            "tokens": [piece.text for piece in self.pieces],
            "gaps": [piece.gap for piece in self.pieces],
            "layers": [
                {
                    "alive": list(layer.alive),
                    "importance": list(layer.importance),
                    "heads": list(layer.heads),
                }
                for layer in self.layers
            ],
            "answer": self.answer,
            "dense": [list(one) for one in self.dense],
            "sparse": [list(one) for one in self.sparse],
            "similarity": self.similarity,
            "written": self.written,
        }


def examples(loaded: LoadedModel) -> tuple[str, ...]:
    """Three texts that suit the model."""
    return SNIPPETS if loaded.byte_level else SENTENCES


@torch.no_grad()
def explain(loaded: LoadedModel, text: str, method: SpAtten) -> Explanation:
    """Run the model on one text with and without the method, and say who was read.

    Args:
        loaded: an encoder, with a classifier or without, or a language model; in evaluation mode.
        text: at most as long as the model takes.
        method: how it is pruned.

    Raises:
        ValueError: an empty text, or one that is too long.
        NotImplementedError: a model that the method cannot prune, or with another head.
    """
    shape = describe(loaded.model)
    causal, steps = shape.is_causal, chooses_in_cache(method, shape)
    if causal and not loaded.is_causal:
        raise NotImplementedError(
            f"model: {type(loaded.model).__name__} is a decoder without a language-model head; "
            "encoders and language models can be explained"
        )
    inputs, pieces = encode(loaded, text, spare=int(steps))
    run = _one_step if steps else _one_pass
    return replace(run(loaded, method, inputs, pieces), text=text)


class _Watch:
    """What was left in every attention call, and the importance gathered when it was over."""

    def __init__(self, cache: DynamicCache | None = None) -> None:
        self.layers: list[LayerView] = []
        self._cache, self._kept = cache, Kept()
        self._gathered: Tensor | None = None

    def on_kept(self, kept: Kept) -> None:
        """Comes before the call that it belongs to."""
        self._kept = kept

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        del mask, output
        kept = self._kept
        if kept.tokens is None or kept.heads is None:  # a prompt that is read whole
            return
        if self._cache is None:
            gathered = _importance(inputs, kept)
            self._gathered = gathered if self._gathered is None else self._gathered + gathered
        else:
            layer = self._cache.layers[0]
            assert isinstance(layer, GenerationLayer)
            self._gathered = getattr(layer.run, "tokens", None)
        assert self._gathered is not None
        shown = (round(number, 4) for number in self._gathered[0].tolist())
        alive, heads = kept.tokens[0].tolist(), kept.heads[0].tolist()
        self.layers.append(LayerView(tuple(alive), tuple(shown), tuple(heads)))


def _importance(inputs: AttentionInputs, kept: Kept) -> Tensor:
    """Of all tokens of the input, from the call of a sequence that got shorter: (1, length)."""
    assert inputs.value is not None
    assert kept.heads is not None
    query, key, value = (whole(kept, part) for part in (inputs.query, inputs.key, inputs.value))
    found = attention(
        query,
        key,
        value,
        kept.mask,
        is_causal=inputs.is_causal,
        scale=inputs.scale,
        enable_gqa=inputs.query.shape[1] != inputs.key.shape[1],
        return_importance=True,
    )
    assert isinstance(found, AttentionOutput)
    assert found.key_importance is not None
    return (found.key_importance * kept.heads[..., None]).sum(1).float().cpu()


def _one_pass(
    loaded: LoadedModel, method: SpAtten, inputs: dict[str, Tensor], pieces: list[Piece]
) -> Explanation:
    """A sequence that gets shorter."""
    model, watch = loaded.model, _Watch()
    dense: Any = model(**inputs)
    with sparsify(model, method, observer=watch):
        pruned: Any = model(**inputs)
    shown = Explanation("", tuple(pieces), tuple(watch.layers), "embedding")
    if loaded.is_causal:
        first, second = (_next(loaded, out) for out in (dense, pruned))
        return replace(shown, answer="next token", dense=first, sparse=second)
    if hasattr(dense, "logits"):
        labels: Any = model.config.id2label or {}

        def label(number: int) -> str:
            return str(labels.get(number, number))

        if dense.logits.shape[-1] == 1:
            both = ((("score", float(out.logits.squeeze())),) for out in (dense, pruned))
            kind = "score"
        else:
            both = (_best(out.logits[0].float(), label) for out in (dense, pruned))
            kind = "class"
        first, second = both
        return replace(shown, answer=kind, dense=first, sparse=second)
    attend = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    pair = [mean_pool(out.last_hidden_state, attend)[0].float() for out in (dense, pruned)]
    return replace(shown, similarity=float(pair[0] @ pair[1]))


def _one_step(
    loaded: LoadedModel, method: SpAtten, inputs: dict[str, Tensor], pieces: list[Piece]
) -> Explanation:
    """A decoder: the prompt whole, its most probable next token, and the step that reads both."""
    model: Any = loaded.model
    ids = inputs["input_ids"]
    cache = DynamicCache()
    watch = _Watch(cache)
    with sparsify(model, method, observer=watch):
        prompt = model(input_ids=ids, past_key_values=cache, use_cache=True)
        new = prompt.logits[:, -1:].argmax(-1)  # the prompt ran whole: dense says the same
        step = model(input_ids=new, past_key_values=cache, use_cache=True)
    dense = model(input_ids=torch.cat([ids, new], 1))
    return Explanation(
        "",
        (*pieces, piece_of(loaded, int(new))),
        tuple(watch.layers),
        "next token",
        dense=_next(loaded, dense),
        sparse=_next(loaded, step),
        written=1,
    )


def _next(loaded: LoadedModel, out: Any) -> tuple[tuple[str, float], ...]:
    """The most probable tokens behind the text."""
    return _best(out.logits[0, -1].float(), lambda number: token_text(loaded, number))


def _best(logits: Tensor, label: Any) -> tuple[tuple[str, float], ...]:
    probabilities, numbers = logits.softmax(-1).topk(min(_SHOWN, logits.shape[-1]))
    pairs = zip(numbers.tolist(), probabilities.tolist(), strict=True)
    return tuple((label(number), round(share, 4)) for number, share in pairs)
