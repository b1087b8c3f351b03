"""Faster than exact, smaller than exact, and the memory of both."""

import weakref

import pytest
import torch
from sampling_oracle import CLASSES, prompt, small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumos import generate as generate_module
from lumos import generate_frames, generate_tokens
from lumos.kv_cache import FP8, CompactCache, StaticCache, cache_bytes
from lumos.sampling import Sampling, mask_counts, plan_memory, read_prompts

LOW = 0.03  # a confidence that the small model often reaches
DOCUMENT = {"grid": (4, 4), "frames": 4, "steps": 6, "guidance_scale": 2.0, "seed": 3}


def recorded_draws(monkeypatch):
    draws = []
    original = generate_module.masked_sample

    def recording(hidden, *args, **kwargs):
        result = original(hidden, *args, **kwargs)
        draws.append((len(hidden), result[1]))
        return result

    monkeypatch.setattr(generate_module, "masked_sample", recording)
    return draws


# Confidence threshold


def test_a_threshold_of_one_is_exact():
    """Probabilities of 1 apart, which the small model does not reach."""
    model = small_model()
    exact, same = (
        generate_tokens(model, [prompt(6)], confidence_threshold=threshold, **DOCUMENT)[0] for threshold in (None, 1.0)
    )
    assert torch.equal(exact, same)


def test_a_low_threshold_ends_every_frame_after_one_step():
    frames = list(generate_frames(small_model(), [prompt(6)], confidence_threshold=1e-12, **DOCUMENT))
    assert [frame.steps for frame in frames] == [1] * 4
    assert all(frame.codes.min() >= 0 and frame.codes.max() < CLASSES[1] - CLASSES[0] for frame in frames)


@pytest.mark.parametrize("together", [1, 2])
def test_a_threshold_keeps_what_is_sure_and_what_the_schedule_keeps(monkeypatch, together):
    """Every step leaves at most the schedule's number, and as many as were below the threshold among those."""
    draws = recorded_draws(monkeypatch)
    documents = [prompt(6), prompt(3)][:together]
    frames = list(
        generate_frames(small_model(), documents, confidence_threshold=LOW, documents_per_pass=together, **DOCUMENT)
    )
    assert any(frame.steps < 6 for frame in frames)
    if together > 1:
        return
    left, at = [16, *mask_counts(6, 16)], 0
    for frame in frames:
        sizes = [size for size, _ in draws[at : at + frame.steps]]
        confidences = [confidence for _, confidence in draws[at : at + frame.steps]]
        assert sizes[0] == 16
        for step, size in enumerate(sizes[1:]):
            assert size <= min(left[step + 1], int((confidences[step] < LOW).sum()))
        if frame.steps < 6:
            doubtful = int((confidences[-1] < LOW).sum())
            assert doubtful == 0 or doubtful <= sizes[-1] - left[frame.steps]
        at += frame.steps


# Guidance on some of the steps


def test_guidance_interval_runs_one_branch_outside_it(monkeypatch):
    lanes = []
    original = generate_module._Pass.forward
    monkeypatch.setattr(
        generate_module._Pass, "forward", lambda self, *a, **k: lanes.append(len(self.lanes)) or original(self, *a, **k)
    )
    model = small_model()
    generate_tokens(model, [prompt(6)], guidance_interval=(0.0, 0.5), **{**DOCUMENT, "frames": 2})
    history = [2]
    assert lanes == [2, 2, 2, 1, 1, 1, *history, 2, 2, 2, 1, 1, 1]


def test_guidance_interval_ends(monkeypatch):
    model = small_model()
    whole, all_of_it, none, off = (
        generate_tokens(model, [prompt(6)], **{**DOCUMENT, **options})[0]
        for options in (
            {},
            {"guidance_interval": (0.0, 1.0)},
            {"guidance_interval": (0.5, 0.5)},
            {"guidance_scale": None},
        )
    )
    assert torch.equal(whole, all_of_it)
    assert torch.equal(none, off)
    assert not torch.equal(whole, off)


# Windows (tests/test_official_sampler.py compares them with a dense mask)


def test_a_window_bounds_the_cache_and_passes_the_longest_document(monkeypatch):
    sizes = []
    original = generate_module._Group._allocate
    monkeypatch.setattr(
        generate_module._Group, "_allocate", lambda self, tokens: sizes.append(tokens) or original(self, tokens)
    )
    model = small_model(max_position_embeddings=100)
    for frames in (5, 9):
        generate_tokens(model, [prompt(6)], **{**DOCUMENT, "frames": frames}, window=(1, 2))
    assert sizes == [(11 + 4 * 24) + (3 + 4 * 24)] * 2
    with pytest.raises(ValueError, match="window"):
        generate_tokens(model, [prompt(6)], **{**DOCUMENT, "frames": 5})


# Caches


