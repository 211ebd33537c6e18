"""Launches that real networks would get: pure functions of sizes, strides and addresses."""

import on_cpu
import pytest
import torch
from stride_one_cases import same

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="no C++ compiler")


def plan(case, direction: str = "forward", multiprocessors: int = 132, address: int = 1024):
    format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    maps = [
        torch.empty(shape, dtype=torch.float16, device="meta", memory_format=format)
        for shape in (case.shape, case.output_shape)
    ]
    call = on_cpu.params(*maps, case.kernel, case.padding, case.dilation)
    call.input.data = call.output.data = address
    return on_cpu.plan(call, direction, multiprocessors)


DIRECTIONS = ["forward", "backward_input", "backward_weight"]
NETWORKS = {
    "ConvNeXt stage 1": same(64, 192, 56, 56, (7, 7)),
    "ConvNeXt stage 4": same(64, 1536, 7, 7, (7, 7)),
    "RepLKNet stage 1": same(64, 128, 56, 56, (31, 31)),
    "RepLKNet stage 3": same(64, 512, 14, 14, (27, 27)),
    "SLaK": same(64, 96, 56, 56, (51, 5)),
    "SLaK square": same(64, 96, 56, 56, (51, 51)),
    "weather": same(1, 1536, 90, 180, (7, 7)),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks_are_served(network, layout, direction):
    """Within the 99 KiB that a block may have on 8.6, and with enough blocks to fill a GPU."""
    found = plan(NETWORKS[network]._replace(layout=layout), direction)
    assert found["shared"] <= 99 * 1024
    assert found["threads"] in (64, 128, 256)
    assert found["blocks"] >= 132


def test_channels_last_takes_eight_channels_a_block():
    case = same(64, 192, 56, 56, (7, 7))
    assert plan(case)["threads"] == 128
    assert plan(case._replace(layout="channels_last"))["threads"] == 256


def test_more_multiprocessors_more_groups():
    case = same(64, 8, 56, 56, (7, 7))
    few, many = (plan(case, "backward_weight", n)["blocks"] for n in (16, 132))
    assert few < many <= 8 * 132


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_sizes_beyond_32_bits_are_refused(direction):
    with pytest.raises(RuntimeError, match=r"more than 2\^24 elements in one dimension"):
        plan(same(1, 1, 2, 2**25, (3, 3)), direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_does_not_fit_is_refused_and_not_wrapped_around(direction):
    """Sizes of shared memory beyond 32 bits."""
    wide = same(64, 1, 5, 2**20, (40, 40), (1, 2**18))
    with pytest.raises(RuntimeError, match="fit shared memory"):
        plan(wide, direction)
    high = same(64, 1, 2**22, 5, (40, 40), (2**18, 1))
    if direction == "backward_weight":
        with pytest.raises(RuntimeError, match="fit shared memory"):
            plan(high, direction)


def test_large_kernels_in_channels_last_keep_eight_channels():
    case = same(64, 128, 56, 56, (31, 31), layout="channels_last")
    assert plan(case)["threads"] == 256
