"""lumos/patch.py on a stand-in of the official model (official_double.py): patched is unpatched, and undone is new."""

from __future__ import annotations

import copy
import logging
import math

import official_double as official
import pytest
import torch
from golden import worst
from official_double import SPECIAL, VISUAL_START, training_options
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lumos.patch
from lumos import Lumos, LumosConfig, apply_lumos_kernels
from lumos_kernels.frame_layout.frames import frame_skeleton

SWITCHES = [
    {},
    {"rope": False},
    {"attention": False},
    {"loss": False},
    {"rope": False, "attention": False},
    {"rope": False, "loss": False},
    {"attention": False, "loss": False},
]


def document(text: int, rows: int, cols: int, frames: int, start: int = 9004, end: int = 9005) -> list[int]:
    generator = torch.Generator().manual_seed(text)
    ids = [0, *range(100, 100 + text), 8710, start, 8805, 8807]
    for _ in range(frames):
        frame = frame_skeleton(rows, cols)
        codes = frame == official.SPECIAL["mask_token"]
        frame[codes] = torch.randint(VISUAL_START, official.VOCABULARY, (int(codes.sum()),), generator=generator)
        ids += frame.tolist()
    return [*ids, end, 8710]


def batch(*documents: list[int], given: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """ids and labels: text is no label, nor are the first `given` frames."""
    labels = []
    for ids in documents:
        first = [i for i, token in enumerate(ids) if token == 8197][given]
        labels.append([-100] * first + ids[first:])
    return [list(ids) for ids in documents], labels


def mixed() -> tuple[list[list[int]], list[list[int]]]:
    """Three samples whose frames lie in different places: upstream's masks are then unions."""
    return batch(document(3, 4, 4, 2), document(9, 4, 8, 2), document(0, 4, 4, 2))


def build(kind=official.TrainingModel, dtype=torch.float64, **changes) -> nn.Module:
    torch.manual_seed(1)
    torch.set_default_dtype(torch.float64)
    try:
        model = kind(official.config(**changes))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(std=0.3 if parameter.dim() > 1 else 0.1).add_(1.0 if "norm" in name else 0.0)
            model.lm_head.weight.mul_(3)
    finally:
        torch.set_default_dtype(torch.float32)
    return model.to(dtype)


def call(model, ids, labels, options=None):
    return model(
        [list(row) for row in ids],
        [list(row) for row in labels],
        training=True,
        cfg=options or training_options(),
        mask_schedule=lambda u: torch.cos(u * math.pi / 2),
        special_token=SPECIAL,
    )


def step(model, ids, labels, options=None) -> dict[str, Tensor]:
    """Loss, extra losses and every gradient of a training step."""
    torch.manual_seed(2)
    model.zero_grad(set_to_none=True)
    loss, extra = call(model, ids, labels, options)
    (loss + sum(value * weight for value, weight in extra.values())).backward()
    found = {"loss": loss.detach(), **{name: value.detach() for name, (value, _) in extra.items()}}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[name.replace("_checkpoint_wrapped_module.", "")] = parameter.grad
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: worst(actual[name], expected[name]) for name in expected}
    name = max(errors, key=errors.get)
    assert errors[name] <= tolerance, f"{name} is {errors[name]:.1e} off"


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: ",".join(switches) or "all")
@pytest.mark.parametrize("changes", [{}, {"swin_norm": True, "model_parallel_size": 2, "num_attention_heads": 2}])
def test_losses_and_every_gradient_are_the_official_ones(switches, changes):
    model = build(**({**changes, "num_key_value_heads": 2} if changes else {}))
    expected = step(model, *mixed())
    assert len(expected) == 3 + len(list(model.parameters()))
    apply_lumos_kernels(model, **switches)
    assert_same(step(model, *mixed()), expected)


def test_with_nothing_to_replace_every_bit_is_the_official_one():
    model = build(dtype=torch.float32)
    expected = step(model, *mixed())
    apply_lumos_kernels(model, rope=False, attention=False, loss=False)
    assert all(torch.equal(value, expected[name]) for name, value in step(model, *mixed()).items())


