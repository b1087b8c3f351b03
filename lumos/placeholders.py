"""Placeholders in the texts of official samples: ids that stand for numbers which are known once a video is cut.

Before the video start, 65538, 65539 and 65540 stand for the resolution, the number of pictures and the frames per
second. Behind it the same ids are visual codes, and to the model they are nothing else: a text must not keep them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lumos_kernels.token_ids import MASK, NUMBER_BASE, VISUAL_START

PLACEHOLDERS = (65538, 65539, 65540)  # resolution, pictures, fps
IGNORED = -100  # label of tokens that are not predicted
DIGITS = "digits"
_FIRST_DIGIT = 16399  # id of "0" in the text tokenizer of the released checkpoints
_LARGEST = (MASK - NUMBER_BASE - 1) ** 2  # seconds times fps


def read_numbers(path: str | Path) -> Mapping[int, Sequence[int]]:
    """Return the table number -> text ids for cut_video.

    path: a JSON object of the official form {"12": [16400, 16401]}, or "digits": the table published with the official
    code and carried on beyond its end at 999, where each decimal digit d is the id 16399 + d.
    Raises FileNotFoundError or ValueError naming the file.
    """
    if path == DIGITS:
        return {n: tuple(_FIRST_DIGIT + int(digit) for digit in str(n)) for n in range(_LARGEST + 1)}
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no table of numbers: {error}") from error
    return checked_numbers(table, str(path))


@lru_cache
def known_numbers(path: str | Path) -> Mapping[int, Sequence[int]]:
    """read_numbers, read once."""
    return read_numbers(path)


def checked_numbers(table: Any, where: str) -> dict[int, list[int]]:
    """Return a table number -> text ids with whole numbers as keys, which JSON holds as texts.

    Raises ValueError that begins with `where`.
    """
    if not isinstance(table, Mapping):
        raise ValueError(f"{where} is no table of numbers: it must map numbers to lists of ids, got {table!r}")
    checked = {}
    for key, ids in table.items():
        if isinstance(key, bool) or not isinstance(key, (int, str)) or not str(key).isdecimal():
            raise ValueError(f"{where} is no table of numbers: {key!r} is no whole number")
        good = isinstance(ids, (list, tuple)) and all(type(i) is int and 0 <= i < VISUAL_START for i in ids)
        if not good or not ids:
            raise ValueError(f"{where}: the ids of number {key} must be a list of text ids, got {ids!r}")
        checked[int(key)] = list(ids)
    return checked


def replace_placeholders(
    ids: Tensor,
    labels: Tensor | None,
    begin: int,
    seconds: int,
    fps: int,
    numbers: Mapping[int, Sequence[int]] | None,
) -> tuple[Tensor, Tensor | None]:
    """Return ids and labels with 65539 and 65540 in the text replaced by the ids of seconds * fps and of fps.

    begin: the token of the video start, where the text ends. numbers None: nothing is replaced.
    ValueError where the table lacks a number that is needed.
    """
    if numbers is None or not (ids[:begin] >= VISUAL_START).any():
        return ids, labels
    text, wanted = ids[:begin].tolist(), dict(zip(PLACEHOLDERS[1:], (fps * seconds, fps), strict=True))
    new, new_labels = [], []
    for at, i in enumerate(text):
        if i in wanted and wanted[i] not in numbers:
            raise ValueError(f"numbers has no ids for {wanted[i]}")
        replaced = list(numbers[wanted[i]]) if i in wanted else [i]
        new += replaced
        # What replaces a placeholder is never predicted.
        new_labels += [IGNORED] * len(replaced) if labels is None or i in wanted else [int(labels[at])]
    ids = torch.cat([torch.tensor(new, dtype=torch.int64), ids[begin:]])
    return ids, None if labels is None else torch.cat([torch.tensor(new_labels, dtype=torch.int64), labels[begin:]])


def check_text(ids: Tensor, begin: int) -> None:
    """Raise ValueError that names the first visual id before the video start, token `begin`."""
    visual = (ids[:begin] >= VISUAL_START).nonzero()
    if len(visual):
        at = int(visual[0])
        raise ValueError(
            f"token {at}, before the video start, is {int(ids[at])}, an id of the visual range (from {VISUAL_START}); "
            f"a text holds ids below it. numbers=none trains on such a text as it is"
        )
