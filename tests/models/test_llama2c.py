from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseloom.models import load_model
from sparseloom.models.llama2c import load_llama2c, read_checkpoint

DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT = 16, 24, 2, 4, 2, 270, 12
HEAD_DIM = DIM // HEADS


@pytest.fixture
def weights() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {
        "embedding": (VOCABULARY, DIM),
        "attention_norm": (LAYERS, DIM),
        "q": (LAYERS, DIM, DIM),
        "k": (LAYERS, KV_HEADS * HEAD_DIM, DIM),
        "v": (LAYERS, KV_HEADS * HEAD_DIM, DIM),
        "o": (LAYERS, DIM, DIM),
        "ffn_norm": (LAYERS, DIM),
        "w1": (LAYERS, HIDDEN, DIM),
        "w2": (LAYERS, DIM, HIDDEN),
        "w3": (LAYERS, HIDDEN, DIM),
        "norm": (DIM,),
        "head": (VOCABULARY, DIM),
    }
    return {n: (0.4 * generator.normal(size=s)).astype("<f4") for n, s in shapes.items()}


def write(path: Path, weights: dict[str, np.ndarray], *, version: int, tied: bool) -> None:
    sizes = [DIM, HIDDEN, LAYERS, HEADS, KV_HEADS, VOCABULARY, CONTEXT]
    matrices = ["q", "k", "v", "o"], ["w1", "w2", "w3"]
    if version == 1:
        header = struct.pack("Ii7iB", 0x616B3432, 1, *sizes, tied).ljust(256, b"\0")
        order = ["attention_norm", "ffn_norm", "norm", "embedding", *matrices[0], *matrices[1]]
        tables = b""
    else:
        sizes[5] *= 1 if tied else -1
        header = struct.pack("7i", *sizes)
        order = ["embedding", "attention_norm", *matrices[0], "ffn_norm", *matrices[1], "norm"]
        tables = bytes(4 * CONTEXT * HEAD_DIM)
    body = b"".join(weights[name].tobytes() for name in order) + tables
    path.write_bytes(header + body + (b"" if tied else weights["head"].tobytes()))


def write_tokenizer(path: Path) -> None:
    pieces = [b"<unk>", b"\n<s>\n", b"\n</s>\n", *(b"<0x%02X>" % i for i in range(256))]
    pieces += [b" a", b" ab", b" ", b"a", b"b", b"c", b"ab", b"abc"]
    pieces += [b"x%d" % i for i in range(VOCABULARY - len(pieces))]
    scored = ((piece, -float(max(i - 258, 0))) for i, piece in enumerate(pieces))
    body = b"".join(struct.pack("<fi", score, len(p)) + p for p, score in scored)
    path.write_bytes(struct.pack("<i", 7) + body)


def run_as_llama2c(weights: dict[str, np.ndarray], tokens: list[int], *, tied: bool) -> np.ndarray:
    """The forward pass of run.c in numpy: neighbouring pairs rotate; (tokens, vocabulary)."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}

    def norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * gain

    positions = np.arange(len(tokens))[:, None, None]
    angle = positions / 10000.0 ** (np.arange(0, HEAD_DIM, 2) / HEAD_DIM)

    def rotate(x: np.ndarray) -> np.ndarray:
        even, odd = x[..., 0::2], x[..., 1::2]
        c, s = np.cos(angle), np.sin(angle)
        return np.stack([even * c - odd * s, even * s + odd * c], -1).reshape(x.shape)

    x = w["embedding"][tokens]
    for layer in range(LAYERS):
        h = norm(x, w["attention_norm"][layer])
        q = rotate((h @ w["q"][layer].T).reshape(len(tokens), HEADS, HEAD_DIM))
        k = rotate((h @ w["k"][layer].T).reshape(len(tokens), KV_HEADS, HEAD_DIM))
        v = (h @ w["v"][layer].T).reshape(len(tokens), KV_HEADS, HEAD_DIM)
        k, v = (np.repeat(t, HEADS // KV_HEADS, axis=1) for t in (k, v))
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(HEAD_DIM)
        scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", p, v).reshape(len(tokens), DIM) @ w["o"][layer].T
        h = norm(x, w["ffn_norm"][layer])
        gate = h @ w["w1"][layer].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["w3"][layer].T)) @ w["w2"][layer].T
    return norm(x, w["norm"]) @ (w["embedding"] if tied else w["head"]).T


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("version", "name"), [(0, "checkpoint_legacy.bin"), (1, "model.bin")])
def test_both_formats_compute_what_llama2c_computes(
    tmp_path: Path, weights: dict[str, np.ndarray], version: int, name: str, tied: bool
) -> None:
    write(tmp_path / name, weights, version=version, tied=tied)
    write_tokenizer(tmp_path / "tokenizer.bin")
    loaded = load_model(tmp_path)
    tokens = [1, 260, 5, 261, 9, 77, 260, 3]
    with torch.no_grad():
        ours = loaded.model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    expected = run_as_llama2c(weights, tokens, tied=tied)
    np.testing.assert_allclose(ours, expected, atol=2e-4 * np.abs(expected).max())
    assert (loaded.family, loaded.is_causal, loaded.context) == ("llama", True, CONTEXT)
    assert loaded.start_token == 1


def test_pieces_merge_by_score_and_unknown_characters_become_bytes(
    tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    write(tmp_path / "model.bin", weights, version=1, tied=True)
    write_tokenizer(tmp_path / "tokenizer.bin")
    tokenizer = load_model(tmp_path).tokenizer
    assert tokenizer is not None
    ids = tokenizer("abc ab é")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [*("▁ab", "c", "▁ab", "▁", "<0xC3>", "<0xA9>")]
    assert tokenizer.decode(ids) == "abc ab é"


def test_broken_files_are_named(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    good = tmp_path / "model.bin"
    write(good, weights, version=1, tied=True)
    raw = good.read_bytes()
    write_tokenizer(tmp_path / "tokenizer.bin")
    cases = {
        b"short": "has only 5 bytes",
        raw[:-4]: "but its header asks for",
        raw[:4] + struct.pack("i", 2) + raw[8:]: "version 2: only legacy and 1",
        raw[:8] + struct.pack("i", 15) + raw[12:]: "its header reads",
    }
    for content, message in cases.items():
        good.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(good)
    good.write_bytes(raw)
    (tmp_path / "tokenizer.bin").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="does not hold 270 tokens"):
        load_llama2c(good)
    (tmp_path / "tokenizer.bin").unlink()
    with pytest.raises(ValueError, match=r"no llama2\.c tokenizer"):
        load_llama2c(good)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no llama2\.c checkpoint in"):
        load_llama2c(tmp_path / "empty")


def test_the_real_checkpoint_tells_a_story() -> None:
    folder = Path(os.environ.get("SPARSELOOM_DATA", "")) / "ckpt_stories260K"
    if not (folder / "checkpoint_v1.bin").exists():
        pytest.skip("SPARSELOOM_DATA holds no ckpt_stories260K")
    loaded, legacy = load_model(folder), load_llama2c(folder / "checkpoint_legacy.bin")
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, legacy.model.state_dict()[name]), name
    assert loaded.tokenizer is not None
    start = loaded.tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    start = torch.cat([torch.tensor([[1]]), start], dim=1)
    story = loaded.model.generate(start, max_new_tokens=20, do_sample=False)
    text = loaded.tokenizer.decode(story[0], skip_special_tokens=True)
    assert text.startswith("Once upon a time, there was a")
