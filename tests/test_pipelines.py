import copy
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from lumos import Lumos, LumosConfig
from lumos.cli import main
from lumos.codec import DctCodec
from lumos.evaluation import Batch, read_items, shard
from lumos.pipelines import Pipeline, Request
from lumos.prompts import OFFICIAL_TEMPLATE
from lumos.tokens import ByteTokenizer, parse_document
from lumos.video import read_image, read_video, to_float, to_uint8, write_image, write_video

SIZE = (32, 64)
FAST = {"steps": 2, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    return Lumos(LumosConfig(vocab_size=129536, **sizes))


@pytest.fixture(scope="module")
def pipeline(model):
    return Pipeline(model, ByteTokenizer(), DctCodec())


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    return folder


def pictures(count, seed=0):
    torch.manual_seed(seed)
    return torch.randint(0, 256, (count, *SIZE, 3), dtype=torch.uint8)


def test_prompt_is_the_official_one(pipeline):
    """Words of upstream's inference, resolution as WIDTHxHEIGHT, then separator, video start, seconds, fps."""
    ids = pipeline.prompt_ids(Request("a red bus", (256, 448), fps=12, seconds=2))
    text = (
        "Generate a video with a resolution of 448x256, consisting of 24 frames at 12 frames per second, "
        "according to the following prompt:\n a red bus"
    )
    assert ids.tolist() == [0, *ByteTokenizer().encode(text), 8710, 9004, 8806, 8816]
    assert OFFICIAL_TEMPLATE.format(prompt="{x}", width=1, height=1, pictures=1, fps=1).endswith("{x}")


def test_given_pictures_follow_the_header(pipeline):
    """Five pictures are two latent frames, the sixth does not fill a third."""
    request = Request("x", SIZE, given=pictures(6))
    ids = pipeline.prompt_ids(request)
    head = len(pipeline.prompt_ids(Request("x", SIZE)))
    whole = torch.cat([ids, torch.tensor([9005, 8710])])
    assert torch.equal(parse_document(whole).codes, DctCodec().encode(to_float(pictures(6)[:5])))
    assert len(ids) == head + 2 * (4 * 9 + 4)


def test_tasks(pipeline, tmp_path):
    """Text to image, text to video, image to video, continuation, together: sizes, and given pictures kept."""
    write_image(tmp_path / "a.png", pictures(1)[0])
    write_video(tmp_path / "a.mp4", pictures(12), 12)
    requests = [
        Request.image("image", SIZE),
        Request("video", SIZE, fps=4, seconds=2),
        Request.from_image("first", tmp_path / "a.png", SIZE, fps=4, seconds=2),
        Request.from_video("more", tmp_path / "a.mp4", SIZE, fps=12, seconds=1, given_seconds=0.5),
    ]
    results = pipeline(requests, **FAST)
    assert [len(result.pictures) for result in results] == [1, 8, 8, 12]
    assert [len(result.codes) for result in results] == [1, 3, 3, 4]
    assert len(requests[3].given) == 5
    for result in results[2:]:
        given = DctCodec().encode(to_float(result.request.given))
        assert torch.equal(result.codes[: len(given)], given)
    alone = pipeline([requests[3]], **FAST)[0]
    assert torch.equal(alone.codes, results[3].codes)


def test_frames_stream_with_their_pictures(pipeline):
    requests = [Request("a", SIZE, 4, 2, pictures(1)), Request.image("b", SIZE)]
    [video, image] = pipeline(requests, **FAST)
    shown = {0: [DctCodec().decode(video.codes[:1])], 1: []}
    order = []
    for frame, part in pipeline.stream(requests, documents_per_pass=2, **FAST):
        order.append((frame.document, frame.frame, len(part)))
        shown[frame.document].append(part)
    assert order == [(0, 1, 4), (1, 0, 1), (0, 2, 4)]
    first = to_uint8(shown[0][0])
    assert torch.equal(torch.cat([first, *shown[0][1:]])[:8], video.pictures)
    assert torch.equal(shown[1][0], image.pictures)


def test_files(pipeline, tmp_path):
    [result] = pipeline([Request("a", SIZE, 4, 2)], **FAST)
    for name in ("a.mp4", "b.gif", "c.png", "d.safetensors"):
        result.save(tmp_path / "new" / name)
    assert len(read_video(tmp_path / "new" / "a.mp4", 4)) == 8
    assert len(read_video(tmp_path / "new" / "b.gif", 4)) == 8
    assert torch.equal(read_image(tmp_path / "new" / "c.png"), result.pictures[0])
    assert torch.equal(load_file(tmp_path / "new" / "d.safetensors")["codes"].long(), result.codes)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.mp4", "b.gif", "c.png", "d.safetensors"]
    with pytest.raises(ValueError, match=r"path must end in .*got .*\.avi"):
        result.save(tmp_path / "a.avi")


def test_an_interrupted_file_is_not_there(pipeline, tmp_path, monkeypatch):
    [result] = pipeline([Request.image("a", SIZE)], **FAST)

    def broken(path, picture):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("lumos.pipelines.write_image", broken)
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": " "}, "prompt must not be empty"),
        ({"size": (100, 64)}, "size must be .* multiples of 32"),
        ({"size": (0, 64)}, "size must be .* multiples of 32"),
        ({"fps": 0}, "fps must be 1..198"),
        ({"seconds": 199}, "seconds must be 1..198"),
        ({"given": torch.zeros(1, 64, 64, 3, dtype=torch.uint8)}, r"given must be pictures \[F, 32, 64, 3\]"),
    ],
)
def test_bad_requests_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Request(**({"prompt": "a", "size": SIZE} | changes))


