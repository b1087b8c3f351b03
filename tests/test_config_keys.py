"""lumos/config_keys.py: other spellings of a config.json, and keys that change what a network computes."""

import dataclasses
import json
import logging

import pytest
import torch
from golden import TRAINING, load
from test_config import SIZES

from lumos import config_keys
from lumos.config import LumosConfig
from lumos.model import Lumos

ROPE = {"rope_theta": 500000.0, "rope_type": "default"}
# What ChameleonConfig(rope_theta=5e5).to_dict() of transformers 5.23 adds to the sizes.
TRANSFORMERS_5 = {
    **{
        "transformers_version": "5.23.0",
        "architectures": ["ChameleonXLLMXForConditionalGeneration"],
        "dtype": "bfloat16",
    },
    **{"output_hidden_states": False, "return_dict": True, "chunk_size_feed_forward": 0, "is_encoder_decoder": False},
    **{"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": None, "_name_or_path": "x"},
    **{"hidden_act": "silu", "max_position_embeddings": 4096, "initializer_range": 0.02, "rms_norm_eps": 1e-05},
    **{"use_cache": True, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": [2, 3], "image_token_id": None},
    **{"tie_word_embeddings": False, "rope_parameters": ROPE, "attention_bias": False, "attention_dropout": 0.0},
    **{"model_parallel_size": 1, "swin_norm": False, "vocabulary_map": None, "mlp_bias": False, "mm_rope": True},
    **{"vq_config": {"dropout": 0.1, "attn_type": "vanilla", "rope_scaling": 2}, "model_type": "chameleon"},
    **{"output_attentions": False, "mask_image_logits": True},
}
# Of a config.json that transformers 4 wrote with all defaults.
TRANSFORMERS_4 = {
    **{
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "pruned_heads": {},
        "tf_legacy_loss": False,
    },
    **{"_attn_implementation_autoset": True, "add_cross_attention": False, "bad_words_ids": None, "num_beams": 1},
    **{"begin_suppress_tokens": None, "cross_attention_hidden_size": None, "decoder_start_token_id": None},
    **{"diversity_penalty": 0.0, "do_sample": False, "early_stopping": False, "encoder_no_repeat_ngram_size": 0},
    **{"exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None, "prefix": None},
    **{"length_penalty": 1.0, "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1},
    **{"num_return_sequences": 1, "output_scores": False, "is_decoder": False, "remove_invalid_values": False},
    **{"repetition_penalty": 1.0, "return_dict_in_generate": False, "sep_token_id": None, "suppress_tokens": None},
    **{"task_specific_params": None, "temperature": 1.0, "tie_encoder_decoder": False, "tokenizer_class": None},
    **{"top_k": 50, "top_p": 1.0, "torchscript": False, "typical_p": 1.0, "use_bfloat16": False, "pretraining_tp": 1},
}


def of(**changes):
    return LumosConfig.from_dict(SIZES | changes)


def test_rope_parameters_of_transformers_5_are_the_base_frequency():
    config = of(**TRANSFORMERS_5)
    assert config.rope_theta == 500000.0
    written = config.to_dict()
    # The official loader reads rope_theta and torch_dtype.
    assert (written["rope_theta"], written["torch_dtype"]) == (500000.0, "bfloat16")
    assert not {"rope_parameters", "dtype"} & set(written)
    assert {key: written[key] for key in TRANSFORMERS_5 if key not in ("rope_parameters", "dtype")} == {
        key: value for key, value in TRANSFORMERS_5.items() if key not in ("rope_parameters", "dtype")
    }
    assert LumosConfig.from_dict(json.loads(json.dumps(written))) == config


def test_the_old_and_the_new_spelling_give_the_same_network():
    models = []
    for config in (of(rope_theta=500000.0), of(rope_parameters=ROPE), of()):
        torch.manual_seed(0)
        models.append(Lumos(config).eval())
    ids = torch.tensor([[0, 5000, 6000, 7000, 8710]])
    old, new, other = (model(ids).hidden_states for model in models)
    assert torch.equal(old, new)
    assert not torch.allclose(old, other, atol=1e-4)


@pytest.mark.parametrize("name", TRAINING)
def test_official_configs_of_transformers_4_pass_unchanged_and_without_a_warning(name, caplog):
    official = json.loads(load(name)[1]["config"]) | {"visual_start": 9216} | TRANSFORMERS_4
    with caplog.at_level(logging.WARNING):
        config = LumosConfig.from_dict(official)
    assert caplog.text == ""
    written = config.to_dict()
    assert {key: written[key] for key in official} == official
    assert LumosConfig.from_dict(written).to_dict() == written


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": {"rope_theta": 500000, "type": "default", "factor": None}}, 500000),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}, 5e5),
        ({"rope_parameters": ROPE, "rope_theta": 500000}, 500000),
        ({"rope_parameters": ROPE, "rope_theta": None, "rope_scaling": None}, 5e5),
        ({"rope_parameters": ROPE, "rope_scaling": ROPE}, 5e5),
        ({"rope_scaling": ROPE}, 5e5),  # transformers 5 takes the old name for the new mapping
        ({"rope_scaling": {"type": "default"}, "rope_theta": 7.5}, 7.5),
        ({"rope_parameters": {"rope_type": "default"}}, 10000.0),
        ({"rope_parameters": None}, 10000.0),
        ({"rope_parameters": {}}, 10000.0),
    ],
)
def test_plain_rotations_are_read(rope, theta):
    config = of(**rope)
    assert config.rope_theta == theta
    assert config.to_dict().get("rope_scaling") is None
    assert "rope_parameters" not in config.to_dict()


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize(
    ("rope", "message"),
    [
        *(({"rope_theta": 1e4, "rope_type": kind, "factor": 2.0}, kind) for kind in ("linear", "dynamic", "yarn")),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}, "rope_type must be 'default'"),
        ({"type": "linear", "factor": 2.0}, "type must be 'default'"),
        ({"type": "mrope", "mrope_section": [16, 24, 24]}, "type must be 'default'"),
        ({"rope_type": "default", "factor": 2.0}, "factor must be 1.0"),
        ({"rope_type": "default", "mrope_section": [16, 24, 24]}, "mrope_section must not be there"),
        (ROPE | {"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ({"full_attention": ROPE, "sliding_attention": {"rope_theta": 1e4}}, "full_attention must not be there"),
        ({"rope_theta": "500000"}, r"\['rope_theta'\] must be a finite number > 0, got '500000'"),
        *(
            ({"rope_theta": bad}, "must be a finite number")
            for bad in (0, -1.0, float("nan"), float("inf"), True, 10**400)
        ),
        ("default", "a mapping with rope_theta"),
        (5e5, "a mapping with rope_theta"),
        ([ROPE], "a mapping with rope_theta"),
    ],
)
def test_other_rotations_are_refused_by_name(where, rope, message):
    with pytest.raises(ValueError, match=rf"^{where}.*{message}"):
        of(**{where: rope})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_theta": 1e4, "rope_parameters": ROPE}, "rope_theta is 10000.0 and rope_parameters.*is 500000.0"),
        (
            {"rope_scaling": {"rope_theta": 1e4}, "rope_parameters": ROPE},
            "rope_theta is 500000.0 and rope_scaling.*10000",
        ),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, "torch_dtype is 'bfloat16' and dtype is 'float32'"),
    ],
)
def test_two_spellings_that_differ_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        of(**keys)


