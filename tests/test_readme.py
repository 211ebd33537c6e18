"""The README's examples run, and its commands take the options that it gives them."""

import re
import shlex
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def training_commands() -> list[str]:
    """The lines of the README that call lka-train."""
    lines = "".join(blocks("console")).splitlines()
    return [line for line in lines if line.startswith("lka-train ")]


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[-1][:30])
def test_python_example_runs(code, tmp_path, monkeypatch):
    if "import timm" in code:
        pytest.importorskip("timm")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_there_are_examples():
    assert len(blocks("python")) >= 3
    assert len(training_commands()) >= 2


@pytest.mark.parametrize("command", training_commands())
def test_training_command_is_understood(command):
    pytest.importorskip("jsonargparse")
    from lka_kernels.train import cli

    config, _ = cli.parse(shlex.split(command, comments=True)[1:])
    # The third command continues a run and takes its data from there.
    assert config.data == "DATA" or config.resume


def test_states_name_every_backend():
    from lka_kernels.dispatch import BACKENDS

    assert set(re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", README, re.M)) == set(BACKENDS)


def test_support_table_is_what_the_predicates_say(monkeypatch):
    from lka_kernels import support

    # Triton's interpreter serves tensors on the CPU; the README is of GPUs.
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    table = README.split(support.BEGIN)[1].split(support.END)[0].strip()
    assert table == support.as_markdown(), "lka-info --support-table README.md writes it anew"
