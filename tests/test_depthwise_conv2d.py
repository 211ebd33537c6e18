"""depthwise_conv2d against F.conv2d: values, gradients, layouts, dtypes, errors."""

import math

import numpy as np
import poison
import pytest
import torch
import torch.nn.functional as F
from cases import INPUT_LAYOUTS, Case, depthwise_cases
from closeness import assert_close_to_truth
from hypothesis import example, given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from lka_kernels import DepthwiseConv2d, checks, use_backend
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


def _absolute(dtype: torch.dtype, method: str, terms: float) -> float | None:
    """In eps: more where torch's float64 is the truth, and for the log2(F) roundings of an FFT.

    torch adds the terms of a weight gradient one after the other, so that its float64 result is
    off by some sqrt(terms) eps: 17 eps for 6000 terms were seen, where the kernels here, judged
    by an 80-bit sum, were off by 1.3.
    """
    if dtype == torch.float64:
        return max(16.0, 0.5 * math.sqrt(terms))
    return 8.0 if method != "direct" and dtype == torch.float32 else None


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
        over_positions = name in ("grad_weight", "grad_bias")
        terms = case.batch * math.prod(case.output_size) if over_positions else 1
        allowance = {
            "magnitude": case.magnitudes[name],
            "absolute": _absolute(dtype, method, terms),
        }
        try:
            assert_close_to_truth(name, value, truth[name], theirs[name], **allowance)
        except AssertionError:
            if dtype != torch.float32 or case.channels == 1:
                raise
            # A matrix product rounds less than the plain sums of oneDNN, which users get.
            theirs = output_and_gradients(conv2d, case, input, weight, bias, grad_output)
            assert_close_to_truth(name, value, truth[name], theirs[name], **allowance)


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


class TestTorchFFT:
    """The transforms of torch.fft, which serve other devices, strides, and no compiled library."""

    @settings(max_examples=200)
    @with_examples
    @given(depthwise_cases())
    def test_float32(self, case):
        with use_backend("torch"):
            check_case(case, torch.float32, "fft")

    @settings(max_examples=40)
    @with_examples
    @given(depthwise_cases())
    def test_bfloat16(self, case):
        with use_backend("torch"):
            check_case(case, torch.bfloat16, "fft")


@pytest.mark.usefixtures("compiled_cpu")
@settings(max_examples=300)
@given(depthwise_cases(max_kernel=65))
def test_whatever_the_sizes_choose(case):
    check_case(case, torch.float32, "auto")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 96, 56, 56, (31, 31), padding="same"),
        Case(1, 64, 112, 112, (51, 51), padding="same", layout="channels_last"),
    ],
    ids=str,
)
def test_shapes_of_networks(case, method):
    input, weight, bias = case.tensors(torch.float32)
    grad_output = case.grad_output(torch.float32)
    theirs = output_and_gradients(conv2d, case, input, weight, bias, grad_output)
    ours = output_and_gradients(
        depthwise_conv2d, case, input, weight, bias, grad_output, method=method
    )
    # A float64 truth would take minutes with torch.conv2d; that of the FFT is checked above.
    wide = (t.double() for t in (input, weight, bias, grad_output))
    truth = output_and_gradients(depthwise_conv2d, case, *wide, method="fft")
    for name, value in ours.items():
        assert_close_to_truth(
            name, value, truth[name], theirs[name], magnitude=case.magnitudes[name]
        )


# --- what is returned -------------------------------------------------------------------------

RETURNED = [
    Case(3, 17, 1, 1, (7, 7), padding="same", layout="channels_last"),
    Case(3, 1, 5, 5, (3, 3), layout="channels_last"),
    Case(2, 4, 5, 5, (5, 5)),
    Case(2, 4, 5, 5, (5, 5), layout="channels_last"),
    Case(2, 4, 5, 1, (3, 1), layout="channels_last"),
    Case(2, 4, 1, 5, (1, 3)),
    Case(2, 4, 5, 6, (3, 3), weight_layout="channels_last"),
    Case(2, 4, 5, 6, (2, 4), padding="same"),
    Case(2, 4, 5, 6, (2, 4), padding="same", layout="channels_last"),
    *(Case(2, 4, 7, 6, (3, 3), (2, 2), layout=name) for name in INPUT_LAYOUTS),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RETURNED, ids=str)
