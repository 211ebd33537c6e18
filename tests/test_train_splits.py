import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from train_cases import make_folder

from lka_kernels.train.config import TrainConfig
from lka_kernels.train.dataset import load
from lka_kernels.train.errors import TrainError
from lka_kernels.train.splits import find_repeats, leaked, split

CLASSES = ("a", "b")


def hashes_of(numbers):
    return [number.to_bytes(4, "little") for number in numbers]


@given(
    st.lists(st.tuples(st.integers(0, 30), st.integers(0, 1)), min_size=4, max_size=80),
    st.integers(0, 5),
    st.floats(0.1, 0.5),
)
def test_split_keeps_identical_images_together(images, seed, fraction):
    hashes = hashes_of([number for number, _ in images])
    labels = [label for _, label in images]
    try:
        train, test = split(hashes, labels, CLASSES, fraction, seed)
    except TrainError:
        # Allowed only where some class has fewer than two groups of its own.
        owner = {h: labels[hashes.index(h)] for h in hashes}
        assert any(list(owner.values()).count(label) < 2 for label in (0, 1))
        return
    assert sorted(train + test) == list(range(len(images)))
    assert not {hashes[i] for i in train} & {hashes[i] for i in test}
    assert leaked(train, test, hashes) == []
    assert split(hashes, labels, CLASSES, fraction, seed) == (train, test)


def test_split_is_by_class_and_seeded():
    labels = [0] * 100 + [1] * 40
    hashes = hashes_of(range(140))
    train, test = split(hashes, labels, CLASSES, 0.2, 0)
    assert sum(i < 100 for i in test) == 20
    assert sum(i >= 100 for i in test) == 8
    assert split(hashes, labels, CLASSES, 0.2, 1)[1] != test
    assert len(train) == 112


def test_too_few_different_images_names_the_class():
    with pytest.raises(TrainError, match="class 'b' holds 1 different"):
        split(hashes_of([0, 1, 2, 5, 5]), [0, 0, 0, 1, 1], CLASSES)


def test_find_repeats():
    repeats = find_repeats(hashes_of([1, 2, 1, 3, 2, 1]), [0, 0, 0, 1, 1, 0])
    assert repeats.groups == [[0, 2, 5], [1, 4]]
    assert repeats.conflicts == [[1, 4]]


def test_conflicting_images_are_reported_by_name(tmp_path):
    make_folder(tmp_path)
    shutil.copy(tmp_path / "a" / "03.png", tmp_path / "b" / "same.png")
    data = load(TrainConfig(data=str(tmp_path)), 16)
    line = next(note for note in data.notes if "different classes" in note)
    assert "a/03.png" in line
    assert "b/same.png" in line
    assert data.report["images_under_several_classes"] == [["a/03.png", "b/same.png"]]
    together = [{p.name for p in half.paths} & {"same.png"} for half in (data.train, data.test)]
    holder = data.train if together[0] else data.test
    assert any(str(p).endswith("a/03.png") for p in holder.paths)


def test_leaks_of_a_given_split_are_counted_and_dropped_on_request(tmp_path):
    make_folder(tmp_path / "train", images=8)
    make_folder(tmp_path / "test", images=4, first_seed=500)
    for name in ("01", "02", "03"):
        shutil.copy(
            tmp_path / "train" / "a" / f"{name}.png", tmp_path / "test" / "a" / f"x{name}.png"
        )
    kept = load(TrainConfig(data=str(tmp_path)), 16)
    assert kept.report["train_images_in_test"] == 3
    assert len(kept.train) == 16
    assert any(note.startswith("3 training images stand in the test half") for note in kept.notes)
    dropped = load(TrainConfig(data=str(tmp_path), drop_leaked=True), 16)
    assert (len(dropped.train), len(dropped.test)) == (13, 11)
    assert not {"01.png", "02.png", "03.png"} & {
        p.name for p in dropped.train.paths if p.parent.name == "a"
    }


def test_dropping_every_image_of_a_class_names_it(tmp_path):
    make_folder(tmp_path / "train", images=3)
    make_folder(tmp_path / "test", images=3, first_seed=500)
    for path in (tmp_path / "train" / "b").iterdir():
        shutil.copy(path, tmp_path / "test" / "b" / f"x{path.name}")
    with pytest.raises(TrainError, match="class 'b' has no training image left"):
        load(TrainConfig(data=str(tmp_path), drop_leaked=True), 16)
