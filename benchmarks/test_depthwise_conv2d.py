"""depthwise_conv2d beside torch's direct convolution in both layouts, torch.fft and others."""

import pytest

from benchmarks import cases, depthwise_problem, peers, replay, roofline, shapes
from benchmarks.session import RUN

pytestmark = pytest.mark.benchmark(timer=replay.CLOCK.read)


def pytest_generate_tests(metafunc):
    run = metafunc.config.stash[RUN]
    run.parametrize(
        metafunc,
        "depthwise_conv2d",
        shapes.DEPTHWISE + shapes.TABLE,
        roofline.DIRECTIONS,
        cases.LAYOUTS,
        peers.depthwise_peers(run.device, run.methods),
    )


def test_depthwise_conv2d(benchmark, run, case, peer):
    run.benchmark(benchmark, case, peer, depthwise_problem.build)
