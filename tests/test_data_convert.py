"""lumos/data/convert.py: official samples copied without loss, refused by name, gone on with."""

import json
import pickle

import pytest
import torch

from lumos.cli import main
from lumos.data import OfficialDataset, SampleFolder, convert, open_samples
from tests.documents import document, official, write_official


def test_nothing_is_lost(tmp_path):
    write_official(tmp_path)
    summary = convert([tmp_path / "merge-record.json"], tmp_path / "out", progress=False)
    assert (summary.sources, summary.samples, summary.kept, summary.failures) == (3, 3, 0, ())
    before, after = OfficialDataset(tmp_path / "merge-record.json"), SampleFolder(tmp_path / "out")
    assert len(before) == len(after) == 3
    for at, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a.ids, b.ids)
        assert (a.id, a.source) == (b.id, b.source) == (at, str(tmp_path / "files" / f"{at}.pkl"))
        assert before.describe(at) == after.describe(at) == open_samples(tmp_path / "out").describe(at)
        labels = torch.where(torch.arange(len(b.ids)) < b.text_tokens, -100, b.ids)
        assert torch.equal(a.labels, labels)


def test_lists_and_single_files_in_order(tmp_path):
    write_official(tmp_path, frames=[1] * 10)
    (tmp_path / "list.yaml").write_text("META: [{path: merge-record.json, ratio: 0.35}]")
    chosen = [sample.id for sample in open_samples(tmp_path / "list.yaml")]
    last = next(number for number in range(10) if number not in chosen)
    inputs = [tmp_path / "list.yaml", tmp_path / "files" / f"{last}.pkl", tmp_path / "list.yaml"]
    summary = convert(inputs, tmp_path / "out", progress=False)
    assert [sample.id for sample in SampleFolder(tmp_path / "out")] == [*chosen, last]
    assert (summary.samples, summary.kept) == (4, 3)
    with pytest.raises(ValueError, match="out is not of the official form: it is a folder of samples already"):
        convert([tmp_path / "out"], tmp_path / "other", progress=False)
    with pytest.raises(FileNotFoundError, match=r"none\.json does not exist"):
        convert([tmp_path / "none.json"], tmp_path / "other", progress=False)


def test_what_a_folder_cannot_keep_is_refused_by_name(tmp_path):
    entries = write_official(tmp_path, frames=(2, 2, 2, 2, 2))
    ids = document(2)
    begin = ids.tolist().index(9004)
    contents = {
        1: official(ids, begin=begin + 3),  # the video's header is not predicted
        2: official(ids, begin=0),  # the text is
        3: official(ids[:-3]),
        4: official(torch.cat([ids, ids[-1:]])),  # another length than the index says
    }
    for number, content in contents.items():
        (tmp_path / "files" / f"{number}.pkl").write_bytes(pickle.dumps(content))
    (tmp_path / "index.json").write_text(json.dumps([*entries, {"file": "files/none.pkl", "len": 5, "id": 9}]))
    summary = convert([tmp_path / "index.json"], tmp_path / "out", progress=False)
    assert (summary.samples, len(SampleFolder(tmp_path / "out"))) == (1, 1)
    errors = {failure.source.rpartition("/")[2]: failure.error for failure in summary.failures}
    assert list(errors) == ["1.pkl", "2.pkl", "3.pkl", "4.pkl", "none.pkl"]
    assert f"labels[{begin}] is -100, but a folder of samples only knows" in errors["1.pkl"]
    assert "labels[0] is 0" in errors["2.pkl"]
    assert "video end" in errors["3.pkl"]
    assert f"holds {len(ids) + 1} tokens" in errors["4.pkl"]
    assert "No such file" in errors["none.pkl"]
    lines = (tmp_path / "out" / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line)["error"] for line in lines] == list(errors.values())
    (tmp_path / "index.json").write_text(json.dumps(entries[1:2]))
    with pytest.raises(ValueError, match=r"no sample could be made of 1 sources; .*1\.pkl: labels"):
        convert([tmp_path / "index.json"], tmp_path / "other", progress=False)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    write_official(tmp_path, frames=[2] * 9)
    index, out = tmp_path / "merge-record.json", tmp_path / "out"
    from lumos.data import convert as module

    real, count = module.__globals__["_read"], []

    def interrupted(file):
        count.append(file)
        if len(count) == 6:
            raise KeyboardInterrupt
        return real(file)

    monkeypatch.setitem(module.__globals__, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert([index], out, progress=False)
    assert len(SampleFolder(out)) == 5
    summary = convert([index], out, workers=1, progress=False)
    assert (summary.samples, summary.kept) == (4, 5)
    assert len(count) == 10
    assert [sample.id for sample in SampleFolder(out)] == list(range(9))


def test_workers_and_command_line(tmp_path, capsys):
    write_official(tmp_path, frames=[1, 2, 3, 1, 2, 3])
    assert main(["convert", str(tmp_path / "merge-record.json"), "--out", str(tmp_path / "out"), "--workers", "2"]) == 0
    assert "6 samples of 6 sources" in capsys.readouterr().out
    assert [(s.id, s.frames) for s in SampleFolder(tmp_path / "out")] == list(enumerate([1, 2, 3, 1, 2, 3]))
    assert main(["convert", str(tmp_path / "merge-record.json"), "--out", str(tmp_path / "out")]) == 0
    assert "0 samples of 6 sources, 0 tokens; 6 samples were there" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "none.json"), "--out", str(tmp_path / "out")]) == 2
    assert "none.json" in capsys.readouterr().err
