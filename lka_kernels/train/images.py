"""One image file to 8-bit RGB, whatever it holds: greyscale, palette, alpha, 16 bit, float."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from .errors import TrainError

SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".pgm", ".ppm", ".pnm"}
)

# Pillow's ending of raw modes for the byte order that this processor does not have.
_FOREIGN = ";16B" if sys.byteorder == "little" else ";16L"


def read_rgb(path: str | Path, sixteen_bit_max: int = 65535) -> Image.Image:
    """The image of :func:`decode`."""
    return decode(path, sixteen_bit_max)[0]


def decode(path: str | Path, sixteen_bit_max: int = 65535) -> tuple[Image.Image, int]:
    """Decodes an image file in full.

    - 16-bit greyscale and colour are scaled so that ``sixteen_bit_max`` becomes 255. A fixed
      scale, not one per image, so that brightness stays comparable between images. Kinds of 16-bit
      colour of which only 8 bits can be had are refused where another scale is asked for.
    - float images must lie in 0..1 or 0..255.
    - transparent pixels become black: the colour stored under them is arbitrary.
    - the EXIF orientation is applied; of several frames the first is taken.

    Returns:
        PIL image in mode "RGB", and its brightest 16-bit value, 0 where it has none.

    Raises:
        TrainError: the file cannot be decoded; the message names it.
    """
    try:
        with Image.open(path) as image:
            brightest = 0
            if _sixteen_bit_colour(image):
                image, brightest = _scaled_colour(image, path, sixteen_bit_max)
            image.load()  # a truncated file fails here, not when it is first used
            if image.mode.startswith("I"):
                brightest = int(np.asarray(image).max())
            image = ImageOps.exif_transpose(image)
            return _to_rgb(image, sixteen_bit_max), brightest
    # Pillow's decoders raise a wide range of exceptions on broken files (OSError, SyntaxError,
    # ValueError, struct.error, zlib.error, DecompressionBombError).
    except Exception as error:
        raise TrainError(f"cannot read image {path}: {error}") from error


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


def _sixteen_bit_colour(image: Image.Image) -> bool:
    """Whether an opened file holds more than 8 bits a channel that Pillow is going to drop."""
    if image.mode.startswith(("I", "F")) or not image.tile:
        return False
    if image.format == "TIFF":
        return max(image.tag_v2.get(258, (1,))) > 8  # BitsPerSample
    arguments = _arguments(image.tile[0])
    if image.format == "PPM":
        return isinstance(arguments[-1], int) and arguments[-1] > 255
    return ";16" in str(arguments[0])


def _scaled_colour(
    image: Image.Image, path: str | Path, sixteen_bit_max: int
) -> tuple[Image.Image, int]:
    """An opened image of 16-bit colour at 8 bits, ``sixteen_bit_max`` as 255; its largest value."""
    # Pillow takes uncompressed planes for 8 bits, and returns noise.
    misread = image.format == "TIFF" and _in_planes(image) and image.tile[0][0] == "raw"
    values = _sixteen_bit_values(image, path)
    image.load()
    if values is None:
        if misread:
            raise TrainError("16-bit colour in uncompressed planes: convert the file to PNG")
        if sixteen_bit_max != 65535:
            raise TrainError(
                f"16-bit colour of this kind is read to 8 bits only, but --sixteen_bit_max "
                f"{sixteen_bit_max} needs all of them: convert the file to PNG"
            )
        return image, 257 * int(np.asarray(image.convert("RGB")).max())
    channels = values.shape[2]
    colours = 1 if channels == 2 else 3
    white = np.array([sixteen_bit_max] * colours + [65535] * (channels - colours))
    scaled = np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparent is not None and channels == 3:
        opaque = 255 * (values != np.array(transparent)).any(2, keepdims=True)
        scaled = np.concatenate([scaled, opaque.astype(np.uint8)], 2)
    new = Image.fromarray(scaled)
    new.info.update({k: v for k, v in image.info.items() if k in _ORIENTATION})
    return new, int(values[..., :colours].max())


# Where Pillow looks for the orientation.
_ORIENTATION = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")


def _sixteen_bit_values(image: Image.Image, path: str | Path) -> np.ndarray | None:
    """(height, width, channels) uint16, or None for a kind whose low bytes are out of reach.

    Pillow has no mode for 16-bit colour and drops the low bytes. Told that the file has the other
    byte order, it drops the high ones.
    """
    raw = {str(_arguments(tile)[0]) for tile in image.tile}
    if raw == {"LA;16B"} and image.mode == "RGBA":  # four bytes a pixel, like RGBA
        both = _loaded(path, "RGBA").astype(np.uint16)
        return both[..., 0::2] * 256 + both[..., 1::2]
    if image.format == "TIFF" and _in_planes(image):
        return None
    swapped = {";16B": ";16L", ";16L": ";16B", ";16N": _FOREIGN}
    mode, order = next(iter(raw))[:-4], next(iter(raw))[-4:]
    if len(raw) > 1 or mode not in ("RGB", "RGBA", "RGBX") or order not in swapped:
        return None
    high, low = (_loaded(path, mode + o).astype(np.uint16) for o in (order, swapped[order]))
    return high * 256 + low


def _in_planes(image: Image.Image) -> bool:
    return image.tag_v2.get(284) == 2  # PlanarConfiguration


def _loaded(path: str | Path, raw: str) -> np.ndarray:
    """The bytes of an image, unpacked as Pillow's raw mode ``raw`` says."""
    with Image.open(path) as image:
        image.tile = [
            tile._replace(args=raw if isinstance(tile[3], str) else (raw, *tile[3][1:]))
            for tile in image.tile
        ]
        return np.asarray(image)


def _arguments(tile) -> tuple:
    return (tile[3],) if isinstance(tile[3], str) else tile[3]


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
