"""Which backend serves a call: choices, reasons, use_backend and explain."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import TorchDispatchMode

from lka_kernels import FusedLKA, _extension, available_backends, dispatch, explain, use_backend
from lka_kernels.backends import gpu
from lka_kernels.functional import depthwise_conv2d, large_kernel_adapter

READY = [name for name, status in available_backends().items() if status == "ready"]
NOT_READY = [name for name, status in available_backends().items() if status != "ready"]


def call(**changes):
    """An input and a weight that every backend for CPU tensors serves, or what is changed."""
    given = {"input": torch.zeros(2, 4, 9, 9), "weight": torch.zeros(4, 1, 3, 3)}
    return {**given, **changes}


class Served(TorchDispatchMode):
    """Names of the operators that ran, the library's own and torch's convolution."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "lka_kernels" or "conv" in function._opname:
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def served_by(function) -> list[str]:
    with Served() as served:
        function()
    return served.names


def test_every_backend_has_a_state():
    backends = available_backends()
    assert tuple(backends) == dispatch.BACKENDS
    assert all(isinstance(status, str) and status for status in backends.values())
    assert backends["torch"] == "ready"


@pytest.mark.usefixtures("compiled_cpu")
def test_auto_takes_the_compiled_kernels():
    assert served_by(lambda: depthwise_conv2d(**call())) == ["depthwise_conv2d_forward_cpu"]
    assert served_by(lambda: FusedLKA(8)(torch.zeros(1, 16, 8))) == [
        "large_kernel_adapter_forward_cpu"
    ]


@pytest.mark.usefixtures("compiled_cpu")
def test_what_is_traced_does_not_depend_on_earlier_calls():
    x, weight = torch.randn(8, 704, 7, 7), torch.randn(704, 1, 3, 3)

    def operators():
        graph = make_fx(lambda x, w: depthwise_conv2d(x, w, padding=1))(x, weight).graph
        return [str(node.target) for node in graph.nodes if node.op == "call_function"]

    before = operators()
    for _ in range(2):
        depthwise_conv2d(x, weight, padding=1)
    assert operators() == before == ["lka_kernels.depthwise_conv2d_forward_cpu.default"]
    with FakeTensorMode() as fake:
        explained = explain(fake.from_tensor(x), fake.from_tensor(weight), padding=1)
    assert explained.startswith("backend=cpu")


def test_remembered_calls_are_told_apart():
    """What the checks refuse is refused also after a like call was accepted."""
    arguments = call()
    for _ in range(2):
        depthwise_conv2d(**arguments, stride=1, padding=0)
        depthwise_conv2d(**arguments, stride=(1, 1), padding=(0, 0), dilation=(1, 1))
        for changes, error in (
            ({"stride": True}, TypeError),
            ({"stride": 1.0}, TypeError),
            ({"stride": (True, 1)}, TypeError),
            ({"dilation": (1.0, 1)}, TypeError),
            ({"padding": (0, False)}, TypeError),
            ({"padding": False}, TypeError),
            ({"stride": 0}, ValueError),
            ({"bias": torch.zeros(3)}, ValueError),
            ({"bias": torch.zeros(4, dtype=torch.float64)}, TypeError),
            ({"method": "nothing"}, ValueError),
        ):
            with pytest.raises(error):
                depthwise_conv2d(**arguments, **changes)
        with pytest.raises(ValueError, match="the kernel needs 3"):
            depthwise_conv2d(torch.zeros(2, 4, 2, 9), arguments["weight"])
        with torch.autocast("cpu", torch.bfloat16):
            assert depthwise_conv2d(**arguments).dtype == torch.bfloat16
        assert depthwise_conv2d(**arguments).dtype == torch.float32


@pytest.mark.usefixtures("compiled_cpu")
def test_a_named_method_is_what_runs():
    fft = served_by(lambda: depthwise_conv2d(**call(), method="fft"))
    assert fft == ["depthwise_conv2d_forward_cpu_fft"]
    strided = served_by(lambda: depthwise_conv2d(**call(), stride=2, method="fft"))
    assert strided == ["depthwise_conv2d_forward_fft"]
    with use_backend("torch"):
        by_torch = served_by(lambda: depthwise_conv2d(**call(), method="fft"))
    assert by_torch == ["depthwise_conv2d_forward_fft"]
    direct = served_by(lambda: depthwise_conv2d(**call(), method="direct"))
    assert direct == ["depthwise_conv2d_forward_cpu_direct"]


