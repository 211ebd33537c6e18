"""The benchmarks' turns, clock, peers and memory; nothing here depends on how long a call takes."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from benchmarks import cases, cuda_peers, measure, memory, peers, replay, shapes, torch_fft


class FakeTime:
    """A clock that only calls move."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def perf_counter(self) -> float:
        return self.now

    def call(self, name: str, seconds: float):
        def run(index):
            self.now += seconds
            self.calls.append((name, index))

        return run


@pytest.fixture
def fake_time(monkeypatch):
    fake = FakeTime()
    monkeypatch.setattr(measure, "time", fake)
    return fake


def interleave(fake, seconds_of: dict[str, float], seconds: float):
    calls = {name: fake.call(name, each) for name, each in seconds_of.items()}
    return measure.interleave(calls, seconds_of, 3, seconds, lambda: None)


def test_peers_take_turns_and_the_order_rotates(fake_time):
    timings = interleave(fake_time, {"a": 0.01, "b": 0.02, "c": 0.01}, 0.18)
    assert {name: len(t.rounds) for name, t in timings.items()} == {"a": 6, "b": 5, "c": 6}
    order = "".join(name for name, _ in fake_time.calls)
    assert order == "aabbcc" + "abc" + "bca" + "cab" + "abc" + "bca" + "ca"
    # All draw from one cycle of buffers.
    assert [index for _, index in fake_time.calls] == [i % 3 for i in range(len(order))]
    assert timings["b"].rounds == pytest.approx([0.02] * 5)


def test_short_calls_are_repeated_and_long_ones_are_not(fake_time):
    timings = interleave(fake_time, {"short": 1e-4, "long": 2.0}, 1.0)
    assert timings["short"].repeats == 20
    assert timings["short"].rounds == pytest.approx([1e-4] * measure.MOST_ROUNDS)
    assert timings["long"].repeats == 1
    assert timings["long"].rounds == pytest.approx([2.0])


@pytest.mark.parametrize(("each", "rounds"), [(0.1, 5), (0.2, 5), (0.3, 3), (1.0, 3), (1.1, 1)])
def test_slow_peers_get_few_rounds(each, rounds):
    assert measure.plan(each, 1.0, 10) == (1, rounds)


def test_a_slow_first_call_does_not_cost_rounds(fake_time):
    calls = {"compiled": fake_time.call("compiled", 0.01)}
    timing = measure.interleave(calls, {"compiled": 60.0}, 2, 0.1, lambda: None)["compiled"]
    assert timing.first_call == 60.0
    assert len(timing.rounds) > 5


def test_ratios_are_of_the_same_round():
    ours = measure.Timing(0, 1, [1.0, 2.0, 4.0, 8.0])
    peer = measure.Timing(0, 1, [3.0, 6.0, 12.0])
    assert measure.paired_ratio(peer, ours) == (3.0, 3.0, 3.0)
    assert measure.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert measure.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_the_clock_replays_what_was_recorded():
    clock = replay.ReplayClock()
    for timing in (measure.Timing(0, 2, [0.25, 0.5]), measure.Timing(0, 1, [2.0])):
        clock.load(timing)
        for seconds in timing.rounds:
            begun = clock.read()
            for _ in range(timing.repeats):
                clock.advance()
            assert clock.read() - begun == seconds * timing.repeats
        before = clock.read()
        clock.advance()  # pytest-benchmark's untimed call
        assert clock.read() == before


def run(make, **options):
    return cases.run(
        make, 2, device="cpu", seconds=0.0, tolerance=1e-3, with_memory=False, **options
    )


def test_a_peer_that_fails_or_disagrees_is_left_out():
    def broken():
        raise RuntimeError("cannot")

    x = torch.ones(3)
    measured = run(
        {
            "ours": lambda: lambda index: x,
            "close": lambda: lambda index: x + 1e-4,
            "wrong": lambda: lambda index: 2 * x,
            "nan": lambda: lambda index: x * float("nan"),
            "broken": broken,
        }
    )
    assert set(measured.timings) == {"ours", "close"}
    assert "wrong and ours disagree" in measured.errors["wrong"]
    assert "nan and ours disagree" in measured.errors["nan"]
    assert "RuntimeError: cannot" in measured.errors["broken"]


