"""A killed run, continued, ends with the numbers of a run that was never killed."""

import csv
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from train_cases import command_line, make_folder, one_thread  # noqa: F401

from lka_kernels.train import checkpoint, files
from lka_kernels.train.cli import main
from lka_kernels.train.errors import TrainError
from lka_kernels.train.folder import CONFIG_NAME, RunFolder, check_free
from lka_kernels.train.history import TIMING

LKA = {
    "method": "lka", "model": "test_convnext", "lka.kernel_size": 3, "lka.dropout": 0.3,
    "augment": "affine",
}  # fmt: skip


def numbers(out):
    """All of history.csv but what measures the machine."""
    with open(out / "history.csv", errors="surrogateescape", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMING} for row in csv.DictReader(file)]


def weights(out, name):
    from safetensors.torch import load_file

    return load_file(out / name)


def assert_same_run(one, other, name):
    assert numbers(one) == numbers(other)
    a, b = weights(one, name), weights(other, name)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("data"), images=12)


def start(arguments):
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "lka_kernels.train", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as in this process: sums in the same order
    )


def test_kill_at_any_moment_and_resume(data, tmp_path):
    options = LKA | {"epochs": 20, "tensorboard": True}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(command_line(data, whole, **options)) == 0
    arguments = [*command_line(data, killed, **options), "--resume"]
    rng, kills = random.Random(0), 0
    for _ in range(2):
        process = start(arguments)
        before = len(numbers(killed)) if (killed / "history.csv").exists() else 0
        deadline = time.monotonic() + 120
        # Wait until this process has trained something, then kill it at a random moment.
        while process.poll() is None and time.monotonic() < deadline:
            if (killed / "history.csv").exists() and len(numbers(killed)) > before:
                break
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills == 2, "the run ended before it could be killed twice"
    assert main(arguments) == 0
    assert_same_run(whole, killed, "adapter.safetensors")
    assert not list(killed.glob(".partial-*"))


class Killed(BaseException):
    """Stands for the end of the process: nothing in the trainer may handle it."""


@pytest.mark.parametrize("method", ["lka", "full", "linear"])
def test_stop_before_any_write(data, tmp_path, monkeypatch, method):
    """Stops at the k-th write of a file, then continues: k covers every kind of file."""
    options = (LKA if method == "lka" else {"method": method}) | {"epochs": 2}
    whole = tmp_path / "whole"
    assert main(command_line(data, whole, **options)) == 0
    name = {"lka": "adapter", "linear": "head", "full": "model"}[method] + ".safetensors"
    real = os.replace
    steps = (0, 2, 3, 4, 5, 7, 8, 10, 40) if method == "lka" else (4, 6)
    for stop in steps:
        done = 0

        def replace(source, target, stop=stop):
            nonlocal done
            if done == stop:
                raise Killed
            done += 1
            real(source, target)

        out = tmp_path / str(stop)
        monkeypatch.setattr(files.os, "replace", replace)
        try:
            main(command_line(data, out, **options))
            finished = True
        except Killed:
            finished = False
        monkeypatch.setattr(files.os, "replace", real)
        assert main([*command_line(data, out, **options), "--resume"]) == 0
        assert_same_run(whole, out, name)
        if finished:
            break
    else:
        assert method != "lka", "more writes than were tried"


