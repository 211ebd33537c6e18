import errno
import os
import re
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image
from train_cases import make_folder, make_image

from lka_kernels.train.config import TrainConfig
from lka_kernels.train.data import decode_all, scan
from lka_kernels.train.dataset import load
from lka_kernels.train.errors import TrainError
from lka_kernels.train.images import decode, fit, pixel_hash, read_rgb

# How a folder may be listed: os.walk and Path.iterdir each take one of these.
LISTING = ("scandir", "listdir")


def pixels(path, **options):
    image = read_rgb(path, **options)
    assert image.mode == "RGB"
    return np.asarray(image)


def test_classes_and_images_in_order(tmp_path):
    make_folder(tmp_path, classes=3, images=4)
    (tmp_path / "a" / "notes.txt").write_text("x")
    (tmp_path / "a" / ".hidden.png").write_text("x")
    folder = scan(tmp_path)
    assert folder.classes == ("a", "b", "c")
    assert folder.test is None
    assert [s.label for s in folder.train] == [0] * 4 + [1] * 4 + [2] * 4
    assert any(".txt" in note for note in folder.notes)


@pytest.mark.parametrize("names", [("train", "test"), ("train", "val"), ("Training", "Testing")])
def test_halves(tmp_path, names):
    for place, name in enumerate(names):
        make_folder(tmp_path / name, images=3 + place, first_seed=50 * place)
    folder = scan(tmp_path)
    assert (len(folder.train), len(folder.test)) == (6, 8)


def test_train_val_and_test_evaluates_on_test_and_says_so(tmp_path):
    for place, name in enumerate(("train", "val", "test")):
        make_folder(tmp_path / name, images=2 + place)
    folder = scan(tmp_path)
    assert len(folder.test) == 8
    assert any("val is not used" in note for note in folder.notes)
    assert len(scan(tmp_path, test_half="val").test) == 6


def test_limit_and_exclude(tmp_path):
    make_folder(tmp_path, images=10)
    assert len(scan(tmp_path, limit_per_class=3).train) == 6
    assert len(scan(tmp_path, exclude=["0[0-4]*"]).train) == 10


def bad_missing(root):
    return root / "nowhere", "nowhere does not exist"


def bad_file(root):
    make_image(root / "x.png", 0)
    return root / "x.png", "is a file"


def bad_no_classes(root):
    make_image(root / "x.png", 0)
    return root, "1 images but no class folders"


def bad_empty_class(root):
    make_folder(root)
    (root / "empty").mkdir()
    return root, "empty holds no images"


def bad_kind(root):
    make_folder(root)
    (root / "scans").mkdir()
    (root / "scans" / "1.dcm").write_text("x")
    return root, r"scans holds no images; its 1 files \(\.dcm\)"


def bad_single_class(root):
    make_folder(root, classes=1)
    return root, "single class, 'a'"


def bad_class_only_in_train(root):
    make_folder(root / "train", classes=3)
    make_folder(root / "test", classes=2)
    return root, "class 'c' is in .*train but not in .*test"


def bad_class_only_in_test(root):
    make_folder(root / "train", classes=2)
    make_folder(root / "test", classes=3)
    return root, "class 'c' is in .*test but not in .*train"


def bad_test_without_train(root):
    make_folder(root / "test")
    return root, "test but no train"


@pytest.mark.parametrize(
    "make",
    [v for k, v in sorted(globals().items()) if k.startswith("bad_")],
    ids=lambda f: f.__name__,
)
def test_bad_folders(tmp_path, make):
    root, message = make(tmp_path)
    with pytest.raises(TrainError, match=message):
        scan(root)


