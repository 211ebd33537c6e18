"""The adapters that the Large Kernel Adapter is compared with, and the choice between them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lka_kernels import checks
from lka_kernels.backends.reference import activate, center_tap
from lka_kernels.config import LKAConfig
from lka_kernels.functional import _check_grid
from lka_kernels.modules.depthwise_conv import DepthwiseConv2d
from lka_kernels.modules.large_kernel_adapter import DATA_FORMATS, FusedLKA, identity_convolution_


class _Adapter(nn.Module):
    """Projections, layouts, prefix tokens and dropout, as in ``FusedLKA``; no convolution."""

    def __init__(
        self,
        dim: int,
        bottleneck_dim: int,
        *,
        activation: str,
        dropout: float,
        bias: bool,
        num_prefix_tokens: int,
        prefix_mode: str,
        scale: float,
        init: str,
        data_format: str,
        device,
        dtype,
    ):
        for name, value, least in (
            ("dim", dim, 1),
            ("bottleneck_dim", bottleneck_dim, 1),
            ("num_prefix_tokens", num_prefix_tokens, 0),
        ):
            if not checks.is_int(value):
                raise TypeError(f"{name} must be an int; got {value!r}")
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value}")
        if not 0.0 <= dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1]; got {dropout}")
        checks.one_of("activation", activation, checks.ACTIVATIONS)
        checks.one_of("prefix_mode", prefix_mode, checks.PREFIX_MODES)
        checks.one_of("init", init, checks.INITS)
        checks.one_of("data_format", data_format, DATA_FORMATS)
        if data_format == "channels_first" and num_prefix_tokens:
            raise ValueError(
                "num_prefix_tokens must be 0 with data_format='channels_first'; "
                f"got {num_prefix_tokens}"
            )
        super().__init__()
        self.activation = activation
        self.num_prefix_tokens = num_prefix_tokens
        self.prefix_mode = prefix_mode
        self.scale = float(scale)
        self.init = init
        self.data_format = data_format
        factory = {"device": device, "dtype": dtype}
        self.down = nn.Linear(dim, bottleneck_dim, bias=bias, **factory)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(bottleneck_dim, dim, bias=bias, **factory)
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if bias:
                nn.init.zeros_(linear.bias)
        if init != "paper":
            nn.init.zeros_(self.up.weight)

    def bottleneck(self, z: Tensor, grid_size: tuple[int, int]) -> Tensor:
        """What happens between the projections, on (B, P+N, r) or (B, H, W, r)."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Apply the adapter; arguments, result and errors as ``FusedLKA.forward``."""
        checks.is_tensor("x", x)
        if residual is not None and residual.shape != x.shape:
            raise ValueError(
                f"residual must have the shape of x {tuple(x.shape)}; got {tuple(residual.shape)}"
            )
        if self.data_format == "channels_first":
            if x.dim() != 4:
                raise ValueError(f"x must be (B, C, H, W); got {tuple(x.shape)}")
            y = self._adapt(x.permute(0, 2, 3, 1), grid_size).permute(0, 3, 1, 2)
        else:
            if x.dim() not in (3, 4):
                raise ValueError(f"x must be (B, P+N, C) or (B, H, W, C); got {tuple(x.shape)}")
            y = self._adapt(x, grid_size)
        return y if residual is None else residual + y

    def _adapt(self, x: Tensor, grid_size) -> Tensor:
        z = self.down(x)
        y = self.up(self.dropout(self.bottleneck(z, grid_size)))
        prefix = self.num_prefix_tokens
        if prefix and self.prefix_mode == "zero":
            y = torch.cat([torch.zeros_like(y[:, :prefix]), y[:, prefix:]], dim=1)
        return y if self.scale == 1.0 else y * self.scale

    def extra_repr(self) -> str:
        return (
            f"activation={self.activation!r}, num_prefix_tokens={self.num_prefix_tokens}, "
            f"prefix_mode={self.prefix_mode!r}, scale={self.scale}, "
            f"data_format={self.data_format!r}"
        )


class VanillaAdapter(_Adapter):
    """Down-projection, activation, dropout, up-projection: an adapter that does not mix tokens.

    The baseline "no convolution" of arXiv 2506.19118, 2rC + r + C parameters, after Houlsby et
    al., "Parameter-Efficient Transfer Learning for NLP" (ICML 2019).

    Args:
        dim, bottleneck_dim, activation, dropout, bias, num_prefix_tokens, prefix_mode, scale,
            init, data_format, device, dtype: as ``FusedLKA``. A token meets no other, so the
            prefix modes "center_tap" and "skip" are the same here.
    """

    def __init__(
        self,
        dim: int,
        bottleneck_dim: int = 8,
        *,
        activation: str = "gelu",
        dropout: float = 0.0,
        bias: bool = True,
        num_prefix_tokens: int = 0,
        prefix_mode: str = "center_tap",
        scale: float = 1.0,
        init: str = "zero",
        data_format: str = "channels_last",
        device=None,
        dtype=None,
    ):
        super().__init__(
            dim,
            bottleneck_dim,
            activation=activation,
            dropout=dropout,
            bias=bias,
            num_prefix_tokens=num_prefix_tokens,
            prefix_mode=prefix_mode,
            scale=scale,
            init=init,
            data_format=data_format,
            device=device,
            dtype=dtype,
        )

    def bottleneck(self, z: Tensor, grid_size) -> Tensor:
        """The activation alone; the grid does not matter."""
        return activate(z, self.activation)


