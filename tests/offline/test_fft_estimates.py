"""Triton's fft method moves fewer bytes than torch.fft alone, and how many. Estimates."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")
from fft_launches import DIRECTIONS, steps

from benchmarks import roofline
from lka_kernels.backends import fft
from lka_kernels.backends.triton.estimate import traffic, transform_bytes
from lka_kernels.backends.triton.launch import Launch, Transform

SHAPES = [
    ((64, 128, 56, 56), (31, 31)),
    ((64, 256, 28, 28), (29, 29)),
    ((8, 96, 112, 112), (31, 31)),
]


class CountBytes(TorchDispatchMode):
    """Bytes of the tensors that each of torch's operators reads and writes; views are none."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = function._schema.name.removeprefix("aten::")
        aliases = any(
            a.alias_info and not a.alias_info.is_write for a in function._schema.arguments
        )
        if aliases or "empty" in name:
            return result
        flat = torch.utils._pytree.tree_leaves((args, kwargs))
        tensors = [t for t in flat if isinstance(t, torch.Tensor)]
        if name == "_fft_c2r":  # as in ``transform_bytes``; with a scale it is one pass more
            self.bytes += transform_bytes(Transform(*tensors, result, inverse=True))
            self.bytes += 2 * result.nbytes if args[2] else 0
            return result
        if name in ("copy_", "zero_", "fill_", "index_put_"):
            tensors = tensors[1:]  # the first is written, not read
        self.bytes += sum(t.nbytes for t in tensors) + result.nbytes
        return result


def of_torch(direction, shape, kernel, dtype, channels_last) -> int:
    """Bytes of ``backends/fft.py``."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta", memory_format=layout)
    weight = torch.empty(shape[1], 1, *kernel, dtype=dtype, device="meta")
    bias = torch.empty(shape[1], dtype=dtype, device="meta")
    before = [k // 2 for k in kernel]
    geometry = ((1, 1), (*before, *before), (1, 1))
    with CountBytes() as counted:
        if direction == "forward":
            fft.forward(x, weight, bias, *geometry, channels_last)
        elif direction == "backward_input":
            fft.backward_input(x, weight, shape[2:], *geometry, channels_last)
        else:
            fft.backward_weight(x, x, kernel, *geometry)
    return counted.bytes


def over_fewest(direction, shape, kernel, dtype, channels_last) -> tuple[float, float]:
    """Bytes of torch.fft alone and of Triton's steps, in units of the fewest of the call."""
    name = {"forward": "forward", "backward_input": "dX", "backward_weight": "dW"}[direction]
    batch, channels, *size = shape
    padding = tuple(k // 2 for k in kernel)
    fewest = roofline.depthwise(
        name, batch, channels, tuple(size), kernel, padding=padding, element_size=dtype.itemsize
    ).bytes
    done = steps(direction, shape, kernel, dtype, channels_last=channels_last)
    before = of_torch(direction, shape, kernel, dtype, channels_last)
    return before / fewest, traffic(done).memory / fewest


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("shape", "kernel"), SHAPES, ids=str)
def test_fewer_bytes_than_torch_alone(shape, kernel, direction, dtype, channels_last):
    before, after = over_fewest(direction, shape, kernel, dtype, channels_last)
    assert 1 < after < 0.86 * before


def test_what_is_written_in_the_notes():
    """docs/kernel-notes.md: 56², K = 31, bfloat16, contiguous."""
    found = [
        tuple(round(n, 1) for n in over_fewest(d, *SHAPES[0], torch.bfloat16, False))
        for d in DIRECTIONS
    ]
    assert found == [(24.6, 17.2), (22.6, 17.2), (26.4, 14.5)]


def test_launches_touch_each_tensor_once():
    batch, channels, height, width = shape = (64, 128, 56, 56)
    fft_size = 72
    plane, spectrum = 4 * fft_size**2, 8 * fft_size * (fft_size // 2 + 1)
    crop, image = 4 * height * width, 2 * height * width
    spread = image + plane
    expected = batch * (spread + 2 * spectrum + crop + image)
    expected += 2 * 31 * 31 + plane + spectrum + 2  # weight, its planes, spectra and the bias
    done = steps("forward", shape, (31, 31), torch.bfloat16)
    own = [step for step in done if isinstance(step, Launch)]
    assert traffic(own).memory == channels * expected


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_four_launches_and_three_transforms(direction):
    done = steps(direction, *SHAPES[0], torch.bfloat16)
    assert traffic(done).launches == 4
    assert len(done) == 7
