import itertools

import pytest
import torch
from golden import GENERATION, build_model, load
from sampling_oracle import CLASSES, prompt, small_model, uncached
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lumos import generate as generate_module
from lumos import generate_frames, generate_tokens
from lumos.sampling import Sampling, forgotten_slots, mask_counts
from lumos.tokens import parse_document
from lumos_kernels import FrameLayout
from lumos_kernels.frame_layout.frames import frame_skeleton
from lumos_kernels.token_ids import NEW_LINE


def golden_case(name):
    tensors, metadata = load(name)
    frames = -(-(int(metadata["fps"]) * int(metadata["duration"]) - 1) // 4) + 1
    options = {
        "grid": tuple(int(n) for n in metadata["frame_grid"].split("x")),
        "frames": frames,
        "steps": int(metadata["steps"]),
        "guidance_scale": float(metadata["guidance_scale"]),
        "mask_history_ratio": float(metadata["mask_history_ratio"]),
        "greedy": True,
    }
    return build_model(tensors, metadata), tensors, options


@pytest.mark.parametrize("name", GENERATION)
def test_golden_generation(name):
    """The closest call of any comparison is 1e-3 (t2v) and 7e-3 (i2v), relative: rounding does not reach it."""
    model, tensors, options = golden_case(name)
    [ids] = generate_tokens(model, [tensors["prompt_ids"].long()], **options)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, tensors["output_ids"].long())


@pytest.mark.parametrize("name", GENERATION)
def test_golden_mask_counts(name):
    _, tensors, options = golden_case(name)
    rows, cols = options["grid"]
    made = tensors["masked_after_step"].view(-1, options["steps"]).tolist()
    assert all(counts == mask_counts(options["steps"], rows * cols) for counts in made)


def test_the_official_cosine_is_just_below_one_half_at_60_degrees():
    assert mask_counts(3, 1000)[1] == 499


def test_forgotten_slots_are_evenly_spaced():
    for ratio, slots in itertools.product((0.0, 0.1, 0.3, 0.5, 0.7, 0.97, 1.0), (4, 20, 36, 1824, 4080)):
        places = forgotten_slots(ratio, slots)
        assert len(places) == max(1, round(ratio * slots))
        unique = places.unique()
        gaps = unique.diff()
        assert places.min() >= 0
        assert places.max() < slots
        assert not len(gaps) or gaps.max() - gaps.min() <= 1
    assert forgotten_slots(0.7, 20).tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 11, 13, 14, 16, 17, 19]


