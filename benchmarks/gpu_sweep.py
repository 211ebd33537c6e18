"""Device time of every family of GPU kernels for the benchmark shapes.

`python -m benchmarks.gpu_sweep --out FILE`

The host is left out: calls on several buffers are captured into a CUDA graph, and its replays are
timed by events. One line of JSON a measurement goes to ``--out`` as soon as it is made; the first
line has the device, the date and the versions. What a line has: the case in words and its sizes as
numbers, the family, the median seconds of a call ("seconds"), the seconds that the host needs to
issue one ("host"), the norm of the difference from torch relative to the norm ("error"), or why
there is no number ("refused"). ``python -m benchmarks.gpu_choices`` makes of such files what
``lka_kernels.gpu_choice`` reads.

``--warm N`` runs every case once in N processes, without timing: Triton's kernels are then compiled
and in its cache. A case that leaves the CUDA context unusable ends its process; a new one goes on
with the next case.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
import zlib
from pathlib import Path

import torch

import lka_kernels  # noqa: F401 registers the operators
from benchmarks import facts, measure, peers, shapes
from benchmarks.cases import LAYOUTS
from lka_kernels import FusedLKA, gpu_choice, ops

FAMILIES = ("torch", "cuda", "cuda_direct", "cuda_fft", "triton", "triton_direct", "triton_gemm")
ADAPTER_FAMILIES = ("torch", "cuda", "triton")
SLOW_SECONDS = 20e-3  # calls above this are timed one by one, three times
ROUND_SECONDS = 3e-3
ROUNDS = 7


def arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--warm", type=int, default=0)
    parser.add_argument("--operators", nargs="+", default=["depthwise", "adapter"])
    parser.add_argument("--batches", type=int, nargs="+", default=[64])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--directions", nargs="+")
    parser.add_argument("--families", nargs="+")
    parser.add_argument("--shapes", nargs="+", help="beginnings of names")
    parser.add_argument("--suite", default="default", choices=["default", "full"])
    parser.add_argument("--slice", type=int, nargs=2, default=[0, 1], help=argparse.SUPPRESS)
    parser.add_argument("--start", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def cases(options) -> list[tuple]:
    """(operator, shape, direction, layout, dtype, family), peers of one case side by side."""
    found = []

    def chosen(everything):
        for shape in everything:
            if options.suite == "default" and not shape.default:
                continue
            if options.shapes and not shape.name.startswith(tuple(options.shapes)):
                continue
            for batch in options.batches:
                sized = shape._replace(batch=batch)
                if shapes.allowed(sized, "cuda"):
                    yield sized

    for dtype in options.dtypes:
        if "depthwise" in options.operators:
            found += [
                ("depthwise", shape, direction, layout, dtype, family)
                for shape in chosen(shapes.DEPTHWISE + shapes.TABLE)
                for direction in options.directions or ("forward", "dX", "dW")
                for layout in options.layouts
                for family in options.families or FAMILIES
            ]
        if "adapter" in options.operators:
            found += [
                ("adapter", shape, direction, "tokens", dtype, family)
                for shape in chosen(shapes.ADAPTER)
                for direction in options.directions or ("forward", "backward")
                for family in options.families or ADAPTER_FAMILIES
                if direction in ("forward", "backward")
            ]
    return found


def depthwise_call(shape, direction, layout, dtype, family):
    """(call of a buffer's index, number of buffers)."""
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": dtype}

    def random_map():
        x = torch.randn(shape.batch, shape.channels, shape.height, shape.width, **options)
        return x.contiguous(memory_format=LAYOUTS[layout])

    weight = torch.randn(shape.channels, 1, *shape.kernel, **options)
    bias = torch.randn(shape.channels, **options)
    inputs = measure.random_inputs(random_map)
    grads = [random_map() for _ in inputs] if direction != "forward" else []
    channels_last = layout == "channels_last"
    ph, pw = shape.padding
    dilation = (shape.dilation, shape.dilation)
    geometry = ((1, 1), (ph, pw, ph, pw), dilation)
    size, kernel = list(inputs[0].shape[2:]), list(weight.shape[2:])
    if family == "torch":
        rest = ((1, 1), (ph, pw), dilation, False, (0, 0), shape.channels)
        mask = (direction == "dX", direction == "dW", direction == "dW")

        def call(i):
            if direction == "forward":
                result = torch.ops.aten.convolution(inputs[i], weight, bias, *rest)
                # As all families: in the layout of the case, by a copy if that is what it takes.
                return result.contiguous(memory_format=LAYOUTS[layout])
            found = torch.ops.aten.convolution_backward(
                grads[i], inputs[i], weight, [shape.channels], *rest, mask
            )
            if direction == "dX":
                return found[0].contiguous(memory_format=LAYOUTS[layout])
            return found[1]

        return call, len(inputs)
    operators = ops.DEPTHWISE[family]

    def call(i):
        if direction == "forward":
            return operators.forward(inputs[i], weight, bias, *geometry, channels_last)
        if direction == "dX":
            return operators.backward_input(grads[i], weight, size, *geometry, channels_last)
        return operators.backward_weight(grads[i], inputs[i], kernel, *geometry)[0]

    return call, len(inputs)


def adapter_call(shape, direction, dtype, family):
    """(call of a buffer's index, number of buffers)."""
    torch.manual_seed(0)
    options = {"device": "cuda", "dtype": dtype}
    layers = FusedLKA(shape.dim, shape.rank, shape.kernel, init="paper", **options)
    parameters = [p.requires_grad_(direction != "forward") for p in layers.parameters()]
    weights = [p for m in (layers.down, layers.conv, layers.up) for p in (m.weight, m.bias)]
    tokens = shape.prefix + shape.side**2

    def random_tokens():
        return torch.randn(shape.batch, tokens, shape.dim, **options)

    inputs = measure.random_inputs(random_tokens)
    grads = [random_tokens() for _ in inputs]
    if family == "torch":
        if direction == "forward":

            def call(i):
                return peers.eager_adapter(inputs[i], *weights, shape.prefix, torch.channels_last)

            return call, len(inputs)
        for x in inputs:
            x.requires_grad_()

        def call(i):  # forward too, which is taken off where this is reported
            y = peers.eager_adapter(inputs[i], *weights, shape.prefix, torch.channels_last)
            return torch.autograd.grad(y, (inputs[i], *parameters), grads[i])[0]

        return call, len(inputs)
    operators = ops.ADAPTER[family]
    rest = (None, shape.side, shape.side, shape.prefix, "center_tap", 1, "gelu", "pre", 0.0, 1.0)
    weights = [w.detach() for w in weights]
    if direction == "forward":
        return lambda i: operators.forward(inputs[i], *weights, inputs[i], *rest)[0], len(inputs)
    saved = [operators.forward(x, *weights, x, *rest)[1:] for x in inputs]

    def call(i):
        z, c = saved[i]
        return operators.backward(grads[i], inputs[i], z, c, *weights, *rest, True, [True] * 7)[0]

    return call, len(inputs)


def first_line() -> dict:
    """What the numbers mean nothing without."""
    found = facts.collect("cuda", torch.bfloat16)
    return {
        "device": found["device_name"],
        "date": datetime.date.today().isoformat(),
        "commit": found["commit"],
        "versions": {name: found["versions"][name] for name in ("lka_kernels", "torch", "triton")},
    }


def numbers(operator: str, shape) -> dict[str, int]:
    """The sizes of a case, by the names that ``lka_kernels.gpu_choice.SIZES`` has."""
    if operator == "adapter":
        return {name: getattr(shape, name) for name in gpu_choice.SIZES["large_kernel_adapter"]}
    found = {name: getattr(shape, name) for name in ("batch", "channels", "height", "width")}
    found |= {"kernel_height": shape.kernel[0], "kernel_width": shape.kernel[1]}
    return {**found, "dilation": shape.dilation}


def build(case):
    """(call of a buffer's index, number of buffers)."""
    operator, shape, direction, layout, dtype, family = case
    dtype = getattr(torch, dtype)
    if operator == "depthwise":
        return depthwise_call(shape, direction, layout, dtype, family)
    return adapter_call(shape, direction, dtype, family)


def seconds_of(call, buffers: int) -> dict:
    """Median of a call on the device, and what the host needs to issue it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        each = _timed(lambda: call(0))
        if each > 10 * SLOW_SECONDS:
            return {"seconds": each}
        each = _timed(lambda: call(1 % buffers))
        if each > SLOW_SECONDS:
            return {"seconds": statistics.median(_timed(lambda: call(0)) for _ in range(3))}
        begun = time.perf_counter()
        for i in range(10):
            call(i % buffers)
        host = (time.perf_counter() - begun) / 10
        torch.cuda.synchronize()
    count = buffers * max(1, min(4, round(ROUND_SECONDS / each / buffers)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(count):
            call(i % buffers)
    replays = max(1, round(ROUND_SECONDS / each / count))

    def replay():
        for _ in range(replays):
            graph.replay()

    replay()
    times = [_timed(replay) / (replays * count) for _ in range(ROUNDS)]
    return {"seconds": statistics.median(times), "host": host}


def _timed(function) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def main() -> None:
    options = arguments()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    if options.warm:
        warm(options)
    else:
        sweep(options)


def without(own: list[str], option: str) -> list[str]:
    """The command line ``own`` without an option and its value."""
    at = own.index(option) if option in own else len(own)
    return own[:at] + own[at + 2 :]


def warm(options) -> None:
    """Run every case once, in ``options.warm`` processes; one file of all."""
    own = without(without(sys.argv[1:], "--warm"), "--out")
    parts = [Path(f"{options.out}.{i}") for i in range(options.warm)]
    started = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.gpu_sweep", *own, "--once"),
                *("--slice", str(i), str(options.warm), "--out", str(part)),
            ]
        )
        for i, part in enumerate(parts)
    ]
    for process in started:
        process.wait()
    with options.out.open("w") as out:
        for part in parts:
            if part.exists():
                out.write(part.read_text())
                part.unlink()


def sweep(options) -> None:
    """Measure, or with ``options.once`` only run, this process's cases, a line each."""
    torch.backends.cudnn.benchmark = True
    facts_line = first_line()
    # PyTorch 2.11 refuses to tell the older of the two switches from here on.
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    first, step = options.slice
    reference = None, None  # a case and what torch gives
    with options.out.open("a") as out:
        if not options.once and out.tell() == 0:
            out.write(json.dumps(facts_line) + "\n")
        for index, case in enumerate(cases(options)):
            # All families of one case in one process.
            if index < options.start or hash_of(case[:-1]) % step != first:
                continue
            line, result = measured(case, reference, options.once)
            if case[-1] == "torch" and result is not None:
                reference = case[:-1], result
            del result
            out.write(json.dumps(line) + "\n")
            out.flush()
            if "fatal" in line:
                own = without(sys.argv[1:], "--start")
                module = [sys.executable, "-m", "benchmarks.gpu_sweep"]
                os.execv(sys.executable, [*module, *own, "--start", str(index + 1)])


def measured(case: tuple, reference: tuple, once: bool) -> tuple[dict, torch.Tensor | None]:
    """(a line of the file, the first result or None); "fatal" says that CUDA is unusable now."""
    operator, shape, direction, layout, dtype, family = case
    line = {
        "operator": operator, "shape": shape.name, "size": shape.size, **numbers(operator, shape),
        "direction": direction, "layout": layout, "dtype": dtype, "family": family,
    }  # fmt: skip
    result = None
    try:
        call, buffers = build(case)
        result = call(0)
        torch.cuda.synchronize()
        if reference[0] == case[:-1]:
            a, b = result.double(), reference[1].double()
            line["error"] = float((a - b).norm() / b.norm())
        if not once:
            line |= seconds_of(call, buffers)
    except Exception as error:
        line["refused"] = f"{type(error).__name__}: {error}"[:600]
        if not isinstance(error, (ValueError, RuntimeError)):
            line["refused"] += traceback.format_exc()[-1500:]
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            line["fatal"] = True
    for name in ("seconds", "host", "error"):
        if name in line:
            line[name] = float(f"{line[name]:.4g}")
    return line, result


def hash_of(case) -> int:
    """The same in every process."""
    return zlib.crc32(repr(case).encode())


if __name__ == "__main__":
    main()
