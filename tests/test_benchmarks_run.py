"""The suite collects, and one case of it runs from pytest to the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")

ROOT = Path(__file__).parents[1]


def benchmarks(*arguments: str) -> str:
    """What pytest prints for the suite."""
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-p", "no:cacheprovider", *arguments]
    # Among workers that share the tests, pytest-benchmark would refuse to run.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST_")}
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_default_suite_collects():
    lines = benchmarks("--collect-only", "--bench-device", "cpu").splitlines()
    for start in ("depthwise_conv2d[", "large_kernel_adapter[", "training_step["):
        assert any(f"::test_{start}" in line for line in lines)


def test_one_case_runs_and_is_reported(tmp_path):
    from benchmarks import compare, report, results

    path = tmp_path / "result.json"
    printed = benchmarks(
        *("--benchmark-only", "--bench-device", "cpu", "--bench-seconds", "0.02"),
        *("--bench-threads", "1", "-k", "adapter and stage-4-r8-k7 and not compiled"),
        *("--benchmark-json", str(path)),
    )
    assert "Left out of depthwise_conv2d (--suite full has them)" in printed
    run = results.load(path)
    assert run.facts["threads"] == 1
    assert {"versions", "commit", "instruction_set", "device_name"} <= set(run.facts)
    assert {key.direction for key in run.cases} == {"forward", "forward+backward"}
    for key, peers in run.cases.items():
        assert set(peers) == {"ours", "eager_contiguous", "eager_channels_last"}
        for name, row in peers.items():
            assert row.info["fraction_of_floor"] > 0
            assert (row.ratio is None) == (name == "ours")
            assert ("peak_bytes" in row.info) == (key.direction == "forward+backward")
    rows = json.loads(path.read_text())["benchmarks"]
    assert len(rows) == 6
    assert not any("data" in row["stats"] for row in rows)
    assert compare.main([str(path), str(path)]) == 0

    pytest.importorskip("matplotlib")
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    assert report.main([str(path), "--docs", str(tmp_path), "--readme", str(readme)]) == 0
    assert "eager_contiguous" in (tmp_path / "performance.md").read_text()
