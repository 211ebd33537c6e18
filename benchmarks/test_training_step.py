"""What adapters add to one training step of Swin-T and of ConvNeXt-T."""

import importlib.util

import pytest

from benchmarks import cases, measure, replay, training_problem
from benchmarks.session import RUN
from benchmarks.training_problem import VARIANTS

pytestmark = [
    pytest.mark.benchmark(timer=replay.CLOCK.read),
    pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed"),
]

# Adapters are a few per cent of a step: enough rounds to see them in its noise, where a step takes
# half a second on a CPU, and a tenth on a GPU.
LEAST_SECONDS = {"cpu": 24, "cuda": 4}


def pytest_generate_tests(metafunc):
    parameters = [
        pytest.param(case, variant, id=f"{network.name}-{variant}")
        for network in training_problem.networks(metafunc.config.stash[RUN].device)
        for case in [cases.Case("training_step", network, "step", "images")]
        for variant in training_problem.variants(network)
    ]
    metafunc.parametrize(("case", "peer"), parameters)


def test_training_step(benchmark, run, case, peer):
    network, dtype = case.shape, run.facts["dtype"]
    seconds = max(run.seconds, LEAST_SECONDS[run.device])
    measured = run.measure(
        case,
        lambda chosen: training_problem.build(network, chosen, run.device, run.dtype),
        seconds=seconds,
        tolerance=None,
        with_memory=True,
    )
    cases.report(
        benchmark,
        f"training_step {dtype}: {network.name} {network.size}",
        peer,
        measured,
        None,
        run.peaks,
        seconds,
        operator=case.operator,
        direction=case.direction,
        layout=case.layout,
        dtype=dtype,
        shape=network.name,
        size=network.size,
        trains=VARIANTS[peer],
        **adapter_share(measured, peer),
    )


def adapter_share(measured: cases.Measured, peer: str) -> dict:
    """The part of the step that a variant with adapters spends on them, from paired rounds."""
    bare = measured.timings.get("no_adapters")
    timing = measured.timings.get(peer)
    if bare is None or timing is None or peer in ("no_adapters", "head_only"):
        return {}
    shares = [1 - a / b for a, b in zip(bare.rounds, timing.rounds, strict=False)]
    return {"adapter_share": measure.quartiles(shares)._asdict()}
