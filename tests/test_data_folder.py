"""lumos/data/folder.py and index.py: what lies in the files, crashes at every byte, damage, size and cost."""

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumos.data import SampleFolder, SampleWriter, Shape, open_samples
from lumos.data.folder import sample_key
from lumos.data.index import HEADER, RECORD
from tests.documents import document

FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SHARD = "tokens-00000.bin"


def add(writer, seed):
    return writer.add(document(seed + 1, seed=seed), caption=f"clip {seed} é\n", source=f"{seed}.mp4", key=seed + 1)


def write_folder(folder, count=3, **options):
    with SampleWriter(folder, **options) as writer:
        for seed in range(count):
            add(writer, seed)
    return folder


def check_folder(folder, seeds):
    dataset = SampleFolder(folder)
    assert len(dataset) == len(seeds)
    for at, (sample, seed) in enumerate(zip(dataset, seeds, strict=True)):
        assert torch.equal(sample.ids, document(seed + 1, seed=seed))
        assert sample.ids.dtype == torch.int64
        assert (sample.caption, sample.source) == (f"clip {seed} é\n", f"{seed}.mp4")
        assert (sample.frames, sample.rows, sample.cols, sample.seconds, sample.fps) == (seed + 1, 4, 8, 1, 4)
        assert dataset.describe(at) == Shape.of(sample.ids) == sample.shape


def sizes(folder):
    return {file.name: file.stat().st_size for file in folder.iterdir()}


@pytest.mark.parametrize("options", [{}, {"batch": 2}, {"shard_tokens": 250}, {"shard_tokens": 1, "batch": 100}])
def test_round_trip(tmp_path, options):
    folder = tmp_path / "new" / "folder"
    check_folder(write_folder(folder, **options), [0, 1, 2])
    with SampleWriter(folder, **options) as writer:
        returned = add(writer, 3)
    check_folder(folder, [0, 1, 2, 3])
    dataset = SampleFolder(folder)
    assert torch.equal(dataset[-1].ids, returned.ids)
    assert torch.equal(dataset[np.int64(1)].ids, dataset[1].ids)
    for at in (4, -5):
        with pytest.raises(IndexError):
            dataset[at]


def test_what_lies_in_the_files(tmp_path):
    write_folder(tmp_path, shard_tokens=250)
    rows = [document(seed + 1, seed=seed).tolist() for seed in range(3)]
    assert [len(row) for row in rows] == [51, 91, 131]
    for name, ids in ((SHARD, rows[0] + rows[1]), ("tokens-00001.bin", rows[2])):
        assert (tmp_path / name).read_bytes() == struct.pack(f"<{len(ids)}I", *ids)
    notes = [json.loads(line) for line in (tmp_path / "notes.jsonl").read_text().splitlines()]
    assert notes == [{"caption": f"clip {seed} é\n", "source": f"{seed}.mp4"} for seed in range(3)]
    assert RECORD.itemsize == 72
    index = (tmp_path / "index.bin").read_bytes()
    assert index[: len(HEADER)] == HEADER
    records = np.frombuffer(index[len(HEADER) :], RECORD)
    assert records["shard"].tolist() == [0, 0, 1]
    assert records["offset"].tolist() == [0, 51, 0]
    assert records["key"].tolist() == [1, 2, 3]


def test_ids_and_labels(tmp_path):
    ids = document()
    begin = ids.tolist().index(9004)
    labels = torch.where(torch.arange(len(ids)) < begin, -100, ids)
    with SampleWriter(tmp_path) as writer:
        for number in (None, 0, -(2**63), 2**63 - 1):
            writer.add(ids, labels=labels, id=number)
        with pytest.raises(ValueError, match="id must fit 64 bits"):
            writer.add(ids, id=2**63)
        for at, value in ((begin - 1, int(ids[begin - 1])), (begin, -100), (len(ids) - 1, -100)):
            other = labels.clone()
            other[at] = value
            with pytest.raises(ValueError, match=rf"labels\[{at}\] is {value}, but a folder of samples only knows"):
                writer.add(ids, labels=other)
        with pytest.raises(ValueError, match="labels must be one a token"):
            writer.add(ids, labels=labels[:-1])
    assert [sample.id for sample in SampleFolder(tmp_path)] == [None, 0, -(2**63), 2**63 - 1]


def test_data_workers_get_no_copy(tmp_path):
    write_folder(tmp_path, count=9)
    dataset = SampleFolder(tmp_path)
    assert len(dataset[0].ids)
    assert len(pickle.dumps(dataset)) < 600
    copy = pickle.loads(pickle.dumps(dataset))
    with SampleWriter(tmp_path) as writer:
        add(writer, 9)
    assert len(copy) == 9
    assert torch.equal(copy[2].ids, dataset[2].ids)
    with pytest.raises(IndexError):
        copy[9]


def test_notes_are_read_only_where_wanted(tmp_path):
    write_folder(tmp_path)
    dataset = open_samples(tmp_path)
    (tmp_path / "notes.jsonl").write_bytes(b"x" * (tmp_path / "notes.jsonl").stat().st_size)
    assert (dataset[1].caption, dataset[1].source) == ("", "")
    with pytest.raises(ValueError, match=r"notes\.jsonl, sample 1"):
        SampleFolder(tmp_path)[1]


