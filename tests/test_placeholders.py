"""lumos/placeholders.py and DataSource.numbers: what training makes of the placeholders in official texts."""

import json
import logging

import numpy as np
import pytest
import torch
import yaml
from training import preset, tiny_model, trainer, write_samples

from lumos.cli import main
from lumos.data import DataSource, OfficialDataset, Sample, SampleFolder, convert
from lumos.tokens import read_numbers
from lumos.train import TrainConfig
from lumos.train.batches import PackedBatches, open_sources
from lumos.train.recipes import recipe_names
from lumos.train.resume import differing_options
from tests.documents import document, write_official

RANDOM = np.random.default_rng(0)
CLASSES = (65536, 129536)
# Texts of write_official: 16500, pictures, 16501, fps; the first two samples are 7 s at 4 fps, the last an image.
VIDEO, IMAGE = [16500, 16401, 16407, 16501, 16403], [16500, 16400, 16501, 16400]


def texts(path, **options):
    """The texts that training sees, of all samples behind a path, in their order."""
    source = DataSource(path, **options)
    samples = source.open()
    for at in range(len(samples)):
        shape = source.prepared_shape(samples.describe(at), np.random.default_rng(0))
        ids = source.prepare(samples[at], np.random.default_rng(0))
        assert Sample.from_ids(ids).shape.length == shape.length
        yield ids[1 : shape.text_tokens - 1].tolist()


@pytest.fixture
def official(tmp_path):
    """Every path by which official samples reach training."""
    write_official(tmp_path)
    (tmp_path / "meta.yaml").write_text("META: [{path: merge-record.json}]")
    lines = json.loads((tmp_path / "merge-record.json").read_text())
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    convert([tmp_path / "merge-record.json"], tmp_path / "folder", progress=False)
    return tmp_path


PATHS = ["merge-record.json", "lines.jsonl", "meta.yaml", "folder"]


@pytest.mark.parametrize("name", PATHS)
def test_placeholders_become_digits_unless_told_otherwise(official, name):
    path = official / name
    assert list(texts(path)) == list(texts(path, numbers="digits")) == [VIDEO, VIDEO, IMAGE]
    kept = [16500, 65539, 16501, 65540]
    for none in ("none", None):
        assert list(texts(path, numbers=none)) == [kept] * 3
    table = {28: [20000], 4: [20001], 1: [20002, 20003]}
    (official / "numbers.json").write_text(json.dumps(table))
    for own in (table, {str(key): tuple(ids) for key, ids in table.items()}, official / "numbers.json"):
        assert list(texts(path, numbers=own))[1:] == [
            [16500, 20000, 16501, 20001],
            [16500, 20002, 20003, 16501, 20002, 20003],
        ]


def test_one_sample_and_a_cut_one(official):
    assert list(texts(official / "files" / "1.pkl")) == [VIDEO]
    assert list(texts(official / "files" / "1.pkl", fps=4, seconds=2)) == [[16500, 16407, 16501, 16403]]


@pytest.mark.parametrize("name", PATHS)
def test_a_run_trains_on_no_visual_id_in_a_text(official, name):
    for data, there in (((official / name,), False), ((f"{official / name},numbers=none",), True)):
        config = TrainConfig(data=data, documents=3, text_drop=0.0)
        batches = PackedBatches(open_sources(config.data), config, CLASSES)
        [stream] = batches.next_plan()
        ids = batches.load(stream).masked.input_ids.flatten().tolist()
        begin = [at for at, i in enumerate(ids) if i == 0]
        starts = [at for at, i in enumerate(ids) if i == 9004]
        text = [i for a, b in zip(begin, starts, strict=True) for i in ids[a:b]]
        assert any(i >= 65536 for i in text) == there


def test_the_folder_of_converted_samples_keeps_them(official):
    before, after = OfficialDataset(official / "merge-record.json"), SampleFolder(official / "folder")
    assert all(torch.equal(a.ids, b.ids) for a, b in zip(before, after, strict=True))
    assert after.has_placeholders()
    assert not SampleFolder(write_samples(official / "own")).has_placeholders()


@pytest.mark.parametrize("numbers", ["auto", "digits", {1: [16400], 4: [16403]}])
@pytest.mark.parametrize("stray", [65536, 65538, 70000, 129535])
@pytest.mark.parametrize("options", [{}, {"fps": 4, "seconds": 1}])
def test_other_visual_ids_in_a_text_are_refused(numbers, stray, options):
    ids = document(2, text=(16500, 65540, 16501))
    ids[3] = stray
    sample = Sample.from_ids(ids, source="clip 7")
    with pytest.raises(ValueError, match=rf"clip 7: token 3, before .* is {stray}, .*visual range.*numbers=none"):
        DataSource("p", numbers=numbers, **options).prepare(sample, RANDOM)
    kept = DataSource("p", numbers="none").prepare(sample, RANDOM)
    assert torch.equal(kept, ids)