def test_memory_format_is_that_of_conv2d(case, dtype, method):
    arguments = case.tensors(dtype)
    ours = depthwise_conv2d(*arguments, *case.geometry, method=method)
    theirs = conv2d(*arguments, *case.geometry)
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert_same_layout(ours, theirs)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty_batch(method, layout):
    case = Case(0, 5, 9, 8, (3, 3), (2, 1), (1, 1), layout=layout)
    input, weight, bias = case.tensors(torch.float32)
    ours = output_and_gradients(
        depthwise_conv2d, case, input, weight, bias, case.grad_output(torch.float32), method=method
    )
    assert ours["output"].shape == (0, 5, 5, 8)
    assert ours["grad_input"].shape == input.shape
    assert not ours["grad_weight"].any()
    assert not ours["grad_bias"].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "cropped"])
def test_an_empty_batch_has_the_layout_of_its_input(layout):
    # Where the size of the map stays; else F.conv2d always gives contiguous strides.
    input, weight, _ = Case(0, 5, 9, 8, (3, 3), layout=layout).tensors(torch.float32)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        weight = weight.to(memory_format=memory_format)
        expected = F.conv2d(input, weight, padding=1, groups=5).stride()
        assert depthwise_conv2d(input, weight, padding=1).stride() == expected


def test_channel_multiplier_is_served_by_torch():
    input, weight = torch.randn(2, 3, 7, 7), torch.randn(6, 1, 3, 3)
    assert torch.equal(depthwise_conv2d(input, weight), F.conv2d(input, weight, groups=3))


@pytest.mark.parametrize("padding", [0, "same"])
def test_unbatched_input_is_served_by_torch(padding):
    input, weight = torch.randn(4, 7, 6), torch.randn(4, 1, 3, 2)
    expected = F.conv2d(input, weight, padding=padding, groups=4)
    assert torch.equal(depthwise_conv2d(input, weight, padding=padding), expected)


def test_integers_are_served_by_torch():
    input, weight = torch.arange(32).view(1, 2, 4, 4), torch.ones(2, 1, 3, 3, dtype=torch.int64)
    assert torch.equal(depthwise_conv2d(input, weight), F.conv2d(input, weight, groups=2))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_as_conv2d(method):
    case = Case(2, 5, 9, 9, (5, 5), padding="same")
    input, weight, bias = case.tensors(torch.float32)
    leaves = [t.requires_grad_() for t in (input, weight, bias)]
    with torch.autocast("cpu", torch.bfloat16):
        ours = depthwise_conv2d(*leaves, *case.geometry, method=method)
        theirs = conv2d(*leaves, *case.geometry)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    truth = conv2d(*(t.detach().bfloat16().double() for t in leaves), *case.geometry)
    assert_close_to_truth("output", ours.detach(), truth, theirs.detach())
    grads = torch.autograd.grad(ours.float().square().sum(), leaves)
    assert [g.dtype for g in grads] == [torch.float32] * 3


def test_autocast_leaves_float64():
    input, weight = torch.randn(1, 2, 5, 5).double(), torch.randn(2, 1, 3, 3).double()
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv2d(input, weight).dtype == torch.float64


@pytest.mark.parametrize("method", METHODS)
def test_nan_and_infinity_pass_through(method):
    input = torch.zeros(1, 20, 9, 9)
    input[0, 3, 4, 4] = torch.nan
    output = depthwise_conv2d(input, torch.ones(20, 1, 3, 3), padding=1, method=method)
    assert output[0, 3, 3:6, 3:6].isnan().all()
    untouched = torch.arange(20) != 3
    assert not output[:, untouched].any()


