"""Tiny random models of every supported family, and what the tests ask of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from sparseloom.mask import SparseMask
from sparseloom.methods import AttentionInputs, Selector

IS_OLD = int(transformers.__version__.split(".")[0]) < 5

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = {**_SIZES, **_SPECIAL, "num_key_value_heads": 2}
_CONFIGS: dict[str, tuple[str, str, dict[str, object]]] = {
    "bert": ("BertModel", "BertConfig", _SIZES),
    "roberta": ("RobertaModel", "RobertaConfig", {**_SIZES, "max_position_embeddings": 80}),
    "distilbert": (
        "DistilBertModel",
        "DistilBertConfig",
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 61},
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **_SPECIAL,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "vocab_size": 61,
            "scale_attn_by_inverse_layer_idx": not IS_OLD,  # SDPA of 4.x ignores it
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _GROUPED),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_GROUPED, "sliding_window": 48}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**_GROUPED, "head_dim": 16}),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", {**_SIZES, **_SPECIAL}),
}
FAMILIES = [name for name in _CONFIGS if not (IS_OLD and name == "distilbert")]
CAUSAL = [name for name in FAMILIES if "ForCausalLM" in _CONFIGS[name][0] or name == "gpt2"]
PADDINGS = ["none", "left", "right"]


def build(family: str, **changes: object) -> nn.Module:
    """A tiny model in evaluation mode, always with the same weights."""
    model, config, settings = _CONFIGS[family]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**{**settings, **changes}))
    with torch.no_grad():  # small initial weights make attention flat and errors invisible
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6.0)
    return made.eval()


def inputs_for(padding: str, *, length: int = 24, batch: int = 3) -> dict[str, Tensor]:
    """Token ids and an attention mask whose rows have different amounts of padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 61, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        count = 0 if padding == "none" else (row * 5) % length
        span = slice(0, count) if padding == "left" else slice(length - count, length)
        ids[row, span], mask[row, span] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def real_outputs(output: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """The first output at the tokens that are not padding."""
    return output[inputs["attention_mask"].bool()]


def ids_of(length: int = 24, batch: int = 1) -> Tensor:
    """Random tokens, the same ones every time."""
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def follow(
    model: nn.Module,
    ids: Tensor,
    cache: DynamicCache,
    *,
    prompt: int = 16,
    mask: Tensor | None = None,
) -> Tensor:
    """Logits of the prompt's last token and of every step that is given the text's next token."""
    seen = cache.get_seq_length()
    full = torch.ones_like(ids) if mask is None else mask
    spans = [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]
    found = []
    for first, last in spans:
        if last <= seen:
            continue
        positions = (full[:, :last].cumsum(-1) - 1).clamp(min=0)[:, first:]
        out = model(
            input_ids=ids[:, first:last],
            attention_mask=None if mask is None else mask[:, :last],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        found.append(out.logits[:, -1])
    return torch.stack(found, 1)


@dataclass(frozen=True)
class Everything(Selector):
    """Selects all pairs, so that the sparse path runs at density 1."""

    name: ClassVar[str] = "everything"

    def select(self, inputs: AttentionInputs) -> SparseMask:
        """The full mask, shared by batch and heads."""
        return SparseMask.full(inputs.query.shape[2], inputs.key.shape[2])


@pytest.fixture
def zoo() -> SimpleNamespace:
    """What stands above; test modules cannot import a conftest."""
    return SimpleNamespace(
        build=build,
        inputs=inputs_for,
        real=real_outputs,
        ids=ids_of,
        follow=follow,
        everything=Everything(),
        families=FAMILIES,
        is_old=IS_OLD,
    )


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CAUSAL)
def causal_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=PADDINGS)
def padding(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def snapshot() -> Callable[[nn.Module], object]:
    """Everything about a model that `sparsify` might have left behind."""

    def take(model: nn.Module) -> object:
        modules = []
        for name, module in model.named_modules():
            attributes = {key: id(value) for key, value in vars(module).items()}
            hooks = {key: list(vars(module)[key]) for key in attributes if "_hooks" in key}
            modules.append((name, module.training, attributes, hooks))
        configs = {
            name: dict(vars(module.config))
            for name, module in model.named_modules()
            if hasattr(module, "config")
        }
        return modules, configs

    return take
