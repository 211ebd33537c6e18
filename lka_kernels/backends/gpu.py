"""The operators that ``use_backend("auto")`` takes on CUDA tensors: each call goes to one family.

Sizes are looked at here rather than in ``dispatch``, so that a graph of torch.compile holds one
operator for all of them. ``gpu_choice`` says which family is the fastest; this file finds out which
of them can serve a call, and calls it or PyTorch. A device that none of the kernels can run on is
served by PyTorch too: while a call was traced, it was not asked.
"""

from __future__ import annotations

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from lka_kernels import dispatch, gpu_choice, ops, remembered_calls
from lka_kernels.backends import reference
from lka_kernels.checks import depthwise_output_size
from lka_kernels.fft_plan import plan_dimension

# Rows and columns of a transform that takes one launch: csrc/cuda/fft_plan.h.
MOST_FFT_SIZE = 128
_16_BIT = (torch.bfloat16, torch.float16)


# --- which family -------------------------------------------------------------------------------


def _fits_one_transform(size, kernel, stride, padding, dilation) -> bool:
    """Whether the CUDA backend's transforms can serve sizes."""
    if stride != (1, 1):
        return False
    output_size = depthwise_output_size(size, kernel, stride, padding, dilation)
    return all(
        plan_dimension(
            size[i], output_size[i], kernel[i], stride[i], padding[i], dilation[i]
        ).fft_size
        <= MOST_FFT_SIZE
        for i in (0, 1)
    )


def _is_ready(backend: str, index: int) -> bool:
    return dispatch.gpu_backends(index)[backend] == "ready"


@functools.lru_cache(maxsize=4096)
def depthwise_family(
    direction: str,
    layout: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    index: int,
) -> str:
    """The family that serves a call on the CUDA device ``index``, or "torch".

    ``shape`` is that of the input, ``padding`` (top, left, bottom, right); the rest is as in
    ``gpu_choice.depthwise_family``.
    """
    families = set()
    if dtype in dispatch.TRITON_DTYPES:
        if _is_ready("cuda", index):
            families.add("cuda")
            if _fits_one_transform(shape[2:], kernel, stride, padding, dilation):
                families.add("cuda_fft")
        if _is_ready("triton", index) and stride == (1, 1):
            families.add("triton")
    # PyTorch copies the map where padding is uneven.
    if padding[:2] == padding[2:] or not families:
        families.add("torch")
    return gpu_choice.depthwise_family(
        direction,
        layout,
        dtype in _16_BIT,
        *shape[:2],
        tuple(shape[2:]),
        kernel,
        dilation,
        frozenset(families),
    )


def left_to_torch(input, weight, stride, padding, dilation, channels_last: bool) -> bool:
    """Whether PyTorch serves forward and both gradients, by the sizes of a call that is not traced.

    Then its own operator is called, whose gradients need no Python.
    """
    if not input.numel():
        return False
    layout = _layout_of(input, channels_last)
    sizes = input.shape, weight.shape[2:], stride, padding, dilation
    return all(
        _family_of(direction, layout, input, *sizes) == "torch"
        for direction in gpu_choice.DIRECTIONS
    )


def _family_of(direction, layout, map: Tensor, shape, kernel, stride, padding, dilation) -> str:
    """``depthwise_family`` for the dtype and device of ``map`` and sizes in any sequences."""
    sizes = [tuple(size) for size in (shape, kernel, stride, padding, dilation)]
    return depthwise_family(direction, layout, map.dtype, *sizes, map.get_device())


