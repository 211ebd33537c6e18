"""Generated images of stained cells whose class is a relation over a distance, nothing else.

Every image shows pairs of a purple and a brown cell, a fixed distance apart. In class "left"
the brown cell stands left of its purple partner, in class "right" to the right of it. An image
of one class is the mirror image of an image of the other: number, size, colour, texture,
distances and density of the cells are distributed alike, so that no measure of single cells,
nor one of undirected neighbourhoods, tells the classes apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CLASSES = ("left", "right")


@dataclass(frozen=True)
class CellImages:
    """Options of the generated set; lengths in pixels.

    Attributes:
        size: side of the image.
        pairs: pairs drawn on a ring that the image shows about two thirds of.
        distance: from a purple cell to its brown partner, centre to centre.
        jitter: standard deviation of the partner's position, along each axis.
        radius: smallest and largest radius of a cell.
        gap: least distance between the centres of any two cells.
    """

    size: int = 96
    pairs: int = 11
    distance: float = 28.0
    jitter: float = 1.0
    radius: tuple[float, float] = (3.0, 4.5)
    gap: float = 9.0


def generate(
    count: int, seed: int, options: CellImages | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Draws images with equal numbers of both classes; equal seeds give equal images.

    Returns:
        images (count, size, size, 3) uint8 and labels (count,) int64, indices into ``CLASSES``.
    """
    options = options or CellImages()
    images = np.empty((count, options.size, options.size, 3), np.uint8)
    labels = np.arange(count, dtype=np.int64) % len(CLASSES)
    for index in range(count):
        # A stream for each image: the first n images do not depend on how many follow.
        rng = np.random.default_rng([seed, index])
        image = _draw(rng, options)
        images[index] = image if labels[index] else image[:, ::-1]
    return images, labels


def _draw(rng: np.random.Generator, options: CellImages) -> np.ndarray:
    """One image of class "right"."""
    size = options.size
    background = np.array([228.0, 196.0, 214.0]) + rng.normal(0, 6, 3)
    image = background + 12 * _smooth_noise(rng, size, 12)[..., None]
    cells = _positions(rng, options)
    for place in rng.permutation(len(cells)):
        x, y, brown = cells[place]
        stain = np.array([126.0, 78.0, 40.0]) if brown else np.array([92.0, 58.0, 140.0])
        _paint_cell(image, rng, x, y, stain + rng.normal(0, 8, 3), options.radius)
    image += rng.normal(0, 4, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def _positions(rng: np.random.Generator, options: CellImages) -> list[tuple[float, float, bool]]:
    """Centres of the cells (x, y, brown), at least ``gap`` apart.

    Pairs are drawn on a ring longer than the image, which is a window onto it: no place on a
    ring differs from another, so both kinds of cell are equally dense everywhere in the window.
    With pairs drawn inside the image, brown cells of class "right" would lie further right; on
    an open strip the cells would be less crowded, and so denser, towards one end: seen as 10 %.
    The ring is too long for a pair to show the wrong way round across its seam.
    """
    low, high = options.radius[1] + 1, options.size - options.radius[1] - 1
    ring = options.size + options.distance + options.gap
    cells: list[tuple[float, float, bool]] = []

    def free(x: float, y: float) -> bool:
        for a, b, _ in cells:
            across = abs(x - a)
            across = min(across, ring - across)
            if across**2 + (y - b) ** 2 < options.gap**2:
                return False
        return True

    for _ in range(200 * options.pairs):
        if len(cells) == 2 * options.pairs:
            break
        x, y = rng.uniform(0, ring), rng.uniform(low, high)
        partner_x = (x + options.distance + rng.normal(0, options.jitter)) % ring
        partner_y = y + rng.normal(0, options.jitter)
        # Rejected, not clipped: clipping would heap brown cells on the upper and lower edge.
        if low <= partner_y <= high and free(x, y) and free(partner_x, partner_y):
            cells += [(x, y, False), (partner_x, partner_y, True)]
    if len(cells) < 2 * options.pairs:
        raise ValueError(
            f"{options.pairs} pairs do not fit an image of {options.size} pixels with a gap of "
            f"{options.gap}"
        )
    return [cell for cell in cells if low <= cell[0] <= high]


def _paint_cell(
    image: np.ndarray,
    rng: np.random.Generator,
    x: float,
    y: float,
    stain: np.ndarray,
    radius: tuple[float, float],
) -> None:
    """Blends a soft-edged, mottled ellipse into the image."""
    major, minor = rng.uniform(*radius), rng.uniform(*radius)
    angle = rng.uniform(0, np.pi)
    reach = int(max(radius) + 3)
    left, top = int(x) - reach, int(y) - reach
    right, bottom = left + 2 * reach + 1, top + 2 * reach + 1
    left, top = max(left, 0), max(top, 0)
    right, bottom = min(right, image.shape[1]), min(bottom, image.shape[0])
    rows, columns = np.mgrid[top:bottom, left:right]
    dx, dy = columns - x, rows - y
    u = (dx * np.cos(angle) + dy * np.sin(angle)) / major
    v = (dy * np.cos(angle) - dx * np.sin(angle)) / minor
    # An edge about one pixel wide, so that positions between pixels are drawn as such.
    cover = 1 / (1 + np.exp(np.clip(4 * (np.hypot(u, v) - 1) * min(major, minor) / 2, -30, 30)))
    mottled = stain + 10 * rng.normal(0, 1, cover.shape)[..., None]
    patch = image[top:bottom, left:right]
    patch += cover[..., None] * (mottled - patch)


def _smooth_noise(rng: np.random.Generator, size: int, cell: int) -> np.ndarray:
    """(size, size) noise of unit variance at its grid points, ``cell`` pixels apart."""
    points = size // cell + 2
    grid = rng.normal(0, 1, (points, points))
    at = np.arange(size) / cell
    low = at.astype(int)
    share = at - low
    rows = grid[low] * (1 - share)[:, None] + grid[low + 1] * share[:, None]
    return rows[:, low] * (1 - share) + rows[:, low + 1] * share
