"""Find the target rows of a call, or check those that its caller names.

Where the caller names none, the targets are counted, which reads one number from the device. Named rows cost no host
sync on a GPU, so there they cannot be refused. Instead a wrong index is made harmless: a row outside 0 .. T - 1 becomes
an existing row without a target, and every implementation skips rows whose target is no class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..token_ids import NEW_LINE

IGNORED = -100
NO_TARGETS = (IGNORED, NEW_LINE)  # labels that Lumos-1's batches have where nothing is to be predicted
CHECKED_DEVICES = ("cpu",)  # where `rows` are checked


def is_target(labels: Tensor, first: int, last: int) -> Tensor:
    """Return bool [T], True where the label lies in the class slice."""
    return (labels >= first) & (labels < last)


def target_rows(labels: Tensor, rows: Tensor | None, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return the target rows and their targets, counted from `first`: int64 [N] each.

    A target outside 0 .. last - first - 1 comes only from wrong `rows` on a GPU.

    Raises ValueError where `rows`, on the CPU, are not exactly the target rows. Without `rows` it raises ValueError
    where labels name tokens, and none of them is in the class slice.
    """
    if rows is None or labels.device.type in CHECKED_DEVICES:
        found = is_target(labels, first, last).nonzero()[:, 0]
        if rows is None:
            if found.shape[0] == 0:
                _require_labels_of_no_targets(labels, first, last)
            rows = found
        else:
            rows = rows.long()
            if not torch.equal(rows, found):
                _require_permutation(rows, found, labels, first, last)
        return rows, labels[rows] - first
    tokens = labels.shape[0]
    rows = rows[:0] if tokens == 0 else rows
    inside = rows.long().clamp(0, max(tokens - 1, 0))
    return inside, torch.where(inside == rows, labels[inside] - first, -1)


def _require_permutation(rows: Tensor, found: Tensor, labels: Tensor, first: int, last: int) -> None:
    """Raise ValueError unless `rows` are the rows `found` in some order. Takes O(N) + O(T)."""
    tokens, count = labels.shape[0], found.shape[0]
    exactly = f"rows must be exactly the {count} target rows (labels in {first}..{last - 1}), each once"
    if rows.dim() != 1:
        raise ValueError(f"{exactly}; got shape {list(rows.shape)}")
    for at in _first(outside := (rows < 0) | (rows >= tokens)):
        raise ValueError(
            f"{exactly}; {outside.sum()} of {len(rows)} lie outside 0..{tokens - 1}, first rows[{at}] = {rows[at]}"
        )
    for at in _first(idle := ~is_target(labels[rows], first, last)):
        row, label = rows[at], labels[rows[at]]
        raise ValueError(
            f"{exactly}; {idle.sum()} of {len(rows)} are no targets, first rows[{at}] = {row} with label {label}"
        )
    times = torch.bincount(rows, minlength=tokens)
    for at in _first(times > 1):
        raise ValueError(f"{exactly}; {(times > 1).sum()} come more than once, first row {at}, {times[at]} times")
    for at in _first(times[found] == 0):
        raise ValueError(
            f"{exactly}; {(times[found] == 0).sum()} are missing, first row {found[at]} with label {labels[found[at]]}"
        )


def _first(faulty: Tensor) -> list[int]:
    """Return the index of the first True, as a list of at most one."""
    return faulty.nonzero()[:1, 0].tolist()


def _require_labels_of_no_targets(labels: Tensor, first: int, last: int) -> None:
    """Raise ValueError if any label names a token, where none of them lies in the class slice."""
    named = labels[(labels != IGNORED) & (labels != NEW_LINE)]
    if named.shape[0]:
        raise ValueError(
            f"labels must be ids of the whole vocabulary, with targets in classes = ({first}, {last}), or -100; got "
            f"{named.shape[0]} other labels from {int(named.min())} to {int(named.max())}, and none in the classes. "
            f"Labels counted from the first class lack the {first} that is to be added."
        )
