"""lumos/data/sources.py and official lists: what is opened, what is cut, and lengths known before a token is read."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumos.data import DataSource, OfficialMeta, Sample, SampleWriter, Shape, cut_video, open_samples
from lumos.tokens import parse_document, read_numbers
from tests.documents import document, official, write_official

FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def test_shape_of_a_document():
    ids = document(3, 4, 8, text=(16500, 65539, 65539, 16501, 65540), seconds=2, fps=4)
    assert Shape.of(ids) == Shape(7, 2, 4, 3, 4, 8, len(ids), (2, 1))
    assert len(ids) == 7 + 3 + 3 * (4 * 9 + 4) + 2
    bare = Sample.from_ids(ids).without_text().ids
    assert Shape.of(bare) == Shape(0, 2, 4, 3, 4, 8, len(ids) - 7)


def sources():
    return st.builds(
        DataSource,
        path=st.just("p"),
        fps=st.sampled_from((None, 1, 2, 4)),
        seconds=st.sampled_from((None, 1, 2, 3)),
        crop=st.sampled_from(("start", "random")),
        numbers=st.sampled_from((None, "digits")),
    )


@settings(max_examples=200, deadline=None)
@given(source=sources(), frames=st.integers(1, 12), marks=st.lists(st.sampled_from((16500, 65539, 65540))), seed=...)
def test_prepared_lengths_are_known_before(source, frames, marks, seed: int):
    seconds, fps = (1, 1) if frames == 1 else (4, 4)
    ids = document(frames, text=tuple(marks), seconds=seconds, fps=fps)
    draws = [np.random.default_rng(abs(seed)) for _ in range(2)]
    try:
        expected = source.prepared_shape(Shape.of(ids), draws[0])
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)):
            source.prepare(Sample.from_ids(ids), draws[1])
        return
    prepared = source.prepare(Sample.from_ids(ids), draws[1])
    shape = Shape.of(prepared)
    assert shape == (expected if source.numbers else Shape(*expected.__dict__.values()))
    assert shape.placeholders == ((0, 0) if source.numbers else (marks.count(65539), marks.count(65540)))
    assert draws[0].integers(2**60) == draws[1].integers(2**60)


def test_prepare_cuts_as_upstream_does():
    ids = document(22, seconds=7, fps=12)
    source = DataSource("p", fps=12, seconds=2, numbers="digits")
    random = np.random.default_rng(0)
    prepared = source.prepare(Sample.from_ids(ids), random)
    assert torch.equal(prepared, cut_video(ids, 12, 2, read_numbers("digits")))
    assert prepared[:8].tolist() == [0, 16500, 16401, 16403, 16501, 16400, 16401, 8710]
    image = document(1, seconds=1, fps=1)
    assert source.prepare(Sample.from_ids(image), random)[:7].tolist() == [0, 16500, 16400, 16501, 16400, 8710, 9004]


@pytest.mark.parametrize("step", [1, 2])
def test_random_windows(step):
    ids = document(13, seconds=4, fps=4 * step, text=())
    codes, source = parse_document(ids).codes, DataSource("p", fps=4, seconds=2, crop="random")
    span, starts = 2 * step + 1, set()
    for seed in range(200):
        cut = parse_document(source.prepare(Sample.from_ids(ids), np.random.default_rng(seed)))
        assert (cut.seconds, cut.fps, len(cut.codes)) == (2, 4, 3)
        start = next(j for j in range(13) if torch.equal(codes[j], cut.codes[0]))
        assert torch.equal(cut.codes, codes[start : start + span : step])
        starts.add(start)
    assert starts == set(range(13 - span + 1))


def test_a_document_that_is_too_short_is_named(tmp_path):
    sample = Sample.from_ids(document(2, seconds=4, fps=4), source="clip 3")
    random = np.random.default_rng(0)
    with pytest.raises(ValueError, match="clip 3: seconds: 2 s at 4 fps are 3 latent frames, the document has 2"):
        DataSource("p", fps=4, seconds=2).prepare(sample, random)
    with pytest.raises(ValueError, match="folder: fps 3 does not divide the document's 4"):
        DataSource("folder", fps=3).prepared_shape(Shape.of(sample.ids), random)
    (tmp_path / "numbers.json").write_text('{"3": [16402]}')
    with pytest.raises(ValueError, match="numbers has no ids for 16"):
        DataSource("p", numbers=tmp_path / "numbers.json").prepared_shape(Shape.of(sample.ids), random)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "path must name"),
        ({"path": 3}, "path must name"),
        ({"weight": 0}, "weight must be"),
        ({"weight": float("nan")}, "weight must be"),
        ({"weight": "1"}, "weight must be"),
        ({"fps": 0}, "fps must be"),
        ({"fps": 12.0}, "fps must be"),
        ({"seconds": 199}, "seconds must be"),
        ({"crop": "centre"}, "crop must be one of start, random"),
        ({"numbers": 3}, "numbers must be"),
    ],
)
def test_what_is_wrong_with_a_source(changes, message):
    with pytest.raises(ValueError, match=message):
        DataSource(**({"path": "p"} | changes))


def test_open_samples(tmp_path):
    entries = write_official(tmp_path)
    with SampleWriter(tmp_path / "folder") as writer:
        writer.add(document(3))
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, entries)) + "\n\n")
    (tmp_path / "list.yaml").write_text("META:\n  - path: merge-record.json\n    ratio: 1.0\n  - path: lines.jsonl\n")
    frames = {
        "folder": [3],
        "merge-record.json": [2, 7, 1],
        "lines.jsonl": [2, 7, 1],
        "list.yaml": [2, 7, 1, 2, 7, 1],
        "files/1.pkl": [7],
    }
    for name, expected in frames.items():
        dataset = DataSource(tmp_path / name).open()
        assert [dataset[i].frames for i in range(len(dataset))] == expected
        for at in range(-len(dataset), len(dataset)):
            assert dataset.describe(at) == Shape.of(dataset[at].ids)
        for at in (len(dataset), -len(dataset) - 1):
            with pytest.raises(IndexError):
                dataset[at]
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_samples(tmp_path / "nothing")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes\.txt is neither"):
        open_samples(tmp_path / "notes.txt")


def test_shapes_of_official_samples_are_read_once(tmp_path):
    write_official(tmp_path)
    dataset = open_samples(tmp_path / "merge-record.json")
    known = [dataset.describe(0), Shape.of(dataset[1].ids)]
    for number in (0, 1):
        (tmp_path / "files" / f"{number}.pkl").unlink()
    assert [dataset.describe(0), dataset.describe(1)] == known
    (tmp_path / "files" / "2.pkl").unlink()
    with pytest.raises(FileNotFoundError):
        dataset.describe(2)


def test_official_names_start_where_the_files_are(tmp_path, monkeypatch):
    entries = write_official(tmp_path / "data")
    index = tmp_path / "data" / "deep" / "er" / "merge-record.json"
    index.parent.mkdir(parents=True)
    index.write_text(json.dumps(entries))
    assert open_samples(index)[1].id == 1
    index.write_text(json.dumps([entry | {"file": f"work/data/{entry['file']}"} for entry in entries]))
    with pytest.raises(FileNotFoundError, match=r"merge-record\.json: work/data/files/0\.pkl is neither"):
        open_samples(index)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "work").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_samples(index)[2].id == 2


def test_ratio_of_a_meta_list(tmp_path):
    write_official(tmp_path, frames=[1] * 10)
    (tmp_path / "list.yaml").write_text("META: [{path: merge-record.json, ratio: 0.35, type: default}]")
    chosen = [sample.id for sample in OfficialMeta(tmp_path / "list.yaml")]
    assert len(set(chosen)) == 3
    assert chosen == [sample.id for sample in OfficialMeta(tmp_path / "list.yaml")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not YAML"),
        ("{a: b}", "must hold a list META"),
        ("META: []", "must hold a list META"),
        ("META: [3]", r"META\[0\] must be a mapping"),
        ("META: [{path: merge-record.json}, {ratio: 1}]", r"META\[1\] must be a mapping"),
        ("META: [{path: merge-record.json, share: 1}]", r"unknown keys \['share'\]"),
        ("META: [{path: merge-record.json, ratio: 1.5}]", "ratio must be above 0"),
        ("META: [{path: merge-record.json, ratio: true}]", "ratio must be above 0"),
        ("META: [{path: files/0.pkl}]", "must be a .json"),
        ("META: !!python/object/apply:os.mkdir [executed]", "is not YAML"),
    ],
)
def test_what_is_wrong_with_a_meta_list(tmp_path, monkeypatch, text, message):
    write_official(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"list\.yaml.*{message}"):
        open_samples(tmp_path / "list.yaml")
    assert not (tmp_path / "executed").exists()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(("file", "len", "META", "path")), inner)
    ),
    max_leaves=8,
)


@FILES
@given(content=st.binary(max_size=40) | _JSON.map(lambda value: json.dumps(value).encode()), kind=...)
def test_malformed_lists_give_named_errors(tmp_path, content, kind: bool):
    path = tmp_path / ("list.yaml" if kind else "list.json")
    path.write_bytes(content)
    try:
        dataset = open_samples(path)
        for at in range(len(dataset)):
            dataset[at]
    except (ValueError, OSError) as error:
        if path.name not in str(error) and "file" not in str(error):
            raise


def test_an_index_must_agree_with_its_files(tmp_path):
    entries = write_official(tmp_path)
    (tmp_path / "other.json").write_text(json.dumps([entries[0] | {"len": 5}]))
    with pytest.raises(ValueError, match=r"0\.pkl holds 91 tokens, .*other\.json says 5"):
        open_samples(tmp_path / "other.json")[0]
    (tmp_path / "files" / "0.pkl").write_bytes(pickle.dumps(official(label=[5])))
    with pytest.raises(ValueError, match=r"0\.pkl: label must hold"):
        open_samples(tmp_path / "merge-record.json").describe(0)
