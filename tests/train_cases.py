"""Small image folders and small runs for the trainer's tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

# A convolutional model with batch norm of 0.4 M parameters; no weights needed.
TINY = "test_efficientnet"


def make_image(path: Path, seed: int, side: int = 24, colour: int = 0) -> None:
    """Writes noise with one bright channel, which makes the classes easy to tell apart."""
    pixels = np.random.default_rng(seed).integers(0, 120, (side, side, 3), np.uint8)
    pixels[..., colour] += 100
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def make_folder(root: Path, classes: int = 2, images: int = 10, first_seed: int = 0) -> Path:
    """Class folders a, b, c with PNG images."""
    for label in range(classes):
        for index in range(images):
            seed = first_seed + 1000 * label + index
            make_image(root / "abc"[label] / f"{index:02}.png", seed, colour=label)
    return root


def tiny_options(**changes) -> dict:
    """Options of a run of a second or two."""
    return {
        "model": TINY, "weights": "random", "method": "linear", "input_size": 32, "epochs": 3,
        "batch_size": 4, "lr": 1e-2, "tensorboard": False, "device": "cpu",
    } | changes  # fmt: skip


def command_line(data: Path, out: Path, **changes) -> list[str]:
    """The same as arguments of lka-train."""
    options = tiny_options(**changes)
    return [str(data), f"--out={out}", *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """One thread: quicker on tiny models, above all when other processes want the processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