@functools.lru_cache(maxsize=4096)
def fft_family(
    size: tuple[int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    index: int,
) -> str:
    """The family of transforms that serves a call: in one launch where they fit, else torch.fft."""
    if _is_ready("cuda", index) and _fits_one_transform(size, kernel, stride, padding, dilation):
        return "cuda_fft"
    return "fft"


def _layout(first: Tensor, second: Tensor) -> str:
    """What the strides of two maps have in common."""
    if first.is_contiguous() and second.is_contiguous():
        return "contiguous"
    channels_last = torch.channels_last
    if first.is_contiguous(memory_format=channels_last) and second.is_contiguous(
        memory_format=channels_last
    ):
        return "channels_last"
    return "other"


def _layout_of(map: Tensor, channels_last: bool) -> str:
    """What the strides of a map and the memory format of the result have in common."""
    if map.is_contiguous(memory_format=ops.memory_format(channels_last)):
        return "channels_last" if channels_last else "contiguous"
    return "other"


def explained(
    shape: tuple[int, int, int, int],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    dilation: tuple[int, int],
    dtype: torch.dtype,
    layout: str,
    index: int,
) -> str:
    """The family of every direction in words, gradients in the layout of the input."""
    names = dict(zip(gpu_choice.DIRECTIONS, ("forward", "dX", "dW"), strict=True))
    geometry = (kernel, stride, padding, dilation)
    found = []
    for direction, name in names.items():
        family = depthwise_family(direction, layout, dtype, shape, *geometry, index)
        found.append(f"{name}: {_in_words(family, dtype)}")
    return ", ".join(found)


def _in_words(family: str, dtype: torch.dtype) -> str:
    words = {
        "cuda": "dense, planes or rows" if dtype in _16_BIT else "sums in registers",
        "cuda_fft": "transforms in one launch",
        "triton": "implicit_gemm or direct",
        "torch": "aten.convolution",
    }
    return f"{family} ({words[family]})"


# --- by PyTorch ---------------------------------------------------------------------------------


def _in_format(result: Tensor, channels_last: bool) -> Tensor:
    """``result`` with the strides that the fake has, which PyTorch may have chosen otherwise."""
    channels, height, width = result.shape[1:]
    if channels_last:
        strides = (height * width * channels, 1, width * channels, channels)
    else:
        strides = (channels * height * width, height * width, width, 1)
    if result.stride() == strides:
        return result
    layout = ops.memory_format(channels_last)
    if result.is_contiguous(memory_format=layout):  # sizes of 1 may have any stride
        return result.as_strided(result.shape, strides)
    made = torch.empty(result.shape, dtype=result.dtype, device=result.device, memory_format=layout)
    return made.copy_(result)


def _even(padding) -> bool:
    return padding[0] == padding[2] and padding[1] == padding[3]


def _without_autocast(device_type: str):
    """A context in which PyTorch's operators keep the dtype they are given, as kernels do.

    Whoever calls an operator of this library has cast already, or wants no cast.
    """
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _torch_forward(input, weight, bias, stride, padding, dilation, channels_last) -> Tensor:
    with _without_autocast(input.device.type):
        result = reference.depthwise_conv2d(input, weight, bias, stride, padding, dilation)
    return _in_format(result, channels_last)


def _torch_gradient(grad_output, input, weight, stride, padding, dilation, mask):
    """aten.convolution_backward with even padding (rows, columns)."""
    channels = weight.shape[0]
    return torch.ops.aten.convolution_backward.default(
        grad_output, input, weight, [channels], stride, padding, dilation, False, [0, 0], channels,
        mask,
    )  # fmt: skip


def _torch_backward_input(
    grad_output, weight, input_size, stride, padding, dilation, channels_last
) -> Tensor:
    top, left, bottom, right = padding
    even = _even(padding)
    batch, channels = grad_output.shape[:2]
    height, width = input_size
    if not even:
        height, width = height + top + bottom, width + left + right
    size = (batch, channels, height, width)
    layout = ops.memory_format(channels_last)
    # Of the input only sizes and memory format count.
    if grad_output.shape == size and grad_output.is_contiguous(memory_format=layout):
        like_input = grad_output
    else:
        like_input = torch.empty(
            size, dtype=grad_output.dtype, device=grad_output.device, memory_format=layout
        )
    before = [top, left] if even else [0, 0]
    grad, _, _ = _torch_gradient(
        grad_output, like_input, weight, stride, before, dilation, [True, False, False]
    )
    if not even:
        grad = grad[:, :, top : top + input_size[0], left : left + input_size[1]]
    return _in_format(grad, channels_last)


def _torch_backward_weight(
    grad_output, input, kernel_size, stride, padding, dilation
) -> tuple[Tensor, Tensor]:
    top, left, bottom, right = padding
    if not _even(padding):
        input = F.pad(input, (left, right, top, bottom))
        top = left = 0
    like_weight = input.new_empty((input.shape[1], 1, *kernel_size))
    _, grad_weight, grad_bias = _torch_gradient(
        grad_output, input, like_weight, stride, [top, left], dilation, [False, True, True]
    )
    return _in_format(grad_weight, False), grad_bias


# --- the operators of depthwise convolution -----------------------------------------------------


def forward(input, weight, bias, stride, padding, dilation, channels_last) -> Tensor:
    """Schema ``depthwise_conv2d_forward``."""
    family = "torch"
    if input.numel():
        layout = _layout_of(input, channels_last)
        sizes = input.shape, weight.shape[2:], stride, padding, dilation
        family = _family_of("forward", layout, input, *sizes)
    if family != "torch":
        return ops.DEPTHWISE[family].forward(
            input, weight, bias, stride, padding, dilation, channels_last
        )
    return _torch_forward(input, weight, bias, stride, padding, dilation, channels_last)


def backward_input(
    grad_output, weight, input_size, stride, padding, dilation, channels_last
) -> Tensor:
    """Schema ``depthwise_conv2d_backward_input``."""
    if not grad_output.numel():
        empty = grad_output.new_zeros((*grad_output.shape[:2], *input_size))
        return _in_format(empty, channels_last)
    layout = _layout_of(grad_output, channels_last)
    shape = *grad_output.shape[:2], *input_size
    sizes = shape, weight.shape[2:], stride, padding, dilation
    family = _family_of("backward_input", layout, grad_output, *sizes)
    if family != "torch":
        return ops.DEPTHWISE[family].backward_input(
            grad_output, weight, input_size, stride, padding, dilation, channels_last
        )
    return _torch_backward_input(
        grad_output, weight, input_size, stride, padding, dilation, channels_last
    )


def backward_weight(
    grad_output, input, kernel_size, stride, padding, dilation
) -> tuple[Tensor, Tensor]:
    """Schema ``depthwise_conv2d_backward_weight``."""
    if not grad_output.numel():
        channels = input.shape[1]
        return input.new_zeros((channels, 1, *kernel_size)), input.new_zeros((channels,))
    sizes = input.shape, kernel_size, stride, padding, dilation
    family = _family_of("backward_weight", _layout(input, grad_output), input, *sizes)
    arguments = (grad_output, input, kernel_size, stride, padding, dilation)
    if family != "torch":
        return ops.DEPTHWISE[family].backward_weight(*arguments)
    return _torch_backward_weight(*arguments)


def fft_forward(input, weight, bias, stride, padding, dilation, channels_last) -> Tensor:
    """Schema ``depthwise_conv2d_forward``, by transforms."""
    family = _fft_family(input.shape[2:], weight.shape[2:], stride, padding, dilation, input)
    return ops.DEPTHWISE[family].forward(
        input, weight, bias, stride, padding, dilation, channels_last
    )


def fft_backward_input(
    grad_output, weight, input_size, stride, padding, dilation, channels_last
) -> Tensor:
    """Schema ``depthwise_conv2d_backward_input``, by transforms."""
    family = _fft_family(input_size, weight.shape[2:], stride, padding, dilation, grad_output)
    return ops.DEPTHWISE[family].backward_input(
        grad_output, weight, input_size, stride, padding, dilation, channels_last
    )


def fft_backward_weight(
    grad_output, input, kernel_size, stride, padding, dilation
) -> tuple[Tensor, Tensor]:
    """Schema ``depthwise_conv2d_backward_weight``, by transforms."""
    family = _fft_family(input.shape[2:], kernel_size, stride, padding, dilation, input)
    return ops.DEPTHWISE[family].backward_weight(
        grad_output, input, kernel_size, stride, padding, dilation
    )


def _fft_family(size, kernel, stride, padding, dilation, map: Tensor) -> str:
    geometry = (tuple(stride), tuple(padding), tuple(dilation))
    return fft_family(tuple(size), tuple(kernel), *geometry, map.get_device())


# --- the operators of the adapter ---------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def adapter_family(
    direction: str,
    dtype: torch.dtype,
    batch: int,
    grid: tuple[int, int],
    dim: int,
    rank: int,
    kernel: tuple[int, int],
    dilation: int,
    prefix: int,
    index: int,
) -> str:
    """The family that serves a call on the CUDA device ``index``, or "torch" if none can.

    As ``gpu_choice.adapter_family``.
    """
    families = [name for name in ("cuda", "triton") if _is_ready(name, index)]
    if not families or dtype not in dispatch.GPU_ADAPTER_DTYPES:
        return "torch"
    return gpu_choice.adapter_family(
        direction,
        dtype in _16_BIT,
        # An empty batch is served by any.
        max(batch, 1),
        grid,
        dim,
        rank,
        kernel,
        dilation,
        prefix,
        frozenset(families),
    )