def test_an_empty_folder(tmp_path):
    write_folder(tmp_path, count=0)
    assert len(SampleFolder(tmp_path)) == 0
    check_folder(write_folder(tmp_path), [0, 1, 2])


def test_ten_million_samples_open_at_once(tmp_path):
    """Over records that are holes in the file but for the last of each shard: opening must not pass over them."""
    write_folder(tmp_path, shard_tokens=200)
    records = np.frombuffer((tmp_path / "index.bin").read_bytes()[len(HEADER) :], RECORD)
    count, last = 10**7, records[1].copy()
    assert records["shard"].tolist() == [0, 0, 1]
    with open(tmp_path / "index.bin", "r+b") as file:
        file.truncate(len(HEADER) + count * RECORD.itemsize)
        # What bisection meets: records of shard 0 with their end in reach.
        for at in (*(count >> n for n in range(1, 24)), *(count - (count >> n) - 1 for n in range(1, 24)), count - 2):
            file.seek(len(HEADER) + at * RECORD.itemsize)
            file.write(last.tobytes())
        file.seek(-RECORD.itemsize, os.SEEK_END)
        file.write(records[2].tobytes())
    tracemalloc.start()
    begin = time.perf_counter()
    dataset = SampleFolder(tmp_path)
    seconds, (_, peak) = time.perf_counter() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == count
    assert dataset.describe(count - 1).frames == 3
    assert seconds < 1
    assert peak < 1e6
    assert len(pickle.dumps(dataset)) < 600


@FILES
@given(st.data())
@pytest.mark.filterwarnings("ignore:.*torn")
def test_a_crash_costs_at_most_the_unfinished_sample(tmp_path, data):
    """Each file may have lost any part of what the last sample wrote, the index also to zeros."""
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    options = {"shard_tokens": data.draw(st.sampled_from((1, 200, 10**6)))}
    write_folder(folder, 2, **options)
    before = sizes(folder)
    with SampleWriter(folder, **options) as writer:
        add(writer, 2)
    whole = True
    for name, size in sizes(folder).items():
        keep = data.draw(st.just(size) | st.integers(before.get(name, 0), size), label=name)
        os.truncate(folder / name, keep)
        whole &= keep == size
        if name == "index.bin" and data.draw(st.booleans()):
            os.truncate(folder / name, size)
            whole &= keep == size
    finished = [0, 1, 2] if whole else [0, 1]
    check_folder(folder, finished)
    with SampleWriter(folder, **options) as writer:
        assert [writer.has(key) for key in range(1, 5)] == [True, True, whole, False]
        add(writer, 3)
        assert writer.has(4)
    check_folder(folder, [*finished, 3])


def write_for_ever(folder):
    with SampleWriter(folder, batch=3, shard_tokens=400) as writer:
        while True:
            add(writer, len(SampleFolder(folder)) % 5)
            writer.flush()


@pytest.mark.filterwarnings("ignore:.*torn")
def test_killed_writers_lose_nothing_that_was_finished(tmp_path):
    SampleWriter(tmp_path).close()
    random, seen = np.random.default_rng(0), 0
    for _ in range(6):
        process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(tmp_path,))
        process.start()
        before = len(SampleFolder(tmp_path))
        while len(SampleFolder(tmp_path)) < before + 2:
            time.sleep(0.001)
        time.sleep(float(random.uniform(0, 0.02)))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        dataset = SampleFolder(tmp_path)
        assert len(dataset) > seen
        seen = len(dataset)
        check_folder(tmp_path, [at % 5 for at in range(seen)])


def test_zeros_for_a_whole_batch(tmp_path):
    write_folder(tmp_path, 2)
    size = (tmp_path / "index.bin").stat().st_size
    with SampleWriter(tmp_path, batch=5) as writer:
        for seed in range(2, 7):
            add(writer, seed)
    whole = (tmp_path / "index.bin").stat().st_size
    os.truncate(tmp_path / "index.bin", size + 40)
    os.truncate(tmp_path / "index.bin", whole)
    with pytest.warns(UserWarning, match=r"index\.bin is torn: samples 2 to 6 are left out"):
        check_folder(tmp_path, [0, 1])


def test_a_torn_token_file_is_announced(tmp_path):
    write_folder(tmp_path)
    os.truncate(tmp_path / SHARD, (tmp_path / SHARD).stat().st_size - 2)
    with pytest.warns(UserWarning, match=r"index\.bin is torn: the last sample, 2, is left out"):
        SampleFolder(tmp_path)


