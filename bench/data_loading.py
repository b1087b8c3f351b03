"""How long a training sample takes to load: the official pickles against a folder made of them by `lumos convert`.

    python -m bench.data_loading merge-record.json --open 10000000

The ways alternate round by round; files are in the page cache. "official" is what upstream's loader does, pickle.load
into lists of Python integers; "official, as tensors" adds what a model needs. --open also opens a folder of so many
samples (an index of real size, all of it the same sample) and asks for shapes all over it.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import environment
from lumos.data import OfficialDataset, SampleFolder, convert, open_samples, read_official_sample
from lumos.data.index import HEADER, INDEX, RECORD

_CHUNK = 1 << 20  # records written at once


def official(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        return pickle.load(file)


def official_tensors(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    sample = official(path)
    return torch.tensor(sample["token"]), torch.tensor(sample["label"])


def load_times(index: Path, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds a sample for each way, over all samples of the index."""
    files, ours = OfficialDataset(index).files, open_samples(folder)
    ways: dict[str, Callable[[int], Any]] = {
        "official": lambda at: official(files[at]),
        "official, as tensors": lambda at: official_tensors(files[at]),
        "official, read without running code": lambda at: read_official_sample(files[at]),
        "sample folder": lambda at: ours[at],
        "sample folder, shape alone": lambda at: ours.describe(at),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            for at in range(len(files)):
                way(at)
            seconds[name].append((time.perf_counter() - begin) / len(files))
    base = statistics.median(seconds["sample folder"])
    return [
        {"way": name, "ms": 1e3 * statistics.median(times), "times_ours": statistics.median(times) / base}
        for name, times in seconds.items()
    ]


def grow(folder: Path, samples: int) -> None:
    """Repeats the folder's first record until its index has so many; they all show the same tokens."""
    with open(folder / INDEX, "r+b") as file:
        first = np.frombuffer(file.read(len(HEADER) + RECORD.itemsize)[len(HEADER) :], RECORD)
        file.truncate(len(HEADER))
        file.seek(len(HEADER))
        for done in range(0, samples, _CHUNK):
            file.write(np.repeat(first, min(_CHUNK, samples - done)).tobytes())


def open_times(folder: Path, samples: int, asked: int = 10_000) -> dict[str, float]:
    begin = time.perf_counter()
    dataset = SampleFolder(folder)
    opened = time.perf_counter() - begin
    places = np.random.default_rng(0).integers(samples, size=asked)
    begin = time.perf_counter()
    for at in places:
        dataset.describe(at)
    described = (time.perf_counter() - begin) / asked
    return {
        "samples": len(dataset),
        "index_mb": (folder / INDEX).stat().st_size / 1e6,
        "open_ms": 1e3 * opened,
        "describe_us": 1e6 * described,
        "pickled_bytes": len(pickle.dumps(dataset)),
    }


def report(results: dict[str, Any]) -> str:
    lines = [
        f"{results['samples']} samples of {results['tokens']:,} tokens: {results['official_mb']:.2f} MB of pickles, "
        f"{results['folder_mb']:.2f} MB of tokens",
        "",
        "| way | ms a sample | x sample folder |",
        "|---|---|---|",
        *(f"| {row['way']} | {row['ms']:.4f} | {row['times_ours']:.2f} |" for row in results["load"]),
    ]
    if "open" in results:
        lines += [
            "",
            "{samples:,} samples: index of {index_mb:.0f} MB opened in {open_ms:.2f} ms, {describe_us:.1f} us for a "
            "shape anywhere, {pickled_bytes} bytes to send to a worker".format(**results["open"]),
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.data_loading", description=__doc__.splitlines()[0])
    parser.add_argument("index", type=Path, help="an official index, .json or .jsonl")
    parser.add_argument("--rounds", type=int, default=15, help="of all ways (default 15)")
    parser.add_argument("--open", type=int, default=0, metavar="SAMPLES", help="also open a folder of so many samples")
    parser.add_argument("--out", type=Path, help="folder for the result as .json and .md")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "samples"
        summary = convert([options.index], folder, progress=False)
        results = {
            "environment": environment.record("cpu", 1),
            "samples": summary.samples,
            "tokens": summary.tokens,
            "official_mb": sum(Path(file).stat().st_size for file in OfficialDataset(options.index).files) / 1e6,
            "folder_mb": sum(file.stat().st_size for file in folder.glob("tokens-*")) / 1e6,
            "load": load_times(options.index, folder, options.rounds),
        }
        if options.open:
            grow(folder, options.open)
            results["open"] = open_times(folder, options.open)
    print(report(results))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / f"{environment.file_stem(results['environment'])}_data-loading"
        Path(f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
        Path(f"{stem}.md").write_text(report(results) + "\n")


if __name__ == "__main__":
    main()
