"""torch.compile sees no graph break, and batch and map may change without a new graph."""

import pytest
import torch
import torch._dynamo.testing

from lka_kernels import DepthwiseConv2d, FusedLKA, _extension, use_backend

MODULES = {
    "adapter": lambda: FusedLKA(16, 8, 7, init="paper"),
    "adapter with class token": lambda: FusedLKA(16, 8, 7, init="paper", num_prefix_tokens=1),
    "depthwise": lambda: DepthwiseConv2d(6, 7, padding=3),
    "depthwise fft": lambda: DepthwiseConv2d(6, 7, padding=3, method="fft"),
}
SHAPES = {
    "adapter": [(2, 4, 5, 16), (3, 6, 7, 16), (4, 9, 8, 16), (5, 11, 7, 16)],
    "adapter with class token": [(2, 17, 16), (3, 26, 16), (4, 37, 16), (5, 50, 16)],
    "depthwise": [(2, 6, 9, 10), (3, 6, 12, 11), (4, 6, 15, 14), (5, 6, 17, 11)],
}
SHAPES["depthwise fft"] = SHAPES["depthwise"]


def gradients(function, module, x):
    """The output, and the gradients of input and parameters."""
    y = function(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def assert_same(compiled, module, shape, check_stride=True):
    """Values and gradients, as in eager mode; strides too."""
    x = torch.randn(shape, requires_grad=True)
    expected, found = gradients(module, module, x), gradients(compiled, module, x)
    for ours, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eager, check_stride=check_stride)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dynamic", [True, None])
def test_no_new_graph_for_another_batch_or_map(kind, dynamic):
    """One graph with dynamic=True; by default the second size may make a dynamic one."""
    module = MODULES[kind]()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend=counter)
    first, second, *others = SHAPES[kind]
    assert_same(compiled, module, first)
    if not dynamic:
        assert_same(compiled, module, second)
    before = counter.frame_count
    for shape in (second, *others):
        assert_same(compiled, module, shape)
    assert counter.frame_count == before


@pytest.mark.parametrize("kind", ["adapter", "depthwise"])
def test_default_compiler(kind):
    module = MODULES[kind]()
    compiled = torch.compile(module, fullgraph=True)
    # Without the compiled kernels this is F.conv2d, whose layout Inductor chooses as it likes.
    assert_same(compiled, module, SHAPES[kind][0], check_stride=_extension.loaded())


@pytest.mark.parametrize("kind", ["adapter", "depthwise"])
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_torch_jit_trace_without_gradients(kind):
    module, x = MODULES[kind](), torch.randn(SHAPES[kind][0])
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.trace(module, x)(x), module(x))


def test_a_compiled_function_follows_use_backend():
    """A guard watches the process's choice: no graph of another backend is taken."""
    module, x = MODULES["depthwise"](), torch.randn(SHAPES["depthwise"][0])
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    compiled(x)
    with use_backend("torch"):
        torch.testing.assert_close(compiled(x), module(x))
    assert counter.frame_count == 2


def test_compiled_training_with_dropout_and_autocast():
    module = FusedLKA(16, 8, 5, init="paper", dropout=0.5)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 6, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.manual_seed(3)
        expected = module(x)
        torch.manual_seed(3)
        found = compiled(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)
    found.float().sum().backward()
    assert module.up.weight.grad.dtype == torch.float32
