"""The sizes at which Lumos-1 runs: heads of the released checkpoints, frames of the released resolutions."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from lumos_kernels import Frame, FrameLayout, Text

HEADER_TEXT = 266  # caption, separator, video start, seconds, frames per second: a typical official sample
TAIL_TEXT = 2  # video end, end of turn
TARGET_SHARE = 0.8  # mean share of masked slots under the official cosine schedule with its floor of 0.7


@dataclass(frozen=True)
class Model:
    """Sizes of the network that an op sees."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int


M1B = Model("1B", heads=32, kv_heads=8, head_dim=64, hidden=2048)
M3B = Model("3B", heads=24, kv_heads=8, head_dim=128, hidden=3072)
# A quarter of the heads of the real models, with which two CPU cores finish an attention in milliseconds.
M1B_QUARTER = Model("1Bq", heads=8, kv_heads=2, head_dim=64, hidden=512)
M3B_QUARTER = Model("3Bq", heads=6, kv_heads=2, head_dim=128, hidden=768)
# One kv head and its query heads.
M1B_GROUP = Model("1Bg", heads=4, kv_heads=1, head_dim=64, hidden=256)
M3B_GROUP = Model("3Bg", heads=3, kv_heads=1, head_dim=128, hidden=384)
PRESET_TINY = Model("preset-tiny", heads=2, kv_heads=1, head_dim=64, hidden=128)  # LumosConfig.tiny()
TINY = Model("tiny", heads=4, kv_heads=2, head_dim=32, hidden=64)


@dataclass(frozen=True)
class Video:
    """One document: text, `frames` frames of rows x cols codes, text. 32 x 56 is 256p (1,828 tokens a frame),
    48 x 84 is 384p (4,084 tokens a frame).
    """

    name: str
    rows: int
    cols: int
    frames: int
    text: int = HEADER_TEXT
    target_share: float = TARGET_SHARE

    @functools.cached_property
    def layout(self) -> FrameLayout:
        frames = [Frame(self.rows, self.cols)] * self.frames
        return FrameLayout.from_segments([[Text(self.text), *frames, Text(TAIL_TEXT)]])

    @property
    def tokens(self) -> int:
        """T, the length of the document."""
        return self.text + self.frames * Frame(self.rows, self.cols).length + TAIL_TEXT

    @property
    def targets(self) -> int:
        """N, the target rows of a training step, by default at the mean share of masked slots."""
        return round(self.target_share * self.frames * self.rows * self.cols)


IMAGE_256P = Video("256p-1f", 32, 56, 1)
IMAGE_384P = Video("384p-1f", 48, 84, 1)
IMAGE_384P_ALL = Video("384p-1f-all", 48, 84, 1, target_share=1.0)  # 4,032 target rows
SWEEP_256P = tuple(Video(f"256p-{frames}f", 32, 56, frames) for frames in (1, 2, 4))
VIDEO_256P_3 = Video("256p-3f", 32, 56, 3, text=100)
VIDEO_256P = Video("256p-7f", 32, 56, 7)
VIDEO_384P = Video("384p-7f", 48, 84, 7)
VIDEO_384P_LONG = Video("384p-22f", 48, 84, 22)
VIDEO_SMALL = Video("32x32-4f", 32, 32, 4, text=60)
SMOKE = Video("smoke", 4, 8, 2, text=9)
