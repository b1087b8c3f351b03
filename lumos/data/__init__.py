"""Training samples: sample folders, the official pickles, clips to samples, packing."""

from lumos.data.folder import SampleFolder, SampleWriter
from lumos.data.official import OfficialDataset, read_official_sample
from lumos.data.sample import Batch, Sample, collate
from lumos.data.tokenize import TokenizeSummary, tokenize
from lumos.tokens import cut_video, drop_text, read_numbers, take_frames

__all__ = [
    "Batch",
    "OfficialDataset",
    "Sample",
    "SampleFolder",
    "SampleWriter",
    "TokenizeSummary",
    "collate",
    "cut_video",
    "drop_text",
    "read_numbers",
    "read_official_sample",
    "take_frames",
    "tokenize",
]
