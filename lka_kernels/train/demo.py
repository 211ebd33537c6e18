"""Shows what a large kernel adds: ``python -m lka_kernels.train.demo``.

Trains a linear probe, an adapter without convolution, LKA 3x3 and LKA 7x7 on the generated
images of :mod:`lka_kernels.train.synthetic`, on the frozen early stages of EfficientNet-Lite0
with ImageNet weights, and prints a table of what was measured. The exit status is 1 if something
did not work: a variant that did not train, or an LKA 7x7 that did not beat all others.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lka_kernels import available_backends, use_backend
from lka_kernels.methods import METHODS
from lka_kernels.methods.lka import LKAOptions

from . import batches, features, loop, model
from .errors import TrainError
from .synthetic import CLASSES, CellImages, generate

BATCH = 32
VARIANTS = {
    "linear probe": ("linear", None),
    "adapter, no convolution": ("lka", LKAOptions(conv="none", dropout=0.0)),
    "LKA 3x3": ("lka", LKAOptions(kernel_size=3, dropout=0.0)),
    "LKA 7x7": ("lka", LKAOptions(kernel_size=7, dropout=0.0)),
}


@dataclass
class Result:
    """One line of the table; times are medians in seconds, None for a method without adapters."""

    accuracy: float
    parameters: int
    fused: float | None
    plain: float | None


def main(arguments: list[str] | None = None) -> int:
    """Runs the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="lka-demo", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer images and epochs, for CI")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-images", type=int, default=0, help="0: 800, with --quick 256")
    parser.add_argument("--epochs", type=int, default=0, help="0: 8, with --quick 2")
    parser.add_argument("--lr", type=float, default=5e-3)
    options = parser.parse_args(arguments)
    count = options.train_images or (256 if options.quick else 800)
    epochs = options.epochs or (2 if options.quick else 8)
    begun = time.perf_counter()
    images = CellImages()
    train = generate(count, 2 * options.seed + 1, images)
    test = generate(count // 2 if options.quick else 400, 2 * options.seed + 2, images)
    print(
        f"{count} training and {len(test[1])} test images of {images.size} x {images.size} pixels; "
        f"classes {' and '.join(CLASSES)}: on which side, {images.distance:g} pixels away, the "
        f"brown cell of a pair lies\nEfficientNet-Lite0 up to stride 16, frozen; {epochs} epochs, "
        f"batch {BATCH}, {torch.get_num_threads()} threads; "
        f"fused backend: {available_backends()['cpu']}\n",
        flush=True,
    )
    results: dict[str, Result] = {}
    try:
        for name, (method, method_options) in VARIANTS.items():
            started = time.perf_counter()
            results[name] = run_variant(
                method, method_options, train, test, epochs, options.lr, options.seed
            )
            print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    except TrainError as error:
        print(f"lka-demo: error: {error}", file=sys.stderr)
        return 1
    print(table(results, len(test[1])))
    print(f"\n{time.perf_counter() - begun:.0f} seconds in all")
    if options.quick:
        print("--quick trains too little for the accuracies to mean anything: no verdict")
        return 0
    return verdict(results, len(test[1]))


def run_variant(
    method_name: str,
    method_options: LKAOptions | None,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    epochs: int,
    lr: float,
    seed: int,
) -> Result:
    """Trains one variant and times its training step through both backends."""
    torch.manual_seed(seed)
    method = METHODS[method_name]
    size = train[0].shape[1]
    backbone = model.build(model.LITE0, "pretrained", len(CLASSES), size)
    network = early_stages(backbone.model, len(CLASSES))
    network = method.apply(network, method_options or method.options())
    network.to(memory_format=torch.channels_last)
    learning = [p for p in network.parameters() if p.requires_grad]
    optimizer = loop.make_optimizer(network, lr, weight_decay=0.01)
    steps = len(batches.epoch_order(len(train[1]), BATCH, seed, 0))
    rates = (
        loop.learning_rate(step, epochs * steps, steps, lr, 0.01 * lr) for step in itertools.count()
    )

    def forward(batch: Tensor) -> Tensor:
        return network(batches.normalise(batch, backbone.mean, backbone.std))

    network.eval()
    classify, sources = forward, (_Pixels(train), _Pixels(test))
    if method_name == "linear":  # its features never change: they are computed once
        pooled = features.PooledFeatures(network)
        classify = network.get_classifier()
        sources = tuple(
            _Stored(half, lambda b: pooled(batches.normalise(b, backbone.mean, backbone.std)))
            for half in (train, test)
        )
    for epoch in range(epochs):
        method.train_mode(network)
        loop.train_epoch(
            classify,
            learning,
            optimizer,
            sources[0].batches(batches.epoch_order(len(train[1]), BATCH, seed, epoch)),
            rates=rates,
            clip_grad=1.0,
        )
    network.eval()
    logits = loop.predict(classify, sources[1].batches(batches.in_order(len(test[1]), 50)))
    hits = int((logits.argmax(1) == torch.from_numpy(test[1])).sum())
    fused = plain = None
    if method_name == "lka":
        fused, plain = time_steps(network, method, forward, train)
    return Result(hits / len(test[1]), sum(p.numel() for p in learning), fused, plain)


def early_stages(network: nn.Module, classes: int) -> nn.Module:
    """EfficientNet-Lite0 up to its first layer of stride 16, with a classifier of its own.

    Its adapters then sit on grids of one token every 4 and every 8 pixels. In the whole model a
    3x3 adapter in the later stages, with a token every 16 or 32 pixels, spans the distance that
    decides here, and was seen to learn such a task (a distance of 24 pixels) as fast as 7x7.
    """
    stages = list(network.blocks)[:4]
    # The first block of the fourth stage: it has no residual, and so takes no adapter, but its
    # activations turn what the adapters bring together into features.
    stages[3] = stages[3][:1]
    network.blocks = nn.Sequential(*stages)
    network.conv_head, network.bn2 = nn.Identity(), nn.Identity()
    width = stages[3][0].conv_pwl.out_channels
    network.num_features = network.head_hidden_size = width
    network.classifier = nn.Linear(width, classes)
    return network


def time_steps(
    network: nn.Module, method, forward, train: tuple[np.ndarray, np.ndarray], rounds: int = 7
) -> tuple[float, float]:
    """Median seconds of forward and backward of a batch, fused and through plain torch.

    The two take turns, so that a change in the machine's load meets both.
    """
    method.train_mode(network)
    images = torch.from_numpy(train[0][:BATCH]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(train[1][:BATCH])
    seconds: dict[str, list[float]] = {"auto": [], "torch": []}
    for place in range(rounds + 1):
        for backend, times in seconds.items():
            network.zero_grad(set_to_none=True)
            with use_backend(backend):
                begun = time.perf_counter()
                F.cross_entropy(forward(images), labels).backward()
                taken = time.perf_counter() - begun
            if place:  # the first round warms up
                times.append(taken)
    network.zero_grad(set_to_none=True)
    return float(np.median(seconds["auto"])), float(np.median(seconds["torch"]))


def table(results: dict[str, Result], tested: int) -> str:
    """The results as text; accuracies with the half width of their 95 % interval."""
    lines = [f"{'':26}{'accuracy':>16}{'parameters':>12}{'fused s/step':>14}{'torch s/step':>14}"]
    for name, result in results.items():
        spread = 1.96 * (result.accuracy * (1 - result.accuracy) / tested) ** 0.5
        accuracy = f"{100 * result.accuracy:.1f} ± {100 * spread:.1f} %"
        times = [f"{t:.4f}" if t is not None else "-" for t in (result.fused, result.plain)]
        lines.append(f"{name:26}{accuracy:>16}{result.parameters:>12,}{times[0]:>14}{times[1]:>14}")
    return "\n".join(lines)


def verdict(results: dict[str, Result], tested: int) -> int:
    """0 where LKA 7x7 is ahead of every other variant by more than chance allows, else 1."""
    best = results["LKA 7x7"].accuracy
    rival = max((name for name in results if name != "LKA 7x7"),
                key=lambda name: results[name].accuracy)  # fmt: skip
    other = results[rival].accuracy
    # Two standard errors of a difference of two proportions over the same number of images.
    margin = 2 * ((best * (1 - best) + other * (1 - other)) / tested) ** 0.5
    if best - other <= margin:
        print(
            f"not shown: LKA 7x7 has {100 * best:.1f} %, {rival} {100 * other:.1f} %; a lead of "
            f"more than {100 * margin:.1f} points was expected"
        )
        return 1
    print(f"LKA 7x7 is {100 * (best - other):.1f} points ahead of the next, {rival}")
    return 0


class _Pixels:
    """Batches of a generated half."""

    def __init__(self, half: tuple[np.ndarray, np.ndarray]):
        self.images, self.labels = half[0], torch.from_numpy(half[1])

    def batches(self, orders: list[np.ndarray]) -> loop.Batches:
        for indices in orders:
            images = torch.from_numpy(self.images[indices]).permute(0, 3, 1, 2)
            yield indices, images, self.labels[torch.from_numpy(indices)]


class _Stored:
    """Batches of stored features of a generated half."""

    @torch.no_grad()
    def __init__(self, half: tuple[np.ndarray, np.ndarray], compute):
        orders = batches.in_order(len(half[1]), 50)
        self.labels = torch.from_numpy(half[1])
        self.features = torch.cat(
            [compute(images) for _, images, _ in _Pixels(half).batches(orders)]
        )

    def batches(self, orders: list[np.ndarray]) -> loop.Batches:
        for indices in orders:
            where = torch.from_numpy(indices)
            yield indices, self.features[where], self.labels[where]


if __name__ == "__main__":
    sys.exit(main())
