"""Finds the images and classes of a data folder, and decodes them once for the whole run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .errors import TrainError
from .images import SUFFIXES, decode, fit, pixel_hash

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing", "val", "valid", "validation")


@dataclass(frozen=True)
class Sample:
    """One image file and the index of its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class Folder:
    """What a data folder holds.

    ``test`` is None where the folder has no halves and still has to be split. ``notes`` are
    lines for the user: what was ignored and what looks odd.
    """

    root: Path
    classes: tuple[str, ...]
    train: list[Sample]
    test: list[Sample] | None
    notes: tuple[str, ...] = ()


def scan(
    root: str | Path, test_half: str = "", exclude: Sequence[str] = (), limit_per_class: int = 0
) -> Folder:
    """Lists images and classes of ``root``, decoding nothing.

    Args:
        root: holds class folders, or a train and a test (or val) folder that hold them.
        test_half: name of the folder to evaluate on; "" takes test, then val.
        exclude: patterns of file names to leave out.
        limit_per_class: at most so many images a class and half, spread evenly; 0 is all.

    Raises:
        TrainError: missing folder, no class folders, a single class, a class without images, a
            class in one half only. The message names the folder or class.
    """
    root = Path(root)
    try:
        root.stat()
    except FileNotFoundError:
        raise TrainError(f"data folder {root} does not exist") from None
    except OSError as error:
        raise _unreadable(error) from error
    if not root.is_dir():
        raise TrainError(f"{root} is a file; a folder of class folders is expected")
    halves = {folder.name.lower(): folder for folder in _subfolders(root)}
    train = next((halves[name] for name in TRAIN_NAMES if name in halves), None)
    tests = [halves[name] for name in TEST_NAMES if name in halves]
    notes: list[str] = []
    if train is None and tests and len(tests) == len(halves):
        raise TrainError(f"{root} holds {tests[0].name} but no train folder")
    if train is None:
        if test_half:
            raise TrainError(f"--test_half {test_half}: {root} has no train folder beside it")
        classes, samples = _scan_half(root, exclude, limit_per_class, notes)
        _check_classes(root, classes)
        return Folder(root, classes, samples, None, tuple(notes))

    test = _choose_test(root, test_half, tests, halves, notes)
    known = {train, *tests, *([test] if test else [])}
    unused = sorted(folder.name for folder in halves.values() if folder not in known)
    if unused:
        notes.append(f"beside the halves of {root}, not used: {', '.join(unused)}")
    classes, train_samples = _scan_half(train, exclude, limit_per_class, notes)
    _check_classes(train, classes)
    if test is None:
        notes.append(f"{root} has no test folder: {train.name} is split")
        return Folder(root, classes, train_samples, None, tuple(notes))
    test_classes, test_samples = _scan_half(test, exclude, limit_per_class, notes)
    for here, there, names in (
        (train, test, set(classes) - set(test_classes)),
        (test, train, set(test_classes) - set(classes)),
    ):
        if names:
            listed = ", ".join(repr(name) for name in sorted(names))
            raise TrainError(f"class {listed} is in {here} but not in {there}")
    return Folder(root, classes, train_samples, test_samples, tuple(notes))


@dataclass(frozen=True)
class Decoded:
    """Every image of a run, decoded once.

    ``hashes`` has one pixel hash a sample. ``pixels`` is (N, size, size, 3) uint8, or None when
    that would not fit the memory granted. ``brightest`` is the largest value met in 16-bit
    images, 0 without any.
    """

    hashes: list[bytes]
    pixels: np.ndarray | None
    brightest: int

    def fingerprint(self, labels: Sequence[int]) -> str:
        """Hash over all images and labels in their order: equal data, equal fingerprint."""
        digest = hashlib.blake2b(digest_size=16)
        for pixels, label in zip(self.hashes, labels, strict=True):
            digest.update(pixels + int(label).to_bytes(4, "little"))
        return digest.hexdigest()


