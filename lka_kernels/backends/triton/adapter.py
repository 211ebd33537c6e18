"""The fused adapter on a GPU: which kernels are launched, with which arguments.

``plan_forward`` and ``plan_backward`` describe the launches without running them: from tensors on
the meta device too, which is how they are compiled and their bytes are counted without a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lka_kernels import philox, tiles
from lka_kernels.backends.reference import center_tap_index
from lka_kernels.backends.triton import adapter_kernels as kernels
from lka_kernels.backends.triton import depthwise
from lka_kernels.backends.triton.adapter_one_launch_kernel import forward_kernel
from lka_kernels.backends.triton.depthwise_weight import plan_partial_sums
from lka_kernels.backends.triton.launch import Launch, dot_precision
from lka_kernels.backends.triton.partial_sums import PartialSums
from lka_kernels.backends.triton.replay import remembered
from lka_kernels.backends.triton.run import run
from lka_kernels.checks import same_padding
from lka_kernels.fft_plan import touching_taps

# Programs of the weight's gradient that a multiprocessor should have, to hide what each waits for.
_PROGRAMS_PER_MULTIPROCESSOR = 4


class _Call(NamedTuple):
    """What all launches of one call share."""

    tokens: tuple  # M, T
    grid: tuple  # P, H, W
    geometry: tuple  # TOP, LEFT, D, KY0, KY1, KX0, KX1
    kernel: dict  # constants of every kernel that convolves
    dropout: tuple  # seed, threshold, keep factor
    pre: str  # activation in front of the convolution
    post: str  # activation behind it
    precision: str
    r: int
    tiles: tiles.AdapterTiles
    reach: tuple  # tokens before and behind one that the convolution of this one meets
    one_launch: tiles.OneLaunchTiles | None

    @property
    def matrices(self) -> dict:
        """Constants of every kernel that multiplies matrices."""
        return {
            "BLOCK_T": self.tiles.block_t,
            "BLOCK_C": self.tiles.block_c,
            "BLOCK_R": self.tiles.block_r,
            "PRECISION": self.precision,
        }

    @property
    def prefix(self) -> dict:
        """Constants of every kernel that has prefix tokens meet their tap, for themselves."""
        taps = self.kernel["KH"] * self.kernel["KW"]
        return {"TAPS": taps, **{name: self.kernel[name] for name in ("PREFIX", "CENTER")}}

    def maps(self, tensor: Tensor) -> Tensor:
        """The grid of a rank-r tensor (B, r, T) as a batch of maps (B, r, H, W)."""
        prefix, height, width = self.grid
        return tensor[:, :, prefix:].unflatten(2, (height, width))

    def launch(self, kernel, programs: int, *arguments, **constants) -> Launch:
        """A launch with this call's rank, number of warps and stages."""
        constants = {"R": self.r, **constants}
        return Launch(
            kernel, programs, arguments, constants, self.tiles.num_warps, self.tiles.num_stages
        )


def _describe(
    x: Tensor,
    down_weight: Tensor,
    conv_weight: Tensor,
    seed: Tensor | None,
    height: int,
    width: int,
    num_prefix_tokens: int,
    prefix_mode: str,
    dilation: int,
    activation: str,
    activation_position: str,
    dropout_p: float,
    *,
    direction: str,
) -> _Call:
    batch, num_tokens, dim = x.shape
    r = down_weight.shape[0]
    kernel_height, kernel_width = conv_weight.shape[2:]
    top, left = (same_padding(k, dilation)[0] for k in (kernel_height, kernel_width))
    rows = touching_taps(height, height, kernel_height, 1, top, dilation)
    columns = touching_taps(width, width, kernel_width, 1, left, dilation)
    taps = (rows[1] - rows[0], columns[1] - columns[0])
    num_sms = tiles.multiprocessors(x.device)
    chosen = tiles.adapter_tiles(
        batch * num_tokens, dim, r, taps, x.dtype, num_sms, direction=direction
    )
    before = (top - rows[0] * dilation) * width + left - columns[0] * dilation
    after = ((rows[1] - 1) * dilation - top) * width + (columns[1] - 1) * dilation - left
    reach = (max(0, before), max(0, after))
    center = (
        center_tap_index(conv_weight.shape[2:], dilation) if prefix_mode == "center_tap" else None
    )
    dropped = seed is not None and dropout_p > 0
    return _Call(
        tokens=(batch * num_tokens, num_tokens),
        grid=(num_prefix_tokens, height, width),
        geometry=(top, left, dilation, *rows, *columns),
        kernel={
            "KH": kernel_height,
            "KW": kernel_width,
            "UNROLL": chosen.unroll,
            "WHOLE_ROW": columns[1] - columns[0] == chosen.unroll,
            "PREFIX": prefix_mode if num_prefix_tokens else None,
            "CENTER": -1 if center is None else center[0] * kernel_width + center[1],
        },
        dropout=(
            (
                seed,
                philox.drop_threshold(dropout_p),
                0.0 if dropout_p >= 1.0 else 1.0 / (1.0 - dropout_p),
            )
            if dropped
            else (None, 0, 0.0)
        ),
        pre=activation if activation_position in ("pre", "both") else "none",
        post=activation if activation_position in ("post", "both") else "none",
        # The switch that torch's own matrix products obey.
        precision=dot_precision(x.dtype, torch.backends.cuda.matmul),
        r=r,
        tiles=chosen,
        reach=reach,
        one_launch=tiles.one_launch_tiles(
            batch, num_tokens, dim, r, taps, sum(reach), x.dtype, num_sms
        ),
    )


