"""From clips and pictures to a folder of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from lumos.codec import VideoCodec
from lumos.data.folder import SampleWriter
from lumos.tokens import ByteTokenizer, Tokenizer, build_document, number
from lumos.video import ClipTooShortError, read_image, read_video, to_float

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class TokenizeSummary:
    """What tokenize wrote."""

    out: Path
    clips: int
    samples: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.out}: {self.samples} samples of {self.clips} clips, {self.tokens:,} tokens"


def tokenize(
    paths: Sequence[str | Path],
    captions: Sequence[str],
    out: str | Path,
    codec: VideoCodec,
    fps: int = 12,
    seconds: int = 2,
    size: tuple[int, int] | None = None,
    tokenizer: Tokenizer | None = None,
    windows: int = 1,
    max_pixels: int | None = None,
) -> TokenizeSummary:
    """Encodes clips into a folder of samples (appended to where it exists), with a progress bar.

    paths, captions: one caption a clip. Picture files (.png, .jpg, .jpeg, .webp, .bmp) become images, 1 s at 1 fps.
    codec: makes the codes. fps, seconds: 1..198. size, max_pixels: as in read_video.
    tokenizer: of the captions; None is the ByteTokenizer.
    windows: up to this many consecutive stretches of `seconds` of each clip, one sample each, as far as it reaches.
    Raises FileNotFoundError and ValueError naming the argument; the samples finished until then stay in the folder.
    """
    if len(paths) != len(captions):
        raise ValueError(f"captions must be one a clip: {len(captions)} for {len(paths)} clips")
    if windows < 1:
        raise ValueError(f"windows must be >= 1, got {windows}")
    number(fps, "fps"), number(seconds, "seconds")
    tokenizer = tokenizer or ByteTokenizer()
    samples = tokens = 0
    with SampleWriter(out) as writer, tqdm(total=len(paths) * windows, unit="sample", desc="tokenize") as bar:
        for path, caption in zip(paths, captions, strict=True):
            image = Path(path).suffix.lower() in _IMAGE_SUFFIXES
            text = tokenizer.encode(caption)
            for window in range(1 if image else windows):
                try:
                    pictures = (
                        read_image(path, size, max_pixels)[None]
                        if image
                        else read_video(path, fps, seconds, window * seconds, size, max_pixels)
                    )
                except ClipTooShortError:
                    if window:
                        break
                    raise
                codes = codec.encode(to_float(pictures))
                ids = build_document(text, codes, *((1, 1) if image else (seconds, fps)))
                tokens += len(writer.add(ids, caption=caption, source=str(path)).ids)
                samples += 1
                bar.update()
    return TokenizeSummary(Path(out), len(paths), samples, tokens)
