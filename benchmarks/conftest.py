"""Options of the benchmarks, what goes into the result files, what is said at the end."""

from __future__ import annotations

import pytest

from benchmarks import peers
from benchmarks.session import RUN, Run

# Left out of pytest-benchmark's file, which is to be committed: what nothing reads.
DROPPED = ("options", "params", "param")
DROPPED_STATS = ("data", "ld15iqr", "hd15iqr", "iqr_outliers", "stddev_outliers", "total")


def pytest_addoption(parser):
    group = parser.getgroup("lka_kernels")
    group.addoption("--suite", default="default", choices=["default", "full"])
    group.addoption(
        "--bench-device", choices=["cpu", "cuda"], help="default: cuda if there is one, else cpu"
    )
    group.addoption(
        "--bench-dtype",
        choices=["float32", "bfloat16", "float16", "float64"],
        help="default: float32 on a CPU, bfloat16 on a GPU",
    )
    group.addoption("--bench-threads", type=int, help="default: what torch starts with")
    group.addoption(
        "--bench-seconds", type=float, default=1.5, help="time of a case, all its peers together"
    )
    group.addoption(
        "--bench-methods", action="store_true", help="also the methods that 'auto' chooses from"
    )


def pytest_configure(config):
    config.stash[RUN] = Run(config)


@pytest.fixture
def run(request) -> Run:
    """This session."""
    return request.config.stash[RUN]


def pytest_collection_modifyitems(items):
    for item in items:
        # A case is measured by the first of its tests, for as long as its slowest peer takes.
        item.add_marker(pytest.mark.timeout(3600))


def pytest_collection_finish(session):
    """Which peers of each case are left after -k and the like: only these are measured."""
    run = session.config.stash[RUN]
    for item in session.items:
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if not parameters or "peer" not in parameters:
            continue
        case, peer = parameters["case"], parameters["peer"]
        # The variants of a training step are names.
        if isinstance(peer, str) or not peers.missing(peer, case.shape, run.dtype, run.suite):
            run.chosen.setdefault(case, []).append(peer)


def pytest_benchmark_update_machine_info(config, machine_info):
    """The machine's network name and kernel build say nothing about speed."""
    machine_info.pop("node", None)
    machine_info.pop("release", None)


def pytest_benchmark_update_commit_info(config, commit_info):
    """Neither does what the folder is called."""
    commit_info.pop("project", None)
    commit_info.pop("branch", None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """One set of facts for the whole run; no raw rounds."""
    output_json["facts"] = rounded(config.stash[RUN].facts)
    for row in output_json["benchmarks"]:
        for name in DROPPED:
            row.pop(name, None)
        row["stats"] = rounded({k: v for k, v in row["stats"].items() if k not in DROPPED_STATS})
        row["extra_info"] = rounded(row["extra_info"])


def rounded(value):
    """Five significant digits, which is more than is known."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def pytest_terminal_summary(terminalreporter, config):
    run = config.stash[RUN]
    if run.lines:
        peaks = run.peaks
        terminalreporter.section("the fastest peer's time over ours, worst case first")
        for _, line in sorted(run.lines):
            terminalreporter.write_line(line)
        terminalreporter.write_line(
            f"{run.facts['device_name']}, {run.facts['threads']} threads, "
            f"{run.facts['instruction_set']}: floors from copies at "
            f"{peaks['bytes_per_second'] / 1e9:.1f} GB/s and multiply-adds at "
            f"{peaks['flops_per_second'] / 1e9:.0f} GFLOP/s"
        )
    for operator, names in sorted(run.left_out.items()):
        terminalreporter.write_line(
            f"Left out of {operator} (--suite full has them): {len(names)} shapes: "
            + ", ".join(names[:8])
            + (", ..." if len(names) > 8 else "")
        )
    for reason, names in sorted(run.skipped.items()):
        terminalreporter.write_line(f"Not measured: {', '.join(sorted(names))}: {reason}")
    # Threads that wait for a busy core make any ratio meaningless: say so beside the table.
    before, cpus = run.facts["load_before"], run.facts["cpus"]
    if run.measured and before > 0.25 * cpus:
        terminalreporter.write_line(
            f"These numbers are not to be quoted: {cpus} CPUs were busy before the first "
            f"measurement (load average {before:.2f})",
            yellow=True,
        )
