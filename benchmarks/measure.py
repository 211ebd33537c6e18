"""How it is measured: several buffers in turn, calls timed one by one, the median reported."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from torch import Tensor

# Buffers add up to this many bytes, so that a call does not find its input in a cache.
BUFFER_BYTES = 64 * 2**20
MOST_BUFFERS = 16
FEWEST_ROUNDS = 5
MOST_ROUNDS = 100


def random_inputs(make: Callable[[], Tensor]) -> list[Tensor]:
    """Tensors of ``make``, at least 2, of BUFFER_BYTES in all where MOST_BUFFERS allow it."""
    first = make()
    bytes_each = max(1, first.numel() * first.element_size())
    count = min(max(2, -(-BUFFER_BYTES // bytes_each)), MOST_BUFFERS)
    return [first, *(make() for _ in range(count - 1))]


def run(benchmark, call: Callable[[Tensor], object], inputs: list[Tensor], seconds: float) -> None:
    """Time ``call`` for about ``seconds``, each round with the next of ``inputs``.

    The first calls, which compile or allocate, are not counted. On a GPU each round waits for the
    result.
    """
    turn = itertools.cycle(inputs)
    on_gpu = inputs[0].is_cuda

    def once():
        result = call(next(turn))
        if on_gpu:
            torch.cuda.synchronize()
        return result

    once()
    begun = time.perf_counter()
    once()
    each = time.perf_counter() - begun
    rounds = min(max(FEWEST_ROUNDS, int(seconds / max(each, 1e-7))), MOST_ROUNDS)
    benchmark.extra_info["buffers"] = len(inputs)
    benchmark.pedantic(once, rounds=rounds, iterations=1, warmup_rounds=0)
