"""Every method by its tag, and the short text form: `dynamic:sparsity=0.95,block_size=8x1`."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from sparseloom.errors import unknown_name
from sparseloom.methods.base import Method
from sparseloom.methods.bigbird import BigBird
from sparseloom.methods.blocklocal import BlockLocal
from sparseloom.methods.dense import Dense
from sparseloom.methods.dynamic import DynamicSparse
from sparseloom.methods.elsa import Elsa
from sparseloom.methods.gate import AttentionGate
from sparseloom.methods.h2o import H2O
from sparseloom.methods.indexer import LightningIndexer
from sparseloom.methods.linear import LinearAttention
from sparseloom.methods.linformer import Linformer
from sparseloom.methods.longformer import Longformer
from sparseloom.methods.oracle import Oracle
from sparseloom.methods.performer import Performer
from sparseloom.methods.quest import Quest
from sparseloom.methods.random_mask import RandomMask
from sparseloom.methods.reformer import Reformer
from sparseloom.methods.settings import coerce_value, format_value, parse_value, setting_hints
from sparseloom.methods.sinkhorn import Sinkhorn
from sparseloom.methods.snapkv import SnapKV
from sparseloom.methods.sparse_transformer import Fixed, Strided
from sparseloom.methods.spatten import SpAtten
from sparseloom.methods.static_sparse import StaticSparse
from sparseloom.methods.streaming import StreamingLLM
from sparseloom.methods.synthesizer import Synthesizer
from sparseloom.methods.tile_aligned import TileAligned
from sparseloom.methods.window import SlidingWindow

METHODS: dict[str, type[Method]] = {
    cls.name: cls
    for cls in (
        Dense,
        Oracle,
        DynamicSparse,
        AttentionGate,
        LightningIndexer,
        Elsa,
        SlidingWindow,
        RandomMask,
        BlockLocal,
        Strided,
        Fixed,
        Longformer,
        BigBird,
        TileAligned,
        StaticSparse,
        Linformer,
        Performer,
        Reformer,
        Sinkhorn,
        Synthesizer,
        LinearAttention,
        SpAtten,
        H2O,
        StreamingLLM,
        SnapKV,
        Quest,
    )
}
"""Tag → class.  A new method is listed here once; text, JSON and the test matrix follow."""


def method_names() -> list[str]:
    """The tags of all methods."""
    return list(METHODS)


def parse_method(text: str) -> Method:
    """The method that a short text describes: `tag` or `tag:setting=value,setting=value`.

    Values: numbers, `true`/`false`, `none`, `8x1` for pairs, words.  Settings left out take
    their defaults.

    Raises:
        ValueError: unknown method or setting, a setting twice, or a value that is not allowed.
    """
    tag, colon, rest = (part.strip() for part in text.partition(":"))
    cls = _find(tag)
    hints = setting_hints(cls)
    settings: dict[str, Any] = {}
    for item in rest.split(",") if colon else []:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise ValueError(f"method {text!r} must read tag:setting=value,…, got {item.strip()!r}")
        if key in settings:
            raise ValueError(f"setting {key!r} is given twice in {text!r}")
        _check_known(tag, [key], hints)
        settings[key] = parse_value(key, value, hints[key])
    return _build(cls, settings)


def format_method(method: Method) -> str:
    """The shortest text that `parse_method` turns into an equal method: defaults are left out."""
    return _joined(method, _texts(method))


def selection_name(method: Method) -> str:
    """`format_method`, fit for the name of a selection in a trace, which is a file's name, too.

    Lists of lists, such as the thresholds of all layers, have slashes and may be long: eight hex
    digits stand for them, which differ where they do.
    """
    texts = _texts(method)
    for key, text in texts.items():
        if "/" in text:
            texts[key] = f"#{zlib.crc32(text.encode()):08x}"
    return _joined(method, texts)


def _texts(method: Method) -> dict[str, str]:
    """Every setting that is not its default, as text."""
    return {
        field.name: format_value(getattr(method, field.name))
        for field in dataclasses.fields(method)  # pyright: ignore[reportArgumentType]
        if field.compare and getattr(method, field.name) != field.default
    }


def _joined(method: Method, texts: Mapping[str, str]) -> str:
    parts = ",".join(f"{key}={text}" for key, text in texts.items())
    return f"{method.name}:{parts}" if parts else method.name


def method_from_dict(data: Mapping[str, Any]) -> Method:
    """See `Method.from_dict`."""
    if "method" not in data:
        raise ValueError(f"a method's dict needs the key 'method', got the keys {sorted(data)}")
    tag = data["method"]
    cls = _find(tag)
    version = data.get("version", cls.version)
    if not isinstance(version, int) or not 1 <= version <= cls.version:
        raise ValueError(
            f"version of method {tag!r} must be in [1, {cls.version}], got {version!r}"
        )
    hints = setting_hints(cls)
    given = {key: value for key, value in data.items() if key not in ("method", "version")}
    _check_known(tag, given, hints)
    return _build(cls, {key: coerce_value(key, value, hints[key]) for key, value in given.items()})


def _find(tag: object) -> type[Method]:
    if not isinstance(tag, str) or tag not in METHODS:
        raise unknown_name("method", str(tag), METHODS)
    return METHODS[tag]


def _check_known(tag: str, given: Iterable[str], hints: Mapping[str, Any]) -> None:
    for key in given:
        if key not in hints:
            raise unknown_name(f"setting of method {tag!r}:", key, hints)


def _build(cls: type[Method], settings: dict[str, Any]) -> Method:
    return cls(**settings)
