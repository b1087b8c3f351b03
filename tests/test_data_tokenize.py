"""lumos/data/tokenize.py and what it takes in: folders, tables, buckets, workers, and runs that end at any moment."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumos.cli import main
from lumos.codec import DctCodec
from lumos.data import Clip, SampleFolder, SampleWriter, find_clips, tokenize, tokenize_clips
from lumos.data.buckets import bucket_sizes, nearest_bucket
from lumos.data.workers import WorkerDied, ordered
from lumos.tokens import ByteTokenizer, parse_document
from lumos.video import read_video, sample_clips, to_float, write_image, write_video

FILES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SMALL = {"fps": 4, "seconds": 1, "size": (32, 64), "progress": False}


def moving(folder, name="clip.mp4", seconds=1.0, seed=0, shape=(32, 64)):
    """A clip of noise at 4 pictures per second."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = np.random.default_rng(seed).integers(0, 256, (round(4 * seconds), *shape, 3), dtype=np.uint8)
    if path.suffix == ".mp4":
        write_video(path, pictures, 4)
    else:
        write_image(path, pictures[0])
    return path


def clips_of(folder, count, **options):
    return [Clip(str(moving(folder, f"{n}.mp4", seed=n, **options)), f"clip {n}") for n in range(count)]


def test_real_clips(tmp_path):
    clips = sample_clips()
    paths = [clips["carphone_pristine"], clips["bikes"]]
    captions = ["a man talks in a car", "bicycles"]
    write_image(tmp_path / "still.png", read_video(clips["bikes"], 1, 1, size=(64, 96))[0])
    summary = tokenize(
        *([*paths, tmp_path / "still.png"], [*captions, "a still"], tmp_path / "out", DctCodec()),
        **{"fps": 12, "seconds": 1, "size": (64, 96), "windows": 5},
    )
    dataset = SampleFolder(tmp_path / "out")
    # The first clip lasts 4.004 s, the second 10 s; a picture is one sample.
    assert [sample.caption for sample in dataset] == [captions[0]] * 4 + [captions[1]] * 5 + ["a still"]
    assert (summary.sources, summary.samples, summary.failures) == (3, 10, ())
    assert summary.tokens == sum(len(sample.ids) for sample in dataset)
    assert "10 samples of 3 sources" in str(summary)
    third = parse_document(dataset[2].ids)
    assert (third.seconds, third.fps, ByteTokenizer().decode(third.text_ids)) == (1, 12, captions[0])
    assert torch.equal(third.codes, DctCodec().encode(to_float(read_video(paths[0], 12, 1, 2.0, (64, 96)))))
    assert (dataset[9].frames, dataset[9].seconds, dataset[9].fps) == (1, 1, 1)
    assert dataset[4].source == str(paths[1])


