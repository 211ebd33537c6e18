"""Triton's depthwise_conv2d against the floor of every benchmark shape. Estimates."""

import statistics

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import roofline, shapes
from lka_kernels.backends.triton import depthwise
from lka_kernels.backends.triton.estimate import traffic
from lka_kernels.backends.triton.estimate_work import products

BENCHMARKED = shapes.selected(shapes.DEPTHWISE + shapes.TABLE, "full", "cuda")
DIRECTIONS = ("forward", "dX", "dW")
# Of an H100: bytes a second that it copies, multiply-adds a second of its tensor cores in 16-bit
# types and of its FMA units; seconds that a launch adds on the device.
MEMORY, TENSOR_CORES, FMA, LAUNCH = 3.0e12, 495e12, 33e12, 2e-6


def launches(shape, direction: str, channels_last: bool, dtype=torch.bfloat16) -> list:
    def empty(*size, **options):
        return torch.empty(size, dtype=dtype, device="meta", **options)

    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = (shape.height, shape.width)
    x = empty(shape.batch, shape.channels, *size, memory_format=layout)
    weight = empty(shape.channels, 1, *shape.kernel)
    geometry = ((1, 1), (*shape.padding, *shape.padding), (shape.dilation, shape.dilation))
    if direction == "forward":
        bias = empty(shape.channels)
        return depthwise.plan_forward(x, weight, bias, *geometry, channels_last)[0]
    if direction == "dX":
        return depthwise.plan_backward_input(x, weight, list(size), *geometry, channels_last)[0]
    return depthwise.plan_backward_weight(x, x, list(shape.kernel), *geometry)[0]


def seconds(planned: list, dtype) -> float:
    """Launches, and the longest of bytes and multiply-adds, the tensor cores at half their peak."""
    made, moved = products(planned), traffic(planned)
    on_fma = made.fma + (made.tensor_cores if dtype == torch.float32 else 0)
    on_tensor_cores = made.tensor_cores if dtype != torch.float32 else 0
    longest = max(moved.memory / MEMORY, on_tensor_cores / (TENSOR_CORES / 2), on_fma / FMA)
    return moved.launches * LAUNCH + longest


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", BENCHMARKED, ids=lambda shape: shape.name)
def test_every_benchmark_against_its_floor(shape, channels_last, direction):
    planned = launches(shape, direction, channels_last)
    work = shape.work(direction, 2)
    moved, made = traffic(planned), products(planned)
    moves = sum(launch.kernel.__name__ == "move_planes_kernel" for launch in planned)
    assert moves in ((0, 2) if channels_last else (0,))
    assert moved.launches == moves + (2 if direction == "dW" else 1)
    # A move reads and writes one of two maps.
    assert 1.0 <= moved.memory / work.bytes <= 1.01 + moves
    assert made.tensor_cores == 0 or made.fma == 0
    assert made.tensor_cores + made.fma >= work.flops / 2  # no multiply-add is left out


# Times of the floor that estimates come to, batches of 64 and 128: the median and the most. The
# most are kernels of 29 to 51 taps, whose Toeplitz matrices hold two zeros for a tap or more.
HELD = {
    ("forward", False): (1.4, 8.6),
    ("dX", False): (1.4, 8.6),
    ("dW", False): (2.0, 8.1),
    ("forward", True): (3.4, 8.7),
    ("dX", True): (3.4, 8.7),
    ("dW", True): (3.4, 8.4),
}


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_estimates_come_to(direction, channels_last):
    times = []
    for shape in BENCHMARKED:
        # The adapter's eight channels leave the device idle: launches are all that is to be seen.
        if shape.batch >= 64 and shape.channels > 8:
            floor = roofline.floor_seconds(shape.work(direction, 2), MEMORY, 2 * TENSOR_CORES)
            planned = launches(shape, direction, channels_last)
            times.append(seconds(planned, torch.bfloat16) / floor)
    median, most = HELD[direction, channels_last]
    assert statistics.median(times) <= median
    assert max(times) <= most
