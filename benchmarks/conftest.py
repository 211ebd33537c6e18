"""Options of the benchmarks, the measurement shared by the peers of a case, the result files."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, facts, peaks, peers, shapes

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


class Run:
    """One session: its options, what was measured so far, what was left out."""

    def __init__(self, config):
        option = config.getoption
        self.device = option("--bench-device") or ("cuda" if torch.cuda.is_available() else "cpu")
        # Fails before anything is measured: a result named after a device not there misleads.
        if self.device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--bench-device cuda: torch finds no CUDA device")
        dtype = option("--bench-dtype") or ("bfloat16" if self.device == "cuda" else "float32")
        self.dtype = getattr(torch, dtype)
        self.suite = option("--suite")
        self.seconds = option("--bench-seconds")
        self.methods = option("--bench-methods")
        if option("--bench-threads"):
            torch.set_num_threads(option("--bench-threads"))
        torch.backends.cudnn.benchmark = self.device == "cuda"
        self.facts = {**facts.collect(self.device, self.dtype), "suite": self.suite}
        self.facts["seconds_per_case"] = self.seconds
        self.chosen: dict[object, list] = {}  # case -> peers that are to be measured
        self.skipped: dict[str, set[str]] = {}  # reason -> peers
        self.left_out: dict[str, list[str]] = {}  # operator -> shapes
        self.measured: dict[object, cases.Measured] = {}

    @property
    def peaks(self) -> dict:
        """Measured once, before the first case."""
        if "peaks" not in self.facts:
            self.facts["peaks"] = peaks.measure(self.device, self.dtype)
        return self.facts["peaks"]

    def measure(self, case, build, **options) -> cases.Measured:
        """All chosen peers of ``case`` in turns, at the first call; the same result later."""
        if case not in self.measured:
            make, buffers = build(self.chosen[case])
            self.measured[case] = cases.run(make, buffers, device=self.device, **options)
        return self.measured[case]

    def parametrize(self, metafunc, operator: str, everything: list, directions, layouts, found):
        """Every shape of the suite, in every direction and layout, with every peer."""
        selected = shapes.selected(everything, self.suite, self.device)
        if self.suite == "default":
            self.left_out[operator] = [s.name for s in everything if not s.default]
        parameters = [
            pytest.param(case, peer, id=f"{case.id()}-{peer.name}")
            for shape in selected
            for direction in directions
            for layout in layouts
            for case in [cases.Case(operator, shape, direction, layout)]
            for peer in found
        ]
        metafunc.parametrize(("case", "peer"), parameters)

    def benchmark(self, benchmark, case, peer, build):
        """The test of one peer: measure the case if no other peer has, and report."""
        reason = peers.missing(peer, case.shape, self.dtype, self.suite)
        if reason is not None:
            self.skipped.setdefault(reason, set()).add(peer.name)
            pytest.skip(f"{peer.name}: {reason}")
        bounds = self.peaks
        measured = self.measure(
            case,
            lambda chosen: build(case, chosen, self.device, self.dtype, self.seconds),
            seconds=self.seconds,
            tolerance=cases.AGREEMENT[self.dtype],
            with_memory=case.direction == "forward+backward",
        )
        dtype = self.facts["dtype"]
        cases.report(
            benchmark,
            f"{case.operator} {case.direction} {case.layout} {dtype}: "
            f"{case.shape.name} {case.shape.size}",
            peer.name,
            measured,
            case.shape.work(case.direction, self.dtype.itemsize),
            bounds,
            self.seconds,
            operator=case.operator,
            direction=case.direction,
            layout=case.layout,
            dtype=dtype,
            shape=case.shape.name,
            size=case.shape.size,
            kernel=case.shape.longest,
        )


RUN = pytest.StashKey[Run]()


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
    """The machine's network name says nothing about speed."""
    machine_info.pop("node", None)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """One set of facts for the whole run; no raw rounds."""
    output_json["facts"] = config.stash[RUN].facts
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
