"""lumos/options.py, lumos/train/config.py and schedule.py: options from files and the command line, learning rates."""

import argparse
import json
import math
from dataclasses import dataclass, fields

import pytest
import torch
import yaml

from lumos.cli import main
from lumos.data import DataSource
from lumos.options import add_options, from_options, option, read_options, to_options, write_options
from lumos.train import TrainConfig
from lumos.train.schedule import lr_factor, make_schedule


def file(tmp_path, text, name="run.yaml"):
    path = tmp_path / name
    path.write_text(text)
    return path


def test_a_file_gives_options_and_those_given_beside_it_win(tmp_path):
    path = file(tmp_path, "data: [a, b]\nlr: 1.0e-3\nsteps: 7\nmask_kind: random\n")
    config = TrainConfig.load(path, lr=2e-3)
    assert (config.lr, config.steps, config.mask_kind) == (2e-3, 7, "random")
    assert len(config.data) == 2
    assert config.clip == TrainConfig().clip


def test_json_is_read_as_yaml_is(tmp_path):
    options = {"data": ["a"], "steps": 3, "overwrite": True, "init": None}
    as_json = TrainConfig.load(file(tmp_path, json.dumps(options), "run.json"))
    assert as_json == TrainConfig.load(file(tmp_path, yaml.safe_dump(options)))
    assert as_json.overwrite
    assert as_json.steps == 3


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "'1e-4'"])
def test_a_number_without_a_point_is_a_number(tmp_path, text):
    """YAML 1.1 reads 1e-4 as a text."""
    assert TrainConfig.load(file(tmp_path, f"lr: {text}")).lr == 1e-4


def test_a_whole_number_serves_as_a_number(tmp_path):
    clip = TrainConfig.load(file(tmp_path, "clip: 4")).clip
    assert clip == 4.0
    assert isinstance(clip, float)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_what_is_written_is_read_back(tmp_path, suffix):
    config = TrainConfig(data=("a", "b"), lr=3e-4, schedule="cosine", min_lr=1e-6, init="x", out="é", overwrite=True)
    write_options(tmp_path / f"run.{suffix}", config.to_dict())
    assert TrainConfig.load(tmp_path / f"run.{suffix}") == config
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_every_field_is_written(tmp_path):
    assert list(TrainConfig().to_dict()) == [f.name for f in fields(TrainConfig)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", r"run.yaml: unknown key 'lrr' \(nearest: 'lr'\)"),
        ("mask_knd: tube\nsteps: 1\nwarm-up: 3", r"unknown keys 'mask_knd' .*'mask_kind'.*'warm-up' .*'warmup'"),
        ("steps: many", "run.yaml: steps must be a whole number, got a text, 'many'"),
        ("steps: 1.5", "steps must be a whole number, got a number, 1.5"),
        ("steps: true", "steps must be a whole number, got true or false, True"),
        ("lr: fast", "lr must be a number, got a text, 'fast'"),
        ("lr: no", "lr must be a number, got true or false, False"),
        ("overwrite: 1", "overwrite must be true or false, got a whole number, 1"),
        ("init: 3", "init must be a text or null, got a whole number, 3"),
        ("preset: null", "preset must be a text, got null"),
        ("data: folder", "data must be a list"),
        ("data: [a, 3]", r"data\[1\] must be a text or a mapping of path, weight, .*got a whole number, 3"),
        ("data: [{path: a, weigth: 2}]", r"data\[0\]: unknown key 'weigth' \(nearest: 'weight'\)"),
        ("data: [{path: a, fps: fast}]", r"data\[0\]: fps must be a whole number or null, got a text, 'fast'"),
        ("data: [{path: a, weight: -1}]", "weight must be a finite number above 0"),
        ("data: ['a,fps=fast']", r"data: 'a,fps=fast' is no source: .*'fast'"),
        ("- a\n- b", "run.yaml must hold keys and values, got a list"),
        ("lr: 1\nlr: 2", "run.yaml cannot be read: given twice: lr"),
        ("lr: [1", "run.yaml cannot be read"),
        ("!!python/object/apply:os.system ['true']", "run.yaml cannot be read"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig.load(file(tmp_path, text))


def test_a_key_given_twice_in_json_is_refused(tmp_path):
    with pytest.raises(ValueError, match="given twice: lr"):
        read_options(file(tmp_path, '{"lr": 1, "lr": 2}', "run.json"))


def test_an_empty_file_gives_the_defaults(tmp_path):
    assert TrainConfig.load(file(tmp_path, "# nothing\n")) == TrainConfig()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml"):
        TrainConfig.load(tmp_path / "absent.yaml")


def test_a_source_is_a_path_a_text_or_a_mapping(tmp_path):
    written = file(tmp_path, "data:\n- a, b\n- c,weight=2,fps=12,seconds=2,crop=random\n- {path: d, weight: 1e-1}\n")
    want = (DataSource("a, b"), DataSource("c", 2.0, 12, 2, "random"), DataSource("d", 0.1))
    assert TrainConfig.load(written).data == want
    assert TrainConfig(data=(tmp_path,)).data == (DataSource(str(tmp_path)),)
    assert TrainConfig(data=want).data == want
    assert TrainConfig.from_dict(json.loads(json.dumps(TrainConfig(data=want).to_dict()))).data == want


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "wave"}, "schedule must be one of constant, cosine, linear"),
        ({"min_lr": -1.0}, "min_lr must be at least 0"),
        ({"min_lr": 1.0, "lr": 0.5}, "min_lr must be at most lr"),
        ({"lr": math.nan}, "lr must be > 0"),
        ({"text_drop": math.nan}, "text_drop must be between"),
        ({"warmup": -1}, "warmup must be at least 0"),
    ],
)
def test_values_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**options)


