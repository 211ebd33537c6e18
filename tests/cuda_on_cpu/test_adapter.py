"""The fused adapter's CUDA kernels, run by fibers, against the specification in float64."""

from __future__ import annotations

import dataclasses

import adapter_on_cpu
import on_cpu
import pytest
import torch
from adapter_cases import DEFINED, NAMES, AdapterCase, adapter_cases
from closeness import assert_close_to_truth
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lka_kernels import philox
from lka_kernels.backends import reference
from lka_kernels.checks import PREFIX_MODES

pytestmark = pytest.mark.skipif(on_cpu.compiler() is None, reason="no C++ compiler")
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SEED = torch.tensor([-(2**40) + 12345])
ALL = [True] * 7


def _tokens(t):
    return t.flatten(1, 2) if t is not None and t.dim() == 4 else t


def _options(case: AdapterCase) -> tuple:
    return (
        *(case.prefix, case.prefix_mode, case.dilation, case.activation, case.position),
        *(case.dropout, case.scale),
    )


def specified(case: AdapterCase, tensors: dict, grad_output, own_residual=False) -> dict:
    """Output and gradients by the specification; x's own residual is part of its gradient."""
    leaves = {k: None if t is None else t.detach().requires_grad_() for k, t in tensors.items()}
    x, *weights, residual = leaves.values()
    x = _tokens(x)
    seed = SEED if case.dropout > 0 else None
    residual = x if own_residual else _tokens(residual)
    with torch.backends.mkldnn.flags(enabled=False):
        output = reference.large_kernel_adapter(
            x, *weights, residual, seed, case.grid, *_options(case)
        )
        wanted = {k: t for k, t in leaves.items() if t is not None and k != "residual"}
        grads = torch.autograd.grad(output, list(wanted.values()), grad_output)
    found = dict(zip(wanted, grads, strict=True))
    found["x"] = _tokens(found["x"])
    return {"output": output.detach(), **found}


def ours(case: AdapterCase, tensors: dict, grad_output, own_residual=False, mask=None, **more):
    """Output and gradients by the kernels."""
    x, *weights, residual = tensors.values()
    x, residual = _tokens(x), _tokens(residual)
    weights = [None if t is None else t.contiguous() for t in weights]
    seed = SEED if case.dropout > 0 else None
    options = (*case.grid, *_options(case))
    y, z, c = adapter_on_cpu.forward(
        x, weights, x if own_residual else residual, seed, *options, **more
    )
    grads = adapter_on_cpu.backward(
        grad_output, x, z, c, weights, seed, *options,
        residual_is_x=own_residual, mask=mask or ALL, **more,
    )  # fmt: skip
    names = NAMES[: len(grads)]
    found = {n: g for n, g in zip(names, grads, strict=True) if tensors[n] is not None}
    return {"output": y, **found}


def check(case: AdapterCase, dtype: torch.dtype, own_residual=False, **more) -> dict:
    tensors = case.tensors(dtype)
    tokens = _tokens(tensors["x"])
    grad_output = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    if case.layout == "channels_first":
        grad_output = grad_output.transpose(1, 2).contiguous().transpose(1, 2)
    wide = {name: None if t is None else t.double() for name, t in tensors.items()}
    theirs = specified(case, tensors, grad_output, own_residual)
    truth = specified(case, wide, grad_output.double(), own_residual)
    found = ours(case, tensors, grad_output, own_residual, **more)
    for name, value in found.items():
        if value is None:
            continue
        assert_close_to_truth(
            name, value, truth[name].reshape(value.shape), theirs[name].reshape(value.shape),
            magnitude=case.magnitudes[name] * max(1.0, abs(case.scale)),
        )  # fmt: skip
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", DEFINED, ids=str)
def test_defined_cases(case, dtype):
    check(case, dtype)