def test_texts_without_placeholders_need_no_number():
    sample = Sample.from_ids(document(2, text=(16500,)))
    for numbers in ("auto", None, {5: [1]}):
        source = DataSource("p", numbers=numbers)
        assert torch.equal(source.prepare(sample, RANDOM), sample.ids)
        assert source.prepared_shape(sample.shape, RANDOM) == sample.shape


def test_a_table_that_lacks_a_number_is_named():
    sample = Sample.from_ids(document(2, text=(65539,)))
    source = DataSource("p", numbers={9: [1]})
    with pytest.raises(ValueError, match="numbers has no ids for 4"):
        source.prepare(sample, RANDOM)
    with pytest.raises(ValueError, match="numbers has no ids for 4"):
        source.prepared_shape(sample.shape, RANDOM)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ("", "numbers must be 'auto', 'digits', 'none', a table or a path"),
        (3, "numbers must be"),
        (True, "numbers must be"),
        ({"x": [1]}, "numbers is no table of numbers: 'x' is no whole number"),
        ({True: [1]}, "True is no whole number"),
        ({3: [65536]}, "the ids of number 3 must be a list of text ids"),
        ({3: []}, "the ids of number 3"),
        ({3: "16400"}, "the ids of number 3"),
    ],
)
def test_bad_numbers_are_named(numbers, message):
    with pytest.raises(ValueError, match=message):
        DataSource("p", numbers=numbers)


# Where numbers are told


def test_every_entry_has_the_default(tmp_path):
    recipe = {"init": "c"}
    for name in recipe_names():
        data = ["videos=v", "images=i,numbers=none"] if "joint" in name else ["d"]
        sources = TrainConfig.load(recipe=name, data=data, **recipe).data
        assert [source.numbers for source in sources] == (["auto", None] if "joint" in name else ["auto"])
    assert TrainConfig(data=("p",)).data == (DataSource("p"),)
    assert TrainConfig(data=("p,numbers=none",)).data == (DataSource("p", numbers=None),)
    assert open_sources([write_samples(tmp_path / "own")])[0][0].numbers == "auto"


@pytest.mark.parametrize("numbers", ["auto", "digits", None, "table.json", {12: [16400, 16401]}])
def test_what_is_written_is_read_back(tmp_path, numbers):
    config = TrainConfig(data=(DataSource("p", numbers=numbers),))
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    assert TrainConfig.from_dict(config.to_dict()) == config
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert TrainConfig.load(tmp_path / "train.yaml") == config
    assert differing_options(json.loads(json.dumps(config.to_dict())), config) == []


def test_help_names_the_option(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    assert "numbers=" in capsys.readouterr().out


# Runs from before the default


def saved(config, numbers):
    """The options of a run as an earlier version wrote them."""
    options = json.loads(json.dumps(config.to_dict()))
    for source in options["data"]:
        if numbers == "absent":
            del source["numbers"]
        else:
            source["numbers"] = numbers
    return options


@pytest.mark.parametrize("numbers", [None, "absent", "digits"])
def test_the_same_command_continues_where_texts_have_no_placeholders(tmp_path, numbers):
    folder = write_samples(tmp_path / "own")
    for path in (folder, tmp_path / "own"):
        config = TrainConfig(data=(DataSource(path),))
        assert differing_options(saved(config, numbers), config) == []
    other = saved(config, numbers)
    other["data"][0]["weight"] = 2.0
    assert [text.split(" ")[0] for text in differing_options(other, config)] == ["data"]


@pytest.mark.parametrize("name", PATHS)
def test_a_run_that_kept_placeholders_is_not_changed_silently(official, name):
    config = TrainConfig(data=(official / name,))
    for numbers in (None, "absent"):
        [text] = differing_options(saved(config, numbers), config)
        assert text.startswith("data was ")
        assert text.endswith("null is what numbers=none keeps")
        as_it_was = TrainConfig(data=(f"{official / name},numbers=none",))
        assert differing_options(saved(config, numbers), as_it_was) == []
    assert differing_options(saved(config, "digits"), config) == []
    assert differing_options(saved(config, "auto"), TrainConfig(data=(f"{official / name},numbers=digits",))) == []
    gone = TrainConfig(data=(official / "gone",))
    assert len(differing_options(saved(gone, None), gone)) == 1


def test_a_run_of_the_old_default_goes_on(tmp_path, caplog):
    options = {"data": (write_samples(tmp_path / "own"),), "out": str(tmp_path / "run"), "checkpoint_every": 1}
    with preset(tiny_model()):
        trainer(**options, steps=1).run()
        for file in (tmp_path / "run" / "train.json", *(tmp_path / "run" / "state").glob("*/run.json")):
            content = json.loads(file.read_text())
            for source in content.get("config", content)["data"]:
                source["numbers"] = None
            file.write_text(json.dumps(content))
        with caplog.at_level(logging.WARNING):
            run = trainer(**options, steps=2)
            run.run()
    assert run.step == 2
    assert "numbers" not in caplog.text


def test_digits_are_the_published_table():
    table = read_numbers("digits")
    assert (list(table[0]), list(table[24]), len(table)) == ([16399], [16401, 16403], 198**2 + 1)