def test_broken_images_are_named_before_training(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "a" / "garbage.png").write_bytes(b"this is no image")
    whole = (tmp_path / "b" / "00.png").read_bytes()
    (tmp_path / "b" / "truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "empty.jpg").write_bytes(b"")
    with pytest.raises(TrainError) as raised:
        load(TrainConfig(data=str(tmp_path)), 16)
    for name in ("garbage.png", "truncated.png", "empty.jpg", "3 of 23"):
        assert name in str(raised.value)


def test_links_that_lead_nowhere_are_broken_images(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(TrainError, match=r"1 of 21 images are broken:\n.*gone\.png"):
        load(TrainConfig(data=str(tmp_path)), 16)


@pytest.mark.parametrize("locked", ["", "a", "a/deep"])
def test_folders_without_permission_are_named(tmp_path, monkeypatch, locked):
    make_folder(tmp_path)
    make_image(tmp_path / "a" / "deep" / "x.png", 7)
    closed, real = str(tmp_path / locked), {name: getattr(os, name) for name in LISTING}

    def refuse(name, path):
        if os.fspath(path) == closed:  # chmod would not stop a test that runs as root
            raise PermissionError(errno.EACCES, "Permission denied", closed)
        return real[name](path)

    for name in LISTING:
        monkeypatch.setattr(os, name, partial(refuse, name))
    with pytest.raises(TrainError, match=f"{re.escape(closed)} cannot be read: Permission denied"):
        scan(tmp_path)


def test_sixteen_bit_grey(tmp_path):
    values = np.array([[0, 257], [65535, 257 * 100]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    expected = np.array([[0, 1], [255, 100]])[..., None].repeat(3, 2)
    np.testing.assert_array_equal(pixels(tmp_path / "x.png"), expected)
    Image.fromarray(values // 257 * 16).save(tmp_path / "y.tif")  # 12 bit in 16
    np.testing.assert_array_equal(pixels(tmp_path / "y.tif", sixteen_bit_max=4080), expected)


def deep_png(path, values, colour_type, *chunks):
    """Writes 16 bits a channel in colour, as no dependency of the tests does."""
    height, width = values.shape[:2]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    packed = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + packed)


def test_sixteen_bit_colour(tmp_path):
    colour = np.array([[[0, 257, 514], [4080, 2040, 1020]]])
    opaque, clear = np.full((1, 2, 1), 65535), np.array([[[65535], [0]]])
    file = tmp_path / "x.png"
    deep_png(file, colour, 2)
    expected = [[[0, 16, 32], [255, 128, 64]]]
    np.testing.assert_array_equal(pixels(file, sixteen_bit_max=4080), expected)
    np.testing.assert_array_equal(pixels(file), [[[0, 1, 2], [16, 8, 4]]])
    assert decode(file)[1] == 4080
    deep_png(file, np.concatenate([colour, opaque], 2), 6)
    np.testing.assert_array_equal(pixels(file, sixteen_bit_max=4080), expected)
    assert decode(file)[1] == 4080
    for values, kind, chunks in (
        (np.concatenate([colour, clear], 2), 6, ()),
        (colour, 2, [(b"tRNS", struct.pack(">HHH", 4080, 2040, 1020))]),
    ):
        deep_png(file, values, kind, *chunks)
        found = pixels(file, sixteen_bit_max=4080)
        np.testing.assert_array_equal(found, [[[0, 16, 32], [0, 0, 0]]])
    deep_png(file, np.concatenate([colour[..., 1:2], clear], 2), 4)
    np.testing.assert_array_equal(pixels(file, sixteen_bit_max=257), [[[255] * 3, [0] * 3]])


def test_sixteen_bit_colour_keeps_the_orientation_of_xmp(tmp_path):
    turned = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    chunk = (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + turned)
    deep_png(tmp_path / "x.png", np.zeros((2, 5, 3)), 2, chunk)
    assert pixels(tmp_path / "x.png").shape == (5, 2, 3)


def test_sixteen_bit_colour_that_is_no_png(tmp_path):
    values = np.array([[[0, 257, 514], [4112, 2056, 1028]]])
    file = tmp_path / "x.ppm"  # Pillow scales it to 8 bits itself
    file.write_bytes(b"P6 2 1 65535\n" + values.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(file), values // 257)
    assert decode(file)[1] == 4112
    with pytest.raises(TrainError, match=r"x\.ppm.*--sixteen_bit_max 4095.*PNG"):
        read_rgb(file, 4095)
    tiff = tmp_path / "x.tif"
    entries = [  # width, height, bits, compression, RGB, offset, channels, rows, bytes
        (256, 3, 1, 2), (257, 3, 1, 1), (258, 3, 3, 8 + 2 + 9 * 12 + 4), (259, 3, 1, 1),
        (262, 3, 1, 2), (273, 4, 1, 128), (277, 3, 1, 3), (278, 3, 1, 1), (279, 4, 1, 12),
    ]  # fmt: skip
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    head += b"".join(struct.pack("<HHII", *entry) for entry in entries)
    head += struct.pack("<IHHH", 0, 16, 16, 16)
    tiff.write_bytes(head.ljust(128, b"\0") + values.astype("<u2").tobytes())
    np.testing.assert_array_equal(pixels(tiff), values // 257)
    assert decode(tiff)[1] == 4112
    expected = [[[0, 16, 32], [255, 128, 64]]]
    np.testing.assert_array_equal(pixels(tiff, sixteen_bit_max=4112), expected)
    content = bytearray(tiff.read_bytes())
    struct.pack_into("<HHII", content, 10 + 8 * 12, 284, 3, 1, 2)  # for the count of bytes: planes
    tiff.write_bytes(content)
    with pytest.raises(TrainError, match="planes"):
        read_rgb(tiff)


@pytest.mark.parametrize("colour", [False, True])
def test_dark_sixteen_bit_images_are_reported(tmp_path, colour):
    make_folder(tmp_path)
    if colour:
        deep_png(tmp_path / "a" / "deep.png", np.full((8, 8, 3), 4095), 2)
    else:
        Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / "a" / "deep.png")
    notes = load(TrainConfig(data=str(tmp_path)), 8).notes
    assert any("--sixteen_bit_max 4095" in note for note in notes)


def test_other_modes_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    np.testing.assert_array_equal(pixels(tmp_path / "grey.png"), grey[..., None].repeat(3, 2))
    Image.fromarray(grey > 30).save(tmp_path / "bits.png")
    np.testing.assert_array_equal(pixels(tmp_path / "bits.png")[..., 0], (grey > 30) * 255)

    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(
        pixels(tmp_path / "palette.png"), [[[10, 20, 30], [200, 100, 50]]]
    )

    Image.fromarray(np.array([[[0, 255, 255, 0]]], np.uint8), "CMYK").save(tmp_path / "cmyk.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "cmyk.tif"), [[[255, 0, 0]]])
    Image.fromarray(np.array([[[9, 255], [9, 0]]], np.uint8), "LA").save(tmp_path / "la.png")
    np.testing.assert_array_equal(pixels(tmp_path / "la.png"), [[[9] * 3, [0] * 3]])

    rgba = np.array([[[255, 0, 0, 255], [0, 255, 0, 0]]], np.uint8)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(pixels(tmp_path / "alpha.png"), [[[255, 0, 0], [0, 0, 0]]])

    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "float.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "float.tif")[..., 0], [[0, 128, 255]])
    Image.fromarray(np.array([[0.0, 900.0]], np.float32)).save(tmp_path / "odd.tif")
    with pytest.raises(TrainError, match=r"odd\.tif.*900"):
        read_rgb(tmp_path / "odd.tif")


def test_hash_is_of_pixels_not_of_files(tmp_path):
    make_image(tmp_path / "x.png", 1)
    image = read_rgb(tmp_path / "x.png")
    image.save(tmp_path / "x.bmp")
    assert pixel_hash(read_rgb(tmp_path / "x.bmp")) == pixel_hash(image)
    make_image(tmp_path / "y.png", 2)
    assert pixel_hash(read_rgb(tmp_path / "y.png")) != pixel_hash(image)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
def test_fit(tmp_path, resize):
    image = Image.new("RGB", (40, 20), (200, 200, 200))
    fitted = fit(image, 16, resize)
    assert fitted.shape == (16, 16, 3)
    assert fitted.dtype == np.uint8
    assert (fitted[0].max() == 0) == (resize == "pad")


def test_images_from_disk_equal_images_from_memory(tmp_path):
    make_folder(tmp_path, images=5)
    kept = load(TrainConfig(data=str(tmp_path)), 16)
    read = load(TrainConfig(data=str(tmp_path), cache_images_gb=0), 16)
    assert kept.train.pixels is not None
    assert read.train.pixels is None
    orders = [np.array([3, 0, 5]), np.array([1])]
    for (_, a), (_, b) in zip(kept.train.batches(orders), read.train.batches(orders), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_decode_all_keeps_order(tmp_path):
    make_folder(tmp_path, images=6)
    paths = [sample.path for sample in scan(tmp_path).train]
    decoded = decode_all(paths, 24, workers=4)
    for path, got in zip(paths, decoded.pixels, strict=True):
        np.testing.assert_array_equal(got, pixels(path))
