"""From words and pictures to pictures: text to image, text to video, image to video, continuation.

Legend: F pictures of H x W pixels, f latent frames of R x C_ codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lumos.codec import VideoCodec
from lumos.cosmos import load_codec
from lumos.generate import generate_frames
from lumos.model import Lumos
from lumos.prompts import fill, read_template
from lumos.sampling import GeneratedFrame
from lumos.tokens import (
    NUM_CODES,
    SEPARATOR,
    VIDEO_START,
    VISUAL_START,
    ByteTokenizer,
    Spans,
    TextTokenizer,
    Tokenizer,
    build_document,
    latent_frames,
    number,
)
from lumos.video import SIZE_UNIT, read_image, read_video, to_float, to_uint8, write_image, write_video
from lumos.wrappers import unwrap_lumos
from lumos_kernels.frame_layout.frames import SPACE_STRIDE, TIME_STRIDE
from lumos_kernels.token_ids import TEXT_START

PICTURES, MOVIES, CODES = (".png", ".jpg", ".jpeg"), (".mp4", ".gif"), (".safetensors",)


@dataclass(frozen=True)
class Request:
    """What to make.

    prompt: the caption, not empty. size: (H, W), multiples of 32. fps, seconds: 1 and 1 for an image.
    given: uint8 [F, H, W, 3], pictures to continue; whole latent frames of them are used, 1 + 4 k pictures.
    seed: in [0, 2^63).
    """

    prompt: str
    size: tuple[int, int] = (256, 448)
    fps: int = 12
    seconds: int = 2
    given: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise ValueError(f"prompt must not be empty, got {self.prompt!r}")
        if len(self.size) != 2 or any(side < SIZE_UNIT or side % SIZE_UNIT for side in self.size):
            raise ValueError(f"size must be (height, width), positive multiples of {SIZE_UNIT}; got {tuple(self.size)}")
        number(self.fps, "fps"), number(self.seconds, "seconds")
        if self.given is not None and tuple(self.given.shape[1:]) != (*self.size, 3):
            raise ValueError(
                f"given must be pictures [F, {self.size[0]}, {self.size[1]}, 3], got {[*self.given.shape]}"
            )

    @property
    def pictures(self) -> int:
        return self.fps * self.seconds

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // SPACE_STRIDE, self.size[1] // SPACE_STRIDE

    @classmethod
    def image(cls, prompt: str, size: tuple[int, int] = (256, 448), seed: int = 0) -> Request:
        """Text to image: a video of one picture."""
        return cls(prompt, size, 1, 1, None, seed)

    @classmethod
    def from_image(cls, prompt: str, path: str | Path, size: tuple[int, int] = (256, 448), **known: int) -> Request:
        """Image to video. The file's picture is scaled to cover the size and cropped at its centre."""
        return cls(prompt, size, given=read_image(path, size)[None], **known)

    @classmethod
    def from_video(
        cls,
        prompt: str,
        path: str | Path,
        size: tuple[int, int] = (256, 448),
        fps: int = 12,
        seconds: int = 2,
        given_seconds: float = 0.5,
        seed: int = 0,
    ) -> Request:
        """Continuation of the clip's first given_seconds. Of their pictures the first 1 + 4 k are used, at least one.

        Raises ClipTooShortError, a ValueError, for a shorter clip, and ValueError where nothing is left to make.
        """
        pictures = max(1, round(given_seconds * fps))
        pictures = 1 + (pictures - 1) // TIME_STRIDE * TIME_STRIDE
        given = read_video(path, fps, seconds=pictures / fps, size=size)
        return cls(prompt, size, fps, seconds, given, seed)


@dataclass(frozen=True)
class Result:
    """A finished request. codes: int64 [f, R, C_]; pictures: uint8 [F, H, W, 3], None without a codec."""

    request: Request
    codes: Tensor
    pictures: Tensor | None

    def save(self, path: str | Path) -> None:
        """Writes .mp4 or .gif, the first picture as .png or .jpg, or the codes as .safetensors ("codes", int32).

        The file appears under its name only when it is complete. Raises ValueError for another suffix, and for
        pictures where no codec made any.
        """
        path = Path(path)
        check_suffix(path, self.pictures is not None)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".partial-{path.name}")
        if path.suffix in CODES:
            save_file({"codes": self.codes.to(torch.int32)}, partial)
        elif path.suffix in PICTURES:
            write_image(partial, self.pictures[0])
        else:
            write_video(partial, self.pictures, self.request.fps)
        partial.replace(path)


def check_suffix(path: Path, decodes: bool) -> None:
    """ValueError where a result cannot be written to such a file. decodes: whether there is a codec."""
    if path.suffix not in PICTURES + MOVIES + CODES:
        raise ValueError(f"path must end in {', '.join(PICTURES + MOVIES + CODES)}; got {path}")
    if not decodes and path.suffix not in CODES:
        raise ValueError(f"pictures need a codec; without one only codes can be written (.safetensors), got {path}")


