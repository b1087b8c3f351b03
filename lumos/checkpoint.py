"""Official checkpoint folders in and out: config.json with model.safetensors or pytorch_model.bin, whole or sharded.

Loading builds the model on the meta device and hands it the stored tensors, so the weights exist once. Nothing is
unpickled beyond tensors (torch.load with weights_only), and a shard index cannot name files outside its folder.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lumos.config import LumosConfig
from lumos.disk import sync_path

if TYPE_CHECKING:
    from lumos.model import Lumos

    LumosType = TypeVar("LumosType", bound=Lumos)

CONFIG_NAME = "config.json"
# (name of the only file, name of the index of its shards), in the order of preference
WEIGHT_NAMES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
WEIGHT_FILE = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
# The image tokenizer that official checkpoints may carry along; its weights are random or unused.
IGNORED_PREFIX = "model.vqmodel."
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_NAMES_SHOWN = 8


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or that does not fit its config; the message names the files and tensors."""


def load_pretrained(
    model_class: type[LumosType],
    path: str | Path,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> LumosType:
    """A model with the weights of an official checkpoint folder, in eval mode.

    path: a local folder, or a Hugging Face repository "owner/name", which is downloaded into the hub's cache.
    subfolder: folder inside it that holds config.json and the weights.
    dtype: of the parameters; None keeps the stored one. device: where they go, one tensor at a time.
    revision: branch, tag or commit of a hub repository.

    Raises FileNotFoundError where there is no such folder, repository or file, CheckpointError where files are
    damaged, or where tensors are missing, unexpected or of another shape (all of them named in one message).
    """
    folder = _resolve(path, subfolder, revision)
    config = LumosConfig.from_json_file(_existing(folder / CONFIG_NAME))
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    state: dict[str, Tensor] = {}
    unexpected, wrong = [], []
    for file in _weight_files(folder):
        for name, stored in _read_tensors(file, expected):
            if name not in expected:
                unexpected.append(name)
            elif not isinstance(stored, Tensor):
                wrong.append(f"{name} has shape {list(stored)}, the config asks for {list(expected[name])}")
            else:
                state[name] = stored.to(device=device, dtype=dtype if dtype is not None else stored.dtype)
    misshapen = {text.split(" ", 1)[0] for text in wrong}
    missing = [name for name in expected if name not in state and name not in misshapen]
    problems = [
        f"{label}: {_listed(names)}"
        for label, names in (("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong))
        if names
    ]
    if problems:
        raise CheckpointError(f"the weights in {folder} do not fit its {CONFIG_NAME}; " + "; ".join(problems))
    model.load_state_dict(state, assign=True)
    return model.requires_grad_().eval()


def save_pretrained(
    model: Lumos,
    path: str | Path,
    max_shard_size: int | str = "5GB",
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes config.json and safetensors under the official names; a reader sees the old folder or the new, whole.

    Everything is written and synced beside `path` and then renamed into place. Files of an existing folder that
    are no weights and no config (a tokenizer, say) are kept. A crash between the two renames leaves the old folder
    whole as .<name>.old-*.

    max_shard_size: bytes, or text such as "5GB"; a tensor larger than that gets a shard of its own.
    state_dict: written instead of the model's own, e.g. gathered from a sharded model.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: give the folder to write the checkpoint into")
    state = {name: tensor.detach() for name, tensor in (state_dict or model.state_dict()).items()}
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values()}
    config = model.config.to_dict()
    if len(dtypes) == 1:
        config["torch_dtype"] = dtypes.pop()

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new-{uuid4().hex}")
    temporary.mkdir()
    try:
        _write_shards(temporary, state, _shards(state, _parse_size(max_shard_size)))
        (temporary / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for file in temporary.iterdir():
            sync_path(file)
        _swap(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _resolve(path: str | Path, subfolder: str | None, revision: str | None) -> Path:
    """The local folder of a checkpoint, downloaded where `path` is a hub id."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if isinstance(path, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", path):
            raise FileNotFoundError(f"no checkpoint folder {folder}; a hub repository is written owner/name")
        folder = _download(path, subfolder, revision)
    folder = folder / (subfolder or "")
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}" + (f": subfolder {subfolder!r} does not exist" * bool(subfolder)))
    return folder


def _download(repository: str, subfolder: str | None, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    prefix = f"{subfolder.strip('/')}/" if subfolder else ""

    def fetch(*names: str) -> Path:
        patterns = [prefix + name for name in names]
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))

    try:
        root = fetch(CONFIG_NAME, "tokenizer.json", *(index for _, index in WEIGHT_NAMES))
        for single, index in WEIGHT_NAMES:  # named one by one: a pattern would match the other sizes' subfolders too
            shards = _shard_names(root / prefix / index) if (root / prefix / index).is_file() else [single]
            if all((fetch(*shards) / prefix / shard).is_file() for shard in shards):
                break
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{repository} is no local folder and could not be downloaded: {error}") from error
    return root


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise FileNotFoundError(f"{file.parent} has no {file.name}")
    return file


def _weight_files(folder: Path) -> list[Path]:
    for single, index in WEIGHT_NAMES:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return [_existing(folder / name) for name in _shard_names(folder / index)]
    wanted = ", ".join(name for names in WEIGHT_NAMES for name in names)
    raise FileNotFoundError(f"{folder} has no weights: none of {wanted}")


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {type(error).__name__} {error}") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names the shard {name!r}, which is not a file of its folder")
    return names


def _read_tensors(
    file: Path, expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor | tuple[int, ...]]]:
    """(name, tensor) of a file; (name, shape) of those that are not expected or not so shaped, left unread."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    shape = tuple(tensors.get_slice(name).get_shape())
                    if not name.startswith(IGNORED_PREFIX):
                        yield name, tensors.get_tensor(name) if expected.get(name) == shape else shape
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
                raise CheckpointError(f"{file} must hold a dict of tensors")
            for name, tensor in tensors.items():
                if not name.startswith(IGNORED_PREFIX):
                    shape = tuple(tensor.shape)
                    yield name, tensor if expected.get(name) == shape else shape
    except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, RuntimeError) as error:
        raise CheckpointError(f"{file} is damaged or no checkpoint: {error}") from error


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _parse_size(size: int | str) -> int:
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+)\s*(KB|MB|GB|TB)", size.strip(), re.IGNORECASE)
        size = int(match[1]) * _UNITS[match[2].upper()] if match else size
    if isinstance(size, bool) or not isinstance(size, int) or size <= 0:
        raise ValueError(f"max_shard_size must be a number of bytes > 0 or text such as '5GB', got {size!r}")
    return size


def _shards(state: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """Names of the tensors of each shard, in order, each shard at most `limit` bytes or one tensor."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in state.items():
        if shards[-1] and used + tensor.nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    return shards


def _write_shards(folder: Path, state: Mapping[str, Tensor], shards: list[list[str]]) -> None:
    single, index = WEIGHT_NAMES[0]
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: state[name].contiguous() for name in names}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / index).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _swap(new: Path, path: Path) -> None:
    """Renames `new` to `path`; an existing folder gives way, its files that are no checkpoint move over."""
    if not path.is_dir():
        os.rename(new, path)
        sync_path(path.parent)
        return
    old = path.with_name(f".{path.name}.old-{uuid4().hex}")
    os.rename(path, old)
    os.rename(new, path)
    for entry in old.iterdir():
        if entry.name != CONFIG_NAME and not WEIGHT_FILE.fullmatch(entry.name):
            os.rename(entry, path / entry.name)
    sync_path(path.parent)
    shutil.rmtree(old)
