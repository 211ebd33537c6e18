"""What all tests share: bounded hypothesis profiles, few threads, outputs that start as junk."""

import os
import sys
from pathlib import Path

# For the package `benchmarks`; last, so that it never decides which lka_kernels is tested.
sys.path.append(str(Path(__file__).parents[1]))

# Threads that wait for each other by spinning make small operators crawl on busy cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import poison
import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this when a kernel is first imported: its interpreter runs them on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile(
    "default",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    # Shrinking a failure can take minutes; the message names the call as it was found.
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
# `pytest --hypothesis-profile=thorough` looks further, at new examples every time.
hypothesis.settings.register_profile(
    "thorough",
    parent=hypothesis.settings.get_profile("default"),
    derandomize=False,
    max_examples=2000,
    phases=list(hypothesis.Phase),
)
hypothesis.settings.load_profile("default")


@pytest.fixture(autouse=True)
def outputs_start_as_junk():
    """Every tensor allocated in a test starts as junk: an element left unwritten is seen."""
    with poison.junk_filled_tensors():
        yield


@pytest.fixture(autouse=True)
def same_state_for_every_test():
    """Seeds, threads and the chosen backend do not leak from one test to the next."""
    from lka_kernels import dispatch, remembered_calls

    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    dispatch._Requested.backend = "auto"
    remembered_calls.forget_all()
    if "lka_kernels.backends.triton.replay" in sys.modules:
        sys.modules["lka_kernels.backends.triton.replay"].forget_all()


@pytest.fixture(autouse=True)
def kernels_have_finished(request):
    """What a GPU kernel did wrong is the error of the test that launched it.

    A failed kernel leaves CUDA unusable in its process: what follows would fail for its sake.
    """
    yield
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        message = f"{request.node.nodeid} left CUDA unusable: {error}"
        if "PYTEST_XDIST_WORKER" in os.environ:
            sys.__stderr__.write(message + "\n")
            os._exit(3)  # pytest-xdist names the test, and starts another worker
        pytest.exit(message, returncode=3)


@pytest.fixture
def compiled_cpu():
    """Skip where the compiled CPU kernels are not there, with the reason."""
    from lka_kernels import available_backends

    status = available_backends()["cpu"]
    if status != "ready":
        pytest.skip(f"no compiled CPU kernels: {status}")