# --- derivatives ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "case",
    [
        Case(2, 3, 4, 5, (3, 2), padding="same"),
        Case(1, 2, 6, 5, (2, 3), (2, 3), (2, 1), (2, 1), layout="channels_last"),
        Case(1, 1, 2, 2, (5, 5), padding=(2, 3), bias=False),
    ],
    ids=str,
)
def test_gradcheck_and_gradgradcheck(case, method):
    leaves = [t.requires_grad_() for t in case.tensors(torch.float64) if t is not None]

    def function(input, weight, bias=None):
        return depthwise_conv2d(input, weight, bias, *case.geometry, method=method)

    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("method", METHODS)
def test_double_backward_in_float32(method):
    case = Case(2, 18, 12, 11, (5, 4), padding="same")
    results = []
    for function, dtype, options in (
        (depthwise_conv2d, torch.float32, {"method": method}),
        (conv2d, torch.float32, {}),
        (conv2d, torch.float64, {}),
    ):
        leaves = [t.to(dtype).requires_grad_() for t in case.tensors(torch.float32)]
        output = function(*leaves, *case.geometry, **options)
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        penalty = sum(g.square().sum() / g.numel() for g in grads)
        results.append(torch.autograd.grad(penalty, leaves))
    for name, ours, theirs, truth in zip(("input", "weight", "bias"), *results, strict=True):
        assert_close_to_truth(name, ours, truth, theirs, absolute=8.0)


class CountOperators(TorchDispatchMode):
    """The operators of this library that ran, by direction and family."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lka_kernels":
            self.ran.append(function._opname.removeprefix("depthwise_conv2d_"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("asked", "operators"),
    [
        ((True, True, True), ["forward", "backward"]),
        ((True, True, False), ["forward", "backward"]),
        ((True, False, False), ["forward", "backward_input"]),
        ((False, True, False), ["forward", "backward_weight"]),
        ((False, False, True), ["forward"]),
        ((False, True, True), ["forward", "backward_weight"]),
    ],
)
@pytest.mark.usefixtures("compiled_cpu")
def test_gradients_that_are_not_asked_for_are_not_computed(method, asked, operators):
    case = Case(2, 4, 9, 9, (9, 9), padding="same")
    leaves = [t.requires_grad_(a) for t, a in zip(case.tensors(torch.float32), asked, strict=True)]
    with CountOperators() as count:
        depthwise_conv2d(*leaves, *case.geometry, method=method).sum().backward()
    assert count.ran == [f"{operator}_cpu_{method}" for operator in operators]
    assert [t.grad is not None for t in leaves] == list(asked)


@pytest.mark.parametrize(
    "case",
    [
        Case(8, 40, 28, 28, (7, 7), padding="same"),
        Case(5, 3, 30, 31, (9, 5), (2, 1), layout="channels_last"),
        Case(1, 64, 40, 40, (3, 3), padding="same"),
        Case(5, 20, 30, 28, (25, 25), padding="same"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_with_any_number_of_threads(case, dtype):
    input, weight, bias = case.tensors(dtype)
    grad_output = case.grad_output(dtype)
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        results.append(
            output_and_gradients(
                depthwise_conv2d, case, input, weight, bias, grad_output, method="auto"
            )
        )
    for name in ("grad_weight", "grad_bias"):
        for other in results[1:]:
            assert torch.equal(results[0][name], other[name]), name
    for name in ("output", "grad_input"):
        assert torch.equal(results[0][name], results[1][name]), name


def test_transforms_of_torch_func():
    input, weight = torch.randn(3, 2, 4, 6, 6), torch.randn(4, 1, 3, 3)

    def convolve(x, w):
        return depthwise_conv2d(x, w, padding=1)

    expected = torch.stack([F.conv2d(x, weight, padding=1, groups=4) for x in input])
    torch.testing.assert_close(torch.vmap(convolve, (0, None))(input, weight), expected)
    grad = torch.func.grad(lambda w: convolve(input[0], w).square().sum())(weight)
    leaf = weight.clone().requires_grad_()
    F.conv2d(input[0], leaf, padding=1, groups=4).square().sum().backward()
    torch.testing.assert_close(grad, leaf.grad)
    # Linear in the weight: its derivative in direction v is the convolution with v.
    _, tangent = torch.func.jvp(lambda w: convolve(input[0], w), (weight,), (weight,))
    torch.testing.assert_close(tangent, expected[0])


def test_forward_mode_derivative():
    import torch.autograd.forward_ad as forward_ad

    input, weight = torch.randn(1, 3, 6, 6), torch.randn(3, 1, 3, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(input, input)
        output = depthwise_conv2d(dual, weight)
        tangent = forward_ad.unpack_dual(output).tangent
    torch.testing.assert_close(tangent, F.conv2d(input, weight, groups=3))


@pytest.mark.parametrize("method", ["fft", "implicit_gemm"])
def test_a_method_without_rules_for_transforms_says_so(method):
    """Wrong derivatives or torch's word on its autograd.Function would be no answer."""
    import torch.autograd.forward_ad as forward_ad

    input, weight, bias = torch.randn(1, 3, 6, 6), torch.randn(3, 1, 3, 3), torch.randn(3)

    def convolve(x):
        return depthwise_conv2d(x, weight, bias, padding=1, method=method)

    refused = pytest.raises(ValueError, match=f"method='{method}' cannot serve this call: ")
    with refused:
        torch.func.grad(lambda x: convolve(x).sum())(input)
    with refused:
        torch.func.jvp(convolve, (input,), (input,))
    with refused:
        torch.vmap(convolve)(input[None])
    with refused, forward_ad.dual_level():
        convolve(forward_ad.make_dual(input, input))


