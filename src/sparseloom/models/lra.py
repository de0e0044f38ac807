"""The vanilla Transformer encoders of Long Range Arena (Tay et al. 2020), as transformers models.

What is built is the published code (github.com/google-research/long-range-arena, `models/
transformer` and `models/layers/common_layers.py`): pre-LN blocks, attention without biases, a
learned [CLS] token that starts at zero and stands before the input, a two-layer head.  Retrieval
encodes two documents with the same weights and classifies their concatenated [CLS] vectors with
one layer more (`classifier_head_dual`, no interaction term).

Token 0 is padding wherever it occurs, so a black pixel of the image task is not attended.  Three
things differ: [CLS] is always attended (published: only where the first token is), a padded query
sees the same keys as a real one, whose result nothing reads, and layers never share weights
(published for ListOps only).

Attention goes through transformers' attention interface, so `sparsify` works on these models as on
any other.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PADDING = 0
"""The token that is never attended."""


class LraConfig(PretrainedConfig):
    """Sizes of an encoder.  `sparseloom.models.lra_presets` has the published ones.

    Args:
        vocab_size: tokens, token 0 (padding) included.
        hidden_size: width of embeddings and blocks (`emb_dim`).
        qkv_size: width of queries, keys and values over all heads (`qkv_dim`); None: hidden_size.
        num_hidden_layers, num_attention_heads, intermediate_size: of the blocks (`mlp_dim` is also
            the width of the head).
        max_position_embeddings: the longest input with its [CLS], published `max_length` + 1.
        learned_positions: positions are weights, N(0, 0.02); else fixed sinusoids.
        hidden_dropout_prob, attention_probs_dropout_prob: rates while training.
        dual: two documents per example (Retrieval).
        **kwargs: of `PretrainedConfig`; `num_labels` is the number of classes.
    """

    model_type = "lra"

    def __init__(
        self,
        vocab_size: int = 257,
        hidden_size: int = 256,
        qkv_size: int | None = None,
        num_hidden_layers: int = 4,
        num_attention_heads: int = 4,
        intermediate_size: int = 1024,
        max_position_embeddings: int = 1001,
        learned_positions: bool = False,
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        dual: bool = False,
        **kwargs: Any,
    ) -> None:
        settings: dict[str, Any] = {"pad_token_id": PADDING, **kwargs}
        super().__init__(**settings)
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.qkv_size = hidden_size if qkv_size is None else qkv_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.learned_positions = learned_positions
        self.hidden_dropout_prob = hidden_dropout_prob
        self.attention_probs_dropout_prob = attention_probs_dropout_prob
        self.dual = dual
        if self.qkv_size % num_attention_heads:
            raise ValueError(
                f"qkv_size must be a multiple of the {num_attention_heads} heads, "
                f"got {self.qkv_size}"
            )
        if max_position_embeddings < 2:
            raise ValueError(
                "max_position_embeddings must be at least 2 ([CLS] and one token), "
                f"got {max_position_embeddings}"
            )

    @property
    def input_length(self) -> int:
        """The longest input in tokens, without [CLS]."""
        return self.max_position_embeddings - 1


def sinusoids(length: int, width: int) -> Float[Tensor, "length width"]:
    """Fixed positions: sin in even columns, cos in odd ones (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(length, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2) * (-torch.log(torch.tensor(1e4)) / width))
    table = torch.zeros(length, width)
    table[:, 0::2] = torch.sin(position * rate)
    table[:, 1::2] = torch.cos(position * rate[: width // 2])
    return table


class LraEmbeddings(nn.Module):
    """Tokens behind a [CLS], with their positions added."""

    def __init__(self, config: LraConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.cls = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.positions: nn.Embedding | None = None
        if config.learned_positions:
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self._table: Tensor | None = None  # no buffer: it is in no checkpoint

    def forward(
        self, input_ids: Int[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length_and_cls hidden"]:
        """Embeddings of [CLS] and the tokens."""
        batch, length = input_ids.shape
        tokens = self.tokens(input_ids)
        hidden = torch.cat([self.cls.expand(batch, -1, -1), tokens], dim=1)
        return self.dropout(hidden + self._positions(length + 1, tokens))

    def _positions(self, length: int, like: Tensor) -> Tensor:
        if self.positions is not None:
            return self.positions.weight[:length]
        if self._table is None or self._table.device != like.device:
            size = self.config.max_position_embeddings
            self._table = sinusoids(size, self.config.hidden_size).to(like.device)
        return self._table[:length].to(like.dtype)


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention in plain PyTorch, with its probabilities."""
    scores = query @ key.transpose(-1, -2) * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return (dropped @ value).transpose(1, 2).contiguous(), probabilities


class XavierLinear(nn.Linear):
    """A matrix of the blocks; the type says how its weights begin (`_init_weights`)."""


class LraAttention(nn.Module):
    """Multi-head self-attention without biases, of a width of its own."""

    def __init__(self, config: LraConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = False
        self.head_dim = config.qkv_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.query = XavierLinear(config.hidden_size, config.qkv_size, bias=False)
        self.key = XavierLinear(config.hidden_size, config.qkv_size, bias=False)
        self.value = XavierLinear(config.hidden_size, config.qkv_size, bias=False)
        self.out = XavierLinear(config.qkv_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch length hidden"],
        attention_mask: Bool[Tensor, "batch 1 1 length"] | None = None,
        **kwargs: Any,
    ) -> tuple[Float[Tensor, "batch length hidden"], Tensor | None]:
        """The output, and the probabilities where the implementation has them."""

        def heads(project: nn.Linear) -> Tensor:
            return project(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        name = self.config._attn_implementation
        attend: Callable[..., Any] = _eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        out, probabilities = attend(
            self,
            heads(self.query),
            heads(self.key),
            heads(self.value),
            attention_mask,
            scaling=self.scaling,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            **kwargs,
        )
        return self.out(out.flatten(-2)), probabilities


class LraBlock(nn.Module):
    """Pre-LN attention and MLP, each with a residual."""

    def __init__(self, config: LraConfig, layer_idx: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attention_norm = nn.LayerNorm(width, eps=1e-6)
        self.attention = LraAttention(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp_in = XavierLinear(width, inner)
        self.mlp_out = XavierLinear(inner, width)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self, hidden: Float[Tensor, "batch length hidden"], mask: Tensor | None, **kwargs: Any
    ) -> tuple[Float[Tensor, "batch length hidden"], Tensor | None]:
        """The block's output and its attention probabilities, if the implementation has them."""
        attended, probabilities = self.attention(self.attention_norm(hidden), mask, **kwargs)
        hidden = hidden + self.dropout(attended)
        inner = nn.functional.gelu(self.mlp_in(self.mlp_norm(hidden)), approximate="tanh")
        return hidden + self.dropout(self.mlp_out(self.dropout(inner))), probabilities


class LraEncoder(nn.Module):
    """Embeddings, blocks, final normalisation."""

    def __init__(self, config: LraConfig) -> None:
        super().__init__()
        self.embeddings = LraEmbeddings(config)
        self.layers = nn.ModuleList(LraBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-6)

    def forward(
        self, input_ids: Int[Tensor, "batch length"], real: Bool[Tensor, "batch length"], **kw: Any
    ) -> tuple[Float[Tensor, "batch length_and_cls hidden"], list[Tensor | None]]:
        """Hidden states of [CLS] and the tokens, and the attention probabilities of each layer."""
        mask: Tensor | None = None
        if not bool(real.all()):
            real = torch.cat([real.new_ones(len(real), 1), real], dim=1)
            mask = real[:, None, None, :]
        hidden = self.embeddings(input_ids)
        probabilities: list[Tensor | None] = []
        for layer in self.layers:
            hidden, seen = layer(hidden, mask, **kw)
            probabilities.append(seen)
        return self.norm(hidden), probabilities


class LraHead(nn.Module):
    """Dense layers with ReLU between them: one hidden layer, or two for pairs of documents."""

    def __init__(self, config: LraConfig) -> None:
        super().__init__()
        inner, classes = config.intermediate_size, int(config.num_labels or 0)
        sizes = [config.hidden_size, inner, classes]
        if config.dual:
            sizes = [2 * config.hidden_size, inner, inner // 2, classes]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, vector: Float[Tensor, "batch width"]) -> Float[Tensor, "batch classes"]:
        """Logits."""
        *inner, last = self.layers
        for layer in inner:
            vector = torch.relu(layer(vector))
        return last(vector)


class LraForSequenceClassification(PreTrainedModel):
    """An encoder and its head."""

    config_class = LraConfig
    base_model_prefix = "encoder"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    supports_gradient_checkpointing = False
    _no_split_modules = ["LraBlock"]  # noqa: RUF012

    def __init__(self, config: LraConfig) -> None:
        super().__init__(config)
        self.encoder = LraEncoder(config)
        self.head = LraHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Int[Tensor, "batch *documents length"],
        attention_mask: Int[Tensor, "batch *documents length"]
        | Bool[Tensor, "batch *documents length"]
        | None = None,
        labels: Int[Tensor, " batch"] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Logits, and with `labels` the cross-entropy.

        Args:
            input_ids: (batch, length), with `config.dual` (batch, 2, length): both documents run
                as one batch of twice the rows, so that each layer runs once.
            attention_mask: true or 1 = attend; default: every token but 0.
            labels: the class of each example.
            output_attentions: also return the probabilities (eager attention only).
            **kwargs: passed on to the attention function.

        Raises:
            ValueError: an input of another shape than the model's, or longer.
        """
        config: Any = self.config
        documents = 2 if config.dual else 1
        if input_ids.dim() != documents + 1 or (config.dual and input_ids.shape[1] != 2):
            wanted = "(batch, 2, length)" if config.dual else "(batch, length)"
            raise ValueError(f"input_ids must be {wanted}, got {tuple(input_ids.shape)}")
        if input_ids.shape[-1] > config.input_length:
            raise ValueError(
                f"input_ids must hold at most {config.input_length} tokens, "
                f"got {input_ids.shape[-1]}"
            )
        real = input_ids != PADDING if attention_mask is None else attention_mask.bool()
        rows = input_ids.flatten(0, -2)  # (batch or 2·batch, length)
        hidden, probabilities = self.encoder(rows, real.flatten(0, -2), **kwargs)
        logits = self.head(hidden[:, 0].unflatten(0, (-1, documents)).flatten(1))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.float(), labels)
        if not (output_attentions or config.output_attentions):
            return SequenceClassifierOutput(loss=loss, logits=logits)
        if any(seen is None for seen in probabilities):
            raise ValueError(
                "output_attentions: load the model with attn_implementation='eager' to see them"
            )
        seen_all: Any = tuple(probabilities)
        return SequenceClassifierOutput(loss=loss, logits=logits, attentions=seen_all)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The published initial weights.

        Embeddings N(0, 1), learned positions N(0, 0.02), matrices of the blocks Xavier-uniform
        with biases N(0, 1e-6), the head LeCun-normal with biases 0.
        """
        init = nn.init
        if isinstance(module, LraEmbeddings):
            init.zeros_(module.cls)
            init.normal_(module.tokens.weight)
            if module.positions is not None:
                init.normal_(module.positions.weight, std=0.02)
        elif isinstance(module, XavierLinear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.normal_(module.bias, std=1e-6)
        elif isinstance(module, nn.Linear):
            # flax: a normal distribution cut at two deviations, scaled back to the variance
            std = module.in_features**-0.5 / 0.87962566103423978
            init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
            init.zeros_(module.bias)
