import json

import pytest
from golden import TRAINING, load

from lumos.config import LumosConfig
from lumos_kernels.layout import Frame, FrameLayout, Text

SIZES = {
    "vocab_size": 9344,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "visual_start": 9216,
}


@pytest.mark.parametrize("name", TRAINING)
def test_official_configs_survive_a_round_trip(name):
    official = json.loads(load(name)[1]["config"]) | {
        "visual_start": 9216,
        "vq_config": {"embed_dim": [1, {"a": None}]},
    }
    config = LumosConfig.from_dict(official)
    written = config.to_dict()
    assert {key: written[key] for key in official} == official
    assert LumosConfig.from_dict(json.loads(json.dumps(written))) == LumosConfig.from_dict(written)
    assert config.extra["vq_config"] == official["vq_config"]


def test_from_dict_leaves_its_argument_alone():
    official = dict(SIZES, mm_rope=True)
    LumosConfig.from_dict(official).to_dict()["vocab_size"] = 0
    assert official == dict(SIZES, mm_rope=True)


def test_defaults_follow_the_official_config():
    config = LumosConfig.from_dict({key: value for key, value in SIZES.items() if key != "num_key_value_heads"})
    assert (config.num_key_value_heads, config.head_dim, config.model_parallel_size) == (2, 32, 1)
    assert (config.rope_theta, config.rms_norm_eps, config.swin_norm, config.z_loss_weight) == (1e4, 1e-5, False, 0.0)
    assert config.classes == (9216, 9344)
    # The official loader takes a missing mm_rope for plain RoPE.
    assert config.to_dict()["mm_rope"] is True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 48}, "head_dim must be a multiple of 32.*48"),
        ({"hidden_size": 65}, "hidden_size 65 must be a multiple of num_attention_heads 2"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3, "head_dim": 32}, "multiple of num_key_value_heads 3"),
        ({"model_parallel_size": 2}, "num_key_value_heads 1 must be a multiple of model_parallel_size 2"),
        ({"visual_start": 9344}, "visual_start must lie above .* and below vocab_size 9344, got 9344"),
        ({"visual_start": 9005}, "visual_start must lie above the structural ids"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, got 0"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"vocab_size": True}, "vocab_size must be a positive integer, got True"),
        ({"rope_theta": 0}, "rope_theta must be a finite number > 0, got 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number > 0, got nan"),
        ({"z_loss_weight": -1.0}, "z_loss_weight must be a finite number >= 0"),
        ({"dropout": 1.0}, "dropout must be a probability below 1"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"mm_rope": False}, "mm_rope must be True, got False"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling must be None"),
    ],
)
def test_bad_values_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        LumosConfig.from_dict(SIZES | change)


def test_missing_sizes_are_named():
    with pytest.raises(ValueError, match="required keys vocab_size, num_hidden_layers"):
        LumosConfig.from_dict({"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2})


def test_config_files_that_are_no_config(tmp_path):
    file = tmp_path / "config.json"
    for content, message in (("{", "not valid JSON"), ("[1]", "must hold a JSON object, got a list")):
        file.write_text(content)
        with pytest.raises(ValueError, match=f"config.json.*{message}"):
            LumosConfig.from_json_file(file)


def test_presets_have_the_published_sizes():
    one, three, tiny = LumosConfig.lumos_1b(), LumosConfig.lumos_3b(), LumosConfig.tiny()
    assert (one.head_dim, three.head_dim, tiny.head_dim) == (64, 128, 64)
    assert {config.classes for config in (one, three, tiny)} == {(65536, 129536)}
    assert one.num_parameters == pytest.approx(1.50e9, rel=0.01)
    assert three.num_parameters == pytest.approx(3.61e9, rel=0.01)
    with pytest.raises(ValueError, match="preset must be one of tiny, 1B, 3B, got '7B'"):
        LumosConfig.preset("7B")


def test_flops_count_visible_pairs_and_target_rows_only():
    config = LumosConfig.from_dict(SIZES)
    layout = FrameLayout.from_segments([[Text(3), Frame(4, 4), Text(2)]])  # 24 tokens in the frame
    pairs = (1 + 2 + 3) + 24 * 27 + (28 + 29)
    projections = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    forward = 2 * 29 * 2 * projections + 2 * 4 * 32 * 2 * pairs + 2 * 10 * 64 * 128
    assert config.forward_flops(29, pairs, 10) == forward
    assert config.training_flops(layout, 10) == 3 * forward
    # The published estimate for a 1B step on 7 frames of 384x672 (28,890 tokens, 80 % masked) is 3.73e14.
    video = FrameLayout.from_segments([[Text(300)] + [Frame(48, 84)] * 7 + [Text(2)]])
    assert LumosConfig.lumos_1b().training_flops(video, round(0.8 * 7 * 48 * 84)) == pytest.approx(3.73e14, rel=2e-3)
