"""The two operators as functions: check, apply autocast, choose a backend, call it."""

from __future__ import annotations

import torch
from torch import Tensor

from lka_kernels import _extension, autograd, checks, dispatch, philox, remembered_calls
from lka_kernels.backends import fft as _fft  # noqa: F401  (registers the FFT operators)
from lka_kernels.backends import gpu, reference


def depthwise_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    *,
    method: str = "auto",
) -> Tensor:
    """Depthwise convolution, ``F.conv2d(input, weight, bias, stride, padding, dilation, C)``.

    Args:
        input: (B, C, H, W) in any memory layout, or (C, H, W); float32, float16, bfloat16 or
            float64 (other dtypes are served by PyTorch).
        weight: (C, 1, kH, kW), odd or even, square or not. A channel multiplier m, weight
            (C·m, 1, kH, kW), is served by PyTorch.
        bias: (C,) or None.
        stride, dilation: int or pair, at least 1.
        padding: int, pair, "same" (stride 1 only) or "valid".
        method: "auto" chooses by sizes; "direct" sums; "fft" transforms; "implicit_gemm"
            multiplies matrices on the tensor cores, for stride 1 and dtypes other than float64: by
            Triton, or under ``use_backend("cuda")``, for float16 and bfloat16, by CUDA. "fft"
            under ``use_backend("cuda")`` is one launch where stride is 1 and dtype not float64; it
            raises where a map, with the padding that taps reach, has more than 128 rows or
            columns, which "fft" on a GPU without ``use_backend`` leaves to torch.fft. With "fft",
            and with "auto" where it chooses that (large kernels), rounding errors follow the
            largest elements of a channel's map, and an overflow or an element that is not finite
            reaches all of it. "implicit_gemm", "auto" on a GPU, and "direct" in bfloat16 on a CPU,
            may let such an element reach neighbouring outputs, of a map of at most 28 × 28 all of
            them. In weight gradients these, and "direct" in every dtype on a CPU, may let it reach
            the taps that it meets only in the padding or, with a stride, between outputs.

    Returns:
        (B, C, H', W') with the dtype and memory format that ``F.conv2d`` returns; an empty batch
        has the format of input. Differentiable twice in input, weight and bias. Under autocast the
        arguments are cast as for ``F.conv2d``.
        Gradients of weight and bias are the same from run to run, and with method "auto" or
        "direct" for every number of threads; where PyTorch serves a call on a GPU, they are as
        ``torch.backends.cudnn.deterministic`` has them.

    Raises:
        ValueError: a shape or value is not accepted, or ``method`` cannot serve the call.
        TypeError: an argument has the wrong type, or dtypes differ.
        RuntimeError: the backend asked for by ``use_backend`` cannot serve the call.
    """
    key = remembered_calls.depthwise_key(input, weight, bias, stride, padding, dilation, method)
    known = remembered_calls.find(key)
    if known is not None:
        stride, padding, dilation, channels_last, backend, casts = known
        if casts:
            input, weight, bias = _autocast(input.device.type, input, weight, bias)
    else:
        geometry = _check_depthwise(input, weight, bias, stride, padding, dilation, method)
        casts = _autocast_enabled(input.device.type)
        if casts:
            input, weight, bias = _autocast(input.device.type, input, weight, bias)
        checks.dtypes_and_devices_agree("input", input, (("weight", weight), ("bias", bias)))
        stride, padding, dilation = geometry
        channels_last = _gives_channels_last(input, weight)
        backend = dispatch.choose_depthwise(input, weight, method, stride, padding).family
        if key is not None:  # what a tracer sees depends on no sizes
            if backend == "gpu" and gpu.left_to_torch(input, weight, *geometry, channels_last):
                backend = "torch"
            remembered_calls.remember(key, (*geometry, channels_last, backend, casts))
    if backend == "torch":
        if input.dim() == 3:
            return reference.depthwise_conv2d(input[None], weight, bias, stride, padding, dilation)[
                0
            ]
        return reference.depthwise_conv2d(input, weight, bias, stride, padding, dilation)
    return autograd.depthwise_conv2d(
        input, weight, bias, stride, padding, dilation, channels_last, backend
    )


# Layouts that F.conv2d takes; PyTorch serves the second.
_CONVOLVED = (torch.strided, torch._mkldnn)


