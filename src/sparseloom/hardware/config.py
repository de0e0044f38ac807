"""Machine files: YAML with units in the keys, in which nothing unknown or doubled passes."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from sparseloom.trace.errors import first_problem

Tree = dict[str, Any]
_Model = TypeVar("_Model", bound=BaseModel)


class MachineError(ValueError):
    """A machine or table file, or a setting for it, that cannot be used."""


class Section(BaseModel):
    """A part of a machine file: no unknown keys, no quiet conversions, frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# The C parser is several times as fast; not every build of PyYAML has it.
_Safe: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Safe):
    """A safe loader keeps the last of two equal keys; here that is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                line = key.start_mark.line + 1
                raise MachineError(f"line {line}: key {name!r} appears twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_machine(
    name_or_path: str | PathLike[str],
    overrides: Mapping[str, object],
    *,
    folder: str = "machines",
    kind: str = "machine",
) -> Tree:
    """A machine file, or one of another folder, with what it extends and dotted overrides.

    Raises:
        MachineError: one line that names the file or the key.
    """
    tree = _extended(find(folder, name_or_path, kind), (), folder, kind)
    for key, value in overrides.items():
        _override(tree, key, value, kind)
    return tree


def find(folder: str, name_or_path: str | PathLike[str], kind: str) -> Path:
    """A shipped file by name, or any file by path."""
    text = str(name_or_path)
    path = Path(text)
    if path.suffix in (".yaml", ".yml") or path.parent != Path():
        if not path.is_file():
            raise MachineError(f"{kind} file {text} does not exist")
        return path
    known = shipped(folder)
    if text not in known:
        close = difflib.get_close_matches(text, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise MachineError(f"unknown {kind} {text!r}{hint} (there is: {', '.join(known)})")
    return Path(str(resources.files("sparseloom.hardware"))) / folder / f"{text}.yaml"


def shipped(folder: str) -> list[str]:
    """Names of the files in one of the package's folders, sorted."""
    home = Path(str(resources.files("sparseloom.hardware"))) / folder
    return sorted(file.stem for file in home.glob("*.yaml"))


def read_yaml(file: Path) -> Tree:
    """One YAML file whose top level is a mapping."""
    try:
        data = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)
    except MachineError as error:
        raise MachineError(f"{file}: {error}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        line = " ".join(str(error).split())
        raise MachineError(f"{file}: cannot be read: {line}") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise MachineError(f"{file}: the top level must be a mapping with text keys")
    return data


def checked(model: type[_Model], tree: Tree, where: str) -> _Model:
    """The model of a tree; the first problem becomes one line."""
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        if problem["type"] == "extra_forbidden":
            key = ".".join(str(part) for part in problem["loc"])
            allowed = _keys(model, problem["loc"][:-1])
            one_of = f" (there is: {', '.join(allowed)})" if allowed else ""
            raise MachineError(f"{where}: unknown key {key!r}{one_of}") from None
        raise MachineError(f"{where}: {first_problem(error)}") from None


def _keys(model: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Keys of the section that a path leads to; none where it is no section."""
    for part in path:
        found = model.model_fields.get(str(part))
        section = None if found is None else found.annotation
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return []
        model = section
    return [field.alias or name for name, field in model.model_fields.items()]


def parse_overrides(settings: Iterable[str]) -> Tree:
    """`["rmmu.rows=64", "clock_ghz=0.5"]` as typed values, for `load(name, **overrides)`.

    Values are read as YAML, and as a number wherever Python reads one (`1e9`).

    Raises:
        MachineError: a setting without "=", or a value that YAML does not read.
    """
    found: Tree = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key.strip():
            raise MachineError(f"a setting must be key=value, got {setting!r}")
        if key.strip() in found:
            raise MachineError(f"key {key.strip()!r} is set twice")
        found[key.strip()] = _value(text.strip(), setting)
    return found


def digest(*parts: BaseModel) -> str:
    """Sixteen hex digits that change whenever a setting or a table does."""
    text = json.dumps([part.model_dump(mode="json") for part in parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _value(text: str, setting: str) -> object:
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, MachineError):
        raise MachineError(f"the value of {setting!r} cannot be read") from None


def _extended(file: Path, above: tuple[Path, ...], folder: str, kind: str) -> Tree:
    if file.resolve() in above:
        raise MachineError(f"{file}: extends itself")
    tree = read_yaml(file)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise MachineError(f"{file}: extends must be a name or a path, got {base!r}")
    beside = file.parent / base
    parent = beside if beside.is_file() else find(folder, base, kind)
    return _merged(_extended(parent, (*above, file.resolve()), folder, kind), tree)


def _merged(base: Tree, over: Tree) -> Tree:
    """Mappings merge key by key; everything else is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            merged[key] = _merged(old, value)
        else:
            merged[key] = value
    return merged


def _override(tree: Tree, dotted: str, value: object, kind: str) -> None:
    *path, last = dotted.split(".")
    for part in path:
        inside = tree.get(part)
        if not isinstance(inside, dict):
            raise MachineError(f"unknown key {dotted!r}: the {kind} has no section {part!r}")
        tree = inside
    # A new key is left for the schema to refuse: it knows optional ones.
    tree[last] = value
