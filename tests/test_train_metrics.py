import numpy as np
import pytest
import torch

from lka_kernels.train.batches import augment, epoch_order, in_order, normalise
from lka_kernels.train.metrics import score
from lka_kernels.train.synthetic import CLASSES, CellImages, _positions, generate


def test_scores_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 2])
    logits = torch.nn.functional.one_hot(predicted, 3).float()
    scores = score(logits, labels)
    assert scores.top1 == pytest.approx(4 / 6)
    assert scores.per_class == pytest.approx([2 / 3, 1 / 2, 1])
    assert scores.mean_class_accuracy == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert scores.confusion == [[2, 1, 0], [1, 1, 0], [0, 0, 1]]
    # F1 = 2 TP / (2 TP + FP + FN)
    assert scores.macro_f1 == pytest.approx((4 / 6 + 2 / 4 + 1) / 3)


def test_auroc_and_loss_by_hand():
    logits = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 3
    probabilities = logits.double().softmax(1)
    areas = []
    for label in range(3):
        own, rest = probabilities[labels == label, label], probabilities[labels != label, label]
        areas.append((own[:, None] > rest[None]).double().mean().item())
    scores = score(logits, labels)
    assert scores.auroc == pytest.approx(sum(areas) / 3, abs=1e-6)
    assert scores.loss == pytest.approx(
        -probabilities[torch.arange(60), labels].log().mean().item(), abs=1e-6
    )


def test_orders():
    order = epoch_order(21, 4, seed=3, epoch=1)
    assert [len(part) for part in order] == [4] * 5  # the single image left over is skipped
    again = epoch_order(21, 4, seed=3, epoch=1)
    assert all((a == b).all() for a, b in zip(order, again, strict=True))
    assert not all((a == b).all() for a, b in zip(order, epoch_order(21, 4, 3, 2), strict=True))
    assert len(epoch_order(5, 1, seed=3, epoch=1)) == 5
    assert np.concatenate(in_order(7, 3)).tolist() == list(range(7))


@pytest.mark.parametrize("kind", ["flip", "affine"])
def test_augmentation_depends_on_seed_epoch_and_index_only(kind):
    images = torch.randint(0, 256, (6, 3, 12, 12), dtype=torch.uint8)
    indices = np.arange(6) + 40
    whole = augment(images, indices, kind, seed=1, epoch=2)
    assert torch.equal(whole[3:5], augment(images[3:5], indices[3:5], kind, 1, 2))
    assert not torch.equal(whole, augment(images, indices, kind, 1, 3))
    assert not torch.equal(whole, augment(images, indices, kind, 2, 2))
    if kind == "flip":
        for before, after in zip(images, whole, strict=True):
            assert torch.equal(after, before) or torch.equal(after, before.flip(2))


def test_normalise():
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    expected = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert torch.allclose(normalise(images, (0.5,) * 3, (0.5,) * 3), expected)


def test_generated_classes_are_mirror_images_and_seeded():
    images, labels = generate(6, seed=4)
    assert labels.tolist() == [0, 1] * 3
    assert len(CLASSES) == 2
    assert np.array_equal(images[:4], generate(4, seed=4)[0])
    assert not np.array_equal(images, generate(6, seed=5)[0])
    assert images.dtype == np.uint8
    assert images.shape == (6, 96, 96, 3)


@pytest.mark.parametrize("distance", [20.0, 28.0])
def test_position_alone_does_not_tell_the_classes_apart(distance):
    """Both kinds of cell lie evenly over the image; mirrored, neither leans to a side."""
    options = CellImages(distance=distance)
    columns = {False: [], True: []}
    for index in range(3000):
        for x, _, brown in _positions(np.random.default_rng([9, index]), options):
            columns[brown].append(x)
    for values in columns.values():
        error = np.std(values) / len(values) ** 0.5
        assert abs(np.mean(values) - options.size / 2) < 4 * error
        counts, _ = np.histogram(values, 8, (options.radius[1] + 1, options.size - 5.5))
        expected = len(values) / 8
        assert np.abs(counts - expected).max() < 4.5 * expected**0.5
    numbers = [len(values) for values in columns.values()]
    assert abs(numbers[0] - numbers[1]) < 4 * sum(numbers) ** 0.5


def test_classes_differ_in_the_directed_distance():
    options = CellImages()
    images, labels = generate(160, seed=0, options=options)
    red, blue = images[..., 0].astype(int), images[..., 2].astype(int)
    brown, purple = (red - blue) > 25, (blue - red) > 20
    step = round(options.distance)
    for label, sign in ((0, -1), (1, 1)):
        own = brown[labels == label], purple[labels == label]
        ahead = (np.roll(own[1], sign * step, axis=2) & own[0]).sum()
        behind = (np.roll(own[1], -sign * step, axis=2) & own[0]).sum()
        assert ahead > 3 * behind
