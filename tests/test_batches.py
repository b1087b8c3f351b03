"""lumos/train/batches.py: the micro-batches of a run, on clips and images of many sizes."""

import itertools
import json
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.data import SampleFolder, SampleWriter
from lumos.data.packing import Bin
from lumos.data.sources import DataSource
from lumos.masking import MASK_KINDS, mask_tokens
from lumos.tokens import VIDEO_START, ByteTokenizer, build_document
from lumos.train import PackedBatches, TrainConfig
from lumos.train.batches import open_sources
from lumos_kernels import FrameLayout
from lumos_kernels.token_ids import MASK

CLASSES = (65536, 65536 + 64000)


def write_samples(folder, shapes, text="clip {}"):
    """One sample a shape (frames, rows, cols) at 4 fps, an image where it is one frame; codes tell sample and frame."""
    with SampleWriter(folder) as writer:
        for number, (frames, rows, cols) in enumerate(shapes):
            codes = torch.full((frames, rows, cols), number) + 1000 * torch.arange(frames)[:, None, None]
            seconds, fps = (1, 1) if frames == 1 else (frames - 1, 4)
            writer.add(build_document(ByteTokenizer().encode(text.format(number)), codes, seconds, fps))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    shapes = [(2 + n % 3, 4, 8) if n % 2 else (3, 8, 4) for n in range(7)]
    return write_samples(tmp_path_factory.mktemp("videos") / "tokens", shapes)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    shapes = [(1, *grid) for grid in ((4, 4), (4, 8), (8, 4), (8, 8))]
    return write_samples(tmp_path_factory.mktemp("images") / "tokens", shapes, "picture number {}")


def batches_of(*data, rank=0, ranks=1, **options) -> PackedBatches:
    return PackedBatches(open_sources(data), TrainConfig(**options), CLASSES, rank, ranks)


def steps(batches, count):
    """[count][micro_batches] micro-batches."""
    return [[batches.load(stream) for stream in batches.next_plan()] for _ in range(count)]


def same(a, b):
    tensors = [
        (a.masked.input_ids, b.masked.input_ids),
        (a.masked.labels, b.masked.labels),
        (a.masked.rows, b.masked.rows),
        (a.layout.cu_seqlens, b.layout.cu_seqlens),
        (a.layout.positions, b.layout.positions),
    ]
    return all(torch.equal(x, y) for x, y in tensors)


def all_same(first, second):
    return all(same(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))


def documents(batch):
    """Each document's ids with the masked slots' labels put back; masked new lines stay masked."""
    ids = torch.where(batch.masked.labels >= 0, batch.masked.labels, batch.masked.input_ids)
    return ids.split(batch.layout.cu_seqlens.diff().tolist())


PACKED = {"token_budget": 400, "micro_batches": 4, "look_ahead": 8, "text_drop": 0.3}


# What a stream holds


