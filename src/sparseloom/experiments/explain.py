"""Which tokens of a text each layer of a pruned model still reads, and what it then answers.

The picture of Wang, Zhang, Han: SpAtten, HPCA 2021, Fig. 1, for any text.  Encoders are shown in
one pass.  Decoders read the prompt whole and choose at every step: shown is the first step, the
one that reads the prompt's cache with one new token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from sparseloom.experiments.pieces import Piece, encode, piece_of, token_text
from sparseloom.integrations import sparsify
from sparseloom.integrations.describe import describe
from sparseloom.integrations.generation import GenerationLayer
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
        pieces: its tokens as parts of the text; of a decoder the last one is its own first token.
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
    causal = describe(loaded.model).is_causal
    if causal and not loaded.is_causal:
        raise NotImplementedError(
            f"model: {type(loaded.model).__name__} is a decoder without a language-model head; "
            "encoders and language models can be explained"
        )
    inputs, pieces = encode(loaded, text, spare=int(causal))
    run = _one_step if causal else _one_pass
    return replace(run(loaded, method, inputs, pieces), text=text)


class _Watch:
    """Keeps every attention call, and the importance in the cache as the call left it."""

    def __init__(self, cache: DynamicCache | None = None) -> None:
        self.calls: list[tuple[AttentionInputs, SparseMask | None]] = []
        self.importance: list[Tensor] = []
        self._cache = cache

    def on_attention(
        self, inputs: AttentionInputs, mask: SparseMask | None, output: Tensor
    ) -> None:
        del output
        self.calls.append((inputs, mask))
        if self._cache is not None:
            layer = self._cache.layers[0]
            assert isinstance(layer, GenerationLayer)
            scores = getattr(layer.run, "tokens", None)
            assert isinstance(scores, Tensor)
            self.importance.append(scores[0].clone())


def _one_pass(
    loaded: LoadedModel, method: SpAtten, inputs: dict[str, Tensor], pieces: list[Piece]
) -> Explanation:
    """An encoder."""
    model, watch = loaded.model, _Watch()
    dense: Any = model(**inputs)
    with sparsify(model, method, observer=watch) as sparse:
        pruned: Any = model(**inputs)
        seen = sparse.survivors()
    gathered = torch.zeros(len(pieces))
    layers: list[LayerView] = []
    for (call, _), survivors in zip(watch.calls, seen, strict=True):
        assert survivors.tokens is not None
        assert survivors.heads is not None
        assert call.value is not None
        found = attention(
            call.query, call.key, call.value, scale=call.scale, return_importance=True
        )
        assert isinstance(found, AttentionOutput)
        assert found.key_importance is not None
        alive = survivors.tokens[0]
        gathered[alive] += found.key_importance[0].sum(0).float().cpu()
        layers.append(_view(alive, gathered, survivors.heads[0]))
    shown = Explanation("", tuple(pieces), tuple(layers), "embedding")
    if hasattr(dense, "logits"):
        one_score = dense.logits.shape[-1] == 1
        labels: Any = model.config.id2label or {}

        def label(number: int) -> str:
            return str(labels.get(number, number))

        if one_score:
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
        watch.calls.clear()
        watch.importance.clear()
        step = model(input_ids=new, past_key_values=cache, use_cache=True)
    dense = model(input_ids=torch.cat([ids, new], 1))
    layers: list[LayerView] = []
    for (call, mask), gathered in zip(watch.calls, watch.importance, strict=True):
        assert mask is not None
        reads = mask.to_bool()[0, :, 0]  # (heads or 1, keys)
        heads = reads.any(-1).expand(call.query.shape[1])
        layers.append(_view(reads.any(0), gathered, heads))

    def label(number: int) -> str:
        return token_text(loaded, number)

    return Explanation(
        "",
        (*pieces, piece_of(loaded, int(new))),
        tuple(layers),
        "next token",
        dense=_best(dense.logits[0, -1].float(), label),
        sparse=_best(step.logits[0, -1].float(), label),
    )


def _view(alive: Tensor, importance: Tensor, heads: Tensor) -> LayerView:
    return LayerView(
        tuple(alive.tolist()),
        tuple(round(number, 4) for number in importance.tolist()),
        tuple(heads.tolist()),
    )


def _best(logits: Tensor, label: Any) -> tuple[tuple[str, float], ...]:
    probabilities, numbers = logits.softmax(-1).topk(min(_SHOWN, logits.shape[-1]))
    pairs = zip(numbers.tolist(), probabilities.tolist(), strict=True)
    return tuple((label(number), round(share, 4)) for number, share in pairs)