def _check_depthwise(input, weight, bias, stride, padding, dilation, method):
    """Return normalised (stride, padding, dilation); raise for what ``F.conv2d`` refuses."""
    checks.is_tensor("input", input, _CONVOLVED)
    checks.is_tensor("weight", weight, _CONVOLVED)
    if input.dim() not in (3, 4):
        raise ValueError(f"input must be (B, C, H, W) or (C, H, W); got {tuple(input.shape)}")
    if weight.dim() != 4 or weight.shape[1] != 1:
        raise ValueError(f"weight must be (C, 1, kH, kW); got {tuple(weight.shape)}")
    channels = input.shape[-3]
    filters = weight.shape[0]
    if channels < 1 or filters < 1 or filters % channels:
        raise ValueError(
            f"weight must be (C, 1, kH, kW) with C={channels} channels as in input "
            f"{tuple(input.shape)} (or a multiple of C); got {tuple(weight.shape)}"
        )
    if bias is not None:
        checks.is_tensor("bias", bias, _CONVOLVED)
        if bias.dim() != 1 or bias.shape[0] != filters:
            raise ValueError(f"bias must be ({filters},); got {tuple(bias.shape)}")
    checks.one_of("method", method, checks.METHODS)
    stride = checks.pair("stride", stride, minimum=1)
    dilation = checks.pair("dilation", dilation, minimum=1)
    kernel_size = (weight.shape[2], weight.shape[3])
    if kernel_size[0] < 1 or kernel_size[1] < 1:
        raise ValueError(f"weight must have at least one tap; got {tuple(weight.shape)}")
    padding = checks.padding_tlbr(padding, stride, dilation, kernel_size)
    for name, size, extent, pad in (
        ("H", input.shape[-2], dilation[0] * (kernel_size[0] - 1) + 1, padding[0] + padding[2]),
        ("W", input.shape[-1], dilation[1] * (kernel_size[1] - 1) + 1, padding[1] + padding[3]),
    ):
        if size < 1 or size + pad < extent:
            raise ValueError(
                f"input {tuple(input.shape)} with padding must be at least as large as the "
                f"dilated kernel: {name} + padding is {size + pad}, the kernel needs {extent}"
            )
    return stride, padding, dilation


# For torch.compile of PyTorch 2.11, which cannot trace the question whether a device has autocast.
_AUTOCAST_DEVICES = frozenset(
    device
    for device in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla", "ipu")
    if torch.amp.is_autocast_available(device)
)


def _autocast_enabled(device_type: str) -> bool:
    # torch.is_autocast_enabled raises for a device that has none, such as "meta".
    if torch.compiler.is_compiling():
        available = device_type in _AUTOCAST_DEVICES
    else:
        available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def _autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast to the autocast dtype as ``F.conv2d`` and ``F.linear`` do (float64 stays)."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _gives_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether the result is channels_last: as of ``F.conv2d``, if the batch is empty as input."""
    if input.dim() != 4:
        return False
    return _like_channels_last(input) or (input.shape[0] > 0 and _like_channels_last(weight))


