"""``lka-info``: versions, backends, devices and the copy bandwidth that timings compare with."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from lka_kernels import _extension, available_backends, gpu_choice
from lka_kernels.version import __version__

PACKAGES = ("torch", "triton", "timm", "torchvision", "numpy")


def main(arguments: list[str] | None = None) -> int:
    """Print what this installation is and can run; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lka-info", description=__doc__.split(": ")[1])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--mebibytes", type=int, default=256, help="buffer of the copy measurement")
    parser.add_argument("--repeats", type=int, default=11, help="copies measured")
    parser.add_argument(
        "--support-table", nargs="?", const="", metavar="FILE",
        help="print what every backend serves, or write it into FILE between its markers",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    for name in ("mebibytes", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(options, name)}")
    if options.support_table is not None:
        return _support_table(options.support_table)
    found = collect(options.mebibytes, options.repeats)
    _print(json.dumps(found, indent=2) if options.json else as_text(found))
    return 0


def _print(text: str) -> None:
    """Print; a reader that has seen enough, such as ``head``, is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is left in the buffer would raise once more when the interpreter ends.
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _support_table(file: str) -> int:
    from lka_kernels import support  # costs time that the rest does not need

    if not file:
        _print(support.as_markdown())
        return 0
    try:
        support.write_between_markers(Path(file))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def collect(mebibytes: int = 256, repeats: int = 11) -> dict:
    """Everything that ``lka-info`` prints, as plain values."""
    devices = [("cpu", processor_name())]
    devices += [
        (f"cuda:{i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())
    ]
    return {
        "versions": versions(),
        "backends": available_backends(),
        "instruction_set": _extension.instruction_set(),
        "threads": torch.get_num_threads(),
        "cuda_kernels": {
            "compiled": _extension.built_with_cuda(),
            "architectures": cuda_architectures(),
        },
        "gpu_times": gpu_choice.facts(),
        "devices": [
            {"device": name, "name": full_name, "copy": copy_bandwidth(name, mebibytes, repeats)}
            for name, full_name in devices
        ],
    }


def versions() -> dict[str, str]:
    """Package -> version or "not installed"; python and CUDA's of torch among them."""
    found = {"lka_kernels": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["torch's CUDA"] = torch.version.cuda or "none"
    return found


def processor_name() -> str:
    """The processor's name, on x86 with family and model, and its number of CPUs.

    Virtual machines give the same name ("AMD EPYC") to processors of different speed.
    """
    try:
        facts = dict(re.findall(r"^([\w ]+?)\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M))
    except OSError:
        facts = {}
    name = facts.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= facts.keys():
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return f"{name}, {os.cpu_count()} CPUs"


def cuda_architectures() -> list[str] | None:
    """Architectures whose machine code (sm_90a) or PTX the library holds; None if not known."""
    if not _extension.built_with_cuda():
        return []
    cuobjdump = _cuobjdump()
    if cuobjdump is None:
        return None
    held = []
    for option, pattern, suffix in (
        ("--list-elf", r"\.(sm_\w+)\.cubin", ""),
        ("--list-ptx", r"\.(sm_\w+)\.ptx", " (PTX)"),
    ):
        result = subprocess.run(
            [cuobjdump, option, _extension.MODULE.__file__],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        held += [name + suffix for name in sorted(set(re.findall(pattern, result.stdout)))]
    return held or None


def _cuobjdump() -> str | None:
    """CUDA's cuobjdump, or the copy that Triton's wheel holds, or None."""
    found = shutil.which("cuobjdump")
    if found is None:
        try:
            files = importlib.metadata.files("triton") or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        found = next((str(f.locate()) for f in files if f.name == "cuobjdump"), None)
    return found if found is not None and os.access(found, os.X_OK) else None


def copy_bandwidth(device: str, mebibytes: int = 256, repeats: int = 11) -> dict:
    """Measure ``target.copy_(source)`` between two buffers of ``mebibytes`` MiB each.

    Returns:
        gigabytes_per_second: bytes read and written per second, 10^9 each, for the median of
        ``repeats`` copies; with the slowest and fastest beside it. Buffers smaller than the
        caches measure these instead of memory.
    """
    source = torch.full((mebibytes * 2**20,), 1, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def wait():
        if source.is_cuda:
            torch.cuda.synchronize(device)

    seconds = []
    for repeat in range(repeats + 2):
        wait()
        begun = time.perf_counter()
        target.copy_(source)
        wait()
        if repeat >= 2:  # the first copies meet untouched pages
            seconds.append(time.perf_counter() - begun)
    moved = 2 * source.numel() / 1e9
    return {
        "gigabytes_per_second": moved / statistics.median(seconds),
        "slowest": moved / max(seconds),
        "fastest": moved / min(seconds),
        "mebibytes": mebibytes,
        "repeats": repeats,
    }


def as_text(found: dict) -> str:
    """The result of ``collect`` for people."""
    lines = [f"{name:16}{version}" for name, version in found["versions"].items()]
    lines += ["", "backends"]
    lines += [f"  {name:14}{status}" for name, status in found["backends"].items()]
    cuda = found["cuda_kernels"]
    if not cuda["compiled"]:
        compiled = "no"
    elif cuda["architectures"] is None:
        compiled = "yes, for architectures not known here (no cuobjdump)"
    else:
        compiled = "yes, for " + ", ".join(cuda["architectures"])
    lines += [
        "",
        f"{'instruction set':20}{found['instruction_set']}",
        f"{'threads':20}{found['threads']}",
        f"{'CUDA kernels built':20}{compiled}",
        f"{'GPU choices by':20}{_times_in_words(found['gpu_times'])}",
        "",
    ]
    for device in found["devices"]:
        copy = device["copy"]
        lines += [
            f"{device['device']:8}{device['name']}",
            f"        copies {copy['gigabytes_per_second']:.1f} GB/s, read and written (median of "
            f"{copy['repeats']}, {copy['mebibytes']} MiB buffers, "
            f"{copy['slowest']:.1f} to {copy['fastest']:.1f})",
        ]
    return "\n".join(lines)


def _times_in_words(facts: dict) -> str:
    if facts["device"] is None:
        return "rules: no measured times are installed"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return f"times on {facts['device']}, {facts['date']}, {versions}"


if __name__ == "__main__":
    raise SystemExit(main())