def test_names_that_are_no_utf_8_and_no_formulas(tmp_path, monkeypatch, capsys):
    """Nothing is refused, lost or changed, when a run is stopped and continued too."""
    data = make_folder(tmp_path / os.fsdecode(b"da\xffta"), images=6)
    odd = os.fsdecode(b"\xe9 $<5$ and $_$")
    (data / "a").rename(data / odd)
    for path in (data / "b").iterdir():
        path.rename(path.with_name(os.fsdecode(b"\xfc") + path.name))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    options = {"epochs": 2, "tensorboard": True}
    assert main(command_line(data, whole, **options)) == 0
    assert r"\xe9 $<5$ and $_$" in capsys.readouterr().err

    save = checkpoint.save

    def stop_after_the_first(*arguments):
        if arguments[3] == 2:
            raise Killed
        save(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "save", stop_after_the_first)
        with pytest.raises(Killed):
            main(command_line(data, stopped, **options))
    assert main(["--resume", f"--out={stopped}"]) == 0
    assert_same_run(whole, stopped, "head.safetensors")
    assert odd in json.loads((stopped / "metrics.json").read_text())["classes"]
    assert yaml.safe_load((stopped / "config.yaml").read_text())["data"] == str(data)
    split = json.loads((stopped / "split.json").read_text())
    with open(stopped / "predictions.csv", errors="surrogateescape", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == [str(data / name) for name in split["test"]]
    assert f"p_{odd}" in rows[0]
    assert (stopped / "confusion_matrix.png").exists()
    assert f"test_acc_{odd}".encode(errors="surrogateescape") in (
        (stopped / "history.csv").read_bytes()
    )


def test_tensorboard_and_a_folder_that_is_no_utf_8(data, tmp_path, capsys):
    out = tmp_path / os.fsdecode(b"ru\xffn")
    assert main(command_line(data, out, epochs=1, tensorboard=True)) == 1
    assert "--tensorboard false" in capsys.readouterr().err
    assert main(command_line(data, out, epochs=1, resume=True)) == 0
    assert (out / "head.safetensors").exists()


def test_resume_needs_the_same_options_and_images(data, tmp_path, capsys):
    out = tmp_path / "run"
    options = LKA | {"epochs": 1}
    assert main(command_line(data, out, **options)) == 0
    changed = options | {"lr": 0.5, "lka.kernel_size": 5}
    assert main([*command_line(data, out, **changed), "--resume"]) == 1
    message = capsys.readouterr().err
    assert "--lr: 0.01 then, 0.5 now" in message
    assert "--lka.kernel_size: 3 then, 5 now" in message
    other = make_folder(tmp_path / "other", images=12, first_seed=77)
    assert main([*command_line(other, out, **options), "--resume"]) == 1
    assert "images changed" in capsys.readouterr().err


def test_existing_run_is_neither_overwritten_nor_shared(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command_line(data, out, epochs=1)) == 0
    before = (out / "metrics.json").read_bytes()
    assert main(command_line(data, out, epochs=2)) == 1
    assert "--resume" in capsys.readouterr().err
    assert (out / "metrics.json").read_bytes() == before
    assert main([*command_line(data, out, epochs=2), "--overwrite"]) == 0
    assert len(numbers(out)) == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    assert main([*command_line(data, tmp_path / "mine", epochs=1), "--overwrite"]) == 1
    assert (tmp_path / "mine" / "thesis.tex").exists()


def test_overwrite_stopped_at_any_file_can_be_given_again(data, tmp_path, monkeypatch):
    out = tmp_path / "run"
    assert main(command_line(data, out, epochs=1)) == 0
    unlink = Path.unlink
    for stop in range(20):
        removed = 0

        def limited(path, *arguments, stop=stop, **options):
            nonlocal removed
            if path.parent == out:
                if removed == stop:
                    raise Killed
                removed += 1
            unlink(path, *arguments, **options)

        monkeypatch.setattr(Path, "unlink", limited)
        try:
            with RunFolder(out, overwrite=True):
                break
        except Killed:
            check_free(out, resume=False, overwrite=True)
        finally:
            monkeypatch.setattr(Path, "unlink", unlink)
    assert stop > 1
    check_free(out, resume=False, overwrite=False)


def test_resume_without_a_run_says_so(tmp_path, capsys):
    assert main(["--resume"]) == 1
    assert "--resume: --out is missing" in capsys.readouterr().err
    assert main(["--resume", f"--out={tmp_path}"]) == 1
    assert f"--resume: --out {tmp_path} holds no run" in capsys.readouterr().err
    (tmp_path / CONFIG_NAME).write_text("{}")
    options = tmp_path / "options.yaml"
    options.write_text(f"resume: true\nout: {tmp_path}\n")
    assert main([f"--config={options}"]) == 1
    assert "in a --config file it does not find the run's own options" in capsys.readouterr().err


def test_a_run_folder_has_one_user_at_a_time(data, tmp_path, capsys):
    with RunFolder(tmp_path / "run"):
        assert not (tmp_path / "run" / ".lock").stat().st_mode & 0o111
        assert main(command_line(data, tmp_path / "run", epochs=1)) == 1
    assert "in use by another" in capsys.readouterr().err
    assert main(command_line(data, tmp_path / "run", epochs=1)) == 0


def test_resume_takes_all_options_from_the_folder(data, tmp_path):
    out = tmp_path / "run"
    assert main(command_line(data, out, epochs=2)) == 0
    (out / "metrics.json").unlink()
    assert main(["--resume", f"--out={out}"]) == 0
    assert (out / "metrics.json").exists()


def test_full_disk_keeps_what_was_saved(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    options = LKA | {"epochs": 4}
    assert main(command_line(data, tmp_path / "whole", **options)) == 0
    real, seen = files._write_all, []

    def full(path, content):
        if path.name.endswith("checkpoint.pt"):
            seen.append(path)
            if len(seen) == 3:
                path.write_bytes(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, content)

    monkeypatch.setattr(files, "_write_all", full)
    capsys.readouterr()
    assert main(command_line(data, out, **options)) == 1
    message = capsys.readouterr().err
    assert "disk is full" in message
    assert str(out / "checkpoint.pt") in message
    assert "Traceback" not in message
    monkeypatch.setattr(files, "_write_all", real)
    assert checkpoint.load(out)["epoch"] == 2
    assert not list(out.glob(".partial-*"))
    assert main([*command_line(data, out, **options), "--resume"]) == 0
    assert_same_run(tmp_path / "whole", out, "adapter.safetensors")


def test_full_disk_for_real(tmp_path):
    """/dev/full fails every write with ENOSPC."""
    if not Path("/dev/full").is_char_device():
        pytest.skip("this system has no device /dev/full")

    def write(temporary):
        with open("/dev/full", "wb") as file:
            file.write(b"x" * 100_000)

    (tmp_path / "kept").write_bytes(b"old")
    with pytest.raises(TrainError, match=r"disk is full.*kept"):
        files.write_atomically(tmp_path / "kept", write)
    assert (tmp_path / "kept").read_bytes() == b"old"


def test_safetensors_errors_count_as_a_full_disk(tmp_path):
    import safetensors

    # Its errors carry no errno, only this text.
    error = safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
    problem = files.disk_problem(error, tmp_path / "x")
    assert "disk is full" in str(problem)
    assert files.disk_problem(safetensors.SafetensorError("bad header"), tmp_path / "x") is None


def test_checkpoint_holds_no_pickled_code_and_every_random_state(data, tmp_path):
    import numpy as np

    out = tmp_path / "run"
    assert main(command_line(data, out, epochs=1)) == 0
    content = checkpoint.load(out)  # weights_only: fails on pickled objects
    assert content["epoch"] == 1
    states = checkpoint.random_states()
    drawn = random.random(), np.random.rand(), torch.rand(1)
    checkpoint.restore_random_states(states)
    assert drawn == (random.random(), np.random.rand(), torch.rand(1))


def test_broken_checkpoint_is_named(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(command_line(data, out, epochs=1)) == 0
    (out / "checkpoint.pt").write_bytes(b"broken")
    assert main([*command_line(data, out, epochs=1), "--resume"]) == 1
    assert f"checkpoint {out / 'checkpoint.pt'} cannot be read" in capsys.readouterr().err
