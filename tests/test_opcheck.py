"""torch.library.opcheck of every registered operator: schema, fake with true strides, autograd."""

import pytest
import torch

from lka_kernels import _extension, ops

CPU = ("cpu", "cpu_direct", "cpu_fft")
GEOMETRY = ([2, 1], [1, 2, 3, 2], [1, 2])
compiled = pytest.mark.skipif(not _extension.loaded(), reason=_extension.STATUS)
BACKENDS = [*(pytest.param(name, marks=compiled) for name in CPU), "fft"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_depthwise(backend, dtype, channels_last):
    layout = ops.memory_format(channels_last)
    x = torch.randn(2, 5, 9, 8).to(dtype).contiguous(memory_format=layout)
    w, b = torch.randn(5, 1, 3, 4).to(dtype), torch.randn(5).to(dtype)
    operators = ops.DEPTHWISE[backend]
    stride, padding, dilation = GEOMETRY
    geometry = ([1, 1] if backend == "cpu_fft" else stride, padding, dilation)
    forward = (x, w, b, *geometry, channels_last)
    y = operators.forward(*forward)
    torch.library.opcheck(operators.forward, forward)
    torch.library.opcheck(operators.backward_input, (y, w, [9, 8], *geometry, channels_last))
    torch.library.opcheck(operators.backward_weight, (y, x, [3, 4], *geometry))
    if backend != "fft":
        torch.library.opcheck(operators.backward, (y, x, w, *geometry, channels_last))


@compiled
@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter(dtype):
    def normal(*shape):
        return torch.randn(shape).to(dtype)

    weights = (
        normal(3, 6),
        normal(3),
        normal(3, 1, 3, 2),
        None,
        normal(6, 3),
        normal(6),
    )
    seed = torch.tensor([3])
    options = (seed, 2, 4, 1, "center_tap", 1, "gelu", "both", 0.25, 0.5)
    x = normal(2, 9, 6)
    operators = ops.ADAPTER["cpu"]
    y, z, c = operators.forward(x, *weights, x, *options)
    torch.library.opcheck(operators.forward, (x, *weights, x, *options))
    mask = [True, True, False, True, False, True, True]
    for residual_is_x in (False, True):
        arguments = (y, x, z, c, *weights, *options, residual_is_x, mask)
        torch.library.opcheck(operators.backward, arguments)
