"""Run launches of Triton kernels."""

from __future__ import annotations

import contextlib
import os

import torch

from lka_kernels.backends.triton import replay
from lka_kernels.backends.triton.launch import Launch, run_one
from lka_kernels.backends.triton.tuning import tuned


def run(launches: list[Launch], device: torch.device) -> None:
    """Run launches one after another on the current stream of ``device``."""
    # Triton launches on the current device, whatever device its arguments are on.
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    tune = os.environ.get("LKA_TRITON_TUNE") == "1"
    recorder = replay.recorder()
    run_watched = run_one if recorder is None else recorder.run
    with guard:
        for launch in launches:
            run_watched(tuned(launch, device) if tune else launch)