def test_a_stream_holds_whole_documents_of_all_sizes_as_the_dataset_gives_them(videos, images):
    batches = batches_of(videos, images, min_mask_rate=0.0, mask_schedule="pow0.01", **PACKED)
    datasets = SampleFolder(videos), SampleFolder(images)
    grids = set()
    for _ in range(10):
        plan = batches.next_plan()
        assert len(plan) == 4
        for stream in plan:
            batch = batches.load(stream)
            assert batch.num_tokens == stream.length <= 400
            assert batch.padding == 0
            found = documents(batch)
            assert len(found) == len(stream.documents)
            grids.add(len({len(ids) for ids in found}))
            for ids, draw in zip(found, stream.documents, strict=True):
                whole = datasets[draw.source][draw.sample].ids
                want = whole[len(whole) - len(ids) :]
                assert len(ids) == draw.length
                assert ids[0] == VIDEO_START or len(ids) == len(whole)
                assert torch.equal(ids[ids != MASK], want[ids != MASK])
    assert max(grids) > 2, "documents of several sizes must share a stream"


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_masks_are_those_of_each_document_alone(videos, images, kind):
    """Kind, schedule and rate reach mask_tokens, one grid a document, and each document is masked by its own seed."""
    options = {"mask_kind": kind, "mask_schedule": "linear", "min_mask_rate": 0.2, "given_frames": 1}
    batches = batches_of(videos, images, **PACKED, **options)
    plan = batches.next_plan()
    datasets = SampleFolder(videos), SampleFolder(images)
    probs = []
    for stream in plan:
        batch = batches.load(stream)
        for draw, ids, prob in zip(
            stream.documents,
            batch.masked.input_ids.split(batch.layout.cu_seqlens.diff().tolist()),
            batch.masked.mask_prob,
            strict=True,
        ):
            whole = datasets[draw.source][draw.sample].ids[-len(ids) :]
            layout = FrameLayout.from_tokens(whole[None])
            content = (ids == MASK)[layout.content].view(layout.num_frames, -1)
            given = min(1, layout.num_frames - 1)
            assert not content[:given].any()
            slots = content.shape[1] * (layout.num_frames - given if kind == "random" else 1)
            count = max(1, int(np.rint(np.float32(prob) * np.float32(slots))))
            if kind == "tube":
                assert (content[given:] == content[given]).all()
                assert content[given].sum() == count
            elif kind == "random":
                assert content.sum() == count
            elif kind == "tubeDecay":
                assert content[-1].all() or layout.num_frames - given == 1
                assert (content[given:].sum(1).diff() >= 0).all()
            else:
                assert content[given:].any(1).all()
            assert prob >= np.float32(0.2)
            probs.append(float(prob))
            other = mask_tokens(whole[None], seeds=[0], kind=kind, schedule="linear", min_rate=0.2, given_frames=given)
            assert draw.length < 60 or not torch.equal(other.input_ids[0], ids), "seeds must differ from place to place"
    assert min(probs) < 0.5, "the smallest rate must be the one asked for"


def test_targets_are_codes_of_the_model_s_classes(videos):
    batches = PackedBatches(open_sources([videos]), TrainConfig(min_mask_rate=1.0), (65536, 65540))
    labels = torch.cat([batch.masked.labels for step in steps(batches, 14) for batch in step])
    assert set(labels.tolist()) == {-100, 65536, 65537, 65538, 65539}


def test_what_a_seed_means_is_pinned(videos, images):
    """A change here would continue a run with other data than it began with."""
    options = PACKED | {"seed": 5, "mask_schedule": "linear", "given_frames": -1, "given_frames_prob": 0.7}
    batches = batches_of(DataSource(videos, weight=2.0), images, **options)
    plan = batches.next_plan()
    found = [(draw.place, draw.source, draw.sample, draw.length) for draw in plan[0].documents]
    masks = [(batch.num_targets, int(batch.masked.rows.sum())) for batch in map(batches.load, plan)]
    assert found == [(0, 0, 3, 85), (1, 0, 4, 137), (4, 0, 5, 173)]
    assert masks == [(157, 36425), (124, 27457), (168, 30634), (121, 26542)]


