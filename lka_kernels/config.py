"""The settings of the adapters that ``add_adapters`` puts into a model."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lka_kernels import checks

CONVS = ("depthwise", "dilated", "stacked", "none")
PLACEMENTS = ("parallel", "before_residual", "after_residual")
SITES = ("attn", "mlp")


@dataclass(frozen=True)
class LKAConfig:
    """Which adapter to put where; checked on construction and immutable.

    The defaults are those of "LKA: Large Kernel Adapter for Enhanced Medical Image
    Classification" (arXiv 2506.19118), but for ``init``, which there is "paper".

    Args:
        bottleneck_dim: r, the width of the bottleneck, at least 1.
        kernel_size: K, an int or a pair (height, width), each at least 1. Unused by
            ``conv="none"``.
        conv: what stands between the projections: "depthwise", one depthwise convolution;
            "dilated", the same with ``dilation``; "stacked", ``num_stacked`` of them in a row;
            "none", nothing (the vanilla adapter).
        dilation: at least 1; above 1 only with ``conv`` "dilated" or "stacked".
        num_stacked: number of convolutions, at least 1; above 1 only with ``conv="stacked"``.
        placement: "parallel" (paper (a)), "before_residual" (b) or "after_residual" (c).
        sites: "attn", "mlp" or both: the branches of a block that get an adapter.
        activation: "gelu", "gelu_tanh", "relu", "silu" or "none".
        activation_position: "pre", "post" or "both", relative to the convolution.
        dropout: probability in [0, 1] of dropping an element before the up-projection.
        scale: finite factor of the adapter's output.
        init: "zero" (a fresh adapter changes nothing), "identity" (neither does it, and its
            convolution passes everything through) or "paper" (truncated normal, 0.02).

    Raises:
        TypeError, ValueError: an argument has the wrong type or value; the message names it.
    """

    bottleneck_dim: int = 8
    kernel_size: int | tuple[int, int] = 7
    conv: str = "depthwise"
    dilation: int = 1
    num_stacked: int = 1
    placement: str = "parallel"
    sites: tuple[str, ...] = SITES
    activation: str = "gelu"
    activation_position: str = "pre"
    dropout: float = 0.1
    scale: float = 1.0
    init: str = "zero"

    def __post_init__(self):
        for name in ("bottleneck_dim", "dilation", "num_stacked"):
            _check_count(name, getattr(self, name))
        height, width = checks.pair("kernel_size", self.kernel_size, minimum=1)
        # One spelling for each setting, so that equality means the same adapters.
        self._set("kernel_size", height if height == width else (height, width))
        for name, accepted in (
            ("conv", CONVS),
            ("placement", PLACEMENTS),
            ("activation", checks.ACTIVATIONS),
            ("activation_position", checks.ACTIVATION_POSITIONS),
            ("init", checks.INITS),
        ):
            checks.one_of(name, getattr(self, name), accepted)
        if self.dilation > 1 and self.conv not in ("dilated", "stacked"):
            raise ValueError(
                "dilation above 1 needs conv='dilated' or conv='stacked'; got "
                f"dilation={self.dilation} with conv={self.conv!r}"
            )
        if self.num_stacked > 1 and self.conv != "stacked":
            raise ValueError(
                "num_stacked above 1 needs conv='stacked'; got "
                f"num_stacked={self.num_stacked} with conv={self.conv!r}"
            )
        self._set("sites", _checked_sites(self.sites))
        self._set("dropout", _checked_number("dropout", self.dropout))
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1]; got {self.dropout!r}")
        self._set("scale", _checked_number("scale", self.scale))

    def _set(self, name: str, value) -> None:
        """Write a field during construction; the instance is frozen afterwards."""
        object.__setattr__(self, name, value)

    def to_dict(self) -> dict:
        """The fields as a dictionary of JSON types."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping) -> LKAConfig:
        """The configuration of a dictionary as ``to_dict`` writes it; missing fields are defaults.

        Raises:
            TypeError: ``fields`` is not a mapping.
            ValueError: a key is not a field, or a value is not accepted.
        """
        if not isinstance(fields, Mapping):
            raise TypeError(f"fields must be a mapping; got {type(fields).__name__}")
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [key for key in fields if key not in known]
        if unknown:
            raise ValueError(
                f"fields has unknown keys {', '.join(map(repr, unknown))}; accepted are "
                f"{', '.join(map(repr, known))}"
            )
        return cls(**fields)

    def to_json(self) -> str:
        """The fields as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> LKAConfig:
        """The configuration of JSON text as ``to_json`` writes it.

        Raises:
            ValueError: the text is not JSON, or as ``from_dict``.
        """
        return cls.from_dict(json.loads(text))


def _check_count(name: str, value) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int; got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1; got {value}")


def _checked_number(name: str, value) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number; got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite; got {value!r}")
    return float(value)


def _checked_sites(sites) -> tuple[str, ...]:
    if isinstance(sites, str) or not isinstance(sites, (tuple, list, set, frozenset)):
        raise TypeError(f"sites must be a tuple of names; got {sites!r}")
    for site in sites:
        checks.one_of("sites", site, SITES)
    if not sites or len(set(sites)) != len(sites):
        raise ValueError(f"sites must name 'attn', 'mlp' or both, each once; got {sites!r}")
    return tuple(site for site in SITES if site in sites)
