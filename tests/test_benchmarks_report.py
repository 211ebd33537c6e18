"""benchmarks.report and benchmarks.compare on small made-up results."""

import copy
import json
import re

import pytest

from benchmarks import compare, report

FACTS = {
    "device": "cpu",
    "device_name": "Some CPU",
    "dtype": "float32",
    "threads": 2,
    "instruction_set": "avx2",
    "versions": {"torch": "2.14.1", "lka_kernels": "0.1.0"},
    "commit": "0123456789ab",
    "cpus": 2,
    "load_before": 0.1,
    "malloc": {},
    "suite": "default",
    "seconds_per_case": 1.5,
    "peaks": {"bytes_per_second": 2e10, "flops_per_second": 2e11, "how": "by guess"},
}
# Shape -> peer -> milliseconds.
TIMES = {
    "lost": {"ours": 2.0, "torch_contiguous": 1.0, "torch_fft": 9.0},
    "won": {"ours": 1.0, "torch_contiguous": 40.0, "torch_fft": 3.0},
    "even": {"ours": 4.0, "torch_contiguous": 4.2, "torch_fft": 8.0},
}


def row(shape: str, peer: str, times: dict) -> dict:
    def spread(value):
        return {"q1": 0.98 * value, "median": value, "q3": 1.02 * value}

    info = {
        "operator": "depthwise_conv2d",
        "direction": "forward+backward",
        "layout": "contiguous",
        "dtype": "float32",
        "shape": shape,
        "size": "(1, 2, 3, 4) K 7x7",
        "kernel": 7,
        "peer": peer,
        "peak_bytes": 2**20,
        "fraction_of_floor": 0.25,
    }
    if peer != "ours":
        info["ratio_to_ours"] = spread(times[peer] / times["ours"])
        info["ratio_rounds"] = 30
    return {"extra_info": info, "stats": {**spread(times[peer] / 1e3), "rounds": 30}}


def content(times: dict = TIMES) -> dict:
    rows = [row(shape, peer, of) for shape, of in times.items() for peer in of]
    return {"benchmarks": rows, "facts": copy.deepcopy(FACTS), "datetime": "2026-11-25T01:02:03"}


@pytest.fixture
def write(tmp_path):
    def write(name: str, what) -> str:
        path = tmp_path / name
        path.write_text(what if isinstance(what, str) else json.dumps(what))
        return str(path)

    return write


def slower(factor: float, shape: str | None = None, peer: str | None = None) -> dict:
    """TIMES with what matches multiplied."""
    return {
        s: {
            p: ms * factor if shape in (None, s) and peer in (None, p) else ms
            for p, ms in of.items()
        }
        for s, of in TIMES.items()
    }


# --- report ---------------------------------------------------------------------------------------


@pytest.fixture
def reported(write, tmp_path):
    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")

    def reported(*files):
        arguments = [*files, "--docs", str(tmp_path / "docs"), "--readme", str(readme)]
        assert report.main(arguments) == 0
        return (tmp_path / "docs" / "performance.md").read_text(), readme.read_text()

    return reported


def test_tables_begin_with_the_worst_case(reported, write, tmp_path):
    page, _ = reported(write("a.json", content()))
    table = page[page.index("### `depthwise_conv2d`, forward+backward") :]
    assert re.findall(r"^\| (\w+) \(1", table, re.M) == ["lost", "even", "won"]
    assert "| lost (1, 2, 3, 4) K 7x7 | contiguous | 2 ms | **0.50×** (0.49–0.51) |" in table
    assert "25 %" in table
    # Three cases, the worst, the geometric mean, how many are slower than a peer.
    assert "| `depthwise_conv2d` forward+backward | 3 | 0.50× | 1.16× | 1 |" in page
    for fact in (
        "Some CPU, float32, 2 threads",
        "commit 0123456789ab",
        "20.0 GB/s",
        "torch 2.14.1",
    ):
        assert fact in page
    svg = (tmp_path / "docs" / "performance.svg").read_text()
    assert svg.startswith("<?xml")


def test_readme_gets_its_part_and_keeps_the_rest(reported, write):
    _, readme = reported(write("a.json", content()))
    assert readme.startswith(f"before\n{report.BEGIN}\n![")
    assert readme.endswith(f"{report.END}\nafter\n")
    assert "old" not in readme
    assert "docs/performance.svg" in readme


