"""Which family of GPU kernels sizes choose: by measured times, or by rules where there are none."""

import json

import pytest

from lka_kernels import gpu_choice

DEPTHWISE = frozenset(gpu_choice.FAMILIES["depthwise_conv2d"])
MOST = 1.25  # times the least that a choice may take


@pytest.fixture
def times(tmp_path, monkeypatch):
    """Write a data file of a few cases; it is read instead of the package's."""

    def write(situation, *cases, operator="depthwise_conv2d", host=None):
        families = gpu_choice.FAMILIES[operator]
        rows = [[*sizes, *(found.get(family) for family in families)] for sizes, found in cases]
        columns = [*gpu_choice.SIZES[operator], *families]
        content = {"host": host or {}, operator: {"columns": columns, "cases": {situation: rows}}}
        monkeypatch.setattr(gpu_choice, "DATA", tmp_path / "times.json")
        gpu_choice.DATA.write_text(json.dumps(content))
        gpu_choice.forget()

    yield write
    monkeypatch.undo()
    gpu_choice.forget()


@pytest.fixture
def no_times(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_choice, "DATA", tmp_path / "missing.json")
    gpu_choice.forget()
    yield
    monkeypatch.undo()
    gpu_choice.forget()


def chosen(
    direction="forward", layout="contiguous", in_16_bit=True, batch=8, channels=64, size=(56, 56),
    kernel=(31, 31), dilation=(1, 1), families=DEPTHWISE,
) -> str:  # fmt: skip
    return gpu_choice.depthwise_family(
        direction, layout, in_16_bit, batch, channels, size, kernel, dilation, frozenset(families)
    )


def chosen_adapter(
    direction="forward", in_16_bit=True, batch=8, grid=(14, 14), dim=384, rank=8, kernel=(7, 7),
    dilation=1, prefix=0, families=("cuda", "triton"),
) -> str:  # fmt: skip
    return gpu_choice.adapter_family(
        direction, in_16_bit, batch, grid, dim, rank, kernel, dilation, prefix, frozenset(families)
    )


def recorded() -> list:
    """(operator, situation, case) of all that the package has times of."""
    return [
        (operator, situation, case)
        for operator in gpu_choice.FAMILIES
        for situation, cases in gpu_choice.cases(operator).items()
        for case in cases
    ]


def test_there_are_times_and_facts():
    assert len(recorded()) > 100
    found = gpu_choice.facts()
    assert found["device"]
    assert found["date"]
    assert {"torch", "triton"} <= set(found["versions"])
    depthwise = gpu_choice.cases("depthwise_conv2d")
    for direction in gpu_choice.DIRECTIONS:
        for layout in gpu_choice.LAYOUTS:
            assert (direction, layout, True) in depthwise
    assert {("forward", True), ("backward", True)} <= set(gpu_choice.cases("large_kernel_adapter"))


def test_every_recorded_case_is_served_by_one_of_its_best():
    for operator, situation, case in recorded():
        families = set(case.microseconds)
        if operator == "depthwise_conv2d":
            *sizes, dilation = case.sizes
            batch, channels, *rest = sizes
            family = chosen(
                *situation, batch, channels, tuple(rest[:2]), tuple(rest[2:]),
                (dilation, dilation), families,
            )  # fmt: skip
        else:
            families -= {"torch"}
            if not families:
                continue
            batch, side, dim, rank, kernel, prefix = case.sizes
            family = chosen_adapter(
                *situation, batch, (side, side), dim, rank, (kernel, kernel), 1, prefix, families
            )
        seen = {
            f: max(case.microseconds[f], gpu_choice.host_microseconds(operator, situation[0], f))
            for f in families
        }
        assert seen[family] <= MOST * min(seen.values()), (situation, case)


@pytest.mark.usefixtures("no_times")
@pytest.mark.parametrize("in_16_bit", [True, False])
def test_rules_where_nothing_was_measured(in_16_bit):
    assert chosen(in_16_bit=in_16_bit) == "cuda_fft"
    assert chosen(in_16_bit=in_16_bit, kernel=(51, 5)) == "cuda_fft"
    small = chosen(in_16_bit=in_16_bit, kernel=(7, 7))
    assert small == ("cuda" if in_16_bit else "torch")
    without = DEPTHWISE - {"cuda_fft"}
    assert chosen(in_16_bit=in_16_bit, families=without) == ("cuda" if in_16_bit else "torch")
    assert chosen(in_16_bit=in_16_bit, families={"triton", "torch"}) in ("triton", "torch")
    for family in DEPTHWISE:
        assert chosen(in_16_bit=in_16_bit, families={family}) == family
    assert chosen_adapter(in_16_bit=in_16_bit) == "triton"
    assert chosen_adapter(in_16_bit=in_16_bit, families={"cuda"}) == "cuda"


