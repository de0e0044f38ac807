"""The operators of a standard Transformer, from its sizes."""

from __future__ import annotations

from functools import partial

from sparseloom.trace.schema import ModelShape, Operator, Stage


def transformer_operators(
    model: ModelShape,
    *,
    q_len: int,
    kv_len: int | None = None,
    batch: int = 1,
    stage: Stage = "prefill",
    step: int = 0,
    padding: int | None = None,
    head: bool = True,
) -> tuple[Operator, ...]:
    """One pass over `q_len` new tokens, layer by layer, `kv_len` keys being visible at its end.

    Per layer: norm, the Q, K and V projections as one GEMM, attention, the output projection,
    norm, and the feed-forward GEMMs (three where `model.gated_ffn`, else two). A model without
    `intermediate_size` has no feed-forward part. `head` adds the product with the vocabulary,
    where the model has one.
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    width = model.heads * model.head_dim
    projected = width + 2 * model.kv_heads * model.head_dim
    at_step = partial(Operator, step=step, stage=stage, batch=batch)
    found: list[Operator] = []
    for layer in range(model.layers):
        gemm = partial(at_step, kind="gemm", layer=layer, rows=q_len)
        norm = at_step(kind="norm", role="norm", layer=layer, rows=q_len, columns=hidden)
        attention = at_step(
            kind="attention",
            role="attention",
            layer=layer,
            heads=model.heads,
            kv_heads=model.kv_heads,
            q_len=q_len,
            kv_len=q_len if kv_len is None else kv_len,
            head_dim=model.head_dim,
            value_dim=model.head_dim,
            is_causal=model.is_causal,
            padding=padding,
        )
        found += [norm, gemm(role="qkv", inner=hidden, columns=projected), attention]
        found.append(gemm(role="attention_output", inner=width, columns=hidden))
        if inner:
            up = gemm(role="ffn", inner=hidden, columns=inner)
            act = at_step(kind="elementwise", role="ffn", layer=layer, rows=q_len, columns=inner)
            down = gemm(role="ffn", inner=inner, columns=hidden)
            found += [norm, *([up] * (2 if model.gated_ffn else 1)), act, down]
    if head and model.vocab_size:
        found.append(
            at_step(kind="gemm", role="head", rows=q_len, inner=hidden, columns=model.vocab_size)
        )
    return tuple(found)
