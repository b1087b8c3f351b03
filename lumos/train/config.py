"""TrainConfig: everything a training run is told, on the command line, in a file, or in Python."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from lumos.data.sources import DataSource
from lumos.masking import MASK_KINDS, mask_ratio
from lumos.options import converted, from_options, option, read_options, to_options
from lumos.stream import check_impl
from lumos.train.lora import TARGETS as LORA_TARGETS
from lumos.train.lora import require_peft
from lumos.train.recipes import is_blank, recipe_names, recipe_options

DTYPES = ("float32", "bfloat16")
ACTIVATION_CHECKPOINTING = ("none", "full", "selective")
TOO_LONG = ("error", "drop")
ON_NONFINITE = ("stop", "skip")
EXPORT_WEIGHTS = ("auto", "average", "last")
SCHEDULES = ("constant", "cosine", "linear")


@dataclass(frozen=True)
class TrainConfig:
    """Options of `lumos train`: each field is a command-line option and a key of --config files.

    data: sources of documents; a text or a path becomes the DataSource it describes, PATH[,key=value]... .

    Raises ValueError naming the field, its value and what is allowed.
    """

    data: tuple[str | DataSource, ...] = option(
        (),
        "sample folders (`lumos tokenize`) or official indices, each PATH[,weight=W][,fps=N][,seconds=N][,crop=...]"
        "[,numbers=...], where numbers are written into official texts: auto (digits), none, or a table's path",
    )
    recipe: str | None = option(None, "settings to start from (`lumos recipes` lists them); all options given win")
    out: str = option("run", "folder for the log and the checkpoint")
    overwrite: bool = option(False, "replace the log and the checkpoint of an earlier run in `out`")
    checkpoint_every: int = option(500, "steps between checkpoints of the whole state, one more at the end; 0: none")
    keep_checkpoints: int = option(2, "checkpoints of the state that are kept, the newest ones")
    resume: str = option("auto", "auto: continue the run in `out`; never; or a checkpoint of the state to go on from")
    export: str = option("float32", "dtype of the weights written to out/checkpoint at the end; none: do not write")
    export_weights: str = option("auto", "which weights: the average, the last ones, or auto: the average if ema is on")
    steps: int = option(1000, "optimizer steps")
    seed: int = option(0, "seed of weights, data order, text drop and masks")

    preset: str = option("tiny", "model sizes for training from scratch: tiny, 1B or 3B")
    init: str | None = option(
        None, "checkpoint to start from, not a preset: folder, or OWNER/NAME[:SUBFOLDER] of the hub"
    )

    token_budget: int = option(0, "tokens of a stream, filled with whole documents of any size; 0: `documents` each")
    documents: int = option(1, "documents of a stream, where there is no token_budget")
    micro_batches: int = option(1, "streams of a step, over all processes; the mean runs over all their target slots")
    look_ahead: int = option(64, "documents that wait to be packed: more waste less and leave the drawn order further")
    pad_to_budget: bool = option(False, "pad every stream to token_budget: steps of one shape")
    too_long: str = option("error", "documents above token_budget: error, or drop, which counts and names them")
    text_drop: float = option(0.1, "probability of dropping a document's text, for classifier-free guidance")

    mask_kind: str = option("tube", "tube, random, DiffForcing or tubeDecay")
    mask_schedule: str = option("cosine", "cosine, linear, sigmoid or pow<exponent>")
    min_mask_rate: float = option(0.7, "smallest share of masked slots")
    given_frames: int = option(
        0, "first latent frames that are shown and not predicted; -1 draws a number for each video"
    )
    given_frames_prob: float = option(
        1.0, "probability that given_frames applies to a document (1 - text_to_video_prob)"
    )

    z_loss: float | None = option(None, "weight of the mean of logsumexp^2 (default: the checkpoint's z_loss_weight)")
    focal_gamma: float = option(0.0, "focal loss: each slot counts (1 - p)^gamma; 0 off, upstream 2")
    decay_start: float | None = option(None, "weight of the first frame's loss, rising linearly to 1 (CEDecay)")

    lr: float = option(1e-4, "peak learning rate of AdamW")
    schedule: str = option("constant", "of the learning rate after its warm-up: constant, cosine or linear")
    warmup: int = option(10, "steps of linear warm-up")
    min_lr: float = option(0.0, "learning rate of the last step, where the schedule falls")
    weight_decay: float = option(0.1, "weight decay of AdamW, on matrices only")
    clip: float = option(4.0, "largest norm of the gradient")
    ema: float = option(0.0, "decay of an average of the weights, 0.999 say; 0: none")
    on_nonfinite: str = option("stop", "a loss or gradient that is not finite: stop, or skip the step and count it")

    lora_rank: int = option(0, "rank of LoRA adapters beside frozen weights, needs init and peft; 0: train all")
    lora_alpha: float = option(16.0, "adapters are scaled by lora_alpha / lora_rank")
    lora_targets: tuple[str, ...] = option(LORA_TARGETS, "linear layers that get adapters")

    log_every: int = option(10, "steps between readings of the log's values from a GPU; every step has its line")
    tensorboard: bool = option(False, "write the log for tensorboard too, into out/tensorboard (needs tensorboard)")

    dtype: str = option("auto", "float32, bfloat16 (autocast, fp32 weights), or auto: bfloat16 on GPUs")
    device: str = option("auto", "cpu, cuda, or auto")
    impl: str = option("auto", "implementation of the ops")
    activation_checkpointing: str = option(
        "none", "what backward recomputes: none, full (each layer), or selective (all but matmuls and attention)"
    )
    replicate: int = option(1, "copies of the sharded model, whose gradients are all-reduced (HSDP)")
    context: int = option(1, "processes that share each stream; must divide the key/value heads")

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", tuple(_source(entry) for entry in self.data))
        for check in (
            _check_run,
            _check_batches,
            _check_masks,
            _check_loss,
            _check_optimizer,
            _check_lora,
            _check_device,
            _check_parallel,
        ):
            check(self)

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], where: str = "config") -> TrainConfig:
        """Of keys and values as a file holds them. ValueError for unknown keys and wrong types, starting with where."""
        return from_options(cls, options, where)

    def to_dict(self) -> dict[str, Any]:
        """All fields, for JSON and YAML; from_dict takes them back."""
        return to_options(self)

    @classmethod
    def load(cls, file: str | Path | None = None, **options: Any) -> TrainConfig:
        """The options of a recipe, of a file, and those given here; the later win.

        Data for a recipe of several kinds say which they are, KIND=PATH, and get what the recipe sets for their kind.
        Raises FileNotFoundError, and ValueError naming the file, the key and what is wrong with it.
        """
        read = {} if file is None else converted(cls, read_options(file), str(file))
        read |= converted(cls, options, "options")
        name = read.get("recipe")
        if name is not None:
            recipe = converted(cls, recipe_options(name), f"recipe {name}")
            if read.get("data"):
                read["data"] = _filled(recipe["data"], read["data"], name)
            read = {**recipe, **read}
        for key in ("init", "preset"):
            if is_blank(read.get(key)):
                raise ValueError(f"{key} is left blank: give a {read[key].strip('<>')}")
        blanks = [
            str(source.path).strip("<>") for source in map(_source, read.get("data", ())) if is_blank(source.path)
        ]
        if blanks:
            kinds = " ".join(f"{kind}=FOLDER" for kind in blanks) if len(blanks) > 1 else "FOLDER"
            raise ValueError(f"data is left blank: give folders of {' and '.join(blanks)}, --data {kinds}")
        return cls(**read)

    def loss_options(self) -> dict[str, float | None]:
        """Keywords of Lumos.forward, for training_step's `loss`."""
        return {
            "z_loss_weight": self.z_loss,
            "focal_gamma": self.focal_gamma,
            "decay_start": self.decay_start,
        }


