"""The comparisons of samplers and the demo's continuation: what they print is what they measured."""

import json

import pytest
import torch
from sampling_oracle import prompt, small_model

from bench import demo_generation, generation, generation_quality, timing
from lumos import generate_tokens
from lumos.codec import DctCodec
from lumos.video import read_video, to_float, to_uint8

ARGUMENTS = ["--grid", "4x4", "--frames", "2", "--steps", "2", "--text", "5", "--threads", "1"]


@pytest.fixture(autouse=True)
def _one_thread():
    with timing.torch_threads(1):
        yield


def options(*more):
    return generation.parser().parse_args([*ARGUMENTS, *more])


def test_samplers_agree_and_are_counted():
    everyone = [generation.OURS, generation.OFFICIAL, generation.UNCACHED]
    comparison = generation.Generation(options("--batch", "1", "2", "--contestants", *everyone))
    rows = generation.time_all(comparison, 1)["rows"]
    assert [(row["contestant"], row["batch"]) for row in rows] == [(everyone[0], 1), (everyone[0], 2)] + [
        (name, 1) for name in everyone[1:]
    ]
    assert [row["forwards"] for row in rows] == [6, 6, 12, 8]
    assert all(row["agreement"] == 1.0 and row["seconds_a_frame"] > 0 for row in rows)


def test_forwards_are_those_made(monkeypatch):
    comparison, made = generation.Generation(options()), []
    decoder = type(comparison.model.model)
    original = decoder.forward
    monkeypatch.setattr(decoder, "forward", lambda self, *args: made.append(1) or original(self, *args))
    comparison.sample(generation.OURS)
    assert len(made) == comparison.forwards(generation.OURS)


def test_a_sampler_that_makes_something_else_gets_no_figure(monkeypatch):
    comparison = generation.Generation(options())
    original = comparison.sample
    monkeypatch.setattr(
        comparison,
        "sample",
        lambda name, *a, **k: [ids + (name == generation.OURS) for ids in original(name, *a, **k)],
    )
    with pytest.raises(RuntimeError, match="greedy tokens differ"):
        generation.time_all(comparison, 1)


def test_the_command_prints_json(capsys):
    assert generation.main([*ARGUMENTS, "--part", "time"]) == 0
    assert [row["contestant"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["ours", "official"]


def test_quality_of_shortcuts():
    """Exact agrees with itself; what changes nothing agrees too; a document's own frames are what `clip` compares."""
    model = small_model()
    documents = [
        torch.cat([prompt(6)[:9], generate_tokens(model, [prompt(6)], (4, 4), 3, steps=3, seed=seed)[0][1:]])
        for seed in (0, 1)
    ]
    rows = {row["variant"]: row for row in generation_quality.measure(model, documents, 4, 2.0)}
    assert rows["exact"]["agreement"] == 1.0
    assert rows["exact"]["steps_a_frame"] == 4
    assert rows["half the steps"]["steps_a_frame"] == 2
    assert rows["window (1, 1)"]["agreement"] == 1.0  # three frames: nothing is out of sight
    assert rows["window (0, 1)"]["cache_bytes"] < rows["exact"]["cache_bytes"]
    assert all(row["nll"] > 0 and 0 <= row["clip"] <= 1 for row in rows.values())
    assert generation_quality.markdown(list(rows.values())).count("\n") == len(rows) + 1


def moving(frames=9):
    """uint8 [F, 32, 64, 3]: a bright square that moves."""
    pictures = torch.full((frames, 32, 64, 3), 40, dtype=torch.uint8)
    for at in range(frames):
        pictures[at, 8:16, 4 * at : 4 * at + 8] = 220
    return pictures


def test_continuation_figures(tmp_path):
    codec, original = DctCodec(), moving()
    true = codec.encode(to_float(original))
    perfect = demo_generation._compare("a", original, true, to_uint8(codec.decode(true))[:9])
    assert perfect.accuracy == [1.0, 1.0]
    assert perfect.psnr > 90
    assert perfect.motion[0] == perfect.motion[1] > 0
    assert all(0 < share < 1 for share in perfect.still)
    still = codec.encode(to_float(original[:1].expand_as(original).contiguous()))
    frozen = demo_generation._compare("b", original, still, to_uint8(codec.decode(still))[:9])
    assert frozen.accuracy == frozen.still == perfect.still
    assert frozen.psnr == frozen.psnr_still < 30
    assert frozen.motion[1] < perfect.motion[1]

    demo_generation.write_gif(tmp_path / "a.gif", [perfect, frozen], 12)
    assert read_video(tmp_path / "a.gif", 12).shape == (9, 128, 384, 3)
    demo_generation.plot(tmp_path / "a.png", [perfect, frozen])
    assert (tmp_path / "a.png").stat().st_size > 1000
    text = "\n".join(demo_generation.report_lines([perfect, frozen], 1.0))
    assert "| a | 100 % (" in text
    assert "continuation.gif" in text