# --- errors -----------------------------------------------------------------------------------


def bad(error, message, *arguments, **options):
    """One refused call, on a (2, 4, 6, 6) input and a (4, 1, 3, 3) weight unless named."""
    return pytest.param(arguments, options, error, message, id=message[:50])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        bad(TypeError, "input must be a Tensor; got list", [1.0]),
        bad(TypeError, "weight must be a Tensor; got NoneType", torch.zeros(1, 1, 2, 2), None),
        bad(ValueError, r"input must be \(B, C, H, W\).*got \(6, 6\)", torch.zeros(6, 6)),
        bad(ValueError, r"weight must be \(C, 1, kH, kW\); got \(4, 3, 3\)", weight=(4, 3, 3)),
        bad(ValueError, r"weight must be \(C, 1, kH, kW\); got \(4, 2, 3", weight=(4, 2, 3, 3)),
        bad(ValueError, r"with C=4 channels .*got \(3, 1, 3, 3\)", weight=(3, 1, 3, 3)),
        bad(ValueError, "at least one tap", weight=(4, 1, 0, 3)),
        bad(ValueError, r"bias must be \(4,\); got \(3,\)", bias=torch.zeros(3)),
        bad(TypeError, "bias must be a Tensor; got float", bias=1.0),
        bad(TypeError, "input must have layout torch.strided or torch._mkldnn; got .*sparse_coo",
            torch.zeros(2, 4, 6, 6).to_sparse()),
        bad(ValueError, "stride must be at least 1; got 0", stride=0),
        bad(TypeError, "stride must be an int or a pair of ints; got True", stride=True),
        bad(TypeError, r"stride must be an int or a pair of ints; got 1\.5", stride=1.5),
        bad(TypeError, r"dilation must be an int or a pair of ints; got \(1, 1, 1\)",
            dilation=(1, 1, 1)),
        bad(ValueError, r"dilation must be at least 1; got \(1, 0\)", dilation=(1, 0)),
        bad(ValueError, "padding must be at least 0; got -1", padding=-1),
        bad(ValueError, "padding must be one of 'same', 'valid'; got 'full'", padding="full"),
        bad(ValueError, "padding='same' needs stride 1", padding="same", stride=2),
        bad(ValueError, "method must be one of 'auto', 'direct'.*got 'gemm'", method="gemm"),
        bad(ValueError, "H .* padding is 6, the kernel needs 7", weight=(4, 1, 7, 3)),
        bad(ValueError, "W .* padding is 8, the kernel needs 9", padding=1, dilation=4),
        bad(TypeError, r"weight must have the dtype of input \(torch.float32\); got torch.float64",
            weight=torch.zeros(4, 1, 3, 3, dtype=torch.float64)),
        bad(ValueError, "weight must be on the device of input",
            weight=torch.zeros(4, 1, 3, 3, device="meta")),
        bad(
            ValueError,
            "method='implicit_gemm' cannot serve this call",
            method="implicit_gemm",
            stride=2,
        ),
        bad(ValueError, "method='fft' cannot serve this call", weight=(8, 1, 3, 3), method="fft"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, options, error, message):
    names = ("input", "weight")
    given = {"input": torch.zeros(2, 4, 6, 6), "weight": (4, 1, 3, 3)}
    given |= dict(zip(names, arguments, strict=False)) | options
    if isinstance(given["weight"], tuple):
        given["weight"] = torch.zeros(given["weight"])
    if message.startswith("W "):
        given["input"] = torch.zeros(2, 4, 9, 6)
    with pytest.raises(error, match=message):
        depthwise_conv2d(**given)


