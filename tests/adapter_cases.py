"""Calls of the adapter, random and chosen, and a backend held against the specification."""

from __future__ import annotations

import dataclasses
import math

import poison
import torch
from closeness import assert_close_to_truth
from hypothesis import strategies as st

from lka_kernels import use_backend
from lka_kernels.checks import ACTIVATION_POSITIONS, ACTIVATIONS, PREFIX_MODES
from lka_kernels.functional import large_kernel_adapter

NAMES = (
    "x",
    "down_weight",
    "down_bias",
    "conv_weight",
    "conv_bias",
    "up_weight",
    "up_bias",
    "residual",
)


@dataclasses.dataclass(frozen=True)
class AdapterCase:
    """One call."""

    batch: int = 2
    dim: int = 6
    r: int = 3
    grid: tuple[int, int] = (4, 5)
    kernel: tuple[int, int] = (3, 3)
    prefix: int = 0
    prefix_mode: str = "center_tap"
    dilation: int = 1
    activation: str = "gelu"
    position: str = "pre"
    dropout: float = 0.0
    scale: float = 1.0
    biases: bool = True
    residual: bool = False
    layout: str = "tokens"  # or "map", "channels_first", "sliced"

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> dict:
        """Arguments by name, scaled so that every intermediate has a deviation of about 1."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*sizes, fan_in=1):
            return (torch.randn(sizes, generator=generator) / math.sqrt(fan_in)).to(dtype)

        height, width = self.grid
        tokens = self.prefix + height * width
        if self.layout in ("map", "channels_first"):
            shape = (self.batch, height, width, self.dim)
        else:
            shape = (self.batch, tokens, self.dim)
        x = normal(*shape)
        if self.layout == "channels_first":
            x = normal(self.batch, self.dim, height, width).permute(0, 2, 3, 1)
        if self.layout == "sliced":
            x = normal(self.dim * 2, tokens + 1, self.batch).permute(2, 1, 0)[:, 1:, ::2]
        biases = [None] * 3
        if self.biases:
            biases = [normal(self.r), normal(self.r), normal(self.dim)]
        values = (
            x,
            normal(self.r, self.dim, fan_in=self.dim),
            biases[0],
            normal(self.r, 1, *self.kernel, fan_in=math.prod(self.kernel)),
            biases[1],
            normal(self.dim, self.r, fan_in=self.r),
            biases[2],
            normal(*shape) if self.residual else None,
        )
        return dict(zip(NAMES, values, strict=True))

    @property
    def options(self) -> dict:
        """Keyword arguments other than tensors."""
        return {
            "grid_size": self.grid,
            "num_prefix_tokens": self.prefix,
            "prefix_mode": self.prefix_mode,
            "dilation": self.dilation,
            "activation": self.activation,
            "activation_position": self.position,
            "dropout_p": self.dropout,
            "training": True,
            "scale": self.scale,
        }

    @property
    def magnitudes(self) -> dict[str, float]:
        """Root mean square of every result: sums over tokens, and over C in front of e."""
        tokens = math.sqrt(max(1, self.batch) * (self.prefix + math.prod(self.grid)))
        inner = tokens * max(1.0, math.sqrt(self.dim / self.r))
        return {
            "output": 1.0,
            "x": 1.0,
            "residual": 1.0,
            "up_weight": tokens,
            "up_bias": tokens,
            "down_weight": inner,
            "down_bias": inner,
            "conv_weight": inner,
            "conv_bias": inner,
        }


def call(case: AdapterCase, tensors: dict):
    """The public function, with the dropout stream of seed 7."""
    torch.manual_seed(7)
    *arguments, residual = tensors.values()
    return large_kernel_adapter(*arguments, residual=residual, **case.options)


def with_gradients(function, case: AdapterCase, tensors: dict, grad_output) -> dict:
    """The output and the gradient of every tensor, by name."""
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    present = {k: t for k, t in leaves.items() if t is not None}
    output = function(case, leaves)
    grads = torch.autograd.grad(output, list(present.values()), grad_output)
    return {"output": output.detach(), **dict(zip(present, grads, strict=True))}


DEFINED = [
    AdapterCase(),
    AdapterCase(layout="map", kernel=(5, 2)),
    AdapterCase(layout="sliced", kernel=(1, 4), dilation=3),
    AdapterCase(layout="channels_first", residual=True),
    AdapterCase(grid=(7, 3), kernel=(7, 7), biases=False, residual=True, scale=0.5),
    AdapterCase(kernel=(2, 2), dilation=2, prefix=1),
    AdapterCase(kernel=(4, 3), dilation=1, prefix=2),
    AdapterCase(grid=(2, 2), kernel=(31, 31), prefix=1, dropout=0.4),
    AdapterCase(dropout=1.0, residual=True),
    AdapterCase(grid=(1, 1), kernel=(5, 5)),
    # The kernel covers the grid from every position, with even sizes and idle lanes too.
    AdapterCase(grid=(5, 4), kernel=(10, 7), r=9, prefix=1, dropout=0.2, residual=True),
    AdapterCase(grid=(3, 4), kernel=(31, 8), r=16),
    *(AdapterCase(prefix=2, prefix_mode=m, residual=True, scale=2.0) for m in PREFIX_MODES),
    *(AdapterCase(prefix=1, prefix_mode=m, biases=False, dropout=0.3) for m in PREFIX_MODES),
    *(AdapterCase(activation=a, position=p) for a in ACTIVATIONS for p in ACTIVATION_POSITIONS),
]


@st.composite
def adapter_cases(draw, *, most_channels=80, longest_side=15, largest_kernel=31) -> AdapterCase:
    """Calls of every kind, small enough for a float64 truth."""
    side = st.integers(1, longest_side)
    size = st.one_of(st.integers(1, min(8, largest_kernel)), st.integers(1, largest_kernel))
    kernel = (draw(size), draw(size))
    layout = draw(st.sampled_from(("tokens", "map", "channels_first", "sliced")))
    return AdapterCase(
        batch=draw(st.sampled_from((1, 2, 3, 5, 0))),
        dim=draw(st.integers(1, most_channels)),
        r=draw(st.one_of(st.sampled_from((1, 4, 8, 16)), st.integers(1, 40))),
        grid=(draw(side), draw(side)),
        kernel=kernel,
        prefix=draw(st.integers(0, 3)) if layout in ("tokens", "sliced") else 0,
        prefix_mode=draw(st.sampled_from(PREFIX_MODES)),
        dilation=draw(st.sampled_from((1, 1, 2, 3))),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        position=draw(st.sampled_from(ACTIVATION_POSITIONS)),
        dropout=draw(st.sampled_from((0.0, 0.1, 0.5, 1.0))),
        scale=draw(st.sampled_from((1.0, 0.25, -2.0))),
        biases=draw(st.booleans()),
        residual=draw(st.booleans()),
        layout=layout,
    )


def check_backend(case: AdapterCase, dtype: torch.dtype, backend: str, device="cpu") -> None:
    """Output and all gradients of a backend; the truth is the specification in float64."""
    tensors = {k: None if t is None else t.to(device) for k, t in case.tensors(dtype).items()}
    grad_output = torch.randn(tensors["x"].shape, generator=torch.Generator().manual_seed(3))
    grad_output = grad_output.to(device, dtype)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    # Without oneDNN: see test_depthwise_conv2d.
    with use_backend("torch"), torch.backends.mkldnn.flags(enabled=False):
        theirs = with_gradients(call, case, tensors, grad_output)
        truth = with_gradients(call, case, wide, grad_output.double())
    poison.poison_scratch(dtype)
    # Sums over C that are added one after the other round as the root of their number.
    absolute = {torch.float64: 16.0, torch.float32: 4.0 * max(1.0, math.sqrt(case.dim) / 16)}
    with use_backend(backend):
        ours = with_gradients(call, case, tensors, grad_output)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert_close_to_truth(
            name,
            value,
            truth[name],
            theirs[name] if dtype != torch.float64 else None,
            magnitude=case.magnitudes[name] * max(1.0, abs(case.scale)),
            absolute=absolute.get(dtype),
        )