class Pipeline:
    """A model with its text tokenizer, its codec and the words around its prompts.

    model: a Lumos, also inside peft, DDP or torch.compile. tokenizer: of its training data.
    codec: None leaves the codes as they are; DctCodec() for models trained on what `lumos tokenize` wrote.
    template: with {prompt} and, if wanted, {width}, {height}, {pictures}, {fps}; or "official" or "plain", which models
        trained on what `lumos tokenize` wrote know.
    """

    def __init__(
        self, model: Lumos, tokenizer: Tokenizer, codec: VideoCodec | None, template: str = "official"
    ) -> None:
        self.model = model = unwrap_lumos(model)
        self.tokenizer, self.codec = tokenizer, codec
        self.template = read_template(template)
        sizes = model.config.visual_start, model.config.num_classes
        if codec is not None and sizes != (VISUAL_START, NUM_CODES):
            raise ValueError(
                f"codec has {NUM_CODES} codes from id {VISUAL_START}; the model has {sizes[1]} from id {sizes[0]}"
            )

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        tokenizer: str | Path | None = None,
        codec: VideoCodec | str | None = None,
        template: str = "official",
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> Pipeline:
        """Reads a checkpoint folder, and its tokenizer.json where `tokenizer` does not say otherwise.

        tokenizer: a tokenizer.json or its folder; "bytes" for the byte tokenizer. codec: an object, None, or a name
            that load_codec knows: "dct", "cosmos:FOLDER".
        Raises FileNotFoundError or ValueError naming what is missing or does not fit.
        """
        if isinstance(codec, str):
            codec = load_codec(codec, device)
        return cls(
            Lumos.from_pretrained(path, dtype=dtype, device=device),
            find_tokenizer(path, tokenizer),
            codec,
            template,
        )

    def prompt_ids(self, request: Request) -> Tensor:
        """int64 [L]: the text, the video's header and the given frames, encoded."""
        text = fill(self.template, request.prompt, request.size, request.pictures, request.fps)
        ids = self.tokenizer.encode(text)
        header = [TEXT_START, *ids, SEPARATOR]
        header += [VIDEO_START, number(request.seconds, "seconds"), number(request.fps, "fps")]
        if request.given is None:
            return torch.tensor(header, dtype=torch.int64)
        if self.codec is None:
            raise ValueError("given pictures need a codec to encode them")
        whole = 1 + (len(request.given) - 1) // TIME_STRIDE * TIME_STRIDE
        codes = self.codec.encode(to_float(request.given[:whole]))
        document = build_document(None, codes, request.seconds, request.fps)
        begin, end = Spans.of(document).frames[0][0], Spans.of(document).frames[-1][1]
        return torch.cat([torch.tensor(header, dtype=torch.int64), document[begin:end]])

    def stream(
        self, requests: Sequence[Request], *, documents_per_pass: int = 1, progress: bool = False, **options: object
    ) -> Iterator[tuple[GeneratedFrame, Tensor | None]]:
        """Yields each frame as soon as it is decided, with its pictures, uint8 [1 or 4, H, W, 3] (None without codec).

        options: fields of lumos.sampling.Sampling. Frames come in the order of lumos.generate_frames.
        """
        frames, codes = self._start(requests, documents_per_pass=documents_per_pass, progress=progress, **options)
        return self._decoded(frames, codes)

    def __call__(
        self, requests: Sequence[Request], *, documents_per_pass: int = 1, progress: bool = False, **options: object
    ) -> list[Result]:
        """Makes all requests; arguments as of stream. Pictures are decoded once a document is complete."""
        return list(self.results(requests, documents_per_pass=documents_per_pass, progress=progress, **options))

    def results(
        self, requests: Sequence[Request], *, documents_per_pass: int = 1, progress: bool = False, **options: object
    ) -> Iterator[Result]:
        """Yields every request's Result when its last frame is decided, in order within a pass."""
        frames, codes = self._start(requests, documents_per_pass=documents_per_pass, progress=progress, **options)
        return self._finished(requests, frames, codes)

    def _start(
        self, requests: Sequence[Request], **options: object
    ) -> tuple[Iterator[GeneratedFrame], list[list[Tensor]]]:
        """The frames to come, and the codes of those that are given."""
        prompts = [self.prompt_ids(request) for request in requests]
        frames = generate_frames(
            self.model,
            prompts,
            [request.grid for request in requests],
            [latent_frames(request.pictures) for request in requests],
            seed=[request.seed for request in requests],
            **options,
        )
        return frames, [self._given_codes(ids, request) for ids, request in zip(prompts, requests, strict=True)]

    def _finished(
        self, requests: Sequence[Request], frames: Iterator[GeneratedFrame], codes: list[list[Tensor]]
    ) -> Iterator[Result]:
        for frame in frames:
            request, own = requests[frame.document], codes[frame.document]
            own.append(frame.codes)
            if len(own) == latent_frames(request.pictures):
                yield self._result(request, torch.stack(own))

    def _result(self, request: Request, codes: Tensor) -> Result:
        pictures = None
        if self.codec is not None:
            pictures = to_uint8(self.codec.decode(codes))[: request.pictures]
        return Result(request, codes, pictures)

    def _decoded(
        self, frames: Iterator[GeneratedFrame], codes: list[list[Tensor]]
    ) -> Iterator[tuple[GeneratedFrame, Tensor | None]]:
        for frame in frames:
            codes[frame.document].append(frame.codes)
            pictures = None
            if self.codec is not None:
                # A codec may look back in time, so the frames before are decoded with it.
                video = self.codec.decode(torch.stack(codes[frame.document]))
                pictures = to_uint8(video[:, -(TIME_STRIDE if frame.frame else 1) :])
            yield frame, pictures

    def _given_codes(self, ids: Tensor, request: Request) -> list[Tensor]:
        if request.given is None:
            return []
        visual = ids[ids >= self.model.config.visual_start] - self.model.config.visual_start
        return list(visual.view(-1, *request.grid))


def find_tokenizer(checkpoint: str | Path, tokenizer: str | Path | None) -> Tokenizer:
    """The tokenizer asked for, or the checkpoint's. FileNotFoundError says what to give where there is none."""
    if tokenizer == "bytes":
        return ByteTokenizer()
    if tokenizer is not None:
        return TextTokenizer(tokenizer)
    if not (Path(checkpoint) / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"no tokenizer.json in {checkpoint}: give the tokenizer of its training data, or 'bytes' for a model "
            "trained with the byte tokenizer (lumos tokenize without --tokenizer)"
        )
    return TextTokenizer(checkpoint)