def plan_forward(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    *options,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:
    """The launches of the forward operator, and the results they fill: y, z (B, r, T) and c."""
    *geometry, scale = options
    batch, num_tokens, dim = x.shape
    r = down_weight.shape[0]
    down_weight, conv_weight, up_weight = (
        w.contiguous() for w in (down_weight, conv_weight, up_weight)
    )
    down_bias, conv_bias, up_bias = (
        None if b is None else b.contiguous() for b in (down_bias, conv_bias, up_bias)
    )
    call = _describe(x, down_weight, conv_weight, seed, *geometry, direction="forward")
    t = call.tiles
    y = torch.empty_like(x)
    z = x.new_empty((batch, r, num_tokens))
    c = torch.empty_like(z)
    if call.one_launch is not None:
        weights = (down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias)
        return [_forward_in_one_launch(call, x, weights, residual, scale, y, z, c)], (y, z, c)
    a = None if call.pre == "none" else torch.empty_like(z)
    source = z if a is None else a
    programs = tiles.ceil_div(call.tokens[0], t.block_t)
    launches = [
        call.launch(
            kernels.down_kernel,
            programs,
            x,
            down_weight,
            down_bias,
            z,
            a,
            *call.tokens,
            dim,
            *x.stride(),
            ACTIVATION=call.pre,
            **call.matrices,
        )
    ]
    convolving = source, conv_weight, conv_bias
    if t.convolve_apart:
        top, left, dilation = call.geometry[:3]
        launches += depthwise.plan_correlation(
            call.maps(source),
            conv_weight,
            conv_bias,
            call.maps(c),
            (top, left),
            (dilation, dilation),
            reverse=False,
        )
        if call.kernel["PREFIX"] is None:
            convolving = None, None, None
    launches.append(
        call.launch(
            kernels.up_kernel,
            programs * tiles.ceil_div(dim, t.blocks_of_c * t.block_c),
            *convolving,
            c,
            up_weight,
            up_bias,
            residual,
            y,
            *call.dropout,
            scale,
            *call.tokens,
            dim,
            *call.grid,
            *call.geometry,
            *y.stride(),
            *((0, 0, 0) if residual is None else residual.stride()),
            **call.kernel,
            CONVOLVE=not t.convolve_apart,
            ACTIVATION=call.post,
            PAD=t.pad,
            BLOCKS_OF_C=t.blocks_of_c,
            **call.matrices,
        )
    )
    return launches, (y, z, c)


def _forward_in_one_launch(
    call: _Call,
    x: Tensor,
    weights: tuple[Tensor | None, ...],
    residual: Tensor | None,
    scale: float,
    y: Tensor,
    z: Tensor,
    c: Tensor,
) -> Launch:
    down_weight, down_bias, conv_weight, conv_bias, up_weight, up_bias = weights
    t = call.one_launch
    batch, num_tokens, dim = x.shape
    programs = batch * tiles.ceil_div(num_tokens, t.block_t)
    # What of z and its surroundings a program keeps to itself.
    scratch = z.new_empty((programs, call.r, sum(call.reach) + t.block_t))
    return Launch(
        forward_kernel,
        programs,
        (
            x,
            down_weight,
            down_bias,
            z,
            scratch,
            conv_weight,
            conv_bias,
            c,
            up_weight,
            up_bias,
            residual,
            y,
            *call.dropout,
            scale,
            *call.reach,
            num_tokens,
            dim,
            *call.grid,
            *call.geometry,
            *x.stride(),
            *y.stride(),
            *((0, 0, 0) if residual is None else residual.stride()),
        ),
        {
            "R": call.r,
            **call.kernel,
            "PRE": call.pre,
            "POST": call.post,
            "PAD": call.tiles.pad,
            "BLOCKS_OF_C": t.blocks_of_c,
            "BLOCK_T": t.block_t,
            "BLOCK_W": t.block_w,
            "BLOCK_C": t.block_c,
            "BLOCK_UP": t.block_up,
            "BLOCK_R": call.tiles.block_r,
            "PRECISION": call.precision,
        },
        t.num_warps,
        t.num_stages,
    )


def plan_backward(
    grad_output: Tensor,
    x: Tensor,
    z: Tensor,
    c: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    seed: Tensor | None,
    *options,
) -> tuple[list[Launch], list[Tensor | None]]:
    """The launches of the backward operator, and the gradients they fill, None if not asked for."""
    *geometry, scale, residual_is_x, output_mask = options
    dim, r = up_weight.shape
    down_weight, conv_weight, up_weight = (
        w.contiguous() for w in (down_weight, conv_weight, up_weight)
    )
    call = _describe(x, down_weight, conv_weight, seed, *geometry, direction="backward")
    shapes = ((r, dim), (r,), conv_weight.shape, (r,), (dim, r), (dim,))
    grads = [torch.empty_like(x) if output_mask[0] else None] + [
        x.new_empty(shape) if asked else None
        for shape, asked in zip(shapes, output_mask[1:], strict=True)
    ]
    grad_x, grad_down, grad_down_bias, grad_conv, grad_conv_bias, grad_up, grad_up_bias = grads
    need_z = any(output_mask[:3])
    need_c = any(output_mask[:5])
    grad_c = torch.empty_like(c) if need_c else None
    grad_z = torch.empty_like(z) if need_z else None
    num_sms = tiles.multiprocessors(x.device)
    programs = tiles.ceil_div(call.tokens[0], call.tiles.block_t)
    apart = call.tiles.weights_apart
    maps_apart = call.tiles.convolve_apart and x.numel() > 0
    # What the gradient of the taps needs and the programs of grad_y can leave for it.
    a = None
    if grad_conv is not None and maps_apart:
        a = z if call.pre == "none" else torch.empty_like(z)
    sums = PartialSums()
    launches = []

    if need_c or grad_up_bias is not None or (grad_up is not None and not apart):
        launches.append(
            call.launch(
                kernels.up_backward_kernel,
                programs,
                grad_output,
                c,
                z,
                up_weight,
                grad_c,
                None if a is z else a,
                None if apart else sums.rows(grad_up, programs),
                sums.rows(grad_up_bias, programs),
                sums.rows(grad_conv_bias, programs),
                *call.dropout,
                scale,
                *call.tokens,
                dim,
                call.grid[0],
                *grad_output.stride(),
                PREFIX=call.kernel["PREFIX"],
                BEFORE=call.pre,
                ACTIVATION=call.post,
                **call.matrices,
            )
        )
    if grad_up is not None and apart:
        launches.append(
            _weight_backward(
                call, grad_output, c, grad_up, (r, 1), sums, num_sms,
                dropout=call.dropout, scale=scale, prefix=call.kernel["PREFIX"],
                activation=call.post,
            )
        )  # fmt: skip
    if maps_apart:
        launches += _convolve_backward(call, grad_c, a, conv_weight, grad_z, grad_conv, sums)
    elif need_z or grad_conv is not None:
        block_r = min(call.tiles.block_r, 8)
        input_programs = programs * tiles.ceil_div(r, block_r) if need_z else 0
        block_kx = min(8, tiles.next_power_of_2(conv_weight.shape[3]))
        per_group = r * conv_weight.shape[2] * tiles.ceil_div(conv_weight.shape[3], block_kx)
        groups, tokens_per_group = _groups(call, per_group, num_sms)
        weight_programs = 0 if grad_conv is None else per_group * groups
        launches.append(
            call.launch(
                kernels.convolve_backward_kernel,
                input_programs + weight_programs,
                grad_c,
                z,
                conv_weight,
                grad_z,
                sums.rows(grad_conv, groups),
                input_programs,
                tokens_per_group,
                *call.tokens,
                *call.grid,
                *call.geometry,
                **call.kernel,
                ACTIVATION=call.pre,
                BLOCK_T=call.tiles.block_t,
                BLOCK_R=block_r,
                BLOCK_KX=block_kx,
            )
        )
    finish = maps_apart and need_z
    if (
        finish
        or grad_x is not None
        or grad_down_bias is not None
        or (grad_down is not None and not apart)
    ):
        own_residual = grad_output if residual_is_x and grad_x is not None else None
        launches.append(
            call.launch(
                kernels.down_backward_kernel,
                programs,
                grad_z,
                *((grad_c, conv_weight, z) if finish else (None, None, None)),
                x,
                own_residual,
                down_weight,
                grad_x,
                None if apart else sums.rows(grad_down, programs),
                sums.rows(grad_down_bias, programs),
                *call.tokens,
                dim,
                call.grid[0],
                *x.stride(),
                *grad_output.stride(),
                *((0, 0, 0) if grad_x is None else grad_x.stride()),
                **call.prefix,
                FINISH=finish,
                ACTIVATION=call.pre,
                PAD=call.tiles.pad,
                **call.matrices,
            )
        )
    if grad_down is not None and apart:
        launches.append(_weight_backward(call, x, grad_z, grad_down, (1, dim), sums, num_sms))
    return launches + sums.launches(), grads


def _convolve_backward(
    call: _Call,
    grad_c: Tensor,
    a: Tensor | None,
    conv_weight: Tensor,
    grad_a: Tensor | None,
    grad_conv: Tensor | None,
    sums: PartialSums,
) -> list[Launch]:
    """The gradients of a, on the grid alone, and of the taps, by depthwise convolution."""
    launches = []
    top, left, dilation = call.geometry[:3]
    if grad_a is not None:
        height, width = conv_weight.shape[2:]
        launches += depthwise.plan_correlation(
            call.maps(grad_c),
            conv_weight,
            None,
            call.maps(grad_a),
            (dilation * (height - 1) - top, dilation * (width - 1) - left),
            (dilation, dilation),
            reverse=True,
        )
    if grad_conv is not None:
        prefix = call.grid[0]
        # Prefix tokens that meet the center tap add a row of their own.
        more_rows = int(call.kernel["PREFIX"] == "center_tap" and call.kernel["CENTER"] >= 0)
        found, partials = plan_partial_sums(
            sums,
            grad_conv,
            call.maps(grad_c),
            call.maps(a),
            (top, left),
            (dilation, dilation),
            more_rows=more_rows,
        )
        launches += found
        if more_rows:
            batch, num_tokens = grad_c.shape[0], grad_c.shape[2]
            taps = conv_weight.shape[2] * conv_weight.shape[3]
            constants = {
                "BLOCK_T": min(256, tiles.next_power_of_2(batch * prefix)),
                "BLOCK_TAPS": min(256, tiles.next_power_of_2(taps)),
                "CENTER": call.kernel["CENTER"],
            }
            arguments = (grad_c, a, partials[-1], batch, num_tokens, prefix, call.r, taps)
            launches.append(Launch(kernels.prefix_taps_kernel, call.r, arguments, constants, 4, 1))
    return launches


def _groups(call: _Call, programs_per_group: int, num_sms: int) -> tuple[int, int]:
    """Groups of tokens that give every multiprocessor enough programs, and the tokens of each."""
    num_tokens, block_t = call.tokens[0], call.tiles.block_t
    groups = tiles.ceil_div(_PROGRAMS_PER_MULTIPROCESSOR * num_sms, programs_per_group)
    tokens_per_group = max(1, tiles.ceil_div(tiles.ceil_div(num_tokens, groups), block_t)) * block_t
    return tiles.ceil_div(num_tokens, tokens_per_group), tokens_per_group


def _weight_backward(
    call: _Call,
    rows: Tensor,
    columns: Tensor,
    grad: Tensor,
    strides: tuple[int, int],
    sums: PartialSums,
    num_sms: int,
    *,
    dropout: tuple = (None, 0, 0.0),
    scale: float = 1.0,
    prefix: str | None = None,
    activation: str = "none",
) -> Launch:
    """The gradient of a projection's weight; ``strides`` are those of C and R in it."""
    dim = rows.shape[2]
    blocks = tiles.ceil_div(dim, call.tiles.block_c)
    groups, tokens_per_group = _groups(call, blocks, num_sms)
    return call.launch(
        kernels.weight_backward_kernel,
        blocks * groups,
        rows,
        columns,
        sums.rows(grad, groups),
        *dropout,
        scale,
        tokens_per_group,
        *call.tokens,
        dim,
        call.grid[0],
        *rows.stride(),
        *strides,
        PREFIX=prefix,
        ACTIVATION=activation,
        **call.matrices,
    )


# The switches that ``dot_precision`` reads, that of the convolutions in their own launches too.
_SWITCHES = torch.backends.cuda.matmul, torch.backends.cudnn.conv


@remembered("adapter forward", *_SWITCHES)
def forward(x: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``large_kernel_adapter_forward_triton``."""
    launches, results = plan_forward(x, *arguments)
    if x.numel():
        run(launches, x.device)
    return results


@remembered("adapter backward", *_SWITCHES)
def backward(grad_output: Tensor, x: Tensor, *arguments) -> tuple[Tensor, ...]:
    """The operator ``large_kernel_adapter_backward_triton``."""
    launches, grads = plan_backward(grad_output, x, *arguments)
    if x.numel():
        run(launches, x.device)
    else:
        grads = [None if grad is None else grad.zero_() for grad in grads]
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)
