"""The demo's network: a small residual network for 8 x 8 images, six blocks, BatchNorm.

The layout is that of the CIFAR networks of He et al. 2016 ("Deep Residual Learning for Image Recognition",
section 4.2): three stages of two blocks, each stage halving the image and doubling the channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm around a shortcut.

    Args:
        inputs: Channels that come in.
        outputs: Channels that go out.
        stride: 2 halves the image; the shortcut is then a strided 1 x 1 convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (count, inputs, height, width) to (count, outputs, height / stride, width / stride)."""
        hidden = torch.relu(self.norm1(self.conv1(inputs)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.shortcut(inputs))


class DigitsResNet(nn.Module):
    """A stem, three stages of two residual blocks, average pooling and a linear classifier.

    Args:
        width: Channels of the first stage; the second has twice, the third four times as many.
        classes: Number of classes.
    """

    def __init__(self, width: int = 24, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.stages = nn.Sequential(
            ResidualBlock(width, width),
            ResidualBlock(width, width),
            ResidualBlock(width, 2 * width, stride=2),
            ResidualBlock(2 * width, 2 * width),
            ResidualBlock(2 * width, 4 * width, stride=2),
            ResidualBlock(4 * width, 4 * width),
        )
        self.classifier = nn.Linear(4 * width, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return class scores of shape (count, classes) for images of shape (count, 1, height, width)."""
        hidden = torch.relu(self.stem_norm(self.stem(images)))
        return self.classifier(self.stages(hidden).mean(dim=(2, 3)))  # type: ignore[no-any-return]