def _filled(recipe: Sequence[DataSource], data: Sequence[Any], name: str) -> tuple[DataSource, ...]:
    """Sources of the user with what the recipe sets for their kind. Sources of one kind share its weight."""
    kinds = {str(source.path).strip("<>"): source for source in recipe}
    filled: list[tuple[str | None, DataSource]] = []
    for entry in data:
        if isinstance(entry, DataSource):
            filled.append((None, entry))
            continue
        kind, given, path = str(entry).partition("=")
        if not given or kind not in kinds:
            if len(kinds) > 1:
                raise ValueError(
                    f"data: recipe {name} reads {' and '.join(kinds)}; say which {str(entry)!r} is, "
                    f"{next(iter(kinds))}={entry}"
                )
            kind, path = next(iter(kinds)), str(entry)
        own = _source(path)
        changed = {f.name: getattr(own, f.name) for f in fields(own) if getattr(own, f.name) != f.default}
        filled.append((kind, replace(kinds[kind], **changed)))
    named = [kind for kind, _ in filled]
    return tuple(
        source if kind is None else replace(source, weight=source.weight / named.count(kind)) for kind, source in filled
    )


def _source(entry: str | Path | DataSource) -> DataSource:
    """A DataSource, or the one that a text describes: PATH[,key=value]..., with the keys of DataSource."""
    if isinstance(entry, DataSource):
        return entry
    path, *given = re.split(rf",(?=(?:{'|'.join(f.name for f in fields(DataSource)[1:])})=)", str(entry))
    options: dict[str, Any] = dict(part.split("=", 1) for part in given)
    try:
        for name in {"fps", "seconds"} & options.keys():
            options[name] = int(options[name])
        return from_options(DataSource, {"path": path, **options}, "data")
    except ValueError as error:
        raise ValueError(f"data: {str(entry)!r} is no source: {error}") from error


