"""From a data folder to two halves of decoded images, and a report on repeats."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

from .batches import Images
from .config import TrainConfig
from .data import Decoded, Sample, decode_all, scan
from .errors import TrainError
from .splits import find_repeats, leaked, split


@dataclass(frozen=True)
class Dataset:
    """The two halves of a run.

    Attributes:
        classes: names, in the order of the labels.
        train, test: images of the halves.
        fingerprint: hash over the pixels and labels of both halves, in their order.
        report: counts for metrics.json: images, repeats, conflicts, leaks.
        notes: lines for the user.
    """

    classes: tuple[str, ...]
    train: Images
    test: Images
    fingerprint: str
    report: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def load(config: TrainConfig, size: int) -> Dataset:
    """Scans, decodes, checks and splits ``config.data`` into square images of ``size`` pixels.

    Raises:
        TrainError: everything that :func:`scan`, :func:`decode_all` and :func:`split` find.
    """
    folder = scan(config.data, config.test_half, config.exclude, config.limit_per_class)
    samples = [*folder.train, *(folder.test or [])]
    decoded = _decode(
        tuple(sample.path for sample in samples),
        tuple(_changed(sample.path) for sample in samples),
        size,
        config.resize,
        config.sixteen_bit_max,
        config.num_workers,
        int(config.cache_images_gb * 2**30),
    )
    labels = [sample.label for sample in samples]
    notes = list(folder.notes)
    _note_dark_images(decoded, config, notes)
    repeats = find_repeats(decoded.hashes, labels)
    copies = sum(len(group) - 1 for group in repeats.groups)
    if copies:
        notes.append(f"{copies} images repeat another one (equal pixels)")
    for group in repeats.conflicts:
        names = " = ".join(str(samples[i].path.relative_to(folder.root)) for i in group)
        notes.append(f"the same image under different classes: {names}")

    if folder.test is None:
        seed = config.seed if config.split_seed < 0 else config.split_seed
        train, test = split(decoded.hashes, labels, folder.classes, config.test_fraction, seed)
    else:
        train = list(range(len(folder.train)))
        test = list(range(len(folder.train), len(samples)))
    both = leaked(train, test, decoded.hashes)
    if both:
        notes.append(
            f"{len(both)} training images stand in the test half too"
            + (": left out of training" if config.drop_leaked else " (see --drop_leaked)")
        )
    if both and config.drop_leaked:
        gone = set(both)
        train = [i for i in train if i not in gone]
        for label, name in enumerate(folder.classes):
            if not any(labels[i] == label for i in train):
                raise TrainError(f"class {name!r} has no training image left by --drop_leaked")

    report = {
        "train_images": len(train),
        "test_images": len(test),
        "repeated_images": copies,
        "images_under_several_classes": [
            [str(samples[i].path.relative_to(folder.root)) for i in group]
            for group in repeats.conflicts
        ],
        "train_images_in_test": len(both),
        "train_images_dropped": len(both) if config.drop_leaked else 0,
        "split": "given" if folder.test is not None else "made here",
    }
    chosen = [*train, *test]
    picked = Decoded([decoded.hashes[i] for i in chosen], None, 0)
    fingerprint = picked.fingerprint([labels[i] for i in chosen])
    halves = [_images(samples, half, decoded, config, size) for half in (train, test)]
    return Dataset(
        folder.classes, *halves, f"{fingerprint}-{len(train)}-{len(test)}", report, tuple(notes)
    )


def split_record(dataset: Dataset, root: str | Path) -> dict[str, list[str]]:
    """Files of each half, relative to the data folder, for ``split.json``."""
    return {
        name: [str(path.relative_to(root)) for path in half.paths]
        for name, half in (("train", dataset.train), ("test", dataset.test))
    }


def _changed(path: Path) -> int:
    """Time of the last change; 0 for a link that leads nowhere: decoding tells of it by name."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


# A sweep trains many times on one folder: the last decoded folder is kept.
@lru_cache(maxsize=1)
def _decode(paths: tuple[Path, ...], changed: tuple[int, ...], *how) -> Decoded:
    return decode_all(paths, *how)


def _images(
    samples: list[Sample], half: list[int], decoded: Decoded, config: TrainConfig, size: int
) -> Images:
    return Images(
        paths=[samples[i].path for i in half],
        labels=torch.tensor([samples[i].label for i in half]),
        pixels=None if decoded.pixels is None else decoded.pixels[half],
        size=size,
        resize=config.resize,
        sixteen_bit_max=config.sixteen_bit_max,
        workers=config.num_workers,
    )


def _note_dark_images(decoded: Decoded, config: TrainConfig, notes: list[str]) -> None:
    if 0 < decoded.brightest < config.sixteen_bit_max / 8:
        notes.append(
            f"the brightest 16-bit value is {decoded.brightest} of {config.sixteen_bit_max}: the "
            f"images will be nearly black; consider --sixteen_bit_max {decoded.brightest}"
        )
