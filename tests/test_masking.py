import math

import numpy as np
import pytest
import torch
from golden import TRAINING, build_config, load
from hypothesis import given, settings
from hypothesis import strategies as st

from lumos.masking import MASK_KINDS, mask_ratio, mask_tokens
from lumos_kernels.frame_layout.frames import frame_skeleton
from lumos_kernels.layout import Frame, FrameLayout, Text
from lumos_kernels.token_ids import MASK, NEW_LINE

CLASSES = (9216, 9344)


def document(rows, cols, frames, text=5, seed=0):
    """int64 [T]: text, frames of random codes, two closing tokens."""
    generator = torch.Generator().manual_seed(seed)
    skeleton = frame_skeleton(rows, cols)
    pieces = [torch.arange(1, text + 1)]
    for _ in range(frames):
        frame = skeleton.clone()
        codes = frame == MASK
        frame[codes] = torch.randint(*CLASSES, (int(codes.sum()),), generator=generator)
        pieces.append(frame)
    return torch.cat([*pieces, torch.tensor([9005, 8710])])


def pad(documents):
    length = max(len(ids) for ids in documents)
    return torch.stack([torch.nn.functional.pad(ids, (0, length - len(ids))) for ids in documents])


def masked_slots(batch, original, layout):
    """bool [F, S] of a batch of one document."""
    hidden = batch.input_ids.reshape(-1) != original.reshape(-1)
    return hidden[layout.content].view(layout.num_frames, -1)


def expected_count(p, slots):
    return max(1, int(np.rint(np.float32(p) * np.float32(slots))))


documents = st.tuples(
    st.sampled_from([(4, 4), (4, 8), (8, 4), (8, 12)]), st.integers(1, 5), st.integers(0, 7), st.integers(0, 2**32)
)
schedules = st.sampled_from(["cosine", "linear", "sigmoid", "pow2", "pow0.5"])


@settings(max_examples=60, deadline=None)
@given(documents, st.sampled_from(MASK_KINDS), schedules, st.sampled_from([0.0, 0.3, 0.7, 1.0]), st.integers(0, 3))
def test_invariants_of_every_kind(shape, kind, schedule, min_rate, given_frames):
    (rows, cols), frames, text, seed = shape
    given_frames = min(given_frames, frames - 1)
    ids = document(rows, cols, frames, text)[None]
    layout = FrameLayout.from_tokens(ids)
    before = ids.clone()
    batch = mask_tokens(
        ids,
        layout,
        seeds=[seed],
        kind=kind,
        schedule=schedule,
        min_rate=min_rate,
        given_frames=given_frames,
        classes=CLASSES,
    )
    assert torch.equal(ids, before)
    assert batch.input_ids.shape == batch.labels.shape == ids.shape
    assert (batch.input_ids.dtype, batch.labels.dtype, batch.rows.dtype) == (torch.int64, torch.int64, torch.int32)

    hidden = batch.input_ids != ids
    assert (batch.input_ids[hidden] == MASK).all()
    assert not (hidden.view(-1) & ~layout.content).any()
    assert not (hidden.view(-1) & (layout.frame_index < given_frames)).any()
    target = hidden & (ids != NEW_LINE)
    assert torch.equal(batch.labels, torch.where(target, ids, -100))
    assert batch.rows.tolist() == target.view(-1).nonzero().flatten().tolist()

    p, slots = float(batch.mask_prob), rows * (cols + 1)
    assert np.float32(min_rate) <= p <= 1
    mask_FS = masked_slots(batch, ids, layout)[given_frames:]
    counts = mask_FS.sum(1).tolist()
    first = expected_count(p, slots)
    if kind == "tube":
        assert counts == [first] * len(counts)
        assert (mask_FS == mask_FS[0]).all()
    elif kind == "random":
        assert sum(counts) == expected_count(p, slots * len(counts))
    elif kind == "tubeDecay":
        line = torch.linspace(first, slots, len(counts)).ceil().int().tolist()
        assert counts == line
        assert not (mask_FS[:-1] & ~mask_FS[1:]).any()  # each frame's slots contain those of the frame before
    else:
        assert min(counts) >= max(1, expected_count(min_rate, slots) - 1)
        assert sum(counts) / len(counts) == pytest.approx(p * slots, abs=1)


