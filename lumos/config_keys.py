"""Rules for the keys of a config.json that are no fields of LumosConfig: which are kept, which are refused.

A key that changes what a Llama-like model computes, and that Lumos-1 does not have, must not pass unseen: the model
would load and compute something else.

    COMPUTING     The key changes the computation. Only the values that leave Lumos-1 as it is are allowed.
    RENAMED       The key is another project's name of an official key. It must say what the official key says.
    bookkeeping   The key changes nothing (tokens, names, versions, settings of generation). Any value is kept.
    families      The key is unknown, but its name is one of a network's options (rope, norm, experts, ...). It must be
                  off: absent, null, false, empty or 0, or 1 for a factor.
    the rest      Any value is kept. A warning in the log names the key.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_LOGGER = logging.getLogger(__name__)
_warned: set[str] = set()

# Keys that hold the config of a language model inside that of a larger one.
_NESTED = ("text_config", "llm_config", "language_config", "decoder_config", "model_config")
# Keys that change the computation, and their allowed values.
COMPUTING: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "mm_rope": (True,),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias"), (False, None)),
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention"), (False, None)),
    **dict.fromkeys(("attention_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop"), (0.0, None)),
    "pretraining_tp": (1, None),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rotary_percent"), (1.0, None)),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "qk_layer_norm"), (True, None)),
    **dict.fromkeys(("position_embedding_type", "pos_embedding_type"), ("rope", "rotary", None)),
    **dict.fromkeys(("norm_type", "normalization_type"), ("rms_norm", "rmsnorm", None)),
    **dict.fromkeys(("use_rope", "use_rotary", "use_rms_norm", "rms_norm", "scale_attn_weights"), (True, None)),
    # Off, each of these is another network: a family's rule, off is neutral, would let it pass.
    **dict.fromkeys(("causal", "is_causal", "use_causal_mask", "causal_attention"), (True, None)),
    **dict.fromkeys(("rope", "rotary", "use_rotary_embedding", "use_rotary_embeddings"), (True, None)),
    **dict.fromkeys(("pre_norm", "gated_mlp", "use_gated_mlp", "use_glu", "glu", "use_swiglu"), (True, None)),
    **dict.fromkeys(("bidirectional", "use_bidirectional_attention", "multi_query"), (False, None)),
    # Each replaces 1 / sqrt(head_dim): no number leaves the scores as they are.
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "attention_scale", "attn_scale"), (None,)),
    **dict.fromkeys((*_NESTED, "quantization_config", "sliding_window", "softmax_scale"), (None,)),
}
# What other projects call an official key.
RENAMED: dict[str, str] = {
    **dict.fromkeys(("n_embd", "n_embed", "d_model", "dim", "model_dim"), "hidden_size"),
    **dict.fromkeys(("n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"), "intermediate_size"),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers"), "num_hidden_layers"),
    **dict.fromkeys(("n_head", "n_heads", "num_heads"), "num_attention_heads"),
    **dict.fromkeys(("n_head_kv", "n_kv_heads", "num_kv_heads", "num_query_groups"), "num_key_value_heads"),
    **dict.fromkeys(("kv_channels", "attention_head_dim", "head_size", "d_head", "d_kv", "v_head_dim"), "head_dim"),
    **dict.fromkeys(
        ("rope_base", "rotary_base", "rotary_emb_base", "rope_freq_base", "freq_base", "theta"), "rope_theta"
    ),
    **dict.fromkeys(("norm_eps", "norm_epsilon", "layer_norm_eps", "layer_norm_epsilon"), "rms_norm_eps"),
    **dict.fromkeys(("layernorm_eps", "layernorm_epsilon", "rms_norm_epsilon", "rms_eps", "eps"), "rms_norm_eps"),
    **dict.fromkeys(("hidden_activation", "activation_function", "activation", "act_fn"), "hidden_act"),
    **dict.fromkeys(("use_bias", "bias", "qkv_bias", "use_qkv_bias", "attn_bias"), "attention_bias"),
    **dict.fromkeys(("use_mlp_bias", "add_bias_linear"), "mlp_bias"),
    **dict.fromkeys(("tie_embeddings", "tied_embeddings", "tie_weights", "share_embeddings"), "tie_word_embeddings"),
    **dict.fromkeys(("hidden_dropout", "hidden_dropout_prob", "residual_dropout", "dropout_rate"), "dropout"),
    **dict.fromkeys(("attn_dropout", "attention_probs_dropout_prob"), "attention_dropout"),
    "z_loss": "z_loss_weight",
    "padded_vocab_size": "vocab_size",
    "vis_tok_start": "visual_start",
}
# Values of official keys where the config does not have them.
_DEFAULTS = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
# Keys whose values change nothing here, although some of their names look like a family's.
_BOOKKEEPING = re.compile(
    # The checkpoint and its files
    r"_.*|architectures|auto_map|model_type|name|description|\w*version|(torch_)?dtype|tokenizer_class|vocabulary_map|"
    r"vq_config|mask_image_logits|initializer_\w+|max_window_layers|n_positions|n_ctx|max_seq(uence)?_len(gth)?|"
    # Tokens
    r"\w+_token|\w+_token_ids?|\w+_token_index|"
    # Which implementation runs
    r"\w*attn_implementation\w*|(use_)?flash_attn\w*|use_sdpa|use_cache|gradient_checkpointing|torchscript|"
    r"chunk_size_feed_forward|use_bfloat16|tf_legacy_loss|"
    # What a call of a transformers model returns, and its heads
    r"output_(attentions|hidden_states|scores|logits)|return_dict\w*|id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|prefix|"
    r"is_decoder|tie_encoder_decoder|remove_invalid_values|"
    # Defaults of generation that transformers 4 kept in the same file
    r"(max|min|sep|no|num|do|encoder|length|diversity|repetition|exponential|early|bad|suppress|begin|forced)_("
    r"length|repeat_ngram_size|beams|beam_groups|return_sequences|sample|no_repeat_ngram_size|penalty|"
    r"decay_length_penalty|stopping|words_ids|tokens|suppress_tokens)|temperature|top_k|top_p|typical_p"
)
# Parts of names that belong to families of options of a network.
_FAMILIES = re.compile(
    r"rope|rotary|theta|alibi|position_embed|soft_?cap|sliding|window|expert|router|moe|quant|norm|bias|multiplier|"
    r"scal|dropout|residual|tied?_|attn|attention|activation|_act$|lora|mup_|kv_|clip_|_heads$|_layers$|per_layer|"
    r"layer_types"
)
_FACTORS = re.compile(r"multiplier|scal|factor")
_ROPE = ("rope_parameters", "rope_scaling")
# Values in rope_parameters that leave the rotation with the base frequency rope_theta as it is.
_NEUTRAL_IN_ROPE = {
    **dict.fromkeys(("rope_type", "type"), "default"),
    **dict.fromkeys(("partial_rotary_factor", "factor", "attention_factor"), 1.0),
}


def read_spellings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config in the official spelling: what transformers 5 renamed or nested has its official name again.

    The rope_theta in rope_parameters or rope_scaling becomes the official key of that name, dtype becomes torch_dtype.
    ValueError names a rotation that Lumos-1 does not have, and two spellings that contradict each other.
    """
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"config must be a mapping with texts as keys, got {config!r}")
    read = dict(config)
    for name in _ROPE:
        if name not in read:
            continue
        theta = _base_of(name, read.pop(name))
        if theta is not None:
            _agree(read, "rope_theta", theta, f"{name}['rope_theta']")
    if "rope_scaling" in config:
        read["rope_scaling"] = None  # the official loader refuses a mapping of another type than linear and dynamic
    if "dtype" in read:
        _agree(read, "torch_dtype", read.pop("dtype"), "dtype")
    return read