def _check_run(config: TrainConfig) -> None:
    _check_at_least(config, 1, "steps", "keep_checkpoints")
    _check_at_least(config, 0, "seed", "checkpoint_every")
    _check_choice(config, ("none", *DTYPES), "export")
    _check_choice(config, EXPORT_WEIGHTS, "export_weights")
    if config.export_weights == "average" and not config.ema:
        raise ValueError("export_weights average needs an average: ema above 0")
    _check_at_least(config, 1, "log_every")
    if config.recipe is not None:
        _check_choice(config, tuple(recipe_names()), "recipe")


def _check_batches(config: TrainConfig) -> None:
    _check_at_least(config, 1, "documents", "micro_batches", "look_ahead")
    _check_at_least(config, 0, "token_budget")
    _check_share(config, "text_drop")
    if config.token_budget and config.documents != 1:
        raise ValueError(
            f"token_budget {config.token_budget} and documents {config.documents} exclude each other: a stream holds "
            f"what its budget fits, or a number of documents"
        )
    if config.pad_to_budget and not config.token_budget:
        raise ValueError("pad_to_budget needs a token_budget")
    _check_choice(config, TOO_LONG, "too_long")


def _check_masks(config: TrainConfig) -> None:
    _check_share(config, "min_mask_rate", "given_frames_prob")
    _check_choice(config, MASK_KINDS, "mask_kind")
    mask_ratio(config.mask_schedule, torch.zeros(1))
    if config.given_frames < -1:
        raise ValueError(f"given_frames must be a number >= 0, or -1 to draw one, got {config.given_frames}")


def _check_loss(config: TrainConfig) -> None:
    if config.z_loss is not None and not 0 <= config.z_loss < math.inf:
        raise ValueError(f"z_loss must be >= 0, got {config.z_loss}")
    if config.focal_gamma != 0 and not 1 <= config.focal_gamma < math.inf:
        raise ValueError(f"focal_gamma must be 0 or >= 1, got {config.focal_gamma}")
    if config.decay_start is not None and not 0 <= config.decay_start < math.inf:
        raise ValueError(f"decay_start must be >= 0, got {config.decay_start}")


def _check_optimizer(config: TrainConfig) -> None:
    _check_positive(config, "lr", "clip")
    _check_at_least(config, 0, "weight_decay", "warmup", "min_lr")
    _check_choice(config, SCHEDULES, "schedule")
    _check_choice(config, ON_NONFINITE, "on_nonfinite")
    if not 0 <= config.ema < 1:
        raise ValueError(f"ema must be at least 0 and below 1, got {config.ema}")
    if config.min_lr > config.lr:
        raise ValueError(f"min_lr must be at most lr, {config.lr}, got {config.min_lr}")


def _check_lora(config: TrainConfig) -> None:
    _check_at_least(config, 0, "lora_rank")
    _check_positive(config, "lora_alpha")
    unknown = [name for name in config.lora_targets if name not in LORA_TARGETS]
    if unknown or not config.lora_targets:
        raise ValueError(
            f"lora_targets must be some of {', '.join(LORA_TARGETS)}, got {', '.join(config.lora_targets) or 'none'}; "
            f"lm_head and the embedding take adapters from peft itself, outside of lumos train"
        )
    if config.lora_rank and config.init is None:
        raise ValueError("lora_rank needs init: adapters change a trained model")
    if config.lora_rank:
        require_peft()


def _check_device(config: TrainConfig) -> None:
    _check_choice(config, ("auto", "cpu", "cuda"), "device")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but torch sees no CUDA device")
    _check_choice(config, ("auto", *DTYPES), "dtype")
    check_impl(config.impl)


def _check_parallel(config: TrainConfig) -> None:
    """Whether they fit the number of processes is known where the run starts: Parallel.start."""
    _check_choice(config, ACTIVATION_CHECKPOINTING, "activation_checkpointing")
    _check_at_least(config, 1, "replicate", "context")


def _check_at_least(config: TrainConfig, least: int, *names: str) -> None:
    for name in names:
        if not getattr(config, name) >= least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")


def _check_positive(config: TrainConfig, *names: str) -> None:
    for name in names:
        if not getattr(config, name) > 0:
            raise ValueError(f"{name} must be > 0, got {getattr(config, name)}")


def _check_share(config: TrainConfig, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be between 0 and 1, got {getattr(config, name)}")


def _check_choice(config: TrainConfig, choices: tuple[str, ...], *names: str) -> None:
    for name in names:
        if getattr(config, name) not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(config, name)!r}")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, name)