def decode_all(
    paths: Sequence[Path],
    size: int,
    resize: str = "squash",
    sixteen_bit_max: int = 65535,
    workers: int = 2,
    cache_bytes: int = 4 << 30,
) -> Decoded:
    """Decodes every image: proves that it can be read, hashes its pixels, keeps it resized.

    Raises:
        TrainError: names the images that cannot be read (the first ten, and how many more).
    """
    keep = len(paths) * size * size * 3 <= cache_bytes
    pixels = np.empty((len(paths), size, size, 3), np.uint8) if keep else None
    hashes: list[bytes] = [b""] * len(paths)
    brightest = 0
    failures: list[str] = []

    def keep_one(index: int) -> tuple[int, str]:
        try:
            image, brightest = decode(paths[index], sixteen_bit_max)
        except TrainError as error:
            return 0, str(error)
        hashes[index] = pixel_hash(image)
        if pixels is not None:
            pixels[index] = fit(image, size, resize)
        return brightest, ""

    # Threads are enough: Pillow releases the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(keep_one, range(len(paths)))
        for value, failure in tqdm(
            found, "reading images", len(paths), unit="img", leave=False, disable=None
        ):
            brightest = max(brightest, value)
            if failure:
                failures.append(failure)
    if failures:
        more = f"\n  and {len(failures) - 10} more" if len(failures) > 10 else ""
        listed = "\n  ".join(failures[:10])
        raise TrainError(f"{len(failures)} of {len(paths)} images are broken:\n  {listed}{more}")
    return Decoded(hashes, pixels, brightest)


def _unreadable(error: OSError) -> TrainError:
    return TrainError(f"data folder {error.filename} cannot be read: {error.strerror}")


def _subfolders(root: Path) -> list[Path]:
    try:
        return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    except OSError as error:
        raise _unreadable(error) from error


def _files(folder: Path) -> list[Path]:
    """Every file below ``folder`` that is not hidden, in order; TrainError if it cannot be read."""

    def fail(error: OSError) -> None:  # os.walk, as Path.rglob, would go on without a word
        raise _unreadable(error) from error

    found = []
    for here, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(here, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _choose_test(
    root: Path, wanted: str, tests: list[Path], halves: dict[str, Path], notes: list[str]
) -> Path | None:
    if wanted:
        if wanted.lower() not in halves:
            raise TrainError(f"--test_half {wanted}: {root} has only {', '.join(sorted(halves))}")
        return halves[wanted.lower()]
    if len(tests) > 1:
        left = ", ".join(folder.name for folder in tests[1:])
        notes.append(f"evaluating on {tests[0].name}; {left} is not used (see --test_half)")
    return tests[0] if tests else None


def _scan_half(
    root: Path, exclude: Sequence[str], limit: int, notes: list[str]
) -> tuple[tuple[str, ...], list[Sample]]:
    folders = _subfolders(root)
    if not folders:
        count = sum(p.suffix.lower() in SUFFIXES for p in root.iterdir())
        found = f"{count} images but no" if count else "no"
        raise TrainError(f"{root} holds {found} class folders")
    samples: list[Sample] = []
    for label, folder in enumerate(folders):
        images, others, excluded = [], [], 0
        for path in _files(folder):
            if any(fnmatch(path.name, pattern) for pattern in exclude):
                excluded += 1
            elif path.suffix.lower() in SUFFIXES:
                images.append(path)
            else:
                others.append(path)
        kinds = ", ".join(sorted({path.suffix or path.name for path in others}))
        if not images:
            why = f"; its {len(others)} files ({kinds}) are not of a supported kind" * bool(others)
            why += f"; --exclude left out {excluded}" * bool(excluded)
            raise TrainError(f"class folder {folder} holds no images{why}")
        if others:
            notes.append(f"{folder}: {len(others)} files that are not images ignored ({kinds})")
        if limit and len(images) > limit:
            # Evenly spread: files of one patient or shot often follow each other by name.
            picks = np.linspace(0, len(images) - 1, limit).round().astype(int)
            images = [images[i] for i in picks]
        samples += [Sample(path, label) for path in images]
    return tuple(folder.name for folder in folders), samples


def _check_classes(root: Path, classes: tuple[str, ...]) -> None:
    if len(classes) < 2:
        raise TrainError(
            f"{root} holds a single class, {classes[0]!r}; at least two class folders are needed"
        )
