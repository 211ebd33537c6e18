"""What each backend serves, found by asking the predicates by which ``dispatch`` chooses.

Whether a backend can run on this machine does not count. The calls asked about have shapes but no
storage, on devices that need not be there.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lka_kernels import dispatch, ops
from lka_kernels.checks import ACTIVATIONS, FLOAT_DTYPES

BEGIN, END = "<!-- support: begin -->", "<!-- support: end -->"

LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
}
STRIDES = ((1, 1), (2, 2), (1, 2))
# Of a GPU, of the CPU, and of one that no backend names.
DEVICES = ("cpu", "cuda", "xpu")
# No adapter is meant to have a larger bottleneck: a backend that serves this serves any.
_LARGE_RANK = 2**20
_HEADER = (
    *("operator", "backend", "method", "tensors on", "dtypes", "layouts"),
    *("stride", "rank", "directions"),
)


class Support(NamedTuple):
    """What one method of a backend serves; every combination of the values is served.

    Attributes:
        operator: "depthwise_conv2d" or "large_kernel_adapter".
        backend: of ``dispatch``; "gpu" is what "auto" takes on CUDA tensors.
        method: of ``depthwise_conv2d``; "fused" or "reference" for the adapter.
        devices, dtypes, layouts, strides: those of the values asked about that are served.
        most_rank: of the adapter, None for any.
        directions: the operators that the method has, as in ``ops.py``.
    """

    operator: str
    backend: str
    method: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    layouts: tuple[str, ...]
    strides: tuple[tuple[int, int], ...] | None
    most_rank: int | None
    directions: tuple[str, ...]


def support() -> list[Support]:
    """Rows for every method of every backend; more than one where dtypes are served differently."""
    found = []
    with FakeTensorMode():
        for backend, method in dispatch.depthwise_methods():
            found += _depthwise(backend, method)
        for backend in (*dispatch.BACKENDS, "gpu"):
            found += _adapter(backend)
    return found


def _products(served: dict[torch.dtype, list[tuple]], dimensions: int) -> list[tuple]:
    """(dtypes, the values of each other dimension) with every combination served."""
    by_calls: dict[tuple, list] = {}
    for dtype, calls in served.items():
        if calls:
            by_calls.setdefault(tuple(calls), []).append(dtype)
    found = []
    for calls, dtypes in by_calls.items():
        values = [tuple(dict.fromkeys(call[i] for call in calls)) for i in range(dimensions)]
        if tuple(itertools.product(*values)) != calls:
            raise NotImplementedError(f"no row of the table can say that {calls} alone are served")
        found.append((tuple(dtypes), *values))
    return found


def _depthwise(backend: str, method: str) -> list[Support]:
    served = {dtype: [] for dtype in FLOAT_DTYPES}
    for dtype, device in itertools.product(FLOAT_DTYPES, DEVICES):
        weight = torch.empty(4, 1, 3, 3, dtype=dtype, device=device)
        for layout, stride in itertools.product(LAYOUTS, STRIDES):
            x = torch.empty(2, 4, 9, 9, dtype=dtype, device=device, memory_format=LAYOUTS[layout])
            if dispatch.cannot_run_depthwise(backend, method, x, weight, stride) is None:
                served[dtype].append((device, layout, stride))
    operators = ops.DEPTHWISE.get(dispatch.Choice(backend, method, "").family)
    return [
        Support(
            "depthwise_conv2d", backend, method, devices, dtypes, layouts, strides,
            most_rank=None, directions=_directions(operators, ops.DEPTHWISE_SCHEMAS),
        )
        for dtypes, devices, layouts, strides in _products(served, 3)
    ]  # fmt: skip


def _adapter(backend: str) -> list[Support]:
    served = {dtype: [] for dtype in FLOAT_DTYPES}
    for dtype, device in itertools.product(FLOAT_DTYPES, DEVICES):
        for layout in LAYOUTS:
            x = _map(layout, dtype, device)
            if all(_serves(backend, x, activation, 1) for activation in ACTIVATIONS):
                served[dtype].append((device, layout))
    return [
        Support(
            "large_kernel_adapter",
            backend,
            "reference" if backend == "torch" else "fused",
            devices,
            dtypes,
            layouts,
            strides=None,
            most_rank=_most_rank(backend, _map(layouts[0], dtypes[0], devices[0])),
            directions=_directions(ops.ADAPTER.get(backend), ops.ADAPTER_SCHEMAS),
        )
        for dtypes, devices, layouts in _products(served, 2)
    ]


def _map(layout: str, dtype: torch.dtype, device: str) -> Tensor:
    """A map (B, H, W, C) of the adapter; as it stands in memory, its channels come last."""
    if layout == "channels_last":
        return torch.empty(2, 9, 9, 4, dtype=dtype, device=device)
    return torch.empty(2, 4, 9, 9, dtype=dtype, device=device).permute(0, 2, 3, 1)


def _serves(backend: str, x: Tensor, activation: str, r: int) -> bool:
    return dispatch.cannot_run_adapter(backend, x, activation, r) is None


def _most_rank(backend: str, x: Tensor) -> int | None:
    """The largest rank that is served, by bisection, or None for any."""
    if _serves(backend, x, "gelu", _LARGE_RANK):
        return None
    served, refused = 1, _LARGE_RANK
    while refused - served > 1:
        middle = (served + refused) // 2
        if _serves(backend, x, "gelu", middle):
            served = middle
        else:
            refused = middle
    return served


def _directions(operators, schemas: dict[str, str]) -> tuple[str, ...]:
    # Without operators of its own a call is a composition of torch's, which differentiates it.
    return ("autograd",) if operators is None else tuple(schemas)


def as_markdown() -> str:
    """The table of the README."""
    lines = [_HEADER, ("---",) * len(_HEADER)]
    lines += [_cells(row) for row in support()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Support) -> tuple[str, ...]:
    adapter = row.operator == "large_kernel_adapter"
    devices = "any device" if row.devices == DEVICES else ", ".join(row.devices)
    dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
    strides = ", ".join(str(stride[0]) for stride in row.strides or ())
    if row.strides == STRIDES:
        strides = "any"
    rank = "any" if row.most_rank is None else f"at most {row.most_rank}"
    return (
        f"`{row.operator}`",
        "`auto`" if row.backend == "gpu" else f"`{row.backend}`",
        row.method,
        devices,
        dtypes,
        ", ".join(row.layouts),
        "" if adapter else strides,
        rank if adapter else "",
        ", ".join(row.directions).replace("_", "-"),
    )


def write_between_markers(file: Path) -> None:
    """Put the table into ``file``, between the lines BEGIN and END.

    Raises:
        ValueError: the file has no such lines.
    """
    text = file.read_text()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{file} has no lines {BEGIN} and {END}")
    file.write_text(f"{before}{BEGIN}\n{as_markdown()}\n{END}{after}")