@settings(max_examples=150)
@given(depthwise_cases(budget=200_000))
def test_auto_never_raises_for_what_conv2d_accepts(case):
    input, weight, bias = case.tensors(torch.float32)
    with torch.backends.mkldnn.flags(enabled=False):
        theirs = conv2d(input, weight, bias, *case.geometry)
    assert depthwise_conv2d(input, weight, bias, *case.geometry).shape == theirs.shape


@pytest.mark.parametrize("padding", [(1,), [1, 2], 1, "valid"])
def test_arguments_may_be_lists_and_singletons(padding):
    input, weight = torch.randn(1, 2, 6, 6), torch.randn(2, 1, 3, 3)
    ours = depthwise_conv2d(input, weight, None, [2], padding, (1,))
    theirs = F.conv2d(input, weight, None, [2], padding, (1,), groups=2)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    "value",
    [np.int64(2), (np.int64(2), 1), [np.int64(2)], torch.tensor(1), (1, torch.tensor(2))],
    ids=str,
)
def test_arguments_may_be_what_conv2d_takes_for_integers(value):
    input, weight = torch.randn(1, 2, 6, 6), torch.randn(2, 1, 2, 2)
    for name in ("stride", "padding", "dilation"):
        theirs = F.conv2d(input, weight, groups=2, **{name: value})
        for _ in range(2):
            torch.testing.assert_close(depthwise_conv2d(input, weight, **{name: value}), theirs)
    module = DepthwiseConv2d(2, 2, padding=value, stride=value)
    assert module.padding == module.stride == tuple(map(int, checks.pair("", value, minimum=1)))
    assert {type(v) for v in module.padding + module.stride} == {int}


def test_a_tensor_as_stride_counts_by_its_value():
    input, weight, stride = torch.randn(1, 2, 6, 6), torch.randn(2, 1, 2, 2), torch.tensor(1)
    assert depthwise_conv2d(input, weight, None, stride).shape == (1, 2, 5, 5)
    stride += 1
    assert depthwise_conv2d(input, weight, None, stride).shape == (1, 2, 3, 3)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize("both", [False, True])
def test_layout_of_onednn_is_served_by_torch(both):
    input, weight = torch.randn(1, 2, 6, 6), torch.randn(2, 1, 3, 3)
    expected = F.conv2d(input, weight, padding=1, groups=2)
    found = depthwise_conv2d(input.to_mkldnn(), weight.to_mkldnn() if both else weight, padding=1)
    assert found.layout == torch._mkldnn
    torch.testing.assert_close(found.to_dense(), expected)


@pytest.mark.parametrize("padding", [(2**31 - 1, 0), (20000, 20000)])
def test_padding_without_bounds_is_left_to_torch(padding):
    input, weight = torch.randn(1, 2, 6, 6), torch.randn(2, 1, 3, 3)
    huge = {"padding": padding, "stride": tuple(max(1, size) for size in padding)}
    torch.testing.assert_close(
        depthwise_conv2d(input, weight, **huge), F.conv2d(input, weight, **huge, groups=2)
    )


def test_torch_backend_is_conv2d():
    case = Case(2, 5, 9, 9, (4, 5), padding="same")
    arguments = case.tensors(torch.float32)
    with use_backend("torch"):
        ours = depthwise_conv2d(*arguments, *case.geometry)
    torch.testing.assert_close(ours, conv2d(*arguments, *case.geometry))
