"""Estimates of the CUDA kernels for every benchmark shape. No GPU has been asked."""

import cuda_estimates
import on_cpu
import pytest
import torch
from cuda_estimates import DIRECTIONS, FORMS, MEMORY, PRODUCT_FLOPS, ROOT, as_on_a_gpu

from benchmarks import roofline, shapes

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="no C++ compiler")
WORK = {"forward": "forward", "backward_input": "dX", "backward_weight": "dW"}
SHAPES = [as_on_a_gpu(shape) for shape in (*shapes.DEPTHWISE, *shapes.TABLE)]
ADAPTERS = [as_on_a_gpu(shape) for shape in shapes.ADAPTER]
# Multiply-adds of the tensor cores at the published peak, and of FMA units, as FLOP/s.
PEAK = {torch.bfloat16: 989e12, torch.float32: 67e12}


def served(shape, direction, form, dtype, **options):
    """An estimate, or None where the form refuses the shape."""
    try:
        return cuda_estimates.depthwise(shape, direction, form, dtype, **options)
    except RuntimeError:
        return None


def unread(channels: int, size, kernel, dilation: int, itemsize: int) -> int:
    """Bytes of taps that meet no element of a map with "same" padding: nobody need read them."""
    met = [
        sum(abs(t * dilation - dilation * (k - 1) // 2) < n for t in range(k))
        for n, k in zip(size, kernel, strict=True)
    ]
    return channels * (kernel[0] * kernel[1] - met[0] * met[1]) * itemsize


def total(launches, what: str) -> float:
    return sum(getattr(launch, what) for launch in launches)


@pytest.mark.parametrize("dtype", FORMS, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s.name)
def test_no_depthwise_kernel_beats_the_floor(shape, direction, dtype):
    """Every form moves the fewest bytes at least, and multiplies at least what meets the map."""
    work = shape.work(WORK[direction], dtype.itemsize)
    size = (shape.height, shape.width)
    if direction != "backward_weight":
        never = unread(shape.channels, size, shape.kernel, shape.dilation, dtype.itemsize)
        work = work._replace(bytes=work.bytes - never)
    floor = roofline.floor_seconds(work._replace(flops=0), MEMORY, 1)
    found = {form: served(shape, direction, form, dtype) for form in FORMS[dtype]}
    assert found["toeplitz" if dtype == torch.bfloat16 else "float"] is not None
    for form, estimate in found.items():
        if estimate is None:
            continue
        launches = estimate.launches
        assert total(launches, "memory") >= 0.999 * work.bytes, form
        assert estimate.most >= estimate.least > floor
        if form in ("toeplitz", "dense", "planes"):
            assert PRODUCT_FLOPS * total(launches, "products") >= work.flops
        if form == "float":  # 32 lanes, two FLOPs each, and every other instruction comes on top
            assert 64 * total(launches, "instructions") >= work.flops
        if form != "fft":  # transforms need fewer multiplications than the definition
            assert estimate.least > roofline.floor_seconds(work, MEMORY, PEAK[dtype])


@pytest.mark.parametrize("shape", ADAPTERS, ids=lambda s: s.name)
def test_no_adapter_beats_the_floor(shape):
    forward, both = (shape.work(d, 2) for d in ("forward", "forward+backward"))
    backward = roofline.Work(*(b - f for b, f in zip(both, forward, strict=True)))
    for direction, work in (("forward", forward), ("backward", backward)):
        estimate = cuda_estimates.adapter(shape, direction)
        launches = estimate.launches
        never = unread(shape.rank, [shape.side] * 2, [shape.kernel] * 2, 1, 2)
        work = work._replace(bytes=work.bytes - never)
        assert total(launches, "memory") >= 0.999 * work.bytes
        assert estimate.least > roofline.floor_seconds(work, MEMORY, PEAK[torch.bfloat16])
    assert len(cuda_estimates.adapter(shape, "forward").launches) in (2, 3)


@pytest.mark.parametrize("shape", [s for s in ADAPTERS if s.default and s.rank == 8], ids=str)
def test_the_default_adapter_moves_hardly_more_than_the_fewest_bytes(shape):
    """Forward x and y, with what else there is; backward x twice, as it is its own residual."""
    forward = shape.work("forward", 2).bytes
    backward = shape.work("forward+backward", 2).bytes - forward
    moved = [
        total(cuda_estimates.adapter(shape, d).launches, "memory") for d in ("forward", "backward")
    ]
    assert moved[0] <= 1.02 * forward
    assert moved[1] <= 4 / 3 * 1.05 * backward


def test_transforms_count_spectra_and_their_sums():
    """Of 64 images of 56² with K = 31: spectra of 96², read for each image, written once."""
    shape = next(s for s in SHAPES if s.name == "replknet-1")
    numbers = 8 * 96 * 49
    planes = shape.batch * shape.channels
    maps = shape.elements * 2
    spectra, correlate = cuda_estimates.depthwise(shape, "forward", "fft").launches
    written = numbers * shape.channels
    # 4.8 MB of spectra: they stay in the cache between the launches.
    assert spectra.cache == written
    assert correlate.cache == 2 * maps + planes * numbers
    sums, gradients = cuda_estimates.depthwise(shape, "backward_weight", "fft").launches
    groups = gradients.cache / written
    assert groups == int(groups) >= 1
    # Each of 64 steps writes the sums of a channel, and all but the first of a group read them.
    assert sums.cache == 2 * maps + (2 * shape.batch - groups) * written


# k...TakeLonger of tensor_core_form.h.
LONGER = {"toeplitz": 3.5, "dense": 1.5, "planes": 1.3}
# What was the fastest on an H100 of 64 images, contiguous, in every direction that is named.
MEASURED = {
    ("convnext-l-1", "planes", DIRECTIONS),
    ("convnext-l-2", "planes", DIRECTIONS),
    ("convnext-l-3", "dense", ("forward", "backward_input")),
    ("convnext-l-3", "planes", ("backward_weight",)),
    ("convnext-l-4", "dense", DIRECTIONS),
    ("mobile-k3", "planes", DIRECTIONS),
    ("replknet-1", "planes", ("forward", "backward_input")),
    ("replknet-2", "dense", ("forward", "backward_input")),
    ("replknet-3", "dense", DIRECTIONS),
    ("replknet-4", "dense", DIRECTIONS),
    ("slak-1-tall", "planes", ("forward", "backward_input")),
    ("slak-2-wide", "planes", ("forward", "backward_input")),
    ("van-2-5", "planes", DIRECTIONS),
    ("van-2-dilated", "planes", DIRECTIONS),
}


def between(estimate) -> float:
    """Seconds of all launches, if some of each overlaps."""
    times = [launch.seconds.values() for launch in estimate.launches]
    return sum((max(t) + sum(t)) / 2 for t in times)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_form_that_is_expected_to_take_least_is_chosen(direction, channels_last):
    for shape in SHAPES:
        options = (torch.bfloat16,)
        forms = {
            form: served(shape, direction, form, *options, channels_last=channels_last)
            for form in cuda_estimates.TAKEN
        }
        times = {f: LONGER[f] * between(e) for f, e in forms.items() if e is not None}
        chosen = cuda_estimates.form_of(shape, direction, channels_last)
        assert times[chosen] == pytest.approx(min(times.values())), shape.name


@pytest.mark.parametrize(("name", "form", "directions"), sorted(MEASURED))
def test_the_form_that_was_the_fastest_is_chosen(name, form, directions):
    (shape,) = (s for s in SHAPES if s.name == name)
    for direction in directions:
        assert cuda_estimates.form_of(shape, direction) == form


def test_channels_last_has_no_dense_form():
    for direction in DIRECTIONS:
        for shape in SHAPES:
            assert cuda_estimates.form_of(shape, direction, True) != "dense"


def test_what_is_written_in_the_notes():
    text = (ROOT / "docs" / "kernel-notes.md").read_text()
    for line in cuda_estimates.notes():
        assert line in text, line
