"""Which family of GPU kernels serves a call: by the times that were measured of calls like it.

Pure functions of sizes: no tensors, and nothing is asked of a device. ``data/gpu_times.json`` has
the times, which ``python -m benchmarks.gpu_choices`` distils from sweeps on one device; on another
one the order of the families is taken to be the same. A family's time is what the device needs, or
what the host needs to issue the call if that is longer: a call that runs alone waits for it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

DATA = Path(__file__).parent / "data" / "gpu_times.json"

DIRECTIONS = ("forward", "backward_input", "backward_weight")
LAYOUTS = ("contiguous", "channels_last")
# The operator -> the families that it chooses from.
FAMILIES = {
    "depthwise_conv2d": ("torch", "cuda", "cuda_fft", "triton"),
    "large_kernel_adapter": ("torch", "cuda", "triton"),
}
# Operator -> the sizes of a recorded case.
SIZES = {
    "depthwise_conv2d": (
        *("batch", "channels", "height", "width"),
        *("kernel_height", "kernel_width", "dilation"),
    ),
    "large_kernel_adapter": ("batch", "side", "dim", "rank", "kernel", "prefix"),
}

# What the host needs to issue a call, where the data does not say. A depthwise convolution of
# PyTorch and one launch of CUDA C++ take about as long; the transforms are two launches; Triton's
# launches pass through Python. Of ours, 10 more for what autograd and the choice take in Python
# around it, where PyTorch has both in C++. (On an H100's host: PyTorch 17 to 45, CUDA C++ 15 to 25,
# Triton 33 and 54 in two cases. The adapter, medians of one run: CUDA C++ 43 forward and 95
# backward, Triton 81 and 148. PyTorch's ten launches of the adapter are not among the choices.)
HOST_MICROSECONDS = {
    "depthwise_conv2d": {"torch": 25.0, "cuda": 30.0, "cuda_fft": 35.0, "triton": 45.0},
    "large_kernel_adapter": {"torch": 150.0, "cuda": 50.0, "triton": 85.0},
}

# The distance of two cases is the sum of |log(a / b)| of these, each times its weight. The sides of
# map and kernel decide which tiles and transforms fit. Once a device is full, the number of planes
# only multiplies the time, so it says less.
_DEPTHWISE_WEIGHTS = {
    "planes": 0.4,  # batch · channels
    "height": 1.0,
    "width": 1.0,
    "reach_height": 1.0,  # extent of the dilated kernel, as far as a map can meet it
    "reach_width": 1.0,
    "batch": 0.2,
    "dilation": 0.5,
}
_ADAPTER_WEIGHTS = {
    "tokens": 0.5,  # batch · (prefix + grid)
    "side": 1.0,
    "dim": 0.5,
    "rank": 0.7,
    "reach": 1.0,
    "dilation": 0.5,
}
# A family's time is estimated from as many of the nearest cases that have it, by the weights
# 1 / (distance + _NEAR)², each scaled by the elements of the maps: more elements take as much
# longer, but fewer leave the device with less to do at a time, and their time falls by a power.
_NEIGHBOURS = 3
_NEAR = 0.05
_SHRINKING = 0.7
# An estimate from afar must promise more: its time is taken to be longer by this part of the
# distance by which the family's nearest case is farther than the nearest of any.
_CAUTION = 0.25

# Without times of a situation. Sums take as long as there are taps, transforms do not: at 13 × 13
# taps and more, transforms in one launch were the fastest in 16-bit types on maps of 56 × 56, and
# in float32, where the sums run without tensor cores, they have more to save.
_LARGE_TAPS = 13 * 13
_RULES = {  # (16-bit types, large kernel) -> the families in the order of preference
    (True, True): ("cuda_fft", "cuda", "triton", "torch"),
    # The tensor cores; one launch.
    (True, False): ("cuda", "triton", "torch", "cuda_fft"),
    # Larger maps than one launch transforms, and small kernels: PyTorch's sums on the FMA units
    # until others are measured beside them.
    (False, True): ("cuda_fft", "torch", "cuda", "triton"),
    (False, False): ("torch", "cuda", "triton", "cuda_fft"),
}
# Of the adapter: Triton's launches took less wherever both were measured with 8 images or more.
_ADAPTER_RULES = ("triton", "cuda")


class Case(NamedTuple):
    """A recorded case, ready to be compared."""

    sizes: tuple[int, ...]
    logs: tuple[float, ...]  # of what the weights are for, times their weights
    work: float  # log of the elements of the map
    microseconds: dict[str, float]  # family -> of a call on the device


class Estimate(NamedTuple):
    """What a family is taken to need for a call, in microseconds."""

    device: float
    host: float

    @property
    def seen(self) -> float:
        """What a caller sees of it."""
        return max(self.device, self.host)


def _reach(kernel: int, dilation: int, size: int) -> int:
    """Extent of the dilated kernel, as far as a map of ``size`` can meet it."""
    return max(1, min(dilation * (kernel - 1) + 1, 2 * size - 1))


def _weighted(values: dict[str, float], weights: dict[str, float]) -> tuple[float, ...]:
    return tuple(weight * math.log(max(values[name], 1)) for name, weight in weights.items())


def _depthwise_logs(batch, channels, height, width, kernel_height, kernel_width, dilation_h,
                    dilation_w) -> tuple[float, ...]:  # fmt: skip
    return _weighted(
        {
            "planes": batch * channels,
            "height": height,
            "width": width,
            "reach_height": _reach(kernel_height, dilation_h, height),
            "reach_width": _reach(kernel_width, dilation_w, width),
            "batch": batch,
            "dilation": max(dilation_h, dilation_w),
        },
        _DEPTHWISE_WEIGHTS,
    )


def _adapter_logs(batch, height, width, dim, rank, kernel, dilation, prefix) -> tuple[float, ...]:
    reach = math.prod(_reach(k, dilation, n) for k, n in zip(kernel, (height, width), strict=True))
    return _weighted(
        {
            "tokens": batch * (prefix + height * width),
            "side": math.sqrt(height * width),
            "dim": dim,
            "rank": rank,
            "reach": math.sqrt(reach),
            "dilation": dilation,
        },
        _ADAPTER_WEIGHTS,
    )


def _log(number: float) -> float:
    return math.log(max(number, 1))


def depthwise_case(sizes: tuple[int, ...], microseconds: dict[str, float]) -> Case:
    """A case of sizes as in ``SIZES``."""
    *rest, dilation = sizes
    work = _log(math.prod(rest[:4]))
    return Case(sizes, _depthwise_logs(*rest, dilation, dilation), work, microseconds)


def adapter_case(sizes: tuple[int, ...], microseconds: dict[str, float]) -> Case:
    """A case of sizes as in ``SIZES``."""
    batch, side, dim, rank, kernel, prefix = sizes
    logs = _adapter_logs(batch, side, side, dim, rank, (kernel, kernel), 1, prefix)
    work = _log(batch * (prefix + side * side) * dim)
    return Case(sizes, logs, work, microseconds)


_MAKE = {"depthwise_conv2d": depthwise_case, "large_kernel_adapter": adapter_case}


@functools.cache
def recorded() -> dict:
    """The data file, or {} where there is none."""
    try:
        return json.loads(DATA.read_text())
    except FileNotFoundError:
        return {}


def facts() -> dict:
    """What was measured: device, date and versions."""
    return {name: recorded().get(name) for name in ("device", "date", "versions")}


@functools.cache
def cases(operator: str) -> dict[tuple, list[Case]]:
    """The recorded cases by situation: (direction, layout, 16-bit); no layout for the adapter."""
    found: dict[tuple, list[Case]] = {}
    for name, rows in recorded().get(operator, {}).get("cases", {}).items():
        *situation, dtype = name.split()
        names = recorded()[operator]["columns"][len(SIZES[operator]) :]
        made = found.setdefault((*situation, is_16_bit(dtype)), [])
        for row in rows:
            times = zip(names, row[len(SIZES[operator]) :], strict=True)
            microseconds = {family: t for family, t in times if t is not None}
            made.append(_MAKE[operator](tuple(row[: len(SIZES[operator])]), microseconds))
    return found


def is_16_bit(dtype: str) -> bool:
    """Of a name such as "bfloat16"; the 16-bit types take the same paths."""
    return dtype in ("bfloat16", "float16")


def host_microseconds(operator: str, direction: str, family: str) -> float:
    """What the host needs to issue a call."""
    measured = recorded().get("host", {}).get(operator, {}).get(direction, {})
    return measured.get(family, HOST_MICROSECONDS[operator][family])


def estimates(
    near: list[Case],
    logs: tuple[float, ...],
    work: float,
    families: Iterable[str],
    hosts: dict[str, float],
) -> dict[str, Estimate]:
    """What each family is taken to need; a family that no case has is left out.

    Where the call itself was measured, only what was measured of it counts.
    """
    distances = sorted(
        ((sum(map(_apart, case.logs, logs)), case) for case in near), key=lambda pair: pair[0]
    )
    same = [case for distance, case in distances if distance < 1e-9]
    if same:
        times = {}
        for case in same:
            times |= {f: case.microseconds[f] for f in families if f in case.microseconds}
        if times:
            return {family: Estimate(t, hosts[family]) for family, t in times.items()}
    found = {}
    for family in families:
        chosen = []
        for distance, case in distances:
            if family in case.microseconds:
                chosen.append((distance, case))
                if len(chosen) == _NEIGHBOURS:
                    break
        if not chosen:
            continue
        total = mean = 0.0
        for distance, case in chosen:
            weight = (distance + _NEAR) ** -2
            total += weight
            more = work - case.work
            scale = more if more > 0 else _SHRINKING * more
            mean += weight * (math.log(case.microseconds[family]) + scale)
        caution = 1 + _CAUTION * (chosen[0][0] - distances[0][0])
        found[family] = Estimate(caution * math.exp(mean / total), hosts[family])
    return found


def _apart(a: float, b: float) -> float:
    return abs(a - b)


def least(found: dict[str, Estimate]) -> str:
    """The family that a caller sees the least of, and of equals the one that the device does."""
    return min(found, key=lambda family: (found[family].seen, found[family].device))


def _first(preferred: Iterable[str], families: frozenset[str]) -> str:
    return next(family for family in preferred if family in families)


@functools.lru_cache(maxsize=4096)
def depthwise_family(
    direction: str,
    layout: str,
    in_16_bit: bool,
    batch: int,
    channels: int,
    size: tuple[int, int],
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    families: frozenset[str],
) -> str:
    """The family that is taken to be the fastest for a depthwise convolution of stride 1.

    Args:
        direction: of ``DIRECTIONS``.
        layout: of the maps, of ``LAYOUTS``, or "other", for which the times of contiguous maps
            stand: nothing else was measured.
        in_16_bit: bfloat16 or float16; else float32.
        batch, channels, size: of the input map, all at least 1; size is (H, W).
        kernel, dilation: (kH, kW) and the dilation in both directions.
        families: those that can serve the call, at least one of
            ``FAMILIES["depthwise_conv2d"]``.
    """
    if len(families) == 1:
        return next(iter(families))
    layout = layout if layout in LAYOUTS else "contiguous"
    near = cases("depthwise_conv2d").get((direction, layout, in_16_bit), [])
    found = estimates(
        near,
        _depthwise_logs(batch, channels, *size, *kernel, *dilation),
        _log(batch * channels * math.prod(size)),
        # In one order, whatever that of the set: the first of equals is taken.
        [family for family in FAMILIES["depthwise_conv2d"] if family in families],
        {f: host_microseconds("depthwise_conv2d", direction, f) for f in families},
    )
    if found:
        return least(found)
    return _first(_RULES[in_16_bit, math.prod(kernel) >= _LARGE_TAPS], families)


@functools.lru_cache(maxsize=4096)
def adapter_family(
    direction: str,
    in_16_bit: bool,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    rank: int,
    kernel: tuple[int, int],
    dilation: int,
    prefix: int,
    families: frozenset[str],
) -> str:
    """The same for the adapter: direction "forward" or "backward", families "cuda" and "triton".

    ``grid`` is (H, W), ``dim`` the width C of the tokens, ``prefix`` the number of tokens in front
    of the grid.
    """
    if len(families) == 1:
        return next(iter(families))
    found = estimates(
        cases("large_kernel_adapter").get((direction, in_16_bit), []),
        _adapter_logs(batch, *grid, dim, rank, kernel, dilation, prefix),
        _log(batch * (prefix + math.prod(grid)) * dim),
        [family for family in FAMILIES["large_kernel_adapter"] if family in families],
        {f: host_microseconds("large_kernel_adapter", direction, f) for f in families},
    )
    if found:
        return least(found)
    return _first(_ADAPTER_RULES, families)


def forget() -> None:
    """Read the data anew at the next call."""
    for function in (recorded, cases, depthwise_family, adapter_family):
        function.cache_clear()