class StackedLKA(_Adapter):
    """The Large Kernel Adapter with several depthwise convolutions in a row.

    The "three stacked 3×3" receptive-field recipe of arXiv 2506.19118; no activation stands
    between the convolutions, so that together they are one linear map with the receptive field
    1 + num_stacked·dilation·(K - 1).

    Args:
        num_stacked: number of convolutions, at least 1; they live in ``convs``.
        dim, bottleneck_dim, kernel_size, dilation, activation, activation_position, dropout,
            bias, num_prefix_tokens, prefix_mode, scale, init, data_format, device, dtype: as
            ``FusedLKA``.
    """

    def __init__(
        self,
        dim: int,
        bottleneck_dim: int = 8,
        kernel_size=3,
        num_stacked: int = 3,
        *,
        dilation: int = 1,
        activation: str = "gelu",
        activation_position: str = "pre",
        dropout: float = 0.0,
        bias: bool = True,
        num_prefix_tokens: int = 0,
        prefix_mode: str = "center_tap",
        scale: float = 1.0,
        init: str = "zero",
        data_format: str = "channels_last",
        device=None,
        dtype=None,
    ):
        if not checks.is_int(num_stacked):
            raise TypeError(f"num_stacked must be an int; got {num_stacked!r}")
        if num_stacked < 1:
            raise ValueError(f"num_stacked must be at least 1; got {num_stacked}")
        checks.one_of("activation_position", activation_position, checks.ACTIVATION_POSITIONS)
        super().__init__(
            dim,
            bottleneck_dim,
            activation=activation,
            dropout=dropout,
            bias=bias,
            num_prefix_tokens=num_prefix_tokens,
            prefix_mode=prefix_mode,
            scale=scale,
            init=init,
            data_format=data_format,
            device=device,
            dtype=dtype,
        )
        self.activation_position = activation_position
        self.convs = nn.ModuleList(
            DepthwiseConv2d(
                bottleneck_dim,
                kernel_size,
                padding="same",
                dilation=dilation,
                bias=bias,
                device=device,
                dtype=dtype,
            )
            for _ in range(num_stacked)
        )
        if init == "identity":
            for conv in self.convs:
                identity_convolution_(conv)

    def bottleneck(self, z: Tensor, grid_size) -> Tensor:
        """Activation and convolutions, on tokens (B, P+N, r) or a map (B, H, W, r)."""
        a = activate(z, self.activation) if self.activation_position != "post" else z
        height, width = _check_grid(z, grid_size, self.num_prefix_tokens)
        tokens = a.flatten(1, 2) if a.dim() == 4 else a
        prefix, grid = tokens[:, : self.num_prefix_tokens], tokens[:, self.num_prefix_tokens :]
        image = grid.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        for conv in self.convs:
            image = conv(image)
            if self.prefix_mode == "center_tap":
                prefix = _convolve_prefix(prefix, conv)
        grid = image.permute(0, 2, 3, 1).flatten(1, 2)
        c = torch.cat([prefix.to(grid.dtype), grid], dim=1) if self.num_prefix_tokens else grid
        c = c.view(z.shape) if z.dim() == 4 else c
        return activate(c, self.activation) if self.activation_position != "pre" else c


def _convolve_prefix(prefix: Tensor, conv: DepthwiseConv2d) -> Tensor:
    """Convolve each prefix token (B, P, r) as a 1×1 image: one tap and the bias."""
    tap = center_tap(conv.weight, conv.dilation[0])
    prefix = prefix * (0 if tap is None else tap)
    return prefix if conv.bias is None else prefix + conv.bias


def build_adapter(
    config: LKAConfig,
    dim: int,
    *,
    num_prefix_tokens: int = 0,
    data_format: str = "channels_last",
    device=None,
    dtype=None,
) -> nn.Module:
    """The adapter that ``config`` describes, for a model of width ``dim``.

    Returns:
        ``FusedLKA`` for conv "depthwise" and "dilated", ``StackedLKA`` for "stacked",
        ``VanillaAdapter`` for "none": modules called as adapter(x, grid_size, residual).
    """
    common = {
        "activation": config.activation,
        "dropout": config.dropout,
        "num_prefix_tokens": num_prefix_tokens,
        "scale": config.scale,
        "init": config.init,
        "data_format": data_format,
        "device": device,
        "dtype": dtype,
    }
    if config.conv == "none":
        # With nothing between them, the two activation positions are one.
        return VanillaAdapter(dim, config.bottleneck_dim, **common)
    common["dilation"] = config.dilation
    common["activation_position"] = config.activation_position
    if config.conv == "stacked":
        return StackedLKA(
            dim, config.bottleneck_dim, config.kernel_size, config.num_stacked, **common
        )
    return FusedLKA(dim, config.bottleneck_dim, config.kernel_size, **common)