CASES = {
    "text": {"text": 6, "given": 0, "frames": 3},
    "given frames": {"text": 5, "given": 2, "frames": 4},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("greedy", [True, False])
def test_cached_is_uncached(case, greedy):
    model, settings = small_model(), dict(CASES[case])
    frames, ids = settings.pop("frames"), prompt(**settings)
    options = {"steps": 5, "guidance_scale": 2.5, "mask_history_ratio": 0.4}
    sampling = Sampling(**options, temperature=3.0, temperature_schedule="per_frame")
    temperatures = None if greedy else [[0.0] * 5] * settings["given"] + sampling.temperatures(frames)
    expected = uncached(model, ids, (4, 4), frames, seed=11, temperatures=temperatures, **options)
    [actual] = generate_tokens(
        model,
        [ids],
        (4, 4),
        frames,
        seed=11,
        greedy=greedy,
        temperature=3.0,
        temperature_schedule="per_frame",
        **options,
    )
    assert torch.equal(actual, expected)


BATCH = {
    "prompts": [prompt(6), prompt(9, given=1, seed=4), prompt(0, seed=5), prompt(2, grid=(8, 4), seed=6)],
    "grid": [(4, 4), (4, 4), (4, 8), (8, 4)],
    "frames": [3, 2, 1, 2],
    "seed": [7, 8, 7, 9],
}


def singles(model, **options):
    """Each document of BATCH on its own."""
    one = [dict(zip(BATCH, values, strict=True)) for values in zip(*BATCH.values(), strict=True)]
    return [generate_tokens(model, [d["prompts"]], d["grid"], d["frames"], seed=d["seed"], **options)[0] for d in one]


@pytest.mark.parametrize("together", [1, 2, 4])
@pytest.mark.parametrize("guidance", [3.0, None])
def test_a_batch_is_its_documents_run_singly(together, guidance):
    model, options = small_model(), {"steps": 4, "guidance_scale": guidance, "temperature": 2.0}
    batch = generate_tokens(model, **BATCH, documents_per_pass=together, **options)
    for got, expected in zip(batch, singles(model, **options), strict=True):
        assert torch.equal(got, expected)


def test_a_document_alone_in_its_passes_is_bitwise_what_it_is_alone(monkeypatch):
    """Tokens hide differences of rounding, confidences do not."""
    model, options = (
        small_model(hidden_size=96, intermediate_size=160, num_attention_heads=3),
        {"steps": 4, "guidance_scale": 3.0},
    )
    drawn = []
    original = generate_module.masked_sample

    def recording(*args, **kwargs):
        result = original(*args, **kwargs)
        drawn.append((*result, kwargs["row_keys"]))
        return result

    monkeypatch.setattr(generate_module, "masked_sample", recording)
    generate_tokens(model, **BATCH, **options)
    batch, drawn[:] = list(drawn), []
    singles(model, **options)
    assert len(batch) == len(drawn) == 4 * sum((3, 1, 1, 2))
    assert all(
        torch.equal(a, b) for one, other in zip(batch, drawn, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_seeds_decide_and_count_up():
    model = small_model()
    one = prompt(6)
    options = {"grid": (4, 4), "frames": 2, "steps": 3, "guidance_scale": 2.0}
    a, b, c = generate_tokens(model, [one] * 3, seed=[5, 6, 5], **options)
    assert torch.equal(a, c)
    assert not torch.equal(a, b)
    counted = generate_tokens(model, [one] * 2, seed=5, **options)
    assert torch.equal(counted[0], a)
    assert torch.equal(counted[1], b)


def test_every_draw_of_a_document_has_its_own_key(monkeypatch):
    keys = []
    original = generate_module.masked_sample
    monkeypatch.setattr(
        generate_module, "masked_sample", lambda *a, **k: keys.append(k["row_keys"].clone()) or original(*a, **k)
    )
    generate_tokens(small_model(), [prompt(6)], (4, 4), 3, steps=4, seed=2**62 + 3)
    keys = torch.cat(keys)
    assert (keys[:, 0] == 2**62 + 3).all()
    assert len(keys[:, 1].unique()) == len(keys)


def test_random_state_and_model_mode_are_left_alone():
    model = small_model(dropout=0.5).train()
    before = torch.random.get_rng_state()
    options = {"grid": (4, 4), "frames": 2, "steps": 3}
    first = generate_tokens(model, [prompt(6)], **options)
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first[0], generate_tokens(model.eval(), [prompt(6)], **options)[0])


def test_guidance_1_is_one_branch_and_the_conditional_model(monkeypatch):
    model, lanes = small_model(), []
    original = generate_module._Pass.forward
    monkeypatch.setattr(
        generate_module._Pass, "forward", lambda self, *a, **k: lanes.append(len(self.lanes)) or original(self, *a, **k)
    )
    options = {"grid": (4, 4), "frames": 2, "steps": 3, "greedy": True}
    [one] = generate_tokens(model, [prompt(6)], guidance_scale=1, **options)
    assert set(lanes) == {1}
    assert torch.equal(one, generate_tokens(model, [prompt(6)], guidance_scale=None, **options)[0])
    two = uncached(model, prompt(6), (4, 4), 2, steps=3, guidance_scale=1 + 1e-7)
    assert torch.equal(one, two)


def test_a_document_without_text_is_its_own_unconditional_branch(monkeypatch):
    model, lanes = small_model(), []
    original = generate_module._Pass.forward
    monkeypatch.setattr(
        generate_module._Pass, "forward", lambda self, *a, **k: lanes.append(len(self.lanes)) or original(self, *a, **k)
    )
    options = {"grid": (4, 4), "frames": 2, "steps": 3, "greedy": True}
    [guided] = generate_tokens(model, [prompt(0)], guidance_scale=9.0, **options)
    assert torch.equal(guided, generate_tokens(model, [prompt(0)], guidance_scale=None, **options)[0])
    assert set(lanes) == {1}


def test_each_branch_counts_its_own_positions(monkeypatch):
    """A constant offset would change no score, rotations being relative: compared with the layouts themselves."""
    seen = []
    original = generate_module._Pass.forward

    def forward(self, *args, **kwargs):
        seen.append(self.stream.positions.clone())
        return original(self, *args, **kwargs)

    monkeypatch.setattr(generate_module._Pass, "forward", forward)
    ids, frame = prompt(6, given=1), frame_skeleton(4, 4)
    generate_tokens(small_model(), [ids], (4, 4), 3, steps=1)
    branches = [torch.cat([ids[start:], frame, frame]) for start in (0, 8)]
    assert len(seen) == 3  # a step and the history of frame 1, a step of frame 2
    for number, positions in zip((2, 2, 1), seen, strict=True):
        places = [slice(len(b) - number * len(frame), len(b) - (number - 1) * len(frame)) for b in branches]
        layouts = [FrameLayout.from_tokens(b[None]).positions[:, at] for b, at in zip(branches, places, strict=True)]
        assert torch.equal(positions, torch.cat(layouts, 1))


def test_temperature_schedules():
    official = Sampling(steps=4, temperature=2.0).temperatures(3)
    assert official[0] == [2.0 * 0.75, 2.0 * 0.75 * 0.5, 2.0 * 0.75 * 0.5 * 0.25, 0.0]
    assert official[1:] == [[0.0] * 4] * 2
    again = Sampling(steps=4, temperature=2.0, temperature_schedule="per_frame").temperatures(3)
    assert again == [[1.5, 1.0, 0.5, 0.0]] * 3


@pytest.mark.parametrize("schedule", ["official", "per_frame"])
def test_noise_reaches_the_frames_the_schedule_says(schedule):
    """Greedy tokens, so that only what is kept first can differ: compared through the confidence noise alone."""
    model, options = small_model(), {"steps": 6, "guidance_scale": None, "temperature_schedule": schedule}
    given = prompt(6, given=1)
    cold = [f.codes for f in generate_frames(model, [given], (4, 4), 3, temperature=0.0, **options)]
    hot = [f.codes for f in generate_frames(model, [given], (4, 4), 3, temperature=1e4, **options)]
    assert not torch.equal(cold[0], hot[0])


def test_frames_come_as_they_are_decided():
    model, options = small_model(), {"steps": 4, "guidance_scale": 2.0}
    order = [(f.document, f.frame) for f in generate_frames(model, **BATCH, documents_per_pass=4, **options)]
    assert order == [(0, 0), (1, 1), (2, 0), (3, 0), (0, 1), (3, 1), (0, 2)]
    stream = generate_frames(model, **BATCH, **options)
    first = next(stream)
    assert (first.document, first.frame, first.steps) == (0, 0, 4)
    assert first.codes.shape == (4, 4)
    assert first.codes.min() >= 0
    assert first.codes.max() < CLASSES[1] - CLASSES[0]
    stream.close()


def test_results_are_documents():
    """Video start, header, given frames as they were, whole decided frames, video end."""
    given = prompt(6, given=1)
    [ids] = generate_tokens(small_model(), [given], (4, 4), 3, steps=3)
    assert ids[0] == 9004
    assert ids[-1] == 9005
    assert torch.equal(ids[: len(given) - 8], given[8:])
    shifted = torch.where(ids >= CLASSES[0], ids - CLASSES[0] + 65536, ids)
    assert parse_document(shifted).codes.shape == (3, 4, 4)
    assert (ids == NEW_LINE).sum() == 12


class Recorder(TorchDispatchMode):
    """Records the tensor operations below the block, and does them again on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        made = {}

        def fresh(value):
            return made.get(id(value), value) if isinstance(value, torch.Tensor) else value

        for func, args, kwargs, out in self.calls:
            result = func(*tree_map(fresh, args), **tree_map(fresh, kwargs))
            old, new = torch.utils._pytree.tree_leaves(out), torch.utils._pytree.tree_leaves(result)
            made.update((id(a), b) for a, b in zip(old, new, strict=True) if isinstance(a, torch.Tensor))


WAITING = ("_local_scalar_dense", "nonzero", "item", "unique", "masked_select", "equal")


def test_a_step_can_be_replayed_in_later_frames(monkeypatch):
    """What a CUDA graph does, on the CPU: the operations recorded in the second frame, done again on the same tensors,
    are the steps of every later frame; and none of them makes the host wait."""
    model, recorded = small_model(), {}
    options = {"grid": (4, 4), "frames": 5, "steps": 3, "guidance_scale": 2.0, "temperature_schedule": "per_frame"}
    expected = generate_tokens(model, [prompt(6), prompt(3)], documents_per_pass=2, **options)
    original, replayed = generate_module._Decoder._step, []

    def step_or_replay(self, step):
        if step not in recorded:
            recorded[step] = None
            original(self, step)
        elif recorded[step] is None:
            recorded[step] = Recorder()
            with recorded[step]:
                original(self, step)
        else:
            replayed.append(step)
            recorded[step].replay()

    monkeypatch.setattr(generate_module._Decoder, "_step", step_or_replay)
    actual = generate_tokens(model, [prompt(6), prompt(3)], documents_per_pass=2, **options)
    assert replayed == [0, 1, 2] * 3
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    names = {str(call[0]) for recorder in recorded.values() for call in recorder.calls}
    assert any("masked_sample" in name for name in names)
    assert not [name for name in names if any(bad in name for bad in WAITING)]


def test_lm_head_sees_undecided_slots_and_the_class_slice_only(monkeypatch):
    """Columns outside the slice may be NaN, and the rows of each draw are the schedule's."""
    model, rows = small_model(), []
    expected = generate_tokens(model, [prompt(6)], (4, 4), 2, steps=5, seed=1)
    with torch.no_grad():
        model.lm_head.weight[: CLASSES[0]] = torch.nan
    original = generate_module.masked_sample
    monkeypatch.setattr(
        generate_module, "masked_sample", lambda h, *a, **k: rows.append(len(h)) or original(h, *a, **k)
    )
    actual = generate_tokens(model, [prompt(6)], (4, 4), 2, steps=5, seed=1)
    assert torch.equal(actual[0], expected[0])
    assert rows == [16, *mask_counts(5, 16)[:-1]] * 2


def test_forgotten_slots_do_not_matter_to_later_frames():
    """Their tokens are masked before their keys and values are kept; the others' are not."""
    state = generate_module.FrameState
    original, model = state.remembered, small_model()
    document = {"grid": (4, 4), "frames": 3, "steps": 3, "guidance_scale": 2.0, "seed": 3}

    def changed(places):
        def remembered(self):
            before = self.ids.clone()
            self.ids[places(self)] = CLASSES[0] + 5
            kept = original(self)
            self.ids.copy_(before)
            return kept

        return remembered

    def frames(patched):
        state.remembered = patched
        try:
            return [f.codes for f in generate_frames(model, [prompt(6)], **document)]
        finally:
            state.remembered = original

    plain = frames(original)
    same = frames(changed(lambda self: self.forgotten))
    assert torch.equal(plain[2], same[2])
    other = frames(changed(lambda self: torch.tensor([n for n in range(3, 23) if n not in self.forgotten.tolist()])))
    assert not torch.equal(plain[2], other[2])


def test_cache_is_allocated_once_and_never_moves(monkeypatch):
    model, seen = small_model(), set()
    original = generate_module.StaticCache.update

    def update(self, layer, k, v):
        result = original(self, layer, k, v)
        seen.add((layer, result[0].data_ptr(), result[0].shape))
        return result

    monkeypatch.setattr(generate_module.StaticCache, "update", update)
    generate_tokens(model, [prompt(6)], (4, 4), 4, steps=3)
    assert len(seen) == model.config.num_hidden_layers


def bad(message, **changes):
    return pytest.param(changes, message, id=message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        bad("prompts must be a list", prompts=[]),
        bad("prompts must be a list", prompts=prompt(6)),
        bad(r"prompts\[0\] must be a 1-D int64 tensor", prompts=[prompt(6).int()]),
        bad(r"prompts\[0\] must be a 1-D int64 tensor", prompts=[prompt(6)[:0]]),
        bad(r"prompts\[0\] must have one video start", prompts=[prompt(6)[:6]]),
        bad(r"prompts\[0\] must have one video start", prompts=[torch.cat([prompt(6), torch.tensor([9005])])]),
        bad("followed by seconds and fps", prompts=[prompt(6)[:-1]]),
        bad("whole frames and nothing else", prompts=[torch.cat([prompt(6), torch.tensor([8710])])]),
        bad("but grid is 4 x 8", prompts=[prompt(6, given=1)], grid=(4, 8)),
        bad("truncated", prompts=[prompt(6, given=1)[:-3]]),
        bad("must hold ids in", prompts=[torch.cat([torch.tensor([-1]), prompt(6)])]),
        bad("leaves none to make", prompts=[prompt(6, given=2)]),
        bad("multiples of 4", grid=(4, 6)),
        bad("multiples of 4", grid=(0, 4)),
        bad("grid must be one for all", grid=[(4, 4), (4, 4)]),
        bad("frames must be an integer >= 1", frames=0),
        bad("frames must be one for all", frames=[1, 2]),
        bad("seed must be integers in", seed=-1),
        bad("seed must be integers in", seed=2**63),
        bad("documents_per_pass must be", documents_per_pass=0),
        bad("steps must be", steps=0),
        bad("guidance_scale must be", guidance_scale=float("inf")),
        bad("mask_history_ratio must lie", mask_history_ratio=1.5),
        bad("temperature must be", temperature=-1.0),
        bad("temperature_schedule must be one of official, per_frame", temperature_schedule="linear"),
        bad("cuda_graphs needs a model on a CUDA device", cuda_graphs=True),
    ],
)
def test_bad_arguments_are_refused_by_name(changes, message):
    call = {"prompts": [prompt(6)], "grid": (4, 4), "frames": 2, "steps": 2} | changes
    with pytest.raises(ValueError, match=message):
        generate_frames(small_model(), **call)


def test_too_long_a_document_is_refused_with_its_length():
    """11 tokens of prompt and 24 a frame."""
    options = {"grid": (4, 4), "frames": 2, "steps": 2}
    generate_frames(small_model(max_position_embeddings=59), [prompt(6)], **options)
    with pytest.raises(ValueError, match="is 59 tokens long, more than max_position_embeddings 58"):
        generate_frames(small_model(max_position_embeddings=58), [prompt(6)], **options)
