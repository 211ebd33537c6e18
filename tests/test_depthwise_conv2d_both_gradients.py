"""The operator of both gradients: what the two for one gradient each give, to the bit."""

import pytest
import torch
from cases import Case
from functorch.compile import make_boxed_func
from poison import poison_scratch
from test_depthwise_conv2d import DTYPES, CountOperators, check_case, output_and_gradients
from torch._dynamo.backends.common import aot_autograd

from lka_kernels import _extension, ops
from lka_kernels.functional import depthwise_conv2d

pytestmark = pytest.mark.usefixtures("compiled_cpu")

LAST = {"layout": "channels_last", "grad_layout": "channels_last"}
CASES = {
    "one block": Case(2, 16, 20, 19, (17, 17), padding="same"),
    "one image": Case(1, 64, 15, 14, (13, 13), padding="same"),
    "parts of a batch": Case(7, 40, 28, 29, (21, 21), padding="same", **LAST),
    "more blocks than tasks": Case(3, 300, 14, 15, (13, 13), padding="same", **LAST),
    "idle lanes": Case(3, 37, 16, 17, (15, 13), padding="same"),
    "half vectors": Case(3, 24, 16, 17, (15, 15), padding="same", **LAST),
    "lanes of several images": Case(9, 8, 16, 15, (15, 15), padding="same"),
    "three patterns of channels": Case(9, 12, 16, 15, (15, 15), padding="same"),
    "five patterns of channels": Case(7, 5, 17, 15, (15, 15), padding="same"),
    "a kernel larger than the map": Case(2, 33, 9, 7, (31, 30), padding="same"),
    "no padding": Case(2, 20, 30, 28, (13, 17)),
    "more outputs than inputs": Case(2, 20, 9, 12, (13, 11), padding=(12, 10)),
    "padding larger than the kernel": Case(2, 20, 9, 12, (3, 4), padding=(7, 5)),
    "no output sees every tap": Case(2, 16, 2, 2, (9, 9), padding=(8, 8)),
    "dilated": Case(2, 20, 25, 22, (13, 11), padding="same", dilation=(2, 3)),
    "one row": Case(2, 20, 1, 50, (3, 31), padding="same"),
    "one pixel": Case(2, 20, 1, 1, (7, 7), padding="same"),
    "layouts that differ": Case(2, 20, 16, 15, (15, 15), padding="same", layout="channels_last"),
    "layouts of which one crosses images": Case(
        6, 8, 16, 15, (15, 15), padding="same", grad_layout="channels_last"
    ),
    "strides in every dimension": Case(
        2, 20, 16, 15, (15, 15), padding="same", layout="sliced", grad_layout="transposed"
    ),
    "expanded": Case(
        3, 20, 16, 15, (15, 15), padding="same", layout="expanded", grad_layout="expanded"
    ),
    "a weight with strides": Case(2, 20, 16, 15, (5, 15), padding="same", weight_layout="sliced"),
}
# Of these "auto" computes both gradients by transforms.
TRANSFORMED = (
    *("parts of a batch", "more blocks than tasks", "idle lanes", "half vectors"),
    *("lanes of several images", "three patterns of channels", "layouts that differ"),
)


def separately(operators, grad_output, input, weight, geometry, channels_last):
    """What the operators for one gradient each give."""
    size, kernel = input.shape[2:], weight.shape[2:]
    return (
        operators.backward_input(grad_output, weight, size, *geometry, channels_last),
        *operators.backward_weight(grad_output, input, kernel, *geometry),
    )