@pytest.mark.parametrize("impl", ["auto", "reference", {"frame_attention": "reference"}])
def test_fp32_is_within_twice_the_official_error(impl):
    model = build(dtype=torch.float32)
    exact = step(copy.deepcopy(model).double(), *mixed())
    theirs = step(model, *mixed())
    apply_lumos_kernels(model, impl=impl)
    within_twice(step(model, *mixed()), theirs, exact, torch.float32)


def within_twice(ours, theirs, exact, dtype: torch.dtype) -> None:
    """Over all tensors together: single ones may happen to be exact in the official arithmetic."""
    assert ours.keys() == theirs.keys() == exact.keys()
    eps = torch.finfo(dtype).eps
    for name in exact:
        limit = 2 * max(worst(theirs[other], exact[other]) for other in exact) + eps
        assert worst(ours[name], exact[name]) <= limit, name
    assert worst(ours["loss"], exact["loss"]) <= 2 * worst(theirs["loss"], exact["loss"]) + 4 * eps


@pytest.mark.parametrize("switches", SWITCHES[:4], ids=lambda switches: ",".join(switches) or "all")
def test_autocast_is_within_twice_the_official_error(switches, monkeypatch):
    dtypes = []
    for name in ("mm_rope", "frame_attention", "tube_masked_loss"):
        real = getattr(lumos.patch, name)
        monkeypatch.setattr(
            lumos.patch, name, lambda x, *args, real=real, **kw: dtypes.append(x.dtype) or real(x, *args, **kw)
        )
    model = build(dtype=torch.float32)
    exact = step(copy.deepcopy(model).double(), *mixed())
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(model, *mixed())
        apply_lumos_kernels(model, **switches)
        ours = step(model, *mixed())
    within_twice(ours, theirs, exact, torch.bfloat16)
    assert set(dtypes) == {torch.bfloat16}


def test_every_sample_has_the_frames_of_all_or_with_fixed_its_own():
    """Seeded masks: alone, a sample is masked as in the batch."""
    model, (ids, labels) = build(), mixed()
    options = training_options(seeded=True, frame_closs_recorder=False)
    losses, counts = [], []
    for row, targets in zip(ids, labels, strict=True):
        losses.append(call(model, [row], [targets], options)[0])
        content = [official.content_of(torch.tensor([targets]))[0].nonzero()[:, 0]][0]
        masked, kept, *_ = official.mask_or_random_replace_tokens_video(
            torch.tensor([row]), torch.tensor([targets]), 9003, options, lambda u: u, SPECIAL, True
        )
        assert len(content) > int((masked == 9003).sum()) > 0
        counts.append(int((kept >= VISUAL_START).sum()))
    alone = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    shared = call(model, ids, labels, options)[0]
    assert abs(shared / alone - 1) > 1e-4
    apply_lumos_kernels(model)
    torch.testing.assert_close(call(model, ids, labels, options)[0], shared, rtol=1e-11, atol=0)
    apply_lumos_kernels(model, compat="fixed")
    torch.testing.assert_close(call(model, ids, labels, options)[0], alone, rtol=1e-11, atol=0)