@pytest.mark.parametrize(
    ("kernel", "dilation"), [((3, 3), 1), ((5, 9), 1), ((31, 31), 1), ((7, 7), 3), ((1, 31), 1)]
)
def test_torch_fft_is_the_same_convolution(kernel, dilation):
    padding = tuple(dilation * (k // 2) for k in kernel)
    x = torch.randn(2, 3, 7, 10, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 1, *kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    y = torch_fft.depthwise_conv2d(x, weight, bias, padding, dilation)
    expected = F.conv2d(x, weight, bias, 1, padding, dilation, 3)
    probe = torch.randn_like(y)
    torch.testing.assert_close(y, expected)
    for gradients in zip(
        torch.autograd.grad(y, (x, weight, bias), probe),
        torch.autograd.grad(expected, (x, weight, bias), probe),
        strict=True,
    ):
        torch.testing.assert_close(*gradients)


def test_rows_as_a_sequence_are_the_same_convolution():
    # What FlashFFTConv is given; its causal convolution is done here by torch.fft.
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    weight = torch.randn(3, 1, 5, 7, dtype=torch.float64)
    sequences, kernels, crop = cuda_peers.as_sequences(x, weight)
    size = sequences.shape[2] + kernels.shape[1]
    product = torch.fft.rfft(sequences, n=size) * torch.fft.rfft(kernels, n=size)
    y = crop(torch.fft.irfft(product, n=size)[:, :, : sequences.shape[2]])
    torch.testing.assert_close(y, F.conv2d(x, weight, padding=(2, 3), groups=3))


@pytest.mark.parametrize(("side", "kernel"), [(6, 5), (8, 15), (7, 3)])
def test_fused_fft_is_the_same_convolution(monkeypatch, side, kernel):
    # A stand-in for the library: a full convolution, cropped at half of the transform's size.
    def fused_fft_conv2d(x, kernels, fft_size):
        assert 2 * max(x.shape[2:]) <= fft_size
        size = 2 * fft_size
        product = torch.fft.rfft2(x, s=(size, size)) * torch.fft.rfft2(kernels, s=(size, size))
        begin = fft_size // 2
        full = torch.fft.irfft2(product, s=(size, size))
        return full[:, :, begin : begin + x.shape[2], begin : begin + x.shape[3]]

    library = types.ModuleType("subquadratic_ops_torch.fused_fft_conv2d")
    library.fused_fft_conv2d = fused_fft_conv2d
    monkeypatch.setitem(sys.modules, "subquadratic_ops_torch", types.ModuleType("library"))
    monkeypatch.setitem(sys.modules, library.__name__, library)
    x = torch.randn(2, 3, side, side, dtype=torch.float64)
    weight = torch.randn(3, 1, kernel, kernel, dtype=torch.float64)
    bias = torch.randn(3, dtype=torch.float64)
    padding = (kernel // 2, kernel // 2)
    y = cuda_peers.fused_fft(x, weight, bias, padding, 1)
    torch.testing.assert_close(y, F.conv2d(x, weight, bias, padding=padding, groups=3))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("peer", peers.depthwise_peers("cpu", methods=True), ids=lambda p: p.name)
def test_depthwise_peers_give_and_get_the_layout(peer, layout):
    memory_format = cases.LAYOUTS[layout]
    x = torch.randn(2, 4, 9, 8).contiguous(memory_format=memory_format).requires_grad_()
    weight, bias = torch.randn(4, 1, 5, 5), torch.randn(4)
    y = peers.in_layout(peer, memory_format)(x, weight, bias, (2, 2), 1)
    grad = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert y.is_contiguous(memory_format=memory_format)
    assert dx.is_contiguous(memory_format=memory_format)
    expected = F.conv2d(x, weight, bias, padding=2, groups=4)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (expected,) = torch.autograd.grad(expected, x, grad)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-4)


def test_peers_that_are_not_installed_say_so():
    shape = shapes.square("small", 1, 4, 14, 7)
    assert {name for name, _, _ in cuda_peers.DEPTHWISE} < {
        peer.name for peer in peers.depthwise_peers("cuda", methods=False)
    }
    refusals = {name: refuses(shape, torch.float16) for name, _, refuses in cuda_peers.DEPTHWISE}
    for name, module in (
        ("fused_fft_conv2d", "subquadratic_ops_torch"),
        ("replknet_cutlass", "_depthwise_conv2d_implicit_gemm_C"),
        ("flashfftconv", "flashfftconv"),
    ):
        assert refusals[name] in (None, f"{module} is not installed")


def test_small_maps_only_are_measured_with_transforms_in_one_launch():
    (peer,) = (p for p in peers.depthwise_peers("cuda", False) if p.name == "ours_cuda_fft")
    too_large = "transforms of more than 128 rows or columns"
    for side, kernel, served in ((112, 31, True), (114, 31, False), (64, 255, True)):
        refusal = peer.refuses(shapes.square("a", 1, 4, side, kernel), torch.float16)
        assert (refusal != too_large) == served


def test_peak_memory_counts_what_lives_at_one_time():
    x = torch.ones(1 << 20)  # 4 MiB

    def two_at_a_time():
        y = x + 1
        z = y + 1
        del y
        return z + 1

    peak = memory.peak_bytes(two_at_a_time, "cpu")
    assert 2 * 2**22 <= peak < 2 * 2**22 + 2**16


def test_suites_take_what_the_device_allows():
    default = shapes.selected(shapes.DEPTHWISE, "default", "cpu")
    full = shapes.selected(shapes.DEPTHWISE + shapes.TABLE, "full", "cpu")
    assert set(default) < {shape._replace(default=True) for shape in full}
    assert len({shape.name for shape in full}) == len(full)
    assert {shape.batch for shape in shapes.selected(shapes.ADAPTER, "default", "cuda")} == {64}
    assert all(
        shapes.allowed(shape, "cuda") for shape in shapes.selected(shapes.TABLE, "full", "cuda")
    )
