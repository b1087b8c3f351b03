"""bench/data_loading.py: every way reads every sample, and an index of many samples is what it says."""

import json

import numpy as np

from bench import data_loading
from lumos.data import SampleFolder, convert
from lumos.data.index import INDEX
from tests.documents import write_official


def test_every_way_is_timed_and_written_down(tmp_path, capsys):
    write_official(tmp_path)
    index = str(tmp_path / "merge-record.json")
    data_loading.main([index, "--rounds", "2", "--open", "3000", "--out", str(tmp_path / "results")])
    [result] = (tmp_path / "results").glob("*_data-loading.json")
    result = json.loads(result.read_text())
    assert [row["way"] for row in result["load"]][:1] == ["official"]
    assert all(row["ms"] > 0 for row in result["load"])
    [ours] = [row for row in result["load"] if row["way"] == "sample folder"]
    assert ours["times_ours"] == 1
    assert result["folder_mb"] == 4 * result["tokens"] / 1e6
    assert (result["open"]["samples"], result["open"]["index_mb"]) == (3000, (64 + 3000 * 72) / 1e6)
    shown = capsys.readouterr().out
    assert "| sample folder |" in shown
    assert "3,000 samples" in shown


def test_a_grown_folder_is_a_folder_of_so_many_samples(tmp_path, monkeypatch):
    write_official(tmp_path)
    convert([tmp_path / "merge-record.json"], tmp_path / "out", progress=False)
    first = SampleFolder(tmp_path / "out")[0]
    monkeypatch.setattr(data_loading, "_CHUNK", 7)
    data_loading.grow(tmp_path / "out", 50)
    dataset = SampleFolder(tmp_path / "out")
    assert len(dataset) == 50
    assert all(np.array_equal(dataset[at].ids, first.ids) for at in (0, 6, 7, 49))
    assert (tmp_path / "out" / INDEX).stat().st_size == 64 + 50 * 72