def test_two_spellings_of_a_dtype_that_agree():
    assert of(dtype="bfloat16", torch_dtype="torch.bfloat16").extra == {"torch_dtype": "torch.bfloat16"}
    assert of(dtype="bfloat16").extra == {"torch_dtype": "bfloat16"}


REFUSED = {
    "hidden_act": ("gelu", None),
    "attention_bias": (True, 0),
    "mlp_bias": (True,),
    "tie_word_embeddings": (True, 1),
    "attention_dropout": (0.1, float("nan"), "0"),
    "mm_rope": (False, None, 1),
    "partial_rotary_factor": (0.5, True),
    "pretraining_tp": (2, 0),
    "sliding_window": (4096, 0),
    "layer_types": (["full_attention", "sliding_attention"], "full_attention"),
    "quantization_config": ({"quant_method": "fp8"}, {}),
    "text_config": ({"rope_theta": 5e5},),
    "qk_layernorm": (False,),
    "attention_multiplier": (1.0, 0.125),
    "query_pre_attn_scalar": (256, 1),
    "position_embedding_type": ("absolute",),
    **dict.fromkeys(
        ("logits_scaling", "residual_multiplier", "embedding_multiplier", "logit_scale"), (0.22, "1", True)
    ),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "output_softcap"), (30.0, 1)),
    **dict.fromkeys(("num_experts", "n_routed_experts", "kv_lora_rank", "num_nextn_predict_layers"), (8, 1)),
    **dict.fromkeys(("rope_local_base_freq", "rope_interleave", "no_rope_layers", "attention_chunk_size"), (10000,)),
    **dict.fromkeys(
        ("causal", "is_causal", "pre_norm", "gated_mlp", "glu", "rope", "use_rotary_embedding"), (False, 0)
    ),
    **dict.fromkeys(
        ("RopeTheta", "ROPE_THETA", "ropeScaling", "numExperts", "use_bidirectional_attention"), (5.0, True)
    ),
    **dict.fromkeys(("norm_topk_prob", "use_parallel_residual", "lm_head_bias", "use_sliding_window"), (True,)),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in REFUSED.items() for value in values])
