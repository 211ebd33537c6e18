"""Closeness to a float64 truth, judged by the error that torch itself makes at the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# Absolute term in units of eps × magnitude. Results of 16-bit types are sums in float32 that are
# rounded once, half an eps; sums in wider types are rounded at every addition.
_ABSOLUTE = {torch.float32: 4.0, torch.float64: 4.0, torch.bfloat16: 0.5, torch.float16: 0.5}


def assert_close_to_truth(
    name: str,
    actual: Tensor,
    truth: Tensor,
    torch_result: Tensor | None = None,
    *,
    magnitude: float = 0.0,
    factor: float = 2.0,
    absolute: float | None = None,
) -> None:
    """Fail unless ``actual`` is at most ``factor`` times as far from ``truth`` as torch is.

    Args:
        name: which tensor, for the message.
        truth: float64.
        torch_result: what torch returns at the dtype of ``actual``; None allows the absolute
            term alone.
        magnitude: how large the terms make the result, where ``truth`` may cancel to less.
        absolute: added to the allowance, in units of eps × max(|truth|, magnitude); the default
            follows the dtype.
    """
    assert truth.dtype == torch.float64, f"{name}: the truth must be float64"
    assert actual.shape == truth.shape, f"{name}: shape {actual.shape} instead of {truth.shape}"
    if torch_result is not None:
        assert actual.dtype == torch_result.dtype, (
            f"{name}: dtype {actual.dtype} instead of {torch_result.dtype}"
        )
    if truth.numel() == 0:
        return
    difference = (actual.double() - truth).abs()
    bad = ~difference.isfinite()
    assert not bad.any(), (
        f"{name}: {int(bad.sum())} of {bad.numel()} elements are not finite, first at "
        f"{bad.nonzero()[0].tolist()}"
    )
    error = float(difference.max())
    reference_error = 0.0
    if torch_result is not None:
        reference_error = float((torch_result.double() - truth).abs().max())
    if absolute is None:
        absolute = _ABSOLUTE[actual.dtype]
    unit = torch.finfo(actual.dtype).eps * max(float(truth.abs().max()), magnitude)
    allowed = factor * reference_error + absolute * unit
    if error > allowed:
        worst = int(difference.argmax())
        index = torch.unravel_index(torch.tensor(worst), difference.shape)
        raise AssertionError(
            f"{name} ({actual.dtype}, shape {tuple(actual.shape)}): error {error:.3e} at "
            f"{[int(i) for i in index]} (got {float(actual.flatten()[worst]):.6g}, truth "
            f"{float(truth.flatten()[worst]):.6g}) is more than {allowed:.3e} = {factor} × "
            f"torch's error {reference_error:.3e} + {absolute} eps × magnitude; "
            f"{int((difference > allowed).sum())} of {difference.numel()} elements are off"
        )
