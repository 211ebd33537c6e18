"""Warps and stages of launches by timing, kept on disk for every device and version.

Off unless LKA_TRITON_TUNE=1 is in the environment: what ``tiles`` says stands until this has been
shown to be worth its time on a GPU. A launch is timed with at most five choices, which change
nothing but how its work is laid out on threads and in time; sums within a program may then be
rounded in another order, so that results are the same from run to run only once the choices are in
the file.

Nothing is timed while a CUDA graph is captured or code is traced: there a choice found before is
used, or the default. (What torch.compile has compiled calls operators as everyone does, and may be
what times them.) Nor is a launch timed that may read what it writes, as to repeat it would change
the result.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import tempfile
from pathlib import Path

import torch
import triton
from torch import Tensor

from lka_kernels.backends.triton.launch import Launch, run_one
from lka_kernels.version import __version__

# What a choice must gain on the default: less may be noise.
_LEAST_GAIN = 0.03
_REPEATS = 15

_TIMED_DEVICES = ("cuda",)  # not the interpreter's
_WARPS = (1, 2, 4, 8, 16)
_STAGES = range(1, 6)

# File, or None where there is no place for one -> key of a launch -> (warps, stages).
_KNOWN: dict[Path | None, dict[str, list[int]]] = {}


def tuned(launch: Launch, device: torch.device) -> Launch:
    """``launch`` with the best known warps and stages; times them first, if they are not known."""
    file = cache_file(device)
    known = _KNOWN.get(file)
    if known is None:
        known = _KNOWN[file] = _read(file)
    key = key_of(launch)
    if key not in known:
        if not may_time(launch, device):
            return launch
        best = _fastest(launch, device)
        # Other processes may have written meanwhile. What this one has used stays, for the sake of
        # equal bits; of two that write at the same time one loses its choice, and times it again.
        known.update({**_read(file), **known, key: [best.num_warps, best.num_stages]})
        _write(file, known)
    num_warps, num_stages = known[key]
    return launch._replace(num_warps=num_warps, num_stages=num_stages)


def cache_file(device: torch.device) -> Path | None:
    """Where the choices for ``device`` are kept; None if the user has no home."""
    name = "interpreter"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)} {major}.{minor}"
    name = re.sub(r"[^\w.]+", "-", f"{name} triton {triton.__version__} {__version__}")
    base = os.environ.get("XDG_CACHE_HOME")
    if not base:
        try:
            base = Path.home() / ".cache"
        except RuntimeError:
            return None
    return Path(base) / "lka_kernels" / f"{name}.json"


def key_of(launch: Launch) -> str:
    """What a choice depends on; sizes above 16 count as the power of two below."""
    found = [launch.kernel.__name__]
    for value in launch.arguments:
        if isinstance(value, Tensor):
            found.append(str(value.dtype).removeprefix("torch."))
        elif isinstance(value, int) and abs(value) > 16:
            found.append(f"{'-' * (value < 0)}2^{abs(value).bit_length() - 1}")
        elif isinstance(value, float):
            found.append("float")
        else:
            found.append(str(value))
    found += [f"{name}={value}" for name, value in sorted(launch.constants.items())]
    return " ".join([*found, f"warps={launch.num_warps}", f"stages={launch.num_stages}"])


def candidates(launch: Launch) -> list[Launch]:
    """At most five, the default first."""
    warps, stages = launch.num_warps, launch.num_stages
    choices = [(warps, stages), (2 * warps, stages), (warps // 2, stages)]
    choices += [(warps, stages - 1), (warps, stages + 1)]
    return [
        launch._replace(num_warps=w, num_stages=s)
        for w, s in choices
        if w in _WARPS and s in _STAGES
    ]


def may_time(launch: Launch, device: torch.device) -> bool:
    """Whether ``launch`` can be repeated here without a trace, on a device worth timing."""
    if device.type not in _TIMED_DEVICES or torch.compiler.is_compiling():
        return False
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return False
    storages = [
        value.untyped_storage()._cdata for value in launch.arguments if isinstance(value, Tensor)
    ]
    return len(set(storages)) == len(storages)


def _fastest(launch: Launch, device: torch.device) -> Launch:
    best, *others = candidates(launch)
    least = (1 - _LEAST_GAIN) * time_launch(best, device)
    for candidate in others:
        try:
            seconds = time_launch(candidate, device)
        # What the default does without, such as more shared memory than there is, is no error.
        except (triton.errors.TritonError, RuntimeError):
            continue
        if seconds < least:
            best, least = candidate, seconds
    return best


def time_launch(launch: Launch, device: torch.device) -> float:
    """Seconds of one launch, the median of several, after the first has compiled it."""
    for _ in range(3):
        run_one(launch)
    pairs = []
    for _ in range(_REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run_one(launch)
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize(device)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def _read(file: Path | None) -> dict[str, list[int]]:
    """What the file holds; nothing if it is missing or damaged."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if _is_choice(value)}


def _is_choice(value) -> bool:
    return (
        isinstance(value, list)
        and [type(n) for n in value] == [int, int]
        and value[0] in _WARPS
        and value[1] in _STAGES
    )


def _write(file: Path | None, known: dict) -> None:
    """Replace the file in one step; where that cannot be, the choices last for this process."""
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            new = Path(folder) / file.name
            new.write_text(json.dumps(known, indent=1, sort_keys=True))
            new.replace(file)
