"""lumos/video.py: files in and out, resampling by timestamps, the embedded codec."""

import importlib.util
import math
import wave
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lumos import video
from lumos.codec import FSQ_LEVELS, DctCodec
from lumos.tokens import NUM_CODES, latent_frames
from lumos.video import (
    ClipTooShortError,
    read_image,
    read_video,
    sample_clips,
    to_float,
    to_uint8,
    write_image,
    write_video,
)

NTSC = Fraction(24000, 1001)


def write_stamped(path, stamps, time_base, size=(64, 64), rate=25):
    """A file whose picture i is flat grey 5 i % 250 and shown from stamps[i] seconds on (rounded to time_base)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"qp": "0", "g": "12", "bf": "2"})
        stream.height, stream.width = size
        stream.pix_fmt, stream.time_base = "yuv444p", time_base
        stream.codec_context.time_base = time_base
        for number, stamp in enumerate(stamps):
            picture = np.full((*size, 3), 5 * number % 250, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = round(Fraction(stamp) / time_base), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(pictures):
    """Which picture of write_stamped each picture is, modulo 50."""
    grey = pictures.float().mean((1, 2, 3))
    assert (pictures.float() - grey[:, None, None, None]).abs().max() < 3
    return (grey / 5).round().int().tolist()


@pytest.mark.parametrize("rate", [NTSC, 30, 25, 12, 8, Fraction(15, 2), 60])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_constant_rates_keep_their_speed(tmp_path, rate, suffix):
    stamps = [Fraction(i) / rate for i in range(math.ceil(2.2 * rate))]
    time_base = Fraction(1, 1000) if suffix == ".mkv" else 1 / (1000 * Fraction(rate))
    path = write_stamped(tmp_path / f"clip{suffix}", stamps, time_base, rate=rate)
    if suffix == ".mkv":  # what the file says, give or take its rounding
        stamps = [round(1000 * stamp) / Fraction(1000) - Fraction(1, 2000) for stamp in stamps]
    shown = [sum(stamp <= Fraction(k, 12) for stamp in stamps) - 1 for k in range(24)]
    assert numbers(read_video(path, 12, 2)) == [picture % 50 for picture in shown]


@pytest.mark.parametrize("rate", [NTSC, 30, 60])
def test_millisecond_stamps_lose_no_picture(tmp_path, rate):
    path = write_stamped(tmp_path / "clip.mkv", [i / Fraction(rate) for i in range(45)], Fraction(1, 1000), rate=rate)
    assert numbers(read_video(path, float(rate), 40 / float(rate))) == list(range(40))


def test_a_clock_as_coarse_as_the_rate_is_exact(tmp_path):
    path = write_stamped(tmp_path / "clip.avi", [Fraction(i, 25) for i in range(50)], Fraction(1, 25))
    assert numbers(read_video(path, 12, 1.5)) == [25 * k // 12 for k in range(18)]


def test_variable_rate(tmp_path):
    # Quick, then one picture held for more than a second, then slow.
    stamps = [0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 1.5, 1.9, 2.0, 2.3]
    path = write_stamped(tmp_path / "clip.mkv", [Fraction(s).limit_denominator(100) for s in stamps], Fraction(1, 1000))
    shown = [max(i for i, stamp in enumerate(stamps) if stamp <= k / 12 + 1e-9) for k in range(27)]
    assert numbers(read_video(path, 12, 2.25)) == shown


def test_time_counts_from_the_first_picture(tmp_path):
    path = write_stamped(tmp_path / "clip.mkv", [Fraction(7) + Fraction(i, 12) for i in range(24)], Fraction(1, 1000))
    assert numbers(read_video(path, 12, 1, start=0.5)) == list(range(6, 18))


@pytest.mark.parametrize("misleading", [False, True])
def test_start_far_into_the_file(tmp_path, monkeypatch, misleading):
    path = write_stamped(tmp_path / "clip.mp4", [Fraction(i, 12) for i in range(48)], Fraction(1, 12000), rate=12)
    whole = read_video(path, 12)
    assert numbers(whole) == list(range(48))
    if misleading:
        real = video._stamped
        # The decode after the seek starts too late, as with a broken index.
        skips = iter([0, 10, 0])

        def late(container, stream):
            frames = real(container, stream)
            for _ in range(next(skips)):
                next(frames, None)
            return frames

        monkeypatch.setattr(video, "_stamped", late)
    assert torch.equal(read_video(path, 12, 1, start=2.5), whole[30:42])


def test_length(tmp_path):
    path = write_stamped(tmp_path / "clip.mp4", [Fraction(i, 12) for i in range(20)], Fraction(1, 12000), rate=12)
    assert len(read_video(path, 12)) == 20
    assert len(read_video(path, 6)) == 10
    assert len(read_video(path, 12, 20 / 12)) == 20
    with pytest.raises(ClipTooShortError, match=r"is 1\.667 s long and holds 20 of the 24 pictures"):
        read_video(path, 12, 2)
    with pytest.raises(ClipTooShortError, match="holds 0 of the one picture asked for from start 9"):
        read_video(path, 12, start=9)


@pytest.mark.parametrize(
    ("source", "size", "max_pixels", "expected"),
    [
        ((64, 96), None, None, (64, 96)),
        ((70, 100), None, None, (64, 96)),
        ((128, 192), None, 64 * 96, (64, 96)),
        ((128, 192), None, 10**9, (128, 192)),
        ((64, 96), (128, 128), None, (128, 128)),
        ((64, 128), (64, 32), None, (64, 32)),
    ],
)
def test_sizes(tmp_path, source, size, max_pixels, expected):
    picture = np.zeros((*source, 3), np.uint8)
    write_image(tmp_path / "picture.png", picture)
    write_video(tmp_path / "clip.mp4", picture[None], 12)
    assert read_image(tmp_path / "picture.png", size, max_pixels).shape == (*expected, 3)
    assert read_video(tmp_path / "clip.mp4", 12, size=size, max_pixels=max_pixels).shape == (1, *expected, 3)


def test_the_centre_is_kept_and_nothing_is_stretched(tmp_path):
    picture = np.zeros((64, 192, 3), np.uint8)
    picture[:, 64:128] = 200  # exactly the centre square
    write_image(tmp_path / "picture.png", picture)
    assert (read_image(tmp_path / "picture.png", (64, 64)) == 200).all()
    doubled = read_image(tmp_path / "picture.png", (128, 128))
    assert (doubled == 200).all()
    half = read_image(tmp_path / "picture.png", (32, 96))
    assert (half[:, 34:62] == 200).all()
    assert (half[:, :30] == 0).all()


def test_a_source_too_small_for_a_default_size(tmp_path):
    write_image(tmp_path / "picture.png", np.zeros((16, 64, 3), np.uint8))
    with pytest.raises(ValueError, match="give a size"):
        read_image(tmp_path / "picture.png")
    assert read_image(tmp_path / "picture.png", (32, 32)).shape == (32, 32, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_write_video_round_trip(tmp_path, suffix):
    pictures = read_video(sample_clips()["carphone_pristine"], 12, 1)
    path = tmp_path / "new" / f"clip{suffix}"
    write_video(path, pictures, 12)
    back = read_video(path, 12)
    assert back.shape == pictures.shape
    # Colours survive (4:2:0 chroma, 256 colours) and no picture changes places with its neighbour.
    distance = (back[:, None].float() - pictures[None].float()).pow(2).mean((2, 3, 4))
    assert distance.diagonal().sqrt().max() < 10
    assert (distance.argmin(1) == torch.arange(12)).all()


def test_mpeg4_serves_without_libx264(tmp_path, monkeypatch):
    monkeypatch.setattr(video.av, "codecs_available", {"mpeg4"})
    pictures = read_video(sample_clips()["carphone_pristine"], 12, 1)
    write_video(tmp_path / "clip.mp4", pictures, 12)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].codec.name == "mpeg4"
    assert (read_video(tmp_path / "clip.mp4", 12).float() - pictures.float()).pow(2).mean().sqrt() < 10


def test_images(tmp_path):
    picture = read_video(sample_clips()["bikes"], 12, 0.1, size=(64, 96))[0]
    write_image(tmp_path / "picture.png", picture)
    assert torch.equal(read_image(tmp_path / "picture.png"), picture)
    write_image(tmp_path / "picture.jpg", picture.numpy())
    assert (read_image(tmp_path / "picture.jpg").float() - picture.float()).abs().mean() < 3


def test_float_and_back():
    pictures = torch.randint(0, 256, (2, 4, 6, 3), dtype=torch.uint8)
    assert torch.equal(to_uint8(to_float(pictures)), pictures)
    assert to_uint8(torch.tensor([-2.0, 2.0]).expand(3, 1, 1, 2)).flatten().tolist() == [0, 0, 0, 255, 255, 255]
    assert (to_float(pictures).min() >= -1) & (to_float(pictures).max() <= 1)


def test_clear_errors_when_reading(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.mp4"):
        read_video(tmp_path / "nothing.mp4", 12)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4 cannot be decoded"):
        read_video(tmp_path / "text.mp4", 12)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(16000))
    with pytest.raises(ValueError, match=r"sound\.wav has no video stream"):
        read_video(tmp_path / "sound.wav", 12)
    clip = sample_clips()["carphone_pristine"]
    for arguments, name in (
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"fps": 12, "start": -1}, "start"),
        ({"fps": 12, "seconds": 0}, "seconds"),
        ({"fps": 12, "size": (100, 96)}, "size"),
        ({"fps": 12, "size": (0, 32)}, "size"),
    ):
        with pytest.raises(ValueError, match=f"^{name} must"):
            read_video(clip, **arguments)


def test_clear_errors_when_writing(tmp_path):
    good = np.zeros((2, 32, 32, 3), np.uint8)
    for path, frames, fps, message in (
        ("a.avi", good, 12, "path must end in"),
        ("a.mp4", good[:, :31], 12, "even height and width"),
        ("a.mp4", good.astype(float), 12, "frames must be uint8"),
        ("a.mp4", good[0], 12, "frames must be uint8"),
        ("a.mp4", good[:0], 12, "frames must be uint8"),
        ("a.gif", good, -1, "fps must"),
    ):
        with pytest.raises(ValueError, match=message):
            write_video(tmp_path / path, frames, fps)
    with pytest.raises(ValueError, match="path must end in"):
        write_image(tmp_path / "a.tiff", good[0])
    with pytest.raises(ValueError, match="picture must be"):
        write_image(tmp_path / "a.png", good)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_give_pictures_or_named_errors(tmp_path, data):
    content = bytearray(sample_clips()["carphone_distorted"].read_bytes())
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    (tmp_path / "clip.mp4").write_bytes(content)
    try:
        pictures = read_video(tmp_path / "clip.mp4", 12, size=(32, 32))
    except ValueError as error:
        if "clip.mp4" not in str(error):
            raise
        return
    assert pictures.shape[1:] == (32, 32, 3)
    assert pictures.dtype == torch.uint8


def test_sample_clips_say_what_to_install(monkeypatch):
    assert {"bigbuckbunny", "bikes", "carphone_pristine"} <= set(sample_clips())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"lumos-kernels\[demo\]"):
        sample_clips()


def psnr(a, b):
    return 10 * math.log10(4 / (a - b).pow(2).mean().item())


@pytest.mark.parametrize(
    ("name", "size", "floor"),
    [("bigbuckbunny", (256, 448), 23.4), ("bikes", (256, 448), 22.6), ("carphone_pristine", (128, 160), 21.7)],
)
def test_codec_on_real_clips(name, size, floor):
    clip = to_float(read_video(sample_clips()[name], 12, 2, size=size))
    codes = DctCodec().encode(clip)
    assert codes.shape == (7, size[0] // 8, size[1] // 8)
    assert codes.dtype == torch.int64
    decoded = DctCodec().decode(codes)
    assert decoded.shape == (3, 25, *size)
    assert psnr(decoded[:, :24], clip) > floor
    # Its own pictures are coded alike, so that a clip does not fade over generations.
    assert (DctCodec().encode(decoded) == codes).float().mean() > 0.998


@pytest.mark.parametrize("frames", [1, 2, 5, 6, 9])
def test_codec_shapes_and_padding(frames):
    clip = torch.rand(3, frames, 32, 64) * 2 - 1
    codes = DctCodec().encode(clip)
    assert codes.shape == (latent_frames(frames), 4, 8)
    padded = torch.cat([clip, clip[:, -1:].expand(-1, -(frames - 1) % 4, -1, -1)], 1)
    assert torch.equal(DctCodec().encode(padded), codes)
    assert DctCodec().decode(codes).shape == padded.shape


def test_codec_groups_are_independent():
    clip = torch.rand(3, 13, 32, 32) * 2 - 1
    codes = DctCodec().encode(clip)
    changed = clip.clone()
    changed[:, 5:9] = -changed[:, 5:9].roll(7, -1)
    others = torch.tensor([0, 1, 3])
    assert torch.equal(DctCodec().encode(changed)[others], codes[others])
    assert (DctCodec().encode(changed)[2] != codes[2]).any()
    pictures = DctCodec().decode(codes)
    codes[2] = 0
    others = torch.tensor([0, 1, 2, 3, 4, 9, 10, 11, 12])
    assert torch.equal(DctCodec().decode(codes)[:, others], pictures[:, others])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 99))
def test_every_code_decodes(frames, rows, cols, seed):
    codes = torch.randint(0, NUM_CODES, (frames, rows, cols), generator=torch.Generator().manual_seed(seed))
    decoded = DctCodec().decode(codes)
    assert decoded.shape == (3, 4 * frames - 3, 8 * rows, 8 * cols)
    assert (decoded.abs() <= 1).all()
    again = DctCodec().encode(decoded)
    assert (again >= 0).all()
    assert (again < NUM_CODES).all()


def test_every_digit_counts():
    # A lone code far from the range's ends survives decoding and coding.
    middle = [3, 4, 3, 2, 2, 2]
    for place in range(6):
        digits = list(middle)
        digits[place] += 1
        code = sum(d * math.prod(FSQ_LEVELS[:i]) for i, d in enumerate(digits))
        codes = torch.full((2, 1, 1), code)
        assert torch.equal(DctCodec().encode(DctCodec().decode(codes)), codes)
    assert math.prod(FSQ_LEVELS) == NUM_CODES


def test_grey_stays_grey_and_a_ramp_stays_a_ramp():
    grey = torch.linspace(-0.8, 0.8, 9)[:, None, None].expand(9, 32, 32)
    decoded = DctCodec().decode(DctCodec().encode(grey[None].expand(3, -1, -1, -1)))
    assert (decoded - decoded.mean(0)).abs().max() < 1 / 127.5
    ramp = torch.linspace(-0.9, 0.9, 512).expand(3, 1, 64, -1)
    decoded = DctCodec().decode(DctCodec().encode(ramp))
    assert (decoded - ramp).abs().max() < 0.2
    # Between neighbouring columns the ramp rises by 0.0035; the steps of 0.22 of the luma levels do not show.
    assert decoded.diff(dim=-1).abs().max() < 0.15


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (torch.zeros(3, 1, 32, 36), "multiples of 8"),
        (torch.zeros(1, 1, 32, 32), r"\[3, F, H, W\]"),
        (torch.zeros(3, 0, 32, 32), "not empty"),
        (torch.zeros(3, 1, 32, 32, dtype=torch.uint8), "float"),
    ],
)
def test_encode_names_what_is_wrong(clip, message):
    with pytest.raises(ValueError, match=message):
        DctCodec().encode(clip)


@pytest.mark.parametrize(
    "codes",
    [torch.full((1, 4, 4), NUM_CODES), torch.full((1, 4, 4), -1), torch.zeros(4, 4).long(), torch.zeros(1, 4, 4)],
)
def test_decode_names_what_is_wrong(codes):
    with pytest.raises(ValueError, match=r"^codes must"):
        DctCodec().decode(codes)


def test_undecodable_metadata_does_not_stop_a_clip(tmp_path):
    content = bytearray(sample_clips()["carphone_distorted"].read_bytes())
    at = content.index(b"isom")  # the major brand, which PyAV shows as metadata
    content[at] = 0x80
    (tmp_path / "clip.mp4").write_bytes(content)
    assert read_video(tmp_path / "clip.mp4", 12, seconds=0.5, size=(32, 32)).shape == (6, 32, 32, 3)