class Shapes(TorchDispatchMode):
    """large: the shapes with two dimensions of at least `length` that any operator inside gave or took."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.large = length, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            if isinstance(tensor, Tensor) and sum(size >= self.length for size in tensor.shape) >= 2:
                self.large.add(tuple(tensor.shape))
        return result


def test_no_tensor_is_length_by_length_or_length_by_vocabulary():
    pytest.importorskip("lumos_kernels.frame_attention.native", exc_type=ImportError)  # the reference has score tiles
    model = build(dtype=torch.float32)
    ids, labels = batch(document(9, 8, 12, 3), document(2, 8, 12, 3))
    length = max(map(len, ids))
    assert length > 300  # above the 128 visual columns and every dimension of the weights but the vocabulary

    def large() -> set[tuple[int, ...]]:
        with Shapes(length) as shapes:
            step(model, ids, labels)
        return shapes.large

    mask, logits = (2, 1, length, length), (2, length, official.VOCABULARY)
    assert {mask, logits} <= large()
    apply_lumos_kernels(model)
    assert not large()
    apply_lumos_kernels(model, attention=False)
    assert mask in large()
    apply_lumos_kernels(model, loss=False)
    assert {shape[-1] for shape in large()} >= {official.VOCABULARY}


def state_of(model: nn.Module) -> list[tuple[str, dict]]:
    return [(name, dict(module.__dict__)) for name, module in model.named_modules()]


def assert_untouched(model: nn.Module, before: list[tuple[str, dict]]) -> None:
    for (name, now), (_, then) in zip(state_of(model), before, strict=True):
        assert now.keys() == then.keys(), name
        assert all(now[key] is then[key] for key in then if key != "training"), name


def test_undo_restores_everything():
    model = build()
    before, parameters = state_of(model), dict(model.named_parameters())
    expected = step(model, *mixed())
    undo = apply_lumos_kernels(model)
    assert state_of(model)[0][1].keys() != before[0][1].keys()
    assert dict(model.named_parameters()).keys() == parameters.keys() == model.state_dict().keys()
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    step(model, *mixed())
    undo()
    assert_untouched(model, before)
    assert all(torch.equal(value, expected[name]) for name, value in step(model, *mixed()).items())
    undo()
    again = apply_lumos_kernels(model)
    undo()
    assert state_of(model)[0][1].keys() != before[0][1].keys()  # an undo of before does not end a later patch
    again()
    assert_untouched(model, before)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (1, 1)])
def test_applying_twice_is_applying_once_with_the_later_options(order):
    model = build()
    before = state_of(model)
    undos = [apply_lumos_kernels(model, loss=False)]
    once = state_of(model)
    undos.append(apply_lumos_kernels(model, impl="reference"))
    assert [(name, d.keys()) for name, d in state_of(model)] == [(name, d.keys()) for name, d in once]
    assert model._lumos.options.loss
    assert model._lumos.options.impl == "reference"
    for number in order:
        undos[number]()
    assert_untouched(model, before)


def test_another_model_of_the_process_is_untouched():
    one, two = build(), build()
    classes = {type(module): dict(type(module).__dict__) for module in one.modules()}
    names = dict(vars(official))
    before, expected = state_of(two), step(two, *mixed())
    apply_lumos_kernels(one)
    assert_same(step(one, *mixed()), expected)
    assert_untouched(two, before)
    assert all(dict(kind.__dict__) == content for kind, content in classes.items())
    assert vars(official) == names
    assert all(torch.equal(value, expected[name]) for name, value in step(two, *mixed()).items())


def test_a_copy_of_a_patched_model_is_patched_and_has_its_own_weights():
    model = build()
    expected = step(model, *mixed())
    undo = apply_lumos_kernels(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    undo()
    assert "_lumos" in twin.__dict__
    assert_same(step(twin, *mixed()), expected)
    apply_lumos_kernels(twin)()
    assert "_lumos" not in twin.__dict__
    assert all(torch.equal(value, expected[name]) for name, value in step(twin, *mixed()).items())


def test_a_saved_patched_model_loads_patched(tmp_path):
    model = build()
    expected = step(model, *mixed())
    apply_lumos_kernels(model, compat="fixed")
    torch.save(model, tmp_path / "model.pt")
    apply_lumos_kernels(model)
    twin = torch.load(tmp_path / "model.pt", weights_only=False)
    assert twin.model.layers[1].self_attn._lumos is twin._lumos
    assert twin._lumos.options.compat == "fixed"
    undo = apply_lumos_kernels(twin)
    assert_same(step(twin, *mixed()), expected)
    undo()
    assert "_lumos" not in twin.__dict__
    assert all(torch.equal(value, expected[name]) for name, value in step(twin, *mixed()).items())


def test_methods_that_others_replaced_come_back_or_stop_the_undo():
    model = build()
    model.forward_mask = before = model.forward_mask
    undo = apply_lumos_kernels(model)
    attention = model.model.layers[1].self_attn
    ours, attention.forward = attention.forward, lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match="forward of Attention was replaced again"):
        undo()
    assert "_lumos" in model.__dict__
    attention.forward = ours
    undo()
    assert model.__dict__["forward_mask"] is before


@pytest.mark.parametrize("checkpointing", ["reentrant", "plain"])
def test_the_official_checkpointing(checkpointing):
    model = build()
    expected = step(model, *mixed())
    model.model.checkpointing = checkpointing
    apply_lumos_kernels(model)
    assert_same(step(model, *mixed()), expected)


@pytest.mark.parametrize("patch_first", [True, False])
def test_wrappers_around_layers_and_model(patch_first, tmp_path):
    """Activation checkpointing as the official trainer wraps it, then DDP; patched before or after, through DDP."""
    model = build()
    expected = step(model, *mixed())
    if patch_first:
        apply_lumos_kernels(model)
    layers = list(model.model.layers)
    apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(model)
        if not patch_first:
            apply_lumos_kernels(wrapped)
        assert "_lumos" in model.__dict__
        found = step(wrapped, *mixed())
    finally:
        torch.distributed.destroy_process_group()
    assert_same({name.removeprefix("module."): value for name, value in found.items()}, expected)


def test_a_wrapped_decoder_is_patched_inside():
    model = build()
    expected = step(model, *mixed())
    model.model = checkpoint_wrapper(model.model)
    before = state_of(model)
    undo = apply_lumos_kernels(model)
    assert_same(step(model, *mixed()), expected)
    undo()
    assert_untouched(model, before)


def test_given_frames_and_cut_samples():
    model = build()
    ids, labels = batch(document(3, 4, 4, 3), document(9, 4, 8, 3), given=1)
    options = training_options(frame_closs_recorder=False)
    expected = step(model, ids, labels, options)
    apply_lumos_kernels(model)
    assert_same(step(model, ids, labels, options), expected)
    model.config.max_position_embeddings = 60  # inside a frame: upstream fails at its positions
    with pytest.raises(RuntimeError, match=r"expand|shape"):
        step(model, ids, labels, options)


@pytest.mark.parametrize("loss", ["CE", "CEChunked", "Focal"])
def test_the_official_losses(loss):
    model, options = build(), training_options(train_loss=loss)
    expected = step(model, *mixed(), options)
    apply_lumos_kernels(model)
    assert_same(step(model, *mixed(), options), expected)


@pytest.mark.parametrize("loss", ["CE", "Focal"])
def test_exact_zeros_and_impossible_slots_are_left_out_as_upstream_does(loss):
    """One code that nearly all hidden states put far above the others: fp32 losses of 0 and, off it, of hundreds."""
    model = build(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[VISUAL_START] *= -12
    options = training_options(train_loss=loss)
    ids, labels = mixed()
    ids, labels = (
        [[VISUAL_START if t > VISUAL_START + 40 else t for t in row] for row in rows] for rows in (ids, labels)
    )
    expected = step(model, ids, labels, options)
    losses = []
    real = lumos.patch.tube_masked_loss

    def spied(*args, **kwargs):
        result = real(*args, **kwargs)
        losses.append(result[1].nll[kwargs["rows"]].detach())
        return result

    apply_lumos_kernels(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lumos.patch, "tube_masked_loss", spied)
        found = step(model, ids, labels, options)
    assert (losses[0] == 0).any()
    assert (losses[0] > 110).any()
    assert found["loss"].isfinite()
    assert_same({"loss": found["loss"]}, {"loss": expected["loss"]}, 1e-4)
    assert_same(
        {name: value for name, value in found.items() if "frame" in name},
        {name: value for name, value in expected.items() if "frame" in name},
        1e-4,
    )


def test_z_loss_which_fails_upstream():
    model = build(z_loss_weight=0.5)
    with pytest.raises(ValueError, match="fails here"):
        step(model, *mixed())
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    apply_lumos_kernels(model)
    torch.manual_seed(2)
    _, extra = call(model, *mixed())
    value, weight = extra["z_loss"]
    assert weight == 0.5
    ids, labels = mixed()
    length = max(map(len, ids))
    torch.manual_seed(2)
    _, labels, *_ = official.mask_or_random_replace_tokens_video(
        *(
            torch.tensor([row + [fill] * (length - len(row)) for row in rows])
            for rows, fill in ((ids, 0), (labels, -100))
        ),
        9003,
        training_options(),
        lambda u: torch.cos(u * math.pi / 2),
        SPECIAL,
        True,
    )
    logits = (seen[0] @ model.lm_head.weight.T)[labels >= VISUAL_START][:, VISUAL_START:]
    torch.testing.assert_close(value, logits.logsumexp(-1).square().mean())


def says(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == "lumos"]


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"train_with_vis_tok": False, "frame_closs_recorder": False}, {}),
        ({"train_loss": "CEDecay"}, {}),
        ({}, {"mask_image_logits": True, "image_tokens": [4, VISUAL_START + 3]}),
    ],
)
def test_other_losses_go_the_official_way(options, changes, caplog):
    model, options = build(**changes), training_options(**options)
    expected = step(model, *mixed(), options)
    apply_lumos_kernels(model)
    with caplog.at_level(logging.WARNING, "lumos"):
        assert_same(step(model, *mixed(), options), expected)
        step(model, *mixed(), options)
    [message] = says(caplog)  # said once
    assert "is not one over the visual columns alone" in message


def test_the_next_token_loss_fails_as_upstream():
    model = build()
    apply_lumos_kernels(model)
    with pytest.raises(AssertionError, match="upstream asserts"):
        step(model, *mixed(), training_options(compute_ntp_loss=True))


def test_masking_image_logits_below_the_visual_columns_changes_nothing():
    model = build(mask_image_logits=True)
    expected = step(model, *mixed())
    apply_lumos_kernels(model)
    assert_same(step(model, *mixed()), expected)
    assert not model._lumos.told


@pytest.mark.parametrize(
    "odd",
    [
        document(2, 4, 4, 1, start=77, end=77)[:-2] + document(2, 4, 4, 1)[1:],  # a frame before the video
        [*document(2, 4, 4, 2)[:-2], 8196, 9005, 8710],  # a second end of the last frame
    ],
)
def test_samples_that_row_limits_do_not_describe_go_the_official_way(odd, caplog):
    model = build()
    ids, labels = batch(odd)
    options = training_options(frame_closs_recorder=False)
    expected = step(model, ids, labels, options)
    apply_lumos_kernels(model)
    with caplog.at_level(logging.WARNING, "lumos"):
        assert_same(step(model, ids, labels, options), expected)
    assert len(says(caplog)) == 1


@pytest.mark.parametrize("odd", [document(2, 4, 4, 2)[:-2], document(2, 4, 4, 2, start=77, end=77)])
def test_frames_of_an_unfinished_video_or_of_none_are_frames_too(odd):
    model = build()
    ids, labels = batch(odd, document(5, 4, 4, 2))
    expected = step(model, ids, labels)
    apply_lumos_kernels(model)
    assert_same(step(model, ids, labels), expected)
    assert not model._lumos.told


def test_rounded_frequencies_stay_rounded(caplog):
    """model.bfloat16() rounds upstream's inv_freq, and with it the rotation."""
    model = build()
    exact = step(model, *mixed())
    for layer in model.model.layers:
        layer.self_attn.rotary_emb.inv_freq = layer.self_attn.rotary_emb.inv_freq.bfloat16()
    expected = step(model, *mixed())
    assert worst(expected["loss"], exact["loss"]) > 1e-7
    apply_lumos_kernels(model)
    with caplog.at_level(logging.WARNING, "lumos"):
        assert_same(step(model, *mixed()), expected)
    assert "inv_freq" in says(caplog)[0]