def test_torch_by_name_runs_torch():
    with use_backend("torch"):
        assert served_by(lambda: depthwise_conv2d(**call())) == ["convolution"]


@pytest.mark.parametrize("name", READY)
def test_use_backend_is_a_context_that_restores(name):
    with use_backend(name):
        assert dispatch._Requested.backend == name
        with use_backend("auto"):
            assert dispatch._Requested.backend == "auto"
        assert dispatch._Requested.backend == name
    assert dispatch._Requested.backend == "auto"


def test_use_backend_restores_after_an_error():
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert dispatch._Requested.backend == "auto"


def test_a_kept_use_backend_chooses_again():
    kept = use_backend("torch")
    for _ in range(2):
        with kept, use_backend("auto"), kept:
            assert dispatch._Requested.backend == "torch"
        assert dispatch._Requested.backend == "auto"
    use_backend("cpu" if _extension.loaded() else "auto")
    before = dispatch._Requested.backend
    later = use_backend("torch")
    use_backend(before)
    with later:
        assert dispatch._Requested.backend == "torch"
    assert dispatch._Requested.backend == before
    use_backend("auto")


def test_use_backend_as_a_function_lasts():
    use_backend("torch")
    assert served_by(lambda: depthwise_conv2d(**call())) == ["convolution"]
    use_backend("auto")


@pytest.mark.parametrize("name", NOT_READY)
def test_a_backend_that_cannot_run_says_why(name):
    with pytest.raises(RuntimeError) as raised:
        use_backend(name)
    assert str(raised.value) == f"backend {name!r} cannot run: {available_backends()[name]}"
    assert dispatch._Requested.backend == "auto"


def test_only_the_backend_asked_for_is_asked(monkeypatch):
    """A forked process that may not touch CUDA can still ask for the CPU and for plain PyTorch."""

    def fail():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(dispatch, "_cuda_status", fail)
    monkeypatch.setattr(dispatch.triton_backend, "status", fail)
    with use_backend("torch"):
        pass
    assert "forked subprocess" in available_backends()["cuda"]
    with pytest.raises(RuntimeError, match=r"cannot run: .*forked subprocess"):
        use_backend("triton")


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"backend must be one of 'cpu', 'triton'.*got 'cudnn'"):
        use_backend("cudnn")


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"input": torch.zeros(4, 9, 9)}, "has 3 dimensions"),
        ({"weight": torch.zeros(8, 1, 3, 3)}, "8 filters for 4 channels"),
        (
            {"input": torch.zeros(2, 4, 9, 9).long(), "weight": torch.zeros(4, 1, 3, 3).long()},
            "input is torch.int64",
        ),
    ],
)
def test_what_the_compiled_kernels_do_not_serve(changes, reason):
    """By name it raises with the reason; "auto" takes torch, and explain says so."""
    arguments = call(**changes)
    with use_backend("cpu"), pytest.raises(RuntimeError, match=reason):
        depthwise_conv2d(**arguments)
    assert "cpu" not in "".join(served_by(lambda: depthwise_conv2d(**arguments)))
    text = explain(**arguments)
    assert text.startswith("backend=torch")
    assert reason in text


def test_explain_names_backend_method_and_what_is_missing():
    text = explain(**call(), padding=1)
    expected = "backend=cpu method=auto: " if "cpu" in READY else "backend=torch method=direct: "
    assert text.startswith(expected)
    assert "input (2, 4, 9, 9) torch.float32 on cpu, weight (4, 1, 3, 3), contiguous result" in text
    for name in NOT_READY:
        assert f"not available: {name}: {available_backends()[name]}" in text


