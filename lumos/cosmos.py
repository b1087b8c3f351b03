"""The published video tokenizer, and the codec of a name.

Cosmos-Tokenizer-DV4x8x8 (arXiv 2501.03575; NVIDIA publishes it as two TorchScript files) is what the released Lumos-1
models were trained with. Legend as in lumos/codec.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from lumos.codec import DctCodec, VideoCodec
from lumos.tokens import NUM_CODES, latent_frames
from lumos_kernels.frame_layout.frames import SPACE_STRIDE, TIME_STRIDE

ENCODER, DECODER = "encoder.jit", "decoder.jit"


class CosmosCodec:
    """Runs the published encoder.jit and decoder.jit.

    folder: holds one or both files; each is loaded when it is first used, and again in a worker process.
    device: "auto" is the GPU where there is one. dtype: upstream's is bfloat16, also of the codes in the samples
        published with the official code.

    As upstream, a clip goes through the network whole: windows of 17 pictures, which NVIDIA's own command line encodes
    one by one, would each begin with a latent frame of a single picture. The encoder completes the last group of
    four pictures itself. Memory grows with pictures times pixels.
    """

    def __init__(
        self, folder: str | Path, device: torch.device | str = "auto", dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.folder, self.dtype = Path(folder), dtype
        if not self.folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: expected one with {ENCODER} and {DECODER}")
        if not any((self.folder / name).is_file() for name in (ENCODER, DECODER)):
            raise FileNotFoundError(f"{folder} holds neither {ENCODER} nor {DECODER}")
        auto = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(auto if device == "auto" else device)
        self._networks: dict[str, torch.jit.ScriptModule] = {}

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """float [3, F, H, W] in [-1, 1], H and W multiples of 8 -> int64 [ceil((F - 1) / 4) + 1, H / 8, W / 8].

        On the device of `video`. ValueError for another shape or dtype, or where the encoder returns something else.
        """
        if video.dim() != 4 or video.shape[0] != 3 or not video.is_floating_point() or 0 in video.shape:
            raise ValueError(f"video must be float [3, F, H, W] and not empty; got {video.dtype} {list(video.shape)}")
        if video.shape[2] % SPACE_STRIDE or video.shape[3] % SPACE_STRIDE:
            raise ValueError(f"video height and width must be multiples of {SPACE_STRIDE}, got {list(video.shape[2:])}")
        out = self._network(ENCODER)(video[None].to(self.device, self.dtype))
        indices = out[0] if isinstance(out, (tuple, list)) else out
        expected = [1, latent_frames(video.shape[1]), *(side // SPACE_STRIDE for side in video.shape[2:])]
        if list(indices.shape) != expected or indices.is_floating_point():
            raise ValueError(
                f"{self.folder / ENCODER} made {indices.dtype} {list(indices.shape)} of {list(video.shape)}, expected "
                f"integers {expected}: not the encoder of DV4x8x8"
            )
        codes = indices[0].long().to(video.device)
        _check_codes(f"{self.folder / ENCODER}: codes", codes)
        return codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """int64 [f, R, C_] in [0, 64000) -> float32 [3, 1 + 4 (f - 1), 8 R, 8 C_], clamped to [-1, 1].

        On the device of `codes`. ValueError for another shape or dtype, or where the decoder returns something else.
        """
        if codes.dim() != 3 or codes.is_floating_point() or 0 in codes.shape:
            raise ValueError(f"codes must be integers [f, R, C] and not empty; got {codes.dtype} {list(codes.shape)}")
        _check_codes("codes", codes)
        video = self._network(DECODER)(codes[None].to(self.device))
        frames, rows, cols = codes.shape
        expected = [1, 3, 1 + TIME_STRIDE * (frames - 1), SPACE_STRIDE * rows, SPACE_STRIDE * cols]
        if not isinstance(video, Tensor) or list(video.shape) != expected:
            made = list(video.shape) if isinstance(video, Tensor) else type(video).__name__
            raise ValueError(
                f"{self.folder / DECODER} made {made} of {list(codes.shape)}, expected {expected}: not the decoder of "
                f"DV4x8x8"
            )
        return video[0].float().clamp(-1, 1).to(codes.device)

    def _network(self, name: str) -> torch.jit.ScriptModule:
        if name not in self._networks:
            path = self.folder / name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing")
            try:
                network = torch.jit.load(str(path), map_location=self.device)
            except RuntimeError as error:
                reason = str(error).strip().splitlines()[0]
                raise ValueError(f"{path} is no TorchScript file: {reason}") from error
            self._networks[name] = network.to(self.dtype).eval()
        return self._networks[name]

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"_networks": {}}


def check_codec(name: str) -> str:
    """A codec's name as an option of the command line: argparse.ArgumentTypeError where there is none of it."""
    kind, _, folder = name.partition(":")
    if name != "dct" and (kind != "cosmos" or not folder):
        raise argparse.ArgumentTypeError(f"expected dct or cosmos:FOLDER, got {name!r}")
    return name


def load_codec(name: str, device: torch.device | str = "auto") -> VideoCodec:
    """The codec of a name: "dct", the embedded one, or "cosmos:FOLDER". FileNotFoundError or ValueError naming it."""
    if name == "dct":
        return DctCodec()
    kind, _, folder = name.partition(":")
    if kind != "cosmos" or not folder:
        raise ValueError(f'codec must be "dct" or "cosmos:FOLDER", got {name!r}')
    return CosmosCodec(folder, device)


def _check_codes(name: str, codes: Tensor) -> None:
    if codes.min() < 0 or codes.max() >= NUM_CODES:
        raise ValueError(f"{name} must be in [0, {NUM_CODES}), got {int(codes.min())}..{int(codes.max())}")