# Sampling: the calls of the official sampler, with the masks that it makes.


@pytest.fixture
def attention_calls(monkeypatch) -> list[Tensor]:
    calls, real = [], lumos.patch.frame_attention
    monkeypatch.setattr(lumos.patch, "frame_attention", lambda q, *args, **kw: calls.append(q) or real(q, *args, **kw))
    return calls


@torch.no_grad()
def sampled(model) -> list[Tensor]:
    """Logits of a prefix with its first frame, then of the second frame over the cached prefix, twice."""
    ids = torch.tensor([document(5, 4, 8, 2)[:-2]])
    start = int((ids[0] == 8197).nonzero()[-1])
    mask = official.create_attention_mask_t2v(ids, SPECIAL)
    axes, content = model.model.generate_mm_position_ids(video_sequence=ids)
    text = torch.arange(ids.shape[1])[None]
    positions = (text, *model.model.set_3d_global_offset(axes, text, content), content)
    cache, found = official.DynamicCache(), []
    prefix = {"attention_mask": mask[:, :, :start], "position_ids": tuple(p[:, :start] for p in positions)}
    rest = {"attention_mask": mask[:, :, start:], "position_ids": tuple(p[:, start:] for p in positions)}
    found.append(model(ids[:, :start], past_key_values=cache, use_cache=True, **prefix)[0])
    for _ in range(2):
        found.append(model(ids[:, start:], past_key_values=cache, use_cache=True, **rest)[0])
        cache.crop(start)
    return found


