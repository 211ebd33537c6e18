"""large_kernel_adapter beside the same adapter written in plain PyTorch."""

import pytest

from benchmarks import adapter_problem, peers, replay, shapes
from benchmarks.session import RUN

pytestmark = pytest.mark.benchmark(timer=replay.CLOCK.read)


def pytest_generate_tests(metafunc):
    run = metafunc.config.stash[RUN]
    run.parametrize(
        metafunc,
        "large_kernel_adapter",
        shapes.ADAPTER,
        ("forward", "forward+backward"),
        ("tokens",),
        peers.adapter_peers(run.device),
    )


def test_large_kernel_adapter(benchmark, run, case, peer):
    run.benchmark(benchmark, case, peer, adapter_problem.build)
