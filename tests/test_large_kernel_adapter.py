"""large_kernel_adapter: the specification against the definition, the fused kernels against it."""

import dataclasses
import math

import poison
import pytest
import torch
from closeness import assert_close_to_truth
from hypothesis import given, settings
from hypothesis import strategies as st

from lka_kernels import philox, use_backend
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
    layout: str = "tokens"  # or "map", "sliced"

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> dict:
        """Arguments by name, scaled so that every intermediate has a deviation of about 1."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*sizes, fan_in=1):
            return (torch.randn(sizes, generator=generator) / math.sqrt(fan_in)).to(dtype)

        height, width = self.grid
        tokens = self.prefix + height * width
        if self.layout == "map":
            shape = (self.batch, height, width, self.dim)
        else:
            shape = (self.batch, tokens, self.dim)
        x = normal(*shape)
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
        """How large the terms of each gradient of a weight make it."""
        terms = math.sqrt(max(1, self.batch) * (self.prefix + math.prod(self.grid)))
        return {name: 1.0 if name in ("x", "residual") else terms for name in NAMES} | {
            "output": 1.0
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


# --- the definition, written out --------------------------------------------------------------


def activate(x, name):
    """Each activation from its formula."""
    if name == "gelu":
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2
    if name == "gelu_tanh":
        return x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    if name == "relu":
        return torch.where(x > 0, x, 0)
    if name == "silu":
        return x / (1 + torch.exp(-x))
    return x


def convolve(images, weight, bias, dilation):
    """images (B, H, W, r), one shifted product per tap; zeros outside."""
    _, height, width, _ = images.shape
    before = [dilation * (k - 1) // 2 for k in weight.shape[2:]]
    result = torch.zeros_like(images)
    for i in range(weight.shape[2]):
        for j in range(weight.shape[3]):
            down, right = i * dilation - before[0], j * dilation - before[1]
            for y in range(max(0, -down), min(height, height - down)):
                left, end = max(0, -right), min(width, width - right)
                if left < end:
                    result[:, y, left:end] = (
                        result[:, y, left:end]
                        + images[:, y + down, left + right : end + right] * weight[:, 0, i, j]
                    )
    return result if bias is None else result + bias


def definition(case: AdapterCase, t: dict):
    """The adapter as api and paper define it, without any of the library but its dropout."""
    torch.manual_seed(7)
    x = t["x"].flatten(1, 2) if case.layout == "map" else t["x"]
    z = torch.einsum("bnc,rc->bnr", x, t["down_weight"])
    z = z if t["down_bias"] is None else z + t["down_bias"]
    a = activate(z, case.activation) if case.position in ("pre", "both") else z
    images = a[:, case.prefix :].reshape(case.batch, *case.grid, case.r)
    c = [convolve(images, t["conv_weight"], t["conv_bias"], case.dilation).flatten(1, 2)]
    for i in reversed(range(case.prefix)):
        token = a[:, i]
        if case.prefix_mode != "skip":
            image = token.reshape(case.batch, 1, 1, case.r)
            image = convolve(image, t["conv_weight"], t["conv_bias"], case.dilation)
            token = image.reshape(case.batch, case.r)
        c.insert(0, token[:, None])
    c = torch.cat(c, 1)
    e = activate(c, case.activation) if case.position in ("post", "both") else c
    if case.dropout:
        e = e * philox.dropout_multiplier(philox.new_seed(e.device), e.shape, case.dropout)
    y = torch.einsum("bnr,cr->bnc", e, t["up_weight"])
    y = y if t["up_bias"] is None else y + t["up_bias"]
    if case.prefix_mode == "zero":
        is_grid = torch.arange(y.shape[1]) >= case.prefix
        y = torch.where(is_grid[:, None], y, 0)
    y = (case.scale * y).reshape(t["x"].shape)
    return y if t["residual"] is None else t["residual"] + y


DEFINED = [
    AdapterCase(),
    AdapterCase(layout="map", kernel=(5, 2)),
    AdapterCase(layout="sliced", kernel=(1, 4), dilation=3),
    AdapterCase(grid=(7, 3), kernel=(7, 7), biases=False, residual=True, scale=0.5),
    AdapterCase(kernel=(2, 2), dilation=2, prefix=1),
    AdapterCase(kernel=(4, 3), dilation=1, prefix=2),
    AdapterCase(grid=(2, 2), kernel=(31, 31), prefix=1, dropout=0.4),
    AdapterCase(dropout=1.0, residual=True),
    AdapterCase(grid=(1, 1), kernel=(5, 5)),
    *(AdapterCase(prefix=2, prefix_mode=m, residual=True, scale=2.0) for m in PREFIX_MODES),
    *(AdapterCase(prefix=1, prefix_mode=m, biases=False, dropout=0.3) for m in PREFIX_MODES),
    *(AdapterCase(activation=a, position=p) for a in ACTIVATIONS for p in ACTIVATION_POSITIONS),
]


@pytest.mark.parametrize("case", DEFINED, ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_equals_the_definition(case, backend):
    tensors = case.tensors(torch.float64)
    grad_output = torch.randn(tensors["x"].shape, dtype=torch.float64)
    with use_backend(backend):
        ours = with_gradients(call, case, tensors, grad_output)
    truth = with_gradients(definition, case, tensors, grad_output)
    for name, value in ours.items():
        assert_close_to_truth(
            name, value, truth[name], magnitude=case.magnitudes[name], absolute=16.0
        )


# --- the fused kernels against the specification ----------------------------------------------


@st.composite
def adapter_cases(draw) -> AdapterCase:
    """Calls of every kind, small enough for a float64 truth."""
    side = st.integers(1, 15)
    size = st.one_of(st.integers(1, 8), st.integers(1, 31))
    kernel = (draw(size), draw(size))
    layout = draw(st.sampled_from(("tokens", "map", "sliced")))
    return AdapterCase(
        batch=draw(st.sampled_from((1, 2, 3, 5, 0))),
        dim=draw(st.integers(1, 80)),
        r=draw(st.one_of(st.sampled_from((1, 4, 8, 16)), st.integers(1, 40))),
        grid=(draw(side), draw(side)),
        kernel=kernel,
        prefix=0 if layout == "map" else draw(st.integers(0, 3)),
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


def check_fused(case: AdapterCase, dtype: torch.dtype) -> None:
    """Output and all gradients of the fused kernels; the truth is the specification in float64."""
    tensors = case.tensors(dtype)
    grad_output = torch.randn(tensors["x"].shape, generator=torch.Generator().manual_seed(3))
    grad_output = grad_output.to(dtype)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    with use_backend("torch"):
        theirs = with_gradients(call, case, tensors, grad_output)
        truth = with_gradients(call, case, wide, grad_output.double())
    poison.poison_scratch(dtype)
    with use_backend("cpu"):
        ours = with_gradients(call, case, tensors, grad_output)
    assert ours.keys() == truth.keys()
    for name, value in ours.items():
        assert_close_to_truth(
            name,
            value,
            truth[name],
            theirs[name] if dtype != torch.float64 else None,
            magnitude=case.magnitudes[name] * max(1.0, abs(case.scale)),
            absolute=16.0 if dtype == torch.float64 else None,
        )


@pytest.mark.usefixtures("compiled_cpu")
class TestFused:
    """The compiled kernels."""

    @settings(max_examples=80)
    @given(adapter_cases())
    def test_float32(self, case):
        check_fused(case, torch.float32)

    @settings(max_examples=40)
    @given(adapter_cases())
    def test_float64(self, case):
        check_fused(case, torch.float64)

    @settings(max_examples=40)
    @given(adapter_cases())
    def test_bfloat16(self, case):
        check_fused(case, torch.bfloat16)

    @settings(max_examples=40)
    @given(adapter_cases())
    def test_float16(self, case):
        check_fused(case, torch.float16)
