"""lumos/train/recipes: valid runs of models that fit their GPUs, with upstream's numbers, that anyone can copy."""

import json

import pytest
import torch
import yaml
from test_train import folder, tiny_preset  # noqa: F401

from lumos import Lumos, LumosConfig
from lumos.cli import main
from lumos.data import DataSource
from lumos.scaling import Cluster, Step
from lumos.train import TrainConfig, make_optimizer, train
from lumos.train.recipes import recipe_names, recipe_options, recipe_text, recipe_title
from lumos_kernels import Frame, FrameLayout, Text

NAMES = [f"{stage}-{size}" for stage in ("sft", "stage1-image", "stage2-joint") for size in ("1B", "3B")]
IMAGE_256, IMAGE_384 = Frame(32, 56), Frame(48, 84)
CAPTION = Text(310)  # upstream's samples have 266 to 355


def filled(name, **options):
    data = ["videos=v", "images=i"] if "joint" in name else ["d"]
    init = {} if name.startswith("stage1") else {"init": "checkpoint"}
    return TrainConfig.load(recipe=name, data=data, **init, **options)


def stream_of(name):
    """A stream of the recipe's budget, full of what it reads."""
    budget = recipe_options(name)["token_budget"]
    image = [CAPTION, IMAGE_256 if name.startswith("stage1") else IMAGE_384, Text(2)]
    video = [CAPTION, *[IMAGE_384] * 7, Text(2)]
    documents = [] if name.startswith("stage1") else [video]

    def length():
        return FrameLayout.from_segments(documents).num_tokens if documents else 0

    while not name.startswith("sft") and length() + sum(FrameLayout.from_segments([image]).cu_seqlens) <= budget:
        documents.append(image)
    return FrameLayout.from_segments(documents)


def test_there_are_recipes_of_three_stages_for_two_sizes():
    assert recipe_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_a_valid_config_of_known_keys_in_few_lines(name):
    config = filled(name)
    assert config.recipe == name
    assert len(recipe_text(name).splitlines()) < 45
    assert recipe_title(name).split(",")[0] in recipe_text(name)
    for key, value in recipe_options(name).items():
        if key not in ("data", "init"):
            assert getattr(config, key) == value, key


@pytest.mark.parametrize("name", NAMES)
def test_upstreams_numbers(name):
    """Of exps/*.sh of the official code."""
    config = filled(name)
    assert (config.weight_decay, config.clip, config.text_drop) == (0.1, 4.0, 0.1)
    assert (config.mask_kind, config.mask_schedule, config.min_mask_rate) == ("tube", "cosine", 0.7)
    assert config.dtype == "bfloat16"
    if name.startswith("stage"):
        rates = {"stage1-image-1B": 5e-5, "stage1-image-3B": 1e-4, "stage2-joint-1B": 2.5e-5, "stage2-joint-3B": 2.5e-5}
        assert (config.lr, config.schedule) == (rates[name], "constant")
    if "image" in name:
        assert config.token_budget == 32768
    if "joint" in name:
        assert config.data == (DataSource("v", 1.0, 12, 2), DataSource("i", 6.0))
    if name.startswith("sft"):
        assert config.data == (DataSource("d", 1.0, 12, 2),)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_made_and_a_full_stream_fits_8_gpus_of_80_gb(name):
    size = name.rsplit("-", 1)[1]
    config = filled(name)
    model_config = LumosConfig.preset(config.preset if name.startswith("stage1") else size)
    assert name.startswith("stage1") == (config.preset == size)
    with torch.device("meta"):
        model = Lumos(model_config)
    optimizer = make_optimizer(model, config.lr, config.weight_decay)
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == model_config.num_parameters
    layout = stream_of(name)
    assert 0.85 * config.token_budget < layout.num_tokens <= config.token_budget
    step = Step(model_config, (layout,), (int(layout.content.sum()),), 8, 1, 1, config.activation_checkpointing, 2)
    cluster = Cluster()
    assert step.memory().total < cluster.usable * cluster.memory


@pytest.mark.parametrize("name", NAMES)
def test_a_printed_recipe_is_a_config_file_once_its_blanks_are_filled(name, capsys, tmp_path):
    assert main(["recipes", name]) == 0
    text = capsys.readouterr().out
    assert text == recipe_text(name)
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"(data|init) is left blank"):
        TrainConfig.load(path)
    init = "<folder or hub id of a stage-1 model>", "<folder or hub id of a stage-2 model>"
    for blank, value in (("<videos>", "v"), ("<images>", "i" if "joint" in name else "d"), *((b, "c") for b in init)):
        text = text.replace(blank, value)
    path.write_text(text)
    assert TrainConfig.load(path).lr == filled(name).lr


def test_recipes_are_listed_with_their_numbers(capsys):
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in NAMES)
    assert "lr 2.5e-05" in listed
    assert main(["recipes", "stage3"]) == 2
    assert "recipe must be one of sft-1B" in capsys.readouterr().err


def test_options_and_files_win_over_the_recipe(tmp_path):
    (tmp_path / "mine.yaml").write_text("recipe: stage1-image-1B\nlr: 1.0e-3\nclip: 2\ndata: [a]\n")
    config = TrainConfig.load(tmp_path / "mine.yaml", clip=3.0)
    assert (config.lr, config.clip, config.weight_decay, config.preset) == (1e-3, 3.0, 0.1, "1B")
    # What a run writes down of itself is read back as it is.
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert TrainConfig.load(tmp_path / "train.yaml") == config


def test_sources_of_one_kind_share_its_weight_and_own_settings_win():
    config = TrainConfig.load(recipe="stage2-joint-1B", init="c", data=["videos=a,seconds=4", "images=b", "images=c"])
    assert config.data == (DataSource("a", 1.0, 12, 4), DataSource("b", 3.0), DataSource("c", 3.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "stage9"}, "recipe must be one of sft-1B"),
        ({"recipe": "stage2-joint-1B", "data": ["a"]}, "reads videos and images; say which 'a' is, videos=a"),
        ({"recipe": "stage2-joint-1B", "init": "c"}, "give folders of videos and images, --data videos=FOLDER images="),
        ({"recipe": "sft-1B", "data": ["a"]}, "init is left blank: give a folder or hub id of a stage-2 model"),
        ({"recipe": "stage1-image-1B"}, "data is left blank: give folders of images, --data FOLDER"),
    ],
)
def test_what_a_recipe_still_needs_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.load(**options)


def test_a_recipe_trains_a_small_model(folder, tmp_path, tiny_preset):  # noqa: F811
    config = TrainConfig.load(
        recipe="stage1-image-1B",
        data=[str(folder)],
        out=str(tmp_path / "run"),
        steps=2,
        micro_batches=1,
        token_budget=400,
        dtype="float32",
    )
    assert train(config, progress=False).steps == 2
