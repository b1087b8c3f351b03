"""lumos/train/ and lumos/cli.py: steps, logs, checkpoints and the command line, on synthetic and real clips."""

import json
import math

import pytest
import torch

from lumos import Lumos, LumosConfig
from lumos.cli import main
from lumos.data import SampleFolder, SampleWriter
from lumos.tokens import ByteTokenizer, build_document
from lumos.train import MicroBatch, PackedBatches, TrainConfig, make_optimizer, read_log, train, training_step
from lumos.train.batches import open_sources
from lumos.video import sample_clips
from lumos_kernels import tube_masked_loss

VISUAL_START = 65536
CODES = 40


def small_config() -> LumosConfig:
    """Two layers, and a class slice that a test can afford."""
    return LumosConfig(
        vocab_size=VISUAL_START + CODES,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )


@pytest.fixture
def folder(tmp_path):
    """Five clips of 2 to 3 frames on a 4 x 8 grid: a pattern that moves by one code a frame."""
    with SampleWriter(tmp_path / "tokens") as writer:
        for number in range(5):
            frames = 2 + number % 2
            codes = (torch.arange(32).view(4, 8) + torch.arange(frames)[:, None, None] + number) % CODES
            text = ByteTokenizer().encode(f"clip {number}")
            writer.add(build_document(text, codes, seconds=1, fps=4 * frames - 4), caption=f"clip {number}")
    return tmp_path / "tokens"


@pytest.fixture
def tiny_preset(monkeypatch):
    monkeypatch.setattr(LumosConfig, "preset", classmethod(lambda cls, name: small_config()))


def batches_of(folder, **options) -> PackedBatches:
    return PackedBatches(open_sources([folder]), TrainConfig(**options), small_config().classes)


def step_of(folder, **options) -> list[MicroBatch]:
    """The first step's micro-batches."""
    batches = batches_of(folder, **options)
    return [batches.load(stream) for stream in batches.next_plan()]


def test_loss_falls_and_is_logged_step_by_step(folder, tmp_path, tiny_preset):
    config = TrainConfig(data=(str(folder),), out=str(tmp_path / "run"), steps=80, documents=5, lr=1e-2, warmup=5)
    summary = train(config, progress=False)
    log = list(read_log(summary.log))
    assert [line["step"] for line in log] == list(range(80))
    assert log[0]["loss"] == pytest.approx(math.log(CODES), abs=0.2)
    assert sum(line["loss"] for line in log[-5:]) / 5 < 0.5 * log[0]["loss"]
    assert log[0]["lr"] == pytest.approx(1e-2 / 5)
    assert log[-1]["lr"] == pytest.approx(1e-2)
    assert log[0]["frame_losses"][:2] == pytest.approx([math.log(CODES)] * 2, abs=0.3)
    assert all(line["tokens_per_s"] > 0 and line["peak_memory_gb"] > 0 and line["grad_norm"] > 0 for line in log)
    assert json.loads((tmp_path / "run" / "train.json").read_text())["documents"] == 5


def test_the_same_seed_gives_the_same_run_and_another_seed_another(folder, tmp_path, tiny_preset):
    def losses(name, seed):
        config = TrainConfig(data=(str(folder),), out=str(tmp_path / name), steps=4, documents=2, seed=seed)
        return [line["loss"] for line in read_log(train(config, progress=False).log)]

    first = losses("a", 3)
    assert losses("b", 3) == first
    assert losses("c", 4) != first


def test_checkpoint_continues_where_the_run_ended(folder, tmp_path, tiny_preset):
    config = TrainConfig(data=(str(folder),), out=str(tmp_path / "run"), steps=3, lr=1e-2)
    summary = train(config, progress=False)
    model = Lumos.from_pretrained(summary.checkpoint)
    (batch,) = step_of(folder)
    with torch.no_grad():
        out = model(batch.masked.input_ids, labels=batch.masked.labels, layout=batch.layout, rows=batch.masked.rows)
    more = TrainConfig(data=(str(folder),), out=str(tmp_path / "more"), steps=1, init=str(summary.checkpoint))
    first = next(read_log(train(more, progress=False).log))
    assert first["loss"] == pytest.approx(float(out.loss), abs=1e-5)


def test_accumulated_micro_batches_give_the_gradient_of_their_union(folder):
    torch.manual_seed(0)
    model = Lumos(small_config())
    halves = step_of(folder, micro_batches=2, text_drop=0.0)
    assert halves[0].num_targets != halves[1].num_targets, "equal sizes would not show a wrong weighting"

    def gradients(step):
        training_step(model, torch.optim.SGD(model.parameters(), lr=0.0), step, clip=math.inf)
        return [p.grad.clone() for p in model.parameters()]

    together = gradients(halves)
    total = sum(half.num_targets for half in halves)
    apart = [gradients([half]) for half in halves]
    for got, *parts in zip(together, *apart, strict=True):
        want = sum(half.num_targets / total * part for half, part in zip(halves, parts, strict=True))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)


def test_packing_and_loss_options_reach_the_run(folder, tmp_path, tiny_preset):
    def log_of(name, **options):
        config = TrainConfig(
            data=(str(folder),), out=str(tmp_path / name), steps=1, look_ahead=4, checkpoint_every=0, **options
        )
        return list(read_log(train(config, progress=False).log))

    packed = {"token_budget": 400, "micro_batches": 2}
    plain = log_of("plain", **packed)
    assert all(700 < line["tokens"] <= 800 for line in plain)
    for number, option in enumerate(({"z_loss": 0.1}, {"focal_gamma": 2.0}, {"decay_start": 0.1})):
        assert abs(log_of(f"loss {number}", **packed, **option)[0]["loss"] - plain[0]["loss"]) > 0.05, option
    given = log_of("given", **packed, given_frames=1)
    assert given[0]["frame_losses"][0] is None
    assert given[0]["tokens"] == plain[0]["tokens"]
    assert given[0]["targets"] < plain[0]["targets"]


