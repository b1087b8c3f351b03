"""The sizes that clips are brought to before they are encoded: upstream's list of aspect ratios.

Source: generate_crop_size_list and var_center_crop of the official code, data/item_processor.py, with its target sizes
352 (256p) and 528 (384p).
"""

from __future__ import annotations

from lumos.video import SIZE_UNIT

_AREAS = {"256p": (352 // SIZE_UNIT) ** 2, "384p": (528 // SIZE_UNIT) ** 2}  # largest height x width, in units of 32
BUCKETS = tuple(_AREAS)

_LARGEST_RATIO = 4


def bucket_sizes(name: str) -> list[tuple[int, int]]:
    """The sizes (H, W) of a bucket list, from the widest to the tallest. ValueError for an unknown name.

    For each width: every height from the largest that the next width allows up to the largest within the area.
    """
    if name not in _AREAS:
        raise ValueError(f"buckets must be one of {', '.join(BUCKETS)}, got {name!r}")
    area = _AREAS[name]
    sizes = [(h, w) for w in range(area, 0, -1) for h in range(max(1, area // (w + 1)), area // w + 1)]
    return [(SIZE_UNIT * h, SIZE_UNIT * w) for h, w in sizes if max(h, w) <= _LARGEST_RATIO * min(h, w)]


def nearest_bucket(height: int, width: int, sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest to that of a picture: the one that cropping to it cuts least off.

    Of two equally near ones the wider, as upstream.
    """

    def kept(size: tuple[int, int]) -> float:
        scales = size[0] / height, size[1] / width
        return min(scales) / max(scales)

    return max(sizes, key=lambda size: (kept(size), size[1], size[0]))
