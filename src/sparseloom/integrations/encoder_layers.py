"""The parts of encoder layers.

Two layouts: BERT's (`BertLayer`, `RobertaLayer` …) and DistilBERT's (`TransformerBlock`).  Both are
post-norm: attention, residual and norm, feed-forward, residual and norm.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from sparseloom.integrations import _compat
from sparseloom.integrations.prunable import FourProjections, PrunableLayer, holders

_BERT_LAYERS = ("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer")
_DISTILBERT_LAYERS = ("TransformerBlock",)


def encoder_layers(model: nn.Module, attentions: list[nn.Module]) -> list[PrunableLayer]:
    """The layers that hold these attention modules, in the same order.

    Raises:
        NotImplementedError: layers of another layout than BERT's or DistilBERT's.
    """
    holder = holders(model, _attention_of)
    found: list[PrunableLayer] = []
    for attention in attentions:
        layer = holder.get(id(attention))
        if layer is None:
            raise NotImplementedError(
                f"{type(model).__name__}: shortening the sequence knows the layers of BERT, "
                f"RoBERTa and DistilBERT, and not those around {type(attention).__name__}"
            )
        found.append(_parts(layer, attention))
    return found


def _attention_of(layer: nn.Module) -> list[nn.Module]:
    names = {kind.__name__ for kind in type(layer).__mro__}
    attention: Any = getattr(layer, "attention", None)
    if names & set(_BERT_LAYERS):
        return [attention.self]
    if names & set(_DISTILBERT_LAYERS) and hasattr(attention, "q_lin"):
        return [attention]
    return []


def _parts(layer: Any, attention: Any) -> PrunableLayer:
    if hasattr(attention, "q_lin"):

        def finish(projected: Tensor, states: Tensor) -> Tensor:
            states = layer.sa_layer_norm(projected + states)
            return layer.output_layer_norm(layer.ffn.ff_chunk(states) + states)

        return FourProjections(
            module=layer,
            query=attention.q_lin,
            key=attention.k_lin,
            value=attention.v_lin,
            out=attention.out_lin,
            inner=layer.ffn.lin1.out_features,
            finish=finish,
            **_common(attention.n_heads, attention.dim // attention.n_heads, attention.dropout),
        )
    if getattr(attention, "position_embedding_type", "absolute") != "absolute":
        raise NotImplementedError(
            f"position_embedding_type {attention.position_embedding_type!r} adds a position bias "
            "to the scores, which is not supported; only 'absolute' is"
        )
    after = layer.attention.output

    def drop_and_finish(projected: Tensor, states: Tensor) -> Tensor:
        return layer.feed_forward_chunk(after.LayerNorm(after.dropout(projected) + states))

    return FourProjections(
        module=layer,
        query=attention.query,
        key=attention.key,
        value=attention.value,
        out=after.dense,
        inner=layer.intermediate.dense.out_features,
        finish=drop_and_finish,
        **_common(attention.num_attention_heads, attention.attention_head_size, attention.dropout),
    )


def _common(heads: int, head_dim: int, dropout: Any) -> dict[str, Any]:
    """What both layouts have in common."""
    return {
        "heads": heads,
        "kv_heads": heads,
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "is_causal": False,
        "matrices": 2,
        "dropout": lambda: float(dropout.p) if dropout.training else 0.0,
        "enter": lambda states: states,
        "as_tuple": _compat.MAJOR < 5,
    }
