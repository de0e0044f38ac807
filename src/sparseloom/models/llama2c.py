"""Reader of llama2.c checkpoints (github.com/karpathy/llama2.c, legacy and version 1).

A small real Llama (stories260K: 5 layers, 8 heads over 4 KV heads) becomes a `LlamaForCausalLM`
with a fast tokenizer.  llama2.c rotates neighbouring pairs of a head, Hugging Face rotates the two
halves; permuting the rows of the query and key weights makes them the same function.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sparseloom.models.base import LoadedModel

_MAGIC = 0x616B3432
_V1_HEADER_BYTES = 256
_NAMES = ("checkpoint_v1.bin", "checkpoint_legacy.bin", "model.bin")
_SPECIAL = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class CheckpointShape:
    """The seven numbers of a llama2.c header."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.dim // self.heads

    @property
    def kv_dim(self) -> int:
        """Width of all keys of a position."""
        return self.kv_heads * self.head_dim

    def matrices(self) -> list[tuple[str, tuple[int, ...]]]:
        """Per-layer weights in file order: Hugging Face name, shape of all layers together."""
        n, d, h, kv = self.layers, self.dim, self.hidden, self.kv_dim
        attention = {"q_proj": (n, d, d), "k_proj": (n, kv, d), "v_proj": (n, kv, d)}
        return [
            *((f"self_attn.{name}", shape) for name, shape in attention.items()),
            ("self_attn.o_proj", (n, d, d)),
            ("mlp.gate_proj", (n, h, d)),
            ("mlp.down_proj", (n, d, h)),
            ("mlp.up_proj", (n, h, d)),
        ]


def find_checkpoint(folder: Path) -> Path | None:
    """The llama2.c checkpoint in `folder`, version 1 first, or None."""
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def load_llama2c(
    path: Path, *, tokenizer: Path | None = None, dtype: torch.dtype | None = None
) -> LoadedModel:
    """Model and tokenizer from a checkpoint file or a folder that holds one.

    `tokenizer` defaults to `tokenizer.bin` beside the checkpoint.  Raises ValueError when the file
    is not a whole checkpoint of a known version.
    """
    checkpoint = find_checkpoint(path) if path.is_dir() else path
    if checkpoint is None:
        raise ValueError(f"no llama2.c checkpoint in {path}: expected one of {', '.join(_NAMES)}")
    shape, tied, arrays = read_checkpoint(checkpoint)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.dim,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config)
    state = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state)
    tokens = read_tokenizer(tokenizer or checkpoint.with_name("tokenizer.bin"), shape.vocabulary)
    model.to(dtype=dtype or torch.float32)  # pyright: ignore[reportCallIssue]
    return LoadedModel(str(path), model.eval(), tokens)


def read_checkpoint(path: Path) -> tuple[CheckpointShape, bool, dict[str, np.ndarray]]:
    """(shape, whether the output matrix is the embedding, float32 weights by Hugging Face name)."""
    raw = path.read_bytes()
    if len(raw) < _V1_HEADER_BYTES:
        raise ValueError(f"{path} is not a llama2.c checkpoint: it has only {len(raw)} bytes")
    magic, version = struct.unpack_from("Ii", raw)
    if magic == _MAGIC and version != 1:
        raise ValueError(f"{path} has llama2.c version {version}: only legacy and 1 are read")
    first = 8 if magic == _MAGIC else 0
    numbers = list(struct.unpack_from("7i", raw, first))
    tied = bool(raw[first + 28]) if magic == _MAGIC else numbers[5] > 0
    numbers[5] = abs(numbers[5])
    if min(numbers) < 1 or numbers[0] % numbers[3] or numbers[3] % numbers[4]:
        raise ValueError(f"{path} is not a llama2.c checkpoint: its header reads {numbers}")
    shape = CheckpointShape(*numbers)
    blocks = _layout(shape, tied, legacy=magic != _MAGIC)
    start = _V1_HEADER_BYTES if magic == _MAGIC else 28
    needed = start + 4 * sum(int(np.prod(size)) for _, size in blocks)
    if len(raw) != needed:
        raise ValueError(f"{path} has {len(raw)} bytes, but its header asks for {needed}")

    arrays: dict[str, np.ndarray] = {}
    for name, size in blocks:
        count = int(np.prod(size))
        block = np.frombuffer(raw, "<f4", count, start).reshape(size)
        start += 4 * count
        if "{}" not in name:
            arrays[name] = block
            continue
        for layer, weight in enumerate(block):
            if "q_proj" in name or "k_proj" in name:
                weight = _halves_from_pairs(weight, shape.head_dim)
            arrays[name.format(layer)] = weight
    for skipped in ("freq_real", "freq_imag"):
        arrays.pop(skipped, None)
    return shape, tied, arrays


