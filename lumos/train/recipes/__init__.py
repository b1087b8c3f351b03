"""Settings to start from, one YAML file each, that `lumos train --recipe NAME` reads and anyone may copy and change.

Names in angle brackets stand for what only the user knows: the folders of data and the checkpoint to begin with.
"""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import yaml

_BLANK = re.compile(r"<.*>")


def recipe_names() -> list[str]:
    """Of all recipes, in alphabetical order."""
    return sorted(file.name.removesuffix(".yaml") for file in files(__name__).iterdir() if file.name.endswith(".yaml"))


def recipe_text(name: str) -> str:
    """The file of a recipe, comments and all: a --config file once its blanks are filled. ValueError for no recipe."""
    if name not in recipe_names():
        raise ValueError(f"recipe must be one of {', '.join(recipe_names())}, got {name!r}")
    return (files(__name__) / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_title(name: str) -> str:
    """What a recipe is for, its first line."""
    return recipe_text(name).splitlines()[0].removeprefix("# ")


def recipe_options(name: str) -> dict[str, Any]:
    """The keys and values of a recipe, blanks unfilled."""
    return yaml.safe_load(recipe_text(name))


def is_blank(value: Any) -> bool:
    """Whether a value is a name in angle brackets that stands for the user's own."""
    return isinstance(value, str) and _BLANK.fullmatch(value) is not None
