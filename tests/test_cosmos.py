"""lumos/cosmos.py on a scripted stand-in: two TorchScript files of the published tokenizer's interface."""

import pickle

import pytest
import torch
from torch import Tensor, nn

from lumos.cli import main
from lumos.config import LumosConfig
from lumos.cosmos import CosmosCodec, load_codec
from lumos.data import SampleFolder, tokenize
from lumos.model import Lumos
from lumos.tokens import parse_document
from lumos.video import read_image, read_video, write_video


class Encoder(nn.Module):
    """[1, 3, T, H, W] -> (indices, codes, loss): a code tells the first picture of its group, and its first pixel.

    Takes any number of pictures, as the published encoder, and only its own dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.dtype != self.one.dtype:
            raise RuntimeError("the input has another dtype than the weights")
        groups = [0] + [1 + 4 * j for j in range((x.shape[2] + 2) // 4)]
        levels = (x[:, 0, groups, ::8, ::8] + self.one) * 127.5
        indices = 16 * levels.round().to(torch.int32) + x.shape[2] % 4
        return indices, x[:, :, ::4, ::8, ::8], self.one


class Decoder(nn.Module):
    """[1, f, R, C] -> [1, 3, 1 + 4 (f - 1), 8 R, 8 C], beyond [-1, 1] at the ends as a network may be."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, indices: Tensor) -> Tensor:
        grey = (indices // 16).to(self.one.dtype) / 126.0 - self.one
        video = grey[:, None].repeat_interleave(4, 2).repeat_interleave(8, 3).repeat_interleave(8, 4)
        return video[:, :, 3:].repeat(1, 3, 1, 1, 1)


class Other(nn.Module):
    """Returns what it is told."""

    def __init__(self, made: Tensor) -> None:
        super().__init__()
        self.register_buffer("made", made, persistent=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.made


def save(folder, encoder=None, decoder=None):
    folder.mkdir(exist_ok=True)
    for name, module in (("encoder.jit", encoder), ("decoder.jit", decoder)):
        if module is not None:
            torch.jit.script(module).save(str(folder / name))
    return folder


@pytest.fixture
def folder(tmp_path):
    return save(tmp_path / "DV4x8x8", Encoder(), Decoder())


def video(pictures, height=16, width=24, seed=0):
    levels = torch.randint(0, 256, (3, pictures, height, width), generator=torch.Generator().manual_seed(seed))
    return levels.float() / 127.5 - 1


@pytest.mark.parametrize(("pictures", "frames"), [(1, 1), (2, 2), (5, 2), (6, 3), (24, 7), (84, 22)])
def test_a_clip_goes_through_whole_and_as_it_is(folder, pictures, frames):
    """Windows, or pictures added here, would change what the encoder says of each group."""
    codec, clip = CosmosCodec(folder, "cpu", torch.float32), video(pictures)
    codes = codec.encode(clip)
    assert (codes.dtype, list(codes.shape)) == (torch.int64, [frames, 2, 3])
    firsts = [0] + [1 + 4 * j for j in range(frames - 1)]
    levels = ((clip[0, firsts, ::8, ::8] + 1) * 127.5).round().long()
    assert torch.equal(codes, 16 * levels + pictures % 4)
    back = codec.decode(codes)
    assert (back.dtype, list(back.shape)) == (torch.float32, [3, 1 + 4 * (frames - 1), 16, 24])
    assert torch.equal(back[1, [4 * j for j in range(frames)], ::8, ::8], (levels / 126.0 - 1).clamp(-1, 1))


def test_the_dtype_is_upstreams(folder):
    clip = video(5)
    exact = CosmosCodec(folder, "cpu", torch.float32).encode(clip)
    codes = CosmosCodec(folder, "cpu").encode(clip)
    assert torch.equal(codes // 16, ((clip.bfloat16()[0, [0, 1], ::8, ::8] + 1) * 127.5).round().long())
    assert not torch.equal(codes, exact)
    assert CosmosCodec(folder, "cpu").decode(codes).dtype == torch.float32


def test_workers_load_it_again(folder):
    codec, clip = CosmosCodec(folder, "cpu"), video(5)
    codes = codec.encode(clip)
    sent = pickle.dumps(codec)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).encode(clip), codes)


def test_either_file_serves_alone(tmp_path):
    encoder = CosmosCodec(save(tmp_path / "encoder", encoder=Encoder()), "cpu")
    codes = encoder.encode(video(5))
    with pytest.raises(FileNotFoundError, match=r"decoder\.jit is missing"):
        encoder.decode(codes)
    decoder = CosmosCodec(save(tmp_path / "decoder", decoder=Decoder()), "cpu")
    assert list(decoder.decode(codes).shape) == [3, 5, 16, 24]
    with pytest.raises(FileNotFoundError, match=r"encoder\.jit is missing"):
        decoder.encode(video(5))


def test_what_is_wrong_with_the_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="none is no folder"):
        CosmosCodec(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match=r"holds neither encoder\.jit nor decoder\.jit"):
        CosmosCodec(tmp_path)
    (tmp_path / "encoder.jit").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"encoder\.jit is no TorchScript file"):
        CosmosCodec(tmp_path, "cpu").encode(video(1))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (torch.zeros(1, 2, 2, 2, dtype=torch.int32), r"made torch.int32 \[1, 2, 2, 2\] of \[3, 5, 16, 24\], expected"),
        (torch.zeros(1, 16, 2, 2, 3), r"not the encoder of DV4x8x8"),
        (torch.zeros(1, 2, 2, 3), r"expected integers \[1, 2, 2, 3\]"),
        (torch.full((1, 2, 2, 3), 64000), r"encoder\.jit: codes must be in \[0, 64000\), got 64000\.\.64000"),
        (torch.full((1, 2, 2, 3), -1), r"got -1\.\.-1"),
    ],
)
def test_another_encoder_is_noticed(tmp_path, made, message):
    with pytest.raises(ValueError, match=message):
        CosmosCodec(save(tmp_path / "f", encoder=Other(made)), "cpu").encode(video(5))


