"""The launches of the Triton adapter move hardly more than the fewest bytes. Estimates."""

import pytest
import torch

pytest.importorskip("triton")
from adapter_launches import in_two_launches, launches

from benchmarks import roofline, shapes
from lka_kernels.backends.triton.estimate import traffic
from lka_kernels.backends.triton.estimate_work import products

# Swin-L's and ConvNeXt-L's stages, ViT-L with its class token; batch 64, bfloat16, r 8, K 7.
# And the launches of forward and backward: two, and four with the ordered sum; of many tokens the
# convolution has one of its own, its gradients two in place of one, and prefix tokens one more.
SHAPES = [
    ((56, 56), 192, 0, (3, 5)),
    ((28, 28), 384, 0, (3, 5)),
    ((14, 14), 768, 0, (2, 5)),
    ((7, 7), 1536, 0, (2, 4)),
    ((14, 14), 1024, 1, (2, 6)),
]


@pytest.mark.parametrize(("grid", "dim", "prefix", "counts"), SHAPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_adapter_moves_hardly_more_than_the_fewest_bytes(grid, dim, prefix, counts, residual):
    forward, backward = launches(
        64, grid, dim, 8, (7, 7), torch.bfloat16, prefix=prefix, residual=residual
    )
    options = {"prefix": prefix, "separate_residual": residual, "element_size": 2}
    fewest = roofline.adapter("forward", 64, grid, dim, 8, (7, 7), **options).bytes
    both = roofline.adapter("forward+backward", 64, grid, dim, 8, (7, 7), **options).bytes
    assert 1.0 <= traffic(forward).memory / fewest <= 1.15
    # 1.25 is wanted; on 56² tiles of half as many tokens, measured to be faster, have twice the
    # partial sums, which then are supposed not to stay in the cache.
    assert 1.0 <= traffic(backward).memory / (both - fewest) <= (1.35 if grid == (56, 56) else 1.25)
    assert (traffic(forward).launches, traffic(backward).launches) == counts


def test_one_image_takes_one_launch():
    forward, _ = launches(1, (14, 14), 1024, 8, (7, 7), torch.bfloat16, prefix=1)
    assert len(forward) == 1
    with in_two_launches():
        forward, _ = launches(1, (14, 14), 1024, 8, (7, 7), torch.bfloat16, prefix=1)
    assert len(forward) == 2


# Every shape that is measured on a GPU, batches of 1 to 128, with a residual of its own.
BENCHMARKED = shapes.selected(shapes.ADAPTER, "full", "cuda")


@pytest.mark.parametrize("shape", BENCHMARKED, ids=lambda shape: shape.name)
def test_every_benchmark_against_its_floor(shape):
    grid, kernel = (shape.side, shape.side), (shape.kernel, shape.kernel)
    arguments = (shape.batch, grid, shape.dim, shape.rank, kernel)
    options = {"prefix": shape.prefix, "separate_residual": True, "element_size": 2}
    fewest = roofline.adapter("forward", *arguments, **options)
    both = roofline.adapter("forward+backward", *arguments, **options)
    forward, backward = launches(*arguments, torch.bfloat16, prefix=shape.prefix)
    moved, moved_back = traffic(forward), traffic(backward)
    assert moved.launches <= 3  # a long convolution has its own
    # Three and a sum; two more for the projections' weights of large ranks; a convolution apart has
    # one for each gradient, and one more where prefix tokens meet a tap.
    assert moved_back.launches <= 8
    rank_tensor = 2 * shape.batch * (shape.prefix + shape.side**2) * shape.rank
    # z, a and c are written, a read, and c where the convolution has a launch of its own. With
    # prefix tokens a and the taps count twice, though these meet little of them.
    again = rank_tensor + 2 * shape.rank * shape.kernel**2 if shape.prefix else 0
    assert fewest.bytes <= moved.memory <= fewest.bytes + 5.01 * rank_tensor + again
    fewest_back = both.bytes - fewest.bytes
    assert moved_back.memory >= fewest_back
    if shape.rank <= 8:
        assert moved.memory <= 1.15 * fewest.bytes
        most = 1.35 if shape.batch <= 64 else 1.55
        if shape.kernel > 2 * shape.side:
            # Partial sums have room, which counts, for taps that never touch the map.
            most = 4.1
        assert moved_back.memory <= most * fewest_back
    # No multiply-add is left out; the tensor cores make as many for a rank of 4 as for 16.
    made, needed = sum(products(forward)), fewest.flops / 2
    made_back, needed_back = sum(products(backward)), (both.flops - fewest.flops) / 2
    assert made >= needed
    assert made_back >= needed_back
    if shape.batch == 64 and shape.rank >= 8:
        assert made <= 4 * needed
        assert made_back <= 3.2 * needed_back