CASES = {
    "class token": AdapterCase(2, 40, 8, (14, 14), (7, 7), prefix=1, dropout=0.1, residual=True),
    "several steps": AdapterCase(1, 150, 8, (9, 11), (5, 5), residual=True, layout="map"),
    "odd everything": AdapterCase(3, 45, 5, (17, 19), (9, 4), dropout=0.3, position="both"),
    "two warps of the rank": AdapterCase(1, 70, 37, (6, 9), (3, 5), dropout=0.2, residual=True),
    "four warps": AdapterCase(1, 24, 100, (5, 8), (3, 3), position="post"),
    "largest rank": AdapterCase(1, 20, 256, (4, 5), (5, 5), dropout=0.5, residual=True),
    "eight warps, odd": AdapterCase(1, 17, 201, (3, 7), (3, 3), position="both"),
    "rank of whole tiles": AdapterCase(2, 32, 16, (8, 8), (3, 3), layout="channels_first"),
    "largest kernel": AdapterCase(1, 18, 4, (12, 50), (91, 91), residual=True),
    "parts of rows": AdapterCase(1, 12, 3, (3, 150), (3, 9), layout="map"),
    "parts of rows, first": AdapterCase(1, 12, 3, (3, 144), (3, 5), layout="channels_first"),
    "kernel rows in turn": AdapterCase(1, 8, 2, (60, 120), (91, 7), layout="map"),
    "dilated": AdapterCase(2, 12, 6, (13, 16), (3, 5), dilation=4, prefix=2, residual=True),
    "wide and dilated": AdapterCase(1, 10, 4, (4, 64), (2, 20), dilation=3),
    "weights apart": AdapterCase(6, 70, 40, (12, 12), (3, 3), dropout=0.2, residual=True),
    "weights apart, largest": AdapterCase(9, 90, 256, (6, 9), (3, 3), layout="channels_first"),
    "weights apart, zero": AdapterCase(
        5, 70, 130, (6, 8), (3, 3), prefix=3, prefix_mode="zero", position="both"
    ),
    "planes": AdapterCase(6, 8, 20, (18, 33), (7, 7), dropout=0.1, residual=True),
    "planes, class token": AdapterCase(2, 8, 20, (18, 33), (7, 7), prefix=1, position="both"),
    "tensor cores": AdapterCase(2, 8, 20, (9, 10), (7, 7), dropout=0.1, residual=True),
    "tensor cores, post": AdapterCase(2, 8, 20, (9, 10), (7, 7), position="post", layout="map"),
    "tensor cores, class token": AdapterCase(2, 8, 20, (9, 16), (7, 31), prefix=1),
    "tensor cores, skip": AdapterCase(2, 8, 20, (9, 10), (7, 7), prefix=2, prefix_mode="skip"),
    "tensor cores, zero": AdapterCase(2, 8, 20, (9, 10), (7, 7), prefix=2, prefix_mode="zero"),
    "tensor cores, odd prefix": AdapterCase(2, 8, 20, (3, 7), (5, 9), prefix=3, dropout=0.1),
    "tensor cores, whole prefix": AdapterCase(2, 8, 20, (4, 8), (5, 9), prefix=8),
    "tensor cores, prefix tiles": AdapterCase(1, 8, 20, (4, 9), (5, 9), prefix=131),
    "tensor cores, rows": AdapterCase(1, 4, 3, (9, 90), (9, 9), prefix=1),
    "a token alone": AdapterCase(1, 13, 3, (1, 1), (3, 3), residual=True),
    "a channel alone": AdapterCase(1, 1, 3, (3, 5), (3, 3), layout="channels_first"),
    "prefix tiles": AdapterCase(1, 12, 3, (3, 4), (3, 3), prefix=131, prefix_mode="center_tap"),
    **{
        f"{mode} of many": AdapterCase(3, 24, 4, (4, 4), (3, 3), prefix=3, prefix_mode=mode)
        for mode in PREFIX_MODES
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_cases(name, dtype, multiprocessors):
    """On a small device blocks have several tiles, on a large one a tile has fewer tokens."""
    check(CASES[name], dtype, multiprocessors=multiprocessors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["tokens", "channels_first", "sliced"])
@pytest.mark.parametrize("grid", [(4, 8), (7, 5)], ids=str)
@pytest.mark.parametrize("dim", [32, 13])
def test_own_residual(layout, dtype, grid, dim):
    """grad_output is part of x's gradient, whatever layouts they come in."""
    check(AdapterCase(2, dim, 8, grid, layout=layout), dtype, own_residual=True)


# Ranks that are narrow and channels in whole fragments.
NARROW_FORWARD = {
    "network": AdapterCase(3, 96, 8, (14, 14), (7, 7), residual=True),
    "class token": AdapterCase(3, 64, 8, (7, 8), (7, 7), prefix=1, dropout=0.1, residual=True),
    "rank of a pair": AdapterCase(1, 32, 2, (5, 9), (3, 5), position="both"),
    "half a tile of ranks": AdapterCase(2, 32, 4, (9, 5), (5, 5), position="post", scale=-0.5),
    "odd tile of ranks": AdapterCase(2, 160, 14, (5, 5), (3, 3), residual=True),
    "two tiles of ranks": AdapterCase(2, 64, 16, (9, 8), (5, 3), residual=True, prefix=2),
    "many channels": AdapterCase(1, 1056, 8, (3, 5), (3, 3), residual=True),
    "image in a fragment": AdapterCase(9, 32, 8, (1, 3), (3, 3), residual=True),
    "dense": AdapterCase(2, 32, 16, (9, 10), (7, 7), residual=True, prefix=3),
    "dilated": AdapterCase(2, 32, 6, (13, 16), (3, 5), dilation=3),
    "prefix tiles": AdapterCase(1, 32, 4, (3, 4), (3, 3), prefix=300, residual=True),
    **{
        mode: AdapterCase(3, 64, 8, (4, 5), (3, 3), prefix=3, prefix_mode=mode, residual=True)
        for mode in PREFIX_MODES
    },
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", NARROW_FORWARD)
@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_narrow_ranks_forward(name, dtype, multiprocessors):
    """By the kernels for them, whose fragments lie in registers."""
    case = NARROW_FORWARD[name]
    check(case, dtype, multiprocessors=multiprocessors)
    check(case, dtype, own_residual=True, multiprocessors=multiprocessors)
    launches = plan_of(case, dtype, False)
    assert {"narrow_down", "narrow_up"} <= launches.keys()
    assert not launches.keys() & {"down", "up"}


@pytest.mark.parametrize("dim", [32, 40])
def test_tokens_between_others(dim):
    """Rows of a wider tensor, at 16 bytes and not."""
    case = AdapterCase(2, dim, 8, (5, 6), layout="sliced")
    check(case, torch.bfloat16)


NARROW = {
    "few tokens": AdapterCase(1, 32, 2, (4, 4)),
    "odd images": AdapterCase(5, 64, 4, (7, 7), scale=0.5),
    "a class token": AdapterCase(3, 96, 8, (6, 6), prefix=1, position="post", biases=False),
    "even, dropped": AdapterCase(3, 96, 8, (8, 6), dropout=0.2, activation="silu"),
    "activated twice": AdapterCase(4, 160, 6, (5, 5), position="both", dropout=0.3, scale=-2.0),
    "skipped prefix": AdapterCase(2, 128, 8, (5, 7), prefix=3, prefix_mode="skip"),
    "zeroed prefix": AdapterCase(3, 32, 8, (5, 7), prefix=19, prefix_mode="zero", scale=3.0),
    "zeroed, activated": AdapterCase(
        3, 64, 10, (5, 6), prefix=2, prefix_mode="zero", position="post"
    ),
    "six warps": AdapterCase(2, 384, 8, (7, 7)),
    "seven warps, one half": AdapterCase(2, 416, 8, (6, 5), position="both", dropout=0.1),
    "four units, not all": AdapterCase(2, 1056, 4, (5, 5)),
    "four units, activated": AdapterCase(1, 1088, 8, (5, 7), position="post"),
    "two tiles of the rank": AdapterCase(3, 96, 14, (7, 5), dropout=0.2),
    "two tiles, even": AdapterCase(3, 64, 12, (6, 4), position="both"),
    "two tiles, seven warps": AdapterCase(1, 416, 16, (7, 6), position="post"),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("multiprocessors", [1, 8])
def test_narrow_ranks(name, dtype, multiprocessors):
    """In kernels of their own: runs of several tiles and rows of warps, or a tile for a block."""
    case = NARROW[name]
    call = adapter_on_cpu.without_memory(case, dtype)
    found = adapter_on_cpu.plan(call, True, multiprocessors)
    assert {"narrow_up", "narrow_down"} <= found.keys()
    assert not found.keys() & {"up", "up_weight", "down", "down_weight"}
    own = multiprocessors > 1
    check(case, dtype, own_residual=own, multiprocessors=multiprocessors)


@pytest.mark.parametrize("position", ["pre", "post"])
@pytest.mark.parametrize("only", range(7))
def test_gradients_of_narrow_ranks_that_are_asked_for(position, only):
    case = AdapterCase(5, 64, 8, (5, 7), dropout=0.2, position=position)
    for asked in (True, False):
        mask = [(i == only) == asked for i in range(7)]
        found = check(case, torch.bfloat16, own_residual=True, mask=mask, multiprocessors=1)
        assert [found[name] is not None for name in NAMES[:7]] == mask


def test_one_narrow_projection_alone():
    """Other kernels have x that is not in whole fragments, and ranks whose sums are too many."""
    case = AdapterCase(2, 32, 4, (4, 8), layout="sliced")
    call = adapter_on_cpu.without_memory(dataclasses.replace(case, layout="tokens"), torch.float16)
    call.x.stride_c = 2
    found = adapter_on_cpu.plan(call, True)
    assert {"narrow_up", "down"} <= found.keys()
    check(case, torch.float16)
    case = AdapterCase(1, 1056, 16, (4, 5))
    assert {"up", "narrow_down"} <= plan_of(case, torch.float16, True).keys()
    check(case, torch.float16)


def test_what_narrow_kernels_do_not_serve():
    case = AdapterCase(2, 64, 8, (7, 7))
    narrow = {"narrow_up", "narrow_down"}
    for other, dtype in (
        (case, torch.float32),
        (dataclasses.replace(case, dim=48), torch.bfloat16),
        (dataclasses.replace(case, r=7), torch.bfloat16),
        (dataclasses.replace(case, r=18), torch.bfloat16),
        (dataclasses.replace(case, grid=(3, 5)), torch.bfloat16),
        (dataclasses.replace(case, batch=2**20, dim=96), torch.bfloat16),
    ):
        assert not plan_of(other, dtype, True).keys() & narrow
    assert narrow <= plan_of(case, torch.bfloat16, True).keys()
    # A block of the first has all channels, in 16 warps.
    for dim, served in ((2048, narrow), (2080, {"narrow_down"})):
        found = plan_of(dataclasses.replace(case, dim=dim), torch.bfloat16, True)
        assert found.keys() & narrow == served


@settings(max_examples=30)
@given(
    adapter_cases(longest_side=9, largest_kernel=5),
    st.integers(1, 4),
    st.integers(1, 8),
    st.sampled_from((torch.float16, torch.bfloat16)),
    st.sampled_from((1, 8)),
    st.booleans(),
)
def test_random_narrow_cases(case, units, pairs, dtype, multiprocessors, own_residual):
    assume(case.batch > 0 and case.activation != "relu")  # as below
    case = dataclasses.replace(case, dim=32 * units, r=2 * pairs)
    check(case, dtype, own_residual=own_residual, multiprocessors=multiprocessors)


@settings(max_examples=40)
@given(
    adapter_cases(most_channels=80, longest_side=19),
    st.sampled_from(DTYPES),
    st.sampled_from((1, 8, 132)),
)
def test_random_cases(case, dtype, multiprocessors):
    assume(case.batch > 0)  # of none nothing is launched
    # Where its argument is rounded across zero, the slope of relu jumps.
    assume(case.activation != "relu" or dtype == torch.float32)
    check(case, dtype, multiprocessors=multiprocessors)


@pytest.mark.parametrize("layout", ["tokens", "channels_first"])
@pytest.mark.parametrize("rank", [5, 40])
@pytest.mark.parametrize("only", range(7))
def test_gradients_that_are_asked_for(layout, rank, only):
    """Alone, and all but one; in launches of its own for the larger rank."""
    case = AdapterCase(5, 20, rank, (6, 8), dropout=0.2, layout=layout)
    for asked in (True, False):
        mask = [(i == only) == asked for i in range(7)]
        found = check(case, torch.float16, mask=mask, multiprocessors=1)
        got = [found[name] is not None for name in NAMES[:7]]
        assert got == mask


def test_dropout_masks_are_those_of_the_stream():
    """Up passes the mask on: one channel of the rank, one channel of the width each."""
    rank, grid, p = 8, (3, 5), 0.4
    x = torch.zeros(2, 15, rank)
    weights = [
        *(torch.zeros(rank, rank), torch.ones(rank)),
        *(torch.ones(rank, 1, 1, 1), None, torch.eye(rank), None),
    ]
    options = (*grid, 0, "center_tap", 1, "none", "pre", p, 1.0)
    y, _, _ = adapter_on_cpu.forward(x, weights, None, SEED, *options)
    factors = philox.dropout_multiplier(SEED, (2, 15, rank), p)
    assert torch.equal(y != 0, factors != 0)
    torch.testing.assert_close(y, factors.float())


@pytest.mark.parametrize("case", [CASES["class token"], NARROW["even, dropped"]], ids=str)
def test_same_bits_twice(case):
    first, second = (check(case, torch.bfloat16, multiprocessors=3) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_an_expanded_gradient():
    """As that of a sum comes: all strides are zero."""
    case = AdapterCase(2, 20, 4, (3, 8))
    tensors = case.tensors(torch.float32)
    one = torch.ones(()).expand(2, 24, 20)
    found, truth = (f(case, tensors, one) for f in (ours, specified))
    for name, value in found.items():
        torch.testing.assert_close(value, truth[name].reshape(value.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (AdapterCase(1, 8, 257, (2, 2)), "a rank of at most 256"),
        (AdapterCase(1, 2, 1, (1, 9000), (1, 91), dilation=99), "do not fit shared memory"),
    ],
)
def test_refusals_name_the_reason(case, message):
    with pytest.raises(RuntimeError, match=message):
        check(case, torch.float32)


NETWORKS = {
    "ViT-L": AdapterCase(64, 1024, 8, (14, 14), (7, 7), prefix=1),
    "Swin-L stage 1": AdapterCase(64, 192, 8, (56, 56), (7, 7)),
    "Swin-L stage 4": AdapterCase(64, 1536, 8, (7, 7), (7, 7)),
    "large rank and kernel": AdapterCase(64, 384, 64, (28, 28), (31, 31)),
    "largest": AdapterCase(64, 768, 256, (14, 14), (91, 91)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_served(name, dtype):
    """Within the 99 KiB that a block may have on 8.6, and with enough blocks to fill a GPU."""
    for backward in (False, True):
        for found in plan_of(NETWORKS[name], dtype, backward).values():
            assert found["shared"] <= 99 * 1024
            assert found["threads"] in range(128, 513, 32)
            # The narrow kernels' blocks have runs of tiles: two for 98 blocks in the shortest.
            assert found["blocks"] >= 98


def test_tensor_cores_convolve_where_it_pays():
    """In 16-bit types and launches of their own; what prefix tokens meet is left to the others."""
    small, large = NETWORKS["ViT-L"], NETWORKS["large rank and kernel"]
    token = dataclasses.replace(large, prefix=1)
    wide = dataclasses.replace(large, grid=(56, 56), dim=192)
    many = AdapterCase(64, 96, 8, (56, 56), (7, 7))
    for case, dtype, launches in (
        (small, torch.bfloat16, [set(), set()]),
        (large, torch.bfloat16, [{"dense"}, {"dense", "taps"}]),
        (token, torch.bfloat16, [{"dense"}, {"dense"}]),
        (wide, torch.bfloat16, [{"planes"}, {"planes", "taps"}]),
        (many, torch.bfloat16, [{"planes"}, {"planes", "plane_taps"}]),
        (large, torch.float32, [set(), set()]),
    ):
        for backward in (False, True):
            found = plan_of(case, dtype, backward)
            apart = {"correlate", "dense", "planes", "taps", "plane_taps"}
            assert found.keys() & apart == launches[backward]


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_dense_form_convolves(dtype, prefix):
    case = AdapterCase(64, 16, 32, (7, 7), (13, 13), prefix, residual=True)
    for backward in (False, True):
        assert "dense" in plan_of(case, dtype, backward)
    check(case, dtype)


def test_weights_of_large_ranks_are_summed_apart():
    for name, apart in (("ViT-L", False), ("large rank and kernel", True), ("largest", True)):
        found = plan_of(NETWORKS[name], torch.bfloat16, True)
        assert ({"up_weight", "down_weight"} <= found.keys()) == apart


def test_sums_of_few_tiles_stay_within_the_cache():
    """Where each tile is a group of its own, too."""
    for batch, rank, apart in ((1, 64, False), (32, 256, True)):
        case = AdapterCase(batch, 1536, rank, (14, 14), (7, 7))
        found = plan_of(case, torch.bfloat16, True)
        assert ({"up_weight", "down_weight"} <= found.keys()) == apart


def test_one_image_fills_the_device_by_parts_of_the_channels():
    found = plan_of(dataclasses.replace(NETWORKS["ViT-L"], batch=1), torch.bfloat16, False)
    assert found["narrow_down"] == {"blocks": 13, "threads": 256, "shared": 4096}
    assert found["narrow_up"]["blocks"] == 7 * 32


def plan_of(case: AdapterCase, dtype: torch.dtype, backward: bool) -> dict:
    return adapter_on_cpu.plan(adapter_on_cpu.without_memory(case, dtype), backward)
