"""The codec between pictures and visual codes: the interface, and the untrained one that needs no download.

Legend: F pictures, f latent frames = ceil((F - 1) / 4) + 1, H x W pixels, R x C_ grid of codes = H/8 x W/8.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lumos.tokens import NUM_CODES
from lumos_kernels.frame_layout.frames import SPACE_STRIDE, TIME_STRIDE


class VideoCodec(Protocol):
    """Between pictures and visual codes; one code stands for 8 x 8 pixels of one picture or of four.

    The first latent frame holds the first picture, each later one the next four. encode pads the last group by
    repeating the last picture: F pictures give f = ceil((F - 1) / 4) + 1 latent frames, and decode returns all of
    1 + 4 (f - 1) pictures, which may be up to 3 more than went in.
    """

    def encode(self, video: Tensor) -> Tensor:
        """float [3, F, H, W] in [-1, 1], H and W multiples of 8 -> int64 codes [f, H / 8, W / 8] in [0, 64000)."""
        ...

    def decode(self, codes: Tensor) -> Tensor:
        """int64 codes [f, R, C_] -> float32 [3, 1 + 4 (f - 1), 8 R, 8 C_] in [-1, 1]."""
        ...


FSQ_LEVELS = (8, 8, 8, 5, 5, 5)  # of Cosmos DV4x8x8; the first digit of a code is the least significant

# ITU-R BT.601 luma and colour differences.
_TO_YCC = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def _levels(first: float, last: float, count: int, power: float) -> Tensor:
    """`count` values from `first` to `last`, denser around zero for power > 1."""
    ends = [math.copysign(abs(end) ** (1 / power), end) for end in (first, last)]
    linear = torch.linspace(*ends, count, dtype=torch.float64)
    return (linear.sign() * linear.abs() ** power).float()


# Reconstruction values per digit, chosen by PSNR on the sample clips among such curves. Grey, flat and still are
# values of their own; the steps of luma are what _relax smooths.
_LUMA = _levels(-0.8, 0.8, 8, 1.1)
_BLUE = _levels(-0.45, 0.29, 8, 1.5)
_RED = _levels(-0.2, 0.3, 8, 1.5)
_SLOPE = _levels(-0.16, 0.16, 5, 1.75)
_CHANGE = _levels(-0.5, 0.5, 5, 1.5)
_TWIST = _levels(-0.1, 0.1, 5, 1.7)


class DctCodec:
    """The embedded default codec: an untrained block transform on the FSQ grid 8, 8, 8, 5, 5, 5.

    A code's six digits are the lowest coefficients of an orthonormal DCT in YCbCr over its 4 x 8 x 8 block: the means
    of luma, blue and red difference (8 levels each), the first horizontal, vertical and temporal luma waves (5 each);
    the first latent frame, blocks of 1 x 8 x 8, has the diagonal wave in place of the temporal one. The means are
    laid out as a smooth surface with exactly those block means, and the waves are coded relative to that surface, so
    zeros in the last three digits mean "smooth". Deterministic; decoding and encoding again keeps 99.8 % of the codes.

    PSNR on the first 2 s at 12 fps of the clips of sample_clips(), over all 24 pictures: bigbuckbunny 23.5 dB and
    bikes 22.7 dB at 256 x 448, carphone_pristine 21.8 dB at 128 x 160 (tests/test_video.py holds them there).
    """

    def encode(self, video: Tensor) -> Tensor:
        """float [3, F, H, W] in [-1, 1] -> int64 [ceil((F - 1) / 4) + 1, H / 8, W / 8]; the last picture is repeated
        to fill the last group. Raises ValueError for another shape or dtype."""
        if video.dim() != 4 or video.shape[0] != 3 or not video.is_floating_point() or 0 in video.shape:
            raise ValueError(f"video must be float [3, F, H, W] and not empty; got {video.dtype} {list(video.shape)}")
        if video.shape[2] % SPACE_STRIDE or video.shape[3] % SPACE_STRIDE:
            raise ValueError(f"video height and width must be multiples of {SPACE_STRIDE}, got {list(video.shape[2:])}")
        planes = torch.einsum("yc,cfhw->yfhw", torch.tensor(_TO_YCC, device=video.device), video.float())
        padding = -(planes.shape[1] - 1) % TIME_STRIDE
        planes = torch.cat([planes, planes[:, -1:].expand(-1, padding, -1, -1)], dim=1)
        first = _encode_blocks(planes[:, :1], 1)
        return torch.cat([first, _encode_blocks(planes[:, 1:], TIME_STRIDE)]) if planes.shape[1] > 1 else first

    def decode(self, codes: Tensor) -> Tensor:
        """int64 [f, R, C_] in [0, 64000) -> float32 [3, 1 + 4 (f - 1), 8 R, 8 C_] in [-1, 1]."""
        if codes.dim() != 3 or codes.is_floating_point() or 0 in codes.shape:
            raise ValueError(f"codes must be integers [f, R, C] and not empty; got {codes.dtype} {list(codes.shape)}")
        if codes.min() < 0 or codes.max() >= NUM_CODES:
            raise ValueError(f"codes must be in [0, {NUM_CODES}), got {int(codes.min())}..{int(codes.max())}")
        planes = _decode_blocks(codes[:1], 1)
        if codes.shape[0] > 1:
            planes = torch.cat([planes, _decode_blocks(codes[1:], TIME_STRIDE)], dim=1)
        to_rgb = torch.linalg.inv(torch.tensor(_TO_YCC, dtype=torch.float64)).float().to(codes.device)
        return torch.einsum("cy,yfhw->cfhw", to_rgb, planes).clamp(-1, 1)


def _encode_blocks(planes: Tensor, depth: int) -> Tensor:
    """YCbCr [3, f * depth, H, W] -> codes [f, H / 8, W / 8]."""
    tables = _tables(depth, planes.device)
    means = _block_means(planes, depth)
    digits = [_nearest(mean, table) for mean, table in zip(means, tables, strict=False)]
    rest = planes[0] - _surface(digits[:1], tables, depth)[0]
    for wave, table in zip(_waves(depth, planes.device), tables[3:], strict=True):
        blocks = rest.unflatten(0, (-1, depth)).unflatten(2, (-1, SPACE_STRIDE)).unflatten(4, (-1, SPACE_STRIDE))
        digits.append(_nearest(torch.einsum("ftrhcw,thw->frc", blocks, wave) / wave.numel(), table))
    code = torch.zeros_like(digits[0])
    for digit, levels in zip(reversed(digits), reversed(FSQ_LEVELS), strict=True):
        code = code * levels + digit
    return code


def _decode_blocks(codes: Tensor, depth: int) -> Tensor:
    """codes [f, R, C_] -> YCbCr [3, f * depth, 8 R, 8 C_]."""
    tables = _tables(depth, codes.device)
    digits = []
    for levels in FSQ_LEVELS:
        digits.append(codes % levels)
        codes = codes // levels
    planes = _surface(digits[:3], tables, depth)
    for wave, digit, table in zip(_waves(depth, codes.device), digits[3:], tables[3:], strict=True):
        blocks = torch.einsum("frc,thw->ftrhcw", table[digit], wave)
        planes[0] += blocks.flatten(4, 5).flatten(2, 3).flatten(0, 1)
    return planes


def _tables(depth: int, device: torch.device) -> list[Tensor]:
    last = _CHANGE if depth > 1 else _TWIST
    return [table.to(device) for table in (_LUMA, _BLUE, _RED, _SLOPE, _SLOPE, last)]


def _waves(depth: int, device: torch.device) -> list[Tensor]:
    """The three luma waves [depth, 8, 8], of mean 0 and mean square 1."""

    def cosine(points: int) -> Tensor:
        return math.sqrt(2) * torch.cos(math.pi * (torch.arange(points, device=device) + 0.5) / points)

    flat = torch.ones(depth, SPACE_STRIDE, SPACE_STRIDE, device=device)
    across, down = cosine(SPACE_STRIDE), cosine(SPACE_STRIDE)[:, None]
    last = flat * cosine(depth)[:, None, None] if depth > 1 else flat * down * across
    return [flat * across, flat * down, last]


def _surface(digits: list[Tensor], tables: list[Tensor], depth: int) -> Tensor:
    """The means as smooth planes [n, f * depth, H, W] whose block means are _relax's."""
    means = torch.stack([_relax(digit, table) for digit, table in zip(digits, tables, strict=False)])
    shape = (means.shape[2] * SPACE_STRIDE, means.shape[3] * SPACE_STRIDE)

    # Interpolation alone flattens peaks; one correction brings most of them back, a constant per block the rest.
    planes = F.interpolate(means, shape, mode="bilinear")
    planes = planes + F.interpolate(means - F.avg_pool2d(planes, SPACE_STRIDE), shape, mode="bilinear")
    planes = planes + F.interpolate(means - F.avg_pool2d(planes, SPACE_STRIDE), shape, mode="nearest")
    return planes.repeat_interleave(depth, dim=1)


def _relax(digit: Tensor, table: Tensor) -> Tensor:
    """Values [f, R, C_] of the digits, smoothed over their neighbours up to half way to the next decision threshold.

    Takes the steps out of smooth areas (+0.2 dB, measured) and never changes what the value would be coded as.
    """
    value, edges = table[digit], (table[1:] + table[:-1]) / 2
    edges = torch.cat([2 * table[:1] - edges[:1], edges, 2 * table[-1:] - edges[-1:]])
    kernel = torch.tensor([1.0, 2.0, 1.0], device=value.device) / 4
    smooth = F.pad(value[:, None], (1, 1, 1, 1), mode="replicate")
    smooth = F.conv2d(smooth, (kernel[:, None] * kernel)[None, None])[:, 0]
    return smooth.clamp((value + edges[digit]) / 2, (value + edges[digit + 1]) / 2)


def _block_means(planes: Tensor, depth: int) -> Tensor:
    return F.avg_pool3d(planes[:, None], (depth, SPACE_STRIDE, SPACE_STRIDE))[:, 0]


def _nearest(value: Tensor, table: Tensor) -> Tensor:
    return torch.bucketize(value.contiguous(), (table[1:] + table[:-1]) / 2)
