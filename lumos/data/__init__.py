"""Training samples: sample folders, the official pickles, clips to samples, packing."""

from lumos.data.folder import SampleFolder, SampleWriter
from lumos.data.official import OfficialDataset, OfficialFiles, OfficialMeta, read_official_sample
from lumos.data.sample import Batch, Sample, Shape, collate
from lumos.data.sources import DataSource, Samples, open_samples
from lumos.data.tokenize import TokenizeSummary, tokenize
from lumos.tokens import cut_video, drop_text, read_numbers, take_frames

__all__ = [
    "Batch",
    "DataSource",
    "OfficialDataset",
    "OfficialFiles",
    "OfficialMeta",
    "Sample",
    "SampleFolder",
    "SampleWriter",
    "Samples",
    "Shape",
    "TokenizeSummary",
    "collate",
    "cut_video",
    "drop_text",
    "open_samples",
    "read_numbers",
    "read_official_sample",
    "take_frames",
    "tokenize",
]
