import math

import pytest
import torch
from golden import TRAINING, build_model, load, worst
from host_syncs import HostSync, NoHostSync
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lumos.config import LumosConfig
from lumos.masking import mask_tokens
from lumos.model import Lumos, frame_decay
from lumos.stream import Stream
from lumos.train.config import TrainConfig
from lumos_kernels import FrameLayout
from lumos_kernels.frame_layout.frames import frame_skeleton
from lumos_kernels.layout import RowLimits
from lumos_kernels.token_ids import NEW_LINE

CLASSES = (9216, 9344)


def small_config(**changes):
    sizes = {
        "vocab_size": CLASSES[1],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "visual_start": CLASSES[0],
    }
    return LumosConfig(**(sizes | changes))


def small_model(**changes):
    """A model whose random weights are large enough for attention and loss to be far from uniform."""
    torch.manual_seed(1)
    model = Lumos(small_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "embed_tokens" in name:
                parameter.mul_(50)
            else:
                parameter.mul_(7)
    return model


def video(rows=4, cols=4, frames=3, text=6):
    frame = frame_skeleton(rows, cols)
    ids = torch.cat([torch.randint(1, 4000, (text,)), frame.repeat(frames), torch.tensor([9005, 8710])])
    codes = FrameLayout.from_tokens(ids[None]).content & (ids != NEW_LINE)
    ids[codes] = torch.randint(*CLASSES, (int(codes.sum()),))
    return ids


def training_batch(documents, **options):
    length = max(len(ids) for ids in documents)
    ids = torch.stack([F.pad(ids, (0, length - len(ids))) for ids in documents])
    return mask_tokens(ids, seeds=range(len(documents)), classes=CLASSES, **options)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", TRAINING)
def test_golden_training_step(name):
    """Measured with the reference ops: loss 2e-7, frame losses 1e-7, hidden 9e-7, gradients 3e-6."""
    tensors, metadata = load(name)
    model = build_model(tensors, metadata)
    first = model.config.visual_start
    out = model(tensors["masked_input_ids"].long(), labels=tensors["masked_labels"].long())
    out.loss.backward()

    assert worst(out.loss, tensors["loss"][0]) < 1e-5
    assert worst(out.frame_losses, tensors["frame_losses"]) < 2e-5
    real = torch.arange(out.hidden_states.shape[1]) < tensors["lengths"][:, None]
    assert worst(out.hidden_states[real], tensors["hidden_last"][real]) < 1e-5
    logits = model.logits(out.hidden_states.detach()[tensors["masked_labels"] >= first])
    assert worst(logits, tensors["visual_logits_selected"]) < 1e-5

    grads = gradients(model)
    rows = {"embed_rows": "model.embed_tokens.weight", "lm_head.visual_rows": "lm_head.weight"}
    compared = 0
    for key in tensors:
        if key.startswith("grad."):
            parameter = key.removeprefix("grad.")
            ours = grads[rows.get(parameter, parameter)]
            picked = {"embed_rows": tensors["embed_rows"].long(), "lm_head.visual_rows": slice(first, None)}
            ours = ours[picked[parameter]] if parameter in picked else ours
            assert worst(ours, tensors[key]) < 5e-5, parameter
            compared += 1
    assert compared == 16
    assert not grads["lm_head.weight"][:first].any()


def test_a_padded_batch_is_its_documents_run_singly():
    """Upstream shares one attention mask across the batch; here each document keeps its own."""
    tensors, metadata = load("video_batch_padded")
    model = build_model(tensors, metadata)
    ids, labels = tensors["masked_input_ids"].long(), tensors["masked_labels"].long()
    whole = model(ids, labels=labels)
    sums, counts = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for row, length in enumerate(tensors["lengths"].tolist()):
        single = model(ids[row : row + 1, :length], labels=labels[row : row + 1, :length])
        assert worst(single.hidden_states[0], whole.hidden_states[row, :length]) < 1e-6
        row_sums, row_counts = single.frame_sums(2)
        sums, counts = sums + row_sums, counts + row_counts
    assert worst(sums.sum() / counts.sum(), whole.loss) < 1e-6
    assert worst(sums / counts, whole.frame_losses) < 1e-6


def test_a_packed_stream_is_the_padded_batch():
    model = small_model()
    documents = [video(4, 4, 3, 6), video(4, 8, 2, 11), video(8, 4, 1, 0)]
    padded = training_batch(documents)
    lengths = [len(ids) for ids in documents]
    ids = torch.cat([row[:n] for row, n in zip(padded.input_ids, lengths, strict=True)])
    labels = torch.cat([row[:n] for row, n in zip(padded.labels, lengths, strict=True)])
    layout = FrameLayout.from_tokens(ids, torch.tensor([0, *lengths]).cumsum(0))

    one = model(padded.input_ids, labels=padded.labels)
    two = model(ids, labels=labels, layout=layout)
    assert two.hidden_states.shape == (sum(lengths), 64)
    for row, run in enumerate(two.hidden_states.split(lengths)):
        assert worst(run, one.hidden_states[row, : lengths[row]]) < 1e-5
    assert worst(two.loss, one.loss) < 1e-6
    assert worst(two.frame_losses, one.frame_losses) < 1e-6
    one.loss.backward()
    expected = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()
    two.loss.backward()
    for name, grad in gradients(model).items():
        assert worst(grad, expected[name]) < 1e-5, name


@pytest.mark.parametrize("swin_norm", [False, True])
def test_nothing_reaches_back_in_time_or_across_documents(swin_norm):
    model = small_model(swin_norm=swin_norm, num_key_value_heads=2, model_parallel_size=2).eval()
    ids = torch.stack([video(frames=3), video(frames=3)])
    frame = FrameLayout.from_tokens(ids).frame_index.view(2, -1)
    changed = ids.clone()
    changed[0][frame[0] == 1] = CLASSES[0]
    with torch.no_grad():
        before, after = model(ids).hidden_states, model(changed).hidden_states
    start = int((frame[0] == 1).nonzero()[0]) - 3  # the frame's header sees its content
    assert torch.equal(before[0, :start], after[0, :start])
    assert torch.equal(before[1], after[1])
    assert (before[0, start:] != after[0, start:]).any(-1).all()


def slot_terms(model, batch):
    """nll, lse and frame of every target slot, from whole logits: the definition of SEMANTICS, spelt out."""
    out = model(batch.input_ids)
    targets = batch.labels >= CLASSES[0]
    logits = model.logits(out.hidden_states[targets])
    nll = F.cross_entropy(logits, batch.labels[targets] - CLASSES[0], reduction="none")
    frame = out.layout.frame_index.view_as(targets)[targets]
    return nll, logits.logsumexp(-1), frame, out.layout


@pytest.mark.parametrize("kind", ["random", "DiffForcing", "tubeDecay"])
def test_frame_losses_are_exact_for_masks_that_are_no_tube(kind):
    model = small_model()
    batch = training_batch([video(frames=4), video(frames=2), video(4, 8, frames=3)], kind=kind, min_rate=0.2)
    out = model(batch.input_ids, labels=batch.labels, rows=batch.rows)
    nll, _, frame, _ = slot_terms(model, batch)
    expected = torch.stack([nll[frame == f].mean() for f in range(4)])
    assert worst(out.frame_losses, expected) < 1e-6
    assert worst(out.loss, nll.mean()) < 1e-6
    assert not out.frame_losses.requires_grad


def test_frames_without_targets_have_no_loss():
    model = small_model()
    batch = training_batch([video(frames=3)], given_frames=1)
    losses = model(batch.input_ids, labels=batch.labels).frame_losses
    assert losses.isnan().tolist() == [True, False, False]


OPTIONS = [
    {"z_loss_weight": 0.01},
    {"focal_gamma": 2.0},
    {"decay_start": 0.3},
    {"focal_gamma": 2.0, "z_loss_weight": 0.01},
    {"decay_start": 0.3, "z_loss_weight": 0.01},
    {"focal_gamma": 1.5, "decay_start": 2.0, "z_loss_weight": 0.01},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_loss_options_and_their_gradients_follow_the_definition(options):
    model = small_model()
    batch = training_batch([video(frames=3), video(frames=2), video(frames=1)], kind="random", min_rate=0.4)
    nll, lse, frame, layout = slot_terms(model, batch)
    frames = torch.tensor([3, 2, 1]).repeat_interleave(batch.input_ids.shape[1])[batch.rows.long()]
    scale = torch.ones_like(nll)
    if "focal_gamma" in options:
        scale = scale * (1 - (-nll).exp()) ** options["focal_gamma"]
    if "decay_start" in options:
        weights = {n: torch.linspace(options["decay_start"], 1, n) for n in (1, 2, 3)}
        decay = torch.stack([weights[int(n)][f] for n, f in zip(frames, frame, strict=True)])
        torch.testing.assert_close(frame_decay(layout, options["decay_start"])[batch.rows.long()], decay)
        scale = scale * decay
    expected = (scale * nll).mean() + options.get("z_loss_weight", 0.0) * lse.square().mean()
    expected.backward()
    wanted = {name: grad.clone() for name, grad in gradients(model).items()}
    model.zero_grad()

    counted = model(batch.input_ids, labels=batch.labels, **options)
    out = model(batch.input_ids, labels=batch.labels, rows=batch.rows, **options)
    assert torch.equal(counted.loss, out.loss)
    assert worst(out.loss, expected) < 2e-6
    (3 * out.loss).backward()
    for name, grad in gradients(model).items():
        assert worst(grad / 3, wanted[name]) < 2e-5, name
    # The recorded cross entropy is the plain one, whatever is optimised.
    assert worst(out.nll[batch.rows.long()], nll) < 1e-6


def test_z_loss_weight_comes_from_the_config():
    batch = training_batch([video()])
    plain, weighted = small_model(), small_model(z_loss_weight=0.5)
    asked = plain(batch.input_ids, labels=batch.labels, z_loss_weight=0.5).loss
    assert torch.equal(weighted(batch.input_ids, labels=batch.labels).loss, asked)
    assert asked > plain(batch.input_ids, labels=batch.labels).loss


def test_no_targets_give_zero_loss_and_gradients():
    model = small_model()
    ids = video()[None]
    for options in ({}, {"focal_gamma": 2.0}):
        out = model(ids, labels=torch.full_like(ids, -100), **options)
        assert out.loss == 0
        out.loss.backward()
        assert not any(grad is not None and grad.any() for grad in gradients(model).values())


def test_checkpointed_layers_are_recomputed_and_change_nothing():
    model = small_model(dropout=0.25, num_hidden_layers=3)
    batch = training_batch([video()])
    calls = []
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_hook(lambda *_, number=number: calls.append(number))

    def step():
        torch.manual_seed(5)
        calls.clear()
        model.zero_grad()
        model(batch.input_ids, labels=batch.labels).loss.backward()
        return {name: grad.clone() for name, grad in gradients(model).items()}

    plain = step()
    assert sorted(calls) == [0, 1, 2]
    for every, expected in ((1, [0, 0, 1, 1, 2, 2]), (2, [0, 0, 1, 2, 2]), (0, [0, 1, 2])):
        model.checkpoint_layers(every)
        again = step()
        assert sorted(calls) == expected
        assert all(torch.equal(again[name], grad) for name, grad in plain.items())


@pytest.mark.parametrize(("swin_norm", "dropout"), [(False, 0.0), (True, 0.0), (False, 0.25), (True, 0.25)])
@pytest.mark.parametrize("autocast", [False, True])
def test_selective_checkpointing_repeats_no_costly_op_and_changes_no_bit(swin_norm, dropout, autocast):
    """Matmuls and attention run once in forward; what is kept of them: test_scaling.py, to the byte."""
    model = small_model(swin_norm=swin_norm, dropout=dropout, num_hidden_layers=2)
    batch = training_batch([video()])

    class Costly(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.lumos_kernels.frame_attention.default):
                calls.append(func)
            return func(*args, **(kwargs or {}))

    def step():
        torch.manual_seed(5)
        model.zero_grad()
        with Costly(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(batch.input_ids, labels=batch.labels).loss
        calls.clear()
        with Costly():
            loss.backward()
        return len(calls), {name: grad.clone() for name, grad in gradients(model).items()}

    calls = []
    plain, expected = step()
    model.checkpoint_layers(1, selective=True)
    selective, ours = step()
    assert selective == plain
    model.checkpoint_layers(1)
    full, also = step()
    # Of seven matmuls and attention, the last matmul repeats only where something behind it keeps a tensor.
    assert full == plain + 2 * (8 if swin_norm or dropout else 7)
    for name, grad in expected.items():
        assert torch.equal(ours[name], grad), name
        assert torch.equal(also[name], grad), name


def test_dropout_acts_in_training_only():
    model, ids = small_model(dropout=0.5), video()[None]
    assert not torch.equal(model(ids).hidden_states, model(ids).hidden_states)
    model.eval()
    assert torch.equal(model(ids).hidden_states, small_model().eval()(ids).hidden_states)


class GrowingCache:
    """Keys and values of every layer, appended to."""

    def __init__(self):
        self.kept = {}

    def update(self, layer, k_TKD, v_TKD):
        old = self.kept.get(layer, (k_TKD[:0], v_TKD[:0]))
        self.kept[layer] = torch.cat([old[0], k_TKD]), torch.cat([old[1], v_TKD])
        return self.kept[layer]


def test_a_cached_prefix_gives_what_the_whole_sequence_gives():
    model, ids = small_model().eval(), video(frames=3)
    layout = FrameLayout.from_tokens(ids[None])
    cache, parts, begin = GrowingCache(), [], 0
    with torch.no_grad():
        whole = model(ids[None]).hidden_states[0]
        for end in (6 + 24, 6 + 48, len(ids)):  # text and the first frame, the second frame, the rest
            limits = layout.limits
            limits = RowLimits.from_kv(limits.kv_start[begin:end], limits.kv_end[begin:end], end)
            parts.append(model.model(ids[begin:end], Stream(layout.positions[:, begin:end], limits, cache=cache)))
            begin = end
    assert worst(torch.cat(parts), whole) < 1e-5


def test_implementations_are_passed_to_every_op():
    model, batch = small_model(), training_batch([video()])
    auto = model(batch.input_ids, labels=batch.labels).loss
    model.impl = "reference"
    assert worst(model(batch.input_ids, labels=batch.labels).loss, auto) < 1e-6
    for op in ("mm_rope", "frame_attention", "tube_masked_loss"):
        model.impl = {op: "triton"}
        with pytest.raises(ValueError, match=f"{op}: impl='triton' cannot run here"):
            model(batch.input_ids, labels=batch.labels)


@pytest.mark.parametrize(
    ("impl", "message"),
    [
        ("nativ", "impl: mm_rope has no implementation 'nativ'; there are auto, triton, native, reference"),
        ("flash", r"impl: mm_rope has no implementation 'flash'.*give a mapping .*\{\"op\": 'flash'\}"),
        ({"attention": "reference"}, "impl names the op 'attention'; there are .*frame_attention"),
        ({"frame_attention": "abacus"}, "impl: frame_attention has no implementation 'abacus'"),
        ({"mm_rope": None}, "impl: mm_rope has no implementation None"),
        (None, "impl must be a name, or a mapping from ops to names; got NoneType"),
    ],
)
def test_implementations_that_do_not_exist_are_refused_at_once(impl, message):
    model = small_model()
    for attempt in (
        lambda: Lumos(model.config, impl=impl),
        lambda: setattr(model, "impl", impl),
        lambda: TrainConfig(impl=impl),
    ):
        with pytest.raises(ValueError, match=message):
            attempt()
    assert model.impl == "auto"


def test_lengths_beyond_the_limit_are_refused_not_cut():
    model, ids = small_model(max_position_embeddings=60), video(frames=3)
    assert len(ids) == 80
    with pytest.raises(ValueError, match="a document has 80 tokens, more than max_position_embeddings 60"):
        model(ids[None])
    with pytest.raises(ValueError, match="a document has 80 tokens, more than max_position_embeddings 60"):
        model(ids, layout=FrameLayout.from_tokens(ids, torch.tensor([0, 80])))
    two = torch.cat([video(frames=2), video(frames=2)])
    model(two, layout=FrameLayout.from_tokens(two, torch.tensor([0, 56, 112])))  # 112 tokens, but 56 a document


@pytest.mark.parametrize("options", [{}, {"focal_gamma": 2.0, "decay_start": 0.5, "z_loss_weight": 0.1}], ids=str)
def test_a_step_never_waits_for_the_device(options, monkeypatch):
    def no_attention(q, k, v, limits, **_):  # the CPU implementations may read the limits; the model must not
        return q + k.repeat_interleave(q.shape[1] // k.shape[1], 1) + v.repeat_interleave(q.shape[1] // k.shape[1], 1)

    monkeypatch.setattr("lumos.model.frame_attention", no_attention)
    model, batch = small_model(), training_batch([video(), video(frames=2)])
    model.impl = "reference"
    with NoHostSync():
        out = model(batch.input_ids, labels=batch.labels, rows=batch.rows, **options)
        out.loss.backward()
        out.frame_sums(3)
    with NoHostSync(), pytest.raises(HostSync):  # counting rows and reading frame losses do
        _ = model(batch.input_ids, labels=batch.labels, **options).frame_losses


def test_bad_arguments_are_named():
    model, ids = small_model(), video()[None]
    with pytest.raises(ValueError, match=r"packed input_ids \[80\] need layout="):
        model(ids[0])
    with pytest.raises(ValueError, match="layout must describe the 79 tokens of input_ids on cpu, got 80 on cpu"):
        model(ids[:, 1:], layout=FrameLayout.from_tokens(ids))
    with pytest.raises(ValueError, match=r"labels must have the shape of input_ids \[1, 80\], got \[80\]"):
        model(ids, labels=ids[0])
    with pytest.raises(ValueError, match=r"focal_gamma must be 0 or >= 1 .* got 0.5"):
        model(ids, labels=ids, focal_gamma=0.5)
    out = model(ids)
    assert out.loss is None
    with pytest.raises(ValueError, match="frame losses need labels"):
        _ = out.frame_losses


def test_logits_of_any_ids():
    model, hidden = small_model(), torch.randn(3, 64)
    torch.testing.assert_close(model.logits(hidden, (5, 9)), hidden @ model.lm_head.weight[5:9].T)


def test_parameters_have_the_official_names():
    tensors, metadata = load("video_swin_mp2")
    official = {key.removeprefix("weight.") for key in tensors if key.startswith("weight.")}
    official = official - {"embed_rows", "lm_head.visual_rows"} | {"model.embed_tokens.weight", "lm_head.weight"}
    assert set(build_model(tensors, metadata).state_dict()) == official


def test_fresh_weights():
    config = small_config(hidden_size=256, num_attention_heads=4, num_key_value_heads=2, model_parallel_size=2)
    model = Lumos(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == config.num_parameters
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
    batch = training_batch([video(frames=2)])
    # Small weights guess evenly over the 128 classes.
    assert model(batch.input_ids, labels=batch.labels).loss.item() == pytest.approx(math.log(128), rel=0.02)
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in Lumos(config).parameters())


def test_bf16_stays_within_its_own_rounding():
    model, batch = small_model(), training_batch([video()])
    exact = model.double()(batch.input_ids, labels=batch.labels)
    assert exact.hidden_states.dtype == torch.float64
    low = model.bfloat16()(batch.input_ids, labels=batch.labels)
    assert low.hidden_states.dtype == torch.bfloat16
    assert low.loss.dtype == torch.float32
    assert worst(low.loss, exact.loss) < 0.02
    low.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