# Options in general


@dataclass(frozen=True)
class Part:
    name: str = option("x", "of the part")
    share: float | None = option(None, "of the whole")


@dataclass(frozen=True)
class Whole:
    parts: tuple[str | Part, ...] = option((), "names or parts")
    sizes: tuple[int, ...] = option((1, 2), "two")
    fast: bool = option(False, "or slow")
    deep: Part | None = option(None, "inside")  # noqa: RUF009


def test_dataclasses_inside_go_there_and_back():
    options = {"parts": ["a", {"name": "b", "share": 1}], "sizes": [3], "fast": True, "deep": {"name": "c"}}
    whole = from_options(Whole, options, "file")
    assert whole == Whole(("a", Part("b", 1.0)), (3,), True, Part("c"))
    assert from_options(Whole, to_options(whole), "file") == whole


def test_errors_inside_say_where():
    with pytest.raises(ValueError, match=r"file: parts\[1\]: unknown key 'nam' \(nearest: 'name'\)"):
        from_options(Whole, {"parts": ["a", {"nam": "b"}]}, "file")
    with pytest.raises(ValueError, match=r"parts\[0\] must be a text or a mapping of name, share, got a number, 1.5"):
        from_options(Whole, {"parts": [1.5]}, "file")


def test_the_command_line_has_every_field_and_returns_those_given():
    parser = argparse.ArgumentParser()

    @dataclass(frozen=True)
    class Flat:
        parts: tuple[str, ...] = option((), "names")
        sizes: tuple[int, ...] = option((1, 2), "two")
        fast: bool = option(False, "or slow")
        rate: float | None = option(None, "a second")

    Flat.__annotations__.update(parts=tuple[str, ...], sizes=tuple[int, ...], fast=bool, rate=float | None)
    add_options(parser, Flat)
    assert vars(parser.parse_args([])) == {}
    given = parser.parse_args(["--parts", "a", "b", "--sizes", "3", "--no-fast", "--rate", "2"])
    assert vars(given) == {"parts": ["a", "b"], "sizes": [3], "fast": False, "rate": 2.0}
    assert "(default 1 2)" in parser.format_help()


def test_command_line_wins_over_the_file(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("lumos.train.train", lambda config: seen.append(config) or pytest.skip.Exception)
    path = file(tmp_path, "data: [a]\nsteps: 5\noverwrite: true\nlr: 1.0e-3\n")
    with pytest.raises(AttributeError):  # the summary is none
        main(["train", "--config", str(path), "--steps", "9", "--no-overwrite"])
    [config] = seen
    assert (config.steps, config.overwrite, config.lr) == (9, False, 1e-3)


def test_a_bad_file_is_one_line_and_exit_2(tmp_path, capsys):
    assert main(["train", "--config", str(file(tmp_path, "lrr: 1")), "--data", "x"]) == 2
    assert capsys.readouterr().err.strip().endswith("unknown key 'lrr' (nearest: 'lr')")
    assert main(["train", "--config", str(tmp_path / "absent.yaml")]) == 2
    assert "absent.yaml" in capsys.readouterr().err


# Schedule


def rates(**options):
    config = TrainConfig(lr=2.0, **options)
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=config.lr)
    schedule = make_schedule(optimizer, config)
    seen = []
    for _ in range(config.steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_learning_rate_rises_and_stays():
    assert rates(steps=6, warmup=4) == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert rates(steps=2, warmup=0) == [2.0, 2.0]


def test_the_learning_rate_falls_in_a_line_to_min_lr_at_the_last_step():
    got = rates(steps=6, warmup=2, schedule="linear", min_lr=0.4)
    assert got == pytest.approx([1.0, 2.0, 1.6, 1.2, 0.8, 0.4])


def test_the_learning_rate_falls_in_half_a_cosine():
    got = rates(steps=6, warmup=2, schedule="cosine", min_lr=0.4)
    want = [1.0, 2.0] + [0.4 + 1.6 * (1 + math.cos(math.pi * done / 4)) / 2 for done in (1, 2, 3, 4)]
    assert got == pytest.approx(want)
    assert got[-1] == pytest.approx(0.4)


def test_a_schedule_goes_on_from_its_state():
    config = TrainConfig(steps=10, warmup=3, schedule="cosine", lr=2.0)

    def run(first, last, state=None):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
        schedule = make_schedule(optimizer, config)
        if state is not None:
            optimizer.load_state_dict(state[0])
            schedule.load_state_dict(state[1])
        seen = []
        for _ in range(first, last):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return seen, (optimizer.state_dict(), schedule.state_dict())

    whole, _ = run(0, 10)
    before, state = run(0, 4)
    after, _ = run(4, 10, state)
    assert before + after == whole


def test_a_warm_up_longer_than_the_run_and_one_of_its_length_work():
    assert lr_factor(TrainConfig(steps=2, warmup=10), 1) == 0.2
    assert rates(steps=3, warmup=3, schedule="cosine") == pytest.approx([2 / 3, 4 / 3, 2.0])
