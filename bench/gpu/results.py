"""A result of the suite: which code and which table it is of, how two calls become one, and how its items are read.

    {"schema", "code", "calls": {"1": {"environment", "settings", "items": {name: item}}, ...}, "gates", "verdicts"}

An item is {"status", "seconds", "limit_s", "table", "data", ...}; status is "ok", "failed", "overrun" (interrupted at
the end of its share), "ended the process" or "not started". data is what the item found until then.

The digest of the code leaves out the tables that tuners write: they are data, and an item names the one it ran with.
"""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.processes import ROOT, read_json

SCHEMA = 2
TABLE = "tuned.py"  # in the folder of an implementation that has a tuner
TUNED = ROOT / "lumos_kernels" / "frame_attention" / "triton" / TABLE


def code_digest() -> str:
    """Return the digest of both packages' sources without the tuned tables."""
    files = (file for package in ("lumos_kernels", "lumos") for file in (ROOT / package).rglob("*.py"))
    code = hashlib.sha256()
    for file in sorted(file for file in files if file.name != TABLE):
        code.update(file.relative_to(ROOT).as_posix().encode() + file.read_bytes())
    return code.hexdigest()[:16]


def digest(op: str, impl: str) -> str:
    """Return the digest of an implementation's source without its table: what a result proves, it proves of this code.

    Comments, docstrings, blank lines and the spaces inside lines do not matter, nor does the version of Python.
    """
    base = ROOT / "lumos_kernels" / op / impl
    files = sorted(base.rglob("*.py")) if base.is_dir() else [base.with_suffix(".py")]
    return _digest([file for file in files if file.name != TABLE], base.parent)


def table_digest(file: Path = TUNED) -> str:
    """Return the digest of the table of tuned configurations as it is now."""
    return _digest([file], file.parent)


def _digest(files: Sequence[Path], base: Path) -> str:
    code = hashlib.sha256()
    for file in files:
        code.update(file.relative_to(base).as_posix().encode())
        code.update(bare(file.read_text(encoding="utf-8")).encode())
    return code.hexdigest()[:16]


def bare(source: str) -> str:
    """Return Python source reduced to what runs: indentation and the characters of each line that are no space."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if (
            isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            and ast.get_docstring(node) is not None
        ):
            first = body[0]
            lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    kept = ((len(line) - len(line.lstrip()), "".join(line.split())) for line in lines if line.strip())
    return "\n".join(f"{indent} {text}" for indent, text in kept)


def read(path: Path) -> dict[str, Any]:
    """Return the result in a file, or in the suite.json of a folder. Raise ValueError where that is none."""
    file = path / "suite.json" if path.is_dir() else path
    result = read_json(file)
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or not isinstance(result.get("calls"), dict):
        raise ValueError(f"{file} must be a suite.json of `python -m bench.gpu_suite`")
    return result


def merged(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one result with the calls of all. Raise ValueError where they are of different code, or of one call."""
    calls: dict[str, Any] = {}
    for result in results:
        if result["code"] != results[0]["code"]:
            raise ValueError(f"the results are of different code: {results[0]['code']} and {result['code']}")
        again = sorted(calls.keys() & result["calls"].keys())
        if again:
            raise ValueError(f"call {again[0]} is in two of the results: give one of each call")
        calls |= result["calls"]
    return {"schema": SCHEMA, "code": results[0]["code"], "calls": calls}


def items(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (name, item) of all calls."""
    for call in result["calls"].values():
        yield from call["items"].items()


def data(result: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return what the item of that name found, nothing where it did not run. The last call that has it counts."""
    return next((item["data"] for found, item in reversed(list(items(result))) if found == name), {}) or {}


def cases(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the records of all cases. One case may have several: JIT rivals meet ours in records of their own."""
    return [item["data"]["record"] for _, item in items(result) if "record" in (item.get("data") or {})]


def first_call(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the first of the calls: its environment names the result."""
    return next(iter(result["calls"].values()))
