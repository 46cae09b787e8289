"""The demo's data: scikit-learn's handwritten digits, augmented until they are worth training on.

1797 real 8 x 8 images come with the scikit-learn package, so nothing is downloaded. 1000 of them train, 797 test.
Rotation, scale, shift and noise make the task hard enough for a 98 % sparse network to differ from a dense one.

Every batch is a pure function of (seed, step): there is no loader to wind forward and no random state to save, so a
resumed run sees the very batches that the interrupted one would have seen.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from ast_plugin.errors import missing_extra

TRAIN_IMAGES = 1000
TEST_IMAGES = 797
TEST_VIEWS = 3
CLASSES = 10

# Split and test views are the same for every seed: runs with different seeds stay comparable.
_SPLIT_SEED = 0

# Mean and standard deviation of the pixels, in [0, 1], rounded; only there to centre the input.
_PIXEL_MEAN = 0.305
_PIXEL_STD = 0.376


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How far an image is moved and blurred; each amount is drawn evenly from an interval around zero.

    Attributes:
        rotation: Largest angle, in degrees.
        scale: Largest relative change of size: 0.2 draws factors from [1 / 1.2, 1.2].
        shift: Largest move along each axis, in pixels.
        noise: Standard deviation of the Gaussian noise added to pixels in [0, 1].
    """

    rotation: float = 30.0
    scale: float = 0.25
    shift: float = 1.0
    noise: float = 0.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Digits:
    """The digits, split; all images are float32 of shape (count, 1, 8, 8), labels int64 in [0, 10).

    Attributes:
        train_images: The 1000 training images as they are, in [0, 1].
        train_labels: Their labels.
        test_images: The 797 test images in three fixed augmented views each, ready for the network.
        test_labels: Their labels.
        augmentation: What `batch` does to the training images.
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    augmentation: Augmentation

    def batch(self, step: int, *, seed: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Return the training batch of a step, augmented and ready for the network.

        The images come from one endless sequence of shuffled epochs, so that every image is drawn equally often
        whatever the batch size.

        Args:
            step: Number of the step, from 0.
            seed: Seed of the run.
            batch_size: Number of images.

        Returns:
            Images of shape (batch_size, 1, 8, 8), float32, and labels of shape (batch_size,), int64.
        """
        count = len(self.train_images)
        positions = range(step * batch_size, (step + 1) * batch_size)
        chosen = torch.stack([_epoch_order(seed, p // count, count)[p % count] for p in positions])
        images = augment(self.train_images[chosen], self.augmentation, seeded_generator("batch", seed, step))
        return images, self.train_labels[chosen]

    def batches(self, first: int, count: int, *, seed: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the training batches of `count` steps from step `first` on."""
        for step in range(first, first + count):
            yield self.batch(step, seed=seed, batch_size=batch_size)


def load_digits(augmentation: Augmentation | None = None) -> Digits:
    """Load, split and prepare the digits.

    Args:
        augmentation: How training and test images are varied; None takes the demo's amounts.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise missing_extra("the demo", "scikit-learn", "demo") from error
    amounts = augmentation or Augmentation()
    raw = datasets.load_digits()
    images = torch.as_tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=seeded_generator("split", _SPLIT_SEED, 0))
    train, test = order[:TRAIN_IMAGES], order[TRAIN_IMAGES:]
    views = [augment(images[test], amounts, seeded_generator("test", _SPLIT_SEED, view)) for view in range(TEST_VIEWS)]
    return Digits(
        train_images=images[train],
        train_labels=labels[train],
        test_images=torch.cat(views),
        test_labels=labels[test].repeat(TEST_VIEWS),
        augmentation=amounts,
    )


def augment(images: Tensor, amounts: Augmentation, generator: torch.Generator) -> Tensor:
    """Return the images rotated, scaled, shifted, with noise, and centred around zero.

    Args:
        images: Shape (count, 1, height, width), float32, in [0, 1]; not changed.
        amounts: How much of each.
        generator: Where the random amounts come from; it is advanced.

    Returns:
        A tensor of the same shape, with mean about 0 and standard deviation about 1.
    """
    count, _, height, width = images.shape
    angle, size, across, down = (2 * torch.rand(4, count, generator=generator) - 1).unbind()
    angle = angle * math.radians(amounts.rotation)
    # grid_sample asks where each output pixel comes from, so the factor is the inverse of the change of size.
    factor = torch.exp(-size * math.log1p(amounts.scale))
    cosine, sine = torch.cos(angle) * factor, torch.sin(angle) * factor
    # Coordinates run from -1 to 1 over the image: a pixel is 2 / width.
    across, down = across * amounts.shift * 2 / width, down * amounts.shift * 2 / height
    matrices = torch.stack(
        [torch.stack([cosine, -sine, across], dim=1), torch.stack([sine, cosine, down], dim=1)], dim=1
    )
    grid = functional.affine_grid(matrices, list(images.shape), align_corners=False)
    moved = functional.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    moved = moved + amounts.noise * torch.randn(moved.shape, generator=generator)
    return (moved - _PIXEL_MEAN) / _PIXEL_STD


def seeded_generator(purpose: str, seed: int, index: int) -> torch.Generator:
    """Return a generator that depends on nothing but its arguments.

    Args:
        purpose: Keeps random choices for different purposes apart.
        seed: Seed of the run.
        index: The step, epoch or view.
    """
    # torch's CPU generator starts from 32 bits: a digest spreads neighbouring seeds and steps over all of them.
    digest = hashlib.blake2b(f"{purpose}:{seed}:{index}".encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.randperm(count, generator=seeded_generator("epoch", seed, epoch))