def test_keys_that_change_the_computation_are_refused_by_name(key, value):
    for make in (lambda: of(**{key: value}), lambda: LumosConfig(**SIZES, extra={key: value})):
        with pytest.raises(ValueError, match=rf"^{key} must be .*, got "):
            make()


NEUTRAL = {
    "attention_bias": (False, None),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "pretraining_tp": (1, None),
    "layer_types": (["full_attention"] * 2, [], None),
    "sliding_window": (None,),
    "quantization_config": (None,),
    "use_qk_norm": (True, None),
    **dict.fromkeys(("is_causal", "gated_mlp", "rope"), (True, None)),
    "use_bidirectional_attention": (False, None),
    "hidden_act": ("silu", "swish"),
    **dict.fromkeys(("logits_scaling", "residual_multiplier", "embedding_multiplier"), (1, 1.0, 0, None)),
    **dict.fromkeys(
        ("final_logit_softcapping", "num_experts", "rope_interleave", "no_rope_layers"), (None, 0, False, [])
    ),
    **dict.fromkeys(("num_attention_heads_", "_flash_attn", "attn_implementation"), (None, "")),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in NEUTRAL.items() for value in values])
def test_neutral_values_pass_and_are_kept(key, value):
    written = of(**{key: value}).to_dict()
    assert written[key] == value
    assert type(written[key]) is type(value)


def test_a_window_that_is_not_used_passes():
    keys = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
    assert of(**keys).extra == keys
    with pytest.raises(ValueError, match="sliding_window must be None, got 4096"):
        of(**keys | {"use_sliding_window": None})


@pytest.mark.parametrize(("other", "official"), sorted(config_keys.RENAMED.items()))
def test_another_name_of_a_key_must_say_what_the_official_one_says(other, official):
    known = {**dataclasses.asdict(of()), "hidden_act": "silu", "attention_dropout": 0.0}
    value = known.get(official, False)
    assert of(**{other: value}).to_dict()[other] == value
    for wrong in ("x", 0.25, True):
        with pytest.raises(ValueError, match=f"^{other} is {wrong!r}, but what is read is {official}, and that is"):
            of(**{other: wrong})


def test_missing_sizes_say_where_they_may_be():
    with pytest.raises(ValueError, match=r"required keys hidden_size \(it has n_embd, which is not read\), num_hidden"):
        LumosConfig.from_dict({"vocab_size": 9344, "n_embd": 64, "intermediate_size": 96, "num_attention_heads": 2})
    with pytest.raises(ValueError, match=r"required keys vocab_size.*; what text_config holds is not read"):
        LumosConfig.from_dict({"text_config": SIZES})


def test_unknown_keys_are_kept_with_one_warning(caplog, monkeypatch):
    monkeypatch.setattr(config_keys, "_warned", set())
    for _ in range(2):
        config = of(time_of_day=[1, {"a": None}], shade="blue", architectures=["X"], later=None)
        assert config.extra["time_of_day"] == [1, {"a": None}]
        assert config.to_dict()["shade"] == "blue"
    assert [record.getMessage() for record in caplog.records] == [
        "config.json has unknown keys, which are kept and not used: time_of_day, shade"
    ]


def test_files_name_themselves(tmp_path):
    file = tmp_path / "config.json"
    for content, message in (
        (json.dumps(SIZES | {"rope_scaling": {"type": "linear", "factor": 2.0}}), "rope_scaling must be None"),
        (json.dumps(SIZES | {"rope_theta": float("nan")}), "rope_theta must be a finite number > 0, got nan"),
        ('{"rope_theta": 1e4, "rope_theta": 5e5}', "the key 'rope_theta' is given twice"),
        ("[" * 100_000, "is not valid JSON"),
    ):
        file.write_text(content)
        with pytest.raises(ValueError, match=rf"config\.json.*{message}"):
            LumosConfig.from_json_file(file)


@pytest.mark.parametrize("config", [None, [1], "x", {**SIZES, 5: 1}], ids=str)
def test_what_is_no_mapping_of_texts_is_no_config(config):
    with pytest.raises(ValueError, match="config must be a mapping with texts as keys, got"):
        LumosConfig.from_dict(config)
