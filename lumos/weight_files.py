"""Tensors in the weight files of checkpoints, .safetensors and .bin, and what keeps one from being a weight.

A .bin is read with torch.load(weights_only=True): zip archives are mapped, the form before PyTorch 1.6 is read whole.
Nothing is unpickled beyond tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The image tokenizer that official checkpoints may carry along; its weights are random or unused.
IGNORED_PREFIX = "model.vqmodel."

_SAFETENSORS_DTYPES = {
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64", "BOOL": "bool"},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
}
# What DDP, torch.compile, FSDP1 and activation checkpointing put into the names of parameters.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# Keys under which trainers keep the weights beside an optimizer, a step and so on.
_NESTS = ("state_dict", "model_state_dict", "model", "module")
_SHOWN = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written, or does not fit its config; it names the files and tensors."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file, not read yet.

    name: the official one, without the wrappers' parts. dtype: its name, "float8_e4m3fn" say.
    fault: what keeps it from being a weight, "is int8" say; "" for nothing.
    read: returns the tensor, contiguous and without gradient.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fault: str
    read: Callable[[], Tensor]


def stored_tensors(file: Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a weight file but those of the image tokenizer. CheckpointError names file and tensor."""
    head = _head(file)
    try:
        entries = _safetensors(file) if file.suffix == ".safetensors" else _pickled(file, head)
        yield from (entry for entry in entries if not entry.name.startswith(IGNORED_PREFIX))
    except (CheckpointError, OSError, MemoryError, GeneratorExit):
        raise
    # Damaged bytes make the readers raise anything: KeyError, AttributeError, struct.error, ...
    except Exception as error:
        raise CheckpointError(f"{file} is damaged or no checkpoint: {_reason(error)}") from error


def official_name(name: str) -> str:
    """Return the name of a parameter without what DDP, torch.compile, FSDP1 and checkpointing put into it."""
    return _WRAPPERS.sub("", name)


def fault_of(tensor: Tensor) -> str:
    """Say what keeps a tensor from being a weight, "is int8" say; "" for nothing."""
    if type(tensor) not in (Tensor, nn.Parameter):
        advice = ", a shard: gather it (full_tensor)" if type(tensor).__name__ == "DTensor" else ""
        return f"is a {type(tensor).__name__}{advice}"
    if tensor.layout != torch.strided:
        return f"is sparse ({_bare(tensor.layout)})"
    if tensor.is_meta:
        return "has no values (device meta)"
    return "" if tensor.dtype in WEIGHT_DTYPES else f"is {_bare(tensor.dtype)}"


def listed(names: list[str]) -> str:
    """Join names for a message, the first few and the count of the others."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _safetensors(file: Path) -> Iterator[StoredTensor]:
    known = set(map(_bare, WEIGHT_DTYPES))
    with safe_open(file, "pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            stored = tensors.get_slice(key)
            dtype = _SAFETENSORS_DTYPES.get(stored.get_dtype(), stored.get_dtype())
            fault = "" if dtype in known else f"is {dtype}"
            read = partial(tensors.get_tensor, key)
            yield StoredTensor(official_name(key), tuple(stored.get_shape()), dtype, fault, read)


def _pickled(file: Path, head: bytes) -> Iterator[StoredTensor]:
    # Only zip archives can be mapped.
    content = torch.load(file, map_location="cpu", weights_only=True, mmap=head.startswith(b"PK\x03\x04"))
    entries = _unnested(content)
    if not isinstance(entries, Mapping):
        raise CheckpointError(f"{file} must hold a dict of tensors, got a {type(entries).__name__}")
    named = {key: official_name(key) if isinstance(key, str) else repr(key) for key in entries}
    others = [
        f"{name} is a {type(entries[key]).__name__}"
        for key, name in named.items()
        if not isinstance(entries[key], Tensor) and not name.startswith(IGNORED_PREFIX)
    ]
    if others:
        raise CheckpointError(f"{file} must hold a dict of tensors, but {listed(others)}")
    for key, name in named.items():
        tensor = entries[key]
        if isinstance(tensor, Tensor):
            read = tensor.detach().contiguous if not fault_of(tensor) else tensor.detach
            yield StoredTensor(name, tuple(tensor.shape), _bare(tensor.dtype), fault_of(tensor), read)


def _unnested(content: Any) -> Any:
    """The weights inside what a trainer saved: the mapping under one of _NESTS, where no tensor lies beside it."""
    while isinstance(content, Mapping) and not any(isinstance(value, Tensor) for value in content.values()):
        nest = next((key for key in _NESTS if isinstance(content.get(key), Mapping)), None)
        if nest is None:
            break
        content = content[nest]
    return content


def _head(file: Path) -> bytes:
    """The first bytes of a file. CheckpointError where they are of something known that is no checkpoint."""
    with file.open("rb") as stream:
        head = stream.read(512)
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file} is a Git LFS pointer, not the file it stands for: fetch it with git lfs pull")
    if head.lstrip()[:1] == b"<" and b"html" in head.lower():
        raise CheckpointError(f"{file} is a web page, not the file that was to be downloaded")
    if file.suffix != ".safetensors" and head[257:262] == b"ustar":
        raise CheckpointError(
            f"{file} is a tar archive, the form of PyTorch before 0.2, which cannot be read without running its code: "
            f"load it with an old PyTorch where you trust it and save it again"
        )
    return head


def _reason(error: Exception) -> str:
    """Describe what is wrong in one line, without torch's advice to run the code of the pickle."""
    text = str(error).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0]
    text = re.split(r"\.? (?:was not an allowed|Please use|Please file|This file can still)", text)[0]
    return text if isinstance(error, RuntimeError) and text else f"{type(error).__name__} {text}".rstrip()


def _bare(value: object) -> str:
    return str(value).removeprefix("torch.")