def test_what_is_wrong_with_the_arguments(tmp_path):
    clip, out = moving(tmp_path), tmp_path / "out"
    for changes, message in (
        ({"captions": []}, "captions must be one a clip: 0 for 1"),
        ({"windows": 0}, "windows must"),
        ({"workers": 0}, "workers must"),
        ({"seconds": 300}, "seconds must"),
        ({"fps": 0}, "fps must"),
        ({"buckets": "256p", "size": (32, 32)}, "size and buckets exclude each other"),
        ({"buckets": "720p"}, "buckets must be one of 256p, 384p"),
        ({"template": "no place"}, "template must be"),
        ({"template": "{prompt} {length}"}, "template may hold"),
        ({"seconds": 8}, r"no sample could be made of 1 sources; .*clip\.mp4: .*is 1\.000 s long"),
        ({"paths": [tmp_path / "none.mp4"]}, r"no sample .*none\.mp4: .*no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            tokenize(**({"paths": [clip], "captions": ["x"], "out": out, "codec": DctCodec()} | changes))


def test_the_same_run_again_makes_nothing_and_other_options_do(tmp_path, monkeypatch):
    clips = [*clips_of(tmp_path, 2, seconds=2.5), Clip(str(moving(tmp_path, "p.png")), "still")]
    first = tokenize_clips(clips, tmp_path / "out", DctCodec(), windows=3, **SMALL)
    assert (first.samples, first.kept) == (5, 0)
    before = [sample.ids for sample in SampleFolder(tmp_path / "out")]

    class Never(DctCodec):
        def encode(self, video):
            raise AssertionError("encoded again")

    Never.__name__ = "DctCodec"
    again = tokenize_clips(clips, tmp_path / "out", Never(), windows=3, **SMALL)
    assert (again.samples, again.kept) == (0, 5)
    assert all(torch.equal(a, b.ids) for a, b in zip(before, SampleFolder(tmp_path / "out"), strict=True))
    monkeypatch.chdir(tmp_path)
    relative = [Clip(os.path.relpath(clip.path), clip.caption) for clip in clips]
    assert tokenize_clips(relative, "out", Never(), windows=3, **SMALL).kept == 5
    for changes in ({"size": (64, 64)}, {"fps": 2}, {"template": "video: {prompt}"}, {"buckets": "256p", "size": None}):
        assert tokenize_clips(clips, "out", DctCodec(), **(SMALL | changes)).samples == 3 - ("fps" in changes)
    other = [Clip(clips[0].path, "another caption")]
    assert tokenize_clips(other, "out", DctCodec(), **SMALL).samples == 1


def test_damaged_clips_are_named_and_stop_nothing(tmp_path):
    clips = clips_of(tmp_path, 4, seconds=2)
    for at in (0, 2):
        with open(clips[at].path, "wb") as file:
            file.write(b"no video")
    out = tmp_path / "out"
    summary = tokenize_clips(clips, out, DctCodec(), windows=2, **SMALL)
    assert [sample.source for sample in SampleFolder(out)] == [clips[1].path] * 2 + [clips[3].path] * 2
    assert [failure.source for failure in summary.failures] == [clips[0].path, clips[2].path]
    lines = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [(line["source"], line["window"]) for line in lines] == [(clips[0].path, 0), (clips[2].path, 0)]
    assert "cannot be decoded" in lines[0]["error"]
    assert "2 failed" in str(summary)
    assert clips[2].path in str(summary)
    moving(tmp_path, "0.mp4", seconds=2)
    again = tokenize_clips(clips, out, DctCodec(), windows=2, **SMALL)
    assert (again.samples, again.kept, len(again.failures)) == (2, 4, 1)
    assert len((out / "failures.jsonl").read_text().splitlines()) == 1


def test_clips_with_their_own_times(tmp_path):
    path = str(moving(tmp_path, seconds=3))
    clips = [Clip(path, "a"), Clip(path, "b", fps=2), Clip(path, "c", seconds=3), Clip(path, "d", 2, 2)]
    tokenize_clips(clips, tmp_path / "out", DctCodec(), **SMALL)
    assert [(s.fps, s.seconds, s.frames) for s in SampleFolder(tmp_path / "out")] == [
        *((4, 1, 2), (2, 1, 2), (4, 3, 4), (2, 2, 2))
    ]


def test_words_around_a_caption(tmp_path):
    clips = [Clip(str(moving(tmp_path)), "a {cat}"), Clip(str(moving(tmp_path, "p.png")), "a dog")]
    tokenize_clips(clips, tmp_path / "out", DctCodec(), template="official", **SMALL)
    texts = [ByteTokenizer().decode(parse_document(s.ids).text_ids) for s in SampleFolder(tmp_path / "out")]
    words = "Generate a video with a resolution of 64x32, consisting of {} frames at {} frames per second, "
    assert texts == [
        words.format(4, 4) + "according to the following prompt:\n a {cat}",
        words.format(1, 1) + "according to the following prompt:\n a dog",
    ]


def test_buckets_are_upstreams():
    # The sizes (W, H) that the official code lists for its target size 512, as 528 gives them too.
    listed = (
        "1024x256 992x256 960x256 928x256 896x256 896x288 864x288 832x288 800x288 800x320 768x320 736x320 736x352 "
        "704x352 672x352 672x384 640x384 608x384 608x416 576x416 576x448 544x448 544x480 512x480 512x512"
    )
    wide = [tuple(int(side) for side in reversed(size.split("x"))) for size in listed.split()]
    assert bucket_sizes("384p") == wide + [(w, h) for h, w in reversed(wide[:-1])]
    small = bucket_sizes("256p")
    assert {(256, 448), (448, 256), (352, 352), (160, 640)} <= set(small)
    assert all(h % 32 == w % 32 == 0 and h * w <= 352 * 352 and max(h, w) <= 4 * min(h, w) for h, w in small)


@settings(max_examples=100, deadline=None)
@given(st.integers(32, 4000), st.integers(32, 4000), st.sampled_from(("256p", "384p")))
def test_the_nearest_bucket_cuts_least_off(height, width, name):
    sizes = bucket_sizes(name)

    def lost(size):
        scale = max(size[0] / height, size[1] / width)
        return 1 - size[0] * size[1] / (scale * height * scale * width)

    assert lost(nearest_bucket(height, width, sizes)) <= min(map(lost, sizes)) + 1e-9
    assert nearest_bucket(720, 1280, bucket_sizes("256p")) == (256, 448)
    assert nearest_bucket(720, 1280, bucket_sizes("384p")) == (384, 672)


def test_each_clip_gets_its_bucket(tmp_path):
    shapes = [(64, 112), (112, 64), (96, 96)]
    clips = [Clip(str(moving(tmp_path, f"{n}.png", shape=shape)), "x") for n, shape in enumerate(shapes)]
    tokenize_clips(clips, tmp_path / "out", DctCodec(), buckets="256p", progress=False)
    sizes = [(8 * sample.rows, 8 * sample.cols) for sample in SampleFolder(tmp_path / "out")]
    assert sizes == [(256, 448), (448, 256), (352, 352)]


def test_workers_give_the_same_samples_in_the_same_order(tmp_path):
    clips = [*clips_of(tmp_path, 5, seconds=2.2), Clip(str(tmp_path / "none.mp4"), "x")]
    clips[2:2] = [clips[1], clips[1]]  # while the first is still being made
    one = tokenize_clips(clips, tmp_path / "one", DctCodec(), windows=4, **SMALL)
    two = tokenize_clips(clips, tmp_path / "two", DctCodec(), windows=4, workers=2, **SMALL)
    assert (one.samples, one.kept, len(one.failures)) == (two.samples, two.kept, len(two.failures)) == (10, 4, 1)
    for a, b in zip(SampleFolder(tmp_path / "one"), SampleFolder(tmp_path / "two"), strict=True):
        assert torch.equal(a.ids, b.ids)
        assert a.source == b.source


def doubled(job):
    if job == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * job


def test_a_worker_that_dies_costs_its_job_alone():
    found = list(ordered(doubled, iter(range(9)), 2))
    assert [job for job, _ in found] == list(range(9))
    assert isinstance(found[3][1], WorkerDied)
    assert [result for job, result in found if job != 3] == [2 * job for job in range(9) if job != 3]


def test_jobs_are_taken_a_few_ahead_only():
    taken = []

    def jobs():
        for job in range(50):
            taken.append(job)
            yield job

    results = ordered(abs, jobs(), 2)
    assert next(results) == (0, 0)
    assert len(taken) <= 5
    results.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_an_ended_run_goes_on_where_it_was(tmp_path, end):
    clips_of(tmp_path / "clips", 12)
    for clip in list((tmp_path / "clips").iterdir()):  # so many that the run is never over before the signal
        for copy in range(15):
            shutil.copy(clip, clip.with_stem(f"{clip.stem}-{copy}"))
    clips = find_clips([tmp_path / "clips"], ["x"])
    expected = tokenize_clips(clips, tmp_path / "whole", DctCodec(), **SMALL)
    arguments = [*("tokenize", str(tmp_path / "clips"), "--caption", "x", "--out", str(tmp_path / "out"))]
    arguments += [*("--fps", "4", "--seconds", "1", "--size", "32x64", "--workers", "2")]
    process = subprocess.Popen(
        [sys.executable, "-m", "lumos.cli", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where a shell runs in the background
    )
    while not (tmp_path / "out" / "index.bin").exists() or not len(SampleFolder(tmp_path / "out")):
        time.sleep(0.002)
        assert process.poll() is None, process.stderr.read()
    process.send_signal(end)
    _, error = process.communicate()
    assert process.returncode == (-9 if end == signal.SIGKILL else 130), error
    if end == signal.SIGINT:
        assert b"interrupted; the same command goes on" in error
    there = len(SampleFolder(tmp_path / "out"))
    assert there
    assert main(arguments) == 0
    samples = list(SampleFolder(tmp_path / "out"))
    assert len(samples) == expected.samples
    codes = [parse_document(sample.ids).codes for sample in samples]
    by_name = {sample.source: parse_document(sample.ids).codes for sample in SampleFolder(tmp_path / "whole")}
    assert all(torch.equal(by_name[sample.source], one) for sample, one in zip(samples, codes, strict=True))


def test_folders_are_searched_and_captions_lie_beside_the_clips(tmp_path):
    for name, caption in (("b.mp4", "second\n"), ("a/c.PNG", None), ("a/d.webm", "first"), ("notes.txt", "no clip")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        if caption:
            (tmp_path / name).with_suffix(".txt").write_text(caption)
    found = [(os.path.relpath(clip.path, tmp_path), clip.caption) for clip in find_clips([tmp_path], ["all"])]
    assert found == [("a/c.PNG", "all"), ("a/d.webm", "first"), ("b.mp4", "second")]
    with pytest.raises(ValueError, match=r"c\.PNG has no caption: give --caption, or write one into c\.txt"):
        find_clips([tmp_path])
    files = [tmp_path / "b.mp4", tmp_path / "a" / "d.webm"]
    assert [clip.caption for clip in find_clips(files)] == ["second", "first"]
    assert [clip.caption for clip in find_clips(files, ["x"])] == ["x", "x"]
    assert [clip.caption for clip in find_clips(files, ["x", "y"])] == ["x", "y"]
    for inputs in (files[:1], [*files, tmp_path], [tmp_path, files[0]]):
        with pytest.raises(ValueError, match="--caption must be given once, or once for each clip"):
            find_clips(inputs, ["x", "y"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no files that end in"):
        find_clips([tmp_path / "empty"], ["x"])
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"b\.txt is not UTF-8"):
        find_clips([tmp_path], ["all"])


def test_tables(tmp_path):
    with (tmp_path / "official.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "text", "num_frames", "fps", "seconds"])
        writer.writerow(["a.mp4", 'a "quoted", long\ncaption', 24, "", ""])
        writer.writerow(["/data/b.mp4", "", 24, "8", " 3 "])
    assert find_clips([tmp_path / "official.csv"]) == [
        Clip(str(tmp_path / "a.mp4"), 'a "quoted", long\ncaption'),
        Clip("/data/b.mp4", "", 8, 3),
    ]
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        find_clips([tmp_path / "none.csv"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the header must name path and caption once, got None"),
        (b"path\na.mp4\n", "the header must name path and caption once"),
        (b"path,caption,text\na.mp4,b,c\n", "the header must name path and caption once"),
        (b"path,path,caption\na,b,c\n", "the header must name path and caption once"),
        (b"path,caption\n", "no rows"),
        (b"path,caption\n,x\n", "line 2: path is ''"),
        (b"path,caption\na.mp4\n", "line 2: path is 'a.mp4', caption None"),
        (b"path,caption\na.mp4,x\n\0.mp4,x\n", r"table\.csv: "),
        (b"path,caption,fps\na.mp4,x,1.5\n", "line 2: fps must be a whole number, got '1.5'"),
        (b"path,caption,seconds\na.mp4,x,500\n", "line 2: seconds must be 1..198"),
        (b'path,caption\na.mp4,"x\n', "unexpected end of data"),
        (b"path,caption\na.mp4,\xff\n", "decode"),
        (b"path,caption\na.mp4," + b"x" * (1 << 21), "field larger than"),
    ],
)
def test_what_is_wrong_with_a_table(tmp_path, content, message):
    (tmp_path / "table.csv").write_bytes(content)
    with pytest.raises(ValueError, match=rf"table\.csv: .*{message}" if "table" not in message else message):
        find_clips([tmp_path / "table.csv"])


@FILES
@given(content=st.binary(max_size=60), header=st.sampled_from((b"", b"path,caption\n", b"path,text,fps,seconds\n")))
def test_malformed_tables_give_clips_or_named_errors(tmp_path, content, header):
    (tmp_path / "table.csv").write_bytes(header + content)
    try:
        clips = find_clips([tmp_path / "table.csv"])
    except ValueError as error:
        if "table.csv" not in str(error):
            raise
        return
    assert clips
    assert all(type(clip.path) is type(clip.caption) is str for clip in clips)


def test_command_line(tmp_path, capsys):
    clips_of(tmp_path / "clips", 2)
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"x")
    arguments = ["tokenize", str(tmp_path / "clips"), "--caption", "x", "--out", str(tmp_path / "out"), "--fps", "4"]
    assert main([*arguments, "--seconds", "1", "--buckets", "256p"]) == 0
    shown = capsys.readouterr().out
    assert "2 samples of 3 sources" in shown
    assert "1 failed" in shown
    assert "broken.mp4" in shown
    assert (SampleFolder(tmp_path / "out")[0].rows, SampleFolder(tmp_path / "out")[0].cols) == (32, 60)
    assert main(["tokenize", "a.mp4", "--out", str(tmp_path / "out")]) == 2
    assert "a.mp4 has no caption" in capsys.readouterr().err
    with SampleWriter(tmp_path / "out"):
        assert main([*arguments, "--seconds", "1"]) == 2
    assert "one writer a folder" in capsys.readouterr().err


def test_shards_of_the_clips(tmp_path, capsys):
    clips_of(tmp_path / "clips", 5)
    sources = []
    for part in (1, 2):
        out = str(tmp_path / f"out{part}")
        arguments = ["tokenize", str(tmp_path / "clips"), "--caption", "x", "--out", out, "--shard", f"{part}/2"]
        assert main([*arguments, "--fps", "4", "--seconds", "1", "--size", "32x64"]) == 0
        sources.append([os.path.basename(sample.source) for sample in SampleFolder(out)])
    assert sources == [["0.mp4", "1.mp4", "2.mp4"], ["3.mp4", "4.mp4"]]
    assert main([*arguments[:-1], "3/2"]) == 2
    assert "shard must be i/n" in capsys.readouterr().err