@pytest.mark.parametrize(("shard", "tokens"), [(0, 10), (0, 141), (1, 0)])
def test_lost_samples_are_not_passed_over(tmp_path, shard, tokens):
    write_folder(tmp_path, 5, shard_tokens=300)
    os.truncate(tmp_path / f"tokens-0000{shard}.bin", 4 * tokens)
    for reader in (SampleFolder, SampleWriter):
        with pytest.raises(ValueError, match=rf"tokens-0000{shard}\.bin ends before sample \d of 5 does"):
            reader(tmp_path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.bin is missing"):
        SampleFolder(tmp_path)
    write_folder(tmp_path, 5, shard_tokens=300)
    (tmp_path / SHARD).unlink()
    with pytest.raises(ValueError, match=r"tokens-00000\.bin ends before"):
        SampleFolder(tmp_path)


def test_folders_of_earlier_versions_are_refused(tmp_path):
    (tmp_path / "index.jsonl").touch()
    for reader in (SampleFolder, SampleWriter):
        with pytest.raises(ValueError, match=r"index\.jsonl, the layout of earlier versions: tokenise into a new"):
            reader(tmp_path)
    assert sizes(tmp_path) == {"index.jsonl": 0}


def test_tokens_without_an_index_are_not_overwritten(tmp_path):
    (tmp_path / SHARD).write_bytes(b"somebody else's")
    with pytest.raises(ValueError, match=r"without index\.bin"):
        SampleWriter(tmp_path)
    assert (tmp_path / SHARD).read_bytes() == b"somebody else's"


@pytest.mark.parametrize("content", [b"", b"{}", HEADER[:-1], HEADER.replace(b"\1", b"\2"), b"\0" * 136])
def test_another_index_is_refused(tmp_path, content):
    (tmp_path / "index.bin").write_bytes(content)
    for reader in (SampleFolder, SampleWriter):
        with pytest.raises(ValueError, match=r"index\.bin is no index of samples of this version"):
            reader(tmp_path)
    assert (tmp_path / "index.bin").read_bytes() == content


def test_damaged_tokens_name_file_and_sample(tmp_path):
    write_folder(tmp_path)
    tokens = np.memmap(tmp_path / SHARD, "<u4", "r+")
    tokens[60] ^= 1
    tokens.flush()
    dataset = SampleFolder(tmp_path)
    assert [dataset[at].frames for at in (0, 2)] == [1, 3]
    for at in (1, -2):
        with pytest.raises(ValueError, match=r"tokens-00000\.bin, sample 1: the tokens are not those once written"):
            dataset[at]


@FILES
@given(st.data())
@pytest.mark.filterwarnings("ignore:.*torn")
def test_a_damaged_index_gives_samples_as_written_or_named_errors(tmp_path, data):
    folder = tmp_path / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder, shard_tokens=200)
    content = bytearray((folder / "index.bin").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans(), label="forged"):  # checksums that fit
        for at in range(len(HEADER), len(content), RECORD.itemsize):
            content[at + RECORD.itemsize - 4 : at + RECORD.itemsize] = struct.pack(
                "<I", zlib.crc32(content[at : at + RECORD.itemsize - 4])
            )
    (folder / "index.bin").write_bytes(content)
    try:
        dataset = SampleFolder(folder)
    except (ValueError, FileNotFoundError) as error:
        if "index.bin" not in str(error) and "tokens-" not in str(error) and "notes.jsonl" not in str(error):
            raise
        return
    for at in range(len(dataset)):
        try:
            ids = dataset[at].ids
        except (ValueError, FileNotFoundError) as error:
            if not any(name in str(error) for name in ("index.bin, sample", "tokens-", "notes.jsonl, sample")):
                raise
        else:
            assert any(torch.equal(ids, document(seed + 1, seed=seed)) for seed in range(3))


def test_writer_refuses_malformed_documents_and_stays_usable(tmp_path):
    with SampleWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="video end"):
            writer.add(document()[:-10])
        add(writer, 0)
    check_folder(tmp_path, [0])
    for options, message in (({"batch": 0}, "batch must be"), ({"shard_tokens": 0}, "shard_tokens must be")):
        with pytest.raises(ValueError, match=message):
            SampleWriter(tmp_path, **options)


def test_a_second_writer_is_refused(tmp_path):
    with SampleWriter(tmp_path) as one:
        with pytest.raises(ValueError, match="one writer a folder"):
            SampleWriter(tmp_path)
        add(one, 0)
    check_folder(tmp_path, [0])
    SampleWriter(tmp_path).close()


def test_records_come_after_what_they_describe(tmp_path, monkeypatch):
    order = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: order.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with SampleWriter(tmp_path, batch=2) as writer:
        order.clear()
        add(writer, 0)
        assert not order
        add(writer, 1)
    assert [os.path.basename(name) for name in order] == [SHARD, "notes.jsonl", "index.bin"]


def test_keys():
    assert sample_key("a", 1) == sample_key("a", "1")
    assert len({sample_key(*parts) for parts in (("a", 1), ("a1",), ("a", 1, ""), (1, "a"))}) == 4
    assert 0 < sample_key() < 2**64


def test_reading_makes_no_python_object_a_token(tmp_path):
    ids = document(40, 32, 56)
    with SampleWriter(tmp_path) as writer:
        writer.add(ids)
    dataset = open_samples(tmp_path)
    assert torch.equal(dataset[0].ids, ids)
    tracemalloc.start()
    dataset[0]
    allocated = sum(trace.count for trace in tracemalloc.take_snapshot().statistics("filename"))
    tracemalloc.stop()
    assert allocated < 500 < len(ids) / 100