def _adapter_family(direction: str, x: Tensor, down_weight, conv_weight, options) -> str:
    height, width, prefix, _, dilation = options[:5]
    return adapter_family(
        direction,
        x.dtype,
        x.shape[0],
        (height, width),
        x.shape[2],
        down_weight.shape[0],
        tuple(conv_weight.shape[2:]),
        dilation,
        prefix,
        x.get_device(),
    )


def adapter_forward(
    x, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, residual, seed, *options
) -> tuple[Tensor, Tensor, Tensor]:
    """Schema ``large_kernel_adapter_forward``."""
    weights = (down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
    family = _adapter_family("forward", x, down_weight, conv_weight, options)
    if family != "torch":
        return ops.ADAPTER[family].forward(x, *weights, residual, seed, *options)
    height, width, *rest = options
    with torch.no_grad(), _without_autocast(x.device.type):
        y = reference.large_kernel_adapter(x, *weights, residual, seed, (height, width), *rest)
    # The backward pass below computes z and c anew.
    z = x.new_zeros((x.shape[0], down_weight.shape[0], x.shape[1]))
    return torch.empty_like(x).copy_(y), z, torch.zeros_like(z)


def adapter_backward(
    grad_output, x, z, c, down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias, seed,
    *options,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Schema ``large_kernel_adapter_backward``.

    z and c may come from another family than serves this call: all of them keep the same, z in
    front of its activation and c behind the convolution.
    """
    weights = (down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
    family = _adapter_family("backward", x, down_weight, conv_weight, options)
    if family != "torch":
        return ops.ADAPTER[family].backward(grad_output, x, z, c, *weights, seed, *options)
    height, width, *rest, residual_is_x, output_mask = options
    with torch.enable_grad(), _without_autocast(x.device.type):
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, *weights)]
        y = reference.large_kernel_adapter(*leaves, None, seed, (height, width), *rest)
        wanted = [leaf for leaf, asked in zip(leaves, output_mask, strict=True) if asked]
        found = iter(torch.autograd.grad(y, wanted, grad_output, materialize_grads=True))
    grads = [next(found).contiguous() if asked else x.new_empty((0,)) for asked in output_mask]
    if output_mask[0]:
        grad_x = grads[0] + grad_output if residual_is_x else grads[0]
        grads[0] = torch.empty_like(x).copy_(grad_x)
    return tuple(grads)


def forget() -> None:
    """Ask the devices anew at the next call."""
    for function in (depthwise_family, fft_family, adapter_family, dispatch._asked):
        function.cache_clear()
    remembered_calls.forget_all()


for _direction, _function, _by_transforms in (
    ("forward", forward, fft_forward),
    ("backward_input", backward_input, fft_backward_input),
    ("backward_weight", backward_weight, fft_backward_weight),
):
    ops.LIBRARY.impl(f"depthwise_conv2d_{_direction}_gpu", _function, "CUDA")
    ops.LIBRARY.impl(f"depthwise_conv2d_{_direction}_gpu_fft", _by_transforms, "CUDA")
ops.LIBRARY.impl("large_kernel_adapter_forward_gpu", adapter_forward, "CUDA")
ops.LIBRARY.impl("large_kernel_adapter_backward_gpu", adapter_backward, "CUDA")
