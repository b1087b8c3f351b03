"""Dataclasses of options: each field is a key of a YAML or JSON file and an option of the command line.

A field is declared with `option(default, help)` and one of the types str, int, float, bool, X | None, tuple[X, ...]
or another dataclass of this kind. Ranges are checked where the dataclass is made, by its own __post_init__.
"""

from __future__ import annotations

import argparse
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

_NAMES = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a mapping",
    types.NoneType: "null",
}


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the text that --help shows."""
    return field(default=default, metadata={"help": help})


def read_options(path: str | Path) -> dict[str, Any]:
    """The keys and values of a .json file, or of any other file read as YAML.

    Raises FileNotFoundError, and ValueError naming the file where it is malformed, names a key twice or holds
    anything but a mapping.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text, object_pairs_hook=_once) if path.suffix == ".json" else yaml.load(text, _Loader)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got {_described(content)}")
    return content


def write_options(path: str | Path, options: Mapping[str, Any]) -> None:
    """What read_options reads back, in the order given; JSON for .json, else YAML."""
    path = Path(path)
    if path.suffix == ".json":
        text = json.dumps(options, indent=2) + "\n"
    else:
        text = yaml.safe_dump(dict(options), sort_keys=False, allow_unicode=True, width=120)
    path.write_text(text, encoding="utf-8")


def from_options(cls: type, options: Mapping[str, Any], where: str) -> Any:
    """A dataclass of keys and values as a file holds them: lists become tuples, mappings become dataclasses.

    where: what errors begin with. Raises ValueError for all unknown keys, each with the nearest known one, and for a
    value of the wrong type.
    """
    return cls(**converted(cls, options, where))


def converted(cls: type, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keyword arguments that from_options makes `cls` of."""
    hints = typing.get_type_hints(cls)
    known = [f.name for f in fields(cls)]
    unknown = [key for key in options if key not in known]
    if unknown:
        nearest = (f"{key!r} (nearest: {_nearest(key, known)!r})" for key in unknown)
        raise ValueError(f"{where}: unknown {'key' if len(unknown) == 1 else 'keys'} {', '.join(nearest)}")
    return {key: _convert(hints[key], value, f"{where}: {key}") for key, value in options.items()}


def to_options(options: Any) -> Any:
    """A dataclass as keys and values that from_options, JSON and YAML take; tuples become lists."""
    if is_dataclass(options):
        return {f.name: to_options(getattr(options, f.name)) for f in fields(options)}
    if isinstance(options, (list, tuple)):
        return [to_options(item) for item in options]
    if isinstance(options, Mapping):
        return {str(key): to_options(value) for key, value in options.items()}
    return str(options) if isinstance(options, Path) else options


def add_options(parser: argparse._ActionsContainer, cls: type) -> None:
    """One command-line option for each field of `cls`, absent from the result where it is not given."""
    hints = typing.get_type_hints(cls)
    for f in fields(cls):
        kinds = [kind for kind in _alternatives(hints[f.name]) if kind is not types.NoneType]
        text = f.metadata["help"] + ("" if f.default in (None, (), False) else f" (default {_shown(f.default)})")
        flag, given = "--" + f.name.replace("_", "-"), {"default": argparse.SUPPRESS, "help": text}
        if typing.get_origin(kinds[0]) is tuple:
            items = _alternatives(typing.get_args(kinds[0])[0])
            parser.add_argument(flag, nargs="+", type=str if str in items else items[0], **given)
        elif bool in kinds:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **given)
        else:
            parser.add_argument(flag, type=kinds[0], **given)


def _convert(hint: Any, value: Any, where: str) -> Any:
    kinds = _alternatives(hint)
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if origin is tuple and isinstance(value, (list, tuple)):
            item = typing.get_args(kind)[0]
            return tuple(_convert(item, part, f"{where}[{place}]") for place, part in enumerate(value))
        if isinstance(origin, type) and isinstance(value, origin) and isinstance(value, bool) == (kind is bool):
            return value
        if is_dataclass(kind) and isinstance(value, Mapping):
            return from_options(kind, value, where)
    if float in kinds and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-4, which has no point, as a text
        except ValueError:
            pass
    raise ValueError(f"{where} must be {' or '.join(map(_named, kinds))}, got {_described(value)}")


def _alternatives(hint: Any) -> Sequence[Any]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _named(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"a list, each item {' or '.join(map(_named, _alternatives(typing.get_args(kind)[0])))}"
    if is_dataclass(kind):
        return f"a mapping of {', '.join(f.name for f in fields(kind))}"
    return _NAMES.get(typing.get_origin(kind) or kind, str(kind))


def _described(value: Any) -> str:
    kind = "a list" if isinstance(value, (list, tuple)) else _NAMES.get(type(value), type(value).__name__)
    return "null" if value is None else f"{kind}, {value!r}"


def _shown(default: Any) -> str:
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


def _nearest(key: Any, known: Sequence[str]) -> str:
    return difflib.get_close_matches(str(key).replace("-", "_"), known, n=1, cutoff=0.0)[0]


def _once(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({str(key) for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"given twice: {', '.join(twice)}")
    return dict(pairs)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, of which YAML would silently take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        content = super().construct_mapping(node, deep)
        _once([(self.construct_object(key, deep=True), None) for key, _ in node.value])
        return content
