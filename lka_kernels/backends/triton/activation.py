"""Activations and their derivatives, in float32, for use inside kernels."""

import triton
import triton.language as tl


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x) by the names of ``large_kernel_adapter``."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 1 + tanh(u) = 2·sigmoid(2u), which does not cancel where u is far below zero.
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.where(x < 0.0, 0.0, x)  # keeps a NaN, as F.relu does
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """act'(x)."""
    if ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        result = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476)) + x * density
    elif ACTIVATION == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        result = s + x * s * (1.0 - s) * inner
    elif ACTIVATION == "relu":
        result = tl.where(x > 0.0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        result = s * (1.0 + x * (1.0 - s))
    else:
        result = tl.full(x.shape, 1.0, tl.float32)
    return result
