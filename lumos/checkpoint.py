"""Official checkpoint folders in and out: config.json with model.safetensors or pytorch_model.bin, whole or sharded.

Loading builds the model on the meta device and hands it the stored tensors, so the weights exist once. A shard index
cannot name files outside its folder. lumos/weight_files.py reads the files.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import Tensor

from lumos.config import LumosConfig
from lumos.disk import sync_path
from lumos.weight_files import (
    WEIGHT_DTYPES,
    CheckpointError,
    StoredTensor,
    fault_of,
    listed,
    official_name,
    stored_tensors,
)

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
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
# Names that quantised checkpoints give to what belongs to a weight.
_SCALES = re.compile(r".*(scales?(_inv)?|zeros?|zero_points?|qweight|g_idx|SCB|absmax|quant_map|quant_state\S*)")
_LOGGER = logging.getLogger(__name__)


class MissingFileError(CheckpointError, FileNotFoundError):
    """A checkpoint that names a file which is not there."""


def load_pretrained(
    model_class: type[LumosType],
    path: str | Path,
    subfolder: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
) -> LumosType:
    """Return a model with the weights of an official checkpoint folder, in eval mode.

    path: a local folder, or a Hugging Face repository "owner/name", which is downloaded into the hub's cache.
    subfolder: folder inside it that holds config.json and the weights.
    dtype: of the parameters, float16, bfloat16, float32 or float64. None keeps the stored one; where the stored ones
        differ, all take the config's torch_dtype if some weight has it, else the smallest dtype that holds them all.
    device: where the weights go, one tensor at a time.
    revision: branch, tag or commit of a hub repository.

    No two parameters share memory, also where a file ties them. Raises FileNotFoundError where there is no such
    folder, repository or file, ValueError for a config or a dtype that is not read, CheckpointError where files are
    damaged, or where tensors are missing, unexpected, of another shape or no weights (all named in one message).
    """
    if dtype is not None and dtype not in WEIGHT_DTYPES:
        raise ValueError(f"dtype must be None or one of {', '.join(map(str, WEIGHT_DTYPES))}, got {dtype!r}")
    folder = _resolve(path, subfolder, revision)
    config = LumosConfig.from_json_file(_existing(folder / CONFIG_NAME))
    with torch.device("meta"):
        model = model_class(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

    state: dict[str, Tensor] = {}
    found = _Found(expected)
    for file in _weight_files(folder):
        for stored in stored_tensors(file):
            if found.fits(stored, file):
                tensor = stored.read()
                state[stored.name] = tensor.to(device=device, dtype=dtype if dtype is not None else tensor.dtype)
    problems = found.problems()
    if problems:
        raise CheckpointError(f"the weights in {folder} do not fit its {CONFIG_NAME}; {problems}")
    _unify_dtypes(state, config, folder)
    model.load_state_dict(_separated(state), assign=True)
    return model.requires_grad_().eval()


class _Found:
    """The tensors of a folder against those of its config."""

    def __init__(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        self.expected = expected
        self.files: dict[str, Path] = {}
        self.unexpected: list[str] = []
        self.misshapen: list[str] = []
        self.faulty: list[str] = []
        self.quantised: list[str] = []

    def fits(self, stored: StoredTensor, file: Path) -> bool:
        """Return True for a tensor that serves as a weight, and note what is wrong with any other."""
        name = stored.name
        if name in self.files:
            raise CheckpointError(f"{name} is stored twice, in {self.files[name]} and in {file}")
        self.files[name] = file
        if stored.fault.startswith(("is int", "is uint", "is q", "is float", "is F")) or _SCALES.fullmatch(name):
            self.quantised.append(name)
        if name not in self.expected:
            self.unexpected.append(name)
        elif stored.fault:
            self.faulty.append(f"{name} {stored.fault} in {file.name}")
        elif stored.shape != self.expected[name]:
            wanted = list(self.expected[name])
            self.misshapen.append(f"{name} has shape {list(stored.shape)}, the config asks for {wanted}")
        else:
            return True
        return False

    def problems(self) -> str:
        """Name all that is wrong; "" for nothing."""
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in WEIGHT_DTYPES)
        texts = [
            f"{label}: {listed(names)}"
            for label, names in (
                ("missing", [name for name in self.expected if name not in self.files]),
                ("unexpected", self.unexpected),
                ("wrong shape", self.misshapen),
                (f"not a dense tensor of {allowed}", self.faulty),
            )
            if names
        ]
        if texts and self.quantised:
            texts.append(
                f"the checkpoint is quantised ({listed(self.quantised)}): dequantise it to one of those dtypes"
            )
        return "; ".join(texts)


def _unify_dtypes(state: dict[str, Tensor], config: LumosConfig, folder: Path) -> None:
    """Gives all weights one dtype, which the matrix products need; the rule is in load_pretrained."""
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) < 2:
        return
    named = config.extra.get("torch_dtype")
    chosen = getattr(torch, named.removeprefix("torch."), None) if isinstance(named, str) else None
    target = chosen if chosen in dtypes else _widest(dtypes)
    names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
    _LOGGER.warning("the weights in %s are %s; all are loaded as %s", folder, names, str(target).removeprefix("torch."))
    for name, tensor in state.items():
        state[name] = tensor.to(target)


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The smallest dtype that holds the values of all."""
    return reduce(torch.promote_types, dtypes)