def arguments_of(case, dtype):
    """grad_output, input, weight and the geometry of the operators."""
    input, weight, _ = case.tensors(dtype)
    padding = case.padding
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(case.dilation, case.kernel, strict=True)]
        before = [p // 2 for p in total]
        padding = (*before, *(t - b for t, b in zip(total, before, strict=True)))
    else:
        padding = (*padding, *padding)
    return case.grad_output(dtype), input, weight, (case.stride, padding, case.dilation)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_close_to_the_truth(name, dtype):
    check_case(CASES[name], dtype, "fft")


@pytest.mark.parametrize("family", ["cpu", "cpu_direct", "cpu_fft"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_same_bits_as_one_after_the_other_with_any_number_of_threads(name, dtype, family):
    arguments = arguments_of(CASES[name], dtype)
    operators = ops.DEPTHWISE[family]
    for channels_last in (False, True):
        torch.set_num_threads(1)
        expected = separately(operators, *arguments, channels_last)
        grad_output, input, weight, geometry = arguments
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            poison_scratch(dtype)
            both = operators.backward(grad_output, input, weight, *geometry, channels_last)
            for found, one in zip(both, expected, strict=True):
                assert torch.equal(found, one)
                assert found.stride() == one.stride()


@pytest.mark.parametrize("name", TRANSFORMED)
def test_sizes_choose_transforms_for_both(name):
    case = CASES[name]
    _, input, weight, geometry = arguments_of(case, torch.float32)
    for direction in ("backward_input", "backward_weight"):
        assert (
            _extension.depthwise_kernel_name(
                direction,
                torch.float32,
                input.shape,
                weight.shape[2:],
                *geometry,
                case.layout == "channels_last",
            )
            == "fft"
        )


@pytest.mark.parametrize("method", ["direct", "fft"])
def test_gradients_to_be_differentiated_are_computed_apart(method):
    leaves = [t.requires_grad_() for t in CASES["one block"].tensors(torch.float32)]
    output = depthwise_conv2d(*leaves, padding="same", method=method)
    with CountOperators() as count:
        grads = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    assert count.ran == [f"{name}_cpu_{method}" for name in ("backward_input", "backward_weight")]
    output = depthwise_conv2d(*leaves, padding="same", method=method)
    with CountOperators() as count:
        at_once = torch.autograd.grad(output.square().sum(), leaves)
    assert count.ran == [f"backward_cpu_{method}"]
    assert all(map(torch.equal, grads, at_once))


def test_a_compiled_function_computes_both_at_once():
    case = CASES["parts of a batch"]
    arguments = *case.tensors(torch.float32), case.grad_output(torch.float32)
    operators = []

    def compiler(graph, _):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        operators.append([name for name in names if name.startswith("lka_kernels.")])
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend=backend)
    expected = output_and_gradients(depthwise_conv2d, case, *arguments)
    found = output_and_gradients(compiled, case, *arguments)
    torch._dynamo.reset()
    prefix = "lka_kernels.depthwise_conv2d_"
    assert operators == [[prefix + "forward_cpu.default"], [prefix + "backward_cpu.default"]]
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("family", ["cpu", "cpu_fft"])
def test_empty(family):
    backward = ops.DEPTHWISE[family].backward
    geometry = ((1, 1), (6, 6, 6, 6), (1, 1))
    weight = torch.randn(4, 1, 13, 13)
    grads = backward(torch.empty(0, 4, 20, 20), torch.empty(0, 4, 20, 20), weight, *geometry, True)
    assert [tuple(g.shape) for g in grads] == [(0, 4, 20, 20), (4, 1, 13, 13), (4,)]
    assert not grads[1].any()
    assert not grads[2].any()


def test_errors():
    backward = ops.DEPTHWISE["cpu"].backward
    geometry = ((1, 1), (1, 1, 1, 1), (1, 1))
    x, weight = torch.randn(2, 4, 5, 5), torch.randn(4, 1, 3, 3)
    for arguments, message in (
        ((x, x, weight.double()), "weight must have input's dtype"),
        ((x, x, weight[:3]), "with the channels of input"),
        ((x.double(), x, weight), "grad_output must have input's dtype"),
    ):
        with pytest.raises(RuntimeError, match=message):
            backward(*arguments, *geometry, False)


def test_operators_check_what_they_are_told():
    x, weight = torch.randn(2, 3, 9, 8), torch.randn(3, 1, 3, 3)
    grad = torch.randn(2, 3, 9, 8)
    geometry = ([1, 1], [1, 1, 1, 1], [1, 1])
    ours = ops.DEPTHWISE["cpu"]
    for wrong in (grad[:1], grad[:, :2], grad[:, :, 1:], grad[..., 1:]):
        with pytest.raises(RuntimeError, match="grad_output must have the shape of the output"):
            ours.backward(wrong, x, weight, *geometry, False)
        with pytest.raises(RuntimeError, match="grad_output must have the shape of the output"):
            ours.backward_weight(wrong, x, [3, 3], *geometry)
    with pytest.raises(RuntimeError, match=r"padding \(top, left, bottom, right\)"):
        ours.forward(x, weight, None, [1, 1], [1, 1], [1, 1], False)


@pytest.mark.parametrize("kernel", [(3, 1), (5, 1), (9, 1)])
@pytest.mark.parametrize("contiguous", [False, True])
def test_a_column_of_taps_is_not_mixed_with_the_row_that_it_is_taken_as(kernel, contiguous):
    """Of equal transforms, with a gradient whose rows and columns are the same element."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 64, 12, 14, generator=generator)
    weight = torch.randn(64, 1, *kernel, generator=generator)
    geometry = ((1, 1), (kernel[0] // 2, 0, kernel[0] // 2, 0), (1, 1))
    grad_output = torch.randn(2, 64, 1, 1, generator=generator).expand(2, 64, 12, 14)
    if not contiguous:
        x = x.contiguous(memory_format=torch.channels_last)
    operators = ops.DEPTHWISE["cpu_fft"]
    both = operators.backward(grad_output, x, weight, *geometry, True)
    for found, one in zip(
        both, separately(operators, grad_output, x, weight, geometry, True), strict=True
    ):
        assert torch.equal(found, one)
    truth = torch.nn.grad.conv2d_input(
        x.shape, weight.double(), grad_output.double(), padding=(kernel[0] // 2, 0), groups=64
    )
    torch.testing.assert_close(both[0].double(), truth, rtol=1e-5, atol=1e-4)