def missing_keys(config: Mapping[str, Any], required: Sequence[str]) -> str:
    """Name the required keys that a config lacks, and what it has in their place; "" where none is missing."""
    named = []
    for name in required:
        if name not in config:
            others = [other for other, official in RENAMED.items() if official == name and other in config]
            named.append(f"{name} (it has {others[0]}, which is not read)" if others else name)
    nested = [name for name in _NESTED if config.get(name) is not None]
    return ", ".join(named) + (f"; what {', '.join(nested)} holds is not read" if named and nested else "")


def check_extra(extra: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that changes the computation, with the values that are allowed; see the module.

    extra: the keys beside the fields of LumosConfig, in the official spelling; known: the fields.
    """
    unwindowed = extra.get("use_sliding_window") is False  # Qwen writes the window's size also where none is used
    for name, value in extra.items():
        if name in _ROPE:
            theta = _base_of(name, value)
            if theta is not None:
                raise ValueError(f"{name} must not be in extra: give its rope_theta, {theta!r}, as rope_theta")
        elif name in COMPUTING:
            allowed = COMPUTING[name]
            if not any(_same(value, neutral) for neutral in allowed) and not (unwindowed and name == "sliding_window"):
                raise _refused(name, value, repr(allowed[0]))
        elif name in RENAMED:
            official = RENAMED[name]
            wanted = {**_DEFAULTS, **extra, **known}.get(official)
            if value is not None and not _same(value, wanted):
                raise ValueError(f"{name} is {value!r}, but what is read is {official}, and that is {wanted!r}")
        elif name == "layer_types":
            full = isinstance(value, (list, tuple)) and all(kind == "full_attention" for kind in value)
            if value is not None and not full:
                raise _refused(name, value, "None or a list of 'full_attention'")
        elif _in_family(name) and not _is_off(name, value):
            raise _refused(name, value, f"absent, None, False or 0{' or 1' * bool(_FACTORS.search(name))}")


def warn_unknown(extra: Mapping[str, Any]) -> None:
    """Log a warning that names the keys of which nothing is known, each once a process."""
    ruled = {*COMPUTING, *RENAMED, *_ROPE, "layer_types", *_warned}
    unknown = [
        name
        for name, value in extra.items()
        if name not in ruled and not _BOOKKEEPING.fullmatch(name) and not _is_off(name, value)
    ]
    if unknown:
        _warned.update(unknown)
        _LOGGER.warning("config.json has unknown keys, which are kept and not used: %s", ", ".join(unknown))


def _base_of(name: str, value: Any) -> float | None:
    """rope_theta of rope_parameters or rope_scaling, None where it has none; ValueError for any other rotation."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _refused(name, value, "None or a mapping with rope_theta and rope_type 'default'")
    for key, inner in value.items():
        neutral = _NEUTRAL_IN_ROPE.get(key)
        if inner is None or key == "rope_theta" or _same(inner, neutral):
            continue
        allowed = f"{key} must not be there" if neutral is None else f"{key} must be {neutral!r}"
        raise _refused(name, value, f"None or the plain rotation of all layers, in which {allowed}")
    theta = value.get("rope_theta")
    if theta is not None:
        check_number(f"{name}['rope_theta']", theta, positive=True)
    return theta


def _agree(read: dict[str, Any], official: str, value: Any, name: str) -> None:
    """Gives the official key the value that stands under another name; ValueError where it has another one."""
    own = read.get(official)
    if own is not None and value is not None and not _same(_bare(own), _bare(value)):
        raise ValueError(f"{official} is {own!r} and {name} is {value!r}: give one of them, or the same value twice")
    if own is None:
        read[official] = value


def check_number(name: str, value: object, positive: bool) -> None:
    """Raise ValueError where value is no finite number > 0, or >= 0 where not positive."""
    good = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        good = good and math.isfinite(value) and (value > 0 if positive else value >= 0)
    except OverflowError:  # an integer beyond the largest float
        good = False
    if not good:
        raise ValueError(f"{name} must be a finite number {'> 0' if positive else '>= 0'}, got {value!r}")


def _same(value: Any, other: Any) -> bool:
    """Equal, where true is not 1 and false is not 0."""
    return isinstance(value, bool) == isinstance(other, bool) and value == other


def _in_family(name: str) -> bool:
    return _FAMILIES.search(name.lower()) is not None and _BOOKKEEPING.fullmatch(name) is None


def _is_off(name: str, value: Any) -> bool:
    if value is None or value is False or value in ("", [], (), {}):
        return True
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    return numeric and (value == 0 or (value == 1 and _FACTORS.search(name) is not None))


def _bare(value: Any) -> Any:
    """A dtype's name without the module's."""
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _refused(name: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{name} must be {allowed}, got {value!r}: Lumos-1 does not use it, nor does this")
