"""The digits: the split, the augmentation by hand, and that every batch is a pure function of seed and step."""

from __future__ import annotations

import sys

import pytest
import torch

from ast_plugin import demo_data
from ast_plugin.demo_data import Augmentation, Digits, augment, load_digits, seeded_generator
from ast_plugin.errors import MissingExtraError

STILL = Augmentation(rotation=0.0, scale=0.0, shift=0.0, noise=0.0)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


def centred(images: torch.Tensor) -> torch.Tensor:
    return (images - demo_data._PIXEL_MEAN) / demo_data._PIXEL_STD


@pytest.mark.extra("demo")
def test_1000_images_train_and_797_images_in_three_views_test(digits: Digits) -> None:
    assert digits.train_images.shape == (1000, 1, 8, 8)
    assert digits.test_images.shape == (3 * 797, 1, 8, 8)
    assert digits.train_images.dtype == digits.test_images.dtype == torch.float32
    assert digits.train_labels.dtype == digits.test_labels.dtype == torch.int64
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1
    assert set(digits.train_labels.tolist()) == set(digits.test_labels.tolist()) == set(range(10))


@pytest.mark.extra("demo")
def test_the_three_views_show_the_same_digits_differently(digits: Digits) -> None:
    views = digits.test_images.reshape(3, 797, 1, 8, 8)
    labels = digits.test_labels.reshape(3, 797)
    assert torch.equal(labels[0], labels[1])
    assert torch.equal(labels[0], labels[2])
    assert not torch.equal(views[0], views[1])


@pytest.mark.extra("demo")
def test_no_test_image_is_a_training_image() -> None:
    still = load_digits(STILL)
    train = {tuple(image.flatten().tolist()) for image in centred(still.train_images)}
    test = {tuple(image.flatten().tolist()) for image in still.test_images}
    assert len(test) == 797
    assert not train & test


@pytest.mark.extra("demo")
def test_loading_twice_gives_the_same_data(digits: Digits) -> None:
    again = load_digits()
    assert torch.equal(digits.train_images, again.train_images)
    assert torch.equal(digits.test_images, again.test_images)


@pytest.mark.extra("demo")
def test_input_of_the_network_is_centred(digits: Digits) -> None:
    assert abs(float(digits.test_images.mean())) < 0.1
    assert abs(float(digits.test_images.std()) - 1) < 0.1


@pytest.mark.extra("demo")
@pytest.mark.parametrize(("seed", "step"), [(0, 0), (0, 7), (3, 0), (3, 1000)])
def test_a_batch_depends_on_seed_and_step_alone(digits: Digits, seed: int, step: int) -> None:
    images, labels = digits.batch(step, seed=seed, batch_size=32)
    torch.rand(5)  # the global generator has no say
    digits.batch(step + 1, seed=seed, batch_size=32)
    again_images, again_labels = digits.batch(step, seed=seed, batch_size=32)
    assert torch.equal(images, again_images)
    assert torch.equal(labels, again_labels)
    assert images.shape == (32, 1, 8, 8)
    assert not torch.equal(images, digits.batch(step + 1, seed=seed, batch_size=32)[0])
    assert not torch.equal(images, digits.batch(step, seed=seed + 1, batch_size=32)[0])


@pytest.mark.extra("demo")
def test_every_image_is_drawn_once_an_epoch_also_when_batches_straddle_epochs() -> None:
    still = load_digits(STILL)
    # 1000 / 96 is no whole number: 125 batches of 96 are 12 epochs to the image.
    drawn = torch.cat([images for images, _ in still.batches(0, 125, seed=0, batch_size=96)])
    values, counts = torch.unique(drawn.flatten(1), dim=0, return_counts=True)
    assert len(values) == 1000
    assert set(counts.tolist()) == {12}


def test_amounts_of_zero_leave_the_image_as_it_is() -> None:
    images = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(augment(images, STILL, seeded_generator("test", 0, 0)), centred(images))


def test_augmenting_leaves_its_input_alone() -> None:
    images = torch.rand(4, 1, 8, 8)
    before = images.clone()
    augment(images, Augmentation(), seeded_generator("test", 0, 0))
    assert torch.equal(images, before)


def test_shift_moves_the_centre_of_mass_by_at_most_the_amount() -> None:
    # One bright pixel at row 4, column 4 of a 9 x 9 image: after a shift alone its mass is spread over the pixels
    # around the point that it moved to, so the centre of mass is exactly that point.
    images = torch.zeros(64, 1, 9, 9)
    images[:, 0, 4, 4] = 1
    moved = augment(images, Augmentation(rotation=0, scale=0, shift=2.0, noise=0), seeded_generator("shift", 0, 0))
    mass = moved[:, 0] * demo_data._PIXEL_STD + demo_data._PIXEL_MEAN
    rows, columns = torch.arange(9.0).reshape(9, 1), torch.arange(9.0).reshape(1, 9)
    down = (mass * rows).sum(dim=(1, 2)) - 4
    across = (mass * columns).sum(dim=(1, 2)) - 4
    for distance in (down, across):
        assert distance.abs().max() <= 2 + 1e-4
        assert distance.abs().max() > 1.5  # 64 even draws from [-2, 2] reach beyond 1.5
        assert distance.min() < 0 < distance.max()


def test_rotation_turns_around_the_centre() -> None:
    # A pixel three to the right of the centre keeps its distance from it, whatever the angle.
    images = torch.zeros(32, 1, 9, 9)
    images[:, 0, 4, 7] = 1
    moved = augment(images, Augmentation(rotation=90, scale=0, shift=0, noise=0), seeded_generator("turn", 0, 0))
    mass = moved[:, 0] * demo_data._PIXEL_STD + demo_data._PIXEL_MEAN
    mass = mass / mass.sum(dim=(1, 2), keepdim=True)
    rows, columns = torch.arange(9.0).reshape(9, 1) - 4, torch.arange(9.0).reshape(1, 9) - 4
    down, across = (mass * rows).sum(dim=(1, 2)), (mass * columns).sum(dim=(1, 2))
    # Bilinear sampling shifts the centre of mass by a fraction of a pixel.
    torch.testing.assert_close(torch.hypot(down, across), torch.full((32,), 3.0), atol=0.4, rtol=0)
    assert down.min() < -2
    assert down.max() > 2


def test_generators_for_different_purposes_seeds_and_steps_differ() -> None:
    seen = {
        tuple(torch.rand(4, generator=seeded_generator(purpose, seed, index)).tolist())
        for purpose in ("batch", "epoch")
        for seed in range(10)
        for index in range(50)
    }
    assert len(seen) == 2 * 10 * 50


def test_missing_scikit_learn_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingExtraError, match=r"the demo needs the package 'scikit-learn'.*ast-plugin\[demo\]"):
        load_digits()