@pytest.mark.parametrize("kind", MASK_KINDS)
def test_a_document_is_masked_by_its_seed_wherever_it_lies(kind):
    videos = [document(4, 8, 3, 5, seed=1), document(8, 4, 2, 9, seed=2), document(4, 4, 4, 0, seed=3)]
    seeds = [11, 2**63 + 5, 0]
    options = {"kind": kind, "classes": CLASSES}
    alone = [mask_tokens(ids[None], seeds=[seed], **options) for ids, seed in zip(videos, seeds, strict=True)]
    for order in ([0, 1, 2], [2, 0, 1]):
        padded = mask_tokens(pad([videos[i] for i in order]), seeds=[seeds[i] for i in order], **options)
        lengths = [len(videos[i]) for i in order]
        ids = torch.cat([videos[i] for i in order])
        layout = FrameLayout.from_tokens(ids, torch.tensor([0, *lengths]).cumsum(0))
        packed = mask_tokens(ids, layout, seeds=[seeds[i] for i in order], **options)
        for place, (i, run) in enumerate(zip(order, packed.input_ids.split(lengths), strict=True)):
            assert torch.equal(padded.input_ids[place, : lengths[place]], alone[i].input_ids[0])
            assert torch.equal(run, alone[i].input_ids[0])
            assert padded.mask_prob[place] == packed.mask_prob[place] == alone[i].mask_prob[0]
        assert packed.num_targets == padded.num_targets == sum(batch.num_targets for batch in alone)


def test_seeds_change_the_mask_and_repeat_it():
    ids = document(8, 12, 2)[None]
    first, again, other = (mask_tokens(ids, seeds=[seed], classes=CLASSES, min_rate=0.0) for seed in (3, 3, 4))
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.mask_prob != other.mask_prob
    assert not torch.equal(first.input_ids, other.input_ids)


FROZEN_PROBABILITY = 0.19959689676761627
FROZEN_ROWS = [4, 7, 11, 19, 28, 31, 35, 43]


def test_the_stream_of_masks_is_frozen():
    """Figures of this implementation: a change of generator, order of draws or rounding changes every resumed run."""
    batch = mask_tokens(document(4, 4, 2, text=1)[None], seeds=[7], classes=CLASSES, min_rate=0.1)
    assert float(batch.mask_prob) == pytest.approx(FROZEN_PROBABILITY, abs=1e-7)
    assert batch.rows.tolist() == FROZEN_ROWS


@pytest.mark.parametrize("name", TRAINING)
def test_counts_and_tubes_are_those_of_the_golden_masks(name):
    tensors, metadata = load(name)
    classes = build_config(metadata).classes
    ids = tensors["token_ids"].long()
    for row, golden_p in enumerate(tensors["mask_prob"]):
        line = ids[row : row + 1]
        layout = FrameLayout.from_tokens(line)
        golden_hidden = (tensors["masked_input_ids"][row : row + 1].long() != line).view(-1)
        golden_FS = golden_hidden[layout.content].view(layout.num_frames, -1)
        # The floor stands in for the probability that upstream drew: take the first seed whose own p lies below it.
        batches = (mask_tokens(line, layout, seeds=[s], min_rate=float(golden_p), classes=classes) for s in range(99))
        ours = next(batch for batch in batches if batch.mask_prob[0] == golden_p)
        ours_FS = masked_slots(ours, line, layout)
        assert ours_FS.sum(1).tolist() == golden_FS.sum(1).tolist()
        assert (golden_FS == golden_FS[0]).all()

        # And under upstream's own slots, our labels are upstream's on every visual code.
        golden_labels = tensors["masked_labels"][row : row + 1].long()
        target = golden_hidden[None] & (line >= classes[0])
        assert torch.equal(torch.where(target, line, -100), golden_labels.where(golden_labels >= classes[0], -100))


def test_schedules_are_the_published_formulas():
    u = torch.linspace(0, 1, 9)
    sigmoid = [1 / (1 + math.exp(3 - 6 * x)) for x in u.tolist()]
    wanted = {
        "cosine": [math.cos(math.pi * x / 2) for x in u.tolist()],
        "linear": [max(1 - x, 1e-6) for x in u.tolist()],
        "pow3": [max(1 - x**3, 1e-6) for x in u.tolist()],
        "pow0.5": [max(1 - x**0.5, 1e-6) for x in u.tolist()],
        "sigmoid": [max((sigmoid[-1] - s) / (sigmoid[-1] - sigmoid[0]), 1e-6) for s in sigmoid],
    }
    for name, values in wanted.items():
        torch.testing.assert_close(mask_ratio(name, u), torch.tensor(values), rtol=1e-5, atol=2e-7)


