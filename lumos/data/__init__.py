"""Training samples: sample folders, the official pickles, clips to samples, packing."""

from lumos.data.additions import Failure, Summary
from lumos.data.clips import Clip, find_clips
from lumos.data.convert import convert
from lumos.data.folder import SampleFolder, SampleWriter
from lumos.data.official import OfficialDataset, OfficialFiles, OfficialMeta, read_official_sample
from lumos.data.sample import Batch, Sample, Shape, collate
from lumos.data.sources import DataSource, Samples, open_samples
from lumos.data.tokenize import tokenize, tokenize_clips
from lumos.tokens import cut_video, drop_text, read_numbers, take_frames

__all__ = [
    "Batch",
    "Clip",
    "DataSource",
    "Failure",
    "OfficialDataset",
    "OfficialFiles",
    "OfficialMeta",
    "Sample",
    "SampleFolder",
    "SampleWriter",
    "Samples",
    "Shape",
    "Summary",
    "collate",
    "convert",
    "cut_video",
    "drop_text",
    "find_clips",
    "open_samples",
    "read_numbers",
    "read_official_sample",
    "take_frames",
    "tokenize",
    "tokenize_clips",
]
