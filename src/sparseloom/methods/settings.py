"""Settings of a method as text and as JSON: `8x1`, `none`, `true`; driven by the annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable
from typing import Any


def setting_hints(cls: type) -> dict[str, Any]:
    """Name and annotation of every setting: the fields that take part in comparison.

    Fields with `compare=False` hold weights, which are stored beside the settings.
    """
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.compare}


def format_value(value: object) -> str:
    """A setting as text that `parse_value` reads back exactly."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        nested = any(isinstance(item, tuple) for item in value)
        return ("/" if nested else "x").join(format_value(item) for item in value)
    return repr(value) if isinstance(value, float) else str(value)


def parse_value(name: str, text: str, hint: Any) -> Any:
    """The value of the setting `name` from text, as its annotation wants it.

    Numbers are written as in Python, tuples as `8x1`, tuples of tuples as `1x2/3x4`, an absent
    value as `none`.

    Raises:
        ValueError: the text does not fit the annotation.
    """
    inner, optional = _optional(hint)
    if optional and text.lower() == "none":
        return None
    inner = _one_of(inner, "x" in text)
    if typing.get_origin(inner) is tuple:
        return _parse_tuple(name, text, inner)
    if typing.get_origin(inner) is typing.Literal:
        check_choice(name, text, typing.get_args(inner))
    if inner is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(f"{name} must be true or false, got {text!r}")
        return text.lower() == "true"
    if inner in (int, float):
        try:
            return inner(text)
        except ValueError:
            raise ValueError(f"{name} must be {_describe(hint)}, got {text!r}") from None
    return text


def coerce_value(name: str, value: object, hint: Any) -> Any:
    """A value out of JSON or YAML as the annotation wants it: lists become tuples, text is parsed.

    Raises:
        ValueError: the value does not fit the annotation.
    """
    inner, optional = _optional(hint)
    if value is None and optional:
        return None
    if isinstance(value, str):
        return parse_value(name, value, hint)
    inner = _one_of(inner, isinstance(value, (list, tuple)))
    if typing.get_origin(inner) is tuple and isinstance(value, (list, tuple)):
        items = _item_hints(name, inner, len(value), value)
        return tuple(coerce_value(name, v, h) for v, h in zip(value, items, strict=True))
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if inner is float and number:
        return float(value)  # pyright: ignore[reportArgumentType]
    if inner in (int, bool) and type(value) is inner:
        return value
    raise ValueError(f"{name} must be {_describe(hint)}, got {value!r}")


def to_json(value: object) -> object:
    """The value as JSON holds it: tuples as lists."""
    return [to_json(item) for item in value] if isinstance(value, tuple) else value


# ------------------------------------------------------------------ ranges


def check_sparsity(sparsity: float) -> None:
    """Refuse a sparsity outside [0, 1)."""
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuse anything but an integer of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")


def check_block_size(block_size: tuple[int, int]) -> None:
    """Refuse anything but two positive integers."""
    good = isinstance(block_size, tuple) and len(block_size) == 2
    if not good or any(type(side) is not int or side < 1 for side in block_size):
        raise ValueError(
            f"block_size must be two positive integers (queries, keys), got {block_size!r}"
        )


def check_choice(name: str, value: object, allowed: Iterable[object]) -> None:
    """Refuse a value that is not among the allowed ones."""
    allowed = tuple(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def check_one_given(first: str, a: object, second: str, b: object) -> None:
    """Refuse two settings of which not exactly one is given."""
    if (a is None) == (b is None):
        both = f"{first}={a} and {second}={b}" if a is not None else "neither"
        raise ValueError(f"exactly one of {first} and {second} must be given, got {both}")


# ------------------------------------------------------------------ private


def _optional(hint: Any) -> tuple[Any, bool]:
    """The annotation without None, and whether None was in it."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        optional = len(members) < len(typing.get_args(hint))
        return typing.Union[tuple(members)], optional  # noqa: UP007
    return hint, False


def _one_of(hint: Any, is_list: bool) -> Any:
    """Of "a number or a list of them", the one that the value is; other annotations as they are."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint
    lists = [kind for kind in typing.get_args(hint) if typing.get_origin(kind) is tuple]
    plain = [kind for kind in typing.get_args(hint) if typing.get_origin(kind) is not tuple]
    return (lists if is_list and lists else plain)[0]


def _parse_tuple(name: str, text: str, hint: Any) -> tuple[Any, ...]:
    nested = typing.get_origin(typing.get_args(hint)[0]) is tuple
    parts = text.split("/" if nested else "x")
    items = _item_hints(name, hint, len(parts), text)
    return tuple(parse_value(name, part, item) for part, item in zip(parts, items, strict=True))


def _item_hints(name: str, hint: Any, length: int, given: object) -> list[Any]:
    """The annotation of each of `length` items of a tuple."""
    args = list(typing.get_args(hint))
    if args[-1] is Ellipsis:
        return [args[0]] * length
    if len(args) != length:
        raise ValueError(f"{name} must be {_describe(hint)}, got {given!r}")
    return args


def _describe(hint: Any) -> str:
    inner, optional = _optional(hint)
    if typing.get_origin(inner) in (typing.Union, types.UnionType):
        words = " or ".join(_describe(kind) for kind in typing.get_args(inner))
    elif typing.get_origin(inner) is tuple:
        args = typing.get_args(inner)
        if args[-1] is Ellipsis:
            words = "a list of lists" if typing.get_origin(args[0]) is tuple else "a list"
        else:
            words = f"{len(args)} numbers as {'x'.join('8' * len(args))}"
    else:
        words = {int: "an integer", float: "a number", bool: "true or false"}.get(inner, "text")
    return f"{words} or none" if optional else words
