"""LumosConfig: the sizes of a Lumos-1 model, as in the official config.json, and the formulas of its work."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lumos.config_keys import check_extra, check_number, missing_keys, read_spellings, warn_unknown
from lumos.tokens import NUM_CODES, VIDEO_END, VISUAL_START
from lumos_kernels.flops import attention_flops, loss_flops
from lumos_kernels.layout import FrameLayout

_POSITIVE_INTEGERS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "model_parallel_size",
    "visual_start",
)


@dataclass(frozen=True)
class LumosConfig:
    """Sizes and options of a model, under the names of the official config.json (ChameleonXLLMXConfig).

    Sizes are required; options default to the official defaults, except max_position_embeddings, whose default is the
    65,536 tokens of the official stage-2 training instead of Chameleon's 4,096.

    num_key_value_heads: None means num_attention_heads.
    head_dim: channels of a head, a multiple of 32 (MM-RoPE); None means hidden_size / num_attention_heads.
    model_parallel_size: rows of the q/k LayerNorm parameters, each serving an equal run of heads.
    swin_norm: normalise the output of each branch instead of its input.
    dropout: probability of dropping an element of a branch's output in training.
    z_loss_weight: weight of mean(logsumexp^2) over the class slice, added to the loss.
    visual_start: first visual id; the class slice is [visual_start, vocab_size).
    extra: every other key of the config.json, written back unchanged. Keys that change what a network computes are
        allowed only with values that leave Lumos-1 as it is (lumos/config_keys.py).

    Raises ValueError naming the field, its value and what is allowed.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 65536
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    model_parallel_size: int = 1
    swin_norm: bool = False
    dropout: float = 0.0
    z_loss_weight: float = 0.0
    visual_start: int = VISUAL_START
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self._derived_head_dim())
        self._validate()

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> LumosConfig:
        """Return the config of the keys of a config.json; keys that are no fields end up in `extra`.

        The spelling of transformers 5 is read too: rope_parameters with its rope_theta, and dtype. A key that changes
        the computation and is not understood is a ValueError that names it; unknown others are named in a warning of
        the log, once.
        """
        config = read_spellings(config)
        known = {f.name for f in fields(cls)} - {"extra"}
        missing = missing_keys(config, [f.name for f in fields(cls)[:5]])
        if missing:
            raise ValueError(f"config lacks the required keys {missing}")
        extra = {key: value for key, value in config.items() if key not in known}
        made = cls(**{key: value for key, value in config.items() if key in known}, extra=extra)
        warn_unknown(extra)
        return made

    @classmethod
    def from_json_file(cls, path: str | Path) -> LumosConfig:
        """Return the config of a config.json. Raises ValueError naming the file and what is wrong with it."""
        try:
            config = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{path} must hold a JSON object, got a {type(config).__name__}")
        try:
            return cls.from_dict(config)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def preset(cls, name: str) -> LumosConfig:
        """The config named "tiny", "1B" or "3B". 1B and 3B have the sizes of the released checkpoints."""
        if name not in _PRESETS:
            raise ValueError(f"preset must be one of {', '.join(_PRESETS)}, got {name!r}")
        return cls(
            vocab_size=VISUAL_START + NUM_CODES,
            max_position_embeddings=131072,  # 22 latent frames at 384x672 are 90,119 tokens
            **_PRESETS[name],
        )

    @classmethod
    def tiny(cls) -> LumosConfig:
        """A model that trains on two CPU cores: 4 layers x 128, the full vocabulary."""
        return cls.preset("tiny")

    @classmethod
    def lumos_1b(cls) -> LumosConfig:
        return cls.preset("1B")

    @classmethod
    def lumos_3b(cls) -> LumosConfig:
        return cls.preset("3B")

    def to_dict(self) -> dict[str, Any]:
        """The official keys, `visual_start`, and the keys of `extra`: what belongs into config.json."""
        known = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        # The official loader defaults to plain RoPE, so the key must be there.
        return {"mm_rope": True, "tie_word_embeddings": False, **self.extra, **known}

    @property
    def classes(self) -> tuple[int, int]:
        """The class slice (lo, hi): the ids a masked slot can take."""
        return self.visual_start, self.vocab_size

    @property
    def num_classes(self) -> int:
        return self.vocab_size - self.visual_start

    @property
    def layer_matmul_parameters(self) -> int:
        """Weights of one layer that multiply every token: q, k, v, o, gate, up, down."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        return self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)

    @property
    def num_parameters(self) -> int:
        """All parameters, embedding and untied lm_head included."""
        layer = self.layer_matmul_parameters + 2 * self.hidden_size + 4 * self.model_parallel_size * self.head_dim
        return self.num_hidden_layers * layer + 2 * self.vocab_size * self.hidden_size + self.hidden_size

    def forward_flops(self, num_tokens: int, visible_pairs: int, num_targets: int) -> int:
        """Useful FLOPs of a forward pass: 2 a multiply-add, nothing counted for masked pairs or unused logits.

        num_tokens: T; visible_pairs: (query, key) pairs of RowLimits.visible_pairs(); num_targets: target rows, each
        against the class slice.
        """
        linear = 2 * num_tokens * self.num_hidden_layers * self.layer_matmul_parameters
        heads = self.num_hidden_layers * self.num_attention_heads
        attention = attention_flops(visible_pairs, heads, self.head_dim, backward=False)
        loss = loss_flops(num_targets, self.hidden_size, self.num_classes, products=1)
        return linear + attention + loss

    def training_flops(self, layout: FrameLayout, num_targets: int, frozen: bool = False) -> int:
        """Useful FLOPs of forward and backward on a layout: three times the forward, recomputation not counted.

        Reads layout.limits: compute it once, on the CPU copy of the layout. num_targets: rows that enter the loss.
        frozen: the matmul weights take no gradient, only their inputs do (LoRA, whose own matmuls are not counted).
        """
        pairs = layout.limits.visible_pairs()
        forward = self.forward_flops(layout.num_tokens, pairs, num_targets)
        return 3 * forward - (self.forward_flops(layout.num_tokens, 0, num_targets) if frozen else 0)

    def _derived_head_dim(self) -> int:
        _check_positive_integer("hidden_size", self.hidden_size)
        _check_positive_integer("num_attention_heads", self.num_attention_heads)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads} "
                f"where head_dim is not given"
            )
        return self.hidden_size // self.num_attention_heads

    def _validate(self) -> None:
        for name in _POSITIVE_INTEGERS:
            _check_positive_integer(name, getattr(self, name))
        if self.head_dim % 32:
            raise ValueError(f"head_dim must be a multiple of 32 (MM-RoPE pairs its channels so), got {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.num_key_value_heads % self.model_parallel_size:
            raise ValueError(
                f"num_key_value_heads {self.num_key_value_heads} must be a multiple of model_parallel_size "
                f"{self.model_parallel_size}"
            )
        if not VIDEO_END < self.visual_start < self.vocab_size:
            raise ValueError(
                f"visual_start must lie above the structural ids (up to {VIDEO_END}) and below vocab_size "
                f"{self.vocab_size}, got {self.visual_start}"
            )
        if not isinstance(self.swin_norm, bool):
            raise ValueError(f"swin_norm must be true or false, got {self.swin_norm!r}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            check_number(name, getattr(self, name), positive=True)
        for name in ("dropout", "z_loss_weight"):
            check_number(name, getattr(self, name), positive=False)
        if self.dropout >= 1:
            raise ValueError(f"dropout must be a probability below 1, got {self.dropout}")
        check_extra(self.extra, {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"})


def _check_positive_integer(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a key given twice, of which json would silently take the last."""
    read: dict[str, Any] = {}
    for key, value in pairs:
        if key in read:
            raise ValueError(f"the key {key!r} is given twice")
        read[key] = value
    return read


_PRESETS: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "3B": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
    },
}