def test_explain_tells_layout_method_and_refusals():
    channels_last = torch.zeros(2, 4, 9, 9).contiguous(memory_format=torch.channels_last)
    assert "channels_last" in explain(**call(input=channels_last))
    assert explain(**call(), stride=2, method="fft").startswith("backend=fft method=fft")
    refused = explain(**call(), stride=2, method="implicit_gemm")
    assert refused.startswith("no backend: method='implicit_gemm")


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize(
    ("size", "kernel", "layout", "forward"),
    [
        ((1, 64, 56, 56), (31, 31), torch.contiguous_format, "fft"),
        ((8, 64, 14, 14), (5, 5), torch.contiguous_format, "planar"),
        ((8, 64, 14, 14), (5, 5), torch.channels_last, "in_place"),
        ((8, 64, 7, 7), (13, 13), torch.channels_last, "dense"),
        ((8, 64, 7, 7), (3, 3), torch.channels_last, "in_place"),
        ((8, 64, 10, 10), (3, 3), torch.channels_last, "in_place"),
        ((8, 64, 14, 14), (9, 9), torch.channels_last, "in_place"),
        ((8, 64, 10, 10), (9, 9), torch.channels_last, "blocks"),
        ((8, 64, 14, 14), (9, 3), torch.channels_last, "in_place"),
        ((1, 192, 28, 28), (51, 5), torch.channels_last, "in_place"),
        # All weights exceed their part of a cache; pixels fall into the same sets of one.
        ((1, 1280, 14, 14), (9, 9), torch.channels_last, "blocks"),
        ((1, 1024, 14, 14), (9, 9), torch.channels_last, "blocks"),
        ((1, 1040, 14, 14), (9, 9), torch.channels_last, "in_place"),
        # What tiles of 7 leave over is one output, or more.
        ((8, 64, 8, 8), (5, 5), torch.channels_last, "in_place"),
        ((8, 64, 9, 9), (5, 5), torch.channels_last, "blocks"),
        # Not in tiles that sum in runs.
        ((8, 64, 15, 15), (31, 5), torch.channels_last, "blocks"),
        ((8, 64, 14, 14), (31, 5), torch.channels_last, "in_place"),
    ],
)
def test_explain_tells_the_kernel_that_sizes_choose(size, kernel, layout, forward):
    arguments = call(
        input=torch.zeros(size).contiguous(memory_format=layout),
        weight=torch.zeros(size[1], 1, *kernel),
    )
    text = explain(**arguments, padding=(kernel[0] // 2, kernel[1] // 2))
    assert f"sizes choose forward {forward}, backward_input " in text


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize(
    ("kernel", "name"), [(3, "in_place"), (5, "in_place"), (7, "in_place"), (9, "blocks")]
)
def test_small_strided_kernels_read_channels_last_maps_in_place(kernel, name):
    arguments = call(
        input=torch.zeros(8, 64, 56, 56).contiguous(memory_format=torch.channels_last),
        weight=torch.zeros(64, 1, kernel, kernel),
    )
    assert f"choose forward {name}, " in explain(**arguments, stride=2, padding=kernel // 2)


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize(
    ("kernel", "stride", "forward", "backward_input"),
    [
        (6, 3, "in_place", "in_place"),
        (7, 4, "in_place", "in_place"),
        (7, 3, "blocks", "in_place"),  # outputs share more; phases have at most three taps in a row
        (9, 4, "blocks", "in_place"),
        (13, 4, "blocks", "blocks"),
    ],
)
def test_wide_strides_read_channels_last_maps_in_place(kernel, stride, forward, backward_input):
    arguments = call(
        input=torch.zeros(8, 64, 56, 56).contiguous(memory_format=torch.channels_last),
        weight=torch.zeros(64, 1, kernel, kernel),
    )
    text = explain(**arguments, stride=stride, padding=kernel // 2)
    assert f"choose forward {forward}, backward_input {backward_input}, " in text


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize(
    ("side", "taps", "name"),
    [(28, 7, "in_place"), (28, 14, "in_place"), (28, 15, "blocks"), (14, 11, "blocks")],
)
def test_weight_gradients_of_columns_of_taps_in_place(side, taps, name):
    arguments = call(
        input=torch.zeros(8, 64, side, side).contiguous(memory_format=torch.channels_last),
        weight=torch.zeros(64, 1, taps, 1),
    )
    if not _extension.instruction_set().startswith("avx512"):
        name = "blocks"
    text = explain(**arguments, padding=(taps // 2, 0))
    assert f"backward_weight {name}\n" in text


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize(("side", "name"), [(28, "blocks"), (56, "in_place")])
def test_few_dilated_columns_of_one_block_of_channels_are_unpacked(side, name):
    lanes = 16 if _extension.instruction_set().startswith("avx512") else 8
    if _extension.instruction_set() == "baseline":
        lanes = 4
    arguments = call(
        input=torch.zeros(8, lanes, side, side).contiguous(memory_format=torch.channels_last),
        weight=torch.zeros(lanes, 1, 3, 3),
    )
    assert f"choose forward {name}, " in explain(**arguments, padding=3, dilation=3)


@pytest.mark.usefixtures("compiled_cpu")
def test_bfloat16_rows_stand_in_pairs_where_the_processor_multiplies_them():
    arguments = call(
        input=torch.zeros(1, 192, 28, 9, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        ),
        weight=torch.zeros(192, 1, 51, 5, dtype=torch.bfloat16),
    )
    pairs = _extension.instruction_set() == "avx512_bf16"
    text = explain(**arguments, padding=(25, 2))
    assert f"sizes choose forward {'pairs' if pairs else 'blocks'}, " in text


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize(
    ("channels", "width", "kernel", "name", "single"),
    [
        (768, 7, (5, 5), "pairs_in_place", "in_place"),
        (96, 28, (31, 5), "pairs_in_place", "fft"),
        (61, 20, (3, 3), "pairs_in_place", "in_place"),
        (48, 7, (5, 5), "pairs", "in_place"),  # a quarter of the lanes would idle
        (96, 10, (3, 3), "pairs", "in_place"),  # so would columns
        (96, 10, (9, 9), "pairs", "blocks"),
    ],
)
def test_bfloat16_pairs_of_channels_last_rows_are_made_in_place(
    channels, width, kernel, name, single
):
    arguments = call(
        input=torch.zeros(4, channels, 28, width, dtype=torch.bfloat16).contiguous(
            memory_format=torch.channels_last
        ),
        weight=torch.zeros(channels, 1, *kernel, dtype=torch.bfloat16),
    )
    if _extension.instruction_set() != "avx512_bf16":
        name = single
    if _extension.instruction_set() in ("avx2", "baseline") and name == "in_place":
        name = "in_place" if width <= 14 else "blocks"  # widened once
    text = explain(**arguments, padding=(kernel[0] // 2, kernel[1] // 2))
    assert f"sizes choose forward {name}, " in text


@pytest.mark.usefixtures("compiled_cpu")
def test_explain_of_an_empty_batch():
    text = explain(torch.zeros(0, 4, 9, 9), torch.zeros(4, 1, 3, 3), padding=1)
    assert "the result is empty" in text


@pytest.mark.usefixtures("compiled_cpu")
def test_explain_of_a_map_whose_size_exceeds_32_bits():
    x = torch.zeros(1).expand(2, 64, 65536, 65536)
    assert "sizes choose forward " in explain(x, torch.zeros(64, 1, 3, 3), padding=1)


@pytest.mark.usefixtures("compiled_cpu")
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"direction": "backward"}, "direction must be forward, .*; got backward"),
        ({"dtype": torch.int32}, "dtype must be float32, .*; got int32"),
        ({"kernel_size": (3, 0)}, "kernel, stride and dilation must be at least 1; got 0"),
        ({"stride": (-1, 1)}, "kernel, stride and dilation must be at least 1; got -1"),
    ],
)
def test_a_kernel_name_is_not_told_of_what_no_call_has(changes, named):
    arguments = {
        "direction": "forward",
        "dtype": torch.float32,
        "input_size": (1, 4, 9, 9),
        "kernel_size": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1, 1, 1),
        "dilation": (1, 1),
        "channels_last": False,
    }
    assert _extension.depthwise_kernel_name(**arguments)
    with pytest.raises(ValueError, match=named):
        _extension.depthwise_kernel_name(**(arguments | changes))


@pytest.fixture
def ready_cuda(monkeypatch):
    """As on a machine with a GPU; tensors on it have no memory."""
    monkeypatch.setattr(dispatch, "_cuda_status", lambda: "ready")
    ready = {"cuda": "ready", "triton": "ready"}
    monkeypatch.setattr(dispatch, "gpu_backends", lambda index: ready)
    gpu.forget()
    with FakeTensorMode():
        yield
    gpu.forget()


def on_cuda(dtype=torch.bfloat16) -> dict:
    return {
        "input": torch.zeros(2, 4, 9, 9, device="cuda", dtype=dtype),
        "weight": torch.zeros(4, 1, 3, 3, device="cuda", dtype=dtype),
    }


@pytest.mark.usefixtures("ready_cuda")
def test_the_cuda_backend_is_asked_for_by_name():
    def served(method="auto", dtype=torch.bfloat16, **changes) -> tuple[str, str, str]:
        given = on_cuda(dtype)
        choice = dispatch.choose_depthwise(given["input"], given["weight"], method, **changes)
        text = explain(**given, method=method, **changes)
        assert text.startswith(f"backend={choice.backend} method={choice.method}: {choice.reason}")
        return choice.backend, choice.method, choice.family

    assert served() == ("gpu", "auto", "gpu")
    with use_backend("cuda"):
        assert served() == ("cuda", "auto", "cuda")
        assert served("direct") == ("cuda", "direct", "cuda_direct")
        assert served("implicit_gemm") == ("cuda", "implicit_gemm", "cuda_gemm")
        assert served("fft") == ("cuda", "fft", "cuda_fft")
        assert served("fft", torch.float32) == ("cuda", "fft", "cuda_fft")
        assert served("fft", torch.float64) == ("fft", "fft", "fft")
        assert served("fft", stride=(2, 2)) == ("fft", "fft", "fft")
        assert served(stride=(2, 2)) == ("cuda", "direct", "cuda_direct")
        for dtype in (torch.float32, torch.float64):
            assert served(dtype=dtype)[:2] == ("cuda", "direct")
            with pytest.raises(ValueError, match=r"bfloat16, float16; input is torch\.float"):
                depthwise_conv2d(**on_cuda(dtype), method="implicit_gemm")
        with pytest.raises(ValueError, match=r"it serves stride 1; stride is \(2, 2\)"):
            depthwise_conv2d(**on_cuda(), method="implicit_gemm", stride=2)


@pytest.mark.usefixtures("ready_cuda")
def test_why_torch_fft_serves_what_the_cuda_backend_does_not():
    with use_backend("cuda"):
        text = explain(**on_cuda(torch.float64), method="fft")
        assert "torch.fft alone, as backend 'cuda': it serves float32, bfloat16, float16" in text
        text = explain(**on_cuda(), method="fft", stride=2)
        assert "as backend 'cuda': it serves stride 1; stride is (2, 2)" in text
    text = explain(**on_cuda(), method="fft", stride=2)
    assert text.startswith("backend=fft method=fft")
    assert "transforms in one launch cannot: it serves stride 1; stride is (2, 2)" in text


@pytest.mark.usefixtures("ready_cuda")
def test_devices_that_cannot_run_the_cuda_kernels(monkeypatch):
    """The compiled library says why; what needs less than tensor cores is served."""

    def refuse_tensor_cores(index, tensor_cores):
        assert index == 0
        return "it needs compute capability 8.0 or newer" if tensor_cores else None

    given, tokens = on_cuda(), torch.zeros(2, 9, 16, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(_extension, "why_cuda_device_cannot", refuse_tensor_cores)
    why = "cuda:0: it needs compute capability 8.0 or newer"
    with use_backend("cuda"):
        choice = dispatch.choose_depthwise(*given.values(), "auto")
        assert choice.method == "direct"
        assert f"implicit_gemm cannot: {why}" in choice.reason
        choice = dispatch.choose_depthwise(*given.values(), "fft")
        assert choice.backend == "fft"
        assert f"as backend 'cuda': {why}" in choice.reason
        with pytest.raises(ValueError, match=why):
            depthwise_conv2d(**given, method="implicit_gemm")
        with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run this call: {why}"):
            dispatch.choose_adapter(tokens, "gelu", 8)
        monkeypatch.setattr(_extension, "why_cuda_device_cannot", lambda *_: "no kernels")
        with pytest.raises(RuntimeError, match="cannot run this call: cuda:0: no kernels"):
            depthwise_conv2d(**given)


def test_no_device_no_refusal():
    """Of a device that is not there the compiled library has nothing to say."""
    if not _extension.built_with_cuda():
        pytest.skip("the library has no CUDA kernels")
    assert _extension.why_cuda_device_cannot(torch.cuda.device_count(), True) is None


def test_launches_find_the_stream_of_torch():
    """Python loads torch's libraries without making their names global."""
    if not _extension.built_with_cuda() or torch.version.cuda is None:
        pytest.skip("a build without CUDA, of this library or of torch")
    assert _extension.finds_cuda_stream()


@pytest.mark.usefixtures("ready_cuda")
def test_operators_of_the_cuda_backend():
    with use_backend("cuda"):
        families = {"auto": "", "direct": "_direct", "implicit_gemm": "_gemm", "fft": "_fft"}
        for method, family in families.items():
            operators = served_by(lambda m=method: depthwise_conv2d(**on_cuda(), method=m))
            assert operators == [f"depthwise_conv2d_forward_cuda{family}"]


@pytest.mark.usefixtures("ready_cuda")
def test_what_auto_takes_on_cuda():
    def served(method="auto", dtype=torch.bfloat16, stride=(1, 1), **changes):
        given = {**on_cuda(dtype), **changes}
        choice = dispatch.choose_depthwise(given["input"], given["weight"], method, stride)
        assert explain(**given, method=method, stride=stride).startswith(
            f"backend={choice.backend} method={choice.method}: {choice.reason}"
        )
        return choice.family, choice.reason

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert served(dtype=dtype)[0] == "gpu"
        assert served("fft", dtype=dtype)[0] == "gpu_fft"
        assert served("direct", dtype=dtype)[0] == "torch"
    for method in ("auto", "fft"):
        by_torch = {"auto": "torch", "fft": "fft"}[method]
        family, reason = served(method, torch.float64)
        assert family == by_torch
        assert "it serves float32, bfloat16, float16; input is torch.float64" in reason
        family, reason = served(method, stride=(2, 2))
        assert family == by_torch
        assert "it serves stride 1; stride is (2, 2)" in reason
    several = torch.zeros(8, 1, 3, 3, device="cuda", dtype=torch.bfloat16)
    assert served(weight=several) == (
        "torch",
        "the GPU kernels cannot: it serves one filter per channel; weight has 8 filters "
        "for 4 channels",
    )
    batch = on_cuda()["input"]
    assert served(input=batch[0])[0] == "torch"
    assert "use_backend('cuda') or use_backend('triton')" in served("direct")[1]


@pytest.mark.usefixtures("ready_cuda")
def test_the_adapter_that_auto_takes_on_cuda():
    def chosen(r=8, **options):
        return dispatch.choose_adapter(torch.empty(2, 9, 16, **options), "gelu", r)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert chosen(device="cuda", dtype=dtype).backend == "gpu"
    assert "x is torch.float64" in chosen(device="cuda", dtype=torch.float64).reason
    assert "a rank r of at most 256" in chosen(257, device="cuda").reason
    assert chosen(257, device="cuda").backend == "torch"


@pytest.mark.usefixtures("ready_cuda")
def test_operators_that_auto_takes_on_cuda():
    for method, family in (("auto", "gpu"), ("fft", "gpu_fft")):
        operators = served_by(lambda m=method: depthwise_conv2d(**on_cuda(), method=m))
        assert operators == [f"depthwise_conv2d_forward_{family}"]
    assert served_by(lambda: depthwise_conv2d(**on_cuda(), method="direct")) == ["convolution"]
    shapes = ((2, 9, 16), (8, 16), (8,), (8, 1, 7, 7), (8,), (16, 8), (16,))
    arguments = [torch.zeros(shape, device="cuda") for shape in shapes]
    operators = served_by(lambda: large_kernel_adapter(*arguments))
    assert operators == ["large_kernel_adapter_forward_gpu"]


@pytest.mark.usefixtures("ready_cuda")
def test_auto_on_cuda_looks_at_no_size_of_a_traced_call():
    """Sizes may be symbols, and what a graph holds must serve all of them."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    context = StatelessSymbolicContext([DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * 3)
    given = mode.from_tensor(torch.zeros(5, 4, 9, 9), symbolic_context=context)
    with mode:
        x = torch.empty(given.shape, dtype=torch.bfloat16, device="cuda")
        assert isinstance(x.shape[0], torch.SymInt)
        weight = torch.empty(4, 1, 3, 3, dtype=x.dtype, device="cuda")
        assert depthwise_conv2d(x, weight, padding="same").shape == x.shape


def test_calls_under_autocast_are_remembered_by_its_dtype():
    x, weight = torch.randn(2, 4, 6, 6), torch.randn(4, 1, 3, 3)
    module = FusedLKA(8, 4, 3, init="paper")
    tokens = torch.randn(2, 9, 8)
    for dtype in (None, torch.bfloat16, torch.float16, None, torch.bfloat16):
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            for _ in range(2):
                assert depthwise_conv2d(x, weight).dtype == (dtype or torch.float32)
                assert module(tokens).dtype == (dtype or torch.float32)
                # A residual keeps its dtype.
                assert module(tokens, residual=tokens).dtype == torch.float32


@pytest.mark.usefixtures("ready_cuda")
def test_explain_names_the_family_of_each_direction():
    def explained(size, kernel, layout, dtype=torch.bfloat16):
        x = torch.zeros(size, device="cuda", dtype=dtype).contiguous(memory_format=layout)
        weight = torch.zeros(size[1], 1, kernel, kernel, device="cuda", dtype=dtype)
        (line,) = (
            line
            for line in explain(x, weight, padding=kernel // 2).splitlines()
            if line.startswith("sizes choose ")
        )
        return line.removeprefix("sizes choose ")

    fft = "cuda_fft (transforms in one launch)"
    for layout in (torch.contiguous_format, torch.channels_last):
        text = explained((64, 128, 56, 56), 31, layout)
        assert text == f"forward: {fft}, dX: {fft}, dW: {fft}"
    products = "cuda (dense, planes or rows)"
    for layout in (torch.contiguous_format, torch.channels_last):
        text = explained((64, 192, 56, 56), 7, layout)
        assert text == f"forward: {products}, dX: {products}, dW: {products}"
    text = explained((64, 512, 14, 14), 27, torch.contiguous_format)
    assert text.startswith(f"forward: {products}, ")
    text = explained((1, 192, 56, 56), 7, torch.channels_last)
    assert "dX: torch (aten.convolution)" in text


def test_a_gpu_that_no_kernel_serves_is_served_by_torch(monkeypatch):
    """Whatever is the matter is in the reason; a traced call asks nothing."""
    reasons = {"cuda": "no kernels for it", "triton": "8.0 is needed"}
    monkeypatch.setattr(dispatch, "gpu_backends", lambda index: reasons)
    monkeypatch.setattr(dispatch, "_INSTALLED", {"cuda": "ready", "triton": "ready"})
    with FakeTensorMode():
        given, tokens = on_cuda(), torch.zeros(2, 9, 16, device="cuda")
        why = "cannot: cuda: no kernels for it; triton: 8.0 is needed"
        assert dispatch.choose_depthwise(*given.values(), "auto").family == "torch"
        assert dispatch.choose_depthwise(*given.values(), "auto").reason.endswith(why)
        assert dispatch.choose_adapter(tokens, "gelu", 8).reason.endswith(why)
        choice = dispatch.choose_depthwise(*given.values(), "fft")
        assert choice.family == "fft"
        assert choice.reason.endswith("cannot: cuda: no kernels for it")
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert dispatch.choose_depthwise(*given.values(), "auto").family == "gpu"


def test_a_gpu_is_asked_once(monkeypatch):
    asked = []

    def status(name):
        asked.append(name)
        return "ready"

    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(_extension, "why_cuda_device_cannot", lambda *_: "it needs 8.0")
    monkeypatch.setattr(dispatch.triton_backend, "interpreting", lambda: False)
    for name in ("cuda", "triton"):
        monkeypatch.setitem(dispatch._STATUS, name, lambda n=name: status(n))
    dispatch._asked.cache_clear()
    try:
        for _ in range(2):
            assert dispatch.gpu_backends(0) == {"cuda": "it needs 8.0", "triton": "ready"}
        assert asked == ["cuda", "triton"]
    finally:
        dispatch._asked.cache_clear()


def test_a_traced_call_on_cuda_takes_any_batch_and_map():
    """One operator, whose result has the sizes that the input will have."""

    class Convolution(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(4, 1, 31, 31, device="cuda"))

        def forward(self, x):
            return depthwise_conv2d(x, self.weight, padding="same")

    with FakeTensorMode(allow_non_fake_inputs=True):
        module, x = Convolution(), torch.zeros(5, 4, 40, 50, device="cuda")
        sizes = {name: torch.export.Dim(name, min=2, max=1000) for name in ("b", "h", "w")}
        dynamic = {"x": {0: sizes["b"], 2: sizes["h"], 3: sizes["w"]}}
        program = torch.export.export(module, (x,), dynamic_shapes=dynamic, strict=True)
    called = [
        str(node.target)
        for part in program.graph_module.modules()
        for node in part.graph.nodes
        if node.op == "call_function"
    ]
    installed = "ready" in dispatch._INSTALLED.values()
    name = "lka_kernels.depthwise_conv2d_forward_gpu.default" if installed else "aten.conv2d"
    assert any(name in target for target in called)


def test_explain_raises_what_the_call_raises():
    with pytest.raises(ValueError, match="stride must be at least 1"):
        explain(**call(), stride=0)
    with pytest.raises(TypeError, match="weight must have the dtype of input"):
        explain(**call() | {"weight": call()["weight"].double()})


@pytest.mark.usefixtures("compiled_cpu")
def test_other_devices_are_served_by_torch():
    arguments = {name: t.to("meta") for name, t in call().items()}
    assert served_by(lambda: depthwise_conv2d(**arguments)) == ["convolution"]
    tokens = torch.zeros(2, 16, 8, device="meta")
    assert FusedLKA(8, device="meta")(tokens).shape == tokens.shape
    with use_backend("cpu"), pytest.raises(RuntimeError, match="input is on meta"):
        depthwise_conv2d(**arguments)


def test_remembered_adapter_calls_are_told_apart():
    """What the checks refuse is refused also after a like call was accepted."""
    x = torch.zeros(2, 4, 6)
    weights = {
        "down_weight": torch.zeros(3, 6),
        "down_bias": torch.zeros(3),
        "conv_weight": torch.zeros(3, 1, 3, 3),
        "conv_bias": None,
        "up_weight": torch.zeros(6, 3),
        "up_bias": torch.zeros(6),
    }
    for _ in range(2):
        assert large_kernel_adapter(x, **weights, residual=x).dtype == torch.float32
        large_kernel_adapter(x, **weights, grid_size=(1, 4), scale=1, dropout_p=0)
        for changes, error in (
            ({"num_prefix_tokens": False}, TypeError),
            ({"dilation": True}, TypeError),
            ({"dilation": 1.0}, TypeError),
            ({"scale": True}, TypeError),
            ({"dropout_p": False}, TypeError),
            ({"dropout_p": 2}, ValueError),
            ({"grid_size": (2, 3)}, ValueError),
            ({"grid_size": (1.0, 4)}, TypeError),
            ({"activation": "tanh"}, ValueError),
            ({"prefix_mode": "none"}, ValueError),
            ({"residual": torch.zeros(2, 4, 5)}, ValueError),
            ({"conv_bias": torch.zeros(4)}, ValueError),
            ({"conv_bias": torch.zeros(3, dtype=torch.float64)}, TypeError),
            ({"up_weight": torch.zeros(6, 4)}, ValueError),
        ):
            with pytest.raises(error):
                large_kernel_adapter(x, **{**weights, **changes})
        with torch.autocast("cpu", torch.bfloat16):
            assert large_kernel_adapter(x, **weights).dtype == torch.bfloat16
        # A residual of another dtype is added by PyTorch's promotion.
        assert large_kernel_adapter(x, **weights, residual=x.double()).dtype == torch.float64
        with use_backend("torch"):
            operators = served_by(lambda: large_kernel_adapter(x, **weights, residual=x))
        assert not any("adapter" in name for name in operators)


@pytest.mark.parametrize(
    ("x", "r", "reason"),
    [
        ({"device": "cpu"}, 8, "it serves cuda tensors; x is on cpu"),
        ({"dtype": torch.float64}, 8, "it serves float32, bfloat16, float16; x is torch.float64"),
        ({}, 257, "it serves a rank r of at most 256; down_weight has 257"),
        ({}, 256, None),
    ],
)
def test_what_the_cuda_adapter_serves(x, r, reason):
    with FakeTensorMode():
        tokens = torch.empty(2, 9, 16, **{"device": "cuda", **x})
        assert dispatch.cannot_run_adapter("cuda", tokens, "gelu", r) == reason