def test_gradient_is_clipped_to_the_norm(folder):
    model = Lumos(small_config())
    step = step_of(folder)
    stats = training_step(model, torch.optim.SGD(model.parameters(), lr=0.0), step, clip=1e-3)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert stats.grad_norm > 1e-2
    assert norm == pytest.approx(1e-3, rel=1e-2)


def test_bfloat16_step_keeps_fp32_weights_and_follows_the_fp32_loss(folder):
    torch.manual_seed(0)
    model = Lumos(small_config())
    optimizer = make_optimizer(model, lr=1e-9, weight_decay=0.0)
    step = step_of(folder)
    exact, rounded = (
        training_step(model, optimizer, step, 4.0, dtype).loss for dtype in (torch.float32, torch.bfloat16)
    )
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert exact != rounded, "bfloat16 must take effect"
    assert rounded == pytest.approx(float(exact), rel=2 * torch.finfo(torch.bfloat16).eps)


def test_weight_decay_spares_norms_and_biases():
    model = Lumos(small_config())
    decayed, others = make_optimizer(model, lr=1e-3, weight_decay=0.1).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("norm" in names[id(p)] for p in others["params"])
    assert not any("norm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(names)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"text_drop": 1.5}, "text_drop"),
        ({"lr": 0.0}, "lr"),
        ({"dtype": "float8"}, "dtype"),
        ({"preset": "7B"}, "preset"),
        ({"data": ()}, "data"),
        ({"mask_kind": "stripes"}, "mask_kind"),
        ({"mask_schedule": "wave"}, "schedule"),
        ({"device": "tpu"}, "device"),
        ({"seed": -1}, "seed"),
        ({"micro_batches": 0}, "micro_batches"),
        ({"token_budget": -1}, "token_budget"),
        ({"token_budget": 100, "documents": 2}, "exclude each other"),
        ({"pad_to_budget": True}, "token_budget"),
        ({"too_long": "cut"}, "too_long"),
        ({"look_ahead": 0}, "look_ahead"),
        ({"given_frames": -2}, "given_frames"),
        ({"given_frames_prob": 1.5}, "given_frames_prob"),
        ({"z_loss": -0.1}, "z_loss"),
        ({"focal_gamma": 0.5}, "focal_gamma"),
        ({"decay_start": -1.0}, "decay_start"),
    ],
)
def test_bad_options_are_named(folder, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(TrainConfig(**{"data": (str(folder),), "out": str(tmp_path / "run"), **options}), progress=False)


def test_an_earlier_run_is_kept_unless_told_otherwise(folder, tmp_path, tiny_preset):
    options = {"data": (str(folder),), "out": str(tmp_path / "run"), "steps": 1}
    log = train(TrainConfig(**options), progress=False).log
    before = log.read_bytes()
    with pytest.raises(ValueError, match="earlier run"):
        train(TrainConfig(**options, seed=1), progress=False)
    assert log.read_bytes() == before
    train(TrainConfig(**options, seed=1, overwrite=True), progress=False)
    assert log.read_bytes() != before


def test_autocast_reaches_the_loss(folder, monkeypatch):
    seen = []

    def spy(hidden, *args, **kwargs):
        seen.append(hidden.dtype)
        return tube_masked_loss(hidden, *args, **kwargs)

    monkeypatch.setattr("lumos.model.tube_masked_loss", spy)
    model = Lumos(small_config())
    for dtype in (torch.float32, torch.bfloat16):
        training_step(model, torch.optim.SGD(model.parameters(), lr=0.0), step_of(folder), 1.0, dtype)
    assert seen == [torch.float32, torch.bfloat16]


def test_command_line_tokenizes_and_trains_on_a_real_clip(tmp_path, tiny_preset, capsys, monkeypatch):
    real = VISUAL_START + 64000
    monkeypatch.setattr("test_train.small_config", lambda: LumosConfig(real, 64, 96, 1, 2))
    clip = str(sample_clips()["carphone_pristine"])
    tokens, run = str(tmp_path / "tokens"), str(tmp_path / "run")
    arguments = ["tokenize", clip, "--caption", "a man", "--out", tokens, "--size", "64x64", "--seconds", "1"]
    assert main([*arguments, "--fps", "4"]) == 0
    assert len(SampleFolder(tokens)) == 1
    assert main(["train", "--data", tokens, "--out", run, "--steps", "2", "--lr", "1e-3"]) == 0
    assert "loss" in capsys.readouterr().out
    assert len(list(read_log(f"{run}/log.jsonl"))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tokenize", "missing.mp4", "--caption", "x", "--out", "OUT"], "missing.mp4"),
        (["tokenize", "a.mp4", "b.mp4", "c.mp4", "--caption", "x", "--caption", "y", "--out", "OUT"], "--caption"),
        (["train", "--data", "nowhere", "--out", "OUT"], "nowhere"),
        (["train", "--data", "nowhere", "--lr", "-1", "--out", "OUT"], "lr"),
        (["train", "--data", "nowhere", "--device", "tpu", "--out", "OUT"], "device"),
    ],
)
def test_command_line_errors_are_one_line_and_exit_2(tmp_path, capsys, arguments, message):
    assert main([argument.replace("OUT", str(tmp_path / "out")) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().splitlines()[-1].startswith("lumos: ")
    assert "Traceback" not in error


def test_command_line_lists_backends(capsys):
    assert main(["backends"]) == 0
    assert "frame_attention" in capsys.readouterr().out
