"""Multiply-adds of launches, counted from their arguments: an estimate, not a measurement.

Of the tensor cores all that products have, zeros of Toeplitz matrices and padding of tiles
included; of the FMA units those of convolutions by taps, which are masked but executed. Steps that
a program skips because they lie outside of the map are not counted.
"""

from __future__ import annotations

from typing import NamedTuple

from lka_kernels.backends.triton.launch import Launch
from lka_kernels.tiles import ceil_div


class Products(NamedTuple):
    """Multiply-adds, by the unit that makes them in 16-bit types."""

    tensor_cores: int
    fma: int


def _direct(a: dict, programs: int) -> Products:
    each = a["BLOCK_P"] * a["BLOCK_C"] * a["ROWS"]
    columns = ceil_div(a["KW"], a["UNROLL"]) * a["UNROLL"]
    return Products(0, programs * each * (a["KH"] + a["ROWS"] - 1) * columns)


def _patch(a: dict, programs: int) -> Products:
    rows, block_m, block_k, batch, dy = (a[n] for n in ("ROWS", "BLOCK_M", "BLOCK_K", "B", "DY"))
    width = a["width_v"] * a["VEC"]
    steps_y = 0
    for m in range(0, a["rows_of_m"], block_m):
        blocks = m // batch, (min(m + block_m, a["rows_of_m"]) - 1) // batch
        iy = [b // dy * (rows * dy) + b % dy - a["TOP"] for b in range(blocks[0], blocks[1] + 1)]
        first = (max(-max(iy), 0) + dy - 1) // dy
        end = min(a["KH"] + rows - 1, max(a["H"] - 1 - min(iy) + dy, 0) // dy)
        steps_y += max(0, end - first)
    steps_x = 0
    for x0 in range(0, a["out_width_v"] * a["OUT_VEC"], a["BX"]):
        start = x0 + a["start_v"] * a["VEC"]
        first = max(-start, 0) // block_k
        steps_x += max(0, ceil_div(min(a["window"], width - start), block_k) - first)
    return Products(a["C"] * steps_y * steps_x * block_m * block_k * rows * a["BX"], 0)


def _dense(a: dict, programs: int) -> Products:
    terms = ceil_div(a["H"] * a["W"], a["BLOCK_K"]) * a["BLOCK_K"]
    return Products(programs * a["BLOCK_M"] * a["BLOCK_N"] * terms, 0)


def _weight_direct(a: dict, programs: int) -> Products:
    groups = ceil_div(a["B"], a["images_per_group"])
    channels = ceil_div(a["C"], a["BLOCK_C"]) * a["BLOCK_C"]
    taps = ceil_div(a["KH"], a["ROWS"]) * a["ROWS"]
    taps *= ceil_div(a["KW"], a["BLOCK_KX"]) * a["BLOCK_KX"]
    positions = a["images_per_group"] * a["OH"] * a["OW"]
    return Products(0, groups * channels * taps * positions)


def _weight_rows(a: dict, programs: int) -> Products:
    groups = ceil_div(a["B"], a["images_per_group"])
    steps = 0
    for first_ky in range(0, a["KH"], a["ROWS"]):
        end_ky = min(first_ky + a["ROWS"], a["KH"])
        first = max(first_ky * a["DY"] - a["TOP"], 0)
        end = min(a["OH"] - a["TOP"] + (end_ky - 1) * a["DY"], a["H"])
        if first_ky <= a["bias_row"] < end_ky:
            first = min(first, a["bias_row"] * a["DY"] - a["TOP"])
            end = max(end, a["OH"] - a["TOP"] + a["bias_row"] * a["DY"])
        if end > first:
            steps += ceil_div(max(end - first, 2) * a["images_per_group"], a["BLOCK_K"])
    each = a["ROWS"] * a["BX"] * a["WINDOW"] * a["BLOCK_K"]
    columns = ceil_div(a["out_width_v"] * a["OUT_VEC"], a["BX"])
    return Products(groups * a["C"] * steps * columns * each, 0)


def _weight_dense(a: dict, programs: int) -> Products:
    images = ceil_div(a["images_per_group"], a["BLOCK_K"]) * a["BLOCK_K"]
    return Products(programs * a["BLOCK"] ** 2 * images, 0)


def _taps(a: dict) -> int:
    columns = a["KX1"] - a["KX0"]
    return (a["KY1"] - a["KY0"]) * ceil_div(columns, a["UNROLL"]) * a["UNROLL"]


def _down(a: dict, programs: int) -> Products:
    width = ceil_div(a["C"], a["BLOCK_C"]) * a["BLOCK_C"]
    return Products(programs * a["BLOCK_T"] * width * a["BLOCK_R"], 0)


def _terms(a: dict) -> int:
    return a["BLOCK_R"] * (2 if a["PAD"] else 1)


def _up(a: dict, programs: int) -> Products:
    product = a["BLOCK_T"] * a["BLOCKS_OF_C"] * a["BLOCK_C"] * _terms(a)
    taps = a["BLOCK_T"] * a["BLOCK_R"] * _taps(a) if a["CONVOLVE"] else 0
    return Products(programs * product, programs * taps)


def _one_launch(a: dict, programs: int) -> Products:
    # Of a program in the middle of an image: what its tokens meet, in whole blocks.
    window = min(a["T"], a["before"] + a["BLOCK_T"] + a["after"])
    width = ceil_div(a["C"], a["BLOCK_C"]) * a["BLOCK_C"]
    down = ceil_div(window, a["BLOCK_W"]) * a["BLOCK_W"] * width * a["BLOCK_R"]
    up = a["BLOCK_T"] * a["BLOCKS_OF_C"] * a["BLOCK_UP"] * _terms(a)
    return Products(programs * (down + up), programs * a["BLOCK_T"] * a["BLOCK_R"] * _taps(a))


def _convolve(a: dict, programs: int) -> Products:
    return Products(0, programs * a["BLOCK_T"] * a["BLOCK_R"] * _taps(a))


def _up_backward(a: dict, programs: int) -> Products:
    asked = (a["grad_c"] is not None) + (a["weight_partials"] is not None)
    return Products(asked * _down(a, programs).tensor_cores, 0)


def _convolve_backward(a: dict, programs: int) -> Products:
    by_input = _convolve(a, a["input_programs"]).fma
    tokens = ceil_div(a["tokens_per_group"], a["BLOCK_T"]) * a["BLOCK_T"]
    return Products(0, by_input + (programs - a["input_programs"]) * tokens * a["BLOCK_KX"])


def _down_backward(a: dict, programs: int) -> Products:
    width = ceil_div(a["C"], a["BLOCK_C"]) * a["BLOCK_C"]
    terms = a["BLOCK_R"] if a["weight_partials"] is not None else 0
    terms += _terms(a) if a["grad_x"] is not None else 0
    return Products(programs * a["BLOCK_T"] * width * terms, 0)


def _weight_backward(a: dict, programs: int) -> Products:
    tokens = ceil_div(a["tokens_per_group"], a["BLOCK_T"]) * a["BLOCK_T"]
    return Products(programs * tokens * a["BLOCK_C"] * a["BLOCK_R"], 0)


_COUNT = {
    "correlate_direct_kernel": _direct,
    "correlate_patch_kernel": _patch,
    "correlate_dense_kernel": _dense,
    "backward_weight_direct_kernel": _weight_direct,
    "backward_weight_rows_kernel": _weight_rows,
    "backward_weight_dense_kernel": _weight_dense,
    "move_planes_kernel": lambda a, programs: Products(0, 0),
    "sum_partials_kernel": lambda a, programs: Products(0, 0),
    "down_kernel": _down,
    "prefix_taps_kernel": lambda a, programs: Products(0, 0),
    "up_kernel": _up,
    "forward_kernel": _one_launch,
    "up_backward_kernel": _up_backward,
    "convolve_backward_kernel": _convolve_backward,
    "down_backward_kernel": _down_backward,
    "weight_backward_kernel": _weight_backward,
}


def products(launches: list[Launch]) -> Products:
    """The multiply-adds of all launches; a kernel that is not known raises KeyError."""
    counted = []
    for launch in launches:
        names = launch.kernel.arg_names
        arguments = dict(zip(names, launch.arguments, strict=False)) | launch.constants
        counted.append(_COUNT[launch.kernel.__name__](arguments, launch.programs))
    return Products(*map(sum, zip(*counted, strict=True)))
