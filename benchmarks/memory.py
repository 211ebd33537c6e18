"""Peak of the memory that a call allocates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """The most bytes that were allocated at one time during ``call``, beyond those before it.

    On a GPU by the statistics of PyTorch's allocator, on a CPU by the memory events of its
    profiler. Neither sees what is allocated elsewhere: the scratch that this library's CPU kernels
    keep between calls (csrc/cpu/scratch.h), workspaces inside oneDNN, MKL or cuDNN.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
        del result
    with tempfile.TemporaryDirectory() as folder:
        # Of the profiler's public forms, the trace alone has frees and allocations in order.
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted(
        (event["ts"], event["args"]["Bytes"])
        for event in events
        if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0
    )
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
