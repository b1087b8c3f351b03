"""lumos/data/: official pickles and forged ones, packing."""

import contextlib
import json
import os
import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumos.data import (
    OfficialDataset,
    Sample,
    collate,
    read_official_sample,
)
from lumos.data.pickles import read_plain
from lumos_kernels.layout import FrameLayout
from tests.documents import document, official

OPCODES = (
    *(pickle.MARK, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS, pickle.EMPTY_LIST),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.MEMOIZE, pickle.BINPUT, pickle.BINGET),
    *(pickle.SHORT_BINUNICODE, pickle.EMPTY_DICT, pickle.STOP),
)
FILES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_official_sample(tmp_path, protocol):
    path = tmp_path / "0.pkl"
    path.write_bytes(pickle.dumps(official(), protocol))
    sample = read_official_sample(path)
    begin = sample.ids.tolist().index(9004)
    assert torch.equal(sample.ids, document())
    assert (sample.labels[:begin] == -100).all()
    assert torch.equal(sample.labels[begin:], sample.ids[begin:])
    assert (sample.id, sample.seconds, sample.fps, sample.frames, sample.rows, sample.cols) == (7, 1, 4, 2, 4, 8)
    assert sample.source == str(path)


def test_cut_and_dropped_samples_keep_their_labels(tmp_path):
    path = tmp_path / "0.pkl"
    path.write_bytes(pickle.dumps(official(document(7, seconds=6))))
    cut = read_official_sample(path).cut(4, 2, {8: [16407], 4: [16403, 16403]})
    assert (cut.frames, cut.seconds, cut.fps, cut.id, cut.source) == (3, 2, 4, 7, str(path))
    assert cut.ids[:8].tolist() == [0, 16500, 16407, 16501, 16403, 16403, 8710, 9004]
    assert cut.labels[:7].tolist() == [-100] * 7
    assert torch.equal(cut.labels[7:], cut.ids[7:])
    bare = cut.without_text()
    assert torch.equal(bare.ids, cut.ids[7:])
    assert torch.equal(bare.labels, bare.ids)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_do_not_execute(tmp_path):
    bait, path = tmp_path / "executed", tmp_path / "evil.pkl"
    payloads = [pickle.dumps(official() | {"id": Evil(bait)}, protocol) for protocol in range(6)]
    payloads.append(b"cos\nmkdir\n(V" + str(bait).encode() + b"\ntR.")
    payloads.append(b"(V" + str(bait).encode() + b"\nios\nmkdir\n.")
    for payload in payloads:
        path.write_bytes(payload)
        with pytest.raises(ValueError, match=r"evil\.pkl is not a pickle of dicts, lists, ints and strings only"):
            read_official_sample(path)
        assert not bait.exists()
    pickle.loads(payloads[4])  # the bait works
    assert bait.exists()


@pytest.mark.parametrize("value", [1.5, (1,), b"x", None, True, {1, 2}, np.int64(1), 2**70, "1", [1], {}])
def test_other_types_are_refused(tmp_path, value):
    content = official()
    content["token"][3] = value
    (tmp_path / "0.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"0\.pkl"):
        read_official_sample(tmp_path / "0.pkl")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a dict"),
        ({"token": []}, "expected a dict"),
        (official(token="0 1"), "token must be a list of ids"),
        (official(label=[-100]), "label must hold"),
        (official(label=[5] * len(document())), "label must hold"),
        (official(token=[129536] + [0] * 9), "token must be a list of ids"),
        (official(id="7"), "id must be an integer"),
        (official(document()[:-20]), "video end"),
    ],
)
def test_what_is_wrong_with_an_official_sample(tmp_path, content, message):
    (tmp_path / "0.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=rf"0\.pkl: .*{message}"):
        read_official_sample(tmp_path / "0.pkl")


@settings(FILES, max_examples=150)
@given(st.data())
def test_damaged_pickles_give_samples_or_named_errors(tmp_path, data):
    content = bytearray(pickle.dumps(official(), data.draw(st.sampled_from((2, 4)))))
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.just(len(content)) | st.integers(0, len(content))) :]
    (tmp_path / "0.pkl").write_bytes(content)
    try:
        sample = read_official_sample(tmp_path / "0.pkl")
    except ValueError as error:
        if "0.pkl" not in str(error):
            raise
        return
    FrameLayout.from_tokens(sample.ids[None], check=True)
    assert len(sample.labels) == len(sample.ids)


def test_a_forged_memo_index_allocates_nothing(tmp_path):
    content = pickle.dumps(official(), 2)
    at = content.index(pickle.BINPUT)
    forged = content[:at] + pickle.LONG_BINPUT + b"\xff\xff\xff\xff" + content[at + 2 :]
    (tmp_path / "0.pkl").write_bytes(forged)
    assert read_official_sample(tmp_path / "0.pkl").id == 7


