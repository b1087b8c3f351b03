"""Pickles of dicts, lists, ints and strings, read without anything that could run code.

Python's own loader can be kept from importing, but not from allocating what a forged memo index asks for; its Python
version, narrowed to a few opcodes, takes 150 ms for a sample of 90,000 tokens. This reader knows the same few opcodes,
and takes runs of equally wide integers at once: a fifth of that.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

_INTEGERS = {  # opcode -> the numbers that follow it, packed
    pickle.BININT[0]: np.dtype([("op", "u1"), ("value", "<i4")]),
    pickle.BININT1[0]: np.dtype([("op", "u1"), ("value", "u1")]),
    pickle.BININT2[0]: np.dtype([("op", "u1"), ("value", "<u2")]),
}
_SHORTEST, _WINDOW = 4, 128  # integers: of a run worth an array; looked ahead at first, a line of codes and more


def read_plain(data: bytes) -> Any:
    """The object of a pickle, protocols 2 to 5. A list of nothing but 32-bit integers comes as an int64 array.

    Raises ValueError for anything else than dicts, lists, ints and strings, and for damage.
    """
    try:
        return _finished(_Reader(data).load(), 0, {})
    # Malformed bytes can raise nearly anything: the opcodes trust their operands.
    except (ValueError, IndexError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(str(error) or repr(error)) from error


class _Reader:
    """The stack machine that a pickle is a program for."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        self.codes = np.frombuffer(data, np.uint8)
        self.stack: list[Any] = []  # an array stands for as many integers
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def load(self) -> Any:
        while True:
            op = self.take(1)[0]
            if op in _INTEGERS:
                self.integers(op)
            elif op == pickle.STOP[0]:
                return self.pop()
            elif op in _OPCODES:
                _OPCODES[op](self)
            else:
                raise ValueError(f"opcode {op:#04x} at byte {self.at - 1} is none that plain data needs")

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        if len(taken) != count:
            raise ValueError(f"the data end at byte {len(self.data)}, inside a value")
        self.at += count
        return taken

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def integers(self, op: int) -> None:
        """The integer whose opcode was just read, and those of the same opcode that follow it."""
        kind, begin = _INTEGERS[op], self.at - 1
        there = (len(self.data) - begin) // kind.itemsize
        if not there:
            raise ValueError(f"the data end at byte {len(self.data)}, inside a value")
        count, window = 1, _SHORTEST
        while count < there:
            ahead = self.codes[begin + count * kind.itemsize : begin + min(there, count + window) * kind.itemsize]
            other = np.flatnonzero(ahead[:: kind.itemsize] != op)
            if len(other):
                count += int(other[0])
                break
            count, window = min(there, count + window), max(_WINDOW, 2 * window)
        self.at = begin + count * kind.itemsize
        values = self.codes[begin : self.at].view(kind)["value"]
        if count < _SHORTEST:
            self.stack += values.tolist()
        else:
            self.stack.append(values.astype(np.int64))

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise ValueError(f"nothing to take at byte {self.at}")
        top = self.stack.pop()
        if isinstance(top, np.ndarray):
            if len(top) > 1:
                self.stack.append(top[:-1])
            return int(top[-1])
        return top

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items, self.stack[mark:] = self.stack[mark:], []
        return items

    def target(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise ValueError(f"expected a {kind.__name__} at byte {self.at}, got {type(self.stack[-1]).__name__}")
        return self.stack[-1]

    def append(self) -> None:
        item = self.pop()
        self.target(list).append(item)

    def appends(self) -> None:
        items = self.since_mark()
        self.target(list).extend(items)

    def set_item(self) -> None:
        value = self.pop()
        key = self.pop()
        self.target(dict)[key] = value

    def set_items(self) -> None:
        items = _expanded(self.since_mark())
        if len(items) % 2:
            raise ValueError(f"a key without a value at byte {self.at}")
        self.target(dict).update(zip(items[::2], items[1::2], strict=True))

    def mark(self) -> None:
        self.marks.append(len(self.stack))

    def text(self, width: int) -> None:
        self.stack.append(self.take(self.number(width)).decode("utf-8", "surrogatepass"))

    def long(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.number(1)), "little", signed=True))

    def remember(self, at: int | None) -> None:
        top = self.stack[-1]
        if isinstance(top, np.ndarray):
            top = int(top[-1])
        self.memo[len(self.memo) if at is None else at] = top


def _opcodes() -> dict[int, Callable[[_Reader], None]]:
    table: dict[bytes, Callable[[_Reader], None]] = {
        pickle.PROTO: lambda reader: reader.number(1) and None,
        pickle.FRAME: lambda reader: reader.number(8) and None,
        pickle.EMPTY_DICT: lambda reader: reader.stack.append({}),
        pickle.EMPTY_LIST: lambda reader: reader.stack.append([]),
        pickle.MARK: _Reader.mark,
        pickle.APPEND: _Reader.append,
        pickle.APPENDS: _Reader.appends,
        pickle.SETITEM: _Reader.set_item,
        pickle.SETITEMS: _Reader.set_items,
        pickle.BINUNICODE: lambda reader: reader.text(4),
        pickle.SHORT_BINUNICODE: lambda reader: reader.text(1),
        pickle.LONG1: _Reader.long,
        pickle.BINPUT: lambda reader: reader.remember(reader.number(1)),
        pickle.LONG_BINPUT: lambda reader: reader.remember(reader.number(4)),
        pickle.MEMOIZE: lambda reader: reader.remember(None),
        pickle.BINGET: lambda reader: reader.stack.append(reader.memo[reader.number(1)]),
        pickle.LONG_BINGET: lambda reader: reader.stack.append(reader.memo[reader.number(4)]),
    }
    return {op[0]: run for op, run in table.items()}


_OPCODES = _opcodes()
_DEEPEST = 50


def _expanded(items: list[Any]) -> list[Any]:
    """Items with each run of integers as so many items."""
    return [one for item in items for one in (item.tolist() if isinstance(item, np.ndarray) else [item])]


def _finished(value: Any, depth: int, done: dict[int, Any]) -> Any:
    """The value with every list of 32-bit integers as one array, and the runs in other lists as items.

    done: what became of the lists and dicts met before, by identity: a few bytes can refer to one of them very often.
    """
    if type(value) not in (dict, list):
        return value
    if depth > _DEEPEST:
        raise ValueError(f"values lie in each other deeper than {_DEEPEST}")
    if id(value) not in done:
        if type(value) is dict:
            done[id(value)] = {key: _finished(item, depth + 1, done) for key, item in value.items()}
        elif value and all(type(item) is np.ndarray or (type(item) is int and abs(item) < 2**31) for item in value):
            done[id(value)] = np.concatenate([np.atleast_1d(item) for item in value])
        else:
            done[id(value)] = [_finished(item, depth + 1, done) for item in _expanded(value)]
    return done[id(value)]
