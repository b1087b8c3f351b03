"""The configurations that were measured to be fastest: tuned.py, which is committed, and the user's table.

The user's table is a JSON file, by machine: the name of the GPU and the versions of torch and Triton. So another GPU or
another compiler takes nothing from it:
    {machine: {"configs": {kernel: {head size: fields of a Config}}, "fused_backward": {head size: bool}}}
An entry that this version cannot use is left out with a warning.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from ... import cache
from . import tuned
from .defaults import HEAD_DIMS, KERNELS, Config
from .primitives import MAX_BLOCK

logger = logging.getLogger("lumos_kernels")

NAME = "frame_attention_tuned.json"
_SMALLEST_BLOCK = 16  # rows of the smallest operand of a matrix instruction
_Value = TypeVar("_Value")


class Table(NamedTuple):
    """The measurements of one machine or architecture."""

    configs: Mapping[tuple[str, int], Config]  # by kernel and head size
    fused: Mapping[int, bool]  # by head size: the fused backward beat the deterministic one

    def updated(self, other: Table) -> Table:
        """Return the table with the entries of `other` in the place of its own."""
        return Table({**self.configs, **other.configs}, {**self.fused, **other.fused})


def path() -> Path:
    """Return the file of the user's table. It need not exist."""
    return cache.folder() / NAME


def machine(gpu: int | None = None) -> str:
    """Return the name under which a GPU's measurements are kept. None is the current GPU."""
    return f"{torch.cuda.get_device_name(gpu)}, torch {torch.__version__}, triton {triton.__version__}"


def committed(arch: str) -> Table:
    """Return the entries of tuned.py for an architecture."""
    configs = {(kernel, dim): fields for (kernel, of, dim), fields in tuned.CONFIGS.items() if of == arch}
    return Table(
        _valid(configs, lambda key, fields: checked(key[0], arch, key[1], fields), "tuned.py"),
        {dim: True for of, dim in tuned.FUSED_BACKWARD if of == arch},
    )


def of_user(name: str, arch: str) -> Table:
    """Return the user's entries for the machine `name`, empty where there are none or the file is broken."""
    source = str(path())
    stored = cache.read(NAME)
    if not stored and path().exists():
        logger.warning("%s is ignored: it holds no JSON object with entries", source)
    entries = _mapping(stored.get(name, {}), source)
    configs = {
        (kernel, dim): fields
        for kernel, by_dim in _mapping(entries.get("configs", {}), source).items()
        for dim, fields in _mapping(by_dim, source).items()
    }
    fused = _mapping(entries.get("fused_backward", {}), source)
    valid = _valid(configs, lambda key, fields: checked(key[0], arch, _head_dim(key[1]), fields), source)
    return Table(
        {(kernel, int(dim)): config for (kernel, dim), config in valid.items()},
        {int(dim): verdict for dim, verdict in _valid(fused, _checked_verdict, source).items()},
    )


def save(name: str, found: Table) -> bool:
    """Add the entries to the user's table of the machine `name`. Return whether the file could be written."""
    with cache.locked(NAME):
        stored = cache.read(NAME)
        entries = stored.get(name)
        entries = entries if isinstance(entries, dict) else {}
        for key in ("configs", "fused_backward"):
            if not isinstance(entries.get(key), dict):
                entries[key] = {}
        for (kernel, dim), config in found.configs.items():
            if not isinstance(entries["configs"].get(kernel), dict):
                entries["configs"][kernel] = {}
            entries["configs"][kernel][str(dim)] = fields_of(config)
        entries["fused_backward"].update({str(dim): verdict for dim, verdict in found.fused.items()})
        return cache.write(NAME, {**stored, name: entries})


def fields_of(config: Config) -> dict[str, Any]:
    """Return the fields that are set, as a table's entry has them."""
    return {name: value for name, value in dataclasses.asdict(config).items() if value is not None}


def checked(kernel: str, arch: str, head_dim: int, fields: Any) -> Config:
    """Return the configuration with these fields. Raise ValueError where the kernels cannot take it."""
    if kernel not in KERNELS:
        raise ValueError(f"there is no kernel {kernel!r}")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"there is no head size {head_dim!r}")
    if not isinstance(fields, Mapping):
        raise ValueError(f"{fields!r} is no mapping of fields")
    names = {field.name for field in dataclasses.fields(Config)}
    missing = {"block_m", "block_n", "num_warps", "descriptors"} - set(fields)
    if missing or not set(fields) <= names:
        raise ValueError(f"fields {sorted(fields)}, missing {sorted(missing)}, unknown {sorted(set(fields) - names)}")
    numbers = {name: value for name, value in fields.items() if name != "descriptors"}
    if any(type(value) is not int for value in numbers.values()) or type(fields["descriptors"]) is not bool:
        raise ValueError(f"{dict(fields)} needs integers, and a bool for descriptors")
    for name in ("block_m", "block_n"):  # statistics are padded to whole tiles of MAX_BLOCK rows
        if fields[name] < _SMALLEST_BLOCK or MAX_BLOCK % fields[name]:
            raise ValueError(f"{name} must be a divisor of {MAX_BLOCK} from {_SMALLEST_BLOCK} on, not {fields[name]}")
    if fields["num_warps"] not in (1, 2, 4, 8, 16):
        raise ValueError(f"num_warps must be 1, 2, 4, 8 or 16, not {fields['num_warps']}")
    if not 1 <= fields.get("num_stages", 1) <= 8 or not 16 <= fields.get("max_registers", 255) <= 255:
        raise ValueError(f"num_stages is from 1 to 8 and max_registers from 16 to 255, not those of {dict(fields)}")
    if fields["descriptors"] and arch == "sm_80":
        raise ValueError("sm_80 has no tensor descriptors")
    return Config(**fields)


def _checked_verdict(dim: Any, verdict: Any) -> bool:
    if _head_dim(dim) not in HEAD_DIMS or type(verdict) is not bool:
        raise ValueError("a head size and true or false are expected")
    return verdict


def _head_dim(text: Any) -> int:
    return int(text) if isinstance(text, str) and text.isdecimal() else 0


def _mapping(value: Any, source: str) -> Mapping[Any, Any]:
    if isinstance(value, Mapping):
        return value
    logger.warning("%s: %r is ignored, a JSON object is expected there", source, value)
    return {}


def _valid(entries: Mapping[Any, Any], check: Callable[[Any, Any], _Value], source: str) -> dict[Any, _Value]:
    """Return the entries that pass, and warn of the others."""
    valid = {}
    for key, value in entries.items():
        try:
            valid[key] = check(key, value)
        except ValueError as error:
            logger.warning("%s: the entry of %s is ignored: %s", source, key, error)
    return valid
