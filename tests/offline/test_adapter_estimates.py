"""The launches of the Triton adapter move hardly more than the fewest bytes. Estimates."""

import pytest
import torch

pytest.importorskip("triton")
from adapter_launches import in_two_launches, launches

from benchmarks import roofline
from lka_kernels.backends.triton.estimate import traffic

# Swin-L's and ConvNeXt-L's stages, ViT-L with its class token; batch 64, bfloat16, r 8, K 7.
SHAPES = [
    ((56, 56), 192, 0),
    ((28, 28), 384, 0),
    ((14, 14), 768, 0),
    ((7, 7), 1536, 0),
    ((14, 14), 1024, 1),
]


@pytest.mark.parametrize(("grid", "dim", "prefix"), SHAPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_adapter_moves_hardly_more_than_the_fewest_bytes(grid, dim, prefix, residual):
    forward, backward = launches(
        64, grid, dim, 8, (7, 7), torch.bfloat16, prefix=prefix, residual=residual
    )
    options = {"prefix": prefix, "separate_residual": residual, "element_size": 2}
    fewest = roofline.adapter("forward", 64, grid, dim, 8, (7, 7), **options).bytes
    both = roofline.adapter("forward+backward", 64, grid, dim, 8, (7, 7), **options).bytes
    assert 1.0 <= traffic(forward).memory / fewest <= 1.15
    assert 1.0 <= traffic(backward).memory / (both - fewest) <= 1.25
    assert traffic(forward).launches == 2
    assert traffic(backward).launches == 4  # three and the ordered sum


def test_one_image_takes_one_launch():
    forward, _ = launches(1, (14, 14), 1024, 8, (7, 7), torch.bfloat16, prefix=1)
    assert len(forward) == 1
    with in_two_launches():
        forward, _ = launches(1, (14, 14), 1024, 8, (7, 7), torch.bfloat16, prefix=1)
    assert len(forward) == 2