def test_every_device_is_shown_and_the_newest_file_wins(reported, write):
    old, new, gpu = content(slower(3, peer="ours")), content(), content()
    old["datetime"] = "2026-01-01T00:00:00"
    gpu["facts"].update(device="cuda", device_name="Some GPU")
    page, _ = reported(write("c.json", gpu), write("b.json", new), write("a.json", old))
    assert re.findall(r"^## (.*)", page, re.M) == [
        "Some CPU, float32, 2 threads",
        "Some GPU, float32",
    ]
    assert "2026-01-01" not in page


def test_a_busy_machine_is_told(reported, write):
    busy = content()
    busy["facts"]["load_before"] = 1.7
    page, _ = reported(write("a.json", busy))
    assert "not to be quoted" in page


# --- files that cannot be used --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("not json", "not readable as JSON"),
        ({"a": 1}, "no file of pytest-benchmark"),
        ({"benchmarks": []}, "not of this suite"),
        ({**content(), "benchmarks": [{"extra_info": {}}]}, "a row has no 'stats'"),
        ({**content(), "benchmarks": []}, "no case in it has both ours and a peer"),
    ],
)
def test_report_names_a_file_it_cannot_use(write, capsys, what, message):
    path = write("bad.json", what)
    assert report.main([path]) == 2
    error = capsys.readouterr().err
    assert path in error
    assert message in error


def test_a_missing_file_is_named(write, capsys, tmp_path):
    missing = str(tmp_path / "none.json")
    assert report.main([missing]) == 2
    assert compare.main([write("a.json", content()), missing]) == 2
    assert capsys.readouterr().err.count(f"{missing}: there is no such file") == 2


# --- compare --------------------------------------------------------------------------------------


@pytest.fixture
def compared(write, capsys):
    def compared(before: dict, after: dict, *options) -> tuple[int, str]:
        status = compare.main([write("a.json", before), write("b.json", after), *options])
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return compared


def test_the_same_results_are_unchanged(compared):
    status, text = compared(content(), content())
    assert status == 0
    assert "unchanged: 3" in text


def test_a_machine_slower_as_a_whole_is_no_regression(compared):
    status, text = compared(content(), content(slower(1.7)))
    assert status == 0
    assert "factor of 1.70" in text
    assert "unchanged: 3" in text


@pytest.mark.parametrize("machine", [1.0, 1.7])
def test_a_regression_is_found_on_a_slower_machine_too(compared, machine):
    times = slower(1.3, "even", "ours")
    times = {s: {p: machine * ms for p, ms in of.items()} for s, of in times.items()}
    status, text = compared(content(), content(times))
    assert status == 1
    assert (
        "regressed: 1\n  depthwise_conv2d forward+backward contiguous float32 even: 4.000" in text
    )
    assert "unchanged: 2" in text


def test_an_improvement_is_no_regression(compared):
    status, text = compared(content(), content(slower(0.7, "won", "ours")))
    assert status == 0
    assert "improved: 1\n  depthwise_conv2d forward+backward contiguous float32 won" in text


def test_a_peer_that_became_faster_is_no_regression(compared):
    status, text = compared(content(), content(slower(0.5, "lost", "torch_contiguous")))
    assert status == 0
    assert "unchanged: 3" in text


def test_a_change_within_the_spread_is_noise(compared):
    after = content(slower(1.3, "even", "ours"))
    for entry in after["benchmarks"]:
        entry["stats"]["q1"] *= 0.7
    assert compared(content(), after)[0] == 0


def test_the_threshold_counts(compared):
    after = content(slower(1.3, "even", "ours"))
    assert compared(content(), after, "--threshold", "0.5")[0] == 0


def test_cases_in_one_file_only_are_listed(compared):
    fewer = {shape: of for shape, of in TIMES.items() if shape != "won"}
    status, text = compared(content(), content(fewer))
    assert status == 0
    assert "missing: 1\n  depthwise_conv2d forward+backward contiguous float32 won" in text
    assert "new: 1" in compared(content(fewer), content())[1]


def test_without_peers_our_time_decides(compared):
    before = {shape: {"ours": of["ours"]} for shape, of in TIMES.items()}
    after = {shape: {"ours": 1.3 * of["ours"]} for shape, of in TIMES.items()}
    status, text = compared(content(before), content(after))
    assert status == 1
    assert "no peer is in both files" in text


@pytest.mark.parametrize(
    ("name", "value"), [("device_name", "Other CPU"), ("threads", 1), ("dtype", "bfloat16")]
)
def test_results_of_different_devices_are_refused(compared, name, value):
    other = content()
    other["facts"][name] = value
    status, text = compared(content(), other)
    assert status == 2
    assert f"{name} is {FACTS[name]!r} in " in text
    assert f"and {value!r} in " in text