def test_the_nearest_case_decides(times):
    times(
        "forward contiguous bfloat16",
        ((8, 64, 56, 56, 31, 31, 1), {"torch": 900, "cuda": 500, "cuda_fft": 100, "triton": 300}),
        ((8, 64, 14, 14, 27, 27, 1), {"torch": 900, "cuda": 100, "cuda_fft": 200, "triton": 300}),
        ((8, 64, 56, 56, 7, 7, 1), {"torch": 900, "cuda": 500, "cuda_fft": 400, "triton": 300}),
    )
    assert chosen() == "cuda_fft"
    assert chosen(batch=16, size=(50, 60), kernel=(29, 31)) == "cuda_fft"
    assert chosen(size=(13, 15), kernel=(27, 25)) == "cuda"
    assert chosen(kernel=(7, 5)) == "triton"
    assert chosen(kernel=(7, 5), families={"torch", "cuda"}) == "cuda"
    # The other layout was not measured, nor the other direction: rules.
    assert chosen(layout="channels_last", kernel=(7, 7)) == "cuda"
    assert chosen("backward_weight", kernel=(7, 7)) == "cuda"
    # Maps in neither layout go by the times of contiguous ones.
    assert chosen(layout="other", kernel=(7, 5)) == "triton"


def test_taps_that_no_map_meets_are_no_distance(times):
    times(
        "forward contiguous bfloat16",
        ((8, 64, 7, 7, 13, 13, 1), {"torch": 900, "cuda": 100}),
        ((8, 64, 14, 14, 51, 51, 1), {"torch": 100, "cuda": 900}),
    )
    assert chosen(size=(7, 7), kernel=(51, 51), families={"torch", "cuda"}) == "cuda"


def test_a_family_that_the_nearest_case_lacks_is_estimated_from_others(times):
    """From the next case that has it, by the elements of the maps; but not of the call itself."""
    both = {"cuda": 400.0, "triton": 100.0}
    times(
        "forward contiguous bfloat16",
        ((64, 64, 56, 56, 5, 5, 1), {"cuda": 400.0}),
        ((64, 64, 56, 56, 7, 7, 1), both),
        ((128, 64, 56, 56, 7, 7, 1), {f: 2 * t for f, t in both.items()}),
    )
    assert chosen(batch=32, kernel=(5, 5), families={"cuda", "triton"}) == "triton"
    assert chosen(batch=64, kernel=(5, 5), families={"cuda", "triton"}) == "cuda"
    assert chosen(batch=64, kernel=(5, 5), families={"triton"}) == "triton"


def test_small_calls_go_to_what_the_host_issues_fastest(times):
    sizes = (1, 64, 7, 7, 5, 5, 1)
    device = {"torch": 6.0, "cuda": 12.0, "cuda_fft": 9.0, "triton": 5.0}
    times("forward contiguous bfloat16", (sizes, device))
    small = {"batch": 1, "size": (7, 7), "kernel": (5, 5)}
    assert chosen(**small) == "torch"
    assert chosen(**small, families=DEPTHWISE - {"torch"}) == "cuda"
    host = {"depthwise_conv2d": {"forward": {"torch": 5.0, "triton": 5.0}}}
    times("forward contiguous bfloat16", (sizes, device), host=host)
    assert chosen(**small) == "triton"


def test_of_equals_the_least_on_the_device(times):
    host = {"depthwise_conv2d": {"forward": dict.fromkeys(DEPTHWISE, 50.0)}}
    device = {"torch": 6.0, "cuda": 12.0, "cuda_fft": 9.0, "triton": 5.0}
    times("forward contiguous bfloat16", ((1, 64, 7, 7, 5, 5, 1), device), host=host)
    assert chosen(batch=1, size=(7, 7), kernel=(5, 5)) == "triton"


def test_the_nearest_adapter_decides(times):
    times(
        "backward bfloat16",
        ((8, 14, 384, 8, 7, 0), {"torch": 1.0, "cuda": 90, "triton": 60}),
        ((8, 14, 1024, 64, 31, 0), {"torch": 1.0, "cuda": 150, "triton": 500}),
        operator="large_kernel_adapter",
    )
    assert chosen_adapter("backward") == "triton"
    assert chosen_adapter("backward", grid=(12, 16), prefix=1) == "triton"
    assert chosen_adapter("backward", dim=768, rank=48, kernel=(27, 27)) == "cuda"
    assert chosen_adapter("backward", in_16_bit=False) == "triton"  # by rule


def test_larger_batches_and_extremes_are_answered():
    for size in ((1, 1), (1000, 3), (2**20, 1)):
        for batch in (1, 2**20):
            assert chosen(batch=batch, channels=1, size=size, kernel=(3, 255)) in DEPTHWISE