def _like_channels_last(x: Tensor) -> bool:
    """Whether strides order the dimensions N, H, W, C, as ``suggest_memory_format`` tests.

    Follows ``is_channels_last_strides_2d`` of c10/core/MemoryFormat.h, which decides the memory
    format of ``F.conv2d``'s result, but takes an empty batch as one of any size.
    """
    sizes, strides = x.shape, x.stride()
    if strides[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if strides[d] < least:
            return False
        if d == 0 and least == strides[1]:
            return False
        least = strides[d]
        if sizes[d] > 1:
            least *= sizes[d]
    return True


def large_kernel_adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    grid_size: tuple[int, int] | None = None,
    num_prefix_tokens: int = 0,
    prefix_mode: str = "center_tap",
    dilation: int = 1,
    activation: str = "gelu",
    activation_position: str = "pre",
    dropout_p: float = 0.0,
    training: bool = False,
    scale: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    """The Large Kernel Adapter (arXiv 2506.19118) in one call.

    z = x·down_weightᵀ + down_bias; a = act(z) if the position is "pre" or "both"; c = depthwise
    convolution of a over the grid, zero-padded "same"; e = act(c) if "post" or "both";
    y = dropout(e)·up_weightᵀ + up_bias. Returns residual + scale·y, or scale·y.

    Args:
        x: tokens (B, P+N, C) or a map (B, H, W, C); N = H·W.
        down_weight, down_bias: (r, C) and (r,) or None.
        conv_weight, conv_bias: (r, 1, kH, kW) and (r,) or None.
        up_weight, up_bias: (C, r) and (C,) or None.
        grid_size: (H, W); for tokens it may be left out if N is a square.
        num_prefix_tokens: P, class and register tokens at the front; 0 for a map.
        prefix_mode: "center_tap" convolves a prefix token as a 1×1 image, "skip" passes it around
            the convolution, "zero" gives it nothing from the adapter.
        dilation: of the convolution, at least 1.
        activation: "gelu", "gelu_tanh", "relu", "silu" or "none".
        activation_position: "pre", "post" or "both", relative to the convolution.
        dropout_p: probability in [0, 1] of dropping an element of e, if ``training``. The mask
            follows ``torch.manual_seed`` and is the same on every backend.
        scale: factor of y.
        residual: the shape of x; added to the result.

    Returns:
        The shape of x. Differentiable twice in all tensors. Under autocast x and the weights are
        cast as for ``F.linear`` and the residual is not. On a CPU the convolution is done by
        Fourier transforms where ``depthwise_conv2d`` would choose them for a channels_last map
        (B, r, H, W) in float32, or float64 if x is, as ``explain`` tells; see there for rounding
        errors and elements that are not finite.

    Raises:
        ValueError, TypeError, RuntimeError: as ``depthwise_conv2d``.
    """
    weights = (down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
    options = (num_prefix_tokens, prefix_mode, dilation, activation, activation_position)
    key = remembered_calls.adapter_key(
        (x, *weights, residual), (grid_size, *options, dropout_p, scale)
    )
    known = remembered_calls.find(key)
    late_residual = None
    if known is not None:
        grid_size, backend, casts = known
        if casts:
            x, *weights = _autocast(x.device.type, x, *weights)
    else:
        grid_size = _check_adapter(x, *weights, residual, grid_size, *options, dropout_p, scale)
        casts = _autocast_enabled(x.device.type)
        if casts:
            x, *weights = _autocast(x.device.type, x, *weights)
        names = ("down_weight", "down_bias", "conv_weight", "conv_bias", "up_weight", "up_bias")
        checks.dtypes_and_devices_agree("x", x, zip(names, weights, strict=True))
        backend = dispatch.choose_adapter(x, activation, down_weight.shape[0]).backend
        # The fused kernels add a residual of x's dtype; any other follows torch's type promotion.
        if residual is not None and residual.dtype != x.dtype:
            late_residual, residual = residual, None
        elif key is not None:
            remembered_calls.remember(key, (grid_size, backend, casts))
    seed = philox.new_seed(x.device) if training and dropout_p > 0 else None
    own_residual = residual is x  # autograd.large_kernel_adapter makes use of it
    tokens = x.flatten(1, 2) if x.dim() == 4 else x
    if own_residual:
        residual = tokens
    elif residual is not None and residual.dim() == 4:
        residual = residual.flatten(1, 2)
    arguments = (
        tokens,
        *weights,
        residual,
        seed,
        grid_size,
        *options,
        float(dropout_p),
        float(scale),
    )
    if backend == "torch":
        y = reference.large_kernel_adapter(*arguments)
    else:
        y = autograd.large_kernel_adapter(*arguments, backend)
    if x.dim() == 4:
        y = y.unflatten(1, grid_size)
    return y if late_residual is None else late_residual + y


def _check_adapter(
    x,
    down_weight,
    down_bias,
    conv_weight,
    conv_bias,
    up_weight,
    up_bias,
    residual,
    grid_size,
    num_prefix_tokens,
    prefix_mode,
    dilation,
    activation,
    activation_position,
    dropout_p,
    scale,
) -> tuple[int, int]:
    """Check types, shapes and options; return the grid size."""
    checks.is_tensor("x", x)
    if x.dtype not in checks.FLOAT_DTYPES:
        names = ", ".join(map(str, checks.FLOAT_DTYPES))
        raise TypeError(f"x must have one of the dtypes {names}; got {x.dtype}")
    if x.dim() not in (3, 4):
        raise ValueError(f"x must be (B, P+N, C) or (B, H, W, C); got {tuple(x.shape)}")
    dim = x.shape[-1]
    for name, weight, dims in (
        ("down_weight", down_weight, 2),
        ("conv_weight", conv_weight, 4),
        ("up_weight", up_weight, 2),
    ):
        checks.is_tensor(name, weight)
        if weight.dim() != dims:
            raise ValueError(f"{name} must have {dims} dimensions; got {tuple(weight.shape)}")
    r = down_weight.shape[0]
    if r < 1 or dim < 1:
        raise ValueError(f"x and down_weight must have channels; got C={dim} and r={r}")
    if down_weight.shape[1] != dim:
        raise ValueError(f"down_weight must be (r, C={dim}); got {tuple(down_weight.shape)}")
    if conv_weight.shape[0] != r or conv_weight.shape[1] != 1 or 0 in conv_weight.shape:
        raise ValueError(f"conv_weight must be (r={r}, 1, kH, kW); got {tuple(conv_weight.shape)}")
    if up_weight.shape[0] != dim or up_weight.shape[1] != r:
        raise ValueError(f"up_weight must be (C={dim}, r={r}); got {tuple(up_weight.shape)}")
    for name, bias, size in (
        ("down_bias", down_bias, r),
        ("conv_bias", conv_bias, r),
        ("up_bias", up_bias, dim),
    ):
        if bias is not None:
            checks.is_tensor(name, bias)
            if bias.dim() != 1 or bias.shape[0] != size:
                raise ValueError(f"{name} must be ({size},); got {tuple(bias.shape)}")
    if residual is not None:
        checks.is_tensor("residual", residual)
        if residual.shape != x.shape:
            raise ValueError(
                f"residual must have the shape of x {tuple(x.shape)}; got {tuple(residual.shape)}"
            )
        if residual.device != x.device:
            raise ValueError(f"residual must be on {x.device}; got {residual.device}")
    checks.adapter_options(
        num_prefix_tokens, prefix_mode, dilation, activation, activation_position, scale
    )
    checks.probability("dropout_p", dropout_p)
    return _check_grid(x, grid_size, num_prefix_tokens)


def _check_grid(x: Tensor, grid_size, num_prefix_tokens) -> tuple[int, int]:
    if x.dim() == 4:
        if num_prefix_tokens:
            raise ValueError(
                f"num_prefix_tokens must be 0 for x (B, H, W, C); got {num_prefix_tokens}"
            )
        shape = (x.shape[1], x.shape[2])
        if grid_size is not None and checks.pair("grid_size", grid_size, minimum=1) != shape:
            raise ValueError(
                f"grid_size must be {shape}, as x {tuple(x.shape)} has it; got {grid_size!r}"
            )
        return x.shape[1], x.shape[2]
    num_tokens = x.shape[1] - num_prefix_tokens
    if grid_size is None:
        side = round(num_tokens**0.5) if num_tokens > 0 else 0
        if side < 1 or side * side != num_tokens:
            raise ValueError(
                f"grid_size must be given: x {tuple(x.shape)} with num_prefix_tokens="
                f"{num_prefix_tokens} has {num_tokens} grid tokens, which is not a square"
            )
        return side, side
    height, width = checks.pair("grid_size", grid_size, minimum=1)
    if height * width != num_tokens:
        raise ValueError(
            f"grid_size {(height, width)} needs {height * width} grid tokens; x "
            f"{tuple(x.shape)} with num_prefix_tokens={num_prefix_tokens} has {num_tokens}"
        )
    return height, width


def explain(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride=1,
    padding=0,
    dilation=1,
    *,
    method: str = "auto",
) -> str:
    """Which backend and method would serve ``depthwise_conv2d`` with these arguments, and why.

    Raises:
        ValueError, TypeError: as the call itself. A backend or method that was asked for by name
            and cannot serve the call is told in the text.
    """
    stride, padding, dilation = _check_depthwise(
        input, weight, bias, stride, padding, dilation, method
    )
    if _autocast_enabled(input.device.type):
        input, weight, bias = _autocast(input.device.type, input, weight, bias)
    checks.dtypes_and_devices_agree("input", input, (("weight", weight), ("bias", bias)))
    channels_last = _gives_channels_last(input, weight)
    try:
        choice = dispatch.choose_depthwise(input, weight, method, stride, padding)
    except (RuntimeError, ValueError) as error:
        return f"no backend: {error}"
    layout = "channels_last" if channels_last else "contiguous"
    lines = [
        f"backend={choice.backend} method={choice.method}: {choice.reason}",
        f"input {tuple(input.shape)} {input.dtype} on {input.device}, "
        f"weight {tuple(weight.shape)}, {layout} result",
    ]
    if choice.backend == "cpu":
        lines.append(f"instruction set {_extension.instruction_set()}")
    if choice.backend == "cpu" and choice.method == "auto":
        kernels = [
            f"{direction} {kernel}"
            for direction in ("forward", "backward_input", "backward_weight")
            if (
                kernel := _extension.depthwise_kernel_name(
                    direction,
                    input.dtype,
                    input.shape,
                    weight.shape[2:],
                    stride,
                    padding,
                    dilation,
                    channels_last,
                )
            )
        ]
        lines.append(f"sizes choose {', '.join(kernels) or 'nothing: the result is empty'}")
    if choice.backend == "gpu" and choice.method == "auto" and input.numel():
        chosen = gpu.explained(
            tuple(input.shape),
            tuple(weight.shape[2:]),
            stride,
            padding,
            dilation,
            input.dtype,
            layout,
            input.device.index or 0,
        )
        lines.append(f"sizes choose {chosen}")
    others = {k: v for k, v in dispatch.available_backends().items() if v != "ready"}
    lines += [f"not available: {name}: {reason}" for name, reason in others.items()]
    return "\n".join(lines)