def _separated(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, with a copy of each that shares memory with one before it."""
    taken: set[tuple[torch.device, int]] = set()
    separate = {}
    for name, tensor in state.items():
        tensor = tensor.contiguous()
        place = (tensor.device, tensor.untyped_storage().data_ptr())
        separate[name] = tensor.clone() if place in taken else tensor
        taken.add(place)
    return separate


def save_pretrained(
    model: Lumos,
    path: str | Path,
    max_shard_size: int | str = "5GB",
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Write config.json and safetensors under the official names; a reader sees the old folder or the new, whole.

    Everything is written and synced beside `path` and then renamed into place. Files of an existing folder that
    are no weights and no config (a tokenizer, say) are kept. A crash between the two renames leaves the old folder
    whole as .<name>.old-*.

    max_shard_size: bytes, or text such as "5GB"; a tensor larger than that gets a shard of its own.
    state_dict: written instead of the model's own, e.g. gathered from a sharded model.

    Tensors that share memory are each written whole. Where the dtypes differ, torch_dtype is the smallest one that
    holds them all. Raises CheckpointError naming a tensor that is no weight: a shard, on the meta device, sparse, of
    another dtype than float16, bfloat16, float32 and float64.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path} is a file: give the folder to write the checkpoint into")
    state = _writable(model.state_dict() if state_dict is None else state_dict)
    config = model.config.to_dict()
    config["torch_dtype"] = str(_widest({tensor.dtype for tensor in state.values()})).removeprefix("torch.")

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


def _existing_shard(folder: Path, name: str, tensors: list[str]) -> Path:
    if not (folder / name).is_file():
        raise MissingFileError(f"{folder} has no {name}, which its index names for {listed(tensors)}")
    return folder / name


def _weight_files(folder: Path) -> list[Path]:
    for single, index in WEIGHT_NAMES:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return [_existing_shard(folder, *shard) for shard in sorted(_shards_of(folder / index).items())]
    wanted = ", ".join(name for names in WEIGHT_NAMES for name in names)
    raise FileNotFoundError(f"{folder} has no weights: none of {wanted}")


def _shard_names(index: Path) -> list[str]:
    return sorted(_shards_of(index))


def _shards_of(index: Path) -> dict[str, list[str]]:
    """The tensors that an index says each shard holds."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {type(error).__name__} {error}") from error
    shards: dict[str, list[str]] = {}
    for tensor, name in places:
        if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\0" in name:
            raise CheckpointError(f"{index} names the shard {name!r}, which is not a file of its folder")
        shards.setdefault(name, []).append(tensor)
    return shards


def _writable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under their official names. CheckpointError names those that are no weights."""
    faults = [f"{name} {fault_of(tensor)}" for name, tensor in tensors.items() if fault_of(tensor)]
    if faults:
        raise CheckpointError(f"only dense tensors of floating point are written; {listed(faults)}")
    state = {official_name(name): tensor.detach() for name, tensor in tensors.items()}
    if len(state) != len(tensors) or not state:
        raise CheckpointError(
            f"{len(tensors)} tensors have {len(state)} names without what wrappers add: {listed(list(state))}"
        )
    return state


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
        save_file(_separated({name: state[name] for name in names}), folder / file, metadata={"format": "pt"})
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
