"""Tiles of the kernels around products and transforms: planes, spectra and partial sums."""

from __future__ import annotations

from lka_kernels.tiles.machine import ceil_div, next_power_of_2


def move_tiles(channels: int, positions: int) -> tuple[int, int]:
    """Channels and positions of a program that moves maps between channels_last and planes.

    64 channels or positions are a line of the cache in 16-bit types; 32 elements a thread.
    """
    block_c = min(64, next_power_of_2(channels))
    return block_c, min(4096 // block_c, next_power_of_2(positions))


def plane_tiles(channels: int, positions: int, channels_last: bool) -> tuple[int, int]:
    """Channels and positions of a program that moves planes between memory formats.

    A position is divided into row and column once for all channels of a program. One of the two
    tensors always has its planes contiguous: 32 positions are a line of the cache. Of the other,
    with channels_last, 32 channels are one in float32. 1024 elements are 8 a thread.
    """
    block_c = min(32 if channels_last else 4, next_power_of_2(channels))
    return block_c, min(1024 // block_c, max(16, next_power_of_2(positions)))


def product_tiles(row: int, batch: int, num_sms: int) -> tuple[int, int]:
    """Frequencies and images of a program that multiplies the spectra of images by one.

    Four images load the factor once and have their loads under way together, as long as every
    multiprocessor has programs enough to fill its memory's queue.
    """
    block, images = 256, min(4, next_power_of_2(batch))
    while images > 1 and ceil_div(row, block) * ceil_div(batch, images) < 8 * num_sms:
        images //= 2
    return block, images


def product_sum_block(row: int, num_sms: int) -> int:
    """Frequencies of a program that sums the products of all images: 1 or 2 a thread."""
    return 256 if ceil_div(row, 256) >= 4 * num_sms else 128


def sum_tiles(rows: int) -> tuple[int, int]:
    """Elements and rows at a time of a program that adds ``rows`` rows of partial sums.

    16 loads of a thread are under way together; with few rows, all of them. A program waits for one
    such step after the other: 784 rows in steps of 32 took 19 µs on an H100, 1568 took 36. 16
    elements are two sectors of the cache.
    """
    at_a_time = min(128, next_power_of_2(rows))
    return min(512, 2048 // at_a_time), at_a_time
