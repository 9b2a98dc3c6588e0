"""Splits are fixed and stratified, batches are a function of seed and epoch alone."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from mfef_ext.train import UsageError, data


def rows(images):
    return {x.numpy().tobytes() for x in images.x}


def test_digits_are_split_without_overlap_and_by_class():
    whole, held_out = data.load("digits", 0), data.load("digits", 0.1)
    assert whole.shape == (1, 8, 8)
    assert len(whole.train) + len(whole.test) == 1797 and len(whole.validation) == 0
    assert len(held_out.train) + len(held_out.validation) == len(whole.train)
    assert torch.equal(whole.test.x, held_out.test.x)
    parts = [rows(held_out.train), rows(held_out.validation), rows(held_out.test)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    for part, share in ((held_out.test, 0.2), (held_out.validation, 0.08)):
        counts = np.bincount(part.y, minlength=10)
        assert counts.min() >= share * 174 - 1 and counts.max() <= share * 183 + 1


def test_normalisation_can_be_undone():
    d = data.load("digits", 0)
    assert abs(float(d.train.x.mean())) < 1e-4 and abs(float(d.train.x.std()) - 1) < 1e-3
    pixels = d.train.x * d.normalisation.std[0] + d.normalisation.mean[0]
    torch.testing.assert_close(pixels, d.train.pixels, rtol=0, atol=1e-4)
    assert float(d.train.pixels.min()) == 0 and float(d.train.pixels.max()) == 16


def test_normalisation_of_bytes_by_channel():
    pixels = torch.tensor([[[[0, 255]], [[51, 102]]]], dtype=torch.uint8)
    normalisation = data.Normalisation((0.5, 0.25), (0.5, 2.0), 255)
    expected = torch.tensor([[[[-1.0, 1.0]], [[-0.025, 0.075]]]])
    torch.testing.assert_close(normalisation(pixels), expected)
    images = data.Images(pixels.expand(5, -1, -1, -1), torch.arange(5), normalisation)
    whole = list(images.batches(2))
    assert [len(y) for _, y in whole] == [2, 2, 1]
    assert torch.equal(torch.cat([x for x, _ in whole]), images.x)
    assert torch.equal(torch.cat([y for _, y in whole]), images.y)


def test_an_epoch_shows_every_image_once_and_depends_on_seed_and_epoch_alone():
    d = data.load("fake", 0.1)
    first = list(data.training_batches(d, 50, seed=3, epoch=1))
    torch.rand(5)  # the global generator plays no part
    again = list(data.training_batches(d, 50, seed=3, epoch=1))
    for (x, y), (x_again, y_again) in zip(first, again, strict=True):
        assert len(x) == 1 and torch.equal(x[0], x_again[0]) and torch.equal(y, y_again)
    labels = torch.cat([y for _, y in first])
    assert torch.equal(labels.sort().values, d.train.y.sort().values)
    assert [len(y) for _, y in first][:-1] == [50] * (len(first) - 1)
    for seed, epoch in ((3, 2), (4, 1)):
        other = torch.cat([y for _, y in data.training_batches(d, 50, seed, epoch)])
        assert not torch.equal(labels, other)


def test_the_batches_of_digits_are_those_they_always_were():
    d = data.load("digits", 0.1)
    [x], y = next(data.training_batches(d, 64, seed=0, epoch=0))
    pixels = (x * d.normalisation.std[0] + d.normalisation.mean[0]).round().byte()
    assert y[:12].tolist() == [0, 8, 1, 8, 9, 7, 8, 2, 4, 6, 3, 3]
    assert hashlib.sha256(pixels.numpy().tobytes()).hexdigest().startswith("212c5b0b65dab0d9")


@pytest.mark.parametrize("border", ["replicate", "constant"])
def test_a_step_and_a_part_of_a_batch_are_the_same_alone(border):
    augmentation = data.Augmentation(2, flip=border == "constant", border=border)
    d = replace(data.load("fake", 0.1), augmentation=augmentation)
    whole = list(data.training_batches(d, 50, 3, 1, views=2))
    later = list(data.training_batches(d, 50, 3, 1, views=2, first_step=2))
    parts = [list(data.training_batches(d, 50, 3, 1, views=2, rank=r, ranks=3)) for r in range(3)]
    assert len(later) == len(whole) - 2
    for (views, y), (views_later, y_later) in zip(whole[2:], later, strict=True):
        assert torch.equal(torch.stack(views), torch.stack(views_later))
        assert torch.equal(y, y_later)
    for (views, y), *shares in zip(whole, *parts, strict=True):
        assert torch.equal(torch.stack(views), torch.cat([torch.stack(v) for v, _ in shares], 1))
        assert torch.equal(y, torch.cat([y for _, y in shares]))


def test_views_show_the_same_images_shifted_in_their_own_ways():
    d = data.load("fake", 0.1)
    for views, y in data.training_batches(d, 50, seed=3, epoch=1, views=3):
        assert len(views) == 3 and all(x.shape == (len(y), 3, 16, 16) for x in views)
        assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])
        # Every image is the same as in the other views, up to its borders.
        middle = [x[:, :, 3:-3, 3:-3] for x in views]
        for a, b in ((0, 1), (1, 2)):
            shifts = [
                views[b][:, :, 3 + i : 13 + i, 3 + j : 13 + j]
                for i in range(-2, 3)
                for j in range(-2, 3)
            ]
            same = torch.stack([(middle[a] == s).flatten(1).all(1) for s in shifts])
            assert bool(same.any(0).all())


@pytest.mark.parametrize(("border", "flip"), [("replicate", False), ("constant", True)])
def test_augmentation_shows_every_move_of_whole_images_and_nothing_else(border, flip):
    x = torch.arange(1.0, 13.0).reshape(1, 1, 3, 4).expand(800, 2, 3, 4)
    augmentation = data.Augmentation(1, flip, border)
    moved = augmentation(x, augmentation.draw(800, torch.Generator().manual_seed(0)))
    expected = set()
    for image in (x[:1], x[:1].flip(3)) if flip else (x[:1],):
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode=border)
        for dy in range(3):
            for dx in range(3):
                expected.add(padded[0, :, dy : dy + 3, dx : dx + 4].numpy().tobytes())
    assert {m.numpy().tobytes() for m in moved} == expected


def test_a_validation_share_that_misses_a_class_is_refused():
    with pytest.raises(UsageError, match=r"--validation=0.001 leaves a class"):
        data.load("digits", 0.001)


def test_few_labels_are_drawn_by_the_seed_from_what_validation_leaves():
    whole = data.load("digits", 0.1)
    few, again, more, other = (
        data.load("digits", 0.1, labels_per_class=count, seed=seed)
        for count, seed in ((10, 3), (10, 3), (20, 3), (10, 4))
    )
    assert torch.equal(few.train.x, again.train.x) and torch.equal(few.train.y, again.train.y)
    for d, count in ((few, 10), (more, 20), (other, 10)):
        assert np.bincount(d.train.y).tolist() == [count] * 10
        assert rows(d.train) <= rows(whole.train)
        for split in ("validation", "test"):
            assert torch.equal(getattr(d, split).x, getattr(whole, split).x)
    assert rows(few.train) < rows(more.train)
    assert len(rows(few.train) & rows(other.train)) < 50
    smallest = int(np.bincount(whole.train.y).min())
    assert len(data.load("digits", 0.1, labels_per_class=smallest).train) == 10 * smallest
    with pytest.raises(UsageError, match=f"--labels-per-class={smallest + 1} is too many"):
        data.load("digits", 0.1, labels_per_class=smallest + 1)
