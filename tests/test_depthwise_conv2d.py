"""depthwise_conv2d against F.conv2d: values, gradients, layouts, dtypes, errors."""

import poison
import pytest
import torch
import torch.nn.functional as F
from cases import Case, depthwise_cases
from closeness import assert_close_to_truth
from hypothesis import example, given, settings

from lka_kernels.functional import depthwise_conv2d

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
METHODS = ("direct", "fft")


def conv2d(input, weight, bias, stride=1, padding=0, dilation=1, method=None):
    """The same call of torch; ``method`` is ignored."""
    return F.conv2d(input, weight, bias, stride, padding, dilation, input.shape[-3])


def output_and_gradients(function, case, input, weight, bias, grad_output, **options) -> dict:
    """The result and the gradients of every argument, by name."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in (input, weight, bias)]
    output = function(*leaves, *case.geometry, **options)
    present = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(output, present, grad_output)
    names = ("grad_input", "grad_weight", "grad_bias")
    return {"output": output.detach(), **dict(zip(names, grads, strict=False))}


def _absolute(dtype: torch.dtype, method: str) -> float | None:
    """In eps: more where torch's float64 is the truth, and for the log2(F) roundings of an FFT."""
    if dtype == torch.float64:
        return 16.0
    return 8.0 if method == "fft" and dtype == torch.float32 else None


def assert_same_layout(ours, theirs) -> None:
    """Equal strides; those of dimensions of size 1 move nothing and torch's depend on the dtype."""
    if theirs.numel() == 0:
        return
    moves = [i for i, size in enumerate(theirs.shape) if size > 1]
    assert [ours.stride(i) for i in moves] == [theirs.stride(i) for i in moves]
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert ours.is_contiguous(memory_format=memory_format) == theirs.is_contiguous(
            memory_format=memory_format
        )


def check_case(case: Case, dtype: torch.dtype, method: str) -> None:
    """Forward and every gradient of one call, against the float64 truth and torch's error."""
    input, weight, bias = case.tensors(dtype)
    grad_output = case.grad_output(dtype)
    wide = (None if t is None else t.double() for t in (input, weight, bias, grad_output))
    # Without oneDNN, which compiles code for every new shape, and which in torch 2.14.1 does not
    # come back from the weight gradient of some single channels with kernels above the map's size.
    with torch.backends.mkldnn.flags(enabled=False):
        truth = output_and_gradients(conv2d, case, *wide)
        if dtype == torch.float32:
            theirs = output_and_gradients(conv2d, case, input, weight, bias, grad_output)
        else:  # The best that torch can do in 16 bits is to round the truth.
            theirs = {name: t.to(dtype) for name, t in truth.items()}
    poison.poison_scratch(dtype)
    ours = output_and_gradients(
        depthwise_conv2d, case, input, weight, bias, grad_output, method=method
    )
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert_close_to_truth(
            name,
            value,
            truth[name],
            theirs[name],
            magnitude=case.magnitudes[name],
            absolute=_absolute(dtype, method),
        )


# Shapes that hypothesis would rarely meet together.
WIDE_PADDING = Case(2, 5, 6, 7, (3, 4), padding=(9, 12), dilation=(2, 3))
KERNEL_LARGER_THAN_MAP = Case(2, 9, 5, 3, (31, 30), padding="same", layout="channels_last")
ONE_PIXEL = Case(3, 17, 1, 1, (7, 7), padding="same", layout="channels_last")
FEW_CHANNELS_MANY_IMAGES = Case(7, 3, 14, 14, (7, 7), padding="same")
STRIDE_SKIPS_THE_EDGE = Case(1, 33, 14, 13, (2, 1), stride=(5, 4))
STRIDE_AND_DILATION = Case(2, 8, 33, 31, (5, 5), (3, 2), (6, 4), (3, 4), layout="sliced")
NO_BIAS_EXPANDED = Case(
    4, 16, 20, 20, (13, 13), padding="same", bias=False, layout="expanded", grad_layout="expanded"
)


def with_examples(test):
    """Run the named cases first."""
    for case in (
        WIDE_PADDING,
        KERNEL_LARGER_THAN_MAP,
        ONE_PIXEL,
        FEW_CHANNELS_MANY_IMAGES,
        STRIDE_SKIPS_THE_EDGE,
        STRIDE_AND_DILATION,
        NO_BIAS_EXPANDED,
    ):
        test = example(case)(test)
    return test


@pytest.mark.usefixtures("compiled_cpu")
class TestDirect:
    """The compiled kernels."""

    @settings(max_examples=2000)
    @with_examples
    @given(depthwise_cases())
    def test_float32(self, case):
        check_case(case, torch.float32, "direct")

    @settings(max_examples=200)
    @with_examples
    @given(depthwise_cases())
    def test_float64(self, case):
        check_case(case, torch.float64, "direct")

    @settings(max_examples=200)
    @with_examples
    @given(depthwise_cases())
    def test_bfloat16(self, case):
        check_case(case, torch.bfloat16, "direct")

    @settings(max_examples=200)
    @with_examples
    @given(depthwise_cases())
    def test_float16(self, case):
        check_case(case, torch.float16, "direct")


class TestFFT:
    """The transforms, which round differently: errors follow the whole map, not one output."""

    @settings(max_examples=800)
    @with_examples
    @given(depthwise_cases())
    def test_float32(self, case):
        check_case(case, torch.float32, "fft")

    @settings(max_examples=80)
    @with_examples
    @given(depthwise_cases())
    def test_float64(self, case):
        check_case(case, torch.float64, "fft")

    @settings(max_examples=80)
    @with_examples
    @given(depthwise_cases())
    def test_bfloat16(self, case):
        check_case(case, torch.bfloat16, "fft")

    @settings(max_examples=80)
    @with_examples
    @given(depthwise_cases())
    def test_float16(self, case):
        check_case(case, torch.float16, "fft")
