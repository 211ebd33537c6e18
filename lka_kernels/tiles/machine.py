"""What the choice of tiles supposes of a device: an H100, in clocks at 1.7 GHz."""

from __future__ import annotations

import torch

# Of an H100 (SXM). Used where there is no device to ask.
DEFAULT_MULTIPROCESSORS = 132
# What a multiprocessor of an H100 does in a clock, for choosing between forms: multiply-adds of the
# tensor cores in 16-bit types (half of the published peak, which nothing without asynchronous
# copies of whole tiles reaches), other instructions by lane, bytes from the second-level cache.
PRODUCTS_PER_CLOCK = 1024
LANES_PER_CLOCK = 128
BYTES_PER_CLOCK = 64
# In clocks of an H100 at 1.7 GHz. What a launch adds on the device, to start and to wait for the
# one before, is 2 µs, as in docs/kernel-notes.md. The time of the host comes on top where it is not
# ahead of the device. A load waits for memory as long as LATENCY, for the first-level cache
# NEAR_LATENCY; all multiprocessors together read the second-level cache at 5.5 TB/s.
LAUNCH_CLOCKS = 3400
LATENCY = 800
NEAR_LATENCY = 100
CHIP_BYTES_PER_CLOCK = 3200


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n ≥ 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of ``device``; those of an H100 where it has none."""
    if device.type != "cuda":
        return DEFAULT_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
