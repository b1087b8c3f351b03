"""Many prompts from a file: the official evaluation formats, output folders as GenEval and VBench read them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from lumos.pipelines import MOVIES, PICTURES, Pipeline, Request
from lumos.video import read_image, write_image

LAYOUTS = ("vbench", "geneval")
# Longer captions written by a language model, under upstream's names; they take precedence over the short ones.
_CAPTIONS = ("prompt_rewrite_qwen32b", "prompt_en_qwen32b_vl", "prompt", "prompt_en")
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One prompt of a file. name: of its outputs, without suffix. image: file name of its first frame, or None.

    number: its place in the file. metadata: what GenEval wants back.
    """

    number: int
    prompt: str
    name: str
    image: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)


def read_items(path: str | Path) -> list[Item]:
    """The prompts of a .json or .jsonl file.

    Formats: an object {name: caption}, where a name with the suffix of an image names the first frame (upstream's
    custom and VBench files); a list of objects, or one object a line, with "prompt", "prompt_en" or upstream's
    rewritten captions, and optionally "name" and "image" or "image_name" (VBench image to video, GenEval).

    Raises ValueError naming the file and the entry: no JSON, no prompt, an empty one, a name used twice or one that
    is no plain file name.
    """
    path = Path(path)
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            data = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            data = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if isinstance(data, dict):
        items = [_named(number, name, caption) for number, (name, caption) in enumerate(data.items())]
    elif isinstance(data, list) and all(isinstance(entry, dict) for entry in data):
        items = [_described(number, entry) for number, entry in enumerate(data)]
    else:
        raise ValueError(f"{path} must hold an object {{name: prompt}}, or objects with a prompt")
    seen: set[str] = set()
    for item in items:
        where = f"{path}, entry {item.number}"
        if not isinstance(item.prompt, str) or not item.prompt.strip():
            raise ValueError(f"{where}: prompt must be a text that is not empty, got {item.prompt!r}")
        if Path(item.name).name != item.name or item.name.startswith(".") or "\0" in item.name:
            raise ValueError(f"{where}: the name {item.name!r} is no plain file name")
        if item.name in seen:
            raise ValueError(f"{where}: the name {item.name!r} is used twice")
        seen.add(item.name)
    if not items:
        raise ValueError(f"{path} holds no prompts")
    return items


def shard(items: Sequence[T], part: int, parts: int) -> list[T]:
    """The part-th of `parts` runs of the items, part from 1; the first runs are one longer where it does not divide.

    The same division as upstream's --part "[part, parts]".
    """
    if not 1 <= part <= parts:
        raise ValueError(f"shard must be i/n with 1 <= i <= n, got {part}/{parts}")
    size, longer = divmod(len(items), parts)
    begin = (part - 1) * size + min(part - 1, longer)
    return list(items[begin : begin + size + (part <= longer)])


@dataclass(frozen=True)
class Batch:
    """A run over the prompts of a file.

    out: folder of the results. layout: "vbench", <name>-<sample>.mp4 (<name>.mp4 for one sample); "geneval",
        <number>/samples/<sample>.png, <number>/grid.png and <number>/metadata.jsonl. suffix: of the files.
    samples: of each prompt. seed: sample k of the file's item i has seed + samples * i + k, whatever the shard.
    images: folder of the first frames; None for text to video.
    size, fps, seconds: as of Request. together: documents made in one call.
    """

    out: Path
    layout: str = "vbench"
    suffix: str = ".mp4"
    samples: int = 1
    seed: int = 0
    images: Path | None = None
    size: tuple[int, int] = (256, 448)
    fps: int = 12
    seconds: int = 2
    together: int = 1

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.samples < 1:
            raise ValueError(f"samples must be >= 1, got {self.samples}")
        allowed = PICTURES if self.layout == "geneval" else PICTURES + MOVIES
        if self.suffix not in allowed:
            raise ValueError(f"suffix must be one of {', '.join(allowed)} for {self.layout}, got {self.suffix!r}")

    def paths(self, item: Item) -> list[Path]:
        """Where the samples of an item go."""
        if self.layout == "geneval":
            return [self._folder(item) / "samples" / f"{k:05d}{self.suffix}" for k in range(self.samples)]
        endings = [f"-{k}" for k in range(self.samples)] if self.samples > 1 else [""]
        return [self.out / f"{item.name}{ending}{self.suffix}" for ending in endings]

    def missing(self, items: Sequence[Item]) -> list[tuple[Item, int, Path]]:
        """(item, sample, path) of what is not there yet."""
        return [(item, k, path) for item in items for k, path in enumerate(self.paths(item)) if not path.exists()]

    def run(self, pipeline: Pipeline, items: Sequence[Item], progress: bool = False, **options: object) -> int:
        """Makes what is missing; returns how many samples that were. options: fields of lumos.sampling.Sampling."""
        jobs = self.missing(items)
        for item in items if self.images is not None else ():
            if item.image is None or not (self.images / item.image).is_file():
                raise FileNotFoundError(f"entry {item.number}: no first frame {item.image!r} in {self.images}")
        with tqdm(total=len(jobs), unit="sample", disable=not progress) as bar:
            for begin in range(0, len(jobs), self.together):
                part = jobs[begin : begin + self.together]
                requests = [self._request(item, k) for item, k, _ in part]
                # Results of a pass come in the order in which they end, which for one length is that of the requests.
                results = pipeline.results(requests, documents_per_pass=self.together, **options)
                for (_, _, path), result in zip(part, results, strict=True):
                    result.save(path)
                    bar.update()
        for item in items if self.layout == "geneval" else ():
            self._finish_geneval(item)
        return len(jobs)

    def _request(self, item: Item, sample: int) -> Request:
        given = None if self.images is None else read_image(self.images / item.image, self.size)[None]
        seed = self.seed + self.samples * item.number + sample
        return Request(item.prompt, self.size, self.fps, self.seconds, given, seed)

    def _folder(self, item: Item) -> Path:
        return self.out / f"{item.number:05d}"

    def _finish_geneval(self, item: Item) -> None:
        """The samples below one another, and the entry without its rewritten caption."""
        pictures = [read_image(path, self.size) for path in self.paths(item)]
        write_image(self._folder(item) / "grid.png", torch.cat(pictures))
        kept = {key: value for key, value in item.metadata.items() if key != _CAPTIONS[0]}
        (self._folder(item) / "metadata.jsonl").write_text(json.dumps(kept), encoding="utf-8")


def _named(number: int, name: str, caption: Any) -> Item:
    path = Path(name)
    image = name if path.suffix.lower() in _IMAGE_SUFFIXES else None
    stem = name[: -len(path.suffix)] if image or path.suffix in MOVIES + PICTURES else name
    return Item(number, caption, stem, image)


def _described(number: int, entry: dict[str, Any]) -> Item:
    prompt = next((entry[key] for key in _CAPTIONS if key in entry), None)
    image = entry.get("image", entry.get("image_name"))
    name = entry.get("name", entry.get("prompt_en", f"{number:05d}"))
    return Item(number, prompt, str(name), image, entry)
