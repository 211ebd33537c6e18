"""The data of choices on a GPU, distilled from sweeps with and without a first line."""

import json

import pytest

from benchmarks import gpu_choices, gpu_sweep, shapes
from lka_kernels import gpu_choice

FACTS = {"device": "A GPU", "date": "2026-01-02", "versions": {"torch": "2.11", "triton": "3.6"}}
REPLKNET = next(s for s in shapes.DEPTHWISE if s.name == "replknet-1")._replace(batch=64)
VIT = next(s for s in shapes.ADAPTER if s.name == "vit-b-r8-k7")._replace(batch=8)


def line(shape, direction, family, microseconds, *, numbers=True, **changes) -> dict:
    operator = "adapter" if isinstance(shape, shapes.Adapter) else "depthwise"
    sizes = gpu_sweep.numbers(operator, shape) if numbers else {}
    return {
        "operator": operator, "shape": shape.name, "size": shape.size, **sizes,
        "direction": direction, "layout": "tokens" if operator == "adapter" else "contiguous",
        "dtype": "bfloat16", "family": family, "seconds": microseconds / 1e6, **changes,
    }  # fmt: skip


@pytest.fixture
def distilled(tmp_path):
    """The data file that files of lines are made into."""

    def make(*files, arguments=()):
        paths = []
        for index, lines in enumerate(files):
            paths.append(tmp_path / f"{index}.jsonl")
            paths[-1].write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        out = tmp_path / "out" / "times.json"
        gpu_choices.main([*map(str, paths), "--out", str(out), *arguments])
        return json.loads(out.read_text())

    return make


def test_lines_with_and_without_numbers_are_one_case(distilled):
    found = distilled(
        [
            line(REPLKNET, "dX", "torch", 14360.4, numbers=False),
            line(REPLKNET, "dX", "cuda", 1213.2, numbers=False),
            line(REPLKNET, "dX", "triton_direct", 1.0, numbers=False),
            line(REPLKNET, "dX", "cuda_fft", 0.5, numbers=False, error=0.9),
        ],
        [line(REPLKNET, "dX", "cuda", 800.0), line(REPLKNET, "dX", "triton", 829.4)],
    )
    expected = [64, 128, 56, 56, 31, 31, 1, 14400, 800, None, 829]
    assert found["depthwise_conv2d"]["cases"] == {"backward_input contiguous bfloat16": [expected]}
    columns = [*gpu_choice.SIZES["depthwise_conv2d"], *gpu_choice.FAMILIES["depthwise_conv2d"]]
    assert found["depthwise_conv2d"]["columns"] == columns


def test_a_measurement_that_was_refused_is_no_time(distilled):
    refused = line(REPLKNET, "forward", "cuda", 1.0)
    del refused["seconds"]
    found = distilled([{**refused, "refused": "no"}, line(REPLKNET, "forward", "torch", 2.5)])
    (row,) = found["depthwise_conv2d"]["cases"]["forward contiguous bfloat16"]
    assert row[7:] == [2.5, None, None, None]


def test_facts_come_first_or_from_the_command(distilled):
    lines = [line(REPLKNET, "forward", "torch", 2.5, host=20e-6)]
    assert distilled([FACTS, *lines])["host"] == {}
    found = distilled([FACTS, *lines], arguments=["--hosts"])
    assert {name: found[name] for name in FACTS} == FACTS
    assert found["host"] == {"depthwise_conv2d": {"forward": {"torch": 20}}}
    assert list(found)[:3] == list(FACTS)
    found = distilled(lines, arguments=["--hosts", "--facts", "device=B", "torch=2.12"])
    assert (found["device"], found["date"], found["versions"]) == ("B", None, {"torch": "2.12"})
    # Hosts of files without a first line were measured otherwise.
    assert found["host"] == {}


def test_an_update_keeps_what_was_not_measured_again(distilled):
    first = distilled(
        [
            FACTS,
            line(REPLKNET, "forward", "torch", 9.0, host=20e-6),
            line(REPLKNET, "forward", "cuda", 8.0, host=30e-6),
            line(VIT, "backward", "triton", 7.0),
        ],
        arguments=["--hosts"],
    )
    changed = {**FACTS, "date": "2026-02-03"}
    again = [changed, line(REPLKNET, "forward", "cuda", 4.0, host=15e-6)]
    found = distilled(again, arguments=["--update", "--hosts"])
    (row,) = found["depthwise_conv2d"]["cases"]["forward contiguous bfloat16"]
    assert row[7:] == [9, 4, None, None]
    assert found["large_kernel_adapter"] == first["large_kernel_adapter"]
    assert found["host"] == {"depthwise_conv2d": {"forward": {"torch": 20, "cuda": 15}}}
    assert found["date"] == "2026-02-03"
    # Of files without a first line the facts stay, and another device is none to mix with.
    found = distilled([line(VIT, "forward", "cuda", 3.0)], arguments=["--update"])
    assert {name: found[name] for name in FACTS} == changed
    with pytest.raises(ValueError, match="times of A GPU are not brought up to date by B's"):
        distilled([{**FACTS, "device": "B"}], arguments=["--update"])


def test_the_forward_pass_is_taken_off_torchs_adapter(distilled):
    found = distilled(
        [
            line(VIT, "forward", "torch", 65.0),
            line(VIT, "backward", "torch", 285.0),
            line(VIT, "backward", "cuda", 126.0, numbers=False),
        ]
    )
    cases = found["large_kernel_adapter"]["cases"]
    assert cases["forward bfloat16"] == [[8, 14, 768, 8, 7, 1, 65, None, None]]
    assert cases["backward bfloat16"] == [[8, 14, 768, 8, 7, 1, 220, 126, None]]


def test_the_package_reads_what_was_written(distilled, tmp_path, monkeypatch):
    distilled(
        [FACTS, line(REPLKNET, "forward", "torch", 9.0), line(REPLKNET, "forward", "cuda", 90)]
    )
    monkeypatch.setattr(gpu_choice, "DATA", tmp_path / "out" / "times.json")
    gpu_choice.forget()
    try:
        assert gpu_choice.facts() == FACTS
        ((situation, (case,)),) = gpu_choice.cases("depthwise_conv2d").items()
        assert situation == ("forward", "contiguous", True)
        assert case.microseconds == {"torch": 9, "cuda": 90}
    finally:
        monkeypatch.undo()
        gpu_choice.forget()


def test_every_shape_is_found_by_its_name():
    everything = shapes.DEPTHWISE + shapes.TABLE + shapes.ADAPTER
    for shape in everything:
        shape = shape._replace(batch=8)
        of_numbers = gpu_choices.sizes(line(shape, "forward", "torch", 1.0))
        assert gpu_choices.sizes(line(shape, "forward", "torch", 1.0, numbers=False)) == of_numbers


def test_what_a_choice_may_cost_is_told():
    found = gpu_choices.losses("depthwise_conv2d")
    assert len(found) > 50
    assert all(loss >= 1 for loss, _ in found)
