"""The Triton kernels in Triton's interpreter, for the tests that run them without a GPU.

Triton decides when a kernel is defined whether it is interpreted. Importing this module, which test
modules do before they import kernels, defines them so; the variable is set again only while a test
with the fixture ``interpreter`` runs, so that all other tests of the process see what users see.
"""

from __future__ import annotations

import os
import sys

import pytest

if importing_first := "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        from lka_kernels.backends.triton import depthwise  # noqa: F401
    except ImportError:
        importing_first = False  # no Triton here
    finally:
        del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def interpreter(monkeypatch):
    """The Triton backend serves CPU tensors during a test."""
    if not importing_first:
        pytest.skip("Triton is not installed, or was imported before its interpreter was chosen")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
