"""One image file to 8-bit RGB, whatever it holds: greyscale, palette, alpha, 16 bit, float."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import TrainError

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".pnm"}
)


def read_rgb(path: str | Path, sixteen_bit_max: int = 65535) -> Image.Image:
    """Decodes an image file in full.

    - 16-bit greyscale is scaled so that ``sixteen_bit_max`` becomes 255. A fixed scale, not one
      per image, so that brightness stays comparable between images.
    - float images must lie in 0..1 or 0..255.
    - transparent pixels become black: the colour stored under them is arbitrary.
    - the EXIF orientation is applied; of several frames the first is taken.

    Returns:
        PIL image in mode "RGB".

    Raises:
        TrainError: the file cannot be decoded; the message names it.
    """
    try:
        with Image.open(path) as image:
            image.load()  # a truncated file fails here, not when it is first used
            image = ImageOps.exif_transpose(image)
            return _to_rgb(image, sixteen_bit_max)
    # Pillow's decoders raise a wide range of exceptions on broken files (OSError, SyntaxError,
    # ValueError, struct.error, zlib.error, DecompressionBombError).
    except Exception as error:
        raise TrainError(f"cannot read image {path}: {error}") from error


def brightest_sixteen_bit(path: str | Path) -> int | None:
    """Largest value of a 16-bit greyscale image; None for every other kind."""
    with Image.open(path) as image:
        if not image.mode.startswith("I"):
            return None
        return int(np.asarray(image).max())


def pixel_hash(image: Image.Image) -> bytes:
    """128-bit hash of size and RGB pixels: equal for two files of different format or name."""
    digest = hashlib.blake2b(np.int64(image.size).tobytes(), digest_size=16)
    digest.update(np.asarray(image).tobytes())
    return digest.digest()


def fit(image: Image.Image, size: int, resize: str = "squash") -> np.ndarray:
    """Resizes an RGB image to a square.

    Returns:
        (size, size, 3) uint8.
    """
    if resize == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    elif resize == "pad":
        image = ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC)
    elif image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.array(image)


def _to_rgb(image: Image.Image, sixteen_bit_max: int) -> Image.Image:
    if image.mode.startswith("I"):  # "I;16", "I;16B", "I;16L", "I"
        values = np.asarray(image).astype(np.float64)
        if values.min() < 0 or values.max() > 65535:
            raise TrainError(
                f"integer values from {values.min():.0f} to {values.max():.0f} are outside 16 bit"
            )
        return _grey(values * (255.0 / sixteen_bit_max))
    if image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all() or values.min() < 0 or values.max() > 255:
            raise TrainError(
                f"float values from {values.min():g} to {values.max():g}; 0..1 or 0..255 expected"
            )
        return _grey(values * 255.0 if values.max() <= 1 else values)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        black = Image.new("RGBA", image.size, (0, 0, 0, 255))
        return Image.alpha_composite(black, image).convert("RGB")
    return image.convert("RGB")


def _grey(values: np.ndarray) -> Image.Image:
    grey = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
