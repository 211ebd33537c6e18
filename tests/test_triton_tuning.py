"""Timed choices of warps and stages: with a timer that is told what to find."""

import json
import types

import pytest
import torch

from lka_kernels import available_backends, depthwise_conv2d, use_backend
from lka_kernels.backends.triton import device_type
from lka_kernels.backends.triton.launch import Launch

DEVICE = device_type()
STATUS = available_backends()["triton"]
pytestmark = [pytest.mark.skipif(STATUS != "ready", reason=STATUS)]
if DEVICE == "cuda":
    pytestmark.append(pytest.mark.gpu)


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    """The module with an empty cache on disk and in memory."""
    from lka_kernels.backends.triton import tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_KNOWN", {})
    monkeypatch.setattr(tuning, "_TIMED_DEVICES", ("cuda", "cpu"))
    return tuning


class Timer:
    """Seconds of a choice of warps and stages, and how often it was asked."""

    def __init__(self, seconds=None, error=None):
        self.seconds = seconds or {}
        self.asked = []
        self.error = error

    def __call__(self, launch, device):
        choice = launch.num_warps, launch.num_stages
        self.asked.append(choice)
        if self.error is not None and choice == (8, 3):
            raise self.error
        return self.seconds.get(choice, 1.0)


def launch(*arguments, name="kernel", num_warps=4, num_stages=3, **constants):
    return Launch(
        types.SimpleNamespace(__name__=name), 1, arguments, constants, num_warps, num_stages
    )


def choice(tuning, given) -> tuple[int, int]:
    found = tuning.tuned(given, torch.device(DEVICE))
    assert found._replace(num_warps=given.num_warps, num_stages=given.num_stages) == given
    return found.num_warps, found.num_stages


def test_the_fastest_is_taken_and_kept(tuning, monkeypatch):
    timer = Timer({(2, 3): 0.5, (8, 3): 0.8})
    monkeypatch.setattr(tuning, "time_launch", timer)
    given = launch(100, BLOCK=16)
    assert choice(tuning, given) == (2, 3)
    assert timer.asked == [(4, 3), (8, 3), (2, 3), (4, 2), (4, 4)]
    assert choice(tuning, given) == (2, 3)
    assert choice(tuning, launch(127, BLOCK=16)) == (2, 3)  # as large by powers of two
    tuning._KNOWN.clear()  # as another process would find it
    assert choice(tuning, given) == (2, 3)
    assert len(timer.asked) == 5
    for other in (launch(200, BLOCK=16), launch(100, BLOCK=32), launch(100, BLOCK=16, name="b")):
        choice(tuning, other)
    assert len(timer.asked) == 20
    file = tuning.cache_file(torch.device(DEVICE))
    assert len(json.loads(file.read_text())) == 4
    assert list(file.parent.iterdir()) == [file]


def test_a_gain_within_the_noise_changes_nothing(tuning, monkeypatch):
    monkeypatch.setattr(tuning, "time_launch", Timer({(2, 3): 0.98}))
    assert choice(tuning, launch(100)) == (4, 3)


@pytest.mark.parametrize("compiles", [True, False])
def test_a_choice_that_does_not_fit_is_passed_over(compiles, tuning, monkeypatch):
    from triton.runtime.errors import OutOfResources, PTXASError

    error = OutOfResources(300_000, 232_448, "shared memory") if compiles else PTXASError("no")
    monkeypatch.setattr(tuning, "time_launch", Timer({(8, 3): 0.1, (4, 2): 0.5}, error))
    assert choice(tuning, launch(100)) == (4, 2)


def test_few_choices(tuning):
    for warps in (1, 4, 8, 16):
        for stages in (1, 2, 3, 5):
            found = tuning.candidates(launch(num_warps=warps, num_stages=stages))
            assert found[0] == launch(num_warps=warps, num_stages=stages)
            assert 3 <= len(found) <= 5


@pytest.mark.parametrize("where", ["capture", "trace", "in place"])
def test_not_timed(where, tuning, monkeypatch):
    timer = Timer({(2, 3): 0.5})
    monkeypatch.setattr(tuning, "time_launch", timer)
    x = torch.zeros(4, device=DEVICE)
    given = launch(x, 100)
    if where == "capture":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    elif where == "trace":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        given = launch(x, x[1:], 100)
    assert choice(tuning, given) == (4, 3)
    assert timer.asked == []
    assert not tuning.cache_file(torch.device(DEVICE)).exists()