def test_another_decoder_is_noticed(tmp_path):
    codec = CosmosCodec(save(tmp_path / "f", decoder=Other(torch.zeros(1, 3, 8, 16, 24))), "cpu")
    with pytest.raises(ValueError, match=r"made \[1, 3, 8, 16, 24\] of \[2, 2, 3\], expected \[1, 3, 5, 16, 24\]"):
        codec.decode(torch.zeros(2, 2, 3, dtype=torch.int64))


def test_wrong_inputs_are_named(folder):
    codec = CosmosCodec(folder, "cpu")
    for wrong in (video(1)[0], video(1).long(), video(1)[:2], torch.zeros(3, 0, 16, 16)):
        with pytest.raises(ValueError, match=r"video must be float \[3, F, H, W\] and not empty"):
            codec.encode(wrong)
    with pytest.raises(ValueError, match="height and width must be multiples of 8"):
        codec.encode(video(1, 12, 24))
    codes = codec.encode(video(5))
    for wrong in (codes[0], codes.float(), codes[:0]):
        with pytest.raises(ValueError, match=r"codes must be integers \[f, R, C\] and not empty"):
            codec.decode(wrong)
    for wrong in (-1, 64000):
        with pytest.raises(ValueError, match=r"codes must be in \[0, 64000\)"):
            codec.decode(torch.full_like(codes, wrong))


def test_names_of_codecs(folder):
    assert isinstance(load_codec(f"cosmos:{folder}", "cpu"), CosmosCodec)
    for name in ("vqgan", "cosmos", "cosmos:", "dct:", ""):
        with pytest.raises(ValueError, match='codec must be "dct" or "cosmos:FOLDER"'):
            load_codec(name)
        with pytest.raises(SystemExit):
            main(["tokenize", "a.mp4", "--caption", "x", "--out", "out", "--codec", name])


def test_tokenize_and_generate(folder, tmp_path):
    torch.manual_seed(0)
    clip, name = tmp_path / "clip.mp4", f"cosmos:{folder}"
    write_video(clip, torch.randint(0, 256, (4, 32, 64, 3), dtype=torch.uint8), 4)
    common = ["--fps", "4", "--seconds", "1", "--size", "32x64", "--codec", name]
    out = tmp_path / "out"
    assert main(["tokenize", str(clip), "--caption", "x", "--out", str(out), "--device", "cpu", *common]) == 0
    frames = parse_document(SampleFolder(out)[0].ids).codes
    pictures = read_video(clip, 4).permute(3, 0, 1, 2).float() / 127.5 - 1
    assert torch.equal(frames, CosmosCodec(folder, "cpu").encode(pictures))
    two = tokenize([clip], ["x"], tmp_path / "two", load_codec(name, "cpu"), 4, 1, (32, 64), workers=2)
    assert two.samples == 1

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    Lumos(LumosConfig(vocab_size=129536, **sizes)).save_pretrained(tmp_path / "model")
    # A stand-in's codes of an untrained model may decode to anything; what counts is that pictures come out.
    made = tmp_path / "made.png"
    prompt = ["--prompt", "a", "--tokenizer", "bytes", "--steps", "2", "--size", "32x64", "--codec", name]
    assert main(["generate", str(tmp_path / "model"), *prompt, "--out", str(made)]) == 0
    assert list(read_image(made).shape) == [32, 64, 3]
    assert main(["generate", str(tmp_path / "model"), *prompt[:-1], "cosmos:none", "--out", str(made)]) == 2