def test_history_on_another_device_changes_nothing():
    model = small_model()
    [exact] = generate_tokens(model, [prompt(6, given=1)], **DOCUMENT)
    assert torch.equal(exact, generate_tokens(model, [prompt(6, given=1)], kv_device="cpu", **DOCUMENT)[0])
    windowed = [
        generate_tokens(model, [prompt(6)], window=(1, 1), kv_device=device, **DOCUMENT)[0] for device in (None, "cpu")
    ]
    assert torch.equal(*windowed)


@pytest.mark.parametrize(("storage", "error"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11), (FP8, 2**-4)])
def test_packed_history_is_rounded_once(storage, error):
    """Kept tokens come back within half a unit in the last place; those of a pass that is not kept, unchanged."""
    config = small_model().config
    cache = CompactCache(config, 12, torch.float32, torch.device("cpu"), storage)
    new = torch.randn(2, 5, 1, 32) * torch.tensor([0.01, 1, 30, 0, 1e-3]).view(5, 1, 1)
    cache.rows, cache.keep, cache.used = torch.tensor([3, 4, 5, 6, 7]), True, 8
    k, v = cache.update(1, *new)
    assert torch.equal(k[3:8], new[0])
    cache.rows, cache.keep = torch.tensor([8]), False
    cache.used = 9
    one = torch.randn(2, 1, 1, 32)
    k, v = cache.update(1, *one)
    for side, stored in enumerate((k, v)):
        assert torch.equal(stored[8:9], one[side])
        largest = new[side].abs().amax(-1, keepdim=True)
        smallest = largest * 2**-10 / 448 if storage == FP8 else 2**-25  # half a step below the normal numbers
        assert ((stored[3:8] - new[side]).abs() <= error * (1 + 1e-6) * new[side].abs() + smallest).all()
        assert storage != torch.bfloat16 or torch.equal(stored[3:8], new[side].bfloat16().float())
        assert not stored[:3].any()
    assert not cache.data[:, 1, 8].any(), "a frame that is not kept was packed"
    assert not cache.update(0, *one)[0][:8].any()


@pytest.mark.parametrize("storage", [torch.bfloat16, FP8])
def test_packed_history_stays_close(monkeypatch, storage):
    """The first frame, which has no generated history, is exact where the prompt is empty of it; later ones drift."""
    draws = recorded_draws(monkeypatch)
    model = small_model()
    generate_tokens(model, [prompt(6)], **DOCUMENT)
    exact, draws[:] = list(draws), []
    generate_tokens(model, [prompt(6)], kv_dtype=storage, **DOCUMENT)
    first = (exact[0][1] - draws[0][1]).abs().max()
    assert 0 < first < {torch.bfloat16: 0.02, FP8: 0.2}[storage]


@pytest.mark.parametrize("storage", [None, torch.float32, torch.bfloat16, FP8])
def test_cache_bytes_are_those_allocated(storage):
    config = small_model(num_attention_heads=4, num_key_value_heads=2, hidden_size=128).config
    device = torch.device("cpu")
    if storage is None:
        cache = StaticCache(config, 77, torch.float32, device)
        assert cache.nbytes == cache.data.nbytes
    else:
        cache = CompactCache(config, 77, torch.float32, device, storage)
    assert cache.nbytes == cache_bytes(config, 77, torch.float32, storage)


# Memory


class LiveBytes(TorchDispatchMode):
    """Largest sum of the storages alive at once, of tensors made in the block."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._hold(tensor, known)
        return out

    def _hold(self, tensor, known):
        pointer, size = tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if pointer not in self.alive:
            if pointer in known or not size:
                return
            self.alive[pointer] = 0
            self.now += size
            self.peak = max(self.peak, self.now)
        self.alive[pointer] += 1
        weakref.finalize(tensor, self._release, pointer, size)

    def _release(self, pointer, size):
        self.alive[pointer] -= 1
        if not self.alive[pointer]:
            del self.alive[pointer]
            self.now -= size


@pytest.mark.parametrize("options", [{}, {"kv_dtype": FP8}, {"window": (0, 1)}, {"guidance_scale": None}])
@pytest.mark.parametrize("together", [1, 2])
def test_memory_stays_within_its_plan(monkeypatch, options, together):
    """The draw's own workspace, a constant, is left out of both sides."""
    monkeypatch.setattr("lumos.sampling.WORKSPACE_BYTES", 0)
    model = small_model(hidden_size=64, intermediate_size=256)
    document = {**DOCUMENT, "grid": (16, 16), "frames": 3, "steps": 2, **options}
    prompts = [prompt(40), prompt(60)]
    sampling = Sampling(**{k: v for k, v in document.items() if k not in ("grid", "frames", "seed")})
    documents = read_prompts(model.config, prompts, (16, 16), 3, 0, sampling)
    plan = plan_memory(model.config, documents, sampling, torch.float32, together)
    assert plan.weights == sum(p.nbytes for p in model.parameters())
    with LiveBytes() as live:
        generate_tokens(model, prompts, documents_per_pass=together, **document)
    draws = 256 * 128 * 4 * 4  # the reference's logits and random words, where the native op is missing
    assert plan.cache < live.peak <= plan.cache + plan.workspace + draws
    assert plan.workspace < 3 * (live.peak - plan.cache) + draws