@pytest.mark.parametrize("switches", SWITCHES, ids=lambda switches: ",".join(switches) or "all")
def test_sampling_with_cached_keys_and_values(switches, attention_calls):
    model = build(official.SamplingModel)
    torch.manual_seed(3)
    expected = sampled(model)
    apply_lumos_kernels(model, **switches)
    torch.manual_seed(3)
    for logits, exact in zip(sampled(model), expected, strict=True):
        assert logits.dtype == exact.dtype
        assert worst(logits, exact) < 1e-11
    assert len(attention_calls) == (6 if switches.get("attention", True) else 0)


def uncached(model, **options) -> tuple:
    ids = torch.tensor([document(5, 4, 4, 2)[:-2], document(5, 4, 4, 2)[:-2]])
    with torch.no_grad():
        return model(ids, **{name: make(ids) for name, make in options.items()})


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, -1e9)[None, None]


def odd_positions(ids: Tensor) -> tuple[Tensor, ...]:
    """The official tuple with other positions than the model's; those of t, h and w matter on content alone."""
    content = (ids >= VISUAL_START).long()
    text = torch.arange(ids.shape[1]).expand_as(ids)
    return text, text + 5, 2 * text, 3 * text, content


@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"attention_mask": lambda ids: official.create_attention_mask_t2v(ids, SPECIAL)}, True),
        ({"position_ids": lambda ids: torch.arange(ids.shape[1])[None]}, True),
        ({"position_ids": odd_positions}, True),
        ({"position_ids": lambda ids: odd_positions(ids[:1])}, True),
        ({"attention_mask": lambda ids: torch.ones_like(ids)}, False),
        ({"attention_mask": lambda ids: additive(torch.eye(ids.shape[1]).bool())}, False),  # no prefix
        ({"attention_mask": lambda ids: additive(torch.ones(ids.shape[1], ids.shape[1]).tril().bool()) * 1e-9}, False),
        (
            {"attention_mask": lambda ids: additive(torch.ones(ids.shape[1], ids.shape[1]).triu(-1).bool().flip(1))},
            False,
        ),
        ({"output_attentions": lambda ids: True}, False),
    ],
    ids=[
        "causal",
        "frames",
        "plain rope",
        "odd positions",
        "shared positions",
        "2-D",
        "diagonal",
        "bias",
        "falling",
        "weights",
    ],
)
def test_calls_without_a_cache(options, fused, attention_calls):
    model = build(official.SamplingModel)
    torch.manual_seed(3)
    logits, _, weights = uncached(model, **options)
    apply_lumos_kernels(model)
    torch.manual_seed(3)
    found, _, found_weights = uncached(model, **options)
    assert worst(found, logits) < 1e-11
    assert bool(attention_calls) == fused
    if "output_attentions" in options:
        assert all(torch.equal(a, b) for a, b in zip(weights, found_weights, strict=True))


