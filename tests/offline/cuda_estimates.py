"""Estimated times of the CUDA kernels for every benchmark shape. No GPU has been asked.

    python tests/offline/cuda_estimates.py            # tables of all shapes
    python tests/offline/cuda_estimates.py --notes    # those of docs/kernel-notes.md

``depthwise_estimate.h`` and ``estimate.h`` in csrc/cuda count, from the parameters of each planned
launch, bytes of memory, of the second-level cache and of shared memory, matrix products and
instructions, and divide by what an H100 does of each. A launch takes at least the longest of the
five times, and at most, where nothing overlaps, their sum. Launches of a call are added, and to
each the time from the end of one kernel to the beginning of the next.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]
sys.path += [str(ROOT / "tests" / "cuda_on_cpu"), str(ROOT / "tests")]
import adapter_on_cpu  # noqa: E402
import on_cpu  # noqa: E402
from adapter_cases import AdapterCase  # noqa: E402

from benchmarks import shapes  # noqa: E402

MULTIPROCESSORS = 132
MEMORY = 3.0e12  # bytes/s
BETWEEN_LAUNCHES = 2e-6
PRODUCT_FLOPS = 2 * 16 * 8 * 16
_COUNTS = ("memory", "cache", "shared", "products", "instructions")


class Work(NamedTuple):
    """``lka::cuda::Work``, what a launch has to do, and seconds for each of it alone."""

    blocks: float
    memory: float
    cache: float
    shared: float
    products: float
    instructions: float
    seconds: dict[str, float]


class Estimate(NamedTuple):
    """Of a call: seconds if all overlaps and if nothing does, and what binds the longest launch."""

    least: float
    most: float
    bound: str
    launches: list[Work]


def estimate(launches: list[Work]) -> Estimate:
    """The time of launches one after the other."""
    least = most = 0.0
    longest = (0.0, "")
    for launch in launches:
        times = launch.seconds
        bound = max(times, key=times.get)
        least += BETWEEN_LAUNCHES + times[bound]
        most += BETWEEN_LAUNCHES + sum(times.values())
        longest = max(longest, (times[bound], bound))
    return Estimate(least, most, longest[1], launches)


def _work(name: str, *arguments) -> list[Work]:
    function = getattr(on_cpu.library("estimates.cpp"), name)
    function.restype = ctypes.c_char_p
    numbers = (ctypes.c_double * 128)()
    message = function(*arguments, MULTIPROCESSORS, numbers)
    if message:
        raise RuntimeError(message.decode())
    found = []
    while numbers[11 * len(found)] >= 0:
        here = numbers[11 * len(found) : 11 * len(found) + 11]
        found.append(Work(*here[:6], dict(zip(_COUNTS, here[6:], strict=True))))
    return found


FORMS = {
    torch.bfloat16: ("toeplitz", "dense", "planes", "fft"),
    torch.float32: ("float", "fft"),
}
DIRECTIONS = ("forward", "backward_input", "backward_weight")


def depthwise(
    shape: shapes.Depthwise,
    direction: str,
    form: str,
    dtype: torch.dtype = torch.bfloat16,
    channels_last: bool = False,
) -> Estimate:
    """Of one form of a depthwise convolution.

    Raises:
        RuntimeError: the form cannot serve the shape; the message says why.
    """
    call = _call(shape, dtype, channels_last)
    arguments = (ctypes.byref(call), form.encode(), direction.encode())
    return estimate(_work("depthwise_work", *arguments))


TAKEN = ("toeplitz", "dense", "planes")  # in the order of lka::cuda::TensorCoreForm


def form_of(shape: shapes.Depthwise, direction: str, channels_last: bool = False) -> str:
    """The form that the tensor-core kernels take in 16-bit types."""
    function = on_cpu.library("estimates.cpp").form_of
    call = _call(shape, torch.bfloat16, channels_last)
    return TAKEN[function(ctypes.byref(call), direction.encode(), MULTIPROCESSORS)]


def _call(shape: shapes.Depthwise, dtype: torch.dtype, channels_last: bool):
    layout = torch.channels_last if channels_last else torch.contiguous_format
    size = (shape.batch, shape.channels, shape.height, shape.width)
    maps = torch.empty(size, dtype=dtype, device="meta", memory_format=layout)
    dilation = (shape.dilation, shape.dilation)
    call = on_cpu.params(maps, maps, shape.kernel, shape.padding, dilation)
    call.input.data = call.output.data = 1024
    return call


def adapter(shape: shapes.Adapter, direction: str, dtype: torch.dtype = torch.bfloat16) -> Estimate:
    """Of "forward" or "backward" with all gradients, x being its own residual."""
    case = AdapterCase(
        shape.batch, shape.dim, shape.rank, (shape.side, shape.side), (shape.kernel, shape.kernel),
        prefix=shape.prefix,
    )  # fmt: skip
    call = adapter_on_cpu.without_memory(case, dtype)
    backward = direction == "backward"
    call.residual_is_x = True
    if not backward:
        call.residual.data = None  # it is x, which is read with it
    arguments = (ctypes.byref(call), ctypes.c_bool(backward))
    return estimate(_work("adapter_work", *arguments))


def as_on_a_gpu(shape):
    """The shape with a batch of 64, or the largest that the benchmarks would run there."""
    for batch in sorted(shapes.BATCHES["cuda"], reverse=True):
        if batch <= 64 and shapes.allowed(shape._replace(batch=batch), "cuda"):
            return shape._replace(batch=batch)
    return shape


def row(name: str, floor: float, found: dict[str, Estimate | None]) -> str:
    """Microseconds: the floor of bytes, and for each form from its least to its most."""
    cells = [name, f"{floor * 1e6:.0f}"]
    for e in found.values():
        cells.append("" if e is None else f"{e.least * 1e6:.0f} to {e.most * 1e6:.0f} {e.bound}")
    return f"| {' | '.join(cells)} |"


# What docs/kernel-notes.md shows of it.
NOTED = (
    *("convnext-l-1", "convnext-l-2", "convnext-l-3", "convnext-l-4"),
    *("replknet-1", "replknet-2", "replknet-3", "replknet-4"),
    *("slak-1-tall", "slak-1-wide", "slak-1-square", "van-1-dilated", "table-16-k31"),
    *("table-32-k31", "weather"),
)
NOTED_ADAPTERS = (
    *("stage-1-r8-k7", "stage-2-r8-k7", "stage-3-r8-k7", "stage-4-r8-k7", "vit-b-r8-k7"),
    *("vit-b-r64-k31", "swin-l-1-r64-k31", "vit-b-r256-k7"),
)


def notes() -> list[str]:
    """The lines of the tables in docs/kernel-notes.md, µs of an H100."""

    def cell(estimate: Estimate | None) -> str:
        if estimate is None:
            return ""
        return f"{estimate.least * 1e6:.0f} to {estimate.most * 1e6:.0f}"

    forms = [
        (form, torch.float32 if form == "float" else torch.bfloat16)
        for form in ("toeplitz", "dense", "planes", "fft", "float")
    ]
    lines = []
    for shape in map(as_on_a_gpu, [*shapes.DEPTHWISE, *shapes.TABLE]):
        if shape.name not in NOTED:
            continue
        cells = [
            cell(_or_none(depthwise, shape, direction, form, dtype))
            for direction in ("forward", "backward_weight")
            for form, dtype in forms
        ]
        floor = f"{shape.work('forward', 2).bytes / MEMORY * 1e6:.0f}"
        k = "×".join(map(str, shape.kernel if len(set(shape.kernel)) > 1 else shape.kernel[:1]))
        k += f" d{shape.dilation}" if shape.dilation > 1 else ""
        side = (
            f"{shape.height}²" if shape.height == shape.width else f"{shape.height}×{shape.width}"
        )
        of = f"{shape.batch} × {shape.channels} @ {side}"
        lines.append(f"| {' | '.join([of, k, floor, *cells])} |")
    for shape in map(as_on_a_gpu, shapes.ADAPTER):
        if shape.name not in NOTED_ADAPTERS:
            continue
        forward = shape.work("forward", 2).bytes
        both = shape.work("forward+backward", 2).bytes
        cells = []
        for direction, fewest in (("forward", forward), ("backward", both - forward)):
            cells += [f"{fewest / MEMORY * 1e6:.0f}", cell(adapter(shape, direction))]
        prefix = f"+{shape.prefix}" if shape.prefix else ""
        of = f"{shape.side}²{prefix} × {shape.dim}, r {shape.rank}, K {shape.kernel}"
        lines.append(f"| {' | '.join([of, *cells])} |")
    return lines


def _or_none(function, *arguments, **options) -> Estimate | None:
    try:
        return function(*arguments, **options)
    except RuntimeError:
        return None


def main() -> None:
    """Print the tables."""
    if "--notes" in sys.argv:
        print("\n".join(notes()))
        return
    for dtype, forms in FORMS.items():
        for direction in DIRECTIONS:
            print(f"\n{dtype} {direction}, µs: floor of bytes | {' | '.join(forms)}")
            for shape in map(as_on_a_gpu, [*shapes.DEPTHWISE, *shapes.TABLE]):
                name = {"backward_input": "dX", "backward_weight": "dW"}.get(direction, direction)
                floor = shape.work(name, dtype.itemsize).bytes / MEMORY
                found = {f: _or_none(depthwise, shape, direction, f, dtype) for f in forms}
                print(row(f"{shape.name} {shape.size}", floor, found))
    print("\nadapter, bfloat16, µs: floor of bytes | forward, floor | backward")
    for shape in map(as_on_a_gpu, shapes.ADAPTER):
        forward = shape.work("forward", 2).bytes
        both = shape.work("forward+backward", 2).bytes
        print(row(f"{shape.name} {shape.size}", forward / MEMORY, {"f": adapter(shape, "forward")}),
              row("", (both - forward) / MEMORY, {"b": adapter(shape, "backward")}))  # fmt: skip


if __name__ == "__main__":
    main()
