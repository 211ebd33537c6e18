"""One session of pytest: its options, what was measured so far, what was left out."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cases, facts, peaks, peers, shapes


class Run:
    """What the tests share."""

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
        self.lines: list[tuple[float, str]] = []  # (ratio, text) of each case

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
        if peer.name == peers.OURS:
            self.lines += cases.summary(case, measured, benchmark.extra_info)


RUN = pytest.StashKey[Run]()
