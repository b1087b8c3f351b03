"""Training of Lumos-1 with AR-DF masking (arXiv 2507.08801, sections 3.3 and 4.1)."""

from lumos.train.batches import MicroBatch, PackedBatches
from lumos.train.config import TrainConfig
from lumos.train.export import export
from lumos.train.log import peak_memory_gb, read_log
from lumos.train.loop import Trainer, TrainSummary, train
from lumos.train.signals import EXIT_STOPPED, StoppedError
from lumos.train.state import ResumeError, SaveError
from lumos.train.step import StepStats, make_optimizer, training_step

__all__ = [
    "EXIT_STOPPED",
    "MicroBatch",
    "PackedBatches",
    "ResumeError",
    "SaveError",
    "StepStats",
    "StoppedError",
    "TrainConfig",
    "TrainSummary",
    "Trainer",
    "export",
    "make_optimizer",
    "peak_memory_gb",
    "read_log",
    "train",
    "training_step",
]