def test_official_dataset(tmp_path):
    (tmp_path / "files").mkdir()
    entries = []
    for number, frames in enumerate((2, 7, 1)):
        content = official(document(frames, seed=number), id=number)
        (tmp_path / "files" / f"{number}.pkl").write_bytes(pickle.dumps(content))
        entries.append({"file": f"files/{number}.pkl", "len": len(content["token"]), "id": number})
    index = tmp_path / "merge-record.json"
    index.write_text(json.dumps(entries))
    dataset = OfficialDataset(index)
    assert [sample.id for sample in dataset] == [0, 1, 2]
    assert [sample.frames for sample in dataset] == [2, 7, 1]
    other = tmp_path / "elsewhere.json"
    other.write_text(json.dumps([entry | {"file": entry["file"][6:]} for entry in entries]))
    assert OfficialDataset(other, root=tmp_path / "files")[1].id == 1
    index.write_text(json.dumps([entries[0] | {"len": 5}]))
    with pytest.raises(ValueError, match=r"0\.pkl holds 91 tokens, .*merge-record\.json says 5"):
        OfficialDataset(index)[0]
    for wrong in ("{", "[1]", '[{"file": "a"}]', "3"):
        index.write_text(wrong)
        with pytest.raises(ValueError, match=r"merge-record\.json"):
            OfficialDataset(index)


def test_collate():
    samples = [Sample.from_ids(document(n, seed=n)) for n in (1, 3, 2)]
    batch = collate(samples)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == np.cumsum([0] + [len(s.ids) for s in samples]).tolist()
    for place, sample in enumerate(samples):
        begin, end = batch.cu_seqlens[place : place + 2].tolist()
        assert torch.equal(batch.input_ids[begin:end], sample.ids)
    layout = FrameLayout.from_tokens(batch.input_ids, batch.cu_seqlens, check=True)
    assert (layout.num_documents, layout.num_frames) == (3, 3)
    assert torch.equal(collate([s.ids for s in samples]).input_ids, batch.input_ids)
    with pytest.raises(ValueError, match="samples is empty"):
        collate([])


def plain(value):
    """A value with arrays as lists again."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list):
        return [plain(item) for item in value]
    return {key: plain(item) for key, item in value.items()} if isinstance(value, dict) else value


VALUES = st.recursive(
    st.integers(-(2**40), 2**40) | st.sampled_from((0, 255, 256, 65535, 65536, -1, -100)) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=12)
        | st.lists(st.sampled_from((7, 300, 70000)), max_size=12)
        | st.dictionaries(st.integers(-3, 70000) | st.text(max_size=3), inner, max_size=6)
    ),
    max_leaves=40,
)


@settings(max_examples=300, deadline=None)
@given(value=VALUES, protocol=st.integers(2, 5), shared=...)
def test_plain_pickles_agree_with_the_standard_loader(value, protocol, shared: bool):
    value = [value, value] if shared else value
    assert plain(read_plain(pickle.dumps(value, protocol))) == value


@pytest.mark.parametrize("count", [1, 3, 4, 5, 127, 128, 133, 1000, 1001, 5000])
def test_runs_of_integers(count):
    """Around the lengths at which the reader looks further ahead, and at which the standard writer begins a batch."""
    for number in (7, 300, 70000, -100):
        row = [1] * 3 + [number] * count + [2, 70000, 3]
        found = read_plain(pickle.dumps({"a": row, 5: number, number: 1}, 4))
        assert plain(found) == {"a": row, 5: number, number: 1}
        assert isinstance(found["a"], np.ndarray)


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from([op[0] for op in OPCODES] + [0, 1, 2, 46]), max_size=40).map(bytes))
def test_any_program_of_opcodes_gives_a_value_or_a_value_error(program):
    for whole in (program, b"](" + program + b"e."):
        with contextlib.suppress(ValueError):
            read_plain(whole)


def test_a_run_of_integers_is_as_many_values():
    four = b"K\x01K\x02K\x03K\x04"
    assert read_plain(four + b".") == 4
    for program in (b"]" + four + b"a.", b"}" + four + b"s."):  # the third value is no list, the second no dict
        with pytest.raises(ValueError, match=r"expected a (list|dict)"):
            read_plain(program)


def test_memo_places_and_lone_surrogates():
    assert read_plain(b"}q\x07X\x01\x00\x00\x00aq\x03h\x03s.") == {"a": "a"}
    assert read_plain(pickle.dumps("\ud800", 4)) == "\ud800"


def test_values_that_hold_themselves_are_refused():
    loop = [1]
    loop.append(loop)
    with pytest.raises(ValueError, match="deeper than"):
        read_plain(pickle.dumps(loop))


def test_what_is_referred_to_often_is_made_once():
    value = []
    for _ in range(40):
        value = [value, value]
    read_plain(pickle.dumps(value))  # 2^40 lists if each reference were followed
