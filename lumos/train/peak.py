"""The peak rate that MFU is measured against."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

# Published peak of dense bf16 matmuls with fp32 sums, in 10^12 FLOP/s of one device at its full power limit. The
# first name that the device's name contains counts.
PUBLISHED = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H800": 989.4,
    "H20": 148.0,
    "A100": 311.8,
    "A800": 311.8,
    "A30": 165.0,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
MEASURED = "matmul rate measured on this machine"


@dataclass(frozen=True)
class Peak:
    """FLOP/s of one device, and what that figure is: a published peak, or a measured rate where none is known."""

    flops: float
    source: str

    @classmethod
    def of(cls, device: torch.device, dtype: torch.dtype) -> Peak:
        """The published bf16 peak of a known GPU; elsewhere the rate of a matmul in `dtype`, which takes a moment."""
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            for known, teraflops in PUBLISHED.items():
                if known in name:
                    return cls(teraflops * 1e12, f"published dense bf16 peak of {known}")
        return cls(measured_flops(device, dtype), f"{MEASURED}, {str(dtype).removeprefix('torch.')}")


def measured_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.2) -> float:
    """FLOP/s of the fastest square matmul among those run in `seconds`, two at least."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    rounds = 0
    while rounds < 2 or time.perf_counter() < end:
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best, rounds = min(best, time.perf_counter() - begin), rounds + 1
    return 2 * size**3 / best
