"""The package as a whole: what the library links to, importing without it, make targets in docs."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lka_kernels
from lka_kernels import _extension

ROOT = Path(__file__).parents[1]

WITHOUT_EXTENSION = """
import warnings

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    before = len(caught)
    import lka_kernels
    import lka_kernels.functional
    ours = [str(w.message) for w in caught[before:]]
assert len(ours) == 1, ours
assert "LKA_NO_EXTENSION=1" in ours[0], ours
assert "LKA_NO_EXTENSION=1" in lka_kernels.available_backends()["cpu"]
x, weight = torch.randn(2, 3, 9, 9), torch.randn(3, 1, 5, 5)
expected = torch.nn.functional.conv2d(x, weight, padding=2, groups=3)
torch.testing.assert_close(lka_kernels.depthwise_conv2d(x, weight, padding=2), expected)
tokens = torch.randn(2, 16, 8)
assert torch.equal(lka_kernels.FusedLKA(8)(tokens, residual=tokens), tokens)
try:
    lka_kernels.use_backend("cpu")
except RuntimeError as error:
    assert "LKA_NO_EXTENSION=1" in str(error)
else:
    raise AssertionError("use_backend('cpu') must say why it cannot run")
"""


@pytest.fixture
def library():
    """The compiled library's path."""
    if not _extension.loaded():
        pytest.skip(f"no compiled library: {_extension.STATUS}")
    return _extension.MODULE.__file__


def test_library_needs_nothing_outside_the_stable_abi(library):
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    symbols = subprocess.run(
        ["nm", "-D", "-C", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert any("aoti_torch_" in line or "torch_library" in line for line in symbols)
    assert [line for line in symbols if re.search(r"\b(at|c10)::", line)] == []


def test_library_is_for_every_python(library):
    assert Path(library).name == "_C.abi3.so"
    # Symbols of CPython that the limited API leaves out start with an underscore.
    text = Path(library).read_bytes()
    assert b"_PyObject_" not in text
    assert b"PyUnicode_FromString" in text


def test_without_extension_one_warning_and_everything_works():
    subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION],
        env={**os.environ, "LKA_NO_EXTENSION": "1"},
        check=True,
    )


def test_import_is_silent_with_the_extension(library):
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", "import lka_kernels"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout + done.stderr == ""


def test_version_is_the_one_that_the_changelog_names():
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == lka_kernels.__version__


def test_every_public_name_exists():
    assert [name for name in lka_kernels.__all__ if not hasattr(lka_kernels, name)] == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_in_the_docs_exist(page):
    named = set(re.findall(r"`make ([a-z]+)", (ROOT / page).read_text()))
    made = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert named
    assert named <= made


def test_pinned_torch_is_one_that_the_package_accepts():
    pinned = re.search(r"^torch==(\d+)\.(\d+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert tuple(map(int, pinned.groups())) >= (2, 11)
    assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 11)