@pytest.mark.parametrize("name", ["get_max_length", "get_max_cache_shape"])  # transformers 4.44, 4.50
@pytest.mark.parametrize(("size", "fused"), [(None, True), (-1, True), (500, False)])
def test_a_cache_of_fixed_size_goes_the_official_way(name, size, fused, attention_calls, monkeypatch):
    model = build(official.SamplingModel)
    apply_lumos_kernels(model)
    monkeypatch.delattr(official.DynamicCache, "get_max_length")
    monkeypatch.setattr(official.DynamicCache, name, lambda self: size, raising=False)
    sampled(model)
    assert bool(attention_calls) == fused


# What is refused.


def broken(**changes) -> nn.Module:
    model = build()
    for name, value in changes.items():
        target = model.model if hasattr(official.Decoder, name) else model.config
        setattr(target, name, value)
    return model


@pytest.mark.parametrize("model", [nn.Linear(2, 2), Lumos(LumosConfig.preset("tiny"))], ids=["Linear", "Lumos"])
def test_other_models_are_refused_by_what_they_lack(model):
    before = state_of(model)
    with pytest.raises(
        TypeError, match=f"official Chameleon.*; {type(model).__name__} has no .*generate_mm_position_ids"
    ):
        apply_lumos_kernels(model)
    assert_untouched(model, before)


