"""``lka-info``: what it prints is complete, consistent and JSON where asked."""

import importlib.metadata
import json
import os
import sys
import types

import pytest
import torch

from lka_kernels import _extension, available_backends, gpu_choice, info

SMALL = ["--mebibytes", "2", "--repeats", "3"]


def test_json_holds_what_the_library_reports(capsys):
    assert info.main(["--json", *SMALL]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["backends"] == available_backends()
    assert found["instruction_set"] == _extension.instruction_set()
    assert found["threads"] == torch.get_num_threads()
    assert found["cuda_kernels"]["compiled"] == _extension.built_with_cuda()
    assert [d["device"] for d in found["devices"]] == [
        "cpu",
        *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
    ]
    copy = found["devices"][0]["copy"]
    assert 0 < copy["slowest"] <= copy["gigabytes_per_second"] <= copy["fastest"]
    assert (copy["mebibytes"], copy["repeats"]) == (2, 3)


def test_text_names_every_backend_with_its_reason(capsys):
    assert info.main(SMALL) == 0
    text = capsys.readouterr().out
    for name, status in available_backends().items():
        assert f"{name:14}{status}" in text
    assert "median of 3, 2 MiB buffers" in text
    assert f"GPU choices by      times on {gpu_choice.facts()['device']}, " in text
    without = info.collect(2, 1) | {"gpu_times": dict.fromkeys(gpu_choice.facts())}
    assert "GPU choices by      rules" in info.as_text(without)


@pytest.mark.parametrize("arguments", [SMALL, ["--support-table"]])
def test_a_reader_that_stops_early_is_no_error(monkeypatch, arguments):
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert info.main(arguments) == 0


def test_architectures_are_read_from_the_library():
    architectures = info.cuda_architectures()
    if not _extension.built_with_cuda():
        assert architectures == []
    elif info._cuobjdump() is None:
        assert architectures is None
    else:
        assert architectures
        assert all(name.startswith("sm_") for name in architectures)


def test_a_package_that_is_not_installed_is_said_so(monkeypatch):
    monkeypatch.setattr(info, "PACKAGES", ("torch", "no-such-package-here"))
    assert info.versions()["no-such-package-here"] == "not installed"


@pytest.mark.parametrize("option", ["--mebibytes", "--repeats"])
def test_a_count_below_one_is_refused(option, capsys):
    with pytest.raises(SystemExit) as stopped:
        info.main([option, "0"])
    assert stopped.value.code == 2
    assert f"{option} must be at least 1" in capsys.readouterr().err


def test_a_library_of_another_version_is_not_used(monkeypatch):
    """One that was left in a source tree: the import goes on, and the state says why."""
    monkeypatch.delenv("LKA_NO_EXTENSION", raising=False)
    old = types.SimpleNamespace(instruction_set=lambda: "avx2")
    monkeypatch.setattr(_extension.importlib, "import_module", lambda name: old)
    module, status = _extension._load()
    assert module is None
    assert "another version, without built_with_cuda" in status


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        (
            "processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n",
            "AMD EPYC (family 26, model 2)",
        ),
        ("processor\t: 0\nBogoMIPS\t: 50.00\nCPU part\t: 0xd0c\n", "aarch64"),
    ],
)
def test_processors_of_one_name_are_told_apart(monkeypatch, cpuinfo, name):
    monkeypatch.setattr(info.Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(info.platform, "processor", lambda: "aarch64")
    assert info.processor_name() == f"{name}, {os.cpu_count()} CPUs"
