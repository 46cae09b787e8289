"""Write scikit-learn's handwritten digits as an image folder that timm and torchvision read: DIR/train/7/0001.png.

python examples/digits_folder.py DIR
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

_TRAIN = 1000  # of 1797
_SIZE = 32


def write_digits(folder: Path, *, train: int = _TRAIN, validation: int | None = None, size: int = _SIZE) -> None:
    """Write the pictures, in an order that is the same every time.

    Args:
        folder: Where ``train`` and ``validation`` are made.
        train: Number of pictures for training.
        validation: Number of pictures for evaluation; None takes the rest.
        size: Height and width in pixels.
    """
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    last = len(order) if validation is None else train + validation
    for split, chosen in (("train", order[:train]), ("validation", order[train:last])):
        for index in chosen:
            place = folder / split / str(digits.target[index])
            place.mkdir(parents=True, exist_ok=True)
            pixels = (digits.images[index] * (255 / 16)).astype(np.uint8)
            picture = Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR).convert("RGB")
            picture.save(place / f"{index:04d}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write scikit-learn's digits as an image folder.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    write_digits(parser.parse_args().folder)