def test_a_known_choice_is_used_during_capture(tuning, monkeypatch):
    monkeypatch.setattr(tuning, "time_launch", Timer({(2, 3): 0.5}))
    choice(tuning, launch(100))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert choice(tuning, launch(100)) == (2, 3)


KEY = '"kernel 2^6 warps=4 stages=3"'


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[1]", "[" * 200_000, f'{{{KEY}: ["4", 3]}}', f"{{{KEY}: 4}}"),
        *(f"{{{KEY}: {choice}}}" for choice in ("[3, 3]", "[4, -1]", "[0, 0]", "[true, 3]")),
    ],
    ids=range(10),
)
def test_a_damaged_file_is_as_none(content, tuning, monkeypatch):
    timer = Timer({(2, 3): 0.5})
    monkeypatch.setattr(tuning, "time_launch", timer)
    file = tuning.cache_file(torch.device(DEVICE))
    file.parent.mkdir()
    file.write_text(content)
    assert choice(tuning, launch(100)) == (2, 3)
    assert len(json.loads(file.read_text())) == 1


def test_without_a_place_to_write_choices_last_for_the_process(tuning, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    timer = Timer({(2, 3): 0.5})
    monkeypatch.setattr(tuning, "time_launch", timer)
    assert choice(tuning, launch(100)) == choice(tuning, launch(100)) == (2, 3)
    assert len(timer.asked) == 5


def test_without_a_home_choices_last_for_the_process(tuning, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tuning.Path, "home", no_home)
    timer = Timer({(2, 3): 0.5})
    monkeypatch.setattr(tuning, "time_launch", timer)
    assert choice(tuning, launch(100)) == choice(tuning, launch(100)) == (2, 3)
    assert len(timer.asked) == 5


def test_a_full_disk_leaves_nothing_behind(tuning, monkeypatch):
    def full(self, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuning, "time_launch", Timer({(2, 3): 0.5}))
    monkeypatch.setattr(tuning.Path, "write_text", full)
    assert choice(tuning, launch(100)) == (2, 3)
    assert list(tuning.cache_file(torch.device(DEVICE)).parent.iterdir()) == []


def test_what_another_process_found_adds_and_replaces_nothing(tuning, monkeypatch):
    monkeypatch.setattr(tuning, "time_launch", Timer({(2, 3): 0.5}))
    assert choice(tuning, launch(100)) == (2, 3)
    file = tuning.cache_file(torch.device(DEVICE))
    theirs = {tuning.key_of(launch(100)): [8, 3], tuning.key_of(launch(5)): [8, 3]}
    file.write_text(json.dumps(theirs))
    assert choice(tuning, launch(200)) == (2, 3)
    assert choice(tuning, launch(100)) == (2, 3)
    assert choice(tuning, launch(5)) == (8, 3)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU launches are timed")
def test_nothing_is_timed_in_the_interpreter(tuning, monkeypatch):
    monkeypatch.setattr(tuning, "_TIMED_DEVICES", ("cuda",))
    monkeypatch.setenv("LKA_TRITON_TUNE", "1")
    with use_backend("triton"):
        depthwise_conv2d(torch.randn(1, 2, 5, 5), torch.randn(2, 1, 3, 3), padding=1)
    assert not any(tuning._KNOWN.values())


@pytest.mark.parametrize("method", ["direct", "fft"])
def test_the_operators_use_it_if_asked(method, tuning, monkeypatch):
    timer = Timer({(2, 3): 0.5})
    monkeypatch.setattr(tuning, "time_launch", timer)
    x = torch.randn(2, 3, 6, 5, device=DEVICE, requires_grad=True)
    weight = torch.randn(3, 1, 3, 3, device=DEVICE, requires_grad=True)

    def results():
        with use_backend("triton"):
            y = depthwise_conv2d(x, weight, padding="same", method=method)
        return y, *torch.autograd.grad(y.sum(), (x, weight))

    expected = results()
    assert timer.asked == []  # off by default
    monkeypatch.setenv("LKA_TRITON_TUNE", "1")
    for result, other in zip(results(), expected, strict=True):
        torch.testing.assert_close(result, other)
    asked = len(timer.asked)
    assert asked > 0
    results()
    assert len(timer.asked) == asked
    known = next(iter(tuning._KNOWN.values()))
    assert not any(key.startswith("multiply_kernel") for key in known)  # it works in place