def test_probability_follows_the_schedule():
    ids = document(4, 4, 1)[None].expand(400, -1)
    batch = mask_tokens(ids, seeds=range(400), classes=CLASSES)
    # E[max(cos(pi u / 2), 0.7)]: 0.7 above u0 = 2 acos(0.7) / pi, and the integral of the cosine below it.
    u0 = 2 * math.acos(0.7) / math.pi
    assert float(batch.mask_prob.mean()) == pytest.approx(
        0.7 * (1 - u0) + 2 / math.pi * math.sin(math.acos(0.7)), abs=0.02
    )
    slots = (batch.input_ids != ids).float().mean(0)[FrameLayout.from_tokens(ids[:1]).content]
    assert (slots - slots.mean()).abs().max() < 0.1  # every slot equally often


def test_a_frame_hides_at_least_one_slot():
    ids = document(4, 4, 2)[None].expand(20, -1)
    batch = mask_tokens(ids, seeds=range(20), schedule="pow0.1", min_rate=0.0, classes=CLASSES)
    hidden = (batch.input_ids != ids).sum(1)
    assert (batch.mask_prob * 20 < 0.5).any()
    assert hidden.min() == 2  # one in each of two frames


def test_tube_decay_rounds_its_line_up():
    ids = document(4, 8, 5)[None]
    batch = mask_tokens(ids, seeds=[1], kind="tubeDecay", min_rate=0.7, schedule="pow0.1", classes=CLASSES)
    # From round(0.7 * 36) = 25 to 36 in four steps of 2.75: 25, 27.75, 30.5, 33.25, 36.
    assert masked_slots(batch, ids, FrameLayout.from_tokens(ids)).sum(1).tolist() == [25, 28, 31, 34, 36]


def test_given_frames_a_document_and_text_only():
    ids = pad([document(4, 4, 3), document(4, 8, 2), torch.arange(1, 9)])
    batch = mask_tokens(ids, seeds=[1, 2, 3], given_frames=[2, 0, 0], classes=CLASSES)
    layout = FrameLayout.from_tokens(ids)
    hidden = (batch.input_ids != ids).view(-1).view(3, -1)
    frame = layout.frame_index.view(3, -1)
    assert set(frame[0][hidden[0]].tolist()) == {2}
    assert set(frame[1][hidden[1]].tolist()) == {0, 1}
    assert not hidden[2].any()
    assert batch.mask_prob[2] == 0
    moved = batch.to("cpu")
    assert torch.equal(moved.rows, batch.rows)


def test_bad_arguments_are_named():
    ids = document(4, 4, 2)[None]
    for change, message in (
        ({"seeds": [1, 2]}, "seeds must be 1 integers"),
        ({"seeds": [-1]}, "seeds must be 1 integers in"),
        ({"kind": "cube"}, "kind must be one of tube, random, DiffForcing, tubeDecay, got 'cube'"),
        ({"schedule": "powx"}, "schedule must be one of .* got 'powx'"),
        ({"schedule": "pow-1"}, "exponent > 0, got 'pow-1'"),
        ({"min_rate": 1.5}, "min_rate must lie in"),
        ({"given_frames": 2}, "given_frames 2 leaves nothing to mask in document 0: 2 frames"),
        ({"given_frames": [0, 0]}, "given_frames must be a count"),
    ):
        with pytest.raises(ValueError, match=message):
            mask_tokens(ids, **({"seeds": [1], "classes": CLASSES} | change))
    with pytest.raises(ValueError, match="input_ids must be int64"):
        mask_tokens(ids.int(), seeds=[1])
    with pytest.raises(ValueError, match="layout must describe the 47 tokens"):
        mask_tokens(ids[:, :47], FrameLayout.from_tokens(ids), seeds=[1])
    mixed = torch.cat([frame_skeleton(4, 4), frame_skeleton(4, 8)])[None]
    with pytest.raises(ValueError, match=r"document 0 has frames of \[20, 36\] content slots"):
        mask_tokens(mixed, seeds=[1])


def test_real_sizes_take_milliseconds():
    """90,000 tokens in one document: no Python loop over tokens hides here (a loop takes seconds)."""
    import time

    layout = FrameLayout.from_segments([[Text(266)] + [Frame(48, 84)] * 22 + [Text(2)]])
    ids = torch.full((layout.num_tokens,), 70000)
    start = time.perf_counter()
    for kind in MASK_KINDS:
        mask_tokens(ids, layout, seeds=[1], kind=kind)
    assert time.perf_counter() - start < 1.0
