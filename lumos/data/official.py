"""The official training format: pickles of token lists, and the JSON index that lists them."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import torch
from torch.utils.data import Dataset

from lumos.data.sample import Sample
from lumos.tokens import IGNORED, NUM_CODES, VISUAL_START

_VOCABULARY = VISUAL_START + NUM_CODES


_PLAIN_OPCODES = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
    *(pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
)


class _PlainUnpickler(pickle._Unpickler):
    """Knows only the opcodes of dicts, lists, ints and strings (protocols 2 to 5).

    No opcode that imports or calls is in the table, so no file can make it run code. The Python implementation, not
    the C one, because only its table can be narrowed, and because a forged memo index makes the C one allocate
    gigabytes.
    """

    dispatch = {op[0]: pickle._Unpickler.dispatch[op[0]] for op in _PLAIN_OPCODES}  # noqa: RUF012


def read_official_sample(path: str | Path) -> Sample:
    """One sample of the official training format: a pickle {"token": list[int], "label": list[int], "id": int}.

    Only dicts, lists, ints and strings are admitted; a file with anything else is refused before anything of it runs.
    Raises FileNotFoundError or ValueError naming the file.
    """
    data = Path(path).read_bytes()
    try:
        content = _PlainUnpickler(io.BytesIO(data)).load()
    # Malformed bytes can raise nearly anything: the opcodes trust their operands.
    except Exception as error:
        reason = "an opcode that plain data does not need" if isinstance(error, KeyError) else repr(error)
        raise ValueError(f"{path} is not a pickle of dicts, lists, ints and strings only: {reason}") from error
    try:
        return _official_sample(content, str(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _official_sample(content: object, source: str) -> Sample:
    if not isinstance(content, dict) or not {"token", "label"} <= set(content):
        raise ValueError("expected a dict with token, label and id")
    rows = []
    for name in ("token", "label"):
        row = content[name]
        if not isinstance(row, list) or any(type(i) is not int or not IGNORED <= i < _VOCABULARY for i in row):
            raise ValueError(f"{name} must be a list of ids")
        rows.append(torch.tensor(row, dtype=torch.int64))
    ids, labels = rows
    if len(ids) != len(labels) or ((labels != ids) & (labels != IGNORED)).any():
        raise ValueError(f"label must hold token's {len(ids)} ids or {IGNORED} in their places")
    given = content.get("id")
    if given is not None and type(given) is not int:
        raise ValueError(f"id must be an integer, got {given!r}")
    return Sample.from_ids(ids, source=source, labels=labels, id=given)


class OfficialDataset(Dataset[Sample]):
    """The official pickles that an index lists: a JSON list [{"file", "len", "id"}, ...].

    index: the JSON file. root: folder that relative file names start from; None is the index's own.
    Raises FileNotFoundError and ValueError naming the file.
    """

    def __init__(self, index: str | Path, root: str | Path | None = None) -> None:
        self.index = Path(index)
        self.root = self.index.parent if root is None else Path(root)
        try:
            entries = json.loads(self.index.read_text())
            self.files = [(self.root / entry["file"], int(entry["len"])) for entry in entries]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{index} is not a list of objects with file, len and id: {error!r}") from error

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, at: int) -> Sample:
        path, length = self.files[at]
        sample = read_official_sample(path)
        if len(sample.ids) != length:
            raise ValueError(f"{path} holds {len(sample.ids)} tokens, {self.index} says {length}")
        return sample
