"""Splits a data set without letting one image stand on both sides, and reports repeats."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import TrainError


@dataclass(frozen=True)
class Repeats:
    """Identical images in a data set (equal decoded pixels), as lists of sample indices.

    Attributes:
        groups: every set of two or more identical images.
        conflicts: those of ``groups`` that stand under more than one class.
    """

    groups: list[list[int]]
    conflicts: list[list[int]]


def find_repeats(hashes: Sequence[bytes], labels: Sequence[int]) -> Repeats:
    """Groups identical images by their pixel hash, in order of first appearance."""
    groups = [group for group in _by_hash(hashes).values() if len(group) > 1]
    conflicts = [group for group in groups if len({labels[i] for i in group}) > 1]
    return Repeats(groups, conflicts)


def split(
    hashes: Sequence[bytes],
    labels: Sequence[int],
    classes: Sequence[str],
    test_fraction: float = 0.2,
    seed: int = 0,
) -> tuple[list[int], list[int]]:
    """Splits by class, seeded, all copies of an image on one side.

    A group of identical images goes where its first one goes; a class receives groups into the
    test half until ``round(test_fraction * images)`` are reached, so that large groups make the
    half larger by at most their size.

    Returns:
        Sorted sample indices of the training and of the test half.

    Raises:
        TrainError: a class has too few different images to stand in both halves.
    """
    groups_of: dict[int, list[list[int]]] = defaultdict(list)
    for group in _by_hash(hashes).values():
        groups_of[labels[group[0]]].append(group)
    train: list[int] = []
    test: list[int] = []
    for label, name in enumerate(classes):
        groups = groups_of[label]
        if len(groups) < 2:
            raise TrainError(
                f"class {name!r} holds {len(groups)} different image(s): "
                "at least two are needed to train on one and test on another"
            )
        # A stream of its own for each class: adding a class leaves the others' split alone.
        order = np.random.default_rng([seed, label]).permutation(len(groups))
        count = sum(len(group) for group in groups)
        wanted = max(1, round(test_fraction * count))
        taken = 0
        for place, which in enumerate(order):
            last = place == len(order) - 1  # one group always stays for training
            half = test if taken < wanted and not last else train
            half += groups[which]
            taken += len(groups[which])
    return sorted(train), sorted(test)


def leaked(train: Sequence[int], test: Sequence[int], hashes: Sequence[bytes]) -> list[int]:
    """Indices of the training images that stand in the test half too."""
    held_out = {hashes[i] for i in test}
    return [i for i in train if hashes[i] in held_out]


def _by_hash(hashes: Sequence[bytes]) -> dict[bytes, list[int]]:
    groups: dict[bytes, list[int]] = {}
    for index, pixels in enumerate(hashes):
        groups.setdefault(pixels, []).append(index)
    return groups
