"""The Large Kernel Adapter as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lka_kernels import checks
from lka_kernels.functional import large_kernel_adapter

DATA_FORMATS = ("channels_last", "channels_first")


@torch.no_grad()
def identity_convolution_(conv: nn.Conv2d) -> None:
    """Make a depthwise "same" convolution pass its input through, in place.

    With an even kernel and a dilation above 1 the padding falls between two taps; the one before
    is taken, which shifts by less than the dilation.
    """
    height, width = (
        checks.same_padding(size, dilation)[0] // dilation
        for size, dilation in zip(conv.kernel_size, conv.dilation, strict=True)
    )
    nn.init.zeros_(conv.weight)
    conv.weight[:, :, height, width] = 1.0
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)


def _weight_and_bias(module: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    """Those of a layer, by attributes only where something may have taken the parameters' place.

    ``nn.Module.__getattr__`` takes some 0.6 µs: of three layers with two parameters each, more than
    the checks of a call.
    """
    layer = module._modules.get(name)
    if type(layer) in (nn.Linear, nn.Conv2d):
        parameters = layer._parameters
        if "weight" in parameters and "bias" in parameters:
            return parameters["weight"], parameters["bias"]
    layer = getattr(module, name)
    return layer.weight, layer.bias


class FusedLKA(nn.Module):
    """Large Kernel Adapter: down-projection, activation, depthwise convolution, up-projection.

    Follows "LKA: Large Kernel Adapter for Enhanced Medical Image Classification"
    (arXiv 2506.19118). Parameters live in ``down`` (nn.Linear), ``conv`` (nn.Conv2d, one group
    per channel) and ``up`` (nn.Linear); the forward pass runs them as one fused operator.

    Args:
        dim: C, the model width.
        bottleneck_dim: r, the width of the bottleneck.
        kernel_size: int or pair; padding is "same".
        dilation: of the convolution.
        activation, activation_position: as ``functional.large_kernel_adapter``.
        dropout: probability of dropping an element before the up-projection, in training.
        bias: whether the three layers have biases.
        num_prefix_tokens, prefix_mode: P and how the convolution treats class and register tokens.
        scale: factor of the adapter's output.
        init: linear weights are drawn from a truncated normal distribution of deviation 0.02 and
            their biases are 0; the convolution is drawn as ``nn.Conv2d`` draws it. That is
            "paper", as the released code does. "zero" zeroes ``up``, so that a fresh adapter
            changes nothing. "identity" does so too, and sets the tap that meets the output's own
            position to 1 and everything else of the convolution to 0: training begins with the
            adapter without convolution, as in Convpass (arXiv 2207.07039), instead of a random
            K×K filter. (An even kernel with a dilation above 1 has no such tap: the nearest one
            shifts the grid by less than the dilation, and prefix tokens meet no tap.)
        data_format: "channels_last" takes (B, P+N, C) or (B, H, W, C), "channels_first" takes
            (B, C, H, W).

    torch.jit.trace takes it under torch.no_grad() only: with gradients it records a Python
    function, which its second, checking pass does not meet. torch.compile has no such limit.
    """

    def __init__(
        self,
        dim: int,
        bottleneck_dim: int = 8,
        kernel_size=7,
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
        for name, value in (("dim", dim), ("bottleneck_dim", bottleneck_dim)):
            if not checks.is_int(value):
                raise TypeError(f"{name} must be an int; got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1; got {value}")
        kernel_size = checks.pair("kernel_size", kernel_size, minimum=1)
        checks.adapter_options(
            num_prefix_tokens, prefix_mode, dilation, activation, activation_position, scale
        )
        checks.probability("dropout", dropout)
        checks.one_of("init", init, checks.INITS)
        checks.one_of("data_format", data_format, DATA_FORMATS)
        if data_format == "channels_first" and num_prefix_tokens:
            raise ValueError(
                "num_prefix_tokens must be 0 with data_format='channels_first'; "
                f"got {num_prefix_tokens}"
            )
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.dilation = dilation
        self.activation = activation
        self.activation_position = activation_position
        self.dropout = float(dropout)
        self.num_prefix_tokens = num_prefix_tokens
        self.prefix_mode = prefix_mode
        self.scale = float(scale)
        self.init = init
        self.data_format = data_format
        self.down = nn.Linear(dim, bottleneck_dim, bias=bias, **factory)
        self.conv = nn.Conv2d(
            bottleneck_dim,
            bottleneck_dim,
            kernel_size,
            padding="same",
            dilation=dilation,
            groups=bottleneck_dim,
            bias=bias,
            **factory,
        )
        self.up = nn.Linear(bottleneck_dim, dim, bias=bias, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters as ``init`` says."""
        self.conv.reset_parameters()
        for linear in (self.down, self.up):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.init != "paper":
            nn.init.zeros_(self.up.weight)
        if self.init == "identity":
            identity_convolution_(self.conv)

    def forward(
        self,
        x: Tensor,
        grid_size: tuple[int, int] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Apply the adapter.

        Args:
            x: (B, P+N, C), (B, H, W, C) or, with data_format="channels_first", (B, C, H, W).
            grid_size: (H, W) of the token grid; only for tokens that do not form a square.
            residual: the shape of x; added to the result.

        Returns:
            The shape of x.
        """
        channels_first = self.data_format == "channels_first"
        if channels_first:
            checks.is_tensor("x", x)
            if x.dim() != 4:
                raise ValueError(f"x must be (B, C, H, W); got {tuple(x.shape)}")
            if residual is not None:
                checks.is_tensor("residual", residual)
                if residual.shape != x.shape:
                    raise ValueError(
                        f"residual must have the shape of x {tuple(x.shape)}; "
                        f"got {tuple(residual.shape)}"
                    )
            own_residual = residual is x  # large_kernel_adapter makes use of it
            x = x.permute(0, 2, 3, 1)
            if residual is not None:
                residual = x if own_residual else residual.permute(0, 2, 3, 1)
        y = large_kernel_adapter(
            x,
            *_weight_and_bias(self, "down"),
            *_weight_and_bias(self, "conv"),
            *_weight_and_bias(self, "up"),
            grid_size=grid_size,
            num_prefix_tokens=self.num_prefix_tokens,
            prefix_mode=self.prefix_mode,
            dilation=self.dilation,
            activation=self.activation,
            activation_position=self.activation_position,
            dropout_p=self.dropout,
            training=self.training,
            scale=self.scale,
            residual=residual,
        )
        return y.permute(0, 3, 1, 2) if channels_first else y

    def extra_repr(self) -> str:
        return (
            f"activation={self.activation!r}, activation_position={self.activation_position!r}, "
            f"dropout={self.dropout}, num_prefix_tokens={self.num_prefix_tokens}, "
            f"prefix_mode={self.prefix_mode!r}, scale={self.scale}, "
            f"data_format={self.data_format!r}"
        )