def test_given_frames_are_as_many_as_asked_for_and_one_is_left(videos, images):
    def given(**options):
        counts = set()
        for step in steps(batches_of(videos, images, **PACKED, **options), 20):
            for batch in step:
                bounds = batch.layout.cu_seqlens.tolist()
                for begin, end in itertools.pairwise(bounds):
                    frame = batch.layout.frame_index[begin:end]
                    hidden = batch.masked.input_ids[begin:end] == MASK
                    frames = int(frame.max()) + 1
                    shown = [f for f in range(frames) if not hidden[frame == f].any()]
                    assert shown == list(range(len(shown)))
                    assert len(shown) < frames
                    assert not (batch.masked.labels[begin:end] >= 0)[frame < len(shown)].any()
                    counts.add((frames, len(shown)))
        return counts

    assert given() == {(1, 0), (2, 0), (3, 0), (4, 0)}
    assert given(given_frames=2) == {(1, 0), (2, 1), (3, 2), (4, 2)}
    assert given(given_frames=-1) == {(1, 0), (2, 1), (3, 1), (3, 2), (4, 1), (4, 2), (4, 3)}
    assert given(given_frames=1, given_frames_prob=0.5) == {(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (4, 0), (4, 1)}


def test_text_is_dropped_as_often_as_asked(videos):
    def dropped(probability):
        batches = batches_of(videos, text_drop=probability)
        return sum(int(step[0].masked.input_ids[0]) == VIDEO_START for step in steps(batches, 300))

    assert dropped(0.0) == 0
    assert dropped(1.0) == 300
    assert 75 - 38 < dropped(0.25) < 75 + 38  # five standard deviations


def test_videos_are_cut_as_their_source_says_before_they_are_packed(tmp_path):
    folder = write_samples(tmp_path / "tokens", [(5, 4, 4)] * 3)
    source = DataSource(folder, fps=4, seconds=2, crop="random")
    starts = set()
    for step in steps(batches_of(source, token_budget=200, text_drop=0.0, look_ahead=3), 40):
        assert step[0].num_tokens > 100
        for ids in documents(step[0]):
            layout = FrameLayout.from_tokens(ids[None])
            assert layout.num_frames == 3
            starts.add(int(ids[ids >= 65536].min() - 65536) // 1000)
    assert starts == {0, 1, 2}


def test_streams_are_padded_to_the_budget_with_documents_that_change_nothing(videos, images):
    options = PACKED | {"look_ahead": 2}
    bare, padded = (batches_of(videos, images, pad_to_budget=pad, **options) for pad in (False, True))
    paddings = set()
    for short, long in zip(steps(bare, 6), steps(padded, 6), strict=True):
        for a, b in zip(short, long, strict=True):
            assert b.num_tokens == 400
            assert b.padding == 400 - a.num_tokens
            paddings.add(b.padding)
            assert torch.equal(b.masked.input_ids[: a.num_tokens], a.masked.input_ids)
            assert torch.equal(b.masked.rows, a.masked.rows)
            assert (b.masked.labels[a.num_tokens :] == -100).all()
            assert (b.layout.limits.kv_start[a.num_tokens :] >= a.num_tokens).all()
            assert b.layout.limits.kv_end[: a.num_tokens].max() <= a.num_tokens
            assert torch.equal(b.to("cpu").masked.rows, b.masked.rows)
            assert b.to("cpu").padding == b.padding
    assert len(paddings) > 3
    assert bare.waste == padded.waste > 0


def test_long_padding_is_in_short_documents(tmp_path):
    folder = write_samples(tmp_path / "tokens", [(1, 48, 48)])
    ((batch,),) = steps(batches_of(folder, token_budget=4700, pad_to_budget=True), 1)
    lengths = batch.layout.cu_seqlens.diff().tolist()
    assert sum(lengths) == 4700
    assert lengths[0] > 2300
    assert lengths[1:] == [1024, 1024, 4700 - sum(lengths[:3])]


# The same data for everybody, and again


def test_documents_do_not_depend_on_how_they_are_packed(videos, images):
    """The document at a place is the same ids and the same mask in any stream of any budget."""

    def by_place(**options):
        batches = batches_of(videos, images, seed=3, **options)
        found = {}
        for _ in range(12):
            for stream in batches.next_plan():
                batch = batches.load(stream)
                lengths = batch.layout.cu_seqlens.diff().tolist()
                found |= dict(zip(stream.places, batch.masked.input_ids.split(lengths), strict=False))
        return found

    one = by_place(documents=1, micro_batches=4)
    assert len(one) == 48
    for other in (by_place(**PACKED | {"text_drop": 0.1}), by_place(documents=3), by_place(token_budget=1000)):
        both = one.keys() & other.keys()
        assert len(both) > 20
        assert all(torch.equal(one[place], other[place]) for place in both)


def test_processes_share_the_streams_of_one(videos, images):
    alone = steps(batches_of(videos, images, **PACKED), 5)
    for ranks in (2, 4):
        parts = [batches_of(videos, images, rank=rank, ranks=ranks, **PACKED) for rank in range(ranks)]
        for step in alone:
            plans = [part.next_plan() for part in parts]
            assert all(plan == plans[0] for plan in plans)
            for rank, part in enumerate(parts):
                for number in range(rank, 4, ranks):
                    assert same(part.load(plans[rank][number]), step[number])


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("options", [PACKED, {"documents": 2, "micro_batches": 2}], ids=["budget", "documents"])
def test_a_state_continues_bit_for_bit(videos, images, after, options):
    batches = batches_of(videos, images, **options)
    steps(batches, after)
    state = json.loads(json.dumps(batches.state_dict()))
    want = steps(batches, 5)
    again = batches_of(videos, images, **options)
    steps(again, 2)  # wherever it was
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert all_same(steps(again, 5), want)
    assert again.state_dict() == batches.state_dict()
    assert again.waste == batches.waste


def test_a_state_continues_in_another_process_and_on_other_ranks(videos, images, tmp_path):
    batches = batches_of(videos, images, **PACKED)
    steps(batches, 3)
    (tmp_path / "state.json").write_text(json.dumps(batches.state_dict()))
    code = f"""
import json, torch
from lumos.train import PackedBatches, TrainConfig
from lumos.train.batches import open_sources
state = json.load(open({str(tmp_path / "state.json")!r}))
options = TrainConfig(**{PACKED!r})
parts = [PackedBatches(open_sources([{str(videos)!r}, {str(images)!r}]), options, {CLASSES}, r, 2) for r in (0, 1)]
ids = []
for part in parts:
    part.load_state_dict(state)
for _ in range(3):
    plans = [part.next_plan() for part in parts]
    ids += [parts[n % 2].load(plans[n % 2][n]).masked.input_ids for n in range(4)]
torch.save(ids, {str(tmp_path / "ids.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    want = [batch.masked.input_ids for step in steps(batches, 3) for batch in step]
    got = torch.load(tmp_path / "ids.pt")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**62), st.integers(0, 12), st.booleans())
def test_what_is_read_ahead_is_not_in_the_state(videos, images, seed, after, loads):
    """A state taken between the plan and the reading of its streams goes on behind that plan."""
    batches = batches_of(videos, images, seed=seed, **PACKED)
    for _ in range(after):
        plan = batches.next_plan()
        if loads:
            [batches.load(stream) for stream in plan]
    state = batches.state_dict()
    again = batches_of(videos, images, seed=seed, **PACKED)
    again.load_state_dict(state)
    assert [again.next_plan() for _ in range(3)] == [batches.next_plan() for _ in range(3)]


def test_a_state_of_other_data_is_refused(videos, images):
    state = batches_of(videos, images, **PACKED).state_dict()
    for others in (
        batches_of(videos, images, seed=1, **PACKED),
        batches_of(images, videos, **PACKED),
        batches_of(videos, **PACKED),
        batches_of(videos, DataSource(images, weight=2.0), **PACKED),
    ):
        with pytest.raises(ValueError, match="the state is of other data"):
            others.load_state_dict(state)
    with pytest.raises(ValueError, match="the state is of other data"):
        batches_of(videos, **PACKED).load_state_dict({})


def test_another_budget_goes_on_with_the_documents_that_were_not_seen(videos, images):
    batches = batches_of(videos, images, **PACKED)
    seen = [place for _ in range(5) for stream in batches.next_plan() for place in stream.places]
    again = batches_of(videos, images, **PACKED | {"token_budget": 700, "micro_batches": 2, "look_ahead": 3})
    again.load_state_dict(batches.state_dict())
    more = [place for _ in range(12) for stream in again.next_plan() for place in stream.places]
    assert len(set(seen + more)) == len(seen + more)
    assert set(range(len(seen) + len(more) - 8)) <= set(seen + more)


# Reading ahead


class Watched:
    """A dataset that notes whether the main thread reads a sample, and which, or describes one."""

    def __init__(self, dataset):
        self.dataset, self.reads, self.descriptions, self.described_here = dataset, [], 0, False

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, at):
        self.reads.append((threading.current_thread() is threading.main_thread(), at))
        return self.dataset[at]

    def describe(self, at):
        self.descriptions += 1
        self.described_here |= threading.current_thread() is threading.main_thread()
        return self.dataset.describe(at)


def settle(batches):
    """Waits until the next step is planned, and then until its streams are read."""
    for _ in range(2):
        batches._reader.submit(int).result()


def test_the_next_step_is_planned_and_its_own_streams_are_read_in_the_background(videos):
    dataset = Watched(SampleFolder(videos))
    batches = PackedBatches([(DataSource(videos), dataset)], TrainConfig(**PACKED), CLASSES, rank=1, ranks=2)
    dataset.described_here = False
    plans = [batches.next_plan() for _ in range(2)]
    [batches.load(stream) for stream in plans[1][1::2]]
    settle(batches)
    assert not dataset.described_here
    assert not any(main for main, _ in dataset.reads)
    own = [draw.sample for plan in plans for stream in plan[1::2] for draw in stream.documents]
    reads = len(dataset.reads)
    ahead = [draw.sample for stream in batches.next_plan()[1::2] for draw in stream.documents]
    assert reads == len(own + ahead)
    assert [at for _, at in dataset.reads][: len(own + ahead)] == own + ahead


def test_a_stream_can_be_read_again_and_by_any_process(videos):
    batches = batches_of(videos, rank=0, ranks=2, **PACKED)
    plan = batches.next_plan()
    for stream in plan:
        assert same(batches.load(stream), batches.load(stream))


def test_an_error_in_a_later_step_comes_when_that_step_is_asked_for(videos):
    class Broken(Watched):
        def describe(self, at):
            shape = super().describe(at)
            if self.descriptions == 31:
                raise ValueError("sample 5 is broken")
            return shape

    dataset = Broken(SampleFolder(videos))
    options = TrainConfig(documents=1, micro_batches=4)
    batches = PackedBatches([(DataSource(videos), dataset)], options, CLASSES)
    whole = steps(batches, 7)  # 28 documents
    assert len(whole) == 7
    for _ in range(2):
        with pytest.raises(ValueError, match="sample 5 is broken"):
            batches.next_plan()


# What is refused


def test_documents_above_the_budget_are_named_at_the_start(videos):
    with pytest.raises(ValueError, match=r"1 of 7 samples of .* sample 5 of .* has 173 tokens: raise token_budget"):
        batches_of(videos, token_budget=150)
    with pytest.raises(ValueError, match="7 of 7 samples"):
        batches_of(videos, token_budget=20, too_long="drop")


def test_documents_above_the_budget_are_dropped_and_counted_on_request(videos):
    batches = batches_of(videos, token_budget=150, too_long="drop", text_drop=0.0, look_ahead=4)
    with pytest.warns(UserWarning, match=r"sample 5 of .* has 173 tokens, more than token_budget 150: left out"):
        plans = [batches.next_plan() for _ in range(30)]
    assert all(stream.length <= 150 for plan in plans for stream in plan)
    samples = {draw.sample for plan in plans for stream in plan for draw in stream.documents}
    assert samples == {0, 1, 2, 3, 4, 6}
    assert batches.dropped == {str(videos): batches.state_dict()["dropped"][0]}
    assert batches.dropped[str(videos)] >= 4


def test_a_document_above_the_budget_that_was_not_looked_at_is_named_when_its_turn_comes(videos, monkeypatch):
    monkeypatch.setattr(PackedBatches, "CHECKED", 1)
    batches = batches_of(videos, token_budget=150, text_drop=0.0, look_ahead=1)
    with pytest.raises(ValueError, match=r"sample \d of .* tokens, more than token_budget 150"):
        steps(batches, 30)


def test_a_description_that_is_wrong_is_named(videos):
    class Wrong(Watched):
        def describe(self, at):
            shape = self.dataset.describe(at)
            return replace(shape, length=shape.length + 1)

    batches = PackedBatches([(DataSource(videos), Wrong(SampleFolder(videos)))], TrainConfig(), CLASSES)
    with pytest.raises(ValueError, match=r"sample \d of .* tokens, its description says"):
        steps(batches, 1)


def test_arguments_that_do_not_fit_are_named(videos, tmp_path):
    with pytest.raises(ValueError, match="micro_batches 4 must be a multiple of the 3 processes"):
        batches_of(videos, rank=0, ranks=3, **PACKED)
    with pytest.raises(ValueError, match="rank"):
        batches_of(videos, rank=2, ranks=2, **PACKED)
    with pytest.raises(ValueError, match="sources is empty"):
        batches_of()
    SampleWriter(tmp_path / "none").close()
    with pytest.raises(ValueError, match="none holds no samples"):
        batches_of(tmp_path / "none")


def test_sources_share_the_documents_by_weight(videos, images):
    batches = batches_of(DataSource(videos, weight=3.0), DataSource(images, weight=1.0), documents=4)
    for _ in range(20):
        (stream,) = batches.next_plan()
        assert isinstance(stream, Bin)
        assert sorted(draw.source for draw in stream.documents) == [0, 0, 0, 1]
    assert batches.waste == 0