def test_bad_pipelines_are_refused_by_name(model, checkpoint):
    with pytest.raises(ValueError, match="template must be one of official, plain, or hold"):
        Pipeline(model, ByteTokenizer(), None, "a cat")
    small = Lumos(LumosConfig(9344, 32, 32, 1, 1, visual_start=9216))
    with pytest.raises(ValueError, match="codec has 64000 codes from id 65536; the model has 128 from id 9216"):
        Pipeline(small, ByteTokenizer(), DctCodec())
    with pytest.raises(ValueError, match="given pictures need a codec"):
        Pipeline(model, ByteTokenizer(), None).prompt_ids(Request("a", SIZE, given=pictures(1)))
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in .*'bytes'"):
        Pipeline.from_pretrained(checkpoint)
    with pytest.raises(ValueError, match='codec must be "dct"'):
        Pipeline.from_pretrained(checkpoint, "bytes", "cosmos")


# Files of prompts


def written(path, content):
    lines = isinstance(content, list) and path.suffix == ".jsonl"
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
    return path


def test_official_prompt_files(tmp_path):
    """VBench text to video and custom files, custom image to video, VBench image to video, GenEval."""
    [item] = read_items(written(tmp_path / "a.json", {"In a still frame, a stop sign.mp4": "A sign."}))
    assert (item.name, item.prompt, item.image) == ("In a still frame, a stop sign", "A sign.", None)
    [item] = read_items(written(tmp_path / "b.json", {"a red bus.jpg": "A bus."}))
    assert (item.name, item.prompt, item.image) == ("a red bus", "A bus.", "a red bus.jpg")
    entry = {"prompt_en": "a liquid", "image_name": "a liquid.jpg", "prompt_en_qwen32b_vl": "The video begins"}
    [item] = read_items(written(tmp_path / "c.json", [entry]))
    assert (item.name, item.prompt, item.image) == ("a liquid", "The video begins", "a liquid.jpg")
    entry = {"tag": "single_object", "prompt": "a photo of a bench", "prompt_rewrite_qwen32b": "A bench in a park"}
    items = read_items(written(tmp_path / "d.jsonl", [entry, entry]))
    assert [(item.name, item.prompt) for item in items] == [
        ("00000", "A bench in a park"),
        ("00001", "A bench in a park"),
    ]
    assert items[0].metadata == entry


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "holds no prompts"),
        ("a", "must hold an object"),
        ([{"text": "a"}], "entry 0: prompt must be a text that is not empty, got None"),
        ({"a": " "}, "entry 0: prompt must be a text"),
        ({"x/a": "b"}, "entry 0: the name 'x/a' is no plain file name"),
        ({"..": "b"}, "entry 0: the name '..' is no plain file name"),
        ({"a.mp4": "b", "a": "c"}, "entry 1: the name 'a' is used twice"),
    ],
)
def test_bad_prompt_files_are_refused_by_name(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_items(written(tmp_path / "a.json", content))


def test_shards_cover_everything_once():
    items = list(range(10))
    for parts in (1, 3, 4, 10, 12):
        runs = [shard(items, part, parts) for part in range(1, parts + 1)]
        assert list(itertools.chain(*runs)) == items
        assert max(map(len, runs)) - min(map(len, runs)) <= 1
    with pytest.raises(ValueError, match="1 <= i <= n, got 0/3"):
        shard(items, 0, 3)


def test_vbench_layout_skips_what_is_there_and_seeds_by_place(pipeline, tmp_path):
    items = read_items(written(tmp_path / "a.json", {"one.mp4": "1", "two.mp4": "2", "three.mp4": "3"}))
    batch = Batch(tmp_path / "all", samples=2, size=SIZE, fps=4, seconds=1, seed=5, suffix=".gif", together=4)
    assert batch.run(pipeline, items, **FAST) == 6
    names = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert names == [f"{name}-{k}.gif" for name in ("one", "three", "two") for k in (0, 1)]
    assert batch.run(pipeline, items, **FAST) == 0
    before = (tmp_path / "all" / "two-1.gif").read_bytes()
    (tmp_path / "all" / "two-1.gif").unlink()
    assert batch.run(pipeline, shard(items, 2, 3), **FAST) == 1
    assert (tmp_path / "all" / "two-1.gif").read_bytes() == before


def test_seeds_depend_on_the_place_in_the_file(monkeypatch, pipeline, tmp_path):
    seeds = []
    original = Pipeline.results

    def results(self, requests, **options):
        seeds.extend((request.prompt, request.seed) for request in requests)
        return original(self, requests, **options)

    monkeypatch.setattr(Pipeline, "results", results)
    items = read_items(written(tmp_path / "a.json", {"one": "1", "two": "2", "three": "3"}))
    batch = Batch(tmp_path / "out", samples=2, size=SIZE, fps=1, seconds=1, seed=5, suffix=".png")
    batch.run(pipeline, shard(items, 2, 2), **FAST)
    batch.run(pipeline, items, **FAST)
    assert seeds == [("3", 9), ("3", 10), ("1", 5), ("1", 6), ("2", 7), ("2", 8)]


def test_geneval_layout(pipeline, tmp_path):
    entries = [{"tag": "t", "prompt": "p", "prompt_rewrite_qwen32b": f"long {n}"} for n in range(2)]
    items = read_items(written(tmp_path / "a.jsonl", entries))
    batch = Batch(tmp_path, "geneval", ".png", samples=2, size=SIZE, fps=1, seconds=1)
    assert batch.run(pipeline, items[1:], **FAST) == 2
    folder = tmp_path / "00001"
    samples = [read_image(folder / "samples" / f"{k:05d}.png") for k in (0, 1)]
    assert torch.equal(read_image(folder / "grid.png"), torch.cat(samples))
    assert json.loads((folder / "metadata.jsonl").read_text()) == {"tag": "t", "prompt": "p"}
    assert not (tmp_path / "00000").exists()


def test_first_pictures_come_from_a_folder(pipeline, tmp_path):
    write_image(tmp_path / "one.png", pictures(1)[0])
    items = read_items(written(tmp_path / "a.json", {"one.png": "1", "two.png": "2"}))
    batch = Batch(tmp_path / "out", size=SIZE, fps=4, seconds=1, images=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"entry 1: no first frame 'two.png'"):
        batch.run(pipeline, items, **FAST)
    assert batch.run(pipeline, items[:1], **FAST) == 1
    assert len(read_video(tmp_path / "out" / "one.mp4", 4)) == 4


# The command

COMMON = ["--size", "32x64", "--steps", "2", "--tokenizer", "bytes"]


def test_command_makes_a_video_and_an_image(checkpoint, tmp_path, capsys):
    movie, image = tmp_path / "a.mp4", tmp_path / "a.png"
    assert (
        main(
            ["generate", str(checkpoint), "--prompt", "a", "--out", str(movie), "--codec", "dct", "--fps", "4", *COMMON]
        )
        == 0
    )
    assert len(read_video(movie, 4)) == 8
    assert main(["generate", str(checkpoint), "--prompt", "a", "--out", str(image), "--codec", "dct", *COMMON]) == 0
    assert read_image(image).shape == (*SIZE, 3)
    continued = ["--image", str(image), "--out", str(tmp_path / "b.mp4"), "--codec", "dct", "--fps", "4", *COMMON]
    assert main(["generate", str(checkpoint), "--prompt", "a", *continued]) == 0
    continued = ["--video", str(movie), "--out", str(tmp_path / "c.mp4"), "--codec", "dct", "--fps", "4", *COMMON]
    assert main(["generate", str(checkpoint), "--prompt", "a", *continued]) == 0
    assert str(movie) in capsys.readouterr().out


def test_command_refuses_a_model_with_nan_and_writes_nothing(model, tmp_path, capsys):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.lm_head.weight[-5, 0] = torch.nan
    broken.save_pretrained(tmp_path / "broken")
    movie = tmp_path / "a.mp4"
    call = ["generate", str(tmp_path / "broken"), "--prompt", "a", "--out", str(movie), "--codec", "dct", *COMMON]
    assert main(call) == 2
    assert "frame 0, step 0: " in (err := capsys.readouterr().err)
    assert "lm_head.weight holds nan" in err
    assert not movie.exists()


def test_command_makes_one_picture_for_an_image(monkeypatch, checkpoint, tmp_path):
    """As upstream: one second at one frame per second, guidance 16 instead of 15."""
    calls = []
    monkeypatch.setattr(Pipeline, "__call__", lambda self, requests, **options: calls.append((requests, options)) or [])
    for name in ("a.png", "a.mp4"):
        call = ["generate", str(checkpoint), "--prompt", "a", "--out", str(tmp_path / name), "--codec", "dct", *COMMON]
        main(call)
    [([image], still), ([video], moving)] = calls
    assert (image.fps, image.seconds, still["guidance_scale"]) == (1, 1, 16.0)
    assert (video.fps, video.seconds, moving["guidance_scale"]) == (12, 2, 15.0)


def test_command_runs_a_file_of_prompts(checkpoint, tmp_path, capsys):
    file = written(tmp_path / "a.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    call = ["generate", str(checkpoint), "--prompts", str(file), "--out", str(tmp_path / "out"), "--codec", "dct"]
    call += ["--layout", "geneval", "--samples", "2", "--shard", "2/2", *COMMON]
    assert main(call) == 0
    assert (tmp_path / "out" / "00001" / "samples" / "00001.png").exists()
    assert "2 samples of 1 prompts made, 0 were there" in capsys.readouterr().out
    assert main(call) == 0
    assert "0 samples of 1 prompts made, 2 were there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "", "--out", "a.mp4", "--codec", "dct"], "prompt must not be empty"),
        (["--prompt", "a", "--out", "a.mp4", "--codec", "dct", "--size", "30x64"], "multiples of 32; got (30, 64)"),
        (["--prompt", "a", "--out", "a.mp4"], "pictures need a codec"),
        (["--prompt", "a", "--out", "a.avi", "--codec", "dct"], "path must end in"),
        (["--prompt", "a", "--out", "a.png", "--codec", "dct", "--image", "b.png"], "an image cannot continue"),
        (["--prompt", "a", "--out", "a.mp4", "--codec", "dct", "--steps", "0"], "steps must be an integer >= 1"),
        (
            ["--prompt", "a", "--out", "a.mp4", "--codec", "dct", "--seconds", "198", "--size", "384x672"],
            "max_position",
        ),
        (
            ["--prompt", "a", "--out", "a.mp4", "--codec", "dct", "--tokenizer", "none.json"],
            "no tokenizer at none.json",
        ),
        (["--prompts", "none.json", "--out", "a"], "none.json"),
        (["--prompt", "a", "--out", "a.mp4", "--codec", "dct", "--image", "none.png"], "no such file: none.png"),
    ],
)
def test_command_says_what_is_wrong(checkpoint, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    defaults = [] if "--tokenizer" in arguments else ["--tokenizer", "bytes"]
    assert main(["generate", str(checkpoint), *defaults, *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