def test_an_official_model_that_lacks_a_part_is_refused():
    model = build()
    model.lm_head.bias = nn.Parameter(torch.zeros(official.VOCABULARY))
    with pytest.raises(TypeError, match="has no lm_head that is a Linear without bias"):
        apply_lumos_kernels(model)
    model = build()
    del model.model.layers[1].self_attn.q_norm
    with pytest.raises(TypeError, match=r"has no model.layers.1.self_attn.q_norm$"):
        apply_lumos_kernels(model)
    assert "_lumos" not in model.model.__dict__


def test_another_training_step_is_refused_rather_than_replaced():
    class Fork(official.TrainingModel):
        def forward_mask(self, input_ids=None, labels=None, training=True, **kwargs):
            loss, extra = super().forward_mask(input_ids, labels, training, **kwargs)
            return 2 * loss, extra

    with pytest.raises(TypeError, match="Fork has no call of mask_or_random_replace_tokens_video in forward_mask, no"):
        apply_lumos_kernels(build(Fork))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mm_rope", False),
        ("attention_dropout", 0.1),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("_attn_implementation", "flash_attention_2"),
        ("image_start_token", 8198),
        ("h_stride_pos_id", 4),
    ],
)
def test_settings_that_the_ops_do_not_compute_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} must be .*; got"):
        apply_lumos_kernels(broken(**{name: value}))


def test_other_frequencies_and_head_sizes_are_refused():
    model = build()
    model.model.layers[1].self_attn.rotary_emb.inv_freq *= 1.01
    with pytest.raises(ValueError, match="inv_freq of layer 1 must be"):
        apply_lumos_kernels(model)
    with pytest.raises(ValueError, match="head_dim must be a multiple of 32"):
        apply_lumos_kernels(build(num_attention_heads=4))
    with pytest.raises(ValueError, match="compat must be one of official, fixed, got 'ours'"):
        apply_lumos_kernels(build(), compat="ours")
    with pytest.raises(ValueError, match="impl: mm_rope has no implementation 'missing'"):
        apply_lumos_kernels(build(), impl="missing")