def _layout(
    shape: CheckpointShape, tied: bool, *, legacy: bool
) -> list[tuple[str, tuple[int, ...]]]:
    """Blocks of the file in order; `{}` in a name stands for the layer (first axis)."""
    layer = "model.layers.{}."
    embedding = ("model.embed_tokens.weight", (shape.vocabulary, shape.dim))
    before = (layer + "input_layernorm.weight", (shape.layers, shape.dim))
    after = (layer + "post_attention_layernorm.weight", (shape.layers, shape.dim))
    final = ("model.norm.weight", (shape.dim,))
    matrices = [(f"{layer}{name}.weight", size) for name, size in shape.matrices()]
    head = [] if tied else [("lm_head.weight", (shape.vocabulary, shape.dim))]
    if not legacy:
        return [before, after, final, embedding, *matrices, *head]
    table = (shape.context, shape.head_dim // 2)
    tables = [("freq_real", table), ("freq_imag", table)]
    return [embedding, before, *matrices[:4], after, *matrices[4:], final, *tables, *head]


def _halves_from_pairs(weight: np.ndarray, head_dim: int) -> np.ndarray:
    rows, columns = weight.shape
    pairs = weight.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, columns)


def read_tokenizer(path: Path, vocabulary: int) -> PreTrainedTokenizerFast:
    """A fast tokenizer from `tokenizer.bin`: byte-pair merges in order of the stored scores."""
    if not path.is_file():
        raise ValueError(f"no llama2.c tokenizer at {path}")
    pieces = _read_pieces(path.read_bytes(), vocabulary, path)
    ids: dict[str, int] = {}
    for token, (piece, _) in enumerate(pieces):
        # SentencePiece writes a space as this sign; llama2.c stores the space itself.
        ids.setdefault(piece.replace(" ", "▁"), token)
    scores = {piece: pieces[token][1] for piece, token in ids.items()}
    merges = [
        (scores[piece], ids[piece[:cut]], ids[piece[cut:]], piece[:cut], piece[cut:])
        for piece in ids
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids and ids[piece] > 258
    ]
    merges.sort(key=lambda merge: (-merge[0], merge[1], merge[2]))
    pairs = [(left, right) for *_, left, right in merges]
    unknown, first, last = _SPECIAL
    model = BPE(vocab=ids, merges=pairs, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, bos_token=first, eos_token=last
    )


def _read_pieces(raw: bytes, vocabulary: int, path: Path) -> list[tuple[str, float]]:
    """(piece, score) of every token; llama2.c decorates the two document marks with newlines."""
    pieces: list[tuple[str, float]] = []
    at = 4  # behind the length of the longest piece
    try:
        for _ in range(vocabulary):
            score, length = struct.unpack_from("<fi", raw, at)
            at += 8 + length
            pieces.append((raw[at - length : at].decode("utf-8"), score))
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} does not hold {vocabulary} tokens: {error}") from error
    for token, name in enumerate(_SPECIAL):
        pieces[token] = (name, 0.0)
    return pieces
